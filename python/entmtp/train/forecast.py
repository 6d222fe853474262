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
from .options import PRESETS, Options
from .plan import Plan
from .rows import rows_of
from .states import States, Texts

OF_PASSES = (
    0.75  # so fast is text, measured against bare passes: prompts, sequences that end, longer contexts
)
JUDGING = 0.6  # a held-out token costs so much of one that is trained on
PART = 2  # a step is timed on this part of a batch
N_PASSES, SECONDS = 6, 3.0
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


def text_rate(base: Base, k: int) -> float:
    """Tokens per second of text to come: passes over one token of every sequence."""
    rng = np.random.default_rng(0)
    seqs = list(range(base.n_seqs))
    times: list[float] = []
    begin = time.perf_counter()
    for i in range(N_PASSES):
        start = time.perf_counter()
        logits = base.eval(rng.integers(0, base.n_vocab, base.n_seqs).tolist(), [i] * base.n_seqs, seqs)
        rows_of(base.hidden(base.n_seqs), logits, k)
        times.append(time.perf_counter() - start)
        if i > 0 and time.perf_counter() - begin > SECONDS:
            break
    for seq in seqs:
        base.forget(seq)
    return OF_PASSES * base.n_seqs / float(np.median(times[1:]))  # graphs are new in the first


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
    gradients, update = seconds[-1]
    return options.batch_tokens / (gradients * options.batch_tokens / n + update)


def minutes(seconds: float) -> str:
    """In words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
