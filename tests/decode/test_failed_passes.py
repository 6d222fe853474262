"""A pass that is stopped or fails leaves a model that evaluates again, and gives the tokens it always gave."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from entmtp import EntmtpError, Llama
from entmtp.models import demo_files
from helpers.settings import F32, prompts

STATIC: dict[str, Any] = {"trees": "generic-hydra:n8", "policy": "static"}
DRAFTING = {"plain": {}, "drafting": {"heads": "hydra", **STATIC}}


class Stop:
    """An abort callback that stops at one of its calls."""

    def __init__(self, llm: Llama):
        self.llm, self.n_calls, self.at = llm, 0, -1
        self.callback = llama_cpp.ggml_abort_callback(self.call)
        llama_cpp.llama_set_abort_callback(llm.ctx, self.callback, None)

    def call(self, _: Any) -> bool:
        self.n_calls += 1
        return self.n_calls - 1 == self.at

    def arm(self, at: int) -> None:
        self.n_calls, self.at = 0, at


def first(llm: Llama, prompt: list[int], n: int = 6) -> list[int]:
    return list(islice(llm.generate(prompt, temp=0.0), n))


@pytest.fixture(params=DRAFTING, ids=list(DRAFTING))
def llm(request: pytest.FixtureRequest, models: dict[str, Path]) -> Any:
    settings: dict[str, Any] = {**DRAFTING[request.param]}
    if heads := settings.pop("heads", None):
        settings |= {"draft": "entmtp", "heads": models[heads]}
    llm = Llama(models["f32"], **{**F32, "n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, **settings})
    yield llm
    llm.close()


def test_stopped_at_every_point_of_its_passes(llm: Llama) -> None:
    prompt = llm.tokenize(b"def add(a, b):\n    return")
    expected = first(llm, prompt)
    stop = Stop(llm)
    llm.reset()
    stop.arm(-1)
    assert first(llm, prompt) == expected
    total = stop.n_calls
    assert total > 100, "the callback is not asked often enough to prove anything"
    n_cut = 0
    for at in range(0, total, 7):
        llm.reset()
        stop.arm(at)
        cut = first(llm, prompt)
        n_cut += len(cut) < len(expected)
        assert cut == expected[: len(cut)]
        stop.arm(-1)
        assert first(llm, prompt) == expected, f"after a stop at call {at} of {total}"
    assert n_cut > total // 7 - 10  # nearly every one of them stopped something


def test_a_stop_in_the_answer_then_the_same_prompt(llm: Llama) -> None:
    """The prompt is in the memory, its logits are not."""
    prompt = llm.tokenize(b"def add(a, b):\n    return")
    expected = first(llm, prompt)
    walk = llm.generate(prompt, temp=0.0)
    next(walk)
    llm.cancel()
    rest = list(islice(walk, 20))  # a tree in flight may still be walked; then the next pass is refused
    assert len(rest) < 20
    assert first(llm, prompt) == expected


def test_a_chat_that_is_stopped_before_its_first_token(llm: Llama) -> None:
    """With a template's own ends of text, which are asked for after the last token: there is none."""
    stop = Stop(llm)
    llm.reset()
    stop.arm(0)
    messages = [{"role": "user", "content": "How many apples are in 3 boxes of 4 apples?"}]
    stopped = llm.create_chat_completion(messages, max_tokens=8, temperature=0.0)
    assert stopped["choices"][0]["message"]["content"] == ""
    stop.arm(-1)
    whole = llm.create_chat_completion(messages, max_tokens=8, temperature=0.0)
    assert whole["choices"][0]["message"]["content"]


def test_full_context_then_what_fits(llm: Llama) -> None:
    prompt = llm.tokenize(b"def add(a, b):\n    return")
    expected = first(llm, prompt)
    long = llm.tokenize(prompts("humaneval")[0].encode() * 4)
    assert len(long) > llm.n_ctx()
    for _ in range(2):
        with pytest.raises(EntmtpError, match=f"do not fit into {llm.n_ctx()}"):
            first(llm, long)
        assert first(llm, prompt) == expected
    # until the context is full, then again
    to_the_end = []
    with pytest.raises(EntmtpError, match="context is full"):
        for token in llm.generate(prompt, temp=0.0):
            to_the_end.append(token)
    assert len(to_the_end) + len(prompt) in (llm.n_ctx(), llm.n_ctx() + 1)
    assert first(llm, prompt) == expected


