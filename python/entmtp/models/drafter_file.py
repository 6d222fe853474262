"""What kind of drafter a model file is, and whether it can draft for a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType

from ..common.errors import ConvertError, ModelError
from .base import fingerprint, read_base
from .formats.gguf_header import read_gguf_header, read_gguf_keys
from .names import Say, warn

EAGLE3, ASSISTANT = "eagle3", "gemma4-assistant"
ASSISTED = "gemma4"  # the architecture whose keys and values an assistant looks at
# Architectures whose graphs in the pinned llama.cpp give the inputs of their layers, which EAGLE-3 takes
GIVE_INPUTS = (
    "bailingmoe3", "gemma4", "gpt-oss", "hunyuan_vl", "lfm2", "lfm2moe", "llama", "mimo2", "minimax-01", "minimax-m2",
    "nanbeige", "nemotron_h", "nemotron_h_moe", "qwen3", "qwen35", "qwen35moe", "qwen3moe", "qwen3next",
)  # fmt: skip
NOT_YET = {"dflash": "DFlash and DSpark"}


def check_drafter(drafter: Path, model: Path) -> None:
    """Refuse a file that llama.cpp could not draft with for a model; vocabularies are compared when it is loaded.

    Raises:
        ModelError: with one sentence. What cannot be read is left for llama.cpp to refuse.
    """
    kind, base = _architecture(drafter), _architecture(model)
    if kind in NOT_YET:
        raise ModelError(
            f"{drafter}: drafting with {NOT_YET[kind]} files is not supported yet; give a smaller model"
        )
    if kind == EAGLE3 and base is not None and base not in GIVE_INPUTS:
        raise ModelError(
            f"{drafter}: an EAGLE-3 layer sees inside the model, and llama.cpp's graph of {base} does not let it; "
            "give a smaller model"
        )
    if kind == EAGLE3 and (problem := _damage(drafter)):
        raise ModelError(f"{drafter}: {problem}, which llama.cpp ends the process for; get the file anew")
    if kind == ASSISTANT:
        try:
            problem = _misfit(read_gguf_header(drafter).keys, read_gguf_header(model).keys)
        except (ConvertError, OSError) as e:
            problem = str(e)
        if problem:
            raise ModelError(
                f"{drafter} cannot draft for {model.name}: {problem}; give the assistant made for it"
            )


def find_drafter(model: Path, say: Say = warn) -> Path | None:
    """What was trained to draft for a model and lies beside it: an EAGLE-3 layer for hidden states of its width, or an
    assistant for its keys and values, of the same vocabulary.

    Args:
        say: called with a sentence about a choice between several.
    """
    base, found = None, []
    for path in sorted(model.absolute().parent.glob("*.gguf")):
        kind = _architecture(path) if path.name != model.name else None
        if kind not in (EAGLE3, ASSISTANT):
            continue
        try:
            base = base or read_base(model)
            keys = read_gguf_header(path).keys
            fits = (
                keys.get(f"{EAGLE3}.target_hidden_size") == base.n_embd
                and base.architecture in GIVE_INPUTS
                and not _damage(path)
                if kind == EAGLE3
                else not _misfit(keys, read_gguf_header(model).keys)
            )
        except (ConvertError, OSError):
            continue
        tokens = keys.get("tokenizer.ggml.tokens")
        if fits and isinstance(tokens, list) and fingerprint(tokens) == base.fingerprint:
            found.append(path)
    if len(found) > 1:
        others = ", ".join(path.name for path in found[1:])
        say(f"{len(found)} drafters fit {model.name}: using {found[0].name}, not {others}")
    return found[0] if found else None


def _damage(layer: Path) -> str:
    """What is wrong with the draft vocabulary of an EAGLE-3 file; empty: nothing, or it cannot be read."""
    try:
        tensors = read_gguf_header(layer).tensors
    except (ConvertError, OSError):
        return ""
    if (d2t := tensors.get("d2t")) is None:
        return ""
    output = tensors.get("output.weight")
    rows = output.shape[1:] if output is not None else ()
    if d2t.type != GGMLQuantizationType.I64 or d2t.shape != rows:
        found = f"{d2t.type.name} {list(d2t.shape)}"
        return f"its draft vocabulary (d2t) is {found}, not I64 {list(rows)} as it has rows of output.weight"
    return ""


def _misfit(assistant: dict[str, Any], model: dict[str, Any]) -> str:
    """Why an assistant cannot look at a model's keys and values, which llama.cpp takes on trust; empty: it can.

    Its layers look at those of the model's last layer (full) and of the one before (with a window).
    """
    if model.get("general.architecture") != ASSISTED:
        return f"an assistant is for {ASSISTED}, and this is {model.get('general.architecture')}"
    width, n_embd = (
        assistant.get(f"{ASSISTANT}.embedding_length_out"),
        model.get(f"{ASSISTED}.embedding_length"),
    )
    if width != n_embd:
        return f"it takes states of {width} numbers, the model's have {n_embd}"
    theirs, ours = _layers(assistant, ASSISTANT), _layers(model, ASSISTED)
    if (
        theirs is None
        or ours is None
        or len(ours) < 2
        or [layer.window for layer in ours[-2:]] != [True, False]
    ):
        return "the file does not say what its layers are like"
    for i, layer in enumerate(theirs):
        seen = ours[-2 if layer.window else -1]
        if (layer.n_head_kv, layer.head_dim) != (seen.n_head_kv, seen.head_dim):
            return (
                f"its layer {i} is for {layer.n_head_kv} heads of {layer.head_dim} keys, "
                f"the model has {seen.n_head_kv} of {seen.head_dim}"
            )
        if layer.n_head % layer.n_head_kv:
            return f"its layer {i} has {layer.n_head} heads for {layer.n_head_kv} of keys"
    return ""


@dataclass(frozen=True)
class _Layer:
    window: bool
    n_head: int
    n_head_kv: int
    head_dim: int


def _layers(keys: dict[str, Any], arch: str) -> list[_Layer] | None:
    """Of a Gemma 4 file; None where it does not say."""

    def number(name: str, i: int) -> Any:
        value = keys.get(f"{arch}.attention.{name}")
        return value[i] if isinstance(value, list) and i < len(value) else value

    n, windows = keys.get(f"{arch}.block_count"), keys.get(f"{arch}.attention.sliding_window_pattern")
    if type(n) is not int or not isinstance(windows, list) or not 0 < n <= len(windows):
        return None
    found = []
    for i, window in enumerate(windows[:n]):
        dim = "key_length_swa" if window else "key_length"
        numbers = [number(name, i) for name in ("head_count", "head_count_kv", dim)]
        if any(type(x) is not int or x < 1 for x in numbers):
            return None
        found.append(_Layer(bool(window), *numbers))
    return found


def _architecture(path: Path) -> Any:
    try:
        return read_gguf_keys(path, lambda key: key == "general.architecture", 1).get("general.architecture")
    except (ConvertError, OSError):
        return None
