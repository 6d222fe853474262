"""`python -m entmtp.bench`: decoding methods side by side, in one process, in alternation.

For every prompt all methods run in turn, starting with another one each time, so that the machine's drift hits them
alike. Speeds are of decoding alone: from the first token of an answer to its last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from rich.progress import Progress

from ..common.atomic import atomic_path
from ..common.errors import EntmtpError
from ..common.machine import cpu_name, peak_memory_mb
from ..common.progress import stages
from ..common.prompts import read_prompts
from ..llama import Llama
from ..measure.methods import CONFIDENCE, ENTMTP, PLAIN_LOOP, Method, comparison, generic, published
from ..native import kernels
from ..report.files import write_json
from . import gpu_command
from .study import decode

Runner = Callable[[list[int], int, float], dict[str, Any]]
GGML = Method("EntMTP, ggml's kernels", None, "entropy")  # as ENTMTP, but for the CPU kernels


def runners(args: argparse.Namespace) -> tuple[dict[str, Runner], list[Any]]:
    """The methods to run, by label; and the models to close afterwards."""
    settings: dict[str, Any] = {
        "n_ctx": args.ctx, "n_threads": args.threads, "n_threads_batch": args.threads, "verbose": False,
        "n_gpu_layers": args.n_gpu_layers, "flash_attn": args.flash_attn,
    }  # fmt: skip
    with kernels.using("off"):
        stock = llama_cpp.Llama(args.model, **settings)
    plain = Llama(args.model, stats=False, **settings)
    draft = Llama(args.model, draft="entmtp", heads=args.heads, **settings)
    # these learn from answer to answer
    adaptive = {
        m.label: Llama(args.model, draft="entmtp", heads=args.heads, policy=m.policy, **settings)
        for m in (ENTMTP, CONFIDENCE)
    }
    ggml = Llama(args.model, draft="entmtp", heads=args.heads, kernels="off", **settings)
    kernels.use()

    arch = draft.draft_heads.arch
    methods: list[Method] = [*published()[: args.published], *generic(arch), ENTMTP, CONFIDENCE]
    if args.methods:
        known = {m.label: m for m in [*published(), *generic(arch), ENTMTP, CONFIDENCE, *comparison()]}
        if missing := [m for m in args.methods if m not in known]:
            raise ValueError(f"there is no method {missing[0]}; there are {', '.join(known)}")
        methods = [known[m] for m in args.methods]

    def with_method(method: Method) -> Runner:
        def run(prompt: list[int], n_tokens: int, temp: float) -> dict[str, Any]:
            llm = adaptive.get(method.label, draft)
            if llm is draft:
                method.apply(llm)
            decode(llm, prompt, 8, temp, 1234)  # graphs of the new trees
            llm.reset_draft_stats()
            result = decode(llm, prompt, n_tokens, temp, 1234)
            return result | {"stats": llm.draft_stats}

        return run

    def with_ggml(run: Runner) -> Runner:
        def switched(prompt: list[int], n_tokens: int, temp: float) -> dict[str, Any]:
            with kernels.using("off"):
                return run(prompt, n_tokens, temp)

        return switched

    adaptive[GGML.label] = ggml
    table: dict[str, Runner] = {
        "llama-cpp-python": with_ggml(lambda prompt, n, temp: decode(stock, prompt, n, temp, 1234)),
        GGML.label: with_ggml(with_method(GGML)),
        PLAIN_LOOP.label: lambda prompt, n, temp: decode(plain, prompt, n, temp, 1234),
    }
    table |= {m.label: with_method(m) for m in methods}
    return table, [stock, plain, draft, *adaptive.values()]


def bench_task(
    table: dict[str, Runner],
    prompts: list[list[int]],
    n_tokens: int,
    temp: float,
    advance: Callable[[], None],
) -> list[dict[str, Any]]:
    """One row per method over the prompts of a task."""
    labels = list(table)
    results: dict[str, list[dict[str, Any]]] = {label: [] for label in labels}
    for i, prompt in enumerate(prompts):
        for j in range(len(labels)):
            label = labels[(i + j) % len(labels)]
            results[label].append(table[label](prompt, n_tokens, temp))
            advance()

    speeds = {
        k: np.array([(len(r["tokens"]) - 1) / r["seconds"] for r in rs if len(r["tokens"]) > 8])
        for k, rs in results.items()
    }

    def ratio(label: str, base: str) -> list[float]:
        """Median and quartiles over the prompts of a method's speed against another's."""
        if len(speeds[label]) != len(speeds[base]):
            return [float("nan")] * 3
        return [float(x) for x in np.percentile(speeds[label] / speeds[base], [50, 25, 75])]

    rows = []
    for label in labels:
        rs = results[label]
        # kernels differ in rounding: each method against plain decoding with its own
        reference = results[labels[0] if label == GGML.label else PLAIN_LOOP.label]
        row: dict[str, Any] = {
            "method": label,
            "tokens_per_second": [float(x) for x in np.percentile(speeds[label], [50, 25, 75])],
            "ratio": ratio(label, labels[0]),
            "ratio_plain": ratio(label, PLAIN_LOOP.label),
            "identical": sum(r["tokens"] == b["tokens"] for r, b in zip(rs, reference, strict=True)),
            "answers": len(rs),
        }
        stats = [r["stats"] for r in rs if "stats" in r]
        if stats:
            n_steps = sum(s.n_steps for s in stats)
            seconds = sum(r["seconds"] for r in rs)
            split = {k: sum(s.time_split[k] for s in stats) / seconds for k in stats[0].time_split}
            split["rest"] = max(0.0, 1.0 - sum(split.values()))
            row |= {
                "tokens_per_step": 1.0 + sum(s.n_accepted for s in stats) / max(n_steps, 1),
                "time_split": split,
                "entropy": float(np.mean([s.mean_entropy for s in stats])),
            }
        rows.append(row)
    return rows


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """A task's rows as a Markdown table."""
    lines = [
        f"### {title}",
        "",
        f"| method | tokens/s | against {rows[0]['method']} | against plain | tokens/step | draft | verify | sample "
        "| host | rest | identical |",
        "| --- | --: | --: | --: | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for r in rows:
        s, q, p = r["tokens_per_second"], r["ratio"], r["ratio_plain"]
        parts = (
            [f"{100 * r['time_split'][k]:.0f} %" for k in r["time_split"]] if "time_split" in r else [""] * 5
        )
        tau = f"{r['tokens_per_step']:.2f}" if "tokens_per_step" in r else "1.00"
        lines.append(
            f"| {r['method']} | {s[0]:.1f} ({s[1]:.1f}–{s[2]:.1f}) | {q[0]:.2f}× ({q[1]:.2f}–{q[2]:.2f}) "
            f"| {p[0]:.2f}× ({p[1]:.2f}–{p[2]:.2f}) | {tau} | "
            + " | ".join(parts)
            + f" | {r['identical']}/{r['answers']} |"
        )
    return "\n".join(lines) + "\n"


def curves(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Cost of a verify pass by number of tokens for every model; prints a table each."""
    from . import verify_curve

    sets = args.kernels or (["auto"] if args.n_gpu_layers else ["off", "auto"])
    rounds = args.rounds or 9
    reports = []
    for model in [args.model, *args.more_models]:
        with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
            job = progress.add_task(Path(model).stem, total=len(args.contexts) * (rounds + 1))
            found = verify_curve.report(
                model, args.threads, args.contexts, sets, n_rounds=rounds, sizes=args.sizes or verify_curve.SIZES,
                advance=partial(progress.advance, job), n_gpu_layers=args.n_gpu_layers, flash_attn=args.flash_attn,
            )  # fmt: skip
        print(verify_curve.markdown(found), flush=True)
        reports.append(found)
    return reports


def study(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every base with every heads file at every temperature; prints a table each."""
    from ..bank.bank import dumps
    from . import study as module

    reports = []
    tasks = {Path(p).stem: read_prompts(p, args.limit) for p in args.prompts}
    for folder in (args.traces, args.banks):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
    combinations = product([args.model, *args.more_models], [args.heads, *args.more_heads], args.temp)
    for model, heads, temp in combinations:
        name = f"{Path(model).stem}-{Path(heads).stem}-{temp:g}"
        with stages() as advance:
            result = module.run(
                model, heads, tasks, temp, n_tokens=args.tokens, n_rounds=args.rounds or 1, advance=advance,
                traces=Path(args.traces) / f"{name}.npz" if args.traces else None, n_ctx=args.ctx,
                n_threads=args.threads, n_gpu_layers=args.n_gpu_layers, flash_attn=args.flash_attn,
            )  # fmt: skip
        title = f"{Path(model).stem}, {Path(heads).stem}, temperature {temp:g}"
        print(module.markdown(title, result["tasks"]), flush=True)
        bank = result["bank"]
        tree = bank.report["single"] or "plain decoding"
        print(f"best single tree: {tree}; spread of the timings {bank.need_costs().spread:.0%}\n")
        facts = {"model": Path(model).stem, "heads": Path(heads).stem, "temp": temp, "single": tree}
        reports.append(facts | {"tasks": result["tasks"], "costs": bank.need_costs().to_json()})
        if args.banks:
            with atomic_path(Path(args.banks) / f"{name}.json") as temporary:
                temporary.write_text(dumps(bank), "utf-8")
    return reports


def what_if(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Recorded traces under the costs of other machines; prints a table each."""
    from . import whatif

    reports = []
    for curve in args.what_if:
        with stages() as advance:
            rows, costs = whatif.run(args.traces, curve, args.threads, advance)
        print(f"#### costs: {curve}\n\n{whatif.markdown(rows)}", flush=True)
        for arch, c in costs.items():
            relative = " ".join(
                f"{n}:{us / row[1]:.2f}" for row in c.verify.values() for n, us in sorted(row.items())
            )
            drafts = " ".join(f"{us / c.curve()[0]:.3f}" for us in c.chain[1:])
            print(
                f"{arch}: a pass of one token takes {c.curve()[0] / 1e3:.1f} ms; relative to it, passes by tokens"
            )
            print(f"{relative}; drafts by depth {drafts}\n")
        reports.append({"curve": curve, "rows": rows, "costs": {a: c.to_json() for a, c in costs.items()}})
    return reports


def draw(path: Path) -> int:
    """A picture of a report, beside it."""
    from ..report.plots import plot_curves, plot_study
    from . import gpu_report

    try:
        report = json.loads(path.read_text("utf-8"))
        if isinstance(report, dict) and "gpu_study" in report:
            print(f"wrote {gpu_report.plot(report, path.with_suffix('.png'))}")
            return 0
        plot = plot_curves if isinstance(report, dict) and "curves" in report else plot_study
        print(f"wrote {plot(report, path.with_suffix('.png'))}")
    except (ValueError, KeyError, TypeError, OSError) as e:
        print(f"entmtp.bench: {path}: {e}", file=sys.stderr)
        return 1
    return 0


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m entmtp.bench",
        description="Measure llama-cpp-python, our plain loop, static trees and EntMTP side by side in one process.",
        epilog="example: python -m entmtp.bench --model model.gguf --heads heads.gguf --prompts code.jsonl chat.jsonl "
        "--temp 0 0.8 -o bench.json",
    )
    parser.add_argument("--model", help="base model (GGUF)")
    parser.add_argument("--heads", help="its heads")
    parser.add_argument("--prompts", nargs="+", default=[], help="JSONL files, one task each")
    parser.add_argument("--limit", type=int, default=10, help="prompts per task (default: 10)")
    parser.add_argument("--tokens", type=int, default=200, help="tokens per answer (default: 200)")
    parser.add_argument(
        "--temp", type=float, nargs="+", default=[0.0, 0.8], help="temperatures (default: 0 and 0.8)"
    )
    parser.add_argument("--methods", nargs="+", help="methods besides the plain loops (default: all)")
    parser.add_argument(
        "--published", type=int, default=1, help="how many published trees to include (default: 1)"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument(
        "--n-gpu-layers", type=int, default=0, help="layers on the GPU, -1 for all (default: 0)"
    )
    parser.add_argument("--flash-attn", action="store_true", help="use flash attention")
    parser.add_argument("--ctx", type=int, default=1024, help="context length (default: 1024)")
    parser.add_argument(
        "--verify-curve", action="store_true",
        help="measure the cost of 1 to 64 tokens in one pass instead, with ggml's kernels and ours in turn; --model "
        "may also be random weights by shape and quantisation, like 1b:q4_k",
    )  # fmt: skip
    parser.add_argument(
        "--contexts",
        type=gpu_command.context_lengths,
        nargs="+",
        help="context depths, like 512 4k (default: 64 for --verify-curve, 512,4k,32k for --gpu-study)",
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of tokens of --verify-curve")
    parser.add_argument(
        "--kernels", nargs="+", metavar="NAME", help="CPU kernels of --verify-curve (default: off auto)"
    )
    gpu_command.add_options(parser)
    parser.add_argument(
        "--study", action="store_true",
        help="tune on half of the prompts, then measure plain decoding, the published tree, the best single tree and "
        "EntMTP on the other half, beside what replay predicts",
    )  # fmt: skip
    parser.add_argument(
        "--what-if", nargs="+", metavar="CURVE",
        help="replay the traces of --study (--traces) under other costs: 1b or 7b (a random-weight model of that "
        "shape, timed here), cpu-q8_0, roofline, flat",
    )  # fmt: skip
    parser.add_argument(
        "--ablate", metavar="CURVE", choices=("cpu-q8_0", "roofline", "flat"),
        help="replay variants of the policies over the traces, to see what each part of them is worth",
    )  # fmt: skip
    parser.add_argument(
        "--more-models", nargs="*", default=[], help="further bases for --study and --verify-curve"
    )
    parser.add_argument("--more-heads", nargs="*", default=[], help="further heads for --study")
    parser.add_argument(
        "--rounds", type=int,
        help="how often --study gives every answer (default: 1), or --verify-curve times every pass (default: 9)",
    )  # fmt: skip
    parser.add_argument("--traces", help="folder that keeps the rank traces of --study")
    parser.add_argument("--banks", help="folder for the tuned banks of --study")
    parser.add_argument(
        "--plot",
        metavar="JSON",
        help="draw the report of --study or --verify-curve beside it, and measure nothing",
    )
    parser.add_argument("-o", "--outfile", help="write the figures as JSON, too")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if args.plot:
        return draw(Path(args.plot))
    default = gpu_command.CONTEXTS if args.gpu_study else [64]
    args.contexts = sorted({c for some in args.contexts for c in some}) if args.contexts else default
    if args.gpu_study:
        if args.model or args.heads:
            parser.error(
                "--gpu-study brings its own models: choose them with --shapes, without --model and --heads"
            )
    elif args.what_if or args.ablate:
        if not args.traces:
            parser.error("--what-if and --ablate need --traces, a folder of trace files from --study")
    elif not args.model or not (args.verify_curve or (args.heads and args.prompts)):
        parser.error("--model is needed, and --heads and --prompts or --verify-curve")
    model = Path(args.model).name if args.model else "random weights" if args.gpu_study else "replay"
    print(f"{cpu_name()}, {args.threads} threads, {platform.system()}; {model}; entmtp, llama.cpp "
          f"{llama_cpp.__version__}\n")  # fmt: skip
    try:
        if args.gpu_study:
            gpu_command.run(args)
            return 0
        if args.ablate:
            from .whatif import ablation

            variants = ablation(args.traces, args.ablate)
            print(f"costs: {args.ablate}; speed against the best single tree\n")
            print("| variant | mean | lowest | highest |\n| --- | --: | --: | --: |")
            for name, values in variants.items():
                print(f"| {name} | {sum(values) / len(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
            write_json({"ablation": variants, "curve": args.ablate}, args.outfile)
            return 0
        if args.what_if:
            write_json(
                {"machine": cpu_name(), "threads": args.threads, "what_if": what_if(args)}, args.outfile
            )
            return 0
        if args.verify_curve:
            write_json({"machine": cpu_name(), "threads": args.threads, "curves": curves(args)}, args.outfile)
            return 0
        if args.study:
            write_json({"machine": cpu_name(), "threads": args.threads, "studies": study(args)}, args.outfile)
            return 0
        tasks = {Path(p).stem: read_prompts(p, args.limit) for p in args.prompts}
        table, models = runners(args)
        report = {"machine": cpu_name(), "threads": args.threads, "model": Path(args.model).name, "tasks": []}
        with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
            total = sum(map(len, tasks.values())) * len(args.temp) * len(table)
            job = progress.add_task("answers", total=total)
            for task, texts in tasks.items():
                prompts = [
                    models[0].tokenize(t.encode(), special=True)[: args.ctx - args.tokens - 1] for t in texts
                ]
                for temp in args.temp:
                    rows = bench_task(table, prompts, args.tokens, temp, lambda: progress.advance(job))
                    report["tasks"].append({"task": task, "temp": temp, "rows": rows})
                    progress.console.print(
                        markdown(f"{task}, temperature {temp:g}", rows), markup=False, soft_wrap=True
                    )
        if (peak := peak_memory_mb()) is not None:
            report["peak_memory_mb"] = peak
            print(f"peak memory of the process, with {len(models)} instances of the model: {peak:.0f} MB")
        for model in models:
            model.close()
        write_json(report, args.outfile)
    except (EntmtpError, ValueError, OSError) as e:
        print(f"entmtp.bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0
