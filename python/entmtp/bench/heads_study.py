"""`python -m entmtp.heads_study`: what smaller heads cost and bring.

Every checkpoint is converted in every form (full, with a draft vocabulary, sharing the base model's projection, both)
and type. Of each file: its size, what a draft takes by depth, how many tokens a step brings on held-out prompts (rank
traces and replay: a chain of all heads, and the tree that is fastest here), and the speed of EntMTP against plain
decoding, in turn in one process.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from ..bank.bank import Bank
from ..bank.costs import Costs
from ..bank.traces import Traces
from ..bank.tree import PLAIN, Tree
from ..common.atomic import atomic_path
from ..common.errors import ConvertError, EntmtpError
from ..common.machine import cpu_name, usable_cpus
from ..common.prompts import read_prompts
from ..convert import convert
from ..convert.draft_vocab import make_vocab
from ..llama import Llama
from ..measure import search
from ..measure.at_load import is_steady
from ..measure.fitting import fit
from ..measure.rollouts import record
from ..measure.timing import measure, measure_rest
from ..models.assets import assets
from ..models.base import read_base

TYPES = ("f16", "q8_0", "q4_0", "q4_k")
# form of the heads: with a draft vocabulary, sharing the base's projection
FORMS = {
    "full": (False, False), "vocab": (True, False), "shared": (False, True), "shared+vocab": (True, True),
}  # fmt: skip
LEAST = 8  # tokens: texts that end sooner tell nothing of speed
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)  # passes that are timed


@dataclass(frozen=True)
class Variant:
    """One heads file of the study."""

    checkpoint: str  # its name
    folder: str
    form: str
    type: str

    def convert(self, base: Path, vocab: Sequence[int], out: Path) -> int:
        """Write the heads file; its size in bytes. Notes go to stderr."""
        small, shared = FORMS[self.form]
        convert(
            self.folder, base, out, self.type, progress=False, draft_vocab=vocab if small else None,
            share_lm_head=shared,
        )  # fmt: skip
        return out.stat().st_size


@dataclass
class Row:
    """What was measured of a variant. Times in microseconds, medians."""

    checkpoint: str
    form: str
    type: str
    bytes: int
    memory: int  # bytes that the heads hold besides the base model's
    draft_us: list[float]  # of a chain of 1, 2, .. heads, in one graph
    chain: float  # tokens per step of the chain of all heads, by replay
    tree: list[list[int]]  # the fastest tree
    tokens_per_step: float  # of that tree, by replay
    predicted: float  # its speed against plain decoding, by replay
    speedup: float  # of EntMTP against plain decoding, median over prompts
    speedup_low: float  # quartiles
    speedup_high: float
    tokens_per_second: float
    plain_tokens_per_second: float


def checkpoints(names: Sequence[str], forms: Sequence[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, folder, forms) of each `[NAME[:FORM,FORM]=]FOLDER`.

    Raises:
        ValueError: a form that is none, or a name that comes twice.
    """
    found = []
    for text in names:
        head, sep, folder = text.rpartition("=")
        name, _, own = head.partition(":")
        wanted = tuple(own.split(",")) if own else tuple(forms)
        if unknown := [f for f in wanted if f not in FORMS]:
            raise ValueError(f"{text}: there is no form {unknown[0]!r}; forms are {', '.join(FORMS)}")
        found.append((name if sep else Path(folder).name, folder, wanted))
    if len({name for name, _, _ in found}) < len(found):
        raise ValueError("two checkpoints have the same name; name them: NAME=FOLDER")
    return found


def chain_of(n_heads: int) -> Tree:
    return Tree.from_paths("chain", [[0] * (d + 1) for d in range(n_heads)])


def time_drafts(llm: Llama, curve: Costs | None, n_rounds: int) -> Costs:
    """Costs of this variant. The base's passes are the same for all of them: measured once, with the first."""
    if curve is None:
        return measure_rest(llm, measure(llm, SIZES, (64, 256), n_rounds), temp=0.0)
    own = measure(llm, (1, 2), (64,), n_rounds)
    return replace(curve, chain=own.chain, level=own.level, key=own.key)


def in_turn(
    plain: Llama, llm: Llama, prompts: Sequence[str], n_tokens: int, temps: Sequence[float]
) -> list[tuple[float, float]]:
    """(plain, EntMTP) tokens per second for each prompt and temperature, one after the other.

    Raises:
        EntmtpError: the two texts differ.
    """
    speeds = []
    for i, text in enumerate(prompts):
        prompt = llm.tokenize(text.encode(), add_bos=True, special=True)[: llm.n_ctx() - n_tokens - 1]
        for j, temp in enumerate(temps):
            pair: dict[int, tuple[float, list[int]]] = {}
            for k in (0, 1) if (i + j) % 2 == 0 else (1, 0):
                pair[k] = _decode((plain, llm)[k], prompt, n_tokens, temp, seed=i)
            if pair[0][1] != pair[1][1]:
                raise EntmtpError(
                    f"prompt {i + 1}, temperature {temp:g}: the text with heads is another than without"
                )
            if len(pair[0][1]) >= LEAST:
                speeds.append((pair[0][0], pair[1][0]))
    return speeds


