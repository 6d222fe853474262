"""What the tests of the trainer share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import entmtp
from entmtp.train.base import Base
from entmtp.train.jobs import Job
from entmtp.train.states import Layout, States, Store, Texts
from entmtp.train.text import gather

SEQ_LEN = 64  # of the tiny model's sequences

TINY = (
    "--tokens", "3000", "--seq-len", "64", "--held-out", "6", "--batch-tokens", "300", "--heads", "2",
    "--draft-vocab", "all", "--lm-head", "own",
)  # fmt: skip


def arguments(model: Path, outfile: Path, *more: str) -> list[str]:
    """A command line of the trainer for a tiny model."""
    return ["--model", str(model), "-o", str(outfile), "--threads", "1", *TINY, *more]


def opened(*args: Any, **settings: Any) -> Any:
    """A model, closed at the end of a block."""
    return contextlib.closing(entmtp.Llama(*args, **settings))


def stored(folder: Path, base: Base, jobs: Iterator[Job], n_tokens: int, k: int = 8) -> tuple[Texts, States]:
    """Texts and states of so many tokens."""
    with contextlib.closing(Store(folder, Layout(n_tokens + SEQ_LEN, base.n_embd, k))) as store:
        gather(base, jobs, n_tokens, store, 3, lambda n: None)
        return store.opened()
