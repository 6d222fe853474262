"""On a GPU: drafting gives plain decoding's tokens, with none, half and all of the layers there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from test_lossless import decode, logits_of

from entmtp import Llama
from entmtp.measure.methods import generic
from entmtp.native.backends import backends
from helpers.settings import prompts

GPUS = [d.name for found in backends().values() for d in found if "GPU" in d.kind]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not GPUS, reason=f"this build finds no GPU; its backends are {', '.join(backends())} (docs/build.md)"
    ),
]

LAYERS = [0, 3, -1]  # of six, and the output layer
# the largest difference that rounding may make in a logit between passes of different sizes
ROUNDING = {"f32": 0.05, "f16": 0.1, "q8_0": 0.5}


@pytest.mark.parametrize("n_gpu_layers", LAYERS)
@pytest.mark.parametrize("heads", ["medusa", "hydra"])
@pytest.mark.parametrize("base", ["f32", "q8_0"])
def test_drafting_is_lossless(base: str, heads: str, n_gpu_layers: int, load: Callable[..., Llama]) -> None:
    """Where an answer differs, the logits of both passes differ by rounding, and explain the other token."""
    settings: dict[str, Any] = {"n_gpu_layers": n_gpu_layers, "kernels": "off"}
    llm, plain = load(base, heads=heads, **settings), load(base, **settings)
    generic("hydra")[2].apply(llm)
    llm.reset_draft_stats()
    for text in prompts()[::12]:
        prompt = plain.tokenize(text.encode(), special=True)
        a, b = decode(plain, prompt, 64, temp=0.0), decode(llm, prompt, 64, temp=0.0)
        if a != b:
            at = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            one, several = (logits_of(model, prompt, at) for model in (plain, llm))
            noise, gap = float(np.abs(one - several).max()), abs(float(one[a[at]]) - float(one[b[at]]))
            assert gap <= 2 * noise and noise < ROUNDING[base], f"token {at}: {gap} apart, noise {noise}"
    assert llm.draft_stats.n_accepted > 50


@pytest.mark.parametrize("n_gpu_layers", LAYERS)
@pytest.mark.parametrize("temp", [0.0, 0.8])
def test_reductions_give_the_same_tokens(temp: float, n_gpu_layers: int, load: Callable[..., Llama]) -> None:
    """Equal passes, read in three ways."""
    answers = []
    for mode in ("host", "rows", "device"):
        llm = load(heads="hydra", n_gpu_layers=n_gpu_layers, kernels="off", outputs=mode)
        generic("hydra")[2].apply(llm)
        llm.set_seed(5)
        prompt = llm.tokenize(prompts("gsm8k")[1].encode(), special=True)
        answers.append(decode(llm, prompt, 96, temp=temp))
    assert answers[0] == answers[1] == answers[2]


def test_nothing_large_is_copied(load: Callable[..., Llama]) -> None:
    llm = load(heads="hydra", n_gpu_layers=-1, kernels="off")
    assert llm.draft_stats.outputs.mode == "device", llm.draft_stats.outputs
    generic("hydra")[2].apply(llm)
    prompt = llm.tokenize(prompts("gsm8k")[1].encode(), special=True)
    decode(llm, prompt, 24, temp=0.0)
    llm.reset_draft_stats()
    decode(llm, prompt, 64, temp=0.0)
    stats = llm.draft_stats
    n_nodes = stats.n_steps + stats.n_drafted
    assert stats.traffic.n_rows == 0
    assert stats.traffic.to_host <= 84 * (n_nodes + 1)
    assert stats.traffic.on_device >= 4 * llm.n_embd() * stats.n_steps
    assert stats.traffic.n_draft_graphs == 0
