"""What kind of drafter a model file is, and whether it can draft for a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..common.errors import ConvertError, ModelError
from .base import fingerprint, read_base
from .formats.gguf_header import read_gguf_header, read_gguf_keys
from .names import Say, warn

EAGLE3 = "eagle3"
# Architectures whose graphs in the pinned llama.cpp give the inputs of their layers, which EAGLE-3 takes
GIVE_INPUTS = (
    "bailingmoe3", "gemma4", "gpt-oss", "hunyuan_vl", "lfm2", "lfm2moe", "llama", "mimo2", "minimax-01", "minimax-m2",
    "nanbeige", "nemotron_h", "nemotron_h_moe", "qwen3", "qwen35", "qwen35moe", "qwen3moe", "qwen3next",
)  # fmt: skip
NOT_YET = {"dflash": "DFlash and DSpark", "gemma4-assistant": "Gemma 4's assistant"}


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


def find_eagle3(model: Path, say: Say = warn) -> Path | None:
    """The EAGLE-3 layer beside a model that fits it: same vocabulary, and made for hidden states of its width.

    Args:
        say: called with a sentence about a choice between several.
    """
    base, found = None, []
    for path in sorted(model.absolute().parent.glob("*.gguf")):
        if path.name == model.name or _architecture(path) != EAGLE3:
            continue
        try:
            base = base or read_base(model)
            keys = read_gguf_header(path).keys
        except (ConvertError, OSError):
            continue
        tokens = keys.get("tokenizer.ggml.tokens")
        fits = keys.get(f"{EAGLE3}.target_hidden_size") == base.n_embd and base.architecture in GIVE_INPUTS
        if fits and isinstance(tokens, list) and fingerprint(tokens) == base.fingerprint:
            found.append(path)
    if len(found) > 1:
        others = ", ".join(path.name for path in found[1:])
        say(f"{len(found)} EAGLE-3 layers fit {model.name}: using {found[0].name}, not {others}")
    return found[0] if found else None


def _architecture(path: Path) -> Any:
    try:
        return read_gguf_keys(path, lambda key: key == "general.architecture", 1).get("general.architecture")
    except (ConvertError, OSError):
        return None
