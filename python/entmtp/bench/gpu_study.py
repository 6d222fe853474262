"""`python -m entmtp.bench --gpu-study`: what EntMTP costs and brings on one device, from 1B to 32B.

Costs are measured on random weights in the shape of real models, and on the demo model: passes by nodes and context,
drafts by depth and width, what is left of a step, and what crosses between host and device. Acceptance is replayed:
from traces of the demo model, and from what was published for Vicuna-7B with Hydra heads.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..bank.bank import Bank
from ..bank.costs import Costs
from ..bank.traces import Traces
from ..bank.tree import PLAIN, Tree
from ..common.machine import cpu_name, free_memory
from ..llama import Llama
from ..measure import search
from ..measure.fitting import fit
from ..measure.replay import replay
from ..measure.rollouts import record
from ..measure.timing import measure, measure_rest
from ..models.shapes import SHAPES, cache_bytes, model_bytes, write_heads, write_model
from ..native import abi, kernels
from ..native.backends import backends
from ..options.demo import demo_files
from .verify_curve import weights_per_pass

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
DEMO = "demo"
WARM_UP = 8  # tokens: a prompt as long as the tree is large takes the place of its graph
GB = 1e9
HEADS_SHARE = 0.6  # what heads and buffers may take on top of a model, at most

# Share of steps that accept 0 to 4 drafts: Vicuna-7B with Hydra heads, the fixed 63-node tree, temperature 0. Figures
# of the public repository of EntMTP (arXiv 2606.27550)
PUBLISHED_ACCEPTANCE = {
    "HumanEval (published)": (0.037, 0.087, 0.188, 0.437, 0.251),
    "LitBench (published)": (0.096, 0.167, 0.267, 0.336, 0.134),
}

Say = Callable[[str], None]


@dataclass(frozen=True)
class Device:
    """Where models are put: `n_gpu_layers`, a name, and bytes of memory that are free (None: unknown)."""

    n_gpu_layers: int
    name: str
    free: int | None


def find_device(wanted: str) -> Device:
    """`cpu`, `gpu`, or `auto`: a GPU if there is one.

    Raises:
        ValueError: there is no GPU that this build can use.
    """
    gpus = [d for found in backends().values() for d in found if "GPU" in d.kind]
    if wanted == "gpu" and not gpus:
        raise ValueError(
            f"--device gpu: this build finds no GPU (its backends: {', '.join(backends())}); build with CUDA=1, "
            "METAL=1 or VULKAN=1 (docs/build.md), or give --device cpu"
        )
    if gpus and wanted != "cpu":
        return Device(-1, f"{gpus[0].name}: {gpus[0].description}", gpus[0].free or None)
    return Device(0, cpu_name(), free_memory())


def why_not(shape: str, quant: str, n_ctx: int, device: Device, folder: Path) -> str | None:
    """Why a model of random weights has no room here; None if it has."""
    s = SHAPES[shape]
    size = model_bytes(s, quant)
    memory, disk = size * (1 + HEADS_SHARE) + cache_bytes(s, n_ctx), shutil.disk_usage(folder).free
    if device.free is not None and memory > device.free:
        return (
            f"it needs about {memory / GB:.1f} GB with a context of {n_ctx}, and {device.free / GB:.1f} GB of "
            f"{device.name} are free; take another type of --types, or smaller --contexts"
        )
    if 2 * size * (1 + HEADS_SHARE) > disk:  # weights go through a temporary file
        return (
            f"writing it takes about {2 * size * (1 + HEADS_SHARE) / GB:.1f} GB of disk, and {disk / GB:.1f} GB are "
            f"free in {folder}; set TMPDIR to a larger one"
        )
    return None


@contextmanager
def files_of(shape: str, quant: str, folder: Path) -> Iterator[tuple[Path, Path]]:
    """Model and heads: the demo's, or random weights that are deleted afterwards."""
    if shape == DEMO:
        yield demo_files()
        return
    with tempfile.TemporaryDirectory(prefix="entmtp-shape-", dir=folder) as made:
        model = write_model(Path(made) / "model.gguf", SHAPES[shape], quant=quant)
        yield model, write_heads(Path(made) / "heads.gguf", model, SHAPES[shape], "hydra")


#
# measuring
#


