"""`python -m entmtp.demo`: the whole path on the bundled model, in under a minute.

Converts a published-layout checkpoint, generates from three prompts with plain decoding, with every published tree and
with EntMTP, and checks that the text is the same each time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .common.errors import EntmtpError, UsageError
from .llama import Llama
from .measure.compare import Comparison, remark
from .measure.methods import CONFIDENCE, ENTMTP, PLAIN_LOOP, generic, published
from .measure.speed import sparkline
from .measure.turns import Answer, Answering, Prompt, answering, in_turn
from .models.assets import assets
from .models.gguf_expand import expand
from .options import DEMO, add_model_options, load

PROMPTS = {
    "code": 'import os\n\ndef read_lines(path):\n    """Return the lines of a file as a list of strings."""\n',
    "arithmetic": "Question: Tom has 12 boxes with 8 apples in each box. He sells 30 apples in the morning and half of "
    "the rest in the afternoon. How many apples are left?\nAnswer:",
    "story": "It was a cold and windy night when the carriage stopped before the old house, and",
}
ROUNDS = 3
PLAIN = PLAIN_LOOP.label


def show(console: Console, turns: list[dict[str, Answer]]) -> dict[str, dict[str, Any]]:
    """A table of the methods, and the entropy along the text; returns the rows by method."""
    found = Comparison(turns)
    rows = {label: found.row(label, PLAIN) for label in turns[0]}
    table = Table(title="", title_justify="left", header_style="bold")
    for column in ("method", "identical", "tokens/s", "vs plain", "tokens/step", "trees used"):
        table.add_column(
            column, justify="right" if column in ("tokens/s", "vs plain", "tokens/step") else "left"
        )
    for label, row in rows.items():
        stats = turns[-1][label].stats
        assert stats is not None
        table.add_row(
            label,
            "yes" if row["identical"] == row["answers"] else "[bold red]no[/]",
            f"{row['tokens_per_second'][0]:.0f}" if row["pairs"] else "–",
            f"{row['ratio'][0]:.2f}×" if row["pairs"] else "–",
            f"{stats.tokens_per_step:.2f}",
            " ".join(f"{name}:{count}" for name, count in stats.trees_used.items()),
        )
    console.print(table)
    if not rows[PLAIN]["pairs"]:
        console.print(remark(0, ROUNDS))
    plain = turns[-1][PLAIN].stats
    assert plain is not None
    entropy = plain.steps["entropy"]
    if len(entropy):
        console.print(f"entropy {sparkline(entropy)} {entropy.min():.2f} to {entropy.max():.2f} nats\n")
    return rows


def contestants(args: argparse.Namespace, stack: ExitStack) -> tuple[Llama, dict[str, Answering]]:
    """One model, and every method by label: plain decoding, the published and generic trees, and EntMTP's policies."""

    def loaded(**more: Any) -> Llama:
        # f32 keys and values, where passes of any size give the same
        return stack.enter_context(closing(load(args, type_k=0, type_v=0, **more)))

    llm = loaded()
    methods = [PLAIN_LOOP, *published(), *generic(llm.draft_heads.arch)]
    found = {m.label: answering(llm, m) for m in methods}
    # of their own: they learn this machine's costs from text to text
    found |= {m.label: answering(loaded(policy=m.policy)) for m in (ENTMTP, CONFIDENCE)}
    return llm, found


def run(args: argparse.Namespace, console: Console) -> bool:
    """The demo. Returns whether every method gave the same text."""
    from .convert import convert

    model = assets() / "demo-base-q8_0.gguf"
    checkpoint = assets() / args.heads
    with tempfile.TemporaryDirectory(prefix="entmtp-demo-") as folder, ExitStack() as stack:
        if not args.quantised:
            model = expand(model, Path(folder) / "demo-base-f32.gguf")
        heads = Path(folder) / f"{args.heads}.gguf"
        console.print(
            f"[bold]python -m entmtp.convert[/] {checkpoint.name}/ --base {model.name} --outfile {heads.name}"
        )
        convert(checkpoint, model, heads, outtype="q4_0", progress=console.is_terminal)
        files = {"model": str(model), "heads": str(heads)}
        llm, methods = contestants(argparse.Namespace(**(vars(args) | files)), stack)
        console.print(
            f"base {model.name}, {args.heads} heads, {llm.n_threads} threads, temperature {args.temp:g}, "
            f"{args.tokens} tokens\n"
        )
        same = True
        speedups: dict[str, list[str]] = {ENTMTP.label: [], CONFIDENCE.label: []}
        for kind, text in PROMPTS.items():
            prompt = Prompt(llm.tokenize(text.encode(), special=True), args.tokens, args.temp)
            turns = in_turn(methods, [prompt], ROUNDS)
            answer = llm.detokenize(turns[0][PLAIN].tokens).decode("utf-8", errors="replace")
            console.print(f"[bold]{kind}[/]")
            console.print(text, style="dim", markup=False, highlight=False, end="")
            console.print(answer, markup=False, highlight=False)
            rows = show(console, turns)
            same = same and all(row["identical"] == row["answers"] for row in rows.values())
            same = same and all(turn[PLAIN].tokens == turns[0][PLAIN].tokens for turn in turns)
            for label, found in speedups.items():
                found.append(f"{rows[label]['ratio'][0]:.2f}×" if rows[label]["pairs"] else "–")
    for label, found in speedups.items():
        console.print(f"{label} against plain decoding: {' '.join(found)}")
    console.print(f"every text identical: {'yes' if same else 'no'}")
    return same


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m entmtp.demo",
        description="Convert a bundled checkpoint and compare plain decoding, the published trees and EntMTP on it.",
        epilog="The base runs with its weights expanded to f32, where batches of any size give the same bits up to the "
        "order of a sum; --quantised runs the q8_0 file as it is, where a near-tie may fall the other way. "
        "entmtp bench run compares the same with a model of yours.",
        conflict_handler="resolve",
    )
    add_model_options(parser, drafting=False, ctx=1024, threads=os.cpu_count() or 1)
    parser.add_argument(
        "--heads", choices=("hydra", "medusa"), default="hydra", help="checkpoint (default: hydra)"
    )
    parser.add_argument("--tokens", type=int, default=96, help="tokens per text (default: 96)")
    parser.add_argument("--temp", type=float, default=0.0, help="temperature (default: 0, greedy)")
    parser.add_argument("--quantised", action="store_true", help="run the bundled q8_0 file as it is")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = setup_arg_parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        if args.model != DEMO:
            raise UsageError("the demo brings its own model; entmtp bench run compares methods with yours")
        same = run(args, console)
    except UsageError as e:
        print(f"entmtp.demo: {e}", file=sys.stderr)
        return 2
    except (EntmtpError, ValueError) as e:
        print(f"entmtp.demo: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not same:
        print("entmtp.demo: a method gave another text than plain decoding", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
