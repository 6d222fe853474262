"""`entmtp bench heads`: what smaller heads cost and bring.

Every checkpoint is converted in every form (full, with a draft vocabulary, sharing the base model's projection, both)
and type. Of each file: its size, the time of a draft by depth, tokens per step on held-out prompts by replay (a chain
of all heads, and the tree that is fastest here), and the speed of EntMTP against plain decoding, in turn.
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..bank import PLAIN, Bank, Costs, Tree
from ..common.errors import EntmtpError, UsageError
from ..common.machine import cpu_name
from ..common.progress import stages
from ..convert import convert
from ..convert.draft_vocab import make_vocab
from ..llama import Llama
from ..measure import search
from ..measure.at_load import is_steady
from ..measure.compare import Comparison, remark
from ..measure.fitting import fit
from ..measure.rollouts import record
from ..measure.timing import measure, measure_rest
from ..measure.turns import Advance, Prompt, answering, in_turn
from ..models.base import read_base
from ..options import load
from ..report.tables import Form, cell, table
from .inputs import changed, flat, load_plain, model_of
from .questions import asked_of, read_tasks

TYPES = ("f16", "q8_0", "q4_0", "q4_k")
# form of the heads: with a draft vocabulary, sharing the base's projection
FORMS = {
    "full": (False, False),
    "vocab": (True, False),
    "shared": (False, True),
    "shared+vocab": (True, True),
}
SIZES = (1, 2, 3, 4, 6, 8, 12, 16)  # passes that are timed


def checkpoints(names: Sequence[str], forms: Sequence[str]) -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, folder, forms) of each `[NAME[:FORM,FORM]=]FOLDER`.

    Raises:
        UsageError: a form that is none, or a name that comes twice.
    """
    found = []
    for text in names:
        head, sep, folder = text.rpartition("=")
        name, _, own = head.partition(":")
        wanted = tuple(own.split(",")) if own else tuple(forms)
        if unknown := [f for f in wanted if f not in FORMS]:
            raise UsageError(f"{text}: there is no form {unknown[0]!r}; forms are {', '.join(FORMS)}")
        found.append((name if sep else Path(folder).name, folder, wanted))
    if len({name for name, _, _ in found}) < len(found):
        raise UsageError("two checkpoints have the same name; name them: NAME=FOLDER")
    return found


def time_drafts(llm: Llama, curve: Costs | None, n_rounds: int) -> Costs:
    """Costs of this variant. The base's passes are the same for all of them: measured once, with the first."""
    if curve is None:
        first = measure_rest(llm, measure(llm, SIZES, (64, 256), n_rounds), temp=0.0)
        if not is_steady(first):
            print("note: timings differ widely; trees and speeds want a quiet machine", file=sys.stderr)
        return first
    own = measure(llm, (1, 2), (64,), n_rounds)
    return replace(curve, chain=own.chain, level=own.level, key=own.key)


