"""Trained heads as files: the published PyTorch layout, and from it the heads GGUF."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..common.atomic import atomic_path
from ..common.errors import ModelError
from ..convert import convert
from .heads import Shape, State


def rounded(state: State) -> State:
    """The state in half precision, as it is published; what is reported of heads is measured on this."""
    return {name: t.detach().to(torch.float16) for name, t in state.items()}


def published(
    shape: Shape, state: State, output: torch.Tensor, draft_vocab: npt.NDArray[np.int64] | None
) -> State:
    """A state with projections to the whole vocabulary, as the published code wants them.

    Tokens that heads were not trained to propose have the base model's rows. A shared projection is stored once.

    Args:
        output: the base model's whole projection [n_vocab, n_embd].
    """
    state = dict(state)
    whole = output.to(torch.float16)
    for i in range(shape.n_heads):
        name = shape.output(i)
        if shape.share:
            state[f"{name}.weight"] = whole
        elif draft_vocab is not None:
            rows = torch.from_numpy(draft_vocab)
            state[f"{name}.weight"] = whole.index_copy(0, rows, state[f"{name}.weight"])
            if f"{name}.bias" in state:
                bias = torch.zeros(len(whole), dtype=torch.float16)
                state[f"{name}.bias"] = bias.index_copy(0, rows, state[f"{name}.bias"])
        if shape.grounded and f"{name}.bias" not in state:
            state[f"{name}.bias"] = torch.zeros(len(whole), dtype=torch.float16)
    return state


def export(
    folder: Path,
    outfile: Path,
    shape: Shape,
    state: State,
    base: Path,
    base_name: str,
    output: torch.Tensor,
    draft_vocab: npt.NDArray[np.int64] | None,
    outtype: str,
    about: Mapping[str, str | int | float],
) -> None:
    """Write `folder` (config.json and the weights, for the original Medusa and Hydra code) and `outfile` (GGUF).

    Each file appears whole or not at all.

    Args:
        state: half precision.
        about: how the heads were trained; becomes keys of the GGUF, and a model card.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / ("hydra_lm_head.pt" if shape.grounded else "medusa_lm_head.pt")
    with atomic_path(weights) as temporary:
        torch.save(published(shape, state, output, draft_vocab), temporary)
    for name, text in {
        "config.json": json.dumps(shape.config(base_name), indent=2) + "\n",
        "README.md": _card(shape, base_name, about),
    }.items():
        with atomic_path(folder / name) as temporary:
            temporary.write_text(text, "utf-8")
    convert(
        weights,
        base,
        outfile,
        outtype,
        progress=False,
        draft_vocab=None if draft_vocab is None else draft_vocab.tolist(),
        share_lm_head=shape.share,
        provenance=about,
    )


def _card(shape: Shape, base_name: str, about: Mapping[str, str | int | float]) -> str:
    rows = "".join(f"| {key.replace('_', ' ')} | {value} |\n" for key, value in about.items())
    return (
        f"# {shape.arch.capitalize()} heads for {base_name}\n\n"
        f"Made by `entmtp train`.\n\n| | |\n| --- | --- |\n{rows}"
    )


def writable(outfile: Path) -> None:
    """Say before the training that the file could not be written after it.

    Raises:
        ModelError: there is no such folder, or there is a folder of that name. OSError: it cannot be written to.
    """
    if outfile.is_dir() or not outfile.absolute().parent.is_dir():
        raise ModelError(
            f"{outfile}: cannot be written, for its folder is missing or it is a folder; change -o"
        )
    trial = outfile.with_name(outfile.name + ".test")
    with atomic_path(trial) as temporary:
        temporary.write_bytes(b"")
    trial.unlink()
