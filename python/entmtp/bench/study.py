"""`entmtp bench study`: is it worth it? Tuned policies against plain decoding, the published tree and the best single
tree, live and by replay.

For one base, one heads file and one temperature: tune on half of the prompts, then answer the other half with every
method in turn. Beside what was measured stand replay's prediction, and the oracle that knows the future.
"""

from __future__ import annotations

import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ..bank import PLAIN, Bank, Costs, Traces, Tree, dumps
from ..common.atomic import atomic_path
from ..common.errors import UsageError
from ..common.progress import stages
from ..common.prompts import Question
from ..measure.compare import Comparison, remark
from ..measure.judge import AUTO, AUTO_LEARNED
from ..measure.methods import ENTMTP
from ..measure.tuning import tune
from ..measure.turns import Advance, Answer, Prompt, answering, in_turn
from ..options import load
from ..report.tables import Form, cell, table
from .inputs import changed, load_plain, model_of
from .questions import asked_of, read_tasks

PLAIN_LABEL, SINGLE, PUBLISHED_TREE = "plain", "best single tree", "published 63-node tree"
ENTROPY, CONFIDENCE = "EntMTP, entropy", "EntMTP, confidence"
UNTUNED, USELESS = "EntMTP, untuned", "EntMTP, useless heads"
REPLAYED = (PLAIN_LABEL, PUBLISHED_TREE, SINGLE, ENTROPY, CONFIDENCE, ENTMTP.label)
METHODS = (*REPLAYED, UNTUNED, USELESS)


