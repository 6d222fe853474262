"""Is it worth it? Tuned policies against plain decoding, the published tree and the best single tree, live and by
replay.

For one base, one heads file and one temperature: tune on half of the prompts, then answer the other half with every
method in turn, in one process. Replay's prediction stands beside what was measured, and the oracle that knows the
future beside both.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np

from ..bank.bank import Bank
from ..bank.costs import Costs
from ..bank.traces import Traces
from ..bank.tree import PLAIN, Tree
from ..llama import Llama
from ..measure import search
from ..measure.replay import Replay, replay
from ..measure.tuning import tune

PLAIN_LABEL, SINGLE, PUBLISHED_TREE = "plain", "best single tree", "published 63-node tree"
ENTROPY, CONFIDENCE, UNTUNED, USELESS = (
    "EntMTP, entropy",
    "EntMTP, confidence",
    "EntMTP, untuned",
    "EntMTP, useless heads",
)
METHODS = (PLAIN_LABEL, PUBLISHED_TREE, SINGLE, ENTROPY, CONFIDENCE, UNTUNED, USELESS)


def make_useless(heads: str | Path, target: str | Path) -> Path:
    """A copy of a heads file whose heads are sure of the wrong tokens: their vocabulary is rolled by a third."""
    target = Path(target)
    shutil.copyfile(heads, target)
    reader = gguf.GGUFReader(target, "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith(".output.weight"):
            tensor.data[:] = np.roll(tensor.data, len(tensor.data) // 3, axis=0)
    reader.data.flush()
    return target


def decode(llm: llama_cpp.Llama, prompt: list[int], n_tokens: int, temp: float, seed: int) -> dict[str, Any]:
    """Generate from a fresh start: tokens, and seconds from the first token to the last."""
    llm.reset()
    llm.set_seed(seed)
    tokens: list[int] = []
    start = 0.0
    for token in llm.generate(prompt, temp=temp):
        if not tokens:
            start = time.perf_counter()
        tokens.append(token)
        if token == llm.token_eos() or len(tokens) == n_tokens:
            break
    return {"tokens": tokens, "seconds": time.perf_counter() - start}


def run(
    model: str | Path,
    heads: str | Path,
    tasks: Mapping[str, Sequence[str]],
    temp: float,
    *,
    n_tokens: int = 128,
    traces: str | Path | None = None,
    methods: Sequence[str] = METHODS,
    n_rounds: int = 1,
    advance: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """The study of one base, heads and temperature.

    Args:
        tasks: texts of the prompts by task; every other one is fitted to, the others are answered.
        n_tokens: per answer.
        traces: file that keeps the rank traces.
        n_rounds: how often every answer is given.
        settings: of `Llama`.

    Returns:
        tasks: per task and for `all`, per method, tokens per second (median and quartiles), speed against plain
            decoding
            (of each answer in turn; median and quartiles), tokens per step, replay's prediction of that speed, and
            whether answers were identical; and the oracle's speed.
        bank: the tuned bank.
    """
    prompts = [(task, text) for task, texts in tasks.items() for text in texts]
    with tempfile.TemporaryDirectory(prefix="entmtp-study-") as folder:
        file = traces or Path(folder) / "traces.npz"
        loaded = {"n_ctx": 2048, "verbose": False, **settings}
        with closing(Llama(model, draft="entmtp", heads=heads, policy="off", **loaded)) as llm:
            bank = tune(
                llm, prompts, name="study", temps=[temp], n_tokens=n_tokens, traces=file, progress=advance
            )
        _, held_out = Traces.load(file).split()
        single = Tree("single", tuple(tuple(p) for p in bank.report["single"]))
        live = _answers(model, heads, bank, single, held_out, prompts, temp, n_tokens, methods, n_rounds, advance,
                        Path(folder), settings)  # fmt: skip
    result = {}
    for task in [*tasks, "all"]:
        part = held_out if task == "all" else held_out.of_task(task)
        rows = [r for r in live if task in ("all", r["task"])]
        result[task] = _table(rows, part, bank, single, methods)
    return {"tasks": result, "bank": bank}


def _answers(
    model: str | Path, heads: str | Path, bank: Bank, single: Tree, held_out: Traces, prompts: Sequence[tuple[str,
        str]],
    temp: float, n_tokens: int, methods: Sequence[str], n_rounds: int, advance: Callable[[str, int, int], None] | None,
    folder: Path, settings: dict[str, Any],
) -> list[dict[str, Any]]:  # fmt: skip
    """Answers of all methods to the held-out prompts: one record per answer."""
    published = Bank.load("mc_sim_7b_63").pruned(held_out.n_heads)
    one_tree = replace(bank, trees=(PLAIN, single), acceptance=None, published={}) if single.paths else None
    kwargs = {"n_ctx": 2048, "verbose": False, **settings}
    with ExitStack() as stack:
        loaded: dict[str, Llama] = {}
        for label in methods:
            if label == PLAIN_LABEL:
                loaded[label] = Llama(model, stats=True, **kwargs)
            else:
                own = make_useless(heads, folder / "useless.gguf") if label == USELESS else heads
                trees: Any = bank
                policy = "confidence" if label == CONFIDENCE else "entropy"
                if label == PUBLISHED_TREE:
                    trees, policy = published, "static"
                elif label == SINGLE:
                    trees, policy = (one_tree, "static") if one_tree else (Bank("plain", (PLAIN,)), "off")
                elif label == UNTUNED:
                    trees = None
                loaded[label] = Llama(model, draft="entmtp", heads=own, trees=trees, policy=policy, **kwargs)
            stack.enter_context(closing(loaded[label]))
        texts = [prompts[i][1] for i in held_out.prompt]
        tokenised = [
            loaded[methods[0]].tokenize(t.encode(), add_bos=True, special=True)[
                : kwargs["n_ctx"] - n_tokens - 1
            ]
            for t in texts
        ]
        for llm in loaded.values():
            decode(llm, tokenised[0], 16, temp, 0)  # graphs, threads
        records = []
        total = len(texts) * n_rounds * len(methods)
        for k in range(n_rounds):
            for i, prompt in enumerate(tokenised):
                for j in range(len(methods)):
                    label = methods[(i + j + k) % len(methods)]
                    llm = loaded[label]
                    llm.reset_draft_stats()
                    answer = decode(llm, prompt, n_tokens, temp, held_out.prompt[i])
                    stats = llm.draft_stats
                    records.append(
                        answer | {
                            "task": held_out.task[i], "text": (k, i), "method": label,
                            "tau": (stats.n_steps, stats.n_accepted), "used": stats.trees_used,
                            "split": stats.time_split,
                        }
                    )  # fmt: skip
                    if advance:
                        advance("answers", len(records), total)
    return records


def _predicted(label: str, traces: Traces, bank: Bank, single: Tree) -> Replay | None:
    """The same method by replay."""
    costs: Costs = bank.need_costs()
    if label == PLAIN_LABEL:
        return replay(traces, bank, "off")
    if label == SINGLE:
        return search.static(traces, single, costs)
    if label == PUBLISHED_TREE:
        return search.static(traces, Bank.load("mc_sim_7b_63").pruned(traces.n_heads).trees[1], costs)
    if label in (ENTROPY, CONFIDENCE):
        return replay(traces, bank, "entropy" if label == ENTROPY else "confidence")
    return None


def _table(
    rows: list[dict[str, Any]], traces: Traces, bank: Bank, single: Tree, methods: Sequence[str]
) -> dict[str, Any]:
    """Figures per method over some answers."""
    by_text: dict[Any, dict[str, dict[str, Any]]] = {}
    for r in rows:
        by_text.setdefault(r["text"], {})[r["method"]] = r
    plain = _predicted(PLAIN_LABEL, traces, bank, single)
    assert plain is not None
    result: dict[str, Any] = {}
    for label in methods:
        pairs = [(t[label], t[PLAIN_LABEL]) for t in by_text.values() if len(t[label]["tokens"]) > 8]
        speed = [(len(r["tokens"]) - 1) / r["seconds"] for r, _ in pairs]
        ratio = [s / ((len(p["tokens"]) - 1) / p["seconds"]) for s, (_, p) in zip(speed, pairs, strict=True)]
        # all tokens over all seconds: what a user waits, and what replay predicts
        overall = (sum(len(r["tokens"]) - 1 for r, _ in pairs) / sum(r["seconds"] for r, _ in pairs)) / (
            sum(len(p["tokens"]) - 1 for _, p in pairs) / sum(p["seconds"] for _, p in pairs)
        )
        n_steps, n_accepted = np.sum([r["tau"] for r, _ in pairs], axis=0)
        guess = _predicted(label, traces, bank, single)
        seconds = sum(r["seconds"] for r, _ in pairs)
        result[label] = {
            "tokens_per_second": [round(float(x), 1) for x in np.percentile(speed, [50, 25, 75])],
            "ratio": [round(float(x), 4) for x in np.percentile(ratio, [50, 25, 75])],
            "overall": round(overall, 4),
            "tokens_per_step": round(1 + float(n_accepted) / max(int(n_steps), 1), 3),
            "predicted": None if guess is None else round(plain.us_total / guess.us_total, 4),
            "identical": sum(r["tokens"] == p["tokens"] for r, p in pairs),
            "answers": len(pairs),
            "split": {k: round(sum(r["split"][k] for r, _ in pairs) / seconds, 3) for k in rows[0]["split"]},
        }
    per_token = plain.costs.sample + plain.costs.token  # what every token costs besides draft and verify
    oracle_us = search.oracle(traces, plain.costs) * 1e6 + plain.n_tokens * per_token
    result["oracle"] = {"predicted": round(plain.us_total / oracle_us, 4)}
    return result


def markdown(title: str, tables: dict[str, Any]) -> str:
    """One study as a Markdown table: speed against plain decoding, live and (in brackets) by replay."""
    tasks = list(tables)
    methods = [m for m in tables[tasks[0]] if m != "oracle"]
    head = "| method | " + " | ".join(tasks) + " | tokens/step | identical |"
    lines = [f"#### {title}", "", head, "| --- |" + " --: |" * (len(tasks) + 2)]
    for m in methods:
        cells = []
        for t in tasks:
            r = tables[t][m]
            low, high = r["ratio"][1:]
            predicted = "" if r["predicted"] is None else f" [{r['predicted']:.2f}]"
            cells.append(f"{r['ratio'][0]:.2f} ({low:.2f}–{high:.2f}){predicted}")
        r = tables["all"][m]
        cells += [f"{r['tokens_per_step']:.2f}", f"{r['identical']}/{r['answers']}"]
        lines.append(f"| {m} | " + " | ".join(cells) + " |")
    oracle = " | ".join(f"[{tables[t]['oracle']['predicted']:.2f}]" for t in tasks)
    lines.append(f"| oracle | {oracle} | | |")
    return "\n".join(lines) + "\n"
