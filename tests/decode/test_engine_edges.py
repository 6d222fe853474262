"""An engine beside what its users do: readers that give up, calls that fail or do not end, lent slots, arguments."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import llama_cpp
import numpy as np
import pytest

from entmtp import Engine, Llama, engine
from entmtp.common.errors import BusyError, EntmtpError
from entmtp.stream import Stream
from helpers.typed import DEMO

SETTINGS: dict[str, Any] = {
    "n_threads": 1,
    "n_threads_batch": 1,
    "verbose": False,
    "draft": None,
    "n_ctx": 128,
}
STORY = "The sea was calm and the"


@pytest.fixture(scope="module")
def pair() -> Iterator[Engine]:
    with Engine(DEMO, slots=2, **SETTINGS) as made:
        yield made


def chunk(text: str) -> dict[str, Any]:
    return {"choices": [{"text": text, "finish_reason": None}]}


# -- streams --


def test_a_text_that_failed_is_not_taken_for_a_short_one() -> None:
    """Whenever a reader looks: also between the end of what was written and what is said of it."""

    class Failed(Exception):
        pass

    def chunks() -> Iterator[dict[str, Any]]:
        yield chunk("a")
        raise Failed

    stream = Stream()
    with pytest.raises(Failed):
        stream.follow(chunks(), lambda: None)
    pieces = []
    with pytest.raises(Failed):
        for piece in stream:
            pieces.append(piece)
    assert pieces == ["a"]


def test_a_reader_that_gave_up_changes_nothing_for_others() -> None:
    stream = Stream()

    async def read() -> list[str]:
        return [piece async for piece in stream]

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(read(), 0.05))  # its loop is closed
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(asyncio.run, read())
        time.sleep(0.05)
        stream.follow(iter([chunk("a"), chunk("b")]), lambda: None)
        assert other.result(10) == ["a", "b"] and list(stream) == ["a", "b"]


def test_a_text_that_waits_is_over_when_it_is_cancelled(pair: Engine) -> None:
    with pair.slot(), pair.slot():
        waiting = pair.submit(STORY)
        waiting.cancel()
        assert waiting.text == "" and waiting.finish_reason is None  # while it has no slot


@pytest.mark.parametrize("error", [asyncio.CancelledError(), SystemExit(3), KeyboardInterrupt()])
def test_a_text_that_is_ended_by_what_is_no_error(pair: Engine, error: BaseException) -> None:
    def raises(tokens: Any, logits: Any) -> Any:
        raise error

    stream = pair.submit(STORY, max_tokens=4, logits_processor=llama_cpp.LogitsProcessorList([raises]))
    with pytest.raises(EntmtpError, match="the text was ended by"):
        _ = stream.text


def test_an_error_is_not_told_to_the_next_one() -> None:
    """A processor that raises, and a grammar that leads to nothing, in one text."""
    with Engine(DEMO, slots=1, **SETTINGS) as made:

        def raises(tokens: Any, logits: Any) -> Any:
            logits[:] = -np.inf
            raise RuntimeError("of the first")

        grammar = llama_cpp.LlamaGrammar.from_string('root ::= "zq" [^\\x00-\U0010ffff]', verbose=False)
        processors = llama_cpp.LogitsProcessorList([raises])
        with pytest.raises(RuntimeError, match="of the first"):
            _ = made.submit(STORY, max_tokens=8, logits_processor=processors, grammar=grammar).text
        assert made.submit(STORY, max_tokens=4).text


# -- slots --


def test_texts_without_a_seed_differ(pair: Engine) -> None:
    def texts() -> list[str]:
        streams = [pair.submit(STORY, max_tokens=16, temperature=1.0) for _ in range(4)]
        return [stream.text for stream in streams]

    assert len({*texts(), *texts()}) == 8
    seeded = [pair.submit(STORY, max_tokens=16, temperature=1.0, seed=5).text for _ in range(3)]
    assert len(set(seeded)) == 1
    again = [Engine(DEMO, slots=2, **SETTINGS) for _ in range(2)]
    one, other = ([e.submit(STORY, max_tokens=8, temperature=1.0).text for _ in range(3)] for e in again)
    assert one == other  # as a `Llama` that is made anew
    for e in again:
        e.close()


def test_a_slot_is_lent_without_the_text_of_others() -> None:
    with Engine(DEMO, slots=1, **SETTINGS) as made:
        want = made.submit(STORY, max_tokens=8, temperature=0).text
        with made.slot() as llm:
            assert llm.n_tokens == 0 and not llm.input_ids[:0].size
            tokens = llm.tokenize(STORY.encode())
            llm.eval(tokens)
            assert llm.n_tokens == len(tokens)
        stream = made.submit(STORY, max_tokens=100)
        next(iter(stream))
        stream.cancel()
        with made.slot() as llm:  # what was cancelled before is over
            llm.reset()
            llm.eval(tokens)
            llm.cancel()
            llm.reset()
            llm.eval(tokens)
        # cells of the same text are used again
        before = made.passes.tokens
        assert made.submit(STORY, max_tokens=8, temperature=0).text == want
        assert made.passes.tokens - before < len(tokens) + 4


def test_a_loop_in_a_lent_slot_keeps_its_room() -> None:
    """As with llama-cpp-python's own calls; the memory has room for one of the two texts."""
    settings = {**SETTINGS, "flash_attn": True}
    alone = Llama(DEMO, **settings)
    want = alone.create_completion(STORY, max_tokens=40, temperature=0)["choices"][0]["text"]
    with Engine(DEMO, slots=2, kv_tokens=64, **SETTINGS) as made, made.slot() as llm:
        tokens = llm.tokenize(STORY.encode())
        llm.eval(tokens)
        for _ in range(4):
            llm.eval([llm.sample(temp=0.0)])
        held = llm.n_tokens
        text = made.submit(STORY, max_tokens=64 - len(tokens) - 4, temperature=0)  # all there is: it waits
        time.sleep(0.3)
        llm.eval([llm.sample(temp=0.0)])
        assert llm.n_tokens == held + 1 == llm.decoder.n_held
        with pytest.raises(EntmtpError, match="the context is full"):
            llm.eval([5] * 60)
        llm.reset()
        made._stop_reserving(llm)
        assert text.text.startswith(want[:20])
    alone.close()