def make_useless(heads: str | Path, target: Path) -> Path:
    """A copy of a heads file whose heads are sure of the wrong tokens: their vocabulary is rolled by a third."""
    shutil.copyfile(heads, target)
    reader = gguf.GGUFReader(target, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith(".output.weight"):
            tensor.data[:] = np.roll(tensor.data, len(tensor.data) // 3, axis=0)
    reader.data.flush()
    return target


def answers(
    args: Namespace, bank: Bank, held_out: Traces, prompts: Sequence[list[int]], temp: float, folder: Path,
    advance: Advance,
) -> list[tuple[str, dict[str, Answer]]]:  # fmt: skip
    """Answers of all methods to the held-out ones of all prompts, with their tasks."""
    single = Tree("single", tuple(tuple(p) for p in bank.report["single"]))
    one_tree = replace(bank, trees=(PLAIN, single), acceptance=None, published={})
    settings: dict[str, dict[str, Any]] = {
        PUBLISHED_TREE: {"trees": Bank.load("mc_sim_7b_63").pruned(held_out.n_heads), "policy": "static"},
        SINGLE: {"trees": one_tree, "policy": "static"} if single.paths else {"policy": "off"},
        ENTMTP.label: {"trees": bank, "policy": "auto"},
        ENTROPY: {"trees": bank, "policy": "entropy"}, CONFIDENCE: {"trees": bank, "policy": "confidence"},
        UNTUNED: {"policy": "entropy"},
        USELESS: {"trees": bank, "policy": "entropy", "heads": make_useless(args.heads, folder / "useless.gguf")},
    }  # fmt: skip
    with ExitStack() as stack:
        loaded = {PLAIN_LABEL: stack.enter_context(closing(load_plain(args)))}
        loaded |= {k: stack.enter_context(closing(load(args, **more))) for k, more in settings.items()}
        methods = {label: answering(llm) for label, llm in loaded.items()}
        asked = [Prompt(prompts[i], args.tokens, temp, seed=i) for i in held_out.prompt]
        turns = in_turn(methods, asked, args.rounds, advance)
        return list(zip(held_out.task * args.rounds, turns, strict=True))


def predictions(judged: dict[str, Any], costs: Costs) -> dict[str, float]:
    """Speed of the methods against plain decoding by replay, of whole steps; `judged` as in `entmtp.measure.judge`."""
    plain = 1e6 / judged["plain"]["tokens_per_second"]  # us per token
    per_token = costs.sample + costs.token
    ideal = (plain - costs.host - per_token) / judged["oracle"]["speed"] + per_token
    auto = AUTO_LEARNED if AUTO_LEARNED in judged else AUTO
    names = {PLAIN_LABEL: "plain", ENTROPY: "entropy", CONFIDENCE: "confidence", ENTMTP.label: auto}
    us = {m: 1e6 / judged[names.get(m, m)]["tokens_per_second"] for m in REPLAYED} | {"oracle": ideal}
    return {method: round(plain / x, 4) for method, x in us.items()}


def study(
    args: Namespace, tasks: dict[str, list[Question]], temp: float, traces: Path | None, advance: Advance
) -> tuple[Bank, dict[str, Any], int]:
    """One base, its heads and a temperature: the tuned bank; per task and for `all`, the figures of every method;
    and the threads.

    Args:
        tasks: questions by task; every other one is fitted to, the others are answered.
        traces: file that keeps the rank traces.
    """
    with tempfile.TemporaryDirectory(prefix="entmtp-study-") as folder:
        file = traces or Path(folder) / "traces.npz"
        with closing(load(args, policy="off")) as llm:
            prompts = asked_of(llm, tasks, args)
            bank = tune(llm, prompts, temps=[temp], n_tokens=args.tokens, traces=file, progress=advance)
            n_threads = llm.n_threads
        held_out = Traces.load(file).split()[1]
        turns = answers(args, bank, held_out, [tokens for _, tokens in prompts], temp, Path(folder), advance)
    tables = {}
    for task in [*dict.fromkeys(of for of, _ in turns), "all"]:
        found = Comparison([turn for of, turn in turns if task in ("all", of)])
        judged = bank.report["held_out"]
        foretold = predictions(judged.get(task, judged["all"]), bank.need_costs())  # one task is all
        tables[task] = {m: found.row(m, PLAIN_LABEL) | {"predicted": foretold.get(m)} for m in METHODS}
        tables[task]["oracle"] = {"predicted": foretold["oracle"]}
    return bank, tables, n_threads


def markdown(title: str, tables: dict[str, Any]) -> str:
    """One study as a Markdown table: speed against plain decoding, live and (in brackets) by replay."""
    rows: list[dict[str, Any]] = [{"name": name} | tables["all"][name] for name in (*METHODS, "oracle")]
    for row in rows:
        for task, of_task in tables.items():
            live, replayed = cell("{ratio:.2f}", of_task[row["name"]]), of_task[row["name"]]["predicted"]
            row[task] = live + (f" [{replayed:.2f}]" if replayed else "")
    columns: dict[str, Form] = {
        "method": "{name}", **{task: itemgetter(task) for task in tables},
        "overall": "{overall:.2f}", "tokens/s": "{tokens_per_second_overall:.0f}",
        "tokens/step": "{tokens_per_step:.2f}", "identical": "{identical}/{answers}",
    }  # fmt: skip
    return f"#### {title}\n\n{table(columns, rows)}{remark(rows[:1])}"


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    tasks = read_tasks(args)
    combinations = list(product([args.model, *args.more_models], [args.heads, *args.more_heads], args.temp))
    one_file = bool(args.traces and args.traces.endswith(".npz"))
    if one_file and len(combinations) > 1:
        raise UsageError(f"--traces {args.traces} is one file, and there are several studies; name a folder")
    for folder in (None if one_file else args.traces, args.banks):
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
    report["studies"] = []
    for model, heads, temp in combinations:
        with model_of(changed(args, heads=heads), model) as own, stages() as advance:
            facts = {"model": Path(own.model).stem, "heads": Path(own.heads).stem, "temp": temp}
            name = f"{facts['model']}-{facts['heads']}-{temp:g}"
            traces = Path(args.traces, *([] if one_file else [f"{name}.npz"])) if args.traces else None
            bank, tables, report["threads"] = study(own, tasks, temp, traces, advance)
        costs, tree = bank.need_costs(), bank.report["single"] or "plain decoding"
        report["studies"].append(facts | {"single": tree, "tasks": tables, "costs": costs.to_json()})
        if args.banks:
            with atomic_path(Path(args.banks) / f"{name}.json") as temporary:
                temporary.write_text(dumps(bank), "utf-8")
        text = markdown(f"{facts['model']}, {facts['heads']}, temperature {temp:g}", tables)
        yield f"{text}\nBest single tree: {tree}; spread of the timings {costs.spread:.0%}\n"
