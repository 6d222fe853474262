"""`python -m entmtp.demo`: the whole path on the bundled model, in under a minute.

Converts a published-layout checkpoint, generates from three prompts with plain decoding, with every published tree and
with EntMTP, and checks that the text is the same each time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .llama import Llama
from .measure.methods import CONFIDENCE, ENTMTP, PLAIN_LOOP, Method, generic, published
from .measure.speed import sparkline
from .models.assets import assets
from .models.gguf_expand import expand
from .native.stats import DraftStats

PROMPTS = {
    "code": 'import os\n\ndef read_lines(path):\n    """Return the lines of a file as a list of strings."""\n',
    "arithmetic": "Question: Tom has 12 boxes with 8 apples in each box. He sells 30 apples in the morning and half of "
    "the rest in the afternoon. How many apples are left?\nAnswer:",
    "story": "It was a cold and windy night when the carriage stopped before the old house, and",
}


def generate(llm: Llama, prompt: str, n_tokens: int, temp: float) -> tuple[list[int], float]:
    """Tokens from a fresh start, and tokens per second from the first token on."""
    llm.reset()
    llm.reset_draft_stats()
    llm.set_seed(1234)
    tokens: list[int] = []
    start = 0.0
    for token in llm.generate(llm.tokenize(prompt.encode(), special=True), temp=temp):
        if not tokens:
            start = time.perf_counter()
        tokens.append(token)
        if token == llm.token_eos() or len(tokens) == n_tokens:
            break
    return tokens, (len(tokens) - 1) / max(time.perf_counter() - start, 1e-9)


def compare(
    methods: list[tuple[Method, Llama]], prompt: str, n_tokens: int, temp: float, n_rounds: int = 3
) -> list[dict[str, Any]]:
    """One row per method: tokens, median speed, statistics of the last round. The first method is the reference.

    Every round runs all methods, each time starting with another one: the speed of a machine drifts.
    """
    rows: list[dict[str, Any]] = [
        {"method": method.label, "speeds": [], "same": True} for method, _ in methods
    ]
    for i in range(n_rounds):
        for j in range(len(methods)):
            k = (j + i * len(methods) // n_rounds) % len(methods)
            method, llm = methods[k]
            if method not in (ENTMTP, CONFIDENCE):  # these keep what they learned
                method.apply(llm)
            generate(llm, prompt, 8, temp)  # builds graphs, wakes the threads
            tokens, speed = generate(llm, prompt, n_tokens, temp)
            rows[k]["same"] = rows[k]["same"] and tokens == rows[k].setdefault("tokens", tokens)
            rows[k]["speeds"].append(speed)
            rows[k]["stats"] = llm.draft_stats
    for row in rows:
        row["speed"] = statistics.median(row["speeds"])
        row["same"] = row["same"] and row["tokens"] == rows[0]["tokens"]
    return rows


def show(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """A table of the methods, and the entropy along the text."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for column in ("method", "identical", "tokens/s", "vs plain", "tokens/step", "trees used"):
        table.add_column(
            column, justify="right" if column in ("tokens/s", "vs plain", "tokens/step") else "left"
        )
    for row in rows:
        stats: DraftStats = row["stats"]
        used = " ".join(f"{name}:{count}" for name, count in stats.trees_used.items())
        table.add_row(
            row["method"],
            "yes" if row["same"] else "[bold red]no[/]",
            f"{row['speed']:.0f}",
            f"{row['speed'] / rows[0]['speed']:.2f}×",
            f"{stats.tokens_per_step:.2f}",
            used,
        )
    console.print(table)
    entropy = rows[0]["stats"].steps["entropy"]
    if len(entropy):
        console.print(f"entropy {sparkline(entropy)} {entropy.min():.2f} to {entropy.max():.2f} nats\n")


def run(arch: str, n_tokens: int, temp: float, n_threads: int, quantised: bool, console: Console) -> bool:
    """The demo. Returns whether every method gave the same text."""
    from .convert import convert

    model = assets() / "demo-base-q8_0.gguf"
    checkpoint = assets() / arch
    with tempfile.TemporaryDirectory(prefix="entmtp-demo-") as folder:
        if not quantised:
            model = expand(model, Path(folder) / "demo-base-f32.gguf")
        heads = Path(folder) / f"{arch}.gguf"
        console.print(
            f"[bold]python -m entmtp.convert[/] {checkpoint.name}/ --base {model.name} --outfile {heads.name}"
        )
        convert(checkpoint, model, heads, outtype="q4_0", progress=console.is_terminal)

        settings: dict[str, Any] = {
            "draft": "entmtp", "heads": heads, "n_ctx": 1024, "n_threads": n_threads, "n_threads_batch": n_threads,
            "type_k": 0, "type_v": 0, "verbose": False,
        }  # fmt: skip
        llm = Llama(model, **settings)
        # of their own: they learn this machine's costs from text to text
        adaptive = [(m, Llama(model, policy=m.policy, **settings)) for m in (ENTMTP, CONFIDENCE)]
        console.print(
            f"base {model.name}, {arch} heads, {n_threads} threads, temperature {temp:g}, {n_tokens} tokens\n"
        )
        methods = [(m, llm) for m in (PLAIN_LOOP, *published(), *generic(arch))] + adaptive
        same = True
        totals: dict[str, list[float]] = {}
        for kind, prompt in PROMPTS.items():
            rows = compare(methods, prompt, n_tokens, temp)
            text = llm.detokenize(rows[0]["tokens"]).decode("utf-8", errors="replace")
            console.print(f"[bold]{kind}[/]")
            console.print(prompt, style="dim", markup=False, highlight=False, end="")
            console.print(text, markup=False, highlight=False)
            show(console, "", rows)
            same = same and all(row["same"] for row in rows)
            for row in rows:
                totals.setdefault(row["method"], []).append(row["speed"] / rows[0]["speed"])
        llm.close()
        for _, model_of_its_own in adaptive:
            model_of_its_own.close()
    for method, _ in adaptive:
        speedup = " ".join(f"{x:.2f}×" for x in totals[method.label])
        console.print(f"{method.label} against plain decoding: {speedup}")
    console.print(f"every text identical: {'yes' if same else 'no'}")
    return same


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m entmtp.demo",
        description="Convert a bundled checkpoint and compare plain decoding, the published trees and EntMTP on it.",
        epilog="The base runs with its weights expanded to f32, where batches of any size give the same bits up to the "
        "order of a sum; --quantised runs the q8_0 file as it is, where a near-tie may fall the other way.",
    )
    parser.add_argument(
        "--heads", choices=("hydra", "medusa"), default="hydra", help="checkpoint (default: hydra)"
    )
    parser.add_argument("--tokens", type=int, default=96, help="tokens per text (default: 96)")
    parser.add_argument("--temp", type=float, default=0.0, help="temperature (default: 0, greedy)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all)")
    parser.add_argument("--quantised", action="store_true", help="run the bundled q8_0 file as it is")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = setup_arg_parser().parse_args(argv)
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        same = run(args.heads, args.tokens, args.temp, args.threads, args.quantised, console)
    except KeyboardInterrupt:
        return 130
    if not same:
        print("entmtp.demo: a method gave another text than plain decoding", file=sys.stderr)
        return 1
    return 0
