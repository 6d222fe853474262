"""How a model drafts: arguments that can work, who drafts, from which bank, and with which costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp

from .bank import Bank, Costs
from .common.numbers import MOST_THREADS
from .measure.at_load import SECONDS, quick
from .measure.known import machine_key, tuned_path
from .measure.subject import Subject
from .native.abi import SOURCES
from .native.arrays import NEED_HEADS, POLICIES

ACCEPT = ("lossless", "typical")
OUTPUTS = ("auto", "host", "rows", "device")
MODEL_DRAFTS = ("auto", "static")  # policies under which a model can draft
DRAFT_VOCABS = {"auto": -1, "all": 0}  # beside numbers, as native code takes them
LEAST_DRAFT_VOCAB = 16
PASSES = 6  # that measuring costs takes at least
# states that recurrent and hybrid memories keep to go back to: so many tokens in a row are drafted at most. Each takes
# as much memory as the model's own state
CHAIN = 4
# hybrids, and their mixtures of experts, whose passes over several tokens give the bits of passes over one: shown by
# tests/decode/test_draft_model.py
EXACT_CHAINS = ("lfm2", "lfm2moe", "nemotron_h", "nemotron_h_moe", "qwen35", "qwen35moe")


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Raises ValueError unless an argument is one of the known words."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}, must be one of {', '.join(known)}")


NOT_THERE = {
    "heads": "drafters: heads are to draft, but there are none; give heads=PATH",
    "model": "drafters: a model is to draft, but this one's file has no layers for multi-token prediction that "
    "llama.cpp can use; give draft_model=PATH, a smaller model of the same vocabulary",
}


def who_drafts(drafters: str | Sequence[str], has_heads: bool, has_model: bool = False) -> tuple[str, ...]:
    """Names of the drafters, of `abi.SOURCES`.

    Args:
        drafters: `"auto"` (all there are), or names, as a list or with commas between them.
        has_model: a smaller model, or the model's own prediction layers.

    Raises:
        ValueError: there is no such drafter, or it is not there.
    """
    missing = {name for name, here in (("heads", has_heads), ("model", has_model)) if not here}
    there = tuple(name for name in SOURCES if name not in missing)
    names = [d.strip() for d in drafters.split(",")] if isinstance(drafters, str) else list(drafters)
    if names == ["auto"]:
        return there
    for name in names:
        one_of("drafters", name, ("auto", *SOURCES))
        if name in missing:
            raise ValueError(NOT_THERE[name])
    if not names or "auto" in names:
        raise ValueError('drafters: give "auto" alone, or at least one of ' + ", ".join(SOURCES))
    return tuple(name for name in SOURCES if name in names)


def default_bank(llm: Subject) -> Bank:
    """The bank that was tuned for this model, its heads and this machine, else one for its kind of heads."""
    tuned = tuned_path(machine_key(llm))
    if tuned.is_file():
        return Bank.load(tuned)
    if not llm.heads_path:
        return Bank.without_heads()
    return Bank.load(f"generic-{llm.draft_heads.arch}").pruned(llm.draft_heads.n_heads)


def with_calibration(llm: Subject, bank: Bank) -> Bank:
    """The bank with what the heads' probabilities are worth: without its own, what they are for heads of their kind."""
    if bank.calibration is not None or not llm.heads_path:
        return bank
    return replace(bank, calibration=Bank.load(f"generic-{llm.draft_heads.arch}").calibration)


def own_costs(llm: Subject, bank: Bank, free: int | None) -> dict[int, Costs]:
    """Costs on this machine by number of threads; empty where there is too little room to measure.

    Args:
        free: threads that the machine has to spare: they, and fewer, are measured, each half as many as the one before,
            while that takes no long. None: the number is fixed.
    """
    if llm.n_ctx() < 128 or not llm.decoder.can_chain():
        return {}
    numbers = [llm.n_threads] if free is None else halved(free)
    seconds = SECONDS if len(numbers) == 1 else 0.7 * SECONDS
    state, draft_model = llm.decoder.stats_enabled, llm.decoder.draft_model
    llm.decoder.set_stats(True)
    llm.decoder.set_draft_model(None)  # it times itself
    costs: dict[int, Costs] = {}
    for n in numbers:
        guess = costs_for(n, costs)
        if guess and PASSES * guess.curve()[0] > seconds * 1e6:
            break  # large models: in proportion will do
        if free is not None:
            llm.compute_on(n)
        tuned = bank.costs if bank.costs and bank.costs.key == machine_key(llm) else None
        costs[n] = quick(llm, seconds, tuned)
        seconds = 0.4 * SECONDS / max(len(numbers) - 1, 1)
    llm.decoder.set_stats(state)
    llm.decoder.set_draft_model(draft_model)
    return costs


