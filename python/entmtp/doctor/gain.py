"""What drafts bring of a model on this machine, measured in about twenty seconds."""

from __future__ import annotations

from typing import Any

from ..common.prompts import read_questions
from ..llama import Llama
from ..measure.compare import speed
from ..measure.turns import Answer, Prompt, decode
from ..models.assets import assets
from ..models.templates import fitting_tokens

TASKS = ("gsm8k", "humaneval", "literature", "sharegpt")
TEMPS = (0.0, 0.8)  # by turns
SECONDS = 20.0
LEAST, MOST = 12, 96  # tokens of an answer
PAYS = 1.03  # of plain decoding's speed: less is what runs differ by


def ways(llm: Llama) -> dict[str, dict[str, Any]]:
    """How to decode, as arguments of `Llama.set_trees`: plainly, with each kind of drafter alone, with all."""
    own = [d for d in ("heads", "model") if d in llm.drafters]
    alone = {"text": ("text", "recycling")} | {d: (d,) for d in own}
    found: dict[str, dict[str, Any]] = {"plain": {"policy": "off"}}
    found |= {name: {"policy": "auto", "drafters": who} for name, who in alone.items()}
    return found | ({"together": {"policy": "auto", "drafters": "auto"}} if own else {})


def measure_gain(llm: Llama, seconds: float = SECONDS) -> dict[str, Any]:
    """Tokens/s by way of decoding, and how often the guesses of heads were taken, by depth.

    Each way answers one prompt of every task, after a short one that builds graphs and teaches it what pays; plain
    decoding before and after the others, for machines drift.
    """
    room = min(512, llm.n_ctx() - MOST - 1)
    questions = [read_questions(assets() / "prompts" / f"{task}.jsonl", 1)[0] for task in TASKS]
    prompts = [fitting_tokens(llm, q, room) for q in questions]

    def answers(how: dict[str, Any], n_tokens: int) -> list[Answer]:
        llm.set_trees(**how)
        decode(llm, Prompt(prompts[0], 16))
        return [
            decode(llm, Prompt(p, n_tokens, TEMPS[i % len(TEMPS)]), past_end=True)
            for i, p in enumerate(prompts)
        ]

    plans = ways(llm)
    first = answers(plans["plain"], LEAST)
    each = seconds / (len(plans) + 1) / len(prompts)  # of one answer
    n_tokens = int(min(MOST, max(LEAST, each * speed(*first))))
    found = {name: answers(how, n_tokens) for name, how in plans.items()}
    found["plain"] += answers(plans["plain"], n_tokens)
    result: dict[str, Any] = {"speeds": {name: round(speed(*all_of), 1) for name, all_of in found.items()}}
    if "heads" in found:
        result["taken"] = by_depth(found["heads"])
    return result


def by_depth(answers: list[Answer]) -> list[float]:
    """Of the steps that drafted, the share whose guesses were taken to depth 1, 2, ..., while it is above none."""
    drafted = [
        int(step["n_accepted"]) for a in answers if a.stats for step in a.stats.steps if step["n_nodes"] > 1
    ]
    if not drafted:
        return []
    return [round(sum(n >= d for n in drafted) / len(drafted), 3) for d in range(1, max(drafted) + 1)]


NAMES = {"text": "drafts from the text", "heads": "heads", "model": "a model that drafts"}
OPTION = {"text": "text,recycling", "heads": "heads", "model": "model"}


def sentence(speeds: dict[str, float]) -> str:
    """What pays, in one sentence."""
    gains = {name: x / speeds["plain"] for name, x in speeds.items() if name != "plain"}
    together = gains.pop("together", max(gains.values()))
    if max(together, *gains.values()) < PAYS:
        return "nothing pays here: plain decoding is as fast"
    best = max(gains, key=gains.__getitem__)
    if gains[best] > PAYS * together:
        return f"{NAMES[best]} alone: faster here than all together (--drafters {OPTION[best]})"
    pay = [NAMES[name] for name, gain in gains.items() if gain >= PAYS]
    if len(gains) == 1:
        return f"{NAMES[best]} pay here"
    return f"{' and '.join(pay)} pay here, all together most" if pay else "only all together pay here"
