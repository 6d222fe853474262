"""`entmtp demo`: a small chat model answers three questions, and every method is timed on the same answers.

The model is SmolLM2-135M-Instruct, fetched once; without a network it is the bundled toy.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .bank import Bank
from .common.errors import EntmtpError, UsageError
from .common.numbers import COUNT, TEMPERATURE
from .common.streams import printable, run_command
from .llama import Llama
from .measure.compare import Comparison
from .measure.methods import ENTMTP, HEADS_ALONE, PLAIN_LOOP, TEXT_ALONE, generic, published
from .measure.speed import sparkline
from .measure.stock import LOOKUP, STOCK, stock
from .measure.turns import Answer, Answering, Prompt, answering, in_turn
from .models.templates import conversation_tokens
from .native import kernels
from .native.abi import SOURCES
from .options import AUTO, DEMO, add_model_options, first_model, load, model_files
from .options.model import note

QUESTIONS = {
    "smollm2": (
        "What is the capital of France, and what is it known for?",
        "Write a Python function that returns the sum of the even numbers in a list.",
        "What are three good habits for staying healthy?",
    ),
    DEMO: (
        "Tom has 12 boxes with 8 apples in each box. He sells 30 apples in the morning. How many apples are left?",
        "Anna reads 15 pages a day for 4 days. How many pages has she read?",
        "A farmer has 3 fields with 24 cows each. He sells 12 cows. How many cows has he now?",
    ),
}
COLOURS = {"text": "cyan", "recycling": "blue", "heads": "green", "model": "magenta"}  # as in the chat
GUESSES = 2  # of llama-cpp-python's prompt lookup; its default of 10 is slower here


def pieces(llm: Llama, answer: Iterator[tuple[int, int]]) -> Iterator[tuple[str, int]]:
    """Text and who drafted it, as whole characters, from tokens and who drafted them."""
    held, who = b"", 0
    for token, drafters in answer:
        who = who if held else drafters
        held += llm.detokenize([token])
        try:
            text = held.decode()
        except UnicodeDecodeError:
            continue
        held = b""
        yield text, who


def stream(console: Console, llm: Llama, tokens: list[int], n: int, temp: float) -> None:
    """Show an answer as it comes, every token in the colour of who guessed it."""
    told: list[tuple[int, int]] = []
    llm.on_token = lambda token, drafters: told.append((token, drafters))

    def drawn() -> Iterator[tuple[int, int]]:
        llm.set_seed(1234)
        for i, token in enumerate(llm.generate(tokens, temp=temp), 1):
            if token == llm.token_eos():
                return
            yield told[-1]
            if i == n:
                return

    llm.reset()
    for text, drafters in pieces(llm, drawn()):
        first = next((name for name, bit in SOURCES.items() if drafters & bit), "")
        console.print(Text(printable(text), style=COLOURS.get(first, "")), end="")
    llm.on_token = None
    console.print()


def contestants(args: argparse.Namespace, stack: ExitStack) -> tuple[Llama, dict[str, Answering]]:
    """The model that drafts with all it has, and every method by label, llama-cpp-python first."""

    def loaded(**more: Any) -> Llama:
        return stack.enter_context(closing(load(args, **more)))

    llm = loaded()
    own = kernels.current()
    static = loaded(policy="off")
    found: dict[str, Answering] = {}
    (lookup,) = [label for label, n in LOOKUP.items() if n == GUESSES]
    for label, n in {STOCK: 0, lookup: GUESSES}.items():
        found[label] = answering(stack.enter_context(closing(stock(static, n))), kernels=kernels.OFF)
    found[PLAIN_LOOP.label] = answering(static, PLAIN_LOOP, own)
    if llm.heads_path:
        (tree,) = [m for m in published() if m.label == "mc_sim_7b_63"]
        (small,) = [m for m in generic(llm.draft_heads.arch) if m.tree == "n4"]
        found[f"published tree of {Bank.load(tree.label).trees[1].n_nodes} nodes"] = answering(
            static, tree, own
        )
        found["fixed tree of 4 nodes"] = answering(static, small, own)
        for method in (TEXT_ALONE, HEADS_ALONE):
            found[method.label] = answering(loaded(drafters=method.drafters), kernels=own)
    found[ENTMTP.label] = answering(llm, kernels=own)
    return llm, found


def show(console: Console, turns: list[dict[str, Answer]]) -> bool:
    """One table of all methods over all answers. Returns whether our texts are all plain decoding's."""
    found = Comparison(turns)
    table = Table(header_style="bold")
    for column in ("method", "tokens/s", f"against {STOCK}", "against plain", "tokens/pass", "same text"):
        table.add_column(column, justify="left" if column == "method" else "right")
    same = True
    for label in turns[0]:
        row, base = found.row(label, STOCK), found.row(label, PLAIN_LOOP.label)
        loop = STOCK if label in LOOKUP else PLAIN_LOOP.label if label != STOCK else STOCK
        identical = found.identical(label, loop)
        same = same and (label in LOOKUP or identical == row["answers"])
        table.add_row(
            label,
            f"{row['tokens_per_second_overall']:.0f}",
            f"{row['overall']:.2f}×",
            f"{base['overall']:.2f}×",
            f"{row.get('tokens_per_step', 1.0):.2f}" if label not in (STOCK, *LOOKUP) else "",
            f"{identical}/{row['answers']}",
            style="bold" if label == ENTMTP.label else "",
        )
    console.print(table)
    return same