def test_an_empty_prompt_has_nothing_to_go_on_from(llm: Llama) -> None:
    """The logits that are there belong to somebody else's request."""
    prompt = llm.tokenize(b"The secret word is")
    first(llm, prompt)
    for empty in (lambda: llm.create_completion([], max_tokens=1), lambda: next(llm.generate([]))):
        with pytest.raises(ValueError, match="prompt is empty"):
            empty()
    first(llm, prompt)
    llm.reset()
    with pytest.raises(EntmtpError, match="no logits to sample from"):
        llm.sample(temp=0.0)
    # going on without a prompt is asked for in so many words; the third token was drawn, and not evaluated
    whole = first(llm, prompt)
    assert first(llm, prompt, 3) == whole[:3]
    assert list(islice(llm.generate([], temp=0.0, reset=False), 1)) == whole[2:3]


@pytest.mark.parametrize("settings", [{"n_ctx": 8}, {"n_ctx": 8, "logits_all": True}, {"n_ctx": 100}])
@pytest.mark.parametrize("drafting", DRAFTING)
def test_contexts_that_llama_cpp_rounds_up(settings: dict[str, Any], drafting: str) -> None:
    model, heads = demo_files()
    more = {"draft": "entmtp", "heads": heads, **STATIC} if drafting == "drafting" else {}
    small = Llama(model, **{**F32, **settings, **more})
    large = Llama(model, **F32)
    assert small.n_ctx() >= 256
    prompt = small.tokenize(b"def add(a, b):\n    return")
    expected = first(large, prompt, 60)
    assert first(small, prompt, 60) == expected
    assert first(small, prompt + expected[:5], 20) == expected[5:25]  # a prefix that lies in the memory
    assert small.input_ids[: len(prompt)].tolist() == prompt
    small.close()
    large.close()


@pytest.mark.parametrize("settings", [{"n_batch": 1}, {"n_ubatch": 1}])
def test_passes_of_one_token_hold_no_tree(settings: dict[str, Any]) -> None:
    model, heads = demo_files()
    with pytest.raises(EntmtpError, match=r"n_batch=1 or n_ubatch=1.*cannot hold a token tree"):
        Llama(model, draft="entmtp", heads=heads, **{**F32, **settings})
    plain, usual = Llama(model, **{**F32, **settings}), Llama(model, **F32)
    prompt = plain.tokenize(b"def add(a, b):\n    return")
    assert first(plain, prompt) == first(usual, prompt)
    plain.close()
    usual.close()


def test_quiet_models_say_nothing(llm: Llama, capfd: pytest.CaptureFixture[str]) -> None:
    prompt = llm.tokenize(b"def add(a, b):\n    return")
    stop = Stop(llm)
    stop.arm(5)
    assert first(llm, prompt) == []
    stop.arm(-1)
    with pytest.raises(EntmtpError, match="context is full"):
        for _ in llm.generate(prompt, temp=0.0):
            pass
    assert capfd.readouterr() == ("", "")


def test_cancelled_from_another_thread_at_any_time(load: Callable[..., Llama]) -> None:
    """Whenever the cancellation comes, what was given is right, and the next call gives all of it."""
    import threading

    llm = load(heads="hydra", **STATIC)
    prompt = llm.tokenize(prompts("humaneval")[0].encode())
    expected = first(llm, prompt, 40)
    n_stopped = 0
    for i in range(30):
        timer = threading.Timer(0.0004 * i, llm.cancel)
        timer.start()
        llm.reset()
        cut = first(llm, prompt, 40)
        timer.join()
        n_stopped += len(cut) < 40
        assert cut == expected[: len(cut)]
        assert first(llm, prompt, 40) == expected
    assert n_stopped, "no cancellation came in time: this run proves nothing"