def _decode(llm: Llama, prompt: list[int], n_tokens: int, temp: float, seed: int) -> tuple[float, list[int]]:
    llm.reset()
    llm.set_seed(seed)
    tokens: list[int] = []
    start = 0.0
    for token in llm.generate(prompt, temp=temp):
        start = start or time.perf_counter()
        tokens.append(token)
        if len(tokens) == n_tokens or token == llm.token_eos():
            break
    return (len(tokens) - 1) / max(time.perf_counter() - start, 1e-9), tokens


def study(
    variants: Sequence[Variant],
    model: Path,
    prompts: Sequence[tuple[str, str]],
    vocab: Sequence[int],
    *,
    n_tokens: int = 128,
    temps: Sequence[float] = (0.0, 0.8),
    n_rounds: int = 8,
    n_threads: int = 1,
    **settings: Any,
) -> Iterator[Row]:
    """One row per variant, as they are measured.

    Args:
        prompts: (task, text) pairs; every other one fits the trees, and the rest is held out.
        vocab: base tokens of the draft vocabulary.
        n_rounds: how often drafts and passes are timed.

    Raises:
        ConvertError, EntmtpError, ValueError: a checkpoint, model or prompts that cannot be used.
    """
    settings = {
        "n_ctx": 1024, "n_threads": n_threads, "n_threads_batch": n_threads, "verbose": False, **settings
    }  # fmt: skip
    costs: Costs | None = None
    with (
        tempfile.TemporaryDirectory(prefix="entmtp-heads-") as folder,
        closing(Llama(model, **settings)) as plain,
    ):
        for variant in variants:
            heads = Path(folder) / "heads.gguf"
            size = variant.convert(model, vocab, heads)
            with closing(Llama(model, draft="entmtp", heads=heads, policy="off", **settings)) as llm:
                own = time_drafts(llm, costs, n_rounds)
                if costs is None and not is_steady(own):
                    print(
                        "note: timings differ widely; trees and speeds want a quiet machine", file=sys.stderr
                    )
                costs = costs or own
                llm.set_trees(Bank("off", (PLAIN,)), policy="off")
                fitted, held_out = record(llm, prompts, temps=temps, n_tokens=n_tokens).split()
                if not len(held_out.n_tokens):
                    raise ValueError(
                        "too few prompts: at least two are needed, one to fit trees to, one to judge"
                    )
                yield _row(variant, size, plain, llm, own, fitted, held_out, prompts, n_tokens, temps)


