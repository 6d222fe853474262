"""`entmtp bench gpu`: what EntMTP costs and brings on one device, from 1B to 32B.

Costs are measured: passes by nodes and context, drafts by depth and width, what is left of a step, and what crosses
between host and device. Acceptance is replayed: from traces, and from figures of Vicuna-7B with published Hydra heads.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

from ..bank import PLAIN, Bank, Costs, Traces, Tree
from ..bank.costs import from_json
from ..common.machine import cpu_name, free_memory
from ..common.progress import stages
from ..common.prompts import by_task
from ..llama import Llama
from ..measure.rollouts import record
from ..measure.timing import measure, measure_rest
from ..measure.turns import Advance
from ..models.shapes import SHAPES, cache_bytes, model_bytes
from ..native.backends import backends
from ..options import DEMO, load
from ..report.tables import Form, table
from .inputs import changed, flat, model_of, shape_of, trace_files
from .passes import bandwidth, time_steps, weights_per_pass
from .whatif import replayed

SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
SHOWN = (1, 2, 4, 8, 16, 32, 64)
# what is shown of replay, by the names of `entmtp.measure.judge`
SPEEDS = {
    "plain": "plain", "63 nodes": "published 63-node tree", "best single tree": "best single tree", "EntMTP": "entropy",
    "EntMTP, confidence": "confidence", "every depth known": None,
}  # fmt: skip
# tables: ms of a draft by depth, and of one head after 1, 2 and 4 paths
DRAFTS: dict[str, Form] = {
    "depth": "{depth}", "chain, ms": "{chain:.3f}", "its last head alone, 1 path": "{level[0]:.3f}",
    "2 paths": "{level[1]:.3f}", "4 paths": "{level[2]:.3f}",
}  # fmt: skip
# where the time of a step goes, and what crosses between host and device in it
STEPS: dict[str, Form] = {
    "step": "{nodes} nodes, {sampling}", "ms": "{ms:.3f}", "draft": "{split[draft]:.0%}",
    "verify": "{split[verify]:.0%}",
    "besides": lambda s: f"{sum(s['split'][k] for k in ('sample', 'host', 'rest')):.1%}",
    "bytes to host": "{traffic[to_host]:.0f}", "to device": "{traffic[to_device]:.0f}",
    "on device": "{traffic[on_device]:.0f}", "whole rows": "{traffic[n_rows]:.2f}", "waits": "{traffic[n_syncs]:.1f}",
    "graphs built": lambda s: f"{s['traffic']['n_graphs'] + s['traffic']['n_draft_graphs']:.2f}",
}  # fmt: skip
# tokens/s by replay
REPLAYED: dict[str, Form] = {
    "acceptance, context": "{source}, {context}", **{name: f"{{{name}:.1f}}" for name in SPEEDS},
    "EntMTP / 63 nodes": lambda r: f"{max(r['EntMTP'], r.get('EntMTP, confidence', 0.0)) / r['63 nodes']:.2f}",
}  # fmt: skip
GB = 1e9
HEADS_SHARE = 0.6  # what heads and buffers may take on top of a model, at most

# Share of steps that accept 0 to 4 drafts: Vicuna-7B with Hydra heads, the fixed 63-node tree, temperature 0. Figures
# of the public repository of EntMTP (arXiv 2606.27550)
PUBLISHED_ACCEPTANCE = {
    "HumanEval (published)": (0.037, 0.087, 0.188, 0.437, 0.251),
    "LitBench (published)": (0.096, 0.167, 0.267, 0.336, 0.134),
}


class Device(NamedTuple):
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
    if gpus and wanted != "cpu":
        return Device(-1, f"{gpus[0].name}: {gpus[0].description}", gpus[0].free or None)
    if wanted == "gpu":
        raise ValueError(
            f"--device gpu: this build finds no GPU (its backends: {', '.join(backends())}); build with CUDA=1, "
            "METAL=1 or VULKAN=1 (docs/build.md), or give --device cpu"
        )
    return Device(0, cpu_name(), free_memory())


def why_not(shape: str, quant: str, n_ctx: int, device: Device) -> str | None:
    """Why a model of random weights has no room here; None if it has."""
    folder = tempfile.gettempdir()
    size, disk = model_bytes(SHAPES[shape], quant) * (1 + HEADS_SHARE), shutil.disk_usage(folder).free
    memory = size + cache_bytes(SHAPES[shape], n_ctx)
    if device.free is not None and memory > device.free:
        needs = f"about {memory / GB:.1f} GB with a context of {n_ctx}, and {device.free / GB:.1f} GB of {device.name}"
        return f"it needs {needs} are free; take another type of --types, or smaller --contexts"
    if 2 * size > disk:  # weights go through a temporary file
        needs = f"about {2 * size / GB:.1f} GB of disk, and {disk / GB:.1f} GB are free in {folder}"
        return f"writing it takes {needs}; set TMPDIR to a larger one"
    return None


def study_model(args: Namespace, contexts: Sequence[int], advance: Advance) -> dict[str, Any]:
    """Everything that is measured of one model; costs in microseconds."""
    sizes, n_tokens = args.sizes or SIZES, min(args.tokens, 48)
    wide = sorted({16, max(sizes)} - set(range(16)))
    trees = [PLAIN, *(Tree.from_paths(f"n{n}", [[r] for r in range(n - 1)]) for n in wide)]
    n_ctx = max(max(contexts) + max(*sizes, n_tokens * 6) + 64, args.ctx or 0)
    with closing(load(args, policy="off", calibrate=False, n_ctx=n_ctx)) as llm:
        costs = measure(llm, sizes, contexts, n_rounds=args.rounds, progress=advance)
        costs = replace(measure_rest(llm, costs, temp=0.0), key=None)
        steps = [
            time_steps(llm, tree, min(contexts), n_tokens, **sampling)
            for sampling in ({"temp": 0.0}, {"temp": 0.8, "top_k": 40})  # greedy first: it reduces to less
            for tree in trees
        ]
        return {
            "costs": costs.to_json(), "steps": steps, "bytes": weights_per_pass(args.model)[0],
            "cache_bytes": {str(c): _cache_of(llm, c) for c in costs.verify}, "bytes_per_second": bandwidth(llm),
            "outputs": str(llm.decoder.outputs), "heads": llm.draft_heads.info.device.decode(),
            "vocabulary": llm.n_vocab(), "threads": llm.n_threads,
        }  # fmt: skip


def _cache_of(llm: Llama, n_ctx: int) -> int:
    """Bytes of keys and values behind n_ctx tokens, f16."""
    meta, arch = llm.metadata, llm.metadata["general.architecture"]
    head = int(meta[f"{arch}.embedding_length"]) // int(meta[f"{arch}.attention.head_count"])
    return 4 * int(meta[f"{arch}.block_count"]) * head * int(meta[f"{arch}.attention.head_count_kv"]) * n_ctx


def demo_traces(args: Namespace) -> Traces:
    """Greedy rollouts of the demo model with its Hydra heads."""
    tasks = by_task(str(files("entmtp.trees") / "generic-prompts.jsonl"))
    each = max(2, -(-args.limit // len(tasks)))  # one of every task to fit, one to test
    demo = changed(args, model=DEMO, heads=None, n_gpu_layers=0, rpc=None, ctx=None)
    with closing(load(demo, policy="off", calibrate=False)) as llm:
        asked = [(task, llm.tokenize(q.text.encode())) for task, some in tasks.items() for q in some[:each]]
        return record(llm, asked, temps=(0.0,), n_tokens=args.tokens)


def from_shares(shares: Sequence[float], costs: Costs) -> dict[str, float]:
    """Tokens/s from the published shares of steps that accept 0 to 4 drafts.

    They tell how deep the 63-node tree is accepted. So they tell everything about its first d levels as a tree, which
    accepts as much, but at most d; and nothing about narrower trees. EntMTP is bounded from below by the best fixed
    depth; to know every step's depth beforehand is the most that choosing a depth can give.
    """
    whole = Bank.load("mc_sim_7b_63").pruned(len(costs.chain) - 1).trees[1]
    depths = np.arange(whole.max_depth + 1)
    trees = [Tree.from_paths(f"depth {d}", [list(p) for p in whole.paths if len(p) <= d]) for d in depths]
    share = np.array(shares) / sum(shares)
    tokens = 1 + np.minimum(np.arange(len(share))[:, None], depths)  # [accepted by the whole tree, depth]
    us = np.array([costs.step(t) for t in trees]) + costs.host + tokens * (costs.sample + costs.token)
    speed = 1e6 * (share @ tokens) / (share @ us)
    # the best depth of each step, at the price of time that makes it consistent (Dinkelbach 1967)
    price = speed[0] / 1e6
    for _ in range(20):
        best = np.arange(len(share)), np.argmax(tokens - price * us, axis=1)
        price = (share @ tokens[best]) / (share @ us[best])
    found = zip(("plain", "63 nodes", "EntMTP"), (speed[0], speed[-1], speed.max()), strict=True)
    return {name: float(x) for name, x in found} | {"every depth known": float(1e6 * price)}


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    device = find_device(args.device)
    if args.rpc:
        device = Device(-1, ", ".join(args.rpc), None)
    layers = device.n_gpu_layers if args.n_gpu_layers is None else args.n_gpu_layers
    flash_attn = layers != 0 if args.flash_attn is None else args.flash_attn
    args = changed(args, n_gpu_layers=layers, flash_attn=flash_attn)
    contexts = sorted(set(flat(args.contexts)))
    names = [args.model] if args.model else [
        name for s in args.shapes for name in ([DEMO] if s == DEMO else [f"{s}:{t}" for t in flat(args.types)])
    ]  # fmt: skip
    report |= {"device": device.name, "gpu_study": [], "skipped": []}
    with stages() as advance:
        sources = {f.stem: Traces.load(f) for f in trace_files(args.traces)} if args.traces else {}
        sources = sources or {"demo traces": demo_traces(args)}
        for name in names:
            shape = shape_of(name)
            label = "demo f32" if name == DEMO else name.replace(":", " ") if shape else name
            if reason := why_not(*shape, max(contexts), device) if shape else None:
                report["skipped"].append({"model": label, "why": reason})
                print(f"entmtp.bench: {label} is left out: {reason}", file=sys.stderr)
                continue
            with model_of(args, name) as own:
                found = study_model(own, contexts, advance)
            costs = from_json(found["costs"], label)
            found["speeds"] = {}
            for c in sorted(costs.verify):
                here = replace(costs, verify={c: costs.verify[c]}, context=c)
                speeds = {}
                for source, traces in sources.items():
                    _, judged = replayed(traces, here)
                    speeds[source] = {s: judged[row]["tokens_per_second"] for s, row in SPEEDS.items() if row}
                speeds |= {task: from_shares(p, here) for task, p in PUBLISHED_ACCEPTANCE.items()}
                found["speeds"][str(c)] = speeds
            report["threads"] = found.pop("threads")
            report["gpu_study"].append({"model": label} | found)
    if not report["gpu_study"]:
        raise ValueError("no model could be measured, for the reasons above")
    yield markdown(report)


def passes(m: dict[str, Any], costs: Costs) -> str:
    """Cost of a pass by nodes and context, relative to one token, and the memory bandwidth of one token's pass."""
    some, peak, rows = next(iter(costs.verify.values())), m["bytes_per_second"], []
    sizes = [n for n in sorted(some) if n > 1 and (n in SHOWN or len(some) < len(SHOWN))]
    for context in sorted(costs.verify):
        curve = costs.curve(context)
        read = (m["bytes"] + m["cache_bytes"][str(context)]) / (curve[0] / 1e6)
        share = {"share": read / peak} if peak else {}
        rows.append(
            {"context": context, "ms": curve[0] / 1e3, "cost": [0, *curve / curve[0]], "gb": read / GB}
            | share
        )
    columns: dict[str, Form] = {"context": "{context}", "one token, ms": "{ms:.3f}"}
    columns |= {f"{n} nodes": f"{{cost[{n}]:.2f}}" for n in sizes}
    return table(columns | {"GB/s": "{gb:.1f}", "of the device's": "{share:.0%}"}, rows)


