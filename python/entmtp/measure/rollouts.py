"""Plain rollouts of a model, traced: everything the policies and the heads would have said at every token."""

from __future__ import annotations

import ctypes
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bank.calibration import N_GUESS, WIDTH, expanded_parent, expanded_path
from ..bank.texts import N_BEST, Texts
from ..bank.traces import MAX_RANK, Traces, join
from ..native import abi as n
from .subject import Subject


def forced(llm: Subject, prompt: Sequence[int], given: Sequence[int], **sampling: Any) -> Iterator[int]:
    """Goes through given tokens one by one, each after a draw, as if they had been drawn."""
    llm.eval(prompt)
    for token in given:
        llm.sample(**sampling)
        yield token
        llm.eval([token])


TEMP = 0.8  # of `Llama.generate`, if none is said


def rollout(
    llm: Subject,
    prompt: Sequence[int],
    n_tokens: int,
    task: str = "",
    index: int = 0,
    ranks_too: bool = True,
    given: Sequence[int] | None = None,
    **sampling: Any,
) -> Traces:
    """One plain rollout, traced.

    Args:
        llm: a model, policy off. Without heads there are no ranks, only what the text and its rows say.
        prompt: tokens.
        n_tokens: to generate at most.
        ranks_too: False: only what the policy auto is replayed over, no ranks of the heads.
        given: these tokens, whatever would be drawn.
        sampling: settings of `Llama.generate`.
    """
    heads, dec = llm.draft_heads if llm.heads_path else None, llm.decoder
    prefix = heads is not None and bool(heads.info.prefix)
    sees_path = heads is not None and bool(heads.info.grounded)
    n_heads = heads.n_heads if heads is not None else 0

    llm.reset()
    if heads is not None and prefix:
        # the layer reads every state of the prompt: evaluate it token by token
        for i, token in enumerate(prompt):
            llm.eval([token])
            heads.prefix(dec.hidden()[None], i)

    tokens: list[int] = []
    states: list[npt.NDArray[np.float32]] = []
    rows: list[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]] = []
    signals: list[tuple[float, float, float]] = []
    seen = n.Signals()
    for token in (
        llm.generate(prompt, **sampling) if given is None else forced(llm, prompt, given, **sampling)
    ):
        if heads is not None:
            hidden = dec.hidden()
            states.append(heads.prefix(hidden[None], llm.n_tokens - 1) if prefix else hidden.copy())
        n.check(n.decoder_signals(dec._ptr, token, ctypes.byref(seen)))
        signals.append((seen.entropy, seen.top1, seen.log_root))
        rows.append(dec.best(N_BEST))
        tokens.append(token)
        if len(tokens) >= n_tokens or token == llm.token_eos() or llm.n_tokens >= llm.n_ctx() - 1:
            break

    n_rows = 1 + WIDTH * (n_heads - 1) if sees_path else n_heads
    ranks = np.full((len(tokens), n_heads), -1, dtype=np.int32)
    log_p = np.zeros((len(tokens), n_rows, N_GUESS), dtype=np.float32)
    for i, state in enumerate(states if ranks_too else ()):
        assert heads is not None
        log_p[i] = _guesses(heads, state, tokens[i])
        for h in range(min(n_heads, len(tokens) - 1 - i)):
            guesses = heads.expand(
                h, state, [tokens[i : i + h + 1]], min(MAX_RANK, heads.info.n_vocab_draft)
            )[0][0]
            at = np.flatnonzero(guesses == tokens[i + h + 1])
            ranks[i, h] = at[0] if len(at) else MAX_RANK
    texts = Texts(
        n_prompt=np.array([len(prompt)], np.int32),
        temp=np.array([sampling.get("temp", TEMP)], np.float32),
        tokens=np.array([*prompt, *tokens], np.int32),
        best=np.stack([best for best, _ in rows]),
        log_p=np.stack([log_p for _, log_p in rows]),
        states=np.array(states, np.float32).reshape(len(tokens), -1),
    )
    return Traces(
        n_tokens=np.array([len(tokens)], dtype=np.int32),
        task=(task,),
        prompt=(index,),
        signals=np.array(signals, dtype=np.float32).reshape(-1, 3),
        ranks=ranks,
        log_p=log_p,
        sees_path=sees_path,
        texts=texts,
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
    llm: Subject,
    prompts: Sequence[tuple[str, Sequence[int]]],
    *,
    temps: Sequence[float] = (0.0, 0.8),
    n_tokens: int = 128,
    seed: int = 0,
    partial: str | Path | None = None,
    advance: Callable[[int], None] | None = None,
    save_within: float = 20.0,
    **sampling: Any,
) -> Traces:
    """Trace rollouts of prompts at several temperatures.

    Args:
        prompts: (task, tokens) pairs.
        temps: sampling temperatures; the other sampling settings are `sampling`.
        seed: of the first prompt; the others count on from there.
        partial: a file that keeps finished rollouts, so that an interrupted recording goes on where it stopped.
        advance: called with the number of finished rollouts.
        save_within: seconds after which `partial` is written, at the next end of a rollout.
    """
    texts = [list(tokens) for _, tokens in prompts]
    facts = [[task for task, _ in prompts], texts, list(temps), n_tokens, seed, sampling, heads_identity(llm)]
    about = {
        "digest": hashlib.sha256(json.dumps([facts, "texts"], default=str).encode()).hexdigest()[:20],
        "temps": list(temps),
        "tokens": n_tokens,
        "seed": seed,
        "heads": heads_identity(llm),
    }
    about["context"] = int(np.mean([len(t) for t in texts]) + n_tokens / 2)  # mean depth of the rollouts
    done: list[Traces] = []
    if partial is not None and Path(partial).exists():
        known = Traces.load(partial)
        if known.about.get("digest") == about["digest"]:
            done = [known.pick([i]) for i in range(len(known.n_tokens))]
    jobs = [(i, task, temp) for i, (task, _) in enumerate(prompts) for temp in temps]
    saved, n_saved = time.monotonic(), len(done)

    def keep() -> None:
        nonlocal saved, n_saved
        if partial is not None and len(done) > n_saved:
            replace(join(done), about=about | {"complete": len(done) == len(jobs)}).save(partial)
            saved, n_saved = time.monotonic(), len(done)

    try:
        for k, (i, task, temp) in enumerate(jobs):
            if k >= len(done):
                llm.set_seed(seed + i)
                done.append(rollout(llm, texts[i], n_tokens, task, i, temp=temp, **sampling))
                if time.monotonic() - saved >= save_within:
                    keep()
            if advance:
                advance(k + 1)
    finally:
        keep()
    return replace(join(done), about=about)


def heads_identity(llm: Subject) -> list[Any]:
    """What ties traces to a base model and its heads: vocabulary, head count, kind, sizes of the files."""
    own = [n.vocab_fingerprint(llm.model), Path(llm.model_path).stat().st_size]
    if not llm.heads_path:
        return [own[0], "none", 0, own[1], 0]
    heads = llm.draft_heads
    return [own[0], heads.arch, heads.n_heads, own[1], Path(llm.heads_path).stat().st_size]
