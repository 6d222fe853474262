"""Rank traces: what policies and heads would have said at every token of plain rollouts, and the file that keeps it.

Under lossless acceptance a tree accepts exactly the longest prefix of real tokens whose rank path it contains. So a
trace, recorded once (measure/rollouts.py), gives the exact acceptance of any tree and any policy, by replay
(measure/replay.py), without the model, and on any machine's costs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.atomic import atomic_path
from ..common.fields import parse_json
from . import texts as texts_of
from .calibration import N_GUESS, WIDTH
from .texts import Texts

MAX_RANK = 64  # a token that a head ranks lower counts as not guessed
VERSION = 1
# kinds of numpy's types that arrays of a file may have
KINDS = {"n_tokens": "iu", "signals": "f", "ranks": "iu", "log_p": "f", "sees_path": "b"}
INTEGERS, FLOATS = ("n_prompt", "tokens", "best"), ("temp", "log_p", "states")  # of its texts
MAX_VOCAB = 1 << 24  # ENTMTP_MAX_VOCAB


@dataclass(frozen=True)
class Traces:
    """Texts one after the other; position i is the state before token i, which is the root of a step there.

    Attributes:
        n_tokens: tokens of each text, [n_texts].
        task: what each text is, [n_texts].
        prompt: which prompt it answers, [n_texts]: several temperatures share one.
        signals: entropy (nats) of the distribution token i was drawn from, p of its most probable token, and ln p of
            token i. f4 [n, 3]
        ranks: rank that head h gave to token i + 1 + h, given the true tokens before it; -1 where the text ends,
            MAX_RANK and more as MAX_RANK. i4 [n, n_heads]
        log_p: ln p of the best N_GUESS guesses after each expanded path, f4 [n, n_rows, N_GUESS]: one row for head 0
            and WIDTH rows for each other head; one row per head if heads do not see the path.
        sees_path: heads see the tokens drafted before (Hydra).
        about: how the traces were made.
        texts: prompts, tokens and what else the auto policy looks at; None in traces of before, which it cannot be
            replayed over.
    """

    n_tokens: npt.NDArray[np.int32]
    task: tuple[str, ...]
    prompt: tuple[int, ...]
    signals: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    log_p: npt.NDArray[np.float32]
    sees_path: bool
    about: dict[str, Any] = field(default_factory=dict)
    texts: Texts | None = None

    @property
    def n_heads(self) -> int:
        return int(self.ranks.shape[1])

    @property
    def entropy(self) -> npt.NDArray[np.float64]:
        return self.signals[:, 0].astype(np.float64)

    @property
    def log_root(self) -> npt.NDArray[np.float64]:
        return self.signals[:, 2].astype(np.float64)

    def slices(self) -> list[slice]:
        """Positions of each text."""
        ends = np.cumsum(self.n_tokens)
        return [slice(int(e - n), int(e)) for e, n in zip(ends, self.n_tokens, strict=True)]

    def running(self, window: float) -> npt.NDArray[np.float64]:
        """The decoder's running entropy when it drafts after token i, [n]: bias-corrected EMA, restarted with each
        text."""
        decay = 1.0 - 2.0 / (window + 1.0)
        out = np.empty(len(self.signals))
        for part in self.slices():
            total = weight = 0.0
            for i in range(part.start, part.stop):
                total = decay * total + (1 - decay) * float(self.signals[i, 0])
                weight = decay * weight + (1 - decay)
                out[i] = total / weight
        return out

    def level(self, head: int) -> npt.NDArray[np.float64]:
        """ln p of the guesses of a head after each of its expanded paths, [n, width, N_GUESS]."""
        if not self.sees_path:
            rows = self.log_p[:, [head] * (1 if head == 0 else WIDTH)]
        elif head == 0:
            rows = self.log_p[:, :1]
        else:
            rows = self.log_p[:, 1 + WIDTH * (head - 1) : 1 + WIDTH * head]
        return rows.astype(np.float64)

    def follows(self, path: Sequence[int]) -> npt.NDArray[np.bool_]:
        """Where the real tokens follow a rank path, [n]."""
        ok = np.ones(len(self.ranks), dtype=bool)
        for d, rank in enumerate(path):
            ok &= self.ranks[:, d] == rank
        return ok

    def pick(self, texts: Sequence[int]) -> Traces:
        """Some of the texts."""
        parts = self.slices()
        rows = [np.arange(parts[i].start, parts[i].stop) for i in texts]
        index = np.concatenate([np.zeros(0, dtype=np.int64), *rows])
        return replace(
            self,
            n_tokens=self.n_tokens[list(texts)],
            task=tuple(self.task[i] for i in texts),
            prompt=tuple(self.prompt[i] for i in texts),
            signals=self.signals[index],
            ranks=self.ranks[index],
            log_p=self.log_p[index],
            texts=self.texts.pick(self.n_tokens, texts) if self.texts is not None else None,
        )

    def of_task(self, task: str) -> Traces:
        return self.pick([i for i, t in enumerate(self.task) if t == task])

    def split(self) -> tuple[Traces, Traces]:
        """Training and held-out texts: every task's prompts alternate between the two.

        Raises:
            ValueError: one of them would be empty.
        """
        order: dict[str, list[int]] = {}
        for task, prompt in zip(self.task, self.prompt, strict=True):
            known = order.setdefault(task, [])
            if prompt not in known:
                known.append(prompt)
        side = [order[t].index(p) % 2 for t, p in zip(self.task, self.prompt, strict=True)]
        halves = ([i for i, s in enumerate(side) if s == k] for k in (0, 1))
        first, second = (self.pick(texts) for texts in halves)
        if not len(first.n_tokens) or not len(second.n_tokens):
            raise ValueError(
                "the traces hold too few prompts: at least two of a task are needed, one to fit, one to judge"
            )
        return first, second

    def save(self, path: str | Path) -> None:
        """Write to an .npz file."""
        header = {"version": VERSION, "task": self.task, "prompt": self.prompt, "about": self.about}
        more = {f"text_{name}": array for name, array in vars(self.texts).items()} if self.texts else {}
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file, **more,
                n_tokens=self.n_tokens, signals=self.signals, ranks=self.ranks.astype(np.int8),
                log_p=self.log_p.astype(np.float32), sees_path=np.array(self.sees_path),
                text=np.frombuffer(json.dumps(header).encode(), "u1"),
            )  # fmt: skip

    @staticmethod
    def load(path: str | Path) -> Traces:
        """Read an .npz file written by `save`.

        Raises:
            ValueError: the file is missing, damaged, or holds something else.
        """
        try:
            with np.load(path, allow_pickle=False) as data:
                text = parse_json(data["text"].tobytes())
                arrays = {key: _array(data, key, kinds) for key, kinds in KINDS.items()}
                traces = Traces(
                    n_tokens=arrays["n_tokens"].astype(np.int32),
                    task=tuple(map(str, text["task"])),
                    prompt=tuple(map(int, text["prompt"])),
                    signals=np.ascontiguousarray(arrays["signals"], dtype=np.float32),
                    ranks=np.ascontiguousarray(arrays["ranks"], dtype=np.int32),
                    log_p=np.ascontiguousarray(arrays["log_p"], dtype=np.float32),
                    sees_path=bool(arrays["sees_path"]),
                    about=dict(text["about"]),
                    texts=_texts(data) if "text_tokens" in data else None,
                )
                version = text["version"]
        except OSError as e:
            raise ValueError(f"cannot read traces {path}: {e.strerror or 'not an .npz file'}") from None
        except Exception as e:  # zip, json and numpy each have their own
            raise ValueError(f"{path} holds no rank traces: {e}") from None
        traces.check(str(path), version)
        return traces

    def check(self, label: str, version: int = VERSION) -> None:
        """Raise ValueError unless all parts fit together."""
        n = int(self.n_tokens.sum()) if self.n_tokens.ndim == 1 else -1
        h = self.ranks.shape[1] if self.ranks.ndim == 2 else 0
        rows = (1 + WIDTH * (h - 1)) if self.sees_path else h
        ok = (
            version == VERSION
            and 0 <= h <= 64
            and len(self.task) == len(self.prompt) == len(self.n_tokens)
            and (self.n_tokens >= 1).all()
            and self.signals.shape == (n, 3)
            and self.ranks.shape == (n, h)
            and self.log_p.shape == (n, rows, N_GUESS)
            and np.isfinite(self.signals).all()
            and np.isfinite(self.log_p).all()
            and (self.log_p <= 1e-3).all()
            and (self.texts is None or self.texts.fit(self.n_tokens))
        )
        if not ok:
            raise ValueError(f"{label}: these traces are damaged or of another version; record them again")


def _array(data: Any, key: str, kinds: str) -> npt.NDArray[Any]:
    """An array of an .npz file, of one of these kinds of values."""
    array: npt.NDArray[Any] = data[key]
    if array.dtype.kind not in kinds:
        raise ValueError(f"{key} holds values of type {array.dtype}")
    return array


def _texts(data: Any) -> Texts:
    """The texts in an .npz file."""
    arrays = {name: _array(data, f"text_{name}", "iu").astype(np.int64) for name in INTEGERS}
    if any(((array < -1) | (array >= MAX_VOCAB)).any() for array in arrays.values()):
        raise ValueError("there are tokens beyond any vocabulary")
    found: dict[str, Any] = {name: array.astype(np.int32) for name, array in arrays.items()}
    found |= {name: _array(data, f"text_{name}", "f").astype(np.float32) for name in FLOATS}
    return Texts(**found)


def join(traces: Sequence[Traces]) -> Traces:
    """Several traces of the same heads as one."""
    kept = [t.texts for t in traces if t.texts is not None]
    return replace(
        traces[0],
        n_tokens=np.concatenate([t.n_tokens for t in traces]),
        task=tuple(x for t in traces for x in t.task),
        prompt=tuple(x for t in traces for x in t.prompt),
        signals=np.concatenate([t.signals for t in traces]),
        ranks=np.concatenate([t.ranks for t in traces]),
        log_p=np.concatenate([t.log_p for t in traces]),
        texts=texts_of.join(kept) if len(kept) == len(traces) else None,
    )
