"""What is kept of a training to tell of it later: beside its checkpoint while it runs, beside the heads at its end."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from ..common.atomic import atomic_path
from ..common.errors import ModelError
from ..common.fields import without_nan
from .base import read_matrices
from .eagle3 import Layer
from .evaluation import HeldOut, Teacher, held_out
from .heads import Shape
from .loop import Measured, Trainer
from .plan import Plan
from .states import Layout, mapped, read_texts

FILE, RANKS = "training.json", "held-out.npz"


@dataclass(frozen=True)
class Record:
    """A training as far as it went.

    Attributes:
        n_rows: tokens that the heads can propose.
        step: of n_steps.
        ranks, temps: what the heads say of the held-out texts, and at which temperature these were written.
    """

    shape: Shape
    outtype: str
    n_rows: int
    step: int
    n_steps: int
    history: Sequence[Measured]
    ranks: Sequence[npt.NDArray[np.int32]]
    temps: Sequence[float]


def _write(path: Path, about: dict[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(without_nan(about)) + "\n", "utf-8")


def _about(p: Plan) -> dict[str, Any]:
    return {"shape": asdict(p.shape), "outtype": p.options.outtype, "n_rows": p.n_draft, "n_steps": p.n_steps}


def begin(folder: Path, p: Plan, draft_vocab: npt.NDArray[np.int64] | None) -> None:
    """Say in `folder`, where the checkpoints will be, what is trained."""
    if isinstance(p.shape, Layer):
        return
    vocab = None if draft_vocab is None else draft_vocab.tolist()
    _write(folder / FILE, _about(p) | {"draft_vocab": vocab, "layout": asdict(p.layout)})


def finish(folder: Path, p: Plan, trainer: Trainer, judged: HeldOut) -> None:
    """Leave in `folder`, which stays, how the training went and what the heads say of the held-out texts."""
    _write(folder / FILE, _about(p) | {"step": trainer.step, "history": trainer.history})
    with atomic_path(folder / RANKS) as temporary, open(temporary, "wb") as file:
        np.savez(
            file, ranks=np.concatenate([np.zeros((0, p.shape.n_heads), np.int8), *judged.ranks]).astype(np.int8),
            lengths=np.array([len(r) for r in judged.ranks]), temps=np.array(judged.temps),
        )  # fmt: skip


def read(p: Plan) -> Record:
    """The training in the work folder, its newest if there are several; else the one whose heads are there.

    Raises:
        ModelError: there is none, or its files are damaged.
    """
    if isinstance(p.shape, Layer):
        raise ModelError("--report tells of heads, not yet of an EAGLE-3 layer; leave --arch eagle3 out")
    checkpoints = sorted(p.work.glob("*/checkpoint.safetensors"), key=lambda path: path.stat().st_mtime)
    outfile, folder = p.outputs
    assert folder is not None
    try:
        if checkpoints:
            return _interrupted(p, checkpoints[-1])
        if (folder / FILE).is_file():
            return _finished(folder)
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as e:
        raise ModelError(
            f"{p.work if checkpoints else folder}: what it tells of the training is damaged ({e})"
        ) from e
    raise ModelError(
        f"{outfile}: there is no training of it, neither in {p.work} nor in {folder}; train first"
    )


def _finished(folder: Path) -> Record:
    about = json.loads((folder / FILE).read_text("utf-8"))
    with np.load(folder / RANKS, allow_pickle=False) as a:
        ranks = np.split(a["ranks"].astype(np.int32), np.cumsum(a["lengths"])[:-1])
        return _record(about, about["step"], about["history"], ranks, a["temps"].tolist())


def _record(
    about: dict[str, Any],
    step: int,
    history: Sequence[Sequence[Any]],
    ranks: Any,
    temps: Sequence[float],
) -> Record:
    measured = [Measured(int(row[0]), *(math.nan if x is None else x for x in row[1:])) for row in history]
    return Record(
        Shape(**about["shape"]),
        about["outtype"],
        about["n_rows"],
        step,
        about["n_steps"],
        measured,
        ranks,
        temps,
    )


def _interrupted(p: Plan, checkpoint: Path) -> Record:
    about = json.loads((checkpoint.parent / FILE).read_text("utf-8"))
    shape, texts = Shape(**about["shape"]), read_texts(p.work)
    with safe_open(checkpoint, "pt") as file:
        run = json.loads((file.metadata() or {})["run"])
        names = [name for name in file.keys() if name.startswith("state/")]  # noqa: SIM118
        state = {name.removeprefix("state/"): file.get_tensor(name) for name in names}
    embedding, output = map(torch.from_numpy, read_matrices(p.options.model))
    vocab = None if about["draft_vocab"] is None else np.array(about["draft_vocab"], np.int64)
    rows = output if vocab is None else output[torch.from_numpy(vocab)]
    found = held_out(
        shape,
        state,
        Teacher(embedding, rows, vocab),
        texts,
        mapped(p.work, Layout(**about["layout"]), texts.n_tokens),
    )
    return _record(about, run["step"], run["history"], found.ranks, found.temps)
