"""An EAGLE-3 layer with random weights for a Llama-like model, and what it foresees, computed by numpy."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt

from .layers_reference import attend, ffn, rms
from .nextn import numbers_of, random_layer

Weights = dict[str, npt.NDArray[np.float32]]
INPUTS = (0, 1, 1)  # layers of the model whose inputs it sees
DRAFT_VOCAB = 200  # tokens it can propose: every one but the first so many


def shapes(base: Path) -> dict[str, tuple[int, ...]]:
    n = numbers_of(gguf.GGUFReader(base))
    d, q, kv = n["n_embd"], n["n_head"] * n["head_dim"], n["n_head_kv"] * n["head_dim"]
    return {
        "fc": (d, len(INPUTS) * d),
        "attn_norm": (d,),
        "attn_norm_2": (d,),
        "attn_q": (q, 2 * d),
        "attn_k": (kv, 2 * d),
        "attn_v": (kv, 2 * d),
        "attn_output": (d, q),
        "ffn_norm": (d,),
        "ffn_gate": (96, d),
        "ffn_up": (96, d),
        "ffn_down": (d, 96),
        "output_norm": (d,),
        "output": (DRAFT_VOCAB, d),
    }


def draft_tokens(n_vocab: int) -> npt.NDArray[np.int64]:
    return np.arange(n_vocab - DRAFT_VOCAB, n_vocab)


def write_eagle3(base: Path, path: Path, seed: int = 7, width: int | None = None) -> tuple[Path, Weights]:
    """Write such a layer for the model `base`, of the architecture llama; its weights, too.

    Args:
        width: of the model's states, as the file says; None: the truth.
    """
    reader = gguf.GGUFReader(base)
    n = numbers_of(reader)
    weights = random_layer(shapes(base), seed)
    w = gguf.GGUFWriter(path, "eagle3")
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            array = field.types[0] == gguf.GGUFValueType.ARRAY
            w.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
    n_vocab = len(reader.fields["tokenizer.ggml.tokens"].data)
    w.add_context_length(2048)
    w.add_embedding_length(n["n_embd"])
    w.add_block_count(1)
    w.add_feed_forward_length(96)
    w.add_head_count(n["n_head"])
    w.add_head_count_kv(n["n_head_kv"])
    w.add_key_length(n["head_dim"])
    w.add_value_length(n["head_dim"])
    w.add_rope_dimension_count(n["head_dim"])
    w.add_rope_freq_base(n["rope_base"])
    w.add_layer_norm_rms_eps(n["eps"])
    w.add_vocab_size(n_vocab)
    w.add_array("eagle3.target_layers", list(INPUTS))
    w.add_uint32("eagle3.target_hidden_size", width or n["n_embd"])
    w.add_tensor("d2t", draft_tokens(n_vocab))
    for name, values in weights.items():
        whole = name in ("fc", "output_norm", "output")
        w.add_tensor(f"{name}.weight" if whole else f"blk.0.{name}.weight", values)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path, weights


def layer_inputs(base: Path, text: list[int]) -> list[npt.NDArray[np.float64]]:
    """Inputs of the model's layers at every token: the embeddings, and what each layer but the last makes of them."""
    reader = gguf.GGUFReader(base)
    n = numbers_of(reader)
    t = {x.name: gguf.quants.dequantize(x.data, x.tensor_type).astype(np.float64) for x in reader.tensors}
    x = t["token_embd.weight"][text]
    found = [x]
    for i in range(n["n_layer"] - 1):
        a = rms(x, t[f"blk.{i}.attn_norm.weight"], n["eps"])
        q, k, v = (a @ t[f"blk.{i}.attn_{part}.weight"].T for part in ("q", "k", "v"))
        x = x + attend(q, k, v, n) @ t[f"blk.{i}.attn_output.weight"].T
        f = rms(x, t[f"blk.{i}.ffn_norm.weight"], n["eps"])
        x = x + ffn(f, *(t[f"blk.{i}.ffn_{part}.weight"] for part in ("gate", "up", "down")))
        found.append(x)
    return found


def foresee(base: Path, layer: Weights, text: list[int]) -> npt.NDArray[np.int64]:
    """What it foresees after text[: i + 1] for every i but the first, best tokens first, [n, DRAFT_VOCAB].

    In float64: from text[i], and from the inputs of the model's layers at text[i - 1].
    """
    reader = gguf.GGUFReader(base)
    n = numbers_of(reader)
    t = {x.name: gguf.quants.dequantize(x.data, x.tensor_type).astype(np.float64) for x in reader.tensors}
    w = {name: values.astype(np.float64) for name, values in layer.items()}
    inputs = layer_inputs(base, text)
    g = np.concatenate([inputs[i] for i in INPUTS], -1)[:-1] @ w["fc"].T
    e = rms(t["token_embd.weight"][text[1:]], w["attn_norm"], n["eps"])
    both = np.concatenate([e, rms(g, w["attn_norm_2"], n["eps"])], -1)
    q, k, v = (both @ w[f"attn_{part}"].T for part in ("q", "k", "v"))
    x = g + attend(q, k, v, n) @ w["attn_output"].T
    x = x + ffn(rms(x, w["ffn_norm"], n["eps"]), w["ffn_gate"], w["ffn_up"], w["ffn_down"])
    logits = rms(x, w["output_norm"], n["eps"]) @ w["output"].T
    n_vocab = len(t["token_embd.weight"])
    best = draft_tokens(n_vocab)[np.argsort(-logits, -1, kind="stable")]
    return np.concatenate([np.zeros_like(best[:1]), best])
