"""Trained heads as files: the published PyTorch layout, and from it the heads GGUF."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from ..common.atomic import atomic_path, named, temporary_path
from ..common.errors import ModelError
from ..convert import convert
from .heads import SHARED, Shape, State


def rounded(state: State) -> State:
    """The state in half precision, as it is published; what is reported of heads is measured on this."""
    return {name: t.detach().to(torch.float16) for name, t in state.items()}


def published(
    shape: Shape, state: State, output: torch.Tensor, draft_vocab: npt.NDArray[np.int64] | None
) -> State:
    """A state with projections to the whole vocabulary, as the published code wants them.

    Tokens that heads were not trained to propose have the base model's rows. One projection of all is stored once.

    Args:
        output: the base model's whole projection [n_vocab, n_embd].
    """
    state = dict(state)
    whole = output.to(torch.float16)
    rows = None if draft_vocab is None else torch.from_numpy(draft_vocab)

    def filled(matrix: torch.Tensor) -> torch.Tensor:
        return matrix if rows is None else whole.index_copy(0, rows, matrix)

    one = {"base": whole, "shared": filled(state.pop(SHARED)) if SHARED in state else None}.get(shape.lm_head)
    for i in range(shape.n_heads):
        name = shape.output(i)
        state[f"{name}.weight"] = filled(state[f"{name}.weight"]) if one is None else one
        if rows is not None and f"{name}.bias" in state:
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
        share_lm_head=shape.lm_head == "base",
        provenance=about,
    )


def _card(shape: Shape, base_name: str, about: Mapping[str, str | int | float]) -> str:
    rows = "".join(f"| {key.replace('_', ' ')} | {value} |\n" for key, value in about.items())
    return (
        f"# {shape.arch.capitalize()} heads for {base_name}\n\n"
        f"Made by `entmtp train`.\n\n| | |\n| --- | --- |\n{rows}"
    )


def writable(outfile: Path, folder: Path | None) -> None:
    """Say before the training that its files could not be written after it.

    Args:
        folder: of the published layout.

    Raises:
        ModelError: a folder or a file is in the way. OSError: it cannot be written to.
    """
    if folder is not None and (folder.absolute() == outfile.absolute() or folder.is_file()):
        raise ModelError(f"{folder}: a file is to have this name, so no folder can; change --torch-dir")
    with temporary_path(outfile) as trial, named(outfile, trial):
        trial.write_bytes(b"")
