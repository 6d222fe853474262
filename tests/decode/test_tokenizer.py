"""Streamed text is llama-cpp-python's, chunk by chunk, without its n² calls."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from llama_cpp.llama_tokenizer import LlamaTokenizer

import entmtp
from entmtp.models.tokenizer import SHORT
from helpers.settings import F32, prompts

GRAMMAR = 'root ::= "naïve 🙂 日本語 " [a-z ]{4} "Ελλάδα 🏳️‍🌈" [é🙂]*'


@pytest.fixture(scope="module")
def stock(models: dict[str, Path]) -> Iterator[llama_cpp.Llama]:
    settings = {k: v for k, v in F32.items() if k != "calibrate"}
    llm = llama_cpp.Llama(str(models["f32"]), **settings)
    yield llm
    llm.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 90, "temperature": 0.0},
        {"max_tokens": 120, "temperature": 0.8, "seed": 3, "stop": ["\n\n", "return", "the "]},
        {"max_tokens": 40, "temperature": 1.5, "seed": 7, "stop": "e"},
        {"max_tokens": 60, "temperature": 1.0, "seed": 5, "grammar": GRAMMAR},
        {"max_tokens": 41, "temperature": 1.0, "seed": 6, "grammar": GRAMMAR, "stop": ["日本x", "🙂🙂"]},
    ],
    ids=["greedy", "stop", "short stop", "unicode", "unicode stop"],
)
def test_chunks_are_llama_cpp_pythons(
    load: Callable[..., entmtp.Llama], stock: llama_cpp.Llama, settings: dict[str, Any]
) -> None:
    ours = load("f32", "hydra")
    settings = dict(settings)
    grammar = settings.pop("grammar", None)

    def answer(llm: llama_cpp.Llama, text: str, stream: bool) -> list[tuple[str, str | None]]:
        if grammar:
            settings["grammar"] = llama_cpp.LlamaGrammar.from_string(grammar, verbose=False)
        llm.reset()
        got: Any = llm.create_completion(text, stream=stream, **settings)
        return [
            (c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in (got if stream else [got])
        ]

    for text in prompts("gsm8k")[:1]:
        for stream in (True, False):
            assert answer(ours, text, stream) == answer(stock, text, stream)


def test_detokenize_is_the_stock_one(load: Callable[..., entmtp.Llama]) -> None:
    llm = load("f32")
    stock = LlamaTokenizer(llm)
    rng = random.Random(0)
    growing: list[int] = [llm.token_bos()]
    for i in range(6 * SHORT):
        growing.append(rng.randrange(llm.n_vocab()))
        assert llm.detokenize(growing) == stock.detokenize(growing)
        if i % 50 == 0:  # the caller changes his list: earlier text must not come back
            growing[rng.randrange(len(growing))] = rng.randrange(llm.n_vocab())
        if i % 120 == 0:
            other = [rng.randrange(llm.n_vocab()) for _ in range(rng.randrange(3 * SHORT))]
            assert llm.detokenize(other) == stock.detokenize(other)
            assert llm.detokenize(other, special=True) == stock.detokenize(other, special=True)
    assert llm.detokenize([]) == b""


def test_each_token_is_asked_for_once(
    load: Callable[..., entmtp.Llama], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load("f32")
    calls = 0
    real = llama_cpp.llama_token_to_piece

    def counting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return real(*args)

    monkeypatch.setattr(llama_cpp, "llama_token_to_piece", counting)
    monkeypatch.setattr(llama_cpp.llama_cpp, "llama_token_to_piece", counting)
    llm.tokenizer_ = type(llm.tokenizer_)(llm)
    stream: Any = llm.create_completion(
        "It was a cold night", max_tokens=200, temperature=0.9, seed=1, stream=True
    )
    text = "".join(c["choices"][0]["text"] for c in stream)
    assert len(text) > 200
    assert 0 < calls <= 201
