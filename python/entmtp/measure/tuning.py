"""Trees, their calibration and the acceptance model for one base model, its heads, a task and this machine.

Two measurements, then a search without the model:

1. what passes and drafts cost here (measure/timing.py),
2. rank traces: plain rollouts of the prompts with all that policies and heads would have said (measure/rollouts.py),
3. trees for every entropy bin, the best single tree, and a calibration of the heads' probabilities, fitted to half of
   the prompts by replay (measure/search.py, fitting.py, calibration.py), and judged on the other half (judge.py),
4. weights of the acceptance model for the policy auto, from the same texts (measure/learning.py); of a model without
   heads this is all there is to tune.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..bank.bank import Bank
from ..bank.costs import N_VERIFY
from ..bank.traces import Traces
from ..bank.tree import PLAIN
from ..common.machine import cpu_name
from . import search
from .fitting import fit, fit_sizes
from .judge import judge
from .learning import learn
from .replay import replay
from .rollouts import heads_identity, record
from .subject import Subject
from .timing import SIZES, measure, measure_rest
from .timing import Progress as Report

EVERY_SIZE_BELOW = (
    4000.0  # us: where a pass of one token is faster, passes of every size are timed, else a selection
)


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
    llm: Subject,
    prompts: Sequence[tuple[str, Sequence[int]]],
    *,
    name: str = "tuned",
    task: str | None = None,
    temps: Sequence[float] = (0.0, 0.8),
    n_tokens: int = 128,
    seed: int = 0,
    traces: str | Path | None = None,
    contexts: Sequence[int] = (64, 512),
    n_rounds: int = 12,
    progress: Report | None = None,
    sampling: dict[str, Any] | None = None,
    sizes: Sequence[int] | None = None,
    drafters: Sequence[str] = ("text", "recycling", "heads"),
) -> Bank:
    """A bank tuned for a base model, its heads if it has any, a task and this machine. See the module's text for how.

    Args:
        llm: the model with its heads, if it has any, policy off; its trees are others afterwards.
        prompts: (task, tokens) pairs; every other one is held out.
        temps: sampling temperatures of the rollouts.
        n_tokens: tokens per rollout.
        traces: file of rank traces: used if it holds traces of these heads, else written (and an interrupted recording
            goes on from it).
        contexts: depths at which passes are timed.
        n_rounds: how often each is timed.
        sampling: other sampling settings of the rollouts, as for `Llama.generate`.
        sizes: trees of these sizes instead of those that pay on this machine.
        drafters: who drafts under the policy auto.

    Raises:
        ValueError: too few prompts, or traces of other heads.
    """
    if not llm.decoder.can_tree():
        raise ValueError("tuning replays trees, which the memory of this model cannot hold")
    if len(prompts) < 2:
        raise ValueError("at least two prompts are needed: one to fit, one to judge")
    sampling = sampling or {}
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
    threads = f"{llm.n_threads} threads ({llm.n_threads_batch} for larger passes)"
    costs = replace(costs, context=int(recorded.about.get("context", costs.context)))
    fitted, held_out = recorded.split()
    heads = llm.draft_heads if llm.heads_path else None
    if heads is None:
        bank, single = replace(Bank.without_heads(), costs=costs), PLAIN
    else:
        bank = fit_sizes(fitted, costs, sizes) if sizes else fit(fitted, costs, progress)
        single = search.best_single(fitted, costs)
    if fitted.texts is not None:
        bank = learn(fitted, bank, heads, drafters=drafters)
    tasks = sorted(set(held_out.task))
    results = {"all": judge(held_out, bank, single, heads, drafters)}
    if len(tasks) > 1:
        results |= {t: judge(held_out.of_task(t), bank, single, heads, drafters) for t in tasks}
    report: dict[str, Any] = {"held_out": results, "spread": costs.spread}
    if heads is not None:
        front = search.pareto(search.node_probabilities(fitted.ranks), costs)
        report |= {
            "single": [list(p) for p in single.paths],
            "front": [[n, round(t, 4), round(s, 2)] for n, t, s in front],
            "text": sample_text(held_out, bank),
        }
    n = len(recorded.signals)
    return replace(
        bank,
        name=name,
        source=f"entmtp tune, {len(recorded.n_tokens)} rollouts, {n} tokens at temperatures "
        f"{', '.join(f'{t:g}' for t in recorded.about.get('temps', temps))}",
        task=task,
        heads=f"{heads.arch}: {Path(llm.heads_path or '').name}" if heads is not None else None,
        device=f"{cpu_name()} ({platform.machine()}), {threads}; {Path(llm.model_path).name}",
        report=report,
    )
