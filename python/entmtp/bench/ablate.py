"""`entmtp bench ablate`: what each part of the policies is worth, by replay."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing
from statistics import fmean
from typing import Any

from ..bank import PLAIN, Bank, Costs, Traces
from ..common.progress import stages
from ..measure import calibration, learning, search
from ..measure.chains import chains
from ..measure.replay import replay, replay_auto
from ..measure.rollouts import heads_identity
from ..measure.turns import Advance
from ..options import load
from ..report.tables import Form, table
from .inputs import model_of
from .whatif import priced

CHAINS = ((4, 4), (2, 2))  # match and draft, tokens
ACCEPTANCE: dict[str, Form] = {
    "left out": "{without}", "log loss, nats": "{log_loss:.4f}", "tokens/step": "{tokens_per_step:.3f}",
    "speed against plain": "{speed:.3f}",
}  # fmt: skip
# what the confidence policy is changed in, to see what each part is worth
VARIANTS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "without hits": {"without": ("hits",)},
    "without the entropy of the head's guesses": {"without": ("spread",)},
    "without running entropy": {"without": ("running entropy",)},
    "without any entropy of the base": {"without": ("running entropy", "entropy", "root")},
    "head probabilities uncalibrated by anything else": {
        "without": ("running entropy", "entropy", "rank", "path", "hits", "spread", "root")
    },
    "entropy window 2": {"window": 2.0},
    "entropy window 32": {"window": 32.0},
    "3 bins of 3 scenarios": {"n_bins": 3, "n_scenarios": 3},
    "12 bins of 6 scenarios": {"n_bins": 12, "n_scenarios": 6},
    "one scenario: means instead of distributions": {"n_scenarios": 1},
    "hits over 15 steps": {"hits_window": 15.0},
    "hits over 120 steps": {"hits_window": 120.0},
    "not adapting": {"adapt": False},
}
BINS = [(w, n, c) for w in (2.0, 8.0, 32.0) for n in (1, 4, 7) for c in ("ratio", "price")]


def variants(fitted: Traces, held_out: Traces, costs: Costs) -> Iterator[tuple[str, float]]:
    """(name, draft and verify time) of variants of the policies on held-out traces."""
    for name, change in VARIANTS.items():
        settings = {"window": 8.0} | change
        adapt, window = settings.pop("adapt", True), settings["window"]
        model = calibration.fit(fitted, **settings)
        bank = Bank("", (PLAIN,), ema_window=window, costs=costs, calibration=model)
        yield f"confidence, {name}", replay(held_out, bank, "confidence", adapt=adapt).us
    for window, n_bins, criterion in BINS:
        bank = search.bin_bank(fitted, costs, window, n_bins, criterion)
        yield f"entropy, window {window:g}, {n_bins} bins, {criterion}", replay(held_out, bank, "entropy").us


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    """Speed of the variants against the best single tree, one figure per trace file; then, of each file that holds
    texts, what the inputs of the acceptance model are worth."""
    curve: str = args.curve or args.model
    speeds: dict[str, list[float]] = {}
    tables: dict[str, list[dict[str, Any]]] = {}
    with stages() as advance:
        for file, traces, _, costs in priced(args, curve, advance):
            fitted, held_out = traces.split()
            if traces.n_heads:
                single = search.static(held_out, search.best_single(fitted, costs), costs).us
                for i, (name, us) in enumerate(variants(fitted, held_out, costs), 1):
                    speeds.setdefault(name, []).append(single / us)
                    advance(file, i, len(VARIANTS) + len(BINS))
            if traces.texts is not None:
                tables[file] = acceptance(args, fitted, held_out, costs, advance)
    report |= {"ablation": speeds, "acceptance": tables, "curve": curve}
    if speeds:
        rows = [
            {"variant": k, "mean": fmean(v), "lowest": min(v), "highest": max(v)} for k, v in speeds.items()
        ]
        columns = {"variant": "{variant}"} | {k: f"{{{k}:.3f}}" for k in ("mean", "lowest", "highest")}
        yield f"Costs: {curve}; speed against the best single tree\n\n{table(columns, rows)}"
    for file, found in tables.items():
        title = f"#### policy auto, {file} ({', '.join(found[0]['drafters'])}), costs: {curve}"
        yield f"{title}\n\n{table(ACCEPTANCE, found)}"


def acceptance(
    args: Namespace, fitted: Traces, held_out: Traces, costs: Costs, advance: Advance
) -> list[dict[str, Any]]:
    """A row for each input that the acceptance model is left without, and for fixed chains from matches in the text.
    Heads draft if `--model` has those of the traces."""
    with ExitStack() as stack:
        heads = None
        if fitted.n_heads:
            own = stack.enter_context(model_of(args, args.model))
            llm = stack.enter_context(closing(load(own, policy="off")))
            heads = llm.draft_heads if heads_identity(llm) == fitted.about.get("heads") else None
        model = calibration.fit(fitted, 8.0) if heads is not None else None
        bank = Bank("", (PLAIN,), costs=costs, calibration=model)
        who = ("text", "recycling", *(("heads",) if heads is not None else ()))
        plain = replay_auto(held_out, bank, heads, drafters=()).us
        rows = []
        for name, loss, r in learning.ablate(fitted, held_out, bank, heads, who):
            figures = {"log_loss": loss, "tokens_per_step": r.tokens_per_step, "speed": plain / r.us}
            rows.append({"without": name, "drafters": who} | figures)
            advance("acceptance model", len(rows), len(learning.PARTS) + 2)
        loss = learning.told_temperature(fitted, held_out, bank, heads, drafters=who)
        rows.append({"without": "nothing, and the temperature is told", "drafters": who, "log_loss": loss})
        for match, draft in CHAINS:
            r = chains(held_out, costs, match, draft)
            name = f"all: always {draft} tokens after a match of {match}"
            rows.append(
                {
                    "without": name,
                    "drafters": who,
                    "tokens_per_step": r.tokens_per_step,
                    "speed": plain / r.us,
                }
            )
        return rows