# -- closing --


def test_close_waits_for_calls_that_do_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CLOSE_WITHIN", 0.2)
    made, entered, goes_on = Engine(DEMO, slots=1, **SETTINGS), threading.Event(), threading.Event()

    def stands_still(tokens: Any, logits: Any) -> Any:
        entered.set()
        goes_on.wait(30)
        return logits

    def use() -> None:
        with made.slot() as llm:
            llm.create_completion(
                STORY, max_tokens=2, logits_processor=llama_cpp.LogitsProcessorList([stands_still])
            )

    user = threading.Thread(target=use)
    user.start()
    assert entered.wait(30)
    with pytest.raises(BusyError, match="did not end within"):
        made.close()
    with pytest.raises(EntmtpError, match="closed"):
        made.submit("x")
    goes_on.set()
    user.join(30)
    made.close()
    made.close()


def test_close_by_who_has_a_slot() -> None:
    with Engine(DEMO, slots=1, **SETTINGS) as made:
        with made.slot() as llm, pytest.raises(BusyError, match="give it back"):
            made.close()

        def closes(tokens: Any, logits: Any) -> Any:
            made.close()

        processors = llama_cpp.LogitsProcessorList([closes])
        with pytest.raises(BusyError, match="give it back"):
            _ = made.submit(STORY, max_tokens=2, logits_processor=processors).text
        assert made.submit(STORY, max_tokens=2).text
        del llm


def test_the_model_of_an_engine_is_its_own(pair: Engine) -> None:
    pair.host.close()
    with pytest.raises(ValueError, match="writes in its slots"):
        pair.host.create_completion(STORY)
    assert pair.submit(STORY, max_tokens=2).text


def test_a_text_that_comes_while_it_is_closed() -> None:
    made = Engine(DEMO, slots=1, **SETTINGS)
    made._workers.shutdown()  # as `close` does, on its way
    with pytest.raises(EntmtpError, match="the engine is closed"):
        made.submit("x")
    made.close()


