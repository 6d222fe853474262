"""Single passes and steps, timed; and `entmtp bench curve`: what a pass over n tokens costs on this machine.

That curve decides which tree pays. With several CPU kernels (ggml's own and ours) passes take turns in one process.
"""

from __future__ import annotations

import ctypes
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..bank import PLAIN, Bank, Tree
from ..common.progress import stages
from ..llama import Llama
from ..measure.compare import time_split
from ..measure.turns import Advance, Prompt, decode
from ..native import abi, kernels
from ..report.tables import Form, part, table
from .inputs import flat, load_plain, model_of, shape_of

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 32, 64)
CELLS = {
    "ms": "{ms:.2f} ±{spread:.0%}", "relative": "{relative:.2f}", "memory": "{memory:.0%}", "int8": "{int8:.0%}",
}  # fmt: skip
WARM_UP = 9  # tokens: a prompt as long as the tree is large takes the place of its graph


def weights_per_pass(model: str | Path) -> tuple[int, int]:
    """Bytes of weights that a pass of one token reads, and multiply-adds per token, without attention."""
    reader = gguf.GGUFReader(model)
    tensors = [t for t in reader.tensors if len(t.shape) >= 2 and not t.name.endswith(".bias")]
    tied = all(t.name != "output.weight" for t in tensors)
    used = [t for t in tensors if t.name != "token_embd.weight" or tied]
    arch = reader.fields["general.architecture"].contents()
    n_expert, n_used = (reader.fields.get(f"{arch}.expert_{key}") for key in ("count", "used_count"))
    share = n_used.contents() / n_expert.contents() if n_expert and n_used else 1.0

    def total(of: str) -> int:
        return round(sum(int(getattr(t, of)) * (share if "exps." in t.name else 1.0) for t in used))

    return total("n_bytes"), total("n_elements")


def bandwidth(llm: Llama) -> float:
    """Bytes per second that the memory of the model's device gives."""
    if llm.model_params.n_gpu_layers == 0:
        return kernels.machine_peaks(llm.n_threads_batch)[0]
    found = ctypes.c_double()
    abi.check(abi.device_bandwidth(llm.model, ctypes.byref(found)))
    return found.value


def time_steps(llm: Llama, tree: Tree, depth: int, n_tokens: int, temp: float, **more: Any) -> dict[str, Any]:
    """A generation with one tree behind `depth` tokens: where the time goes, and what is copied, per step."""
    bank = Bank("study", (PLAIN, tree) if tree.paths else (PLAIN,))
    llm.set_trees(bank, **({"policy": "static", "tree": tree.name} if tree.paths else {"policy": "off"}))
    prompt = Prompt([7 + i % 97 for i in range(depth)], WARM_UP + n_tokens, temp)
    for _ in range(2):  # the first run builds the graphs
        seconds = decode(llm, prompt, untimed=WARM_UP, past_end=True, **more).seconds
    stats = llm.draft_stats
    n_steps = max(stats.n_steps, 1)
    return {
        "tree": tree.name, "nodes": tree.n_nodes, "sampling": "top-k" if temp else "greedy", "steps": n_steps,
        "ms": 1e3 * seconds / n_steps, "split": time_split([stats], seconds), "outputs": stats.outputs.mode,
        "traffic": {k: v / n_steps for k, v in asdict(stats.traffic).items()},
    }  # fmt: skip


def time_passes(
    models: dict[str, Llama], contexts: Sequence[int], sizes: Sequence[int], n_rounds: int, advance: Advance
) -> list[dict[str, Any]]:
    """Milliseconds of a pass by kernels, context and number of tokens, all in turn.

    Args:
        models: the same model, by names as of `instances`.
        n_rounds: after a first one, which does not count.

    Returns:
        kernels, context, n, the median in ms, and as spread half of what lies between the quartiles, relative to it.
    """
    times: dict[tuple[str, int, int], list[float]] = {}
    rng = np.random.default_rng(0)
    n_vocab = next(iter(models.values())).n_vocab()
    for at, depth in enumerate(contexts):
        prompt = rng.integers(0, n_vocab, depth).tolist()
        for name, llm in models.items():
            with kernels.using(name.split()[0]):
                llm.reset()
                llm.eval(prompt)
        for i in range(n_rounds + 1):
            for n in sizes:
                tokens = rng.integers(0, n_vocab, n).tolist()
                for name, llm in models.items():
                    with kernels.using(name.split()[0]):
                        times.setdefault((name, depth, n), []).append(_pass_ms(llm, tokens, depth))
            advance("passes", at * (n_rounds + 1) + i + 1, len(contexts) * (n_rounds + 1))
    found = []
    for (name, depth, n), samples in times.items():
        low, mid, high = map(float, np.percentile(samples[1:], [25, 50, 75]))
        found.append({"kernels": name, "context": depth, "n": n, "ms": mid, "spread": (high - low) / 2 / mid})
    return found


