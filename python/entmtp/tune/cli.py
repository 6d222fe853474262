"""`entmtp tune`: the command, its progress and its tables."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .. import options
from ..bank.bank import Bank, dumps
from ..bank.tree import PLAIN
from ..common.atomic import atomic_path
from ..common.cache import cache_folder
from ..common.errors import EntmtpError
from ..common.files import check_output
from ..common.numbers import COUNT, SHARE, TEMPERATURE, number
from ..common.progress import stages
from ..common.prompts import FORMS, Question, read_questions
from ..common.streams import printable
from ..measure.judge import AUTO, AUTO_LEARNED
from ..measure.known import tuned_path
from ..measure.tuning import tune
from ..models.templates import fitting_tokens


def show_trees(console: Console, bank: Bank) -> None:
    """The trees of a bank, what they cost and accept."""
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


def show(console: Console, bank: Bank) -> None:
    """The bank and what it is worth, as tables."""
    if bank.acceptance is not None:
        show_trees(console, bank)
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
    console.print(gain(bank), end="")


def gain(bank: Bank) -> str:
    """What the learned acceptance model is worth on held-out prompts, in one sentence."""
    rows = bank.report["held_out"]["all"]
    if AUTO not in rows:
        return ""
    if AUTO_LEARNED not in rows:
        return "Acceptance model: weights fitted to these prompts gain nothing over the library's, which are kept.\n"
    before, after = rows[AUTO], rows[AUTO_LEARNED]
    old, new = (row["tokens_per_step"] for row in (before, after))
    faster = after["speed"] / before["speed"] - 1
    nothing = "" if faster > 0 else ": nothing is gained"
    tokens = f"{new:.3f} tokens/step with weights for the task, {old:.3f} with the library's"
    return f"Acceptance model: {tokens}; speed by replay {faster:+.1%}{nothing}\n"


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="entmtp tune",
        description="Tune trees and policies for a base model and its heads, your prompts, and this machine.",
        epilog="example: entmtp tune --model model.gguf --heads heads.gguf --prompts my.jsonl; Llama uses "
        "the result from then on. With -o bank.json it is written there instead: Llama(..., trees='bank.json'). "
        "entmtp tune --plot bank.json draws it.",
    )
    options.add_model_options(parser, drafting=False, model=None, ctx=2048)
    parser.add_argument(
        "--prompts", nargs="+", metavar="JSONL", help=f"files of prompts, one task each; a line has {FORMS}"
    )
    parser.add_argument(
        "--raw",
        action="store_true",
        help="prompts are text to go on with, also where the model has a chat template",
    )
    parser.add_argument(
        "-o",
        "--outfile",
        help="bank to write (JSON; default: where Llama finds it for this model and machine)",
    )
    parser.add_argument("--task", help="what the prompts are, kept in the bank")
    parser.add_argument("--name", help="name of the bank (default: the file's)")
    parser.add_argument("--limit", type=COUNT, help="use the first N prompts of each file only")
    parser.add_argument("--tokens", type=COUNT, default=128, help="tokens per rollout (default: 128)")
    parser.add_argument(
        "--temp", type=TEMPERATURE, nargs="+", default=[0.0, 0.8],
        help="temperatures you sample at (default: 0 and 0.8)",
    )  # fmt: skip
    parser.add_argument("--top-k", type=number(int, 0), default=40, help="as in Llama.generate (default: 40)")
    parser.add_argument("--top-p", type=SHARE, default=0.95, help="as in Llama.generate (default: 0.95)")
    parser.add_argument("--min-p", type=SHARE, default=0.05, help="as in Llama.generate (default: 0.05)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the rollouts and of the timings' tokens (default: 0)"
    )
    parser.add_argument(
        "--traces", metavar="FILE",
        help="file (not a folder) that keeps the rank traces: for another machine's costs (default: in the cache "
        "until the bank is written, so that a run that was stopped goes on)",
    )  # fmt: skip
    parser.add_argument(
        "--contexts", type=number(int, 0), nargs="+", default=[64, 512], help="depths to time passes at"
    )
    parser.add_argument(
        "--rounds", type=COUNT, default=12, help="how often each size is timed, times two (default: 12)"
    )
    parser.add_argument(
        "--sizes",
        type=COUNT,
        nargs="+",
        help="trees of these sizes, for a bank that serves other machines too",
    )
    parser.add_argument(
        "--plot", metavar="BANK", help="draw a tuned bank as PNG files beside it, and measure nothing"
    )
    return parser


def _kept(args: argparse.Namespace, questions: list[tuple[str, Question]]) -> Path | None:
    """Where this very command keeps its rollouts until its bank is written; None if the cache cannot hold them."""
    paths = [Path(p) for p in (args.model, args.heads) if p]
    files = [(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    asked = {k: v for k, v in vars(args).items() if k not in ("outfile", "name", "task", "plot")}
    facts = json.dumps([files, asked, questions], default=str, sort_keys=True)
    path = cache_folder() / "traces" / f"{hashlib.sha256(facts.encode()).hexdigest()[:20]}.npz"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return path if os.access(path.parent, os.W_OK) else None


def main(argv: list[str] | None = None) -> int:
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        if args.plot:
            from ..report.plots import of_file, plot_bank

            with of_file(Path(args.plot)):
                drawn = plot_bank(Bank.load(args.plot), Path(args.plot))
            for path in drawn:
                print(f"wrote {path}")
            return 0
        if not (args.model and args.prompts):
            parser.error("--model and --prompts are needed, or --plot")
        questions = [(Path(p).stem, q) for p in args.prompts for q in read_questions(p, args.limit)]
        name = args.name or (Path(args.outfile).stem if args.outfile else "tuned")
        model, heads = options.model_files(args)
        if args.outfile:
            Path(args.outfile).parent.mkdir(parents=True, exist_ok=True)
        check_output(args.outfile, [model, heads, args.traces, *args.prompts])
        args.model, args.heads = str(model), str(heads) if heads else None
        kept = args.traces or _kept(args, questions)
        with contextlib.closing(options.load(args, policy="off")) as llm, stages() as advance:
            drafters = [name for name in llm.drafters if name != "model"]  # which no replay can ask
            room = llm.n_ctx() - args.tokens - 1
            prompts = [(task, fitting_tokens(llm, q, room, args.raw)) for task, q in questions]
            bank = tune(
                llm, prompts, name=name, task=args.task, temps=args.temp, n_tokens=args.tokens, seed=args.seed,
                traces=kept, contexts=args.contexts, n_rounds=args.rounds, sizes=args.sizes, progress=advance,
                drafters=drafters,
                sampling={"top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p},
            )  # fmt: skip
        costs = bank.need_costs()
        out = Path(args.outfile) if args.outfile else tuned_path(costs.key)
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(out) as temporary:
            temporary.write_text(dumps(bank), "utf-8")
        if kept and not args.traces:
            Path(kept).unlink(missing_ok=True)
    except (EntmtpError, ValueError, OSError) as e:
        print(f"entmtp.tune: {printable(str(e))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "entmtp.tune: interrupted, no bank was written; the same command goes on from the rollouts done so far",
            file=sys.stderr,
        )
        return 130
    show(console, bank)
    print(f"wrote {out}" + ("" if args.outfile else ": Llama uses it for this model from now on"))
    return 0
