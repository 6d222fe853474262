"""Log-probabilities without logits_all: those that llama-cpp-python reads from the logits of the whole context."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from entmtp import Engine, Llama, kernels
from entmtp.logprobs import score
from helpers.typed import DEMO

N_CTX = 512
SETTINGS: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}
PROMPTS = ["Once upon a time there was", "Q: There are 12 apples. How many are left?\nA:", "x", "Ä b 日本 c"]
ASKED: list[dict[str, Any]] = [
    {"temperature": 0.0, "max_tokens": 24, "logprobs": 3},
    {"temperature": 1.2, "seed": 5, "max_tokens": 20, "logprobs": 0},
    {"temperature": 0.7, "seed": 6, "max_tokens": 90, "logprobs": 7, "stop": [" the", "."]},
]
EXACT = pytest.mark.skipif(not kernels.available(), reason="bits are equal with the CPU kernels only")


@pytest.fixture(scope="module")
def reference() -> Iterator[llama_cpp.Llama]:
    """llama-cpp-python's own code, which keeps all logits; our kernels."""
    llm = Llama(DEMO, n_ctx=N_CTX, logits_all=True, **SETTINGS)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def engine(models: dict[str, Path]) -> Iterator[Engine]:
    with Engine(DEMO, slots=3, n_ctx=N_CTX, heads=models["hydra"], calibrate=False, **SETTINGS) as engine:
        yield engine


@pytest.fixture(params=["plain", "drafted", "slot"])
def llm(request: pytest.FixtureRequest, models: dict[str, Path], engine: Engine) -> Iterator[Llama]:
    if request.param == "slot":
        with engine.slot() as slot:
            yield slot
        return
    draft = (
        {"draft": "entmtp", "heads": models["hydra"], "calibrate": False}
        if request.param == "drafted"
        else {}
    )
    llm = Llama(DEMO, n_ctx=N_CTX, **draft, **SETTINGS)
    yield llm
    llm.close()


def of(llm: llama_cpp.Llama, prompt: Any, **asked: Any) -> Any:
    llm.reset()
    return llm.create_completion(prompt, **asked)["choices"][0]


def merged(chunks: Any) -> dict[str, Any]:
    """The text and the logprobs of a stream."""
    found: dict[str, Any] = {"text": ""}
    for chunk in chunks:
        choice = chunk["choices"][0]
        found["text"] += choice["text"]
        for name, values in (choice["logprobs"] or {}).items():
            found.setdefault(name, []).extend(values)
    return found


@EXACT
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_they_are_llama_cpp_pythons(
    llm: Llama, reference: llama_cpp.Llama, prompt: str, asked: dict[str, Any]
) -> None:
    expected = of(reference, prompt, **asked)
    found = of(llm, prompt, **asked)
    assert found == expected and found["logprobs"]["token_logprobs"]
    assert not llm.logits_all


@EXACT
@pytest.mark.parametrize("asked", ASKED)
def test_a_stream_has_those_of_its_text(
    llm: Llama, reference: llama_cpp.Llama, asked: dict[str, Any]
) -> None:
    for prompt in PROMPTS:
        whole = of(reference, prompt, **asked)
        chunks = list(llm.create_completion(prompt, stream=True, **asked))
        found = merged(chunks)
        assert found.pop("text") == whole["text"]
        told = len(found.get("tokens", []))  # a stop sequence is not
        assert found == {name: values[:told] for name, values in whole["logprobs"].items()} or not told
        assert told == len(whole["logprobs"]["tokens"]) or whole["finish_reason"] == "stop"
        if whole["text"].isascii() and whole["finish_reason"] == "length":
            reference.reset()
            assert found == {
                k: v
                for k, v in merged(reference.create_completion(prompt, stream=True, **asked)).items()
                if k != "text"
            }


