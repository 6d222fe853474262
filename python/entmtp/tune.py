"""`python -m entmtp.tune`: trees and their calibration for one base model, its heads, a task and this machine.

Two measurements, then a search without the model:

1. what passes and drafts cost here (`entmtp.costs`),
2. rank traces: plain rollouts of the prompts with all that policies and heads would have said (`entmtp.traces`),
3. trees for every entropy bin, the best single tree, and a calibration of the heads' probabilities, fitted to half
of the
   prompts by replay (`entmtp.search`, `entmtp.calibration`), and judged on the other half.
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import calibration, search
from .atomic import atomic_path
from .bank import PLAIN, Bank, Ladder, Tree, dumps
from .costs import N_VERIFY, SIZES, Costs, measure, tuned_path
from .costs import Progress as Report
from .errors import EntmtpError
from .llama import Llama
from .machine import cpu_name
from .policy import PUBLISHED
from .prompts import read_prompts
from .replay import replay
from .traces import Traces, heads_identity, record

WINDOWS = (2.0, 8.0, 32.0)
BINS = (1, 2, 4, 7)
EVERY_SIZE_BELOW = (
    4000.0  # us: where a pass of one token is faster, passes of every size are timed, else a selection
)


def measure_rest(llm: Llama, costs: Costs, n_tokens: int = 96, **sampling: Any) -> Costs:
    """Fill in what a token costs besides draft and verify: sampling, decoder and caller, from a plain rollout."""
    llm.set_trees(Bank("plain", (PLAIN,)), policy="off")
    prompt = llm.tokenize(b"The quick brown fox jumps over the lazy dog.")
    for _ in range(2):  # the first one warms up
        llm.reset()
        llm.reset_draft_stats()
        n, begin = 0, 0.0
        for _token in llm.generate(prompt, **sampling):
            begin = begin or time.perf_counter()
            n += 1
            if n == n_tokens:
                break
        wall = (time.perf_counter() - begin) * 1e6
    steps = llm.draft_stats.steps
    inside = sum(float(steps[f"t_{k}_us"].sum()) for k in ("draft", "verify", "sample", "host"))
    return replace(
        costs,
        sample=round(float(np.median(steps["t_sample_us"])), 1),
        host=round(float(np.median(steps["t_host_us"])), 1),
        token=round(max(wall - inside, 0.0) / max(n - 1, 1), 1),
    )


def ladders(traces: Traces, bank: Bank) -> dict[str, Ladder]:
    """Ladders of the published policies: the larger the tree, the more predictable the text; equally filled rungs."""
    trees = sorted(range(len(bank.trees)), key=lambda i: -bank.trees[i].n_nodes)
    top1 = np.stack([traces.level(h)[:, 0, 0] for h in range(traces.n_heads)], axis=1)
    scores = {
        "entropy": traces.running(bank.ema_window),
        "top1": 1.0 - traces.signals[:, 1],
        "path": 1.0 - np.exp(top1.sum(axis=1)),
    }
    result = {}
    for score, values in scores.items():
        edges = np.unique(np.quantile(values, np.arange(1, len(trees)) / len(trees)).round(4))
        edges = edges[edges > 0]
        result[score] = Ladder(tuple(float(e) for e in edges), tuple(trees[: len(edges) + 1]))
    return result


def fit(traces: Traces, costs: Costs, progress: Report | None = None) -> Bank:
    """A bank fitted to traces under measured costs: trees, bins, window, criterion, calibration, ladders."""
    single = search.best_single(traces, costs)
    options = [(w, b, c) for w in WINDOWS for b in BINS for c in ("ratio", "price")]
    # where nothing is to be gained here, the bank shall still tell predictable text from other
    options.sort(key=lambda option: option != (8.0, 4, "ratio"))
    best: tuple[float, Bank] | None = None
    for i, (window, n_bins, criterion) in enumerate(options):
        bank = search.bin_bank(traces, costs, window, n_bins, criterion, more=[single])
        us = replay(traces, bank, "entropy").us  # adapting, as it will be used
        if best is None or us < best[0] * (1 - 1e-3):
            best = (us, bank)
        if progress:
            progress("search", i + 1, len(options))
    assert best is not None
    bank = replace(best[1], calibration=calibration.fit(traces, best[1].ema_window))
    return replace(bank, published=ladders(traces, bank))


def fit_sizes(
    traces: Traces, costs: Costs, sizes: Sequence[int], window: float = 8.0, n_bins: int = 4
) -> Bank:
    """A bank for other machines too: trees of given sizes, whatever they cost here; calibrated in the same way."""
    overall = search.node_probabilities(traces.ranks)
    trees = (PLAIN, *(Tree(f"n{n}", search.grow(overall, n)) for n in sizes if n > 1))
    bank = search.calibrated(traces, costs, trees, window, n_bins)
    bank = replace(bank, calibration=calibration.fit(traces, window))
    return replace(bank, published=ladders(traces, bank))


def judge(traces: Traces, bank: Bank, single: Tree) -> dict[str, Any]:
    """Every policy on held-out traces, as speed relative to plain decoding; tokens/s counts the whole step."""
    costs = bank.need_costs()
    plain = replay(traces, bank, "off")
    published = Bank.load("mc_sim_7b_63").pruned(traces.n_heads)
    runs = {
        "plain": plain,
        "best single tree": search.static(traces, single, costs),
        "published 63-node tree": search.static(traces, published.trees[1], costs),
        "entropy": replay(traces, bank, "entropy"),
        "confidence": replay(traces, bank, "confidence"),
    }
    for policy in PUBLISHED:
        for score in bank.published:
            runs[f"{policy}, {score}"] = replay(traces, bank, policy, score=score)
    rows = {
        name: {
            "speed": round(plain.us / r.us, 4),
            "tokens_per_second": round(r.speed, 1),
            "tokens_per_step": round(r.tokens_per_step, 3),
        }
        for name, r in runs.items()
    }
    ideal = search.oracle(traces, costs) * 1e6
    rows["oracle"] = {"speed": round(plain.us / ideal, 4)}
    return rows


def sample_text(traces: Traces, bank: Bank) -> dict[str, Any]:
    """Entropy along one text with the tree that the entropy policy chose: for plots."""
    text = traces.pick([int(np.argmax(traces.n_tokens))])
    r = replay(text, bank, "entropy", adapt=False)
    position = np.concatenate([[0], np.cumsum(r.steps["n_accepted"] + 1)[:-1]])
    return {
        "entropy": text.entropy.round(3).tolist(),
        "position": position.tolist(),
        "tree": r.steps["tree"].tolist(),
        "running": np.round(r.steps["entropy"].astype(float), 3).tolist(),
    }


def tune(
    model: str | Path,
    heads: str | Path,
    prompts: Sequence[tuple[str, str]],
    *,
    name: str = "tuned",
    task: str | None = None,
    temps: Sequence[float] = (0.0, 0.8),
    n_tokens: int = 128,
    n_threads: int | None = None,
    n_ctx: int = 2048,
    seed: int = 0,
    traces: str | Path | None = None,
    contexts: Sequence[int] = (64, 512),
    n_rounds: int = 12,
    progress: Report | None = None,
    sampling: dict[str, Any] | None = None,
    sizes: Sequence[int] | None = None,
    **kwargs: Any,
) -> Bank:
    """A bank tuned for a base model, its heads, a task and this machine. See the module's text for how.

    Args:
        prompts: (task, text) pairs; every other one is held out.
        temps: sampling temperatures of the rollouts.
        n_tokens: tokens per rollout.
        traces: file of rank traces: used if it holds traces of these heads, else written (and an interrupted
            recording goes
            on from it).
        contexts: depths at which passes are timed.
        n_rounds: how often each is timed.
        sampling: other sampling settings of the rollouts, as for `Llama.generate`.
        n_threads: for passes of any size; None: as `Llama` does.
        sizes: trees of these sizes instead of those that pay on this machine.
        kwargs: settings of `Llama`.

    Raises:
        ValueError: too few prompts, or traces of other heads.
    """
    if len(prompts) < 2:
        raise ValueError("at least two prompts are needed: one to fit, one to judge")
    sampling = sampling or {}
    if n_threads:
        kwargs |= {"n_threads": n_threads, "n_threads_batch": n_threads}
    llm = Llama(model, draft="entmtp", heads=heads, policy="off", n_ctx=n_ctx, **{"verbose": False, **kwargs})
    try:
        assert llm._heads is not None
        costs = measure(llm, SIZES[:1], contexts[:1], 2)
        every = costs.curve()[0] < EVERY_SIZE_BELOW
        sizes_timed = range(1, N_VERIFY + 1) if every else SIZES
        costs = measure(llm, sizes_timed, contexts, n_rounds, progress=progress, seed=seed)
        costs = measure_rest(llm, costs, temp=temps[0], **sampling)
        llm.set_trees(Bank("off", (PLAIN,)), policy="off")
        known = None
        if traces is not None and Path(traces).exists():
            known = Traces.load(traces)
            if known.about.get("heads") != heads_identity(llm):
                raise ValueError(
                    f"{traces} holds traces of another base model or other heads; name another file, or delete it"
                )
        if known is not None and known.about.get("complete"):
            recorded = known
        else:
            recorded = record(
                llm, prompts, temps=temps, n_tokens=n_tokens, seed=seed, partial=traces,
                advance=lambda i: progress("rollouts", i, len(prompts) * len(temps)) if progress else None,
                **sampling,
            )  # fmt: skip
        arch = llm._heads.arch
        threads = f"{llm.n_threads} threads ({llm.n_threads_batch} for larger passes)"
    finally:
        llm.close()

    costs = replace(costs, context=int(recorded.about.get("context", costs.context)))
    fitted, held_out = recorded.split()
    if not len(fitted.n_tokens) or not len(held_out.n_tokens):
        raise ValueError("the traces hold too few prompts: at least two of a task are needed")
    bank = fit_sizes(fitted, costs, sizes) if sizes else fit(fitted, costs, progress)
    single = search.best_single(fitted, costs)
    results = {"all": judge(held_out, bank, single)}
    tasks = sorted(set(held_out.task))
    if len(tasks) > 1:
        results |= {t: judge(held_out.of_task(t), bank, single) for t in tasks}
    probabilities = search.node_probabilities(fitted.ranks)
    report = {
        "held_out": results,
        "single": [list(p) for p in single.paths],
        "front": [[n, round(t, 4), round(s, 2)] for n, t, s in search.pareto(probabilities, costs)],
        "text": sample_text(held_out, bank),
        "spread": costs.spread,
    }
    n = len(recorded.signals)
    return replace(
        bank,
        name=name,
        source=f"python -m entmtp.tune, {len(recorded.n_tokens)} rollouts, {n} tokens at temperatures "
        f"{', '.join(f'{t:g}' for t in recorded.about.get('temps', temps))}",
        task=task,
        heads=f"{arch}: {Path(heads).name}",
        device=f"{cpu_name()} ({platform.machine()}), {threads}; {Path(model).name}",
        report=report,
    )


def show(console: Console, bank: Bank) -> None:
    """The bank and what it is worth, as tables."""
    costs = bank.need_costs()
    expected = bank.expected()
    table = Table(title=f"bank {bank.name}", title_justify="left", header_style="bold")
    for column in ("tree", "nodes", "depth", "step us", "relative", "accepted per entropy bin"):
        table.add_column(
            column, justify="left" if column in ("tree", "accepted per entropy bin") else "right"
        )
    plain = costs.step(PLAIN)
    for i, tree in enumerate(bank.trees):
        us = costs.step(tree)
        accepted = " ".join(f"{x:.2f}" for x in expected[:, i])
        row = (f"{tree.n_nodes}", f"{tree.max_depth}", f"{us:.0f}", f"{us / plain:.2f}", accepted)
        table.add_row(tree.name, *row)
    console.print(table)
    edges = " ".join(f"{e:g}" for e in bank.bin_edges) or "none"
    console.print(
        f"entropy bins split at {edges} nats; window {bank.ema_window:g} tokens; criterion {bank.criterion}; "
        f"spread of the timings {100 * costs.spread:.0f} %\n"
    )
    results = bank.report["held_out"]
    table = Table(title="held-out prompts, by replay", title_justify="left", header_style="bold")
    table.add_column("policy")
    for task in results:
        table.add_column(f"{task}: against plain", justify="right")
    table.add_column("tokens/step", justify="right")
    for name, row in results["all"].items():
        tau = row.get("tokens_per_step")
        table.add_row(
            name, *(f"{results[t][name]['speed']:.3f}" for t in results), "" if tau is None else f"{tau:.2f}"
        )
    console.print(table)


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m entmtp.tune",
        description="Tune trees and policies for a base model and its heads, your prompts, and this machine.",
        epilog="example: python -m entmtp.tune --model model.gguf --heads heads.gguf --prompts my.jsonl; Llama uses "
        "the result from then on. With -o bank.json it is written there instead: Llama(..., trees='bank.json'). "
        "python -m entmtp.tune --plot bank.json draws it.",
    )
    parser.add_argument("--model", help="base model (GGUF)")
    parser.add_argument("--heads", help="its heads, from python -m entmtp.convert")
    parser.add_argument(
        "--prompts", nargs="+", help="JSONL files, one object with a field prompt per line; one task each"
    )
    parser.add_argument(
        "-o",
        "--outfile",
        help="bank to write (JSON; default: where Llama finds it for this model and machine)",
    )
    parser.add_argument("--task", help="what the prompts are, kept in the bank")
    parser.add_argument("--name", help="name of the bank (default: the file's)")
    parser.add_argument("--limit", type=int, help="use the first N prompts of each file only")
    parser.add_argument("--tokens", type=int, default=128, help="tokens per rollout (default: 128)")
    parser.add_argument(
        "--temp",
        type=float,
        nargs="+",
        default=[0.0, 0.8],
        help="temperatures you sample at (default: 0 and 0.8)",
    )
    parser.add_argument("--top-k", type=int, default=40, help="as in Llama.generate (default: 40)")
    parser.add_argument("--top-p", type=float, default=0.95, help="as in Llama.generate (default: 0.95)")
    parser.add_argument("--min-p", type=float, default=0.05, help="as in Llama.generate (default: 0.05)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the rollouts and of the timings' tokens (default: 0)"
    )
    parser.add_argument(
        "--traces", help="file that keeps the rank traces: for another machine's costs, or to resume"
    )
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512], help="depths to time passes at")
    parser.add_argument(
        "--rounds", type=int, default=12, help="how often each size is timed, times two (default: 12)"
    )
    parser.add_argument(
        "--sizes", type=int, nargs="+", help="trees of these sizes, for a bank that serves other machines too"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: as Llama)")
    parser.add_argument("--ctx", type=int, default=2048, help="context length (default: 2048)")
    parser.add_argument(
        "--n-gpu-layers", type=int, default=0, help="layers on the GPU, -1 for all (default: 0)"
    )
    parser.add_argument("--flash-attn", action="store_true", help="use flash attention")
    parser.add_argument(
        "--plot", metavar="BANK", help="draw a tuned bank as PNG files beside it, and measure nothing"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        if args.plot:
            from .plots import plot_bank

            for path in plot_bank(Bank.load(args.plot), Path(args.plot)):
                print(f"wrote {path}")
            return 0
        if not (args.model and args.heads and args.prompts):
            parser.error("--model, --heads and --prompts are needed, or --plot")
        prompts = [(Path(p).stem, text) for p in args.prompts for text in read_prompts(p, args.limit)]
        name = args.name or (Path(args.outfile).stem if args.outfile else "tuned")
        columns = (
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        )  # fmt: skip
        with Progress(
            *columns, transient=True, disable=not sys.stderr.isatty(), console=Console(stderr=True)
        ) as bars:
            stages: dict[str, Any] = {}

            def report(stage: str, done: int, total: int) -> None:
                if stage not in stages:
                    stages[stage] = bars.add_task(stage, total=total)
                bars.update(stages[stage], completed=done)

            bank = tune(
                args.model, args.heads, prompts, name=name, task=args.task, temps=args.temp, n_tokens=args.tokens,
                n_threads=args.threads, n_ctx=args.ctx, seed=args.seed, traces=args.traces, contexts=args.contexts,
                n_rounds=args.rounds, progress=report, n_gpu_layers=args.n_gpu_layers, flash_attn=args.flash_attn,
                sizes=args.sizes, sampling={"top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p},
            )  # fmt: skip
        costs = bank.need_costs()
        out = Path(args.outfile) if args.outfile else tuned_path(costs.key)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as temporary:
            temporary.write_text(dumps(bank), "utf-8")
    except (EntmtpError, ValueError, OSError) as e:
        print(f"entmtp.tune: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        again = f"; the rollouts done so far are in {args.traces}" if args.traces else ""
        print(f"entmtp.tune: interrupted, no bank was written{again}", file=sys.stderr)
        return 130
    show(console, bank)
    print(
        f"wrote {out}"
        + ("" if args.outfile else ": Llama uses it for this model and these heads from now on")
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
