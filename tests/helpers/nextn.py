"""A Llama-like model under the name of an architecture that has prediction layers (NextN), with one such layer.

GLM-4-MoE with dense layers computes what Llama computes: its norm after attention is Llama's before the feed-forward part, and
its rotary embedding pairs dimensions half a head apart where Llama's files pair neighbours, which is an order of rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

ARCH = "glm4moe"
EXPERT = 4  # of so many parts of the layer's feed-forward part one is the expert, the others are shared
LEFT_OUT = ("attn_q_norm", "attn_k_norm")


def halves(rows: npt.NDArray[Any], n_head: int) -> npt.NDArray[Any]:
    """Rows of a query or key matrix, neighbouring pairs put half a head apart."""
    head = rows.reshape(n_head, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(np.swapaxes(head, 1, 2).reshape(rows.shape))


def layer_shapes(n_embd: int, n_head: int, n_head_kv: int, head_dim: int, n_ff: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the layer, rows first. `ffn_*` are split into the expert and what is shared when they are written."""
    return {
        "nextn.enorm": (n_embd,),
        "nextn.hnorm": (n_embd,),
        "nextn.eh_proj": (n_embd, 2 * n_embd),
        "attn_norm": (n_embd,),
        "attn_q": (n_head * head_dim, n_embd),
        "attn_k": (n_head_kv * head_dim, n_embd),
        "attn_v": (n_head_kv * head_dim, n_embd),
        "attn_output": (n_embd, n_head * head_dim),
        "post_attention_norm": (n_embd,),
        "ffn_gate": (n_ff, n_embd),
        "ffn_up": (n_ff, n_embd),
        "ffn_down": (n_embd, n_ff),
        "nextn.shared_head_norm": (n_embd,),
    }


def random_layer(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, npt.NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    return {
        name: (
            rng.uniform(0.7, 1.3, shape) if len(shape) == 1 else rng.normal(0, shape[-1] ** -0.5, shape)
        ).astype(np.float32)
        for name, shape in shapes.items()
    }


def with_nextn(
    base: Path, path: Path, layer: dict[str, npt.NDArray[np.float32]] | None = None, kind: str = "F32"
) -> Path:
    """Write the model `base`, of the architecture llama, with a prediction layer.

    Args:
        layer: tensors as in `layer_shapes`; None: random ones.
        kind: type of the layer's matrices.
    """
    reader = gguf.GGUFReader(base)
    keys = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {t.name: t for t in reader.tensors}

    def number(key: str, default: Any = None) -> Any:
        return keys[f"llama.{key}"].contents() if f"llama.{key}" in keys else default

    n_layer, n_embd, n_head = (number(k) for k in ("block_count", "embedding_length", "attention.head_count"))
    n_head_kv = number("attention.head_count_kv", n_head)
    head_dim = number("attention.key_length", n_embd // n_head)
    n_ff = number("feed_forward_length") // EXPERT * EXPERT
    shapes = layer_shapes(n_embd, n_head, n_head_kv, head_dim, n_ff)
    layer = random_layer(shapes) if layer is None else layer
    n_ff = layer["ffn_gate"].shape[0]

    w = gguf.GGUFWriter(path, ARCH)
    for name, field in keys.items():
        if name == "general.architecture":
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        value: Any = field.contents()
        if name == "llama.block_count":
            value += 1
        w.add_key_value(
            name.replace("llama.", f"{ARCH}.", 1), value, field.types[0], field.types[-1] if array else None
        )
    w.add_uint32(f"{ARCH}.nextn_predict_layers", 1)
    w.add_leading_dense_block_count(n_layer)
    w.add_expert_count(1)
    w.add_expert_used_count(1)
    w.add_expert_shared_count(EXPERT - 1)
    w.add_expert_feed_forward_length(n_ff // EXPERT)
    w.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    if "llama.attention.key_length" not in keys:
        w.add_key_length(head_dim)
        w.add_value_length(head_dim)

    for name, tensor in tensors.items():
        data = tensor.data
        if ".attn_q." in name or ".attn_k." in name:
            data = halves(data, n_head if ".attn_q." in name else n_head_kv)
        w.add_tensor(name.replace(".ffn_norm.", ".post_attention_norm."), data, raw_dtype=tensor.tensor_type)

    quantisation = gguf.GGMLQuantizationType[kind]

    def add(name: str, values: npt.NDArray[np.float32]) -> None:
        values = np.ascontiguousarray(values, dtype=np.float32)
        if values.ndim == 1 or quantisation == gguf.GGMLQuantizationType.F32:
            w.add_tensor(f"blk.{n_layer}.{name}", values)
        else:
            w.add_tensor(
                f"blk.{n_layer}.{name}", gguf.quants.quantize(values, quantisation), raw_dtype=quantisation
            )

    cut = n_ff // EXPERT
    for name, shape in shapes.items():
        values = layer[name]
        assert values.ndim == len(shape)
        if name in ("ffn_gate", "ffn_up"):
            add(f"{name}_exps.weight", values[None, :cut])
            add(f"{name}_shexp.weight", values[cut:])
        elif name == "ffn_down":
            add("ffn_down_exps.weight", values[None, :, :cut])
            add("ffn_down_shexp.weight", values[:, cut:])
        else:
            add(f"{name}.weight", halves(values, n_head) if name == "attn_q" else halves(values, n_head_kv) if name == "attn_k" else values)
    w.add_tensor(f"blk.{n_layer}.ffn_gate_inp.weight", np.zeros((1, n_embd), np.float32))
    w.add_tensor(f"blk.{n_layer}.exp_probs_b.bias", np.zeros(1, np.float32))

    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