@EXACT
def test_characters_of_several_tokens_stay_whole(llm: Llama) -> None:
    """Bytes as tokens: what a piece of text has is what its tokens have together."""
    wanted = "日本 é"
    tokens = llm.tokenize(wanted.encode(), add_bos=False)
    bias = {llm.token_eos(): -100.0}
    forced = iter(tokens)

    def force(_: Any, scores: Any) -> Any:
        out = np.full_like(scores, -np.inf)
        out[next(forced)] = 0.0
        return out

    chunks = llm.create_completion(
        "x", max_tokens=len(tokens), temperature=0.0, logprobs=1, stream=True, logit_bias=bias,
        logits_processor=llama_cpp.LogitsProcessorList([force]),
    )  # fmt: skip
    found = merged(chunks)
    assert found["text"].strip() == wanted and len(found["tokens"]) == len(tokens) > len(wanted)
    assert found["text_offset"] == sorted(found["text_offset"])
    assert all(log_p < 0 for log_p in found["token_logprobs"])


@EXACT
@pytest.mark.parametrize("asked", ASKED)
@pytest.mark.parametrize("prompt", [*PROMPTS, " and so on" * 40])
def test_echo(llm: Llama, reference: llama_cpp.Llama, prompt: str, asked: dict[str, Any]) -> None:
    llm.create_completion(prompt + " What is known of it", max_tokens=4)  # is in the memory
    assert of(llm, prompt, echo=True, **asked) == of(reference, prompt, echo=True, **asked)


def test_echo_of_a_model_without_bos(engine: Engine) -> None:
    """Each token is scored by what came before it (llama-cpp-python: by itself), and the first one by nothing."""
    with engine.slot() as llm:
        tokens = llm.tokenize(b"The sea was calm", add_bos=False)
        echoed = of(llm, tokens, echo=False, logprobs=1, max_tokens=1, temperature=0.0)
        assert len(echoed["logprobs"]["tokens"]) == 1
        from entmtp.logprobs import Logprobs

        record = Logprobs(llm, 2, True, 0)
        record.read(tokens, llm.token_bos())
        rows = np.random.default_rng(0).normal(size=(len(tokens), llm.n_vocab())).astype(np.float32)
        record.see(rows[:1])
        record.see(rows[1:])
        told = record.all(lambda token: True)
    assert told["token_logprobs"][0] is None and len(told["tokens"]) == len(tokens)
    expected = [
        float(llama_cpp.Llama.logits_to_logprobs(r)[t]) for r, t in zip(rows, tokens[1:], strict=False)
    ]
    assert told["token_logprobs"][1:] == expected


@EXACT
def test_chats_of_several_at_a_time(engine: Engine, reference: llama_cpp.Llama) -> None:
    questions = [[{"role": "user", "content": f"{p} {i}"}] for i, p in enumerate(PROMPTS[:2] * 4)]
    asked = {"temperature": 0.0, "max_tokens": 20, "logprobs": True, "top_logprobs": 2}
    with ThreadPoolExecutor(4) as pool:
        streams = list(pool.map(lambda q: engine.submit(q, **asked), questions))
    for question, stream in zip(questions, streams, strict=True):
        reference.reset()
        choice = reference.create_chat_completion(question, **asked)["choices"][0]  # type: ignore[arg-type]
        assert stream.text == choice["message"]["content"]
        assert stream.logprobs["content"] == choice["logprobs"]["content"]


def test_ties_and_bounds() -> None:
    row = np.array([1.0, 3.0, 3.0, -np.inf, 2.0], np.float32)
    log_p = llama_cpp.Llama.logits_to_logprobs(row).tolist()
    ordered = [(i, p) for p, i in sorted(zip(log_p, range(5), strict=True), reverse=True)]
    for n in range(7):
        scored = score(row, 4, n)
        assert scored.best == ordered[:n] and scored.log_p == log_p[4]


def test_what_cannot_be(llm: Llama) -> None:
    with pytest.raises(ValueError, match="0 or more"):
        llm.create_completion("x", logprobs=-1)
    with pytest.raises(ValueError, match="exceed context window"):
        llm.create_completion("word " * N_CTX, logprobs=1)
    assert of(llm, "x", max_tokens=2)["logprobs"] is None  # what failed before left nothing behind


def test_a_stream_that_is_left_records_nothing_more(llm: Llama) -> None:
    chunks: Callable[[], Any] = llm.create_completion("Once", stream=True, logprobs=2, max_tokens=30).__next__
    first = chunks()
    assert first["choices"][0]["logprobs"]["tokens"]
    again = list(llm.create_completion("Once", stream=True, max_tokens=3))
    assert all(c["choices"][0]["logprobs"] is None for c in again)
