"""`entmtp bench run`: llama-cpp-python, our plain loop, static trees and EntMTP side by side, in one process.

llama.cpp's own server and drafting (`make baselines`), where they are asked for, are processes of their own in the same
turns.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any

from ..common.errors import UsageError
from ..common.machine import peak_memory_mb
from ..common.progress import stages
from ..llama import Llama
from ..measure.baselines import LABELS, Baseline, baseline
from ..measure.compare import Comparison, remark
from ..measure.foreign import Driver, Server, warmed
from ..measure.foretell import Foretelling
from ..measure.methods import (
    CONFIDENCE,
    ENTMTP,
    ENTROPY,
    HEADS_ALONE,
    MODEL_ALONE,
    PLAIN_LOOP,
    TEXT_ALONE,
    Method,
    chains,
    comparison,
    generic,
    published,
)  # fmt: skip
from ..measure.rounding import Parting, parting
from ..measure.stock import LOOKUP, STOCK, stock
from ..measure.turns import Answering, Prompt, answering, in_turn
from ..native import kernels
from ..options import load
from ..report.tables import figure, spread, table
from .inputs import load_plain, model_of, read_tasks, turns_of

GGML = Method("EntMTP, ggml's kernels", None, "auto")  # as ENTMTP, but for the CPU kernels


def contestants(args: Namespace, stack: ExitStack) -> tuple[Llama, dict[str, Answering], Foretelling | None]:
    """Our plain loop, every method by label, and what foretells EntMTP; their models are closed with the stack."""

    def loaded(**more: Any) -> Llama:
        return stack.enter_context(closing(load(args, **more)))

    plain = stack.enter_context(closing(load_plain(args, stats=False)))
    own = kernels.current()
    draft = loaded()
    has_heads = draft.heads_path is not None
    has_model = "model" in draft.drafters
    learning = [TEXT_ALONE] * (has_heads or has_model) + [MODEL_ALONE] * has_model
    learning += [HEADS_ALONE, ENTROPY, CONFIDENCE, ENTMTP] if has_heads else [ENTMTP]
    fixed = [*published(), *(generic(draft.draft_heads.arch) if has_heads else ()), *comparison()]
    fixed = [*chains(), *comparison()] if has_model and not has_heads else fixed
    loops = [] if args.rpc else [STOCK, *LOOKUP, GGML.label]  # llama-cpp-python would need servers of its own
    usual = [m for m in fixed if m not in (*published()[args.published :], *comparison())]
    by_label = {m.label: m for m in (*fixed, *learning, PLAIN_LOOP)}
    asked = args.methods or [*loops, *(m.label for m in (*usual, *learning))]
    others = {m: theirs for m in asked if (theirs := baseline(m))}
    if missing := [m for m in asked if m not in by_label and m not in loops and m not in others]:
        known = ", ".join((*loops, *by_label))
        raise UsageError(
            f"there is no method {missing[0]}; there are {known}, and, once built, {', '.join(LABELS)}"
        )

    found: dict[str, Answering] = {}
    foretold: Foretelling | None = None
    own_loops = [*loops[:1], *(m for m in asked if m in LOOKUP), *loops[-1:], PLAIN_LOOP.label]
    for label in dict.fromkeys([*own_loops, *asked]):
        if label == GGML.label:
            found[label] = answering(loaded(kernels="off"), kernels="off")
        elif label in loops:
            devices = {"n_gpu_layers": args.n_gpu_layers or 0, "tensor_split": args.tensor_split}
            other = stock(plain, LOOKUP.get(label, 0), flash_attn=bool(args.flash_attn), **devices)
            stack.enter_context(closing(other))
            found[label] = answering(other, kernels="off")
        elif label == PLAIN_LOOP.label:
            found[label] = answering(plain, kernels=own)
        elif label in others:
            with kernels.using(own):
                found[label] = warmed(stack.enter_context(closing(foreign(others[label], plain, args))))
        elif (method := by_label[label]) in learning:  # models of their own: they learn from answer to answer
            one = loaded(policy=method.policy, drafters=method.drafters)
            found[label] = answering(one, kernels=own)
            if label == ENTMTP.label and args.replay:
                foretold = Foretelling(one, draft, drafters_to_replay(one))
        else:
            found[label] = answering(draft, method, own)
    return plain, found, foretold


def drafters_to_replay(llm: Llama) -> list[str]:
    """Who drafts.

    Raises:
        UsageError: a model does, which no replay can ask.
    """
    if "model" in llm.drafters:
        raise UsageError("--replay: a model that drafts cannot be replayed; leave it out with --drafters")
    return list(llm.drafters)


def foretelling(found: Comparison, us: list[float], us_plain: float) -> dict[str, float] | None:
    """Speed of EntMTP against our plain loop, all tokens over all seconds: as replay foretells it, and as measured.

    Passes and drafts are foretold, at the speed that the machine had in plain decoding; what a token takes beside them,
    in sampling and in Python, is taken as it was measured, for both loops alike.

    Args:
        us: of the passes and drafts of each answer, by replay.
        us_plain: of a pass over one token, by the same costs.
    """
    told = [(t, x) for t, x in zip(found.turns, us, strict=True) if t in found.pairs]
    n = sum(len(t[ENTMTP.label].tokens) - 1 for t, _ in told)
    stats = [t[ENTMTP.label].stats for t, _ in told]
    if not n:
        return None
    plain, ours = (1e6 * sum(t[k].seconds for t, _ in told) / n for k in (PLAIN_LOOP.label, ENTMTP.label))
    inside = sum(s.time_split["draft"] + s.time_split["verify"] for s in stats if s is not None)
    rest = ours - 1e6 * inside / n
    speed = (plain - rest) / us_plain
    passes = sum(x for _, x in told) / n
    return {
        "foretold": plain / (speed * passes + rest),
        "measured": plain / ours,
        "speed": speed,
        "rest_us": rest,
    }


def foreign(method: Baseline, like: Llama, args: Namespace) -> Driver | Server:
    """A program of llama.cpp's with the model, the threads and the context of one of ours."""
    layers = args.n_gpu_layers or 0
    if method.server:
        return Server(method, like, args.draft_model, layers)
    return Driver(method, like, bool(args.flash_attn), args.draft_model, layers)