@pytest.mark.parametrize(
    "given",
    [
        {"slots": "4"}, {"slots": 1.5}, {"n_ctx": -5}, {"n_ctx": "x"}, {"kv_tokens": 0}, {"kv_tokens": -5},
        {"kv_tokens": 2.5}, {"stall": -1.0}, {"stall": float("nan")}, {"n_ctx": 1 << 40},
    ],
)  # fmt: skip
def test_arguments_that_cannot_work(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"^{next(iter(given))} is .*must be"):
        Engine(DEMO, **{**SETTINGS, **given})


def test_the_context_that_the_model_was_trained_for() -> None:
    with Engine(DEMO, slots=1, **{**SETTINGS, "n_ctx": 0}) as made:
        assert made.n_ctx == Llama(DEMO, n_ctx=0, n_threads=1, verbose=False).n_ctx()


# -- texts that nobody waits for, lent slots --


def test_a_text_that_is_cancelled_while_its_prompt_is_read() -> None:
    """Before its tokens are known it waits for nothing: not for room, not for a pass."""
    with Engine(DEMO, slots=2, **{**SETTINGS, "n_ctx": 512, "kv_tokens": 600}) as made:
        other = made.submit(STORY, max_tokens=450, logit_bias={2: -100})
        next(iter(other))
        for tokens in ([5] * 300, "the sea " * 40):
            taken, goes_on = threading.Event(), threading.Event()
            read = Llama.tokenize

            def slow(
                self: Llama,
                *args: Any,
                taken: Any = taken,
                goes_on: Any = goes_on,
                read: Any = read,
                **how: Any,
            ) -> Any:
                taken.set()
                goes_on.wait(30)
                return read(self, *args, **how)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Llama, "tokenize", slow)
                given = {"stop": ["x"]} if isinstance(tokens, list) else {}
                text = made.submit(tokens, max_tokens=100, **given)
                if isinstance(tokens, str):
                    assert taken.wait(30)
                text.cancel()
                goes_on.set()
                assert text.text == ""
        other.cancel()
        assert made.submit(STORY, max_tokens=2).text


def test_a_lent_slot_does_not_know_what_was_asked_of_it_before() -> None:
    """What a text may come to is its own affair: an earlier answer of one token leaves no room for one alone."""
    with Engine(DEMO, slots=1, **SETTINGS) as made:
        for _ in range(2):
            with made.slot() as llm:
                llm.create_completion(STORY, max_tokens=1)
                with pytest.raises(ValueError, match="exceed context window"):
                    llm.create_completion([5] * 500, max_tokens=1)
                for n, _ in enumerate(llm.generate(llm.tokenize(STORY.encode()))):
                    assert len(made._reserved[llm]) == made.n_ctx
                    if n == 3:
                        break


def test_room_for_less_than_a_context() -> None:
    """A text without a limit, as of a chat, ends where the room does."""
    with Engine(DEMO, slots=2, kv_tokens=64, **SETTINGS) as made:
        assert made.n_ctx == 64
        streams = [made.submit(STORY, max_tokens=None, temperature=0, logit_bias={2: -100}) for _ in range(3)]
        assert len({stream.text for stream in streams}) == 1 and streams[0].text
        assert [stream.finish_reason for stream in streams] == ["length"] * 3


def test_all_slots_in_one_thread(pair: Engine) -> None:
    with pair.slot(), pair.slot(), pytest.raises(BusyError, match="this thread has all slots"), pair.slot():
        pass
    with pair.slot() as llm:
        assert llm.create_completion(STORY, max_tokens=1)


def test_a_call_of_a_named_tool() -> None:
    city = {"type": "object", "properties": {"city": {"enum": ["Rome"]}}, "required": ["city"]}
    tool = {"type": "function", "function": {"name": "weather", "description": "", "parameters": city}}
    with Engine(DEMO, slots=1, chat_format="chatml", **SETTINGS) as made:
        stream = made.submit(
            [{"role": "user", "content": "Rome?"}], max_tokens=60, tools=[tool],
            tool_choice={"type": "function", "function": {"name": "weather"}},
        )  # fmt: skip
        stream.text  # noqa: B018
        [call] = stream.tool_calls
        assert call["type"] == "function" and call["id"]
        assert call["function"]["name"] == "weather"
        assert json.loads(call["function"]["arguments"]) == {"city": "Rome"}