def measured(
    args: Namespace, plain: Llama, llm: Llama, costs: Costs, prompts: Sequence[tuple[str, list[int]]], advance: Advance
) -> dict[str, Any]:  # fmt: skip
    """Of one heads file: memory that it takes besides the base's, µs of a draft by depth; by replay tokens per step of
    a chain of all heads, the fastest tree and its figures; and a row of speeds side by side.

    Args:
        prompts: (task, tokens) pairs; every other one fits the trees, and the rest is held out.

    Raises:
        EntmtpError: a text with heads is another than without.
    """
    llm.set_trees(Bank("off", (PLAIN,)), policy="off")
    fitted, held_out = record(llm, prompts, temps=args.temp, n_tokens=args.tokens).split()
    tree = search.best_single(fitted, costs)
    deep = Tree.from_paths("chain", [[0] * (d + 1) for d in range(llm.draft_heads.n_heads)])
    best, chain, none = (search.static(held_out, t, costs) for t in (tree, deep, PLAIN))
    llm.set_trees(fit(fitted, costs), policy="entropy")
    held = sorted(set(held_out.prompt))
    asked = [Prompt(prompts[i][1], args.tokens, temp, seed=i) for i in held for temp in args.temp]
    found = Comparison(in_turn({"plain": answering(plain), "EntMTP": answering(llm)}, asked, 1, advance))
    for prompt, turn in zip(asked, found.turns, strict=True):
        if turn["plain"].tokens != turn["EntMTP"].tokens:
            where = f"prompt {prompt.seed + 1}, temperature {prompt.temp:g}"
            raise EntmtpError(f"{where}: the text with heads is another than without")
    alone, live = (found.row(label, "plain") for label in ("plain", "EntMTP"))
    row = live | dict(
        zip(("speedup", "speedup_low", "speedup_high"), live["ratio"] or [None] * 3, strict=True)
    )
    for name, of in {"tokens_per_second": live, "plain_tokens_per_second": alone}.items():
        row[name] = of["tokens_per_second"] and of["tokens_per_second"][0]
    return row | {
        "memory": int(llm.draft_heads.info.n_bytes), "draft_us": [round(us, 1) for us in costs.chain[1:]],
        "chain": round(chain.tokens_per_step, 3), "tree": [list(p) for p in tree.paths],
        "tokens_per_step": round(best.tokens_per_step, 3), "predicted": round(none.us_total / best.us_total, 3),
    }  # fmt: skip


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The study as a table."""
    depth = max(len(r["draft_us"]) for r in rows)
    columns: dict[str, Form] = {
        "checkpoint": "{checkpoint}", "heads": "{form}", "type": "{type}",
        "fastest tree": lambda r: search.name(Tree.from_paths("", r["tree"])),
        "MB": lambda r: f"{r['bytes'] / 1e6:.2f}",
        "draft of 1, µs": "{draft_us[0]:.0f}", f"of {depth}, µs": lambda r: f"{r['draft_us'][-1]:.0f}",
        f"chain of {depth}, tokens/step": "{chain:.2f}", "the tree's": "{tokens_per_step:.2f}",
        "by replay, × plain": "{predicted:.2f}", "EntMTP, × plain": "{ratio:.2f}", "overall": "{overall:.2f}",
        "tokens/s": "{tokens_per_second:.0f}", "plain": "{plain_tokens_per_second:.0f}",
    }  # fmt: skip
    return table(columns, rows, n_text=4) + remark(rows)


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    if args.heads:
        raise UsageError("heads come from the checkpoints, so --heads has no place here")
    found = checkpoints(args.checkpoints, args.forms)
    variants = [
        (name, path, f, kind) for name, path, forms in found for f in forms for kind in flat(args.types)
    ]
    tasks = read_tasks(args)
    rows: list[dict[str, Any]] = []
    costs: Costs | None = None
    with ExitStack() as stack:
        args = stack.enter_context(model_of(args, args.model, drafts=False))
        file = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="entmtp-heads-"))) / "heads.gguf"
        plain = stack.enter_context(closing(load_plain(args)))
        prompts = asked_of(plain, tasks, args)
        vocab = make_vocab(read_base(Path(args.model)), args.heads_vocab, args.draft_text)
        for name, path, form, kind in variants:
            small, shared = FORMS[form]
            tokens = vocab.tokens.tolist() if small else None
            convert(path, args.model, file, kind, progress=False, share_lm_head=shared, draft_vocab=tokens)
            with closing(load(changed(args, heads=str(file)), policy="off")) as llm, stages() as advance:
                own = time_drafts(llm, costs, args.rounds)
                costs = costs or own
                row = {"checkpoint": name, "form": form, "type": kind, "bytes": file.stat().st_size}
                rows.append(row | measured(args, plain, llm, own, prompts, advance))
            done = cell("{form} {type}: {tokens_per_step:.2f} tokens/step, {speedup:.2f}x plain", rows[-1])
            print(f"{len(rows)}/{len(variants)} {name} {done}", file=sys.stderr)
    report |= {
        "heads": rows, "threads": plain.n_threads, "model": Path(args.model).name,
        "device": f"{cpu_name()}, {plain.n_threads} threads",
        "draft_vocab": {"size": len(vocab.tokens), "coverage": vocab.coverage, "source": vocab.source},
        "prompts": [Path(f).name for f in args.prompts], "tokens": args.tokens, "temps": args.temp,
    }  # fmt: skip
    words = f"{len(vocab.tokens)} tokens by {vocab.source}, {vocab.coverage:.1%} of unseen text"
    yield f"{markdown(rows)}\nDraft vocabulary: {words}.\n"
