"""A model's end: closed, collected as garbage in any order, copied; and what is asked of it at the wrong time."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import LogitsProcessorList

from entmtp import BusyError, Engine, Llama
from entmtp.common.errors import ClosedError, EntmtpError
from helpers.adapter import write_adapter
from helpers.models import model_path
from helpers.settings import F32

SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
STATIC: dict[str, Any] = {"heads": "hydra", "trees": "generic-hydra:n8", "policy": "static"}

CYCLES = {
    "of its own": "llm.me = llm",
    "a bound method": "llm.on_token = llm.ends_text",
    "a generator": "g = llm.generate(llm.tokenize(b'Hi there')); next(g); llm.g = g; del g",
    "a stream beside it": """class App: pass
a = App(); a.llm, a.me = llm, a
a.g = llm('Hi there', max_tokens=30, stream=True); next(a.g); next(a.g); del a""",
}


@pytest.mark.parametrize("settings", ["static", "plain", "adapter"])
def test_it_is_collected_as_garbage_in_any_order(
    models: dict[str, Path], tmp_path: Path, settings: str
) -> None:
    """Wrappers of llama-cpp-python freed the context before what uses it, where a cycle led to the model."""
    drafting = f"draft='entmtp', heads={str(models['hydra'])!r}, trees='generic-hydra:n8', policy='static'"
    asked = {
        "static": drafting,
        "plain": "",
        "adapter": f"{drafting}, lora_path={str(write_adapter(models['f32'], tmp_path / 'lora.gguf'))!r}",
    }
    code = f"""
import gc
from entmtp import Llama
for cycle in {list(CYCLES.values())!r}:
    for early in (True, False):
        if early:  # a collection within the load: in the next one objects come in another order
            gc.set_threshold(50)
        llm = Llama({str(models["f32"])!r}, {asked[settings]}{", " if asked[settings] else ""}**{SETTINGS!r})
        gc.set_threshold(700)
        exec(cycle)
        del llm
        gc.collect()
print("all freed")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "all freed\n"), done.stderr[-2000:]
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("how", [{}, STATIC], ids=["plain", "drafting"])
def test_a_closed_model_says_so(models: dict[str, Path], how: dict[str, Any]) -> None:
    drafting = {"draft": "entmtp", **how, "heads": models[how["heads"]]} if how else {}
    llm = Llama(models["f32"], **F32 | SETTINGS, **drafting)
    state, stream = llm.save_state(), llm("Hi there", max_tokens=30, stream=True)
    running = llm.generate(llm.tokenize(b"Hi there"))
    next(stream), next(running)
    llm.close()
    llm.close()
    calls: dict[str, Callable[[], Any]] = {
        "completion": lambda: llm("Hi", max_tokens=2),
        "chat": lambda: llm.create_chat_completion([{"role": "user", "content": "Hi"}]),
        "tokenize": lambda: llm.tokenize(b"Hi"),
        "detokenize": lambda: llm.detokenize([5]),
        "n_ctx": llm.n_ctx,
        "eval": lambda: llm.eval([1]),
        "sample": llm.sample,
        "save_state": llm.save_state,
        "load_state": lambda: llm.load_state(state),
        "reset": llm.reset,
        "stats": lambda: llm.draft_stats,
        "must_evaluate": llm.must_evaluate,
        "stream": lambda: next(stream),
        "generator": lambda: next(running),
    }
    for name, call in calls.items():
        with pytest.raises(ClosedError, match="this model is closed"):
            call()
            pytest.fail(name)
    llm.cancel()


def test_a_processor_cannot_call_the_model_that_draws(load: Callable[..., Llama]) -> None:
    """It would wait for itself; cancelling is for any time."""
    llm = load(**STATIC)
    prompt = llm.tokenize(b"Tom has 3 boxes")
    calls: dict[str, Callable[[], Any]] = {
        "stats": lambda: llm.draft_stats,
        "state": llm.save_state,
        "reset": llm.reset,
        "must_evaluate": llm.must_evaluate,
        "trees": lambda: llm.set_trees(policy="off"),
        "nested": lambda: llm("Hi", max_tokens=2),
        "close": llm.close,
    }
    refused: dict[str, Any] = {}

    def meanwhile(_: Any, logits: Any) -> Any:
        for name in calls.keys() - refused.keys():
            try:
                refused[name] = calls[name]()
            except BusyError as e:
                refused[name] = str(e)
        return logits

    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
    wanted = llm.create_completion(prompt, **asked)["choices"][0]["text"]

    def run() -> None:
        answer = llm.create_completion(prompt, logits_processor=LogitsProcessorList([meanwhile]), **asked)
        refused["text"] = answer["choices"][0]["text"]

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert refused.pop("text", None) == wanted
    assert refused == dict.fromkeys(calls, refused["stats"]) and "is drawing a token" in refused["stats"]


