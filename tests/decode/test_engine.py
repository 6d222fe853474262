"""Several texts in shared passes: each is what it would be alone, whoever comes, goes and fails meanwhile."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import LogitsProcessorList

from entmtp import BusyError, Engine, EntmtpError, Llama, kernels
from entmtp.convert import convert
from entmtp.stream import Stream
from helpers.checkpoints import hydra_config, hydra_state, tiny_base, write_checkpoint
from helpers.models import model_path
from helpers.typed import DEMO

SETTINGS: dict[str, Any] = {"n_threads": 1, "verbose": False, "calibrate": False}
N_CTX = 512
PROMPTS = [
    "Once upon a time there was",
    "def fibonacci(n):\n    ",
    "Q: There are 12 apples and 5 are eaten. How many are left?\nA:",
    "The sea was calm and the",
    "3 + 4 = 7. 5 + 6 = 11. 7 + 8 =",
    "x",
]


class Alone:
    """What a `Llama` writes by itself, each request in a fresh state."""

    def __init__(self, **more: Any):
        self.llm = Llama(DEMO, n_ctx=N_CTX, flash_attn=True, **{**SETTINGS, **more})
        self.known: dict[str, str] = {}

    def text(self, prompt: str, **settings: Any) -> str:
        key = repr((prompt, sorted(settings.items())))
        if key not in self.known:
            self.llm.reset()
            self.known[key] = self.llm.create_completion(prompt, **settings)["choices"][0]["text"]
        return self.known[key]


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    single = Alone()
    yield single
    single.llm.close()


@pytest.fixture(scope="module", params=["plain", "text", "heads", "static"])
def engine(request: pytest.FixtureRequest, models: dict[str, Path]) -> Iterator[Engine]:
    draft: dict[str, Any] = {
        "plain": {"draft": None},
        "text": {"drafters": ["text", "recycling"], "adapt": False},
        "heads": {"heads": models["hydra"], "adapt": False},
        "static": {"heads": models["hydra"], "trees": "generic-hydra:n8", "policy": "static"},
    }[request.param]
    with Engine(DEMO, slots=4, n_ctx=N_CTX, **SETTINGS, **draft) as made:
        yield made


needs_kernels = pytest.mark.skipif(not kernels.available(), reason="bits are equal with the CPU kernels only")


@needs_kernels
def test_texts_are_what_they_are_alone(engine: Engine, alone: Alone) -> None:
    requests = [
        (prompt, {"max_tokens": n, "temperature": temp, "seed": seed})
        for seed, n in ((1, 40), (2, 7), (3, 90))
        for temp in (0.0, 0.9)
        for prompt in PROMPTS
    ]
    random.Random(4).shuffle(requests)
    streams = [engine.submit(prompt, **settings) for prompt, settings in requests]
    for (prompt, settings), stream in zip(requests, streams, strict=True):
        assert stream.text == alone.text(prompt, **settings), (prompt, settings)
        assert stream.finish_reason in ("stop", "length")
    assert engine.passes.parts > 2 * engine.passes.n
    if engine.host.bank is not None:
        accepted = sum(s.draft_stats.n_accepted for s in engine.slots)
        assert accepted > (200 if engine.host.policy == "static" else 5)


@needs_kernels
def test_arrivals_cancels_and_failures_of_others(engine: Engine, alone: Alone) -> None:
    """Users come at any time; some leave, some ask for what cannot be."""
    rng = random.Random(5)
    kept: list[tuple[str, dict[str, Any], Stream]] = []
    failing: list[Stream] = []
    for i in range(60):
        prompt = rng.choice(PROMPTS) * rng.choice((1, 1, 12))  # long prompts come in pieces
        settings = {"max_tokens": rng.randrange(1, 80), "temperature": rng.choice((0.0, 1.2)), "seed": i % 7}
        stream = engine.submit(prompt, **settings)
        kind = rng.random()
        if kind < 0.25:
            threading.Timer(rng.random() * 0.02, stream.cancel).start()
        elif kind < 0.35:
            failing.append(engine.submit(prompt, temperature=-1.0))
            kept.append((prompt, settings, stream))
        else:
            kept.append((prompt, settings, stream))
        time.sleep(rng.random() * 0.01)
    for prompt, settings, stream in kept:
        assert stream.text == alone.text(prompt, **settings)
    for stream in failing:
        with pytest.raises(ValueError, match="temperature"):
            _ = stream.text


@needs_kernels
def test_a_reader_who_is_slow_holds_nobody_up(engine: Engine, alone: Alone) -> None:
    """A generator that is not asked for its next token is left out, and goes on later as if nothing had been."""
    prompt, settings = PROMPTS[0], {"max_tokens": 30, "temperature": 0.9, "seed": 3}
    with engine.slot() as llm:
        chunks = llm.create_completion(prompt, stream=True, **settings)
        text = next(chunks)["choices"][0]["text"]
        for other in (1, 2, 3):
            assert engine.submit(PROMPTS[other], max_tokens=40).text
            text += next(chunks)["choices"][0]["text"]
        text += "".join(c["choices"][0]["text"] for c in chunks)
    assert text == alone.text(prompt, **settings)


def test_what_others_have_read_is_not_read_again(engine: Engine, alone: Alone) -> None:
    system = "You are a helpful assistant who answers briefly and never lies to anybody. " * 8
    n = len(engine.host.tokenize(system.encode()))
    for slot in engine.slots:
        slot.decoder.clear()
    settings: dict[str, Any] = {"max_tokens": 2, "temperature": 0.0}
    assert engine.submit(system + "One.", **settings).text == alone.text(system + "One.", **settings)
    before = engine.passes.tokens
    for end in ("Two.", "Three.", "Four."):
        assert engine.submit(system + end, **settings).text == alone.text(system + end, **settings)
    assert n > 100 and engine.passes.tokens - before < n


def test_memory_is_shared_out(alone: Alone) -> None:
    with Engine(DEMO, slots=3, n_ctx=256, kv_tokens=300, draft=None, **SETTINGS) as engine:
        streams = [engine.submit(p, max_tokens=150, temperature=0.0) for p in PROMPTS]
        for prompt, stream in zip(PROMPTS, streams, strict=True):
            assert stream.text == alone.text(prompt, max_tokens=150, temperature=0.0)
        with (
            pytest.raises(ValueError, match=r"come to 301 tokens.*room for 300 \(kv_tokens\)"),
            engine.room_for(engine.slots[0], 301),
        ):
            pass


@needs_kernels
def test_what_slots_keep_gives_way(alone: Alone) -> None:
    """Also what those keep that wait for room themselves: several slots of long texts, and room for one."""
    settings: dict[str, Any] = {"max_tokens": 200, "temperature": 0.0}
    with Engine(DEMO, slots=4, n_ctx=256, kv_tokens=256, draft=None, **SETTINGS) as engine:
        for _ in range(3):
            streams = [engine.submit(p, **settings) for p in PROMPTS]
            for prompt, stream in zip(PROMPTS, streams, strict=True):
                assert stream.text == alone.text(prompt, **settings)


def test_cancelled_while_it_waits_for_room(alone: Alone) -> None:
    """It costs nothing any more, however long the one goes on that has the room."""
    with Engine(DEMO, slots=2, n_ctx=256, kv_tokens=256, draft=None, **SETTINGS) as engine:
        with engine.slot() as llm:
            chunks = llm.create_completion(PROMPTS[0], stream=True, max_tokens=200, temperature=0.0)
            text = next(chunks)["choices"][0]["text"]
            waiting = engine.submit(PROMPTS[1] * 8, max_tokens=100)
            time.sleep(0.2)
            before = engine.passes.tokens
            waiting.cancel()
            assert waiting.text == "" and engine.passes.tokens == before
            text += "".join(c["choices"][0]["text"] for c in chunks)
        assert text == alone.text(PROMPTS[0], max_tokens=200, temperature=0.0)
        assert engine.submit(PROMPTS[2], max_tokens=9).text  # the room is there again


def test_a_pass_has_a_token_of_each() -> None:
    """llama.cpp ends the process over passes of fewer."""
    with Engine(DEMO, slots=3, n_ctx=256, n_batch=2, **SETTINGS) as engine:
        streams = [engine.submit(p, max_tokens=8) for p in PROMPTS]
        assert all(stream.text for stream in streams)


def test_async_readers(engine: Engine, alone: Alone) -> None:
    async def read(prompt: str) -> str:
        return "".join([piece async for piece in engine.submit(prompt, max_tokens=25, temperature=0.0)])

    async def all_of_them() -> list[str]:
        return await asyncio.gather(*map(read, PROMPTS))

    assert asyncio.run(all_of_them()) == [alone.text(p, max_tokens=25, temperature=0.0) for p in PROMPTS]


def test_what_a_slot_does_not_do(engine: Engine) -> None:
    with engine.slot() as slot:
        for call in (slot.save_state, slot.set_threads, slot.set_trees, lambda: slot.embed("x")):
            with pytest.raises(ValueError, match=r"engine|Llama"):
                call()
        assert slot.n_ctx() == N_CTX
        with pytest.raises(ValueError, match="exceed context window"):
            slot.create_completion("word " * N_CTX)


def test_heads_that_hold_one_text_are_left_out(tmp_path: Path) -> None:
    """Hydra++ has a layer with a cache of its own."""
    base, heads = tiny_base(tmp_path / "base.gguf"), tmp_path / "heads.gguf"
    state, config = hydra_state(3, 1, grounded=True, prefix=True, seed=0), hydra_config(3, 1, True, True)
    convert(write_checkpoint(tmp_path / "hydra++", state, config), base, heads, progress=False)
    settings: dict[str, Any] = {**SETTINGS, "flash_attn": False}
    prompts = [[1, 5, 9], [2, 2, 2, 7], [3, 1, 4, 1, 5]]
    with Engine(base, slots=3, n_ctx=128, heads=heads, adapt=False, **settings) as engine:
        assert engine.host.heads_path
        answers = [[*islice(s.generate(p, temp=0.0), 40)] for s, p in zip(engine.slots, prompts, strict=True)]
        assert all(s.draft_stats.accepted_by.get("heads", 0) == 0 for s in engine.slots)
    llm = Llama(base, n_ctx=128, **settings)
    assert answers == [[*islice(llm.generate(p, temp=0.0), 40)] for p in prompts]
    llm.close()


def test_a_closed_engine_says_so() -> None:
    engine = Engine(DEMO, slots=2, n_ctx=128, **SETTINGS)
    stream = engine.submit(PROMPTS[0], max_tokens=100)
    waiting = [engine.submit(PROMPTS[1], max_tokens=100) for _ in range(4)]
    engine.close()
    engine.close()
    assert stream.finish_reason in (None, "length", "stop")
    with pytest.raises(EntmtpError, match="closed"):
        engine.submit("x")
    for one in waiting:  # written, cut short, or refused: none hangs
        try:
            assert isinstance(one.text, str)
        except EntmtpError as e:
            assert "closed" in str(e)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"slots": 0}, "1 to 64"), ({"logits_all": True}, "logits_all"), ({"embedding": True}, "embedding")],
)
def test_arguments_that_cannot_work(settings: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Engine(DEMO, **{**SETTINGS, **settings})


def test_room_is_given_in_turn() -> None:
    """A long text, between short ones that would always find room."""
    path, begun = model_path("llama"), threading.Event()
    settings: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "verbose": False, "draft": None}

    def held(tokens: Any, logits: Any) -> Any:
        begun.wait(30)
        return logits

    with Engine(path, slots=3, n_ctx=256, kv_tokens=256, **settings) as engine:
        ended: list[str] = []
        asked: dict[str, Any] = {"temperature": 0.0, "logit_bias": {0: 100.0}}

        def submit(name: str, n: int, **more: Any) -> threading.Thread:
            stream = engine.submit("some text", max_tokens=n, **asked, **more)
            thread = threading.Thread(target=lambda: (stream.text, ended.append(name)))
            thread.start()
            return thread

        waits = LogitsProcessorList([held])
        threads = [submit("short", 70, logits_processor=waits) for _ in range(2)]
        threads.append(submit("long", 230))
        threads += [submit("short", 70) for _ in range(12)]
        time.sleep(0.3)
        begun.set()
        for thread in threads:
            thread.join(60)
        # third, but for readers who are late; without turns it is among the last
        assert len(ended) == 15 and ended.index("long") <= 6


def test_a_slot_that_is_given_back_ends_its_text() -> None:
    path = model_path("llama")
    settings: dict[str, Any] = {"n_threads": 1, "n_threads_batch": 1, "verbose": False}
    with Engine(path, slots=2, n_ctx=256, kv_tokens=256, **settings) as engine:
        with engine.slot() as llm:
            left = llm.create_completion("some text", max_tokens=200, stream=True)
            next(left)
        other = engine.submit("another", max_tokens=200, temperature=0.0)
        thread = threading.Thread(target=lambda: other.text)
        thread.start()
        thread.join(30)
        assert not thread.is_alive()
        with pytest.raises(BusyError, match="this stream is over"):
            next(left)
