"""A trained EAGLE-3 layer as the GGUF that llama.cpp loads beside its model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from ..common.atomic import atomic_path
from ..convert.quantise import quantise
from ..convert.writer import OUTTYPES, add_provenance, matrix_type
from ..models.base import BaseModel
from .eagle3 import ARCH, Layer
from .heads import State

OF_FILE = ("fc", "output_norm", "output")  # others are of the layer, blk.0


def write_eagle3(
    outfile: Path,
    layer: Layer,
    state: State,
    scale: torch.Tensor,
    base: BaseModel,
    draft_vocab: npt.NDArray[np.int64] | None,
    outtype: str,
    about: Mapping[str, str | int | float],
) -> None:
    """Write `outfile`, which appears whole or not at all.

    Args:
        scale: by what the features were divided; `fc` divides them itself from here on.
        base: the model that it is for, whose vocabulary is copied.
        draft_vocab: base tokens of the rows of `output`, None for all in order.
        outtype: a key of OUTTYPES, or auto: as the base model's own matrices.
        about: how it was trained; becomes keys of the file.
    """
    kind, file_type = OUTTYPES[base.outtype if outtype == "auto" else outtype]
    with atomic_path(outfile) as temporary:
        w = GGUFWriter(temporary, ARCH)
        try:
            w.add_name(f"EAGLE-3 layer for {base.name or base.path.name}")
            w.add_file_type(int(file_type))
            _add_numbers(w, layer, base)
            _add_tokenizer(w, base.path)
            add_provenance(w, about)
            if draft_vocab is not None:
                w.add_tensor("d2t", draft_vocab.astype(np.int64))
            for name in layer.shapes(0):
                values = state[name] / scale if name == "fc" else state[name]
                rows = values.float().numpy()
                stored = matrix_type(rows.shape, kind)
                name = f"{name}.weight" if name in OF_FILE else f"blk.0.{name}.weight"
                if rows.ndim > 1:
                    w.add_tensor(name, quantise(rows, stored), raw_dtype=stored)
                else:
                    w.add_tensor(name, rows)
            w.write_header_to_file()
            w.write_kv_data_to_file()
            w.write_tensors_to_file()
        finally:
            w.close()


def _add_numbers(w: GGUFWriter, layer: Layer, base: BaseModel) -> None:
    w.add_context_length(int(base.keys.get("context_length") or 2048))
    w.add_embedding_length(layer.n_embd)
    w.add_block_count(1)
    w.add_feed_forward_length(layer.n_ff)
    w.add_head_count(layer.n_head)
    w.add_head_count_kv(layer.n_head_kv)
    w.add_key_length(layer.head_dim)
    w.add_value_length(layer.head_dim)
    w.add_rope_dimension_count(layer.head_dim)
    w.add_rope_freq_base(layer.rope_base)
    w.add_layer_norm_rms_eps(layer.rms_eps)
    w.add_vocab_size(base.n_vocab)
    w.add_array(f"{ARCH}.target_layers", list(layer.inputs))
    w.add_uint32(f"{ARCH}.target_hidden_size", layer.n_embd)


def _add_tokenizer(w: GGUFWriter, base: Path) -> None:
    for name, field in GGUFReader(base).fields.items():
        if name.startswith("tokenizer."):
            inner = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            w.add_key_value(name, field.contents(), field.types[0], inner)