def test_what_a_processor_raises_comes_out(load: Callable[..., Llama]) -> None:
    """llama.cpp calls it, through which no error passes: the answer was drawn as if it were not there."""

    def broken(tokens: Any, logits: Any) -> Any:
        raise ZeroDivisionError("of the user")

    for llm in (load(), load(**STATIC)):
        wanted = llm("Tom has 3", max_tokens=6, temperature=0.0)["choices"]
        for processor, error in (
            (broken, ZeroDivisionError),
            (lambda tokens, logits: logits[:3], ValueError),
        ):
            asked: dict[str, Any] = {"logits_processor": LogitsProcessorList([processor]), "max_tokens": 6}
            with pytest.raises(error):
                llm("Tom has 3", **asked)
            with pytest.raises(error):
                list(llm("Tom has 3", stream=True, **asked))
            assert llm("Tom has 3", max_tokens=6, temperature=0.0)["choices"] == wanted


def test_a_reset_ends_what_is_being_generated(load: Callable[..., Llama]) -> None:
    for llm in (load(), load(**STATIC)):
        running = llm.generate(llm.tokenize(b"Tom has 3 boxes"), temp=0.0)
        next(running)
        llm.reset()
        with pytest.raises(BusyError, match="or the model was reset"):
            next(running)


@pytest.mark.parametrize("how", [{}, STATIC], ids=["plain", "drafting"])
def test_another_text_ends_what_is_being_generated(load: Callable[..., Llama], how: dict[str, Any]) -> None:
    """From outside between two tokens, or from what is called on the way; the same text may be loaded."""
    llm = load(**how)
    llm("another text that is kept", max_tokens=4)
    other = llm.save_state()
    asked: dict[str, Any] = {"max_tokens": 16, "temperature": 0.0}
    wanted = llm("Tom has 3 boxes", **asked)["choices"]
    for change in (lambda: llm.load_state(other), llm.reset):
        stream = llm("Tom has 3 boxes", stream=True, **asked)
        next(stream)
        change()
        with pytest.raises(BusyError, match="this stream is over"):
            list(stream)

        def criteria(tokens: Any, _: Any, change: Callable[[], None] = change) -> bool:
            if len(tokens) == 12:
                change()
            return False

        with pytest.raises(BusyError, match="this stream is over"):
            llm("Tom has 3 boxes", stopping_criteria=criteria, **asked)
    stream = llm("Tom has 3 boxes", stream=True, **asked)
    first = next(stream)["choices"][0]["text"]
    llm.load_state(llm.save_state())
    assert first + "".join(c["choices"][0]["text"] for c in stream) == wanted[0]["text"]


