"""What a pass over n tokens costs on this machine: the curve that decides which tree pays.

`python -m entmtp.bench --verify-curve`. With two kinds of CPU kernels (ggml's own and ours) their passes take turns in
one process, so that the machine's drift hits both alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..llama import Llama
from ..models.shapes import QUANTS, SHAPES, write_model
from ..native import kernels

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 64)


@dataclass(frozen=True)
class Pass:
    """Passes over n tokens behind a context: ms."""

    kernels: str
    context: int
    n: int
    ms: float  # median
    spread: float  # half of what lies between the quartiles, relative to the median


def weights_per_pass(model: str | Path) -> tuple[int, int]:
    """Bytes of weights that a pass reads, and multiply-adds per token, without attention."""
    tensors = [t for t in gguf.GGUFReader(model).tensors if len(t.shape) == 2]
    tied = all(t.name != "output.weight" for t in tensors)
    used = [t for t in tensors if t.name != "token_embd.weight" or tied]
    return sum(int(t.n_bytes) for t in used), sum(int(t.n_elements) for t in used)


@contextmanager
def model_file(name: str) -> Iterator[Path]:
    """A model by path, or one of random weights by shape and quantisation, like `1b:q4_k`.

    Raises:
        ValueError: neither a file nor a shape.
    """
    shape, _, quant = name.partition(":")
    if Path(name).is_file() or shape not in SHAPES:
        if not Path(name).is_file():
            raise ValueError(
                f"there is no model {name}; besides files there are random weights by shape "
                f"({', '.join(SHAPES)}) and quantisation ({', '.join(QUANTS)}), like 1b:q4_k"
            )
        yield Path(name)
        return
    with tempfile.TemporaryDirectory(prefix="entmtp-shape-") as folder:
        yield write_model(Path(folder) / "model.gguf", SHAPES[shape], quant=quant or "q4_0")


def verify_curve(
    model: str | Path,
    n_threads: int,
    contexts: Sequence[int],
    sets: Sequence[str] = ("auto",),
    n_rounds: int = 9,
    sizes: Sequence[int] = SIZES,
    advance: Callable[[], None] = lambda: None,
    **kwargs: Any,
) -> list[Pass]:
    """Time of a pass by kernels, context and number of tokens, all in turn.

    Args:
        sets: kernels to compare, as in `Llama(kernels=)`.
        advance: called after each of the `n_rounds + 1` rounds of each context; the first round does not count.
    """
    times: dict[tuple[str, int, int], list[float]] = {}
    rng = np.random.default_rng(0)
    with ExitStack() as stack:
        stack.enter_context(kernels.using(kernels.current()))  # whatever happens
        models = {}
        for name in sets:
            llm = Llama(
                str(model), kernels=name, stats=False, n_ctx=max(contexts) + max(sizes) + 64, n_batch=512,
                n_threads=n_threads, n_threads_batch=n_threads, verbose=False, **kwargs,
            )  # fmt: skip
            models[name] = stack.enter_context(closing(llm))
        for depth in contexts:
            prompt = rng.integers(0, llm.n_vocab(), depth).tolist()
            for name, llm in models.items():
                with kernels.using(name):
                    llm.reset()
                    llm.eval(prompt)
            for i in range(n_rounds + 1):
                for n in sizes:
                    tokens = rng.integers(0, llm.n_vocab(), n).tolist()
                    for name, llm in models.items():
                        with kernels.using(name):
                            ms = _pass_ms(llm, tokens, depth)
                        if i > 0:
                            times.setdefault((name, depth, n), []).append(ms)
                advance()
    result = []
    for (name, depth, n), samples in times.items():
        low, mid, high = np.percentile(samples, [25, 50, 75])
        result.append(Pass(name, depth, n, float(mid), float((high - low) / 2 / mid)))
    return result


def _pass_ms(llm: Llama, tokens: list[int], depth: int) -> float:
    dec = llm.decoder
    for _ in range(2):  # the first pass of a size builds its graph
        dec.settle()
        start = time.perf_counter()
        dec.eval(tokens, depth, all_outputs=True)
        dec.logits(1)
        elapsed = time.perf_counter() - start
    return elapsed * 1e3


def report(
    name: str, n_threads: int, contexts: Sequence[int], sets: Sequence[str], **kwargs: Any
) -> dict[str, Any]:
    """The curve of a model by path or shape, with what the machine could do at best, as JSON.

    Errors and further arguments as in `model_file` and `verify_curve`.
    """
    with model_file(name) as path:
        n_bytes, n_macs = weights_per_pass(path)
        passes = verify_curve(path, n_threads, contexts, sets, **kwargs)
    read, macs = kernels.machine_peaks(n_threads)
    return {
        "model": Path(name).stem if Path(name).is_file() else f"{name}, random weights",
        "bytes": n_bytes, "macs": n_macs, "bytes_per_second": read, "macs_per_second": macs,
        "passes": [vars(p) for p in passes],
    }  # fmt: skip


def markdown(curve: dict[str, Any]) -> str:
    """A table per context: ms by kernels, relative to the first kernels' pass of one token, and use of the machine."""
    passes = [Pass(**p) for p in curve["passes"]]
    sets = list(dict.fromkeys(p.kernels for p in passes))
    size, read = f"{curve['bytes'] / 1e6:.0f} MB", f"{curve['bytes_per_second'] / 1e9:.0f} GB/s"
    macs, peak = f"{curve['macs'] / 1e6:.0f} M", f"{curve['macs_per_second'] / 1e9:.0f} G"
    lines = [
        f"#### {curve['model']}: {size}, {macs} multiply-adds per token",
        "",
        f"This machine reads {read} and does {peak} int8 multiply-adds/s.",
        "",
    ]
    for depth in dict.fromkeys(p.context for p in passes):
        table = {(p.kernels, p.n): p for p in passes if p.context == depth}
        sizes = list(dict.fromkeys(p.n for p in passes))
        base = table[sets[0], sizes[0]].ms
        head = [f"{s}, ms | relative | memory | int8" for s in sets]
        lines += [
            f"| tokens, context {depth} | {' | '.join(head)} |",
            "| --: |" + " --: | --: | --: | --: |" * len(sets),
        ]
        for n in sizes:
            cells = []
            for s in sets:
                p = table[s, n]
                memory = share(curve["bytes"], p, curve["bytes_per_second"])
                int8 = share(curve["macs"] * n, p, curve["macs_per_second"])
                cells.append(f"{p.ms:.2f} ±{100 * p.spread:.0f} % | {p.ms / base:.2f} | {memory} | {int8}")
            lines.append(f"| {n} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def share(amount: float, p: Pass, peak: float) -> str:
    """`amount` per time of the pass, as a share of the peak; nothing where the peak is not known."""
    return f"{100 * amount / (p.ms / 1e3) / peak:.0f} %" if peak else ""
