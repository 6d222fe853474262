"""A LoRA adapter with random weights, written as GGUF."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

RANK = 4
PARTS = ("attn_q", "attn_output", "ffn_down")  # of every layer


def write_adapter(base: Path, path: Path, seed: int = 1) -> Path:
    """An adapter of a base model that changes its texts without spoiling them."""
    reader = gguf.GGUFReader(base)
    arch = str(reader.fields["general.architecture"].contents())
    predicts = reader.fields.get(
        f"{arch}.nextn_predict_layers"
    )  # the last, which only a model that drafts loads
    n_layer = int(reader.fields[f"{arch}.block_count"].contents()) - (
        int(predicts.contents()) if predicts else 0
    )
    names = {f"blk.{i}.{part}.weight" for i in range(n_layer) for part in PARTS}
    draw = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(RANK))
    for tensor in reader.tensors:
        if tensor.name in names:
            n_in, n_out = (int(n) for n in tensor.shape)
            a = draw.standard_normal((RANK, n_in)) / np.sqrt(n_in)
            b = draw.standard_normal((n_out, RANK)) * 0.3
            writer.add_tensor(f"{tensor.name}.lora_a", a.astype(np.float32))
            writer.add_tensor(f"{tensor.name}.lora_b", b.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
