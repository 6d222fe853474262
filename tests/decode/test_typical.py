"""Typical acceptance: drafts by the published threshold, everything else drawn by the user's sampler chain."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest

from entmtp import Llama
from helpers.settings import prompts

STATIC: dict[str, Any] = {"trees": "generic-hydra:n8", "policy": "static"}
N = 48


@pytest.fixture
def prompt(load: Callable[..., Llama]) -> list[int]:
    return load().tokenize(prompts("gsm8k")[0].encode())


def answer(llm: Llama, prompt: list[int], seed: int, **sampling: Any) -> list[int]:
    llm.set_seed(seed)
    return list(islice(llm.generate(prompt, **sampling), N))


@pytest.mark.parametrize("sampling", [{"temp": 0.9}, {"temp": 1.3, "top_k": 5}, {"temp": 0.7, "min_p": 0.2}])
def test_without_accepted_drafts_it_is_plain_sampling(
    sampling: dict[str, Any], load: Callable[..., Llama], prompt: list[int]
) -> None:
    """Nothing is more probable than 1, so every token leaves the tree: draw after draw as without a draft."""
    llm = load(heads="hydra", accept="typical", typical_epsilon=1.0, typical_alpha=1e9, **STATIC)
    plain = load()
    for seed in range(4):
        assert answer(llm, prompt, seed, **sampling) == answer(plain, prompt, seed, **sampling)
    llm.reset_draft_stats()
    answer(llm, prompt, 0, **sampling)
    assert llm.draft_stats.n_drafted > N, "nothing was drafted: this run proves nothing"


def test_seeds_give_different_texts(load: Callable[..., Llama], prompt: list[int]) -> None:
    llm = load(heads="hydra", accept="typical", **STATIC)
    texts = {tuple(answer(llm, prompt, seed, temp=0.9)) for seed in range(8)}
    assert len(texts) > 4
    assert answer(llm, prompt, 3, temp=0.9) == answer(llm, prompt, 3, temp=0.9)


@pytest.mark.parametrize(("temp", "top_k"), [(0.9, 3), (1.2, 2), (0.6, 40)])
def test_every_token_is_typical_or_drawn(
    temp: float, top_k: int, load: Callable[..., Llama], prompt: list[int]
) -> None:
    """Against the rule itself, on logits that a plain model of its own gives for the same text."""
    epsilon, alpha = 0.09, 0.3
    llm = load(heads="hydra", accept="typical", **STATIC)
    said: list[tuple[int, bool]] = []
    llm.on_token = lambda token, drafted: said.append((token, drafted))
    try:
        text = answer(llm, prompt, 5, temp=temp, top_k=top_k, top_p=1.0, min_p=0.0)
    finally:
        llm.on_token = None
    reference = load(logits_all=True)
    reference.reset()
    reference.eval(prompt + text)
    rows = reference.scores[len(prompt) - 1 : len(prompt) + N].astype(np.float64)
    n_drafted = n_drawn = 0
    for i, (token, drafted) in enumerate(said[:N]):
        assert token == text[i]
        p = np.exp(rows[i] / temp - (rows[i] / temp).max())
        p /= p.sum()
        entropy = -(p[p > 0] * np.log(p[p > 0])).sum()
        in_the_draw = token in np.argsort(-rows[i])[:top_k]
        if drafted:
            n_drafted += 1
            # a drawn token may happen to be a draft, too
            assert p[token] > min(epsilon, alpha * np.exp(-entropy)) - 1e-4 or in_the_draw
        else:
            n_drawn += 1
            assert in_the_draw
    assert n_drafted > 3 and n_drawn > 3


def test_what_it_does_not_know_is_sampled_losslessly(load: Callable[..., Llama], prompt: list[int]) -> None:
    llm = load(heads="hydra", accept="typical", **STATIC)
    for more in ({"repeat_penalty": 1.2}, {"presence_penalty": 0.5}, {"mirostat_mode": 2}):
        settings = {"temp": 0.8, **more}
        with pytest.warns(RuntimeWarning, match=f"does not know {next(iter(more))}: accepting losslessly"):
            llm._warned.clear()
            found = answer(llm, prompt, 1, **settings)
        assert found == answer(load(), prompt, 1, **settings)