def halved(n: int) -> list[int]:
    """n, half of it, and so on to 1."""
    return [n] if n <= 1 else [n, *halved(n // 2)]


def fastest(costs: dict[int, Costs]) -> int:
    """The number of threads whose pass over one token is fastest; fewer where it is all but the same."""
    one = {n: float(c.curve()[0]) for n, c in costs.items()}
    return min(n for n, us in one.items() if us <= 1.02 * min(one.values()))


def costs_for(n: int, costs: dict[int, Costs]) -> Costs | None:
    """Costs with n threads: measured, or in proportion to the number nearest to it that was; None without any."""
    if not costs:
        return None
    near = min(costs, key=lambda m: abs(m - n))
    return costs[n] if near == n else costs[near].scaled(near / n)


def draft_vocab_of(value: Any) -> int:
    """`draft_vocab` of `Llama` as the number that native code takes.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, str) and value in DRAFT_VOCABS:
        return DRAFT_VOCABS[value]
    if type(value) is not int or not LEAST_DRAFT_VOCAB <= value < 1 << 31:
        words = " or ".join(f'"{word}"' for word in DRAFT_VOCABS)
        raise ValueError(
            f"draft_vocab is {value!r}, must be {words} or a number of tokens, {LEAST_DRAFT_VOCAB} or more"
        )
    return value


def check(draft: Any, heads: Any, draft_model: Any, policy: str, accept: str, kwargs: dict[str, Any]) -> None:
    """Refuse arguments of `Llama` that cannot work together.

    Raises:
        ValueError: says which.
    """
    if draft not in (None, "entmtp"):
        raise ValueError(f'draft is {draft!r}, must be None or "entmtp"')
    one_of("policy", policy, POLICIES)
    one_of("accept", accept, ACCEPT)
    for name in ("n_threads", "n_threads_batch"):
        if not 0 <= (kwargs.get(name) or 0) <= MOST_THREADS:
            raise ValueError(f"{name} is {kwargs[name]}, it must be 1 to {MOST_THREADS}")
    if draft is None:
        if heads is not None:
            raise ValueError('heads are given but draft is None: pass draft="entmtp" to use them')
        if isinstance(draft_model, (str, Path)):
            raise ValueError('draft_model names a file but draft is None: pass draft="entmtp" to use it')
        return
    if draft_model is not None and not isinstance(draft_model, (str, Path)):
        raise ValueError(
            'draft_model cannot be an object with draft="entmtp": give a file, a smaller model\'s GGUF'
        )
    if draft_model is not None and policy not in MODEL_DRAFTS:
        raise ValueError(f'draft_model drafts under the policies "auto" and "static", not "{policy}"')
    for name, why in {
        "embedding": "makes a context for embeddings, which has nothing to draft",
        "vocab_only": "loads no weights, so there is nothing to draft",
    }.items():
        if kwargs.get(name):
            raise ValueError(f'{name} cannot be combined with draft="entmtp": it {why}')
    if kwargs.get("attention_type") == llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL:
        raise ValueError(
            'attention_type: tokens that see later ones cannot be drafted; leave draft="entmtp" out'
        )


def how_lossless(on_cpu: bool, accept: str) -> str:
    """What the text of drafts is to plain decoding's: see `Llama.lossless`.

    Args:
        on_cpu: every layer is computed on this machine's CPU, by our kernels.
    """
    if accept != "lossless":
        return "lossy"
    return "exact" if on_cpu else "rounding"


def check_lookup(lookup: Any, policy: str, who: Sequence[str]) -> None:
    """Raises ValueError where there are texts to draft from and nobody who would."""
    if lookup and (policy != "auto" or "text" not in who):
        raise ValueError(
            'lookup names texts to draft from, which the drafter "text" does under policy="auto": leave lookup out, or '
            "policy and drafters as they are by default"
        )


# sampling settings as they are where typical acceptance knows what to do
TYPICAL_KNOWS = {
    "grammar": None, "logits_processor": None, "frequency_penalty": 0.0, "presence_penalty": 0.0, "repeat_penalty": 1.0,
    "mirostat_mode": 0,
}  # fmt: skip


def unknown_to_typical(settings: Mapping[str, Any]) -> list[str]:
    """Names of those settings of `sample` that typical acceptance cannot follow."""
    return [name for name, none in TYPICAL_KNOWS.items() if settings[name] != none]


def states_kept(arguments: Mapping[str, Any]) -> int:
    """How many states a hybrid memory keeps to go back to: llama.cpp wants room for two tokens more in a pass.

    Args:
        arguments: of `Llama`, for llama-cpp-python.
    """
    n_pass = min(arguments.get(name) or 512 for name in ("n_ctx", "n_batch", "n_ubatch"))
    return max(min(CHAIN, n_pass - 2), 0)


def why_plain(n_ubatch: int) -> str:
    """The warning where nothing can be drafted, in passes of so many tokens at most."""
    if n_ubatch < 3:
        return f"passes of {n_ubatch} tokens (n_batch, n_ubatch) have no room for drafts: decoding plainly"
    return "the memory of this model cannot hold a token tree: decoding plainly"


def up_to_rounding(llm: Subject) -> str:
    """The warning where texts are not plain decoding's bit for bit: why, in one sentence."""
    if llm.rpc_servers:
        why = "layers are on other machines"
    elif llm.model_params.n_gpu_layers:
        why = "layers are on a GPU"
    elif not llm.decoder.can_tree():
        why = "nobody has shown it of this architecture"
    else:
        why = "this CPU is none of those that there are kernels for"
    return (
        f"drafts give plain decoding's text up to rounding here, not bit for bit: {why} (docs/how-it-works.md, "
        "When is the output not identical?)"
    )


def check_heads(policy: str, has_heads: bool) -> None:
    """Raises ValueError where a policy needs heads and there are none."""
    if policy in NEED_HEADS and not has_heads:
        raise ValueError(
            f'policy "{policy}" needs draft heads, and there are none for this model; the policy "auto" drafts from '
            "the text, or make heads with entmtp train or entmtp convert"
        )