def run(args: argparse.Namespace, console: Console) -> bool:
    """The demo. Returns whether every method gave the text of plain decoding."""
    name = first_model(note) if args.model == AUTO else args.model
    questions = QUESTIONS.get(name, QUESTIONS["smollm2"])
    model, heads = model_files(argparse.Namespace(**(vars(args) | {"model": name})))
    files = {"model": str(model), "heads": str(heads) if heads else None}
    with ExitStack() as stack:
        llm, methods = contestants(argparse.Namespace(**(vars(args) | files)), stack)
        drafts = ", ".join(f"[{COLOURS[who]}]{who}[/]" for who in llm.drafters)
        console.print(
            f"{model.name}, {f'heads {heads.name}' if heads else 'no heads'}, {llm.n_threads} threads, temperature "
            f"{args.temp:g}\nguessed from: {drafts}; the rest by the model alone\n",
            highlight=False,
        )
        prompts = []
        for question in questions:
            tokens = conversation_tokens(llm, [{"role": "user", "content": question}])
            prompts.append(Prompt(tokens, args.tokens, args.temp))
            console.print(f"[bold]> {question}[/]", highlight=False)
            llm.reset_draft_stats()
            stream(console, llm, tokens, args.tokens, args.temp)
            stats = llm.draft_stats
            entropy = stats.steps["entropy"]
            console.print(f"[dim]{stats}[/]", highlight=False)
            console.print(
                f"[dim]entropy {sparkline(entropy)} {entropy.min():.1f} to {entropy.max():.1f} nats[/]\n",
                highlight=False,
            )
        same = show(console, in_turn(methods, prompts))
    console.print(f"every text of ours is plain decoding's: {'yes' if same else '[bold red]no[/]'}")
    return same


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="entmtp demo",
        description="A small chat model answers three questions; then every method answers them in turn and is timed: "
        "llama-cpp-python, its prompt lookup, our plain loop, fixed trees, and EntMTP.",
        epilog="entmtp bench run compares the same on a model and prompts of yours.",
        conflict_handler="resolve",
    )
    add_model_options(parser, drafting=False, ctx=1024)
    parser.add_argument("--tokens", type=COUNT, default=96, help="tokens per answer (default: 96)")
    parser.add_argument("--temp", type=TEMPERATURE, default=0.0, help="temperature (default: 0, greedy)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = setup_arg_parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        same = run(args, console)
    except (EntmtpError, ValueError, OSError) as e:
        print(f"entmtp.demo: {printable(str(e))}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    if not same:
        print("entmtp.demo: a method gave another text than plain decoding", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
