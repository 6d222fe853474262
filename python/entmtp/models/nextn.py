"""The layers for multi-token prediction (NextN, MTP) of a model file: whether llama.cpp can draft with them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..common.errors import ConvertError
from .base import read_header
from .formats.gguf_header import GGUFHeader, TensorInfo, read_gguf_keys

# Architectures whose prediction layers the pinned llama.cpp has a graph for, and tensors of such a layer that it ends
# the process without (src/models/*.cpp: GGML_ASSERT), beside those that all need.
ALL = ("attn_norm.weight", "nextn.eh_proj.weight", "nextn.enorm.weight", "nextn.hnorm.weight")
EXPERTS = ("ffn_gate_inp.weight",)
GRAPHS: dict[str, tuple[str, ...]] = {
    "bailingmoe3": ("nextn.shared_head_norm.weight",),
    "cohere2moe": EXPERTS,
    "deepseek2": (
        "attn_q_a.weight", "attn_q_a_norm.weight", "attn_q_b.weight", "attn_kv_a_mqa.weight", "attn_kv_a_norm.weight",
        "attn_k_b.weight", "ffn_norm.weight", *EXPERTS, "ffn_down_exps.weight", "ffn_gate_shexp.weight",
        "ffn_down_shexp.weight", "ffn_up_shexp.weight",
    ),
    "deepseek32": EXPERTS,
    "deepseek4": ("nextn.shared_head_norm.weight",),
    "glm-dsa": EXPERTS,
    "glm4moe": EXPERTS,
    "hy_v3": (),
    "mimo2": ("attn_qkv.weight", "ffn_gate.weight", "ffn_down.weight", "ffn_up.weight"),
    "nemotron_h_moe": ("nextn.shared_head_norm.weight", *EXPERTS),
    "qwen35": (),
    "qwen35moe": EXPERTS,
    "qwen3next": EXPERTS,
    "step35": (),
}  # fmt: skip
SEVERAL = ("hy_v3", "mimo2", "step35")  # the others must have one


@dataclass(frozen=True)
class Prediction:
    """What a model file says of its prediction layers.

    Attributes:
        n_layers: so many.
        problem: why llama.cpp cannot draft with them, one sentence; empty: it can.
    """

    n_layers: int
    problem: str = ""


def prediction_layers(model: Path) -> Prediction | None:
    """The prediction layers of a model file, a split one too; None where it has none, or cannot be read."""
    try:
        said = read_gguf_keys(model, lambda key: key.endswith(".nextn_predict_layers"), 1)
        if not said:
            return None
        header = read_header(model)
    except (ConvertError, OSError):
        return None
    architecture = str(header.keys.get("general.architecture"))
    n, n_all = (header.keys.get(f"{architecture}.{key}") for key in ("nextn_predict_layers", "block_count"))
    if type(n) is not int or type(n_all) is not int or not 0 < n < n_all:
        return None
    blocks = range(n_all - n, n_all)
    if not any(name.startswith(tuple(f"blk.{i}." for i in blocks)) for name in header.tensors):
        return None  # the file was made without them, as many are
    return Prediction(n, _problem(header, header.tensors, architecture, blocks))


def _problem(header: GGUFHeader, tensors: dict[str, TensorInfo], architecture: str, blocks: range) -> str:
    if architecture not in GRAPHS:
        return f"llama.cpp has no graph for those of {architecture}"
    if len(blocks) > 1 and architecture not in SEVERAL:
        return f"there are {len(blocks)}, and llama.cpp's graph of {architecture} is for one"
    for i in blocks:
        for name in (*ALL, *GRAPHS[architecture]):
            if f"blk.{i}.{name}" not in tensors:
                return f"the file lacks the tensor blk.{i}.{name}"
    n_embd = header.keys.get(f"{architecture}.embedding_length")
    shape = tensors[f"blk.{blocks[0]}.nextn.eh_proj.weight"].shape
    if architecture != "deepseek4" and type(n_embd) is int and shape != (2 * n_embd, n_embd):
        return f"blk.{blocks[0]}.nextn.eh_proj.weight has the shape {list(shape)}, not {[2 * n_embd, n_embd]}"
    return ""