def judged(found: Comparison, labels: list[str]) -> list[dict[str, Any]]:
    """A row per method: speed against the first one and against our plain loop."""
    rows = []
    cut = found.without_loops()
    for label in labels:
        row = found.row(label, labels[0]) | {"ratio_plain": found.ratio(label, PLAIN_LOOP.label)}
        row["overall_plain"] = found.row(label, PLAIN_LOOP.label)["overall"]
        row["without_loops"] = [cut.row(label, base)["overall"] for base in (labels[0], PLAIN_LOOP.label)]
        # kernels differ in rounding: texts are compared with those of a loop that has the same
        loop = STOCK if label == GGML.label or label in LOOKUP else PLAIN_LOOP.label
        rows.append(row | {"identical": found.identical(label, loop)})
    return rows


def partings(llm: Llama, prompts: list[Prompt], found: Comparison, label: str) -> list[Parting]:
    """Where the greedy answers of a method leave our plain loop's."""
    pairs = [(t[PLAIN_LOOP.label].tokens, t[label].tokens) for t in found.turns]
    each = (parting(llm, prompt.tokens, *pair) for prompt, pair in zip(prompts, pairs, strict=True))
    return [p for p in each if p is not None]


def alike(row: dict[str, Any]) -> str:
    """How many answers are plain decoding's, and how many leave it where two tokens tie."""
    ties = row.get("ties")
    return f"{row['identical']}/{row['answers']}" + (f", {ties} part at a tie" if ties else "")


def markdown(title: str, rows: list[dict[str, Any]]) -> str:
    """A task's rows as a Markdown table."""
    bases = {rows[0]["method"]: "ratio", PLAIN_LOOP.label: "ratio_plain"}  # over RPC both are the plain loop
    head = [
        "method", "tokens/s", "overall", *(f"against {base}" for base in bases), "against both, overall", "loops cut",
        "tokens/step", "draft", "verify", "sample", "host", "rest", "identical",
    ]  # fmt: skip
    cells = [[
        r["method"], spread(r["tokens_per_second"], "{:.1f}"), figure(r["tokens_per_second_overall"], "{:.1f}"),
        *(spread(r[key], unit="×") for key in bases.values()),
        f"{figure(r['overall'])} {figure(r['overall_plain'])}", " ".join(figure(x) for x in r["without_loops"]),
        figure(r.get("tokens_per_step", 1.0)),
        *(f"{x:.0%}" for x in r.get("time_split", {}).values()), *([] if "time_split" in r else [""] * 5),
        alike(r),
    ] for r in rows]  # fmt: skip
    notes = remark(rows[0]["pairs"], rows[0]["answers"])
    if any(other.server for r in rows if (other := baseline(r["method"]))):
        notes += (
            "llama.cpp's server rounds in ggml's ways: its texts need not be those of our plain decoding.\n"
        )
    return f"### {title}\n\n{table(head, cells)}{notes}"


def replay_text(told: dict[str, float] | None) -> str:
    if told is None:
        return ""
    off = told["foretold"] / told["measured"] - 1
    both = f"{told['foretold']:.2f}, measured {told['measured']:.2f}"
    return f"Replay foretells EntMTP's speed against plain decoding, overall: {both} ({off:+.1%}).\n"


def run(args: Namespace, report: dict[str, Any]) -> Iterator[str]:
    tasks = read_tasks(args)
    report["tasks"] = []
    with ExitStack() as stack:
        args = stack.enter_context(model_of(args, args.model, needs_heads=False))
        plain, methods, foretold = contestants(args, stack)
        report["threads"] = plain.n_threads
        for task, temp in [(task, temp) for task in tasks for temp in args.temp]:
            prompts = [Prompt(t, args.tokens, temp) for q in tasks[task] for t in turns_of(plain, q, args)]
            with stages() as advance:
                found = Comparison(in_turn(methods, prompts, args.rounds, advance))
            rows = judged(found, list(methods))
            if temp == 0 and plain.lossless != "exact":
                for row in (r for r in rows if r["method"] not in (STOCK, *LOOKUP)):
                    left = partings(plain, prompts * args.rounds, found, row["method"])
                    row |= {"ties": sum(p.is_tie for p in left), "partings": [p._asdict() for p in left]}
            report["tasks"].append({"task": task, "temp": temp, "rows": rows})
            text = markdown(f"{task}, temperature {temp:g}", rows)
            if foretold is not None:
                us = foretold.answers(prompts * args.rounds)
                told = foretelling(found, us, foretold.us_plain())
                report["tasks"][-1]["replay"] = told
                text += replay_text(told)
            yield text
    if (peak := peak_memory_mb()) is not None:
        report["peak_memory_mb"] = peak
        yield f"Peak memory of the process, with all instances of the model: {peak:.0f} MB\n"
