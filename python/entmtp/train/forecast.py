"""How long a training will take here: a few passes and one step are timed, and the plan is multiplied out."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from .base import Base
from .eagle3_loop import new_trainer
from .evaluation import Teacher
from .jobs import plan_jobs
from .options import PRESETS, Options
from .plan import Plan, give_back
from .states import States, Texts
from .writing import write

LATER = 0.9  # of the speed at the beginning: contexts grow, and the last sequences stand alone
JUDGING = 0.6  # a held-out token costs so much of one that is trained on
PART = 2  # a step is timed on this part of a batch
N_PASSES, SECONDS = 6, 4.0
USUAL = 4096  # rows


@dataclass(frozen=True)
class Rates:
    """Tokens per second: of text with its states, and of training."""

    text: float
    training: float

    def seconds(self, options: Options, n_text: int, n_done: int = 0) -> tuple[float, float]:
        """Of the text and of the training that are left."""
        o = options
        n_evals = 10 if o.eval_every is None else o.n_steps(n_text) / o.eval_every
        judged = JUDGING * (n_evals + 1) * o.n_held_out * o.seq_len
        trained = o.n_steps(n_text) * o.batch_tokens
        return max(n_text - n_done, 0) / self.text, (trained + judged) / self.training

    def preset(self, options: Options, name: str) -> tuple[float, float]:
        """Of a preset; another kind of heads than that of `options` is taken to train as fast."""
        o = replace(options, **PRESETS[name])
        return self.seconds(o, o.n_tokens)


class _Enough(Exception):
    """Enough was written."""


def text_rate(p: Plan, base: Base) -> float:
    """Tokens per second of text to come: its beginning is written, and forgotten again."""
    o, written = p.options, 0
    marks: list[tuple[float, int]] = []  # when there were so many tokens

    def busy(n: int) -> None:
        marks.append((time.perf_counter(), written + n))
        if len(marks) > N_PASSES and marks[-1][0] - marks[0][0] > SECONDS:
            raise _Enough

    jobs = plan_jobs(p.data, base, p.n_tokens, o.n_held_out, o.temps, o.own, o.made_up, o.seed, o.raw)
    try:
        for sequence in write(base, jobs, 0, o.seed, p.layout.k, busy):
            written += len(sequence.tokens)
    except _Enough:
        pass
    for seq in range(base.n_seqs):
        base.forget(seq)
    (begin, before), (end, after) = marks[1], marks[-1]  # graphs are new in the first
    return LATER * (after - before) / (end - begin)


def training_rate(p: Plan, embedding: torch.Tensor, output: torch.Tensor) -> float:
    """Tokens per second of training: a step on random states. Projections not chosen yet are of a usual size."""
    shape, options, k = p.shape, p.options, p.layout.k
    n_rows = min(p.n_draft, USUAL) if p.is_open else p.n_draft
    vocab = None if n_rows == p.facts.n_vocab else np.arange(n_rows, dtype=np.int64)
    teacher = Teacher(embedding, output[:n_rows], vocab)
    n_seqs = 4 * max(1, options.batch_tokens // options.seq_len // PART // 4)  # batches are filled up to four
    n, rng = n_seqs * options.seq_len, np.random.default_rng(0)
    texts = Texts(
        rng.integers(0, len(teacher.embedding), n).astype(np.int32),
        np.full(n_seqs, options.seq_len), np.zeros(n_seqs, np.int64), np.zeros(n_seqs, bool),
        np.zeros(n_seqs, np.float32),
    )  # fmt: skip
    states = States(
        rng.normal(size=(n, p.layout.n_embd)).astype(np.float16),
        rng.integers(0, len(teacher.embedding), (n, k)).astype(np.int32),
        np.full((n, k + 1), 1 / (k + 1), np.float32),
    )
    settings = replace(options, noise=0.0)
    trainer = new_trainer(shape, settings, 1, teacher, texts, states, Path(), "")
    batch = trainer.batch(np.arange(n_seqs))
    seconds: list[tuple[float, float]] = []
    for _ in range(2):  # the first compiles products, and takes memory
        start = time.perf_counter()
        trainer.gradients(batch)
        middle = time.perf_counter()
        trainer.update()
        seconds.append((middle - start, time.perf_counter() - middle))
    del trainer, batch
    give_back()
    gradients, update = seconds[-1]
    return options.batch_tokens / (gradients * options.batch_tokens / n + update)


def minutes(seconds: float) -> str:
    """In words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
