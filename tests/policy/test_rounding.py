"""Whether answers part at a tie: what rounding is, a model says itself."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

import numpy as np
import pytest

from entmtp import Llama
from entmtp.measure.rounding import Parting, logits_after, parting
from helpers.settings import prompts


def test_exact_kernels_have_no_noise(load: Callable[..., Llama]) -> None:
    llm = load("q8_0")
    assert llm.lossless == "exact"
    prompt = llm.tokenize(prompts("gsm8k")[0].encode(), special=True)
    answer = list(islice(llm.generate(prompt, temp=0.0), 30))
    one, several = (logits_after(llm, prompt, answer, size) for size in (1, 4))
    assert (one == several).all()
    assert parting(llm, prompt, answer, answer) is None
    assert parting(llm, prompt, answer, answer[:10]) is None  # it merely ends

    # another token than the best one is no tie: by the logits that drew it
    other = [*answer[:12], (answer[12] + 1) % llm.n_vocab(), *answer[13:]]
    found = parting(llm, prompt, answer, other)
    assert found is not None
    llm.reset()
    walk = llm.generate(prompt, temp=0.0)
    for _ in range(13):
        next(walk)
    logits = llm.decoder.logits(llm.n_vocab()).copy()
    walk.close()
    assert found == Parting(12, float(logits[answer[12]]) - float(logits[other[12]]), 0.0)
    assert not found.is_tie


def test_noise_is_what_passes_of_several_tokens_differ_by(load: Callable[..., Llama]) -> None:
    """ggml's own kernels: one token is computed otherwise than several."""
    llm = load("f16", kernels="off")
    prompt = llm.tokenize(prompts("gsm8k")[0].encode(), special=True)
    answer = list(islice(llm.generate(prompt, temp=0.0), 30))
    one = logits_after(llm, prompt, answer, 1)
    second = int(np.argsort(one)[-2])
    found = parting(llm, prompt, [*answer, int(one.argmax())], [*answer, second])
    assert found is not None
    assert 0.0 < found.noise < 0.5
    assert found.at == 30
    assert found.gap == pytest.approx(float(one.max() - one[second]))
    assert found.is_tie == (found.gap <= 2 * found.noise)
