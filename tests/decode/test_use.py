"""One model, several threads and streams: one call at a time, nobody waits, and whoever is too late is told why."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest

from entmtp import BusyError, Llama
from entmtp.common.use import Use
from helpers.settings import prompts

STATIC: dict[str, Any] = {"heads": "hydra", "trees": "generic-hydra:n8", "policy": "static"}


@pytest.fixture(params=[{}, STATIC], ids=["plain", "drafting"])
def llm(request: pytest.FixtureRequest, load: Callable[..., Llama]) -> Llama:
    llm = load(**request.param)
    llm.reset()
    return llm


def in_a_thread(call: Callable[[], Any]) -> Any:
    """The result of a call in a thread of its own, or its exception."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(call())
        except Exception as e:
            result.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return result[0]


def test_a_second_thread_is_refused_while_a_call_runs(llm: Llama) -> None:
    prompt = llm.tokenize(prompts("gsm8k")[0].encode())
    expected = list(islice(llm.generate(prompt, temp=0.0), 20))
    refused: dict[str, Any] = {}

    def meanwhile(_: Any, scores: Any) -> Any:
        """Called by the sampler, in the middle of a call of the first thread."""
        if not refused:
            state = in_a_thread(llm.save_state)
            calls: dict[str, Callable[[], Any]] = {
                "generate": lambda: next(llm.generate(prompt)),
                "create_completion": lambda: llm(prompt, max_tokens=1),
                "eval": lambda: llm.eval([1]),
                "sample": lambda: llm.sample(),
                "reset": llm.reset,
                "close": llm.close,
                "load_state": lambda: llm.load_state(state),
                "draft_stats": lambda: llm.draft_stats,
                "reset_draft_stats": llm.reset_draft_stats,
                **(
                    {}
                    if llm.bank is None
                    else {"set_trees": lambda: llm.set_trees("generic-hydra", "entropy")}
                ),
            }
            refused.update({name: in_a_thread(call) for name, call in calls.items()}, save_state=state)
            assert in_a_thread(lambda: llm.tokenize(b"free for all")) and in_a_thread(lambda: llm.n_ctx())
        return scores

    from llama_cpp import LogitsProcessorList

    walk = llm.generate(prompt, temp=0.0, logits_processor=LogitsProcessorList([meanwhile]))
    assert list(islice(walk, 20)) == expected, "who was refused must change nothing"
    assert len(refused) == (10 if llm.bank is None else 11)
    for name, error in refused.items():
        assert isinstance(error, BusyError) and "another thread" in str(error), name


def test_a_thread_may_go_on_with_anothers_stream(llm: Llama) -> None:
    """Between two tokens nobody holds the model: a server's worker threads take turns."""
    prompt = llm.tokenize(prompts("gsm8k")[0].encode())
    expected = list(islice(llm.generate(prompt, temp=0.0), 12))
    walk = llm.generate(prompt, temp=0.0)
    assert [in_a_thread(lambda: next(walk)) for _ in range(12)] == expected


def test_an_older_stream_says_that_it_is_over(llm: Llama) -> None:
    prompt, other = (llm.tokenize(p.encode()) for p in prompts("gsm8k")[:2])
    expected = list(islice(llm.generate(other, temp=0.0), 12))
    older = llm.generate(prompt, temp=0.0)
    next(older)
    newer = llm.generate(other, temp=0.0)
    assert next(newer) == expected[0]
    with pytest.raises(BusyError, match="this stream is over: another generation"):
        next(older)
    assert next(older, None) is None  # as any generator that raised
    older.close()
    assert list(islice(newer, 11)) == expected[1:]

    stream = llm.create_completion(prompt, max_tokens=8, stream=True)
    next(iter(stream))
    llm(other, max_tokens=1)
    with pytest.raises(BusyError, match="this stream is over"):
        list(stream)


def test_an_older_stream_that_is_dropped_disturbs_nothing(llm: Llama) -> None:
    prompt, other = (llm.tokenize(p.encode()) for p in prompts("gsm8k")[:2])
    expected = list(islice(llm.generate(other, temp=0.0), 12))
    older = llm.generate(prompt, temp=0.0)
    next(older)
    newer = llm.generate(other, temp=0.0)
    found = [next(newer)]
    older.close()
    assert found + list(islice(newer, 11)) == expected


def test_many_threads_at_one_model_get_answers_or_errors(llm: Llama) -> None:
    texts = [llm.tokenize(p.encode()) for p in prompts("gsm8k")[:4]]
    expected = [list(islice(llm.generate(t, temp=0.0), 10)) for t in texts]
    outcomes: list[Any] = []

    def work(i: int) -> None:
        for _ in range(5):
            try:
                outcomes.append(list(islice(llm.generate(texts[i], temp=0.0), 10)) == expected[i])
            except BusyError as e:
                outcomes.append(e)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert len(outcomes) == 20 and False not in outcomes
    assert list(islice(llm.generate(texts[0], temp=0.0), 10)) == expected[0]


def test_use_is_free_again_after_an_error() -> None:
    use = Use()
    with pytest.raises(RuntimeError, match="inside"), use, use:  # the same thread may
        raise RuntimeError("inside")
    assert in_a_thread(lambda: use.__enter__()) is None


def test_models_built_in_two_threads_leave_stdout_as_it_was(models: dict[str, Any]) -> None:
    """llama-cpp-python points it elsewhere while it loads quietly."""
    program = f"""
import os, threading
from entmtp import Llama
before = os.fstat(1).st_ino, os.fstat(2).st_ino
def build():
    for _ in range(6):
        Llama({str(models["q8_0"])!r}, n_ctx=64, verbose=False).close()
threads = [threading.Thread(target=build) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
print("same" if before == (os.fstat(1).st_ino, os.fstat(2).st_ino) else "lost", flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ,
        check=False,
    )
    assert done.stdout == "same\n" and done.stderr == ""