def test_criteria_that_say_it_once(load: Callable[..., Llama]) -> None:
    """llama-cpp-python asks them again, and finds no text where they say something else."""
    llm = load()
    texts = []
    for stream in (False, True):
        calls = iter(range(1000))
        asked: dict[str, Any] = {"max_tokens": 20, "temperature": 0.0, "stream": stream}
        answer = llm("Tom has 3", stopping_criteria=lambda tokens, _, n=calls: next(n) == 5, **asked)
        texts.append(
            "".join(c["choices"][0]["text"] for c in answer) if stream else answer["choices"][0]["text"]
        )
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("how", ["lookup", "embedding", "tokens"])
def test_nothing_to_go_on_from(how: str) -> None:
    """Without a decode loop of ours, too: the process ended."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    lookup: dict[str, Any] = {"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=4)}
    given: dict[str, Any] = {"embedding": True} if how == "embedding" else lookup
    with (
        closing(Llama(model_path("llama"), **SETTINGS, **given)) as llm,
        pytest.raises(ValueError, match="empty"),
    ):
        next(llm.generate([])) if how == "tokens" else llm("")


def test_cancelling_where_llama_cpp_python_drafts() -> None:
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    with closing(
        Llama(model_path("llama"), draft_model=LlamaPromptLookupDecoding(num_pred_tokens=4), **SETTINGS)
    ) as llm:
        llm.on_token = None
        stream = llm(list(b"a b a b a b"), max_tokens=40, stream=True)
        next(stream)
        llm.cancel()
        assert len(list(stream)) < 8
        assert llm(list(b"a b a b a b"), max_tokens=4)["usage"]["completion_tokens"] == 4


def test_slots_of_a_closed_engine() -> None:
    with Engine(model_path("llama"), slots=2, **SETTINGS) as engine, engine.slot() as slot:
        pass
    calls: tuple[Callable[[], Any], ...] = (
        lambda: slot.tokenize(b"abc"), lambda: slot("abc"), slot.token_bos, slot.n_ctx, slot.reset,
        lambda: slot.create_chat_completion([{"role": "user", "content": "Hi"}]),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(ClosedError):
            call()


@pytest.mark.parametrize("name", ["missing", "no adapter", "good"])
def test_an_adapter_that_cannot_be_read(models: dict[str, Path], tmp_path: Path, name: str) -> None:
    """llama-cpp-python takes it for one, and the first text ends the process."""
    path = {
        "missing": tmp_path / "none.gguf",
        "no adapter": models["hydra"],
        "good": write_adapter(models["f32"], tmp_path / "lora.gguf"),
    }[name]
    if name != "good":
        with pytest.raises(ValueError, match=f"lora_path: .*{path.name}"):
            Llama(models["f32"], lora_path=path, **SETTINGS)
        return
    texts = []
    for lora in ({}, {"lora_path": path}):
        with closing(Llama(models["f32"], **SETTINGS, **lora)) as llm:  # type: ignore[arg-type]
            texts.append(llm("Tom has 3 boxes", max_tokens=12, temperature=0.0)["choices"][0]["text"])
    assert texts[0] != texts[1]


@pytest.mark.parametrize("how", [{}, STATIC], ids=["plain", "drafting"])
def test_a_state_that_cannot_be_loaded(models: dict[str, Path], how: dict[str, Any]) -> None:
    """It leaves an empty text, not one that the memory does not hold."""
    drafting = {"draft": "entmtp", **how, "heads": models[how["heads"]]} if how else {}
    small, large = (Llama(models["f32"], **F32 | SETTINGS | {"n_ctx": n}, **drafting) for n in (256, 1024))
    with closing(small), closing(large):
        prompt = "Tom has 3 boxes. First find the total"
        asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}
        wanted = large(prompt, **asked)
        large.eval(large.tokenize(b" of them" * 200))
        long = large.save_state()
        assert long.n_tokens > 256
        small(prompt, **asked)
        state = small.save_state()
        for broken in (long, copy.copy(state)):
            if broken is not long:
                broken.llama_state = broken.llama_state[: len(broken.llama_state) // 2]
            with pytest.raises(EntmtpError, match=r"the state (has|cannot be loaded)"):
                small.load_state(broken)
            for _ in range(2):
                assert small(prompt, **asked)["choices"] == wanted["choices"]
        # one of a smaller context leaves this one its length
        large.load_state(state)
        assert large(prompt, **asked)["choices"] == wanted["choices"]
        assert len(large.tokenize(b"of " * 300)) > 256
        large.create_completion(large.tokenize(b"of " * 300), max_tokens=4)
        large.reset()


@pytest.mark.parametrize("n", [60, 100, 124])
def test_prompt_lookup_writes_to_the_contexts_end(n: int) -> None:
    """Guesses in the memory are not what was written."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    prompt = list(b"a b c d e f g h " * 16)[:n]
    answers = []
    for how in ({}, {"draft_model": LlamaPromptLookupDecoding(num_pred_tokens=10)}):
        with closing(Llama(model_path("llama"), **SETTINGS | {"n_ctx": 256}, **how)) as llm:
            answers.append(llm.create_completion(prompt, max_tokens=None, temperature=0.0))
    assert answers[0]["choices"] == answers[1]["choices"] and answers[0]["usage"] == answers[1]["usage"]


def test_copies_are_made_with_the_same_arguments(models: dict[str, Path]) -> None:
    with closing(
        Llama(models["f32"], draft="entmtp", heads=models["hydra"], kernels="off", **SETTINGS)
    ) as llm:
        llm("Hi there", max_tokens=4)
        for again in (pickle.loads(pickle.dumps(llm)), copy.copy(llm)):
            with closing(again):
                assert again.bank is not None and again.heads_path == llm.heads_path
                assert (again.lossless, again.n_threads) == (llm.lossless, llm.n_threads)
                assert again("Hi", max_tokens=4, temperature=0.0) is not None


def test_kernels_are_those_asked_for_in_any_thread(models: dict[str, Path]) -> None:
    """They are chosen for the process while a model is loaded."""
    seen: list[tuple[str, str]] = []

    def load_some(kernels: str) -> None:
        for _ in range(6):
            with closing(Llama(models["q8_0"], kernels=kernels, **SETTINGS)) as llm:
                seen.append(
                    (kernels, llm._lossless)
                )  # not `lossless`: the other may have switched them off since

    threads = [threading.Thread(target=load_some, args=(kernels,)) for kernels in ("off", "auto")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(set(seen)) == [("auto", "exact"), ("off", "rounding")] and len(seen) == 12
