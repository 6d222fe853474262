"""Tokens whose values overflow the cache (f16): where they are no part of a text, they leave no trace in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest

from entmtp import Engine, Llama
from helpers.models import SPECS, write_model

OVERFLOWING = range(100, 140)  # tokens
GOOD, BAD = [5, 6, 7, 8, 9, 10, 11, 5, 6, 7, 8], [5, 6, 101, 102, 7, 103]
SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "verbose": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All weights are finite; a dimension that only these tokens have becomes values of 1e5."""
    path = write_model(tmp_path_factory.mktemp("model") / "overflow.gguf", SPECS["llama"], seed=3)
    weights = {t.name: t.data for t in gguf.GGUFReader(path, "r+").tensors}
    embeddings = weights["token_embd.weight"]
    embeddings[:, 0], embeddings[OVERFLOWING] = 0, 0
    embeddings[OVERFLOWING, 0] = 1
    weights["blk.0.attn_v.weight"][:, 0] = 1e5
    return path


def text(llm: Any, prompt: list[int], n: int = 100, temp: float = 0.0) -> list[int]:
    def banned(tokens: Any, logits: Any) -> Any:
        logits[OVERFLOWING] = -np.inf
        return logits

    llm.set_seed(4)
    tokens = llm.generate(prompt, temp=temp, logits_processor=llama_cpp.LogitsProcessorList([banned]))
    return [token for _, token in zip(range(n), tokens, strict=False)]


@pytest.mark.parametrize("flash_attn", [False, True])
def test_what_is_no_part_of_a_text_leaves_no_trace(model: Path, flash_attn: bool) -> None:
    settings = {**SETTINGS, "flash_attn": flash_attn}
    llm = Llama(model, **settings)
    want = [text(llm, GOOD), text(llm, GOOD, temp=0.9)]
    assert want[0] != text(llm, BAD) and len(set(want[0])) > 10
    llm.reset()
    assert text(llm, GOOD) == want[0]
    llm.close()

    llm = Llama(model, draft="entmtp", calibrate=False, **settings)
    llm.set_trees("mc_sim_7b_63", policy="static")
    assert [text(llm, GOOD), text(llm, GOOD, temp=0.9)] == want
    assert llm.draft_stats.n_drafted > 0  # such tokens were among the guesses
    llm.reset()
    text(llm, BAD, 5)
    llm.reset()
    assert text(llm, GOOD) == want[0]
    llm.close()

    with (
        Engine(model, slots=2, draft=None, **settings) as engine,
        engine.slot() as one,
        engine.slot() as other,
    ):
        bad = other.generate(BAD)
        next(bad)
        assert text(one, GOOD) == want[0]