def instances(sets: Sequence[str]) -> list[str]:
    """Names of models by the CPU kernels that each is loaded with; the second one with `auto` is `auto 2`."""
    return [f"{k} {sets[:i].count(k) + 1}" if k in sets[:i] else k for i, k in enumerate(sets)]


def _pass_ms(llm: Llama, tokens: list[int], depth: int) -> float:
    for _ in range(2):  # the first pass of a size builds its graph
        llm.decoder.settle()
        start = time.perf_counter()
        llm.decoder.eval(tokens, depth, all_outputs=True)
        llm.decoder.logits(1)
        elapsed = time.perf_counter() - start
    return elapsed * 1e3


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    contexts, sizes = sorted(set(flat(args.contexts))), args.sizes or SIZES
    sets = args.kernels or (["auto"] if args.n_gpu_layers or args.rpc else ["off", "auto"])
    n_ctx = max(max(contexts) + max(sizes) + 64, args.ctx or 0)
    report["curves"] = []
    for name in [args.model, *args.more_models]:
        with ExitStack() as stack, stages() as advance:
            found = stack.enter_context(model_of(args, name, drafts=False))
            stack.enter_context(kernels.using(kernels.current()))  # back to these
            models = {}
            for label, k in zip(instances(sets), sets, strict=True):
                llm = load_plain(found, kernels=k, stats=False, n_ctx=n_ctx)
                models[label] = stack.enter_context(closing(llm))
            n_bytes, n_macs = weights_per_pass(found.model)
            passes = time_passes(models, contexts, sizes, args.rounds, advance)
            report["threads"] = llm.n_threads
            read, macs = kernels.machine_peaks(llm.n_threads_batch)
        base = {p["context"]: p["ms"] for p in passes if (p["kernels"], p["n"]) == (sets[0], sizes[0])}
        for p in passes:
            p["relative"] = p["ms"] / base[p["context"]]
            # shares of what the machine can do
            p |= {"memory": 1e3 * n_bytes / p["ms"] / read} if read else {}
            p |= {"int8": 1e3 * n_macs * p["n"] / p["ms"] / macs} if macs else {}
        report["curves"].append({
            "model": f"{name}, random weights" if shape_of(name) else Path(found.model).stem, "passes": passes,
            "bytes": n_bytes, "macs": n_macs, "bytes_per_second": read, "macs_per_second": macs,
        })  # fmt: skip
        yield markdown(report["curves"][-1])


def markdown(curve: dict[str, Any]) -> str:
    """A table per context: ms by kernels, relative to the first kernels' pass of one token, and use of the machine."""
    passes, read, peak = curve["passes"], curve["bytes_per_second"], curve["macs_per_second"]
    sets, sizes, contexts = (list(dict.fromkeys(p[k] for p in passes)) for k in ("kernels", "n", "context"))
    text = (
        f"#### {curve['model']}: {curve['bytes'] / 1e6:.0f} MB, {curve['macs'] / 1e6:.0f} M multiply-adds per token\n\n"
        f"This machine reads {read / 1e9:.0f} GB/s and does {peak / 1e9:.0f} G int8 multiply-adds/s.\n"
    )
    for depth in contexts:
        rows: dict[int, dict[str, Any]] = {n: {"n": n} for n in sizes}
        for p in passes:
            if p["context"] == depth:
                rows[p["n"]][p["kernels"]] = p
        columns: dict[str, Form] = {f"tokens, context {depth}": "{n}"}
        columns |= {f"{s}, {title}": part(s, form) for s in sets for title, form in CELLS.items()}
        text += "\n" + table(columns, rows.values(), n_text=0)
    return text