def markdown(report: dict[str, Any]) -> str:
    """The whole report."""
    parts = [f"Device: {report['device']}, {report['threads']} CPU threads.\n"]
    for m in report["gpu_study"]:
        costs = from_json(m["costs"], m["model"])
        drafts = [
            {"depth": d, "chain": us / 1e3, "level": [x / 1e3 for x in level]}
            for d, (us, level) in enumerate(zip(costs.chain[1:], costs.level, strict=True), 1)
        ]
        speeds = [
            found | {"context": c, "source": source} for c, by in m["speeds"].items() for source, found in by.items()
        ]  # fmt: skip
        parts += [
            f"### {m['model']}\n",
            f"{m['bytes'] / GB:.3f} GB of weights in a pass, vocabulary {m['vocabulary']}, heads on {m['heads']}. "
            f"The device moves {m['bytes_per_second'] / GB:.1f} GB/s. {m['outputs']}.\n",
            passes(m, costs), table(DRAFTS, drafts), table(STEPS, m["steps"]),
            "Tokens/s, by replay; \"EntMTP\" under published acceptance is the best fixed depth, a lower bound:\n",
            table(REPLAYED, speeds),
        ]  # fmt: skip
    return "\n".join(parts + [f"Left out: {s['model']}: {s['why']}.\n" for s in report["skipped"]])