def steps_of(llm: Llama, tree: Tree, depth: int, n_tokens: int, **sampling: Any) -> dict[str, Any]:
    """A generation with one tree behind `depth` tokens: where the time goes, and what is copied, per step."""
    bank = Bank("study", (PLAIN, tree) if tree.paths else (PLAIN,))
    llm.set_trees(bank, **({"policy": "static", "tree": tree.name} if tree.paths else {"policy": "off"}))
    prompt = [7 + i % 97 for i in range(depth)]
    for _ in range(2):  # the first run builds the graphs
        llm.reset()
        begin = 0.0
        for i, _token in enumerate(llm.generate(prompt, **sampling)):
            if i == WARM_UP:
                llm.reset_draft_stats()
                begin = time.perf_counter()
            if i == WARM_UP + n_tokens:
                break
        wall = time.perf_counter() - begin
    stats = llm.draft_stats
    n_steps = max(stats.n_steps, 1)
    split = {k: v / wall for k, v in stats.time_split.items()}
    split["rest"] = max(0.0, 1.0 - sum(split.values()))
    return {
        "tree": tree.name, "nodes": tree.n_nodes, "sampling": "top-k" if sampling.get("temp") else "greedy",
        "ms": 1e3 * wall / n_steps, "split": split, "steps": n_steps,
        "traffic": {k: v / n_steps for k, v in asdict(stats.traffic).items()}, "outputs": stats.outputs.mode,
    }  # fmt: skip


def bandwidth(llm: Llama, device: Device, n_threads: int) -> float:
    """Bytes per second that the memory of the device gives."""
    if device.n_gpu_layers == 0:
        return kernels.machine_peaks(n_threads)[0]
    found = ctypes.c_double()
    abi.check(abi.device_bandwidth(llm.model, ctypes.byref(found)))
    return found.value


