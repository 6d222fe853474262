"""Answers that end before they were told to: cancelled, or with the context full in the middle of a character."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest
from llama_cpp import StoppingCriteriaList

from entmtp import Engine, Llama
from helpers.models import model_path
from helpers.settings import prompts

SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
PROMPT = list(b"the beginning of a text")
BEGUN = {0xF0: 100.0}  # the first of four bytes, always


@pytest.mark.parametrize("draft", [None, "entmtp"])
@pytest.mark.parametrize("bias", [BEGUN, {}], ids=["begun", "random"])
def test_the_context_ends_within_a_character(draft: str | None, bias: dict[int, float]) -> None:
    """llama-cpp-python goes on for the rest of a character, and so beyond the last token that fits."""
    with closing(Llama(model_path("llama"), draft=draft, **SETTINGS)) as llm:
        asked: dict[str, Any] = {"max_tokens": None, "logit_bias": bias, "seed": 5, "temperature": 1.5}
        for _ in range(4):
            whole = llm.create_completion(PROMPT, **asked)
            n = whole["usage"]["completion_tokens"]
            assert whole["choices"][0]["finish_reason"] == "length"
            assert len(PROMPT) + n in (llm.n_ctx(), llm.n_ctx() + 1)
            text = llm.detokenize(llm.input_ids[len(PROMPT) : llm.n_tokens].tolist())
            assert whole["choices"][0]["text"].startswith(text.decode("utf-8", "ignore"))
            chunks = list(llm.create_completion(PROMPT, stream=True, **asked))
            assert chunks[-1]["choices"][0]["finish_reason"] == "length"
            with pytest.raises(
                RuntimeError, match="context is full"
            ):  # as before, where tokens are asked for
                list(llm.generate(PROMPT, temp=0.0))
            asked["seed"] += 1


@pytest.mark.parametrize("draft", [None, "entmtp"])
def test_no_more_than_the_rest_of_a_character(draft: str | None) -> None:
    """llama-cpp-python looks at no limit while a character is not complete, which may be never."""
    with closing(Llama(model_path("llama"), draft=draft, **SETTINGS)) as llm:
        asked: dict[str, Any] = {"max_tokens": 5, "logit_bias": BEGUN}
        for how in ({}, {"logprobs": 1}):
            answer = llm.create_completion(PROMPT, **asked, **how)
            assert answer["usage"]["completion_tokens"] == 5 + 3
            assert answer["choices"][0]["finish_reason"] == "length"
        assert llm.create_completion(PROMPT, None, 2, logit_bias=BEGUN)["usage"]["completion_tokens"] == 2 + 3
        llm.reset()
        chunks = list(llm.create_completion(PROMPT, stream=True, **asked))
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert llm.n_tokens == len(PROMPT) + 5 + 2  # the last one is not evaluated
        whole = llm.create_completion(PROMPT, max_tokens=5, logit_bias={ord("a"): 100.0})
        assert whole["choices"][0]["text"] == "aaaaa" and whole["usage"]["completion_tokens"] == 5


def test_with_a_criterion_of_ones_own() -> None:
    with closing(Llama(model_path("llama"), **SETTINGS)) as llm:
        asked: dict[str, Any] = {"max_tokens": None, "logit_bias": BEGUN}
        for at, reason in ((40, "stop"), (10_000, "length")):
            criteria = [lambda tokens, _, at=at: len(tokens) >= at]
            stops = StoppingCriteriaList(criteria)
            answer = llm.create_completion(PROMPT, stopping_criteria=stops, **asked)
            assert answer["choices"][0]["finish_reason"] == reason


@pytest.mark.parametrize("how", [{}, {"logprobs": 2}, {"echo": True}], ids=str)
def test_a_cancelled_answer_keeps_its_text(load: Callable[..., Llama], how: dict[str, Any]) -> None:
    prompt = prompts("gsm8k")[0]
    for heads in (None, "hydra"):
        llm = load(heads=heads)
        asked: dict[str, Any] = {"max_tokens": 60, "temperature": 0.0, **how}
        expected = llm.create_completion(prompt, **asked)["choices"][0]["text"]
        seen = 0

        def cancel(token: int, guessed: int, llm: Llama = llm) -> None:
            nonlocal seen
            seen += 1
            if seen == 20:
                llm.cancel()

        llm.on_token = cancel
        answer = llm.create_completion(prompt, **asked)
        llm.on_token = None
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 20
        text = choice["text"]
        assert expected.startswith(text) and len(text) > (len(prompt) if how.get("echo") else 0) + 20
        if "logprobs" in how:
            assert len(choice["logprobs"]["tokens"]) == 20


def test_a_slot_of_an_engine_ends_in_the_same_way() -> None:
    with closing(Engine(model_path("llama"), slots=2, **SETTINGS)) as engine:
        streams = [engine.submit(PROMPT, max_tokens=None, logit_bias=BEGUN) for _ in range(2)]
        for stream in streams:
            assert stream.text == "" and stream.finish_reason == "length"
        with engine.slot() as llm:
            answer = llm.create_completion(PROMPT, max_tokens=None, logit_bias=BEGUN)
            assert answer["choices"][0]["finish_reason"] == "length"
