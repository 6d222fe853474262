"""What a pass over n tokens costs on this machine: the curve that decides which tree pays."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from .llama import Llama

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 40, 48, 56, 64)


def verify_curve(
    model: str | Path,
    n_threads: int,
    contexts: list[int],
    n_rounds: int = 9,
    sizes: tuple[int, ...] = SIZES,
    **kwargs: Any,
) -> dict[int, list[tuple[float, float]]]:
    """Median time of a pass by number of tokens, sizes interleaved so that drift cancels.

    Returns:
        per size and context depth: median ms, and half the spread between the quartiles relative to it.
    """
    llm = Llama(
        model, stats=False, n_ctx=max(contexts) + max(sizes) + 64, n_batch=512, n_threads=n_threads,
        n_threads_batch=n_threads, verbose=False, **kwargs,
    )  # fmt: skip
    dec = llm._decoder
    assert dec is not None
    rng = np.random.default_rng(0)
    result: dict[int, list[tuple[float, float]]] = {n: [] for n in sizes}
    for depth in contexts:
        llm.reset()
        llm.eval(rng.integers(0, llm.n_vocab(), depth).tolist())
        times: dict[int, list[float]] = {n: [] for n in sizes}
        for i in range(n_rounds + 1):
            for n in sizes:
                tokens = rng.integers(0, llm.n_vocab(), n).tolist()
                # twice: the first pass of a size builds its graph
                for _ in range(2):
                    dec.settle()
                    start = time.perf_counter()
                    dec.eval(tokens, depth, all_outputs=True)
                    dec.logits(1)
                    elapsed = time.perf_counter() - start
                if i > 0:
                    times[n].append(elapsed * 1e3)
        for n in sizes:
            low, mid, high = np.percentile(times[n], [25, 50, 75])
            result[n].append((float(mid), float((high - low) / 2 / mid)))
    llm.close()
    return result
