"""Rank traces: plain rollouts of a model, with everything the policies and the heads would have said at every token.

Under lossless acceptance a tree accepts exactly the longest prefix of real tokens whose rank path it contains. So a
trace, recorded once, gives the exact acceptance of any tree and any policy, by replay (`entmtp.replay`), without the
model, and on any machine's costs.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .atomic import atomic_path
from .calibration import N_GUESS, WIDTH, expanded_parent, expanded_path

if TYPE_CHECKING:
    from .llama import Llama

MAX_RANK = 64  # a token that a head ranks lower counts as not guessed
VERSION = 1


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
        log_p: ln p of the best N_GUESS guesses after each expanded path, f4 [n, n_rows, N_GUESS]: one row for head
            0 and
            WIDTH rows for each other head; one row per head if heads do not see the path.
        sees_path: heads see the tokens drafted before (Hydra).
        about: how the traces were made.
    """

    n_tokens: npt.NDArray[np.int32]
    task: tuple[str, ...]
    prompt: tuple[int, ...]
    signals: npt.NDArray[np.float32]
    ranks: npt.NDArray[np.int32]
    log_p: npt.NDArray[np.float32]
    sees_path: bool
    about: dict[str, Any] = field(default_factory=dict)

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
        )

    def of_task(self, task: str) -> Traces:
        return self.pick([i for i, t in enumerate(self.task) if t == task])

    def split(self) -> tuple[Traces, Traces]:
        """Training and held-out texts: every task's prompts alternate between the two."""
        order: dict[str, list[int]] = {}
        for task, prompt in zip(self.task, self.prompt, strict=True):
            known = order.setdefault(task, [])
            if prompt not in known:
                known.append(prompt)
        side = [order[t].index(p) % 2 for t, p in zip(self.task, self.prompt, strict=True)]
        halves = ([i for i, s in enumerate(side) if s == k] for k in (0, 1))
        first, second = (self.pick(texts) for texts in halves)
        return first, second

    def save(self, path: str | Path) -> None:
        """Write to an .npz file."""
        header = {"version": VERSION, "task": self.task, "prompt": self.prompt, "about": self.about}
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(
                file,
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
                text = json.loads(data["text"].tobytes())
                traces = Traces(
                    n_tokens=data["n_tokens"].astype(np.int32),
                    task=tuple(map(str, text["task"])),
                    prompt=tuple(map(int, text["prompt"])),
                    signals=np.ascontiguousarray(data["signals"], dtype=np.float32),
                    ranks=np.ascontiguousarray(data["ranks"], dtype=np.int32),
                    log_p=np.ascontiguousarray(data["log_p"], dtype=np.float32),
                    sees_path=bool(data["sees_path"]),
                    about=dict(text["about"]),
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
            and 1 <= h <= 64
            and len(self.task) == len(self.prompt) == len(self.n_tokens)
            and (self.n_tokens >= 1).all()
            and self.signals.shape == (n, 3)
            and self.ranks.shape == (n, h)
            and self.log_p.shape == (n, rows, N_GUESS)
            and np.isfinite(self.signals).all()
            and np.isfinite(self.log_p).all()
            and (self.log_p <= 1e-3).all()
        )
        if not ok:
            raise ValueError(f"{label}: these traces are damaged or of another version; record them again")

    def native(self) -> Any:
        """`struct entmtp_trace` over these arrays, which must outlive it."""
        from . import _native as n

        return n.Trace(
            n_texts=len(self.n_tokens),
            n_tokens=self.n_tokens.ctypes.data,
            n_heads=self.n_heads,
            n_guess=N_GUESS,
            signals=self.signals.ctypes.data,
            rank=self.ranks.ctypes.data,
            log_p=self.log_p.ctypes.data,
            sees_path=self.sees_path,
        )


def join(traces: Sequence[Traces]) -> Traces:
    """Several traces of the same heads as one."""
    return replace(
        traces[0],
        n_tokens=np.concatenate([t.n_tokens for t in traces]),
        task=tuple(x for t in traces for x in t.task),
        prompt=tuple(x for t in traces for x in t.prompt),
        signals=np.concatenate([t.signals for t in traces]),
        ranks=np.concatenate([t.ranks for t in traces]),
        log_p=np.concatenate([t.log_p for t in traces]),
    )


def rollout(
    llm: Llama, prompt: Sequence[int], n_tokens: int, task: str = "", index: int = 0, **sampling: Any
) -> Traces:
    """One plain rollout, traced.

    Args:
        llm: a model with heads; policy off.
        prompt: tokens.
        n_tokens: to generate at most.
        sampling: settings of `Llama.generate`.
    """
    from . import _native as n

    assert llm._heads is not None and llm._decoder is not None
    heads, dec = llm._heads, llm._decoder
    prefix, sees_path, n_heads = bool(heads.info.prefix), bool(heads.info.grounded), heads.n_heads

    llm.reset()
    if prefix:
        # the layer reads every state of the prompt: evaluate it token by token
        for i, token in enumerate(prompt):
            llm.eval([token])
            heads.prefix(dec.hidden()[None], i)

    tokens: list[int] = []
    states: list[npt.NDArray[np.float32]] = []
    signals: list[tuple[float, float, float]] = []
    seen = n.Signals()
    for token in llm.generate(prompt, **sampling):
        hidden = dec.hidden()
        states.append(heads.prefix(hidden[None], llm.n_tokens - 1) if prefix else hidden.copy())
        n.check(n.decoder_signals(dec._ptr, token, ctypes.byref(seen)))
        signals.append((seen.entropy, seen.top1, seen.log_root))
        tokens.append(token)
        if len(tokens) >= n_tokens or token == llm.token_eos() or llm.n_tokens >= llm.n_ctx() - 1:
            break

    n_rows = 1 + WIDTH * (n_heads - 1) if sees_path else n_heads
    ranks = np.full((len(tokens), n_heads), -1, dtype=np.int32)
    log_p = np.empty((len(tokens), n_rows, N_GUESS), dtype=np.float32)
    for i, state in enumerate(states):
        log_p[i] = _guesses(heads, state, tokens[i])
        for h in range(min(n_heads, len(tokens) - 1 - i)):
            guesses = heads.expand(
                h, state, [tokens[i : i + h + 1]], min(MAX_RANK, heads.info.n_vocab_draft)
            )[0][0]
            at = np.flatnonzero(guesses == tokens[i + h + 1])
            ranks[i, h] = at[0] if len(at) else MAX_RANK
    return Traces(
        n_tokens=np.array([len(tokens)], dtype=np.int32),
        task=(task,),
        prompt=(index,),
        signals=np.array(signals, dtype=np.float32).reshape(-1, 3),
        ranks=ranks,
        log_p=log_p,
        sees_path=sees_path,
    )


def _guesses(heads: Any, state: npt.NDArray[np.float32], root: int) -> npt.NDArray[np.float32]:
    """ln p of the guesses after every expanded path, [n_rows, N_GUESS]."""
    rows: list[npt.NDArray[np.float32]] = []
    if not heads.info.grounded:
        for h in range(heads.n_heads):
            rows.append(heads.expand(h, state, [[root] * (h + 1)], N_GUESS)[1])
        return np.concatenate(rows)
    paths = [[root]]  # the expanded paths of this level, in tokens
    for h in range(heads.n_heads):
        tokens, log_p = heads.expand(h, state, paths, N_GUESS)
        rows.append(log_p)
        if h + 1 < heads.n_heads:
            up = [expanded_parent(h + 1, c) for c in range(WIDTH)]
            paths = [[*paths[u], int(tokens[u, expanded_path(h + 1, c)[-1]])] for c, u in enumerate(up)]
    return np.concatenate(rows)


def record(
    llm: Llama,
    prompts: Sequence[tuple[str, str]],
    *,
    temps: Sequence[float] = (0.0, 0.8),
    n_tokens: int = 128,
    seed: int = 0,
    partial: str | Path | None = None,
    advance: Callable[[int], None] | None = None,
    save_every: int = 16,
    **sampling: Any,
) -> Traces:
    """Trace rollouts of prompts at several temperatures.

    Args:
        prompts: (task, text) pairs.
        temps: sampling temperatures; the other sampling settings are `sampling`.
        seed: of the first prompt; the others count on from there.
        partial: a file that keeps finished rollouts, so that an interrupted recording goes on where it stopped.
        advance: called with the number of finished rollouts.
        save_every: rollouts after which `partial` is written.
    """
    facts = [list(prompts), list(temps), n_tokens, seed, sampling, heads_identity(llm)]
    about = {
        "digest": hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()[:20],
        "temps": list(temps),
        "tokens": n_tokens,
        "seed": seed,
        "heads": heads_identity(llm),
    }
    texts = [
        llm.tokenize(text.encode(), add_bos=True, special=True)[: llm.n_ctx() - n_tokens - 1]
        for _, text in prompts
    ]
    about["context"] = int(np.mean([len(t) for t in texts]) + n_tokens / 2)  # mean depth of the rollouts
    done: list[Traces] = []
    if partial is not None and Path(partial).exists():
        known = Traces.load(partial)
        if known.about.get("digest") == about["digest"]:
            done = [known.pick([i]) for i in range(len(known.n_tokens))]
    jobs = [(i, task, temp) for i, (task, _) in enumerate(prompts) for temp in temps]
    for k, (i, task, temp) in enumerate(jobs):
        if k >= len(done):
            llm.set_seed(seed + i)
            done.append(rollout(llm, texts[i], n_tokens, task, i, temp=temp, **sampling))
            if partial is not None and ((k + 1) % save_every == 0 or k + 1 == len(jobs)):
                replace(join(done), about=about | {"complete": k + 1 == len(jobs)}).save(partial)
        if advance:
            advance(k + 1)
    return replace(join(done), about=about)


def heads_identity(llm: Llama) -> list[Any]:
    """What ties traces to a base model and its heads: vocabulary, head count, kind, sizes of the files."""
    from . import _native as n

    assert llm._heads is not None
    return [
        n.vocab_fingerprint(llm.model), llm._heads.arch, llm._heads.n_heads,
        Path(llm.model_path).stat().st_size, Path(llm.heads_path or "").stat().st_size,
    ]  # fmt: skip
