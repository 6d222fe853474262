"""A Llama-like model under the name of an architecture that has prediction layers (NextN), with one such layer.

GLM-4-MoE with dense layers computes what Llama computes: its norm after attention is Llama's before the feed-forward
part, and its rotary embedding pairs dimensions half a head apart where Llama's files pair neighbours, which is an order
of rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from .layers_reference import attend, ffn, rms

ARCH = "glm4moe"
EXPERT = 4  # of so many parts of the layer's feed-forward part one is the expert, the others are shared


def halves(rows: npt.NDArray[Any], n_head: int) -> npt.NDArray[Any]:
    """Rows of a query or key matrix, neighbouring pairs put half a head apart."""
    head = rows.reshape(n_head, -1, 2, *rows.shape[1:])
    return np.ascontiguousarray(np.swapaxes(head, 1, 2).reshape(rows.shape))


def layer_shapes(
    n_embd: int, n_head: int, n_head_kv: int, head_dim: int, n_ff: int
) -> dict[str, tuple[int, ...]]:
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


def shapes_of(base: Path) -> dict[str, tuple[int, ...]]:
    """Of the layer that fits a model of the architecture llama."""
    n = numbers_of(gguf.GGUFReader(base))
    return layer_shapes(n["n_embd"], n["n_head"], n["n_head_kv"], n["head_dim"], n["n_ff"])


def numbers_of(reader: gguf.GGUFReader) -> dict[str, Any]:
    def number(key: str, default: Any = None) -> Any:
        field = reader.fields.get(f"llama.{key}")
        return default if field is None else field.contents()

    n_embd, n_head = number("embedding_length"), number("attention.head_count")
    return {
        "n_layer": number("block_count"),
        "n_embd": n_embd,
        "n_head": n_head,
        "n_head_kv": number("attention.head_count_kv", n_head),
        "head_dim": number("attention.key_length", n_embd // n_head),
        "n_ff": number("feed_forward_length") // EXPERT * EXPERT,
        "eps": number("attention.layer_norm_rms_epsilon"),
        "rope_base": number("rope.freq_base", 10000.0),
    }


def predict(base: Path, layer: dict[str, npt.NDArray[np.float32]], text: list[int]) -> npt.NDArray[np.int64]:
    """What the layer foresees after text[: i + 1] for every i, best tokens first, [n, n_vocab]: from text[i], and the
    model's hidden state after text[:i].

    In float64, from the hidden states that llama.cpp gives.
    """
    reader = gguf.GGUFReader(base)
    n = numbers_of(reader)
    tensors = {
        t.name: gguf.quants.dequantize(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors
    }
    w = {name: values.astype(np.float64) for name, values in layer.items()}
    embedding = tensors["token_embd.weight"]
    h = np.concatenate([np.zeros((1, n["n_embd"])), hidden_states(base, text)[:-1]])

    def norm(x: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        return rms(x, w[name], n["eps"])

    x = (
        np.concatenate([norm(embedding[text], "nextn.enorm"), norm(h, "nextn.hnorm")], -1)
        @ w["nextn.eh_proj"].T
    )
    q, k, v = (norm(x, "attn_norm") @ w[f"attn_{part}"].T for part in ("q", "k", "v"))
    x = x + attend(q, k, v, n) @ w["attn_output"].T
    x = x + ffn(norm(x, "post_attention_norm"), w["ffn_gate"], w["ffn_up"], w["ffn_down"])
    logits = norm(x, "nextn.shared_head_norm") @ tensors.get("output.weight", embedding).T
    return np.argsort(-logits, -1, kind="stable")


def hidden_states(base: Path, text: list[int]) -> npt.NDArray[np.float64]:
    """The input of the output projection at every token, by llama.cpp."""
    import llama_cpp

    llm = llama_cpp.Llama(str(base), n_ctx=1024, embedding=True, pooling_type=0, verbose=False)
    llm.n_tokens = 0
    rows = []
    for i in range(0, len(text), 256):
        llm.eval(text[i : i + 256])
        n = len(text[i : i + 256])
        pointer = llama_cpp.llama_get_embeddings(llm.ctx)
        rows.append(np.ctypeslib.as_array(pointer, (n, llm.n_embd())).astype(np.float64))
    llm.close()
    return np.concatenate(rows)


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

    numbers = numbers_of(reader)
    n_layer, n_embd, n_head, n_head_kv = (numbers[k] for k in ("n_layer", "n_embd", "n_head", "n_head_kv"))
    shapes = shapes_of(base)
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
        w.add_key_length(numbers["head_dim"])
        w.add_value_length(numbers["head_dim"])

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
        elif name in ("attn_q", "attn_k"):
            add(f"{name}.weight", halves(values, n_head if name == "attn_q" else n_head_kv))
        else:
            add(f"{name}.weight", values)
    w.add_tensor(f"blk.{n_layer}.ffn_gate_inp.weight", np.zeros((1, n_embd), np.float32))
    w.add_tensor(f"blk.{n_layer}.exp_probs_b.bias", np.zeros(1, np.float32))

    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