def _row(
    variant: Variant,
    size: int,
    plain: Llama,
    llm: Llama,
    costs: Costs,
    fitted: Traces,
    held_out: Traces,
    prompts: Sequence[tuple[str, str]],
    n_tokens: int,
    temps: Sequence[float],
) -> Row:
    tree = search.best_single(fitted, costs)
    best = search.static(held_out, tree, costs)
    chain = search.static(held_out, chain_of(llm.draft_heads.n_heads), costs)
    llm.set_trees(fit(fitted, costs), policy="entropy")
    texts = [prompts[i][1] for i in sorted(set(held_out.prompt))]
    in_turn(plain, llm, texts[:1], n_tokens, temps[:1])  # builds graphs
    speeds = np.array(in_turn(plain, llm, texts, n_tokens, temps))
    low, mid, high = np.percentile(speeds[:, 1] / speeds[:, 0], [25, 50, 75])
    return Row(
        variant.checkpoint, variant.form, variant.type, size, int(llm.draft_heads.info.n_bytes),
        [round(us, 1) for us in costs.chain[1:]], round(chain.tokens_per_step, 3), [list(p) for p in tree.paths],
        round(best.tokens_per_step, 3), round(search.static(held_out, PLAIN, costs).us_total / best.us_total, 3),
        round(float(mid), 3), round(float(low), 3), round(float(high), 3),
        round(float(np.median(speeds[:, 1])), 1), round(float(np.median(speeds[:, 0])), 1),
    )  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The study as a table."""
    depth = max(len(r.draft_us) for r in rows)
    lines = [
        f"| checkpoint | heads | type | MB | draft of 1, µs | of {depth}, µs | chain of {depth}, tokens/step "
        "| fastest tree | its tokens/step | by replay, × plain | EntMTP, × plain | tokens/s |",
        "| --- | --- | --- | --: | --: | --: | --: | --- | --: | --: | --: | --: |",
    ]
    for r in rows:
        name = search.name(Tree.from_paths("", r.tree)) if r.tree else "plain"
        lines.append(
            f"| {r.checkpoint} | {r.form} | {r.type} | {r.bytes / 1e6:.2f} | {r.draft_us[0]:.0f} "
            f"| {r.draft_us[-1]:.0f} | {r.chain:.2f} | {name} | {r.tokens_per_step:.2f} | {r.predicted:.2f} "
            f"| {r.speedup:.2f} ({r.speedup_low:.2f} to {r.speedup_high:.2f}) | {r.tokens_per_second:.0f} |"
        )
    return "\n".join(lines)


def write(report: dict[str, Any], rows: Sequence[Row], path: Path) -> list[Path]:
    """The report as JSON, its table, and its picture if matplotlib is there: FILE.json, FILE.md, FILE.png."""
    written = [path, path.with_suffix(".md")]
    with atomic_path(written[0]) as temporary:
        temporary.write_text(json.dumps(report, indent=1) + "\n", "utf-8")
    with atomic_path(written[1]) as temporary:
        temporary.write_text(markdown(rows) + "\n", "utf-8")
    try:
        from ..report.plots import plot_heads

        written.append(plot_heads(report, path.with_suffix(".png")))
    except ValueError as e:
        print(f"note: {e}", file=sys.stderr)
    return written


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m entmtp.heads_study",
        description="Compare heads of several forms and types: size, draft time, acceptance, tokens per second.",
        epilog="""examples:
  python -m entmtp.heads_study ./hydra --model model.gguf --prompts code.jsonl prose.jsonl -o study.json
  # heads that were trained to share the base's projection, beside heads with their own
  python -m entmtp.heads_study own:full,vocab=./hydra tied:shared,shared+vocab=./hydra-shared --model model.gguf \\
      --prompts my.jsonl -o study.json""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="[NAME[:FORM,..]=]FOLDER",
        help="checkpoint as for entmtp.convert; forms of its own in place of --forms",
    )
    parser.add_argument("--model", metavar="BASE.gguf", help="base model (default: the bundled demo's)")
    parser.add_argument(
        "--prompts", nargs="+", required=True, metavar="FILE.jsonl", help="prompts; half are held out"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="prompts of each file")
    parser.add_argument(
        "--forms", nargs="+", choices=FORMS, default=list(FORMS), help="forms of the heads (default: all)"
    )
    parser.add_argument("--types", nargs="+", default=list(TYPES), help=f"types (default: {' '.join(TYPES)})")
    parser.add_argument("--draft-vocab", type=int, default=1024, metavar="N", help="its size (default: 1024)")
    parser.add_argument(
        "--draft-text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="text to choose it by (default: the base's own)",
    )
    parser.add_argument("--tokens", type=int, default=128, help="tokens per text (default: 128)")
    parser.add_argument(
        "--temps", nargs="+", type=float, default=[0.0, 0.8], help="temperatures (default: 0 0.8)"
    )
    parser.add_argument("--rounds", type=int, default=8, help="times that drafts are timed (default: 8)")
    parser.add_argument("--threads", type=int, default=usable_cpus(), help="CPU threads (default: all)")
    parser.add_argument("-o", "--output", metavar="FILE.json", help="write FILE.json, FILE.md and FILE.png")
    return parser


def main(argv: list[str] | None = None) -> int:
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    try:
        found = checkpoints(args.checkpoints, args.forms)
    except ValueError as e:
        parser.error(str(e))
    model = Path(args.model) if args.model else assets() / "demo-base-q8_0.gguf"
    variants = [
        Variant(name, folder, form, kind)
        for name, folder, forms in found
        for form in forms
        for kind in args.types
    ]
    console = Console(stderr=True)
    rows: list[Row] = []
    try:
        prompts = [(Path(f).stem, p) for f in args.prompts for p in read_prompts(f, args.limit)]
        vocab = make_vocab(read_base(model), args.draft_vocab, args.draft_text)
        console.print(
            f"draft vocabulary: {len(vocab.tokens)} tokens by {vocab.source}, {vocab.coverage:.1%} of unseen text"
        )
        for row in study(
            variants, model, prompts, vocab.tokens.tolist(), n_tokens=args.tokens, temps=args.temps,
            n_rounds=args.rounds, n_threads=args.threads,
        ):  # fmt: skip
            rows.append(row)
            console.print(
                f"{len(rows)}/{len(variants)} {row.checkpoint} {row.form} {row.type}: {row.tokens_per_step:.2f} "
                f"tokens/step, {row.speedup:.2f}x plain"
            )
        print(markdown(rows))
        if args.output:
            report = {
                "heads": [asdict(row) for row in rows],
                "model": model.name, "device": f"{cpu_name()}, {args.threads} threads",
                "draft_vocab": {"size": len(vocab.tokens), "coverage": vocab.coverage, "source": vocab.source},
                "prompts": [Path(f).name for f in args.prompts], "tokens": args.tokens, "temps": args.temps,
            }  # fmt: skip
            for path in write(report, rows, Path(args.output)):
                print(f"wrote {path}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except (ConvertError, EntmtpError, OSError, ValueError) as e:
        print(f"entmtp.heads_study: {e}", file=sys.stderr)
        return 1
    return 0