def study_model(
    model: Path, heads: Path, device: Device, contexts: Sequence[int], n_threads: int, *,
    sizes: Sequence[int] = SIZES, n_rounds: int = 6, n_tokens: int = 48, outputs: str | None = None,
    advance: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Everything that is measured of one model; costs in microseconds."""
    wide = max((n for n in sizes if n > 1), default=2)
    trees = [PLAIN, Tree.from_paths("n16", [[r] for r in range(15)])] + (
        [Tree.from_paths(f"n{wide}", [[r] for r in range(wide - 1)])] if wide > 16 else []
    )
    llm = Llama(
        model, draft="entmtp", heads=heads, policy="off", calibrate=False, n_gpu_layers=device.n_gpu_layers,
        n_ctx=max(contexts) + max(*sizes, n_tokens * 6) + 64, n_threads=n_threads, n_threads_batch=n_threads,
        verbose=False, outputs=outputs, flash_attn=device.n_gpu_layers != 0,
    )  # fmt: skip
    with closing(llm):
        costs = measure(llm, sizes, contexts, n_rounds=n_rounds, progress=advance)
        costs = replace(measure_rest(llm, costs, temp=0.0), key=None)
        steps = [
            steps_of(llm, tree, min(contexts), n_tokens, **sampling)
            for sampling in ({"temp": 0.0}, {"temp": 0.8, "top_k": 40})  # greedy first: it reduces to less
            for tree in trees
        ]
        weights = weights_per_pass(model)[0]
        cache = {c: _cache_of(llm, c) for c in costs.verify}
        return {
            "costs": costs.to_json(), "steps": steps, "bytes": weights, "cache_bytes": cache,
            "bytes_per_second": bandwidth(llm, device, n_threads), "outputs": str(llm.decoder.outputs),
            "heads": llm.draft_heads.info.device.decode(), "vocabulary": llm.n_vocab(),
        }  # fmt: skip


def _cache_of(llm: Llama, n_ctx: int) -> int:
    """Bytes of keys and values behind n_ctx tokens, f16."""
    meta, arch = llm.metadata, llm.metadata["general.architecture"]
    head = int(meta[f"{arch}.embedding_length"]) // int(meta[f"{arch}.attention.head_count"])
    return 4 * int(meta[f"{arch}.block_count"]) * head * int(meta[f"{arch}.attention.head_count_kv"]) * n_ctx


def demo_traces(n_prompts: int, n_tokens: int, n_threads: int) -> Traces:
    """Greedy rollouts of the demo model with its Hydra heads."""
    model, heads = demo_files()
    llm = Llama(
        model, draft="entmtp", heads=heads, policy="off", calibrate=False, n_ctx=1024, n_threads=n_threads,
        n_threads_batch=n_threads, verbose=False,
    )  # fmt: skip
    lines = (files("entmtp.trees") / "generic-prompts.jsonl").read_text("utf-8").splitlines()
    items = [(item["task"], item["prompt"]) for item in map(json.loads, lines)]
    tasks = list(dict.fromkeys(task for task, _ in items))
    each = max(2, -(-n_prompts // len(tasks)))  # one of every task to fit, one to test
    chosen = [item for task in tasks for item in [i for i in items if i[0] == task][:each]]
    with closing(llm):
        return record(llm, chosen, temps=(0.0,), n_tokens=n_tokens)


#
# replay
#


def replayed(traces: Traces, costs: Costs) -> dict[str, float]:
    """Tokens/s on the held-out half of the traces; trees are fitted to the other half."""
    fitted, held_out = traces.split()
    if not len(fitted.n_tokens) or not len(held_out.n_tokens):
        raise ValueError(
            "the traces hold one prompt per task; replay needs two, one to fit trees and one to test them"
        )
    bank = fit(fitted, costs)
    published = Bank.load("mc_sim_7b_63").pruned(traces.n_heads).trees[1]
    runs = {
        "plain": replay(held_out, bank, "off"),
        "63 nodes": search.static(held_out, published, costs),
        "best single tree": search.static(held_out, search.best_single(fitted, costs), costs),
        "EntMTP": replay(held_out, bank, "entropy"),
        "EntMTP, confidence": replay(held_out, bank, "confidence"),
    }
    return {name: run.speed for name, run in runs.items()}


def from_shares(shares: Sequence[float], costs: Costs) -> dict[str, float]:
    """Tokens/s from the published shares of steps that accept 0 to 4 drafts.

    They tell how deep the 63-node tree is accepted. So they tell everything about its first d levels as a tree, which
    accepts as much, but at most d; and nothing about narrower trees. EntMTP is bounded from below by the best fixed
    depth; to know every step's depth beforehand is the most that choosing a depth can give.
    """
    whole = Bank.load("mc_sim_7b_63").pruned(len(costs.chain) - 1).trees[1]
    prefixes = [PLAIN] + [
        Tree.from_paths(f"depth {d}", [list(p) for p in whole.paths if len(p) <= d])
        for d in range(1, whole.max_depth + 1)
    ]
    total = sum(shares)

    def us(d: int, accepted: float) -> float:
        """A step that accepts `accepted` drafts, with host and caller."""
        return costs.step(prefixes[d]) + costs.host + (1 + accepted) * (costs.sample + costs.token)

    def speed(d: int) -> float:
        accepted = sum(p * min(a, d) for a, p in enumerate(shares)) / total
        return 1e6 * (1 + accepted) / us(d, accepted)

    depths = range(len(prefixes))
    # The best depth of each step, at the price of time that makes it consistent (Dinkelbach 1967)
    price = speed(0) / 1e6
    for _ in range(20):
        tokens = spent = 0.0
        for accepted, share in enumerate(shares):
            gains = [1 + min(accepted, d) - price * us(d, min(accepted, d)) for d in depths]
            d = gains.index(max(gains))
            tokens += share * (1 + min(accepted, d))
            spent += share * us(d, min(accepted, d))
        price = tokens / spent
    return {
        "plain": speed(0),
        "63 nodes": speed(whole.max_depth),
        "EntMTP": max(map(speed, depths)),
        "every depth known": 1e6 * price,
    }


def at_context(costs: Costs, context: int) -> Costs:
    """Costs of one context depth."""
    return replace(costs, verify={context: costs.verify[context]}, context=context)


#
# the whole
#


def run(
    shapes: Sequence[str], types: Sequence[str], contexts: Sequence[int], device: Device, n_threads: int, *,
    traces: Traces, sizes: Sequence[int] = SIZES, n_rounds: int = 6, n_tokens: int = 48, outputs: str | None = None,
    say: Say = lambda _: None, advance: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The report: what was measured of every model that has room, and why the others were left out."""
    from ..bank.costs import from_json

    folder = Path(tempfile.gettempdir())
    models, skipped = [], []
    for shape in shapes:
        for quant in types if shape != DEMO else ("f32",):
            label = f"{shape} {quant}"
            n_ctx = max(contexts)
            reason = None if shape == DEMO else why_not(shape, quant, n_ctx, device, folder)
            if reason:
                skipped.append({"model": label, "why": reason})
                say(f"{label} is left out: {reason}")
                continue
            with files_of(shape, quant, folder) as (model, heads):
                found = study_model(
                    model, heads, device, contexts, n_threads, sizes=sizes, n_rounds=n_rounds, n_tokens=n_tokens,
                    outputs=outputs, advance=advance,
                )  # fmt: skip
            costs = from_json(found["costs"], label)
            found["speeds"] = {
                str(c): {"demo traces": replayed(traces, at_context(costs, c))}
                | {task: from_shares(p, at_context(costs, c)) for task, p in PUBLISHED_ACCEPTANCE.items()}
                for c in sorted(costs.verify)
            }
            models.append({"model": label} | found)
    return {"device": device.name, "threads": n_threads, "gpu_study": models, "skipped": skipped}
