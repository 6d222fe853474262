"""Calls of `Llama` that llama-cpp-python passes over, ends the process with, or answers by a traceback."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from entmtp import EntmtpError, Llama
from entmtp.common.errors import BusyError
from entmtp.common.use import Use
from helpers.rewritten import rewritten
from helpers.typed import DEMO

SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
STORY = "The sea was calm and the"


@pytest.fixture(scope="module")
def llm() -> Iterator[Llama]:
    made = Llama(DEMO, draft="entmtp", chat_format="chatml", **SETTINGS)
    yield made
    made.close()


def text(answer: Any) -> str:
    return str(answer["choices"][0]["text"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"temperature": Fraction(-1, 2)}, "temperature is -0.5"),
        ({"repeat_penalty": Fraction(-1, 2)}, "repeat_penalty is -0.5"),
        ({"top_p": 10**400}, "top_p is 1000.*must be a number"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"top_k": 2**32 + 1}, "top_k is 4294967297, it may be up to"),
        ({"mirostat_mode": 7}, "mirostat_mode is 7"),
        ({"logit_bias": {float("inf"): 1}}, "logit_bias: inf"),
        ({"logit_bias": {5: 10**400}}, "logit_bias: 5"),
        ({"logit_bias": {5.7: 1}}, "logit_bias: 5.7"),
        ({"stop": "a\ud800"}, "stop has half of a surrogate"),
        ({"prompt": "a\ud800"}, "prompt has half of a surrogate"),
        ({"prompt": [1.7]}, "must be a text, or a list of tokens"),
        ({"prompt": ["1", "2"]}, "must be a text, or a list of tokens"),
    ],
)
def test_completions(llm: Llama, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        llm.create_completion(**{"prompt": "Hi", "max_tokens": 1, **given})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"tool_choice": {"function": 5}}, "there is no 5 in tools"),
        ({"tools": [{"type": "function", "function": {"name": ["x"]}}]}, "names no function"),
        ({"top_logprobs": 3}, "logprobs=True"),
        ({"messages": ["Hi"]}, "is no message"),
        ({"messages": [{"content": "Hi"}]}, "is no message"),
        ({"messages": [{"role": "user", "content": 5}]}, "a content is 5"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "reads text"),
    ],
)
def test_chats(llm: Llama, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        llm.create_chat_completion(
            **{"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, **given}
        )


def test_chats_as_openai_has_them(llm: Llama) -> None:
    def content(messages: list[Any], **more: Any) -> str:
        answer: Any = llm.create_chat_completion(messages, max_tokens=6, temperature=0, **more)
        return str(answer["choices"][0]["message"]["content"])

    hi = [{"role": "user", "content": "Hi\nyou"}]
    want = content(hi)
    parts = [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]
    assert content([{"role": "user", "content": parts}]) == want
    assert content(hi, response_format={}) == want and content(hi, stop=("never",)) == want
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    assert content([*hi, {"role": "assistant", "content": None, "tool_calls": [call]}, *hi]) == content(
        [*hi, {"role": "assistant", "content": "", "tool_calls": [call]}, *hi]
    )
    tool = {"type": "function", "function": {"name": "f"}}
    called: Any = llm.create_chat_completion(
        hi, tools=[tool], tool_choice={"type": "function", "function": {"name": "f"}}, max_tokens=30
    )
    assert called["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "f"


@pytest.mark.parametrize("n", [None, 0, 1, 3])
def test_log_probabilities_of_a_chat(llm: Llama, n: int | None) -> None:
    asked: dict[str, Any] = {"max_tokens": 5, "temperature": 0, "logprobs": True, "top_logprobs": n}
    whole: Any = llm.create_chat_completion([{"role": "user", "content": "Hi"}], **asked)
    tokens = whole["choices"][0]["logprobs"]["content"]
    assert len(tokens) == 5 and all(len(t["top_logprobs"]) == (n or 0) for t in tokens)
    chunks: Any = llm.create_chat_completion([{"role": "user", "content": "Hi"}], stream=True, **asked)
    streamed = [t for c in chunks for t in (c["choices"][0].get("logprobs") or {}).get("content") or ()]
    assert streamed == tokens


def test_a_bias_beside_no_processors(llm: Llama) -> None:
    settings: dict[str, Any] = {
        "max_tokens": 12,
        "temperature": 0,
        "logit_bias": {t: -100 for t in range(0, 900, 2)},
    }
    want = text(llm.create_completion(STORY, **settings))
    assert want != text(llm.create_completion(STORY, max_tokens=12, temperature=0))
    for none in ([], llama_cpp.LogitsProcessorList([])):
        assert text(llm.create_completion(STORY, logits_processor=none, **settings)) == want


def test_handlers_of_ones_own_get_messages_as_they_are() -> None:
    seen: list[Any] = []

    @llama_cpp.llama_chat_format.register_chat_completion_handler("sees-images")
    def handler(llama: Any, messages: Any, **_: Any) -> Any:
        seen.extend(messages)
        return llama.create_completion("x", max_tokens=1)

    made = Llama(DEMO, chat_format="sees-images", **SETTINGS)
    asked: Any = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    made.create_chat_completion(asked)
    assert seen == asked
    made.close()


ASKS_FOR_NONE = """{% for m in messages %}{% if m.content is none -%}
<CALL {{ m.tool_calls[0].function.name }}>{% else -%}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"""
JOINS = "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"


@pytest.mark.parametrize(
    "template", [ASKS_FOR_NONE, "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}{% endfor %}"]
)
def test_calls_of_tools_have_no_content(tmp_path: Path, template: str) -> None:
    """As DeepSeek's templates ask; where a template joins texts unasked it is an empty one."""
    made = Llama(templated(tmp_path / "calls.gguf", template), **SETTINGS)
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    asked: Any = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    made.create_chat_completion(asked, max_tokens=1)
    prompt = made.detokenize(made.input_ids[: made.n_tokens].tolist(), special=True).decode()
    assert ("<CALL weather>" if "none" in template else "<user>Hi<assistant>") in prompt
    made.chat_handler = made.chat_handlers[
        "chat_template.default"
    ]  # as with names for it from the server's start
    made.create_chat_completion(asked, max_tokens=1)
    assert made.detokenize(made.input_ids[: made.n_tokens].tolist(), special=True).decode() == prompt
    made.close()


def test_names_for_a_template_are_of_one_call(tmp_path: Path) -> None:
    made = Llama(templated(tmp_path / "names.gguf", "{{ messages[0].content }} {{ mood }}"), **SETTINGS)
    prompts: list[str] = []

    def prompt_of(**names: Any) -> str:
        made.create_chat_completion([{"role": "user", "content": "Hi"}], max_tokens=1, **names)
        return made.detokenize(made.input_ids[: made.n_tokens].tolist()).decode()

    def meanwhile(tokens: Any, logits: Any) -> Any:
        if not prompts:
            handler = made.chat_handler
            prompts.append("swapped" if handler is not None else "as it was")
        return logits

    made.create_chat_completion(
        [{"role": "user", "content": "Hi"}], max_tokens=1, chat_template_kwargs={"mood": "merry"},
        logits_processor=llama_cpp.LogitsProcessorList([meanwhile]),
    )  # fmt: skip
    assert prompts == ["as it was"]
    assert "merry" in prompt_of(chat_template_kwargs={"mood": "merry"}) and "merry" not in prompt_of()
    for wrong in (5, {"messages": 1}, {"a b": 1}):
        with pytest.raises(ValueError, match="chat_template_kwargs"):
            prompt_of(chat_template_kwargs=wrong)
    made.close()


def test_streams_without_a_seed_differ(llm: Llama) -> None:
    """Also where both are there before one begins."""
    first, second = (
        llm.create_completion(STORY, max_tokens=12, temperature=1.2, stream=True) for _ in range(2)
    )
    assert "".join(text(c) for c in first) != "".join(text(c) for c in second)


def test_a_list_of_processors_that_grows(llm: Llama) -> None:
    def only_a(tokens: Any, logits: Any) -> Any:
        logits[:] = -1e9
        logits[a] = 0
        return logits

    (a,) = llm.tokenize(b"a", add_bos=False)[-1:]
    grows = llama_cpp.LogitsProcessorList([])
    grows.append(lambda tokens, logits: (grows.append(only_a) if len(grows) == 1 else None) or logits)
    assert text(llm.create_completion(STORY, max_tokens=6, temperature=0, logits_processor=grows)).endswith(
        "aaa"
    )


# -- states and seeds --


def test_states_that_are_none() -> None:
    llm = Llama(DEMO, draft="entmtp", **SETTINGS)
    want = text(llm.create_completion(STORY, max_tokens=16, temperature=0))
    state = llm.save_state()
    for change in ({"llama_state": b""}, {"n_tokens": -3}, {"n_tokens": state.n_tokens + 4}):
        broken = copy.copy(state)
        for name, value in change.items():
            setattr(broken, name, value)
        with pytest.raises(
            (EntmtpError, ValueError), match=r"state is (empty|damaged)|is none of this model's"
        ):
            llm.load_state(broken)
        assert text(llm.create_completion(STORY, max_tokens=16, temperature=0)) == want
    llm.load_state(state)
    assert text(llm.create_completion(STORY, max_tokens=16, temperature=0)) == want
    llm.close()


@pytest.mark.parametrize("draft", [None, "entmtp"])
def test_texts_without_a_seed_differ_though_a_state_is_loaded(draft: str | None) -> None:
    def texts(cached: bool) -> list[str]:
        llm = Llama(DEMO, draft=draft, seed=3, **SETTINGS)
        if cached:
            llm.set_cache(llama_cpp.LlamaRAMCache())
        found = [text(llm.create_completion(STORY, max_tokens=12, temperature=1.2)) for _ in range(5)]
        llm.close()
        return found

    want = texts(False)
    assert len(set(want)) == 5 and texts(True) == want
    stock = llama_cpp.Llama(str(DEMO), seed=3, **SETTINGS)
    assert [text(stock.create_completion(STORY, max_tokens=1, temperature=1.2)) for _ in range(5)] == [
        text(one)
        for one in (lambda m: [m.create_completion(STORY, max_tokens=1, temperature=1.2) for _ in range(5)])(
            Llama(DEMO, seed=3, **SETTINGS)
        )
    ]  # the seeds are llama-cpp-python's


# -- the model --


@pytest.mark.parametrize(
    ("given", "said"),
    [
        *(({name: kind}, f"{name} is") for name in ("type_k", "type_v") for kind in ("i8", "q8_1", "q4_k", 99, -1)),
        ({"n_batch": -1}, "n_batch is -1"), ({"n_batch": 2.5}, "n_batch is 2.5"), ({"n_ctx": -1}, "n_ctx is -1"),
        ({"n_ctx": 2**32 + 256}, "n_ctx is 4294967552"), ({"lora_scale": float("nan")}, "lora_scale is nan"),
    ],
)  # fmt: skip
def test_arguments_that_end_the_process(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Llama(DEMO, **{**SETTINGS, **given})


def test_arguments_that_nobody_knows() -> None:
    with pytest.warns(RuntimeWarning, match="Llama has no argument drafter, n_context"):
        Llama(DEMO, drafter="text", n_context=5, **SETTINGS).close()


def templated(path: Path, template: str) -> Path:
    """The demo with a chat template."""
    return rewritten(DEMO, path, (), lambda w: w.add_chat_template(template))


def test_a_template_that_cannot_be_read(tmp_path: Path) -> None:
    """As Ollama's, which are Go: the model writes, and chats where it is said how."""
    model = templated(tmp_path / "go.gguf", "{{ if .System }}{{ .System }}{{ end }}")
    with pytest.warns(
        RuntimeWarning, match=r"tokenizer.chat_template of the model cannot be read.*TemplateSyntaxError"
    ):
        llm = Llama(model, **SETTINGS)
    hi = [{"role": "user", "content": "Hi"}]
    assert text(llm.create_completion(STORY, max_tokens=3))
    with pytest.raises(ValueError, match=r"chat template cannot be read .*give chat_format"):
        llm.create_chat_completion(hi)
    llm.close()
    with pytest.warns(RuntimeWarning):
        llm = Llama(model, chat_format="chatml", **SETTINGS)
    assert llm.create_chat_completion(hi, max_tokens=3)["choices"]
    llm.close()


@pytest.mark.parametrize(
    "template",
    ["{{ 1 // 0 }}", "{{ 'a' + 1 }}", "{% macro r() %}{{ r() }}{% endmacro %}{{ r() }}", "{{ [][5].x }}"],
)
def test_a_template_that_fails(tmp_path: Path, template: str) -> None:
    model = templated(tmp_path / "failing.gguf", template)
    llm = Llama(model, **SETTINGS)
    with pytest.raises(ValueError, match="chat template cannot write these messages"):
        llm.create_chat_completion([{"role": "user", "content": "Hi"}], max_tokens=1)
    llm.close()


def test_what_others_print_while_a_model_is_loaded(capfd: pytest.CaptureFixture[str]) -> None:
    """llama-cpp-python points stdout of the process elsewhere."""
    written, over = 0, threading.Event()

    def write() -> None:
        nonlocal written
        while not over.is_set():
            os.write(1, b"line\n")
            written += 1
            time.sleep(0.0005)

    other = threading.Thread(target=write)
    other.start()
    for _ in range(3):
        Llama(DEMO, **SETTINGS).close()
    over.set()
    other.join()
    out, err = capfd.readouterr()
    assert out.count("line\n") == written and err == ""


def test_a_grammar_of_a_stranger_is_not_shown(llm: Llama, capfd: pytest.CaptureFixture[str]) -> None:
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "a" \x1b[2J\nINFO: all is well', verbose=False)
    with pytest.raises(ValueError, match="grammar cannot be read"):
        llm.create_completion("Hi", grammar=grammar, max_tokens=1)
    assert capfd.readouterr().err == ""


# -- Ctrl-C --


def test_functions_of_a_chain_live_as_long_as_it_does(llm: Llama) -> None:
    """Nothing of Python runs when llama.cpp frees a chain (a Ctrl-C within would be lost); nothing is kept either."""

    class Function:
        calls = 0

        def __call__(self, candidates: Any) -> None:
            self.calls += 1

    chain, functions = llama_cpp._internals.LlamaSampler(), [Function(), Function()]
    for function in functions:
        chain.add_custom(function)
    chain.add_greedy()
    llm.eval([1])
    chain.sample(llm._ctx, -1)
    assert [function.calls for function in functions] == [1, 1]
    gone = [weakref.ref(function) for function in functions]
    del functions, function
    assert all(ref() is not None for ref in gone)
    chain.close()
    del chain
    assert all(ref() is None for ref in gone)


def test_ctrl_c_is_not_lost() -> None:
    """Wherever it comes, also while llama.cpp calls back: the call ends by it, no token is drawn without its bias.

    (Where Python frees something just then, as a generator that is left, it is lost, as in any program.)
    """
    times = 300
    code = f"""
import json, os, random, signal, threading, time
from entmtp import Llama
signal.signal(signal.SIGINT, signal.default_int_handler)  # a run in the background ignores it
llm = Llama({str(DEMO)!r}, draft="entmtp", n_ctx=256, n_threads=1, verbose=False, calibrate=False)
banned = {{t: -100.0 for t in range(0, llm.n_vocab(), 2)}}
def text():
    return llm.create_completion({STORY!r}, max_tokens=24, temperature=0, logit_bias=banned)["choices"][0]["text"]
want, came, wrong = text(), 0, 0
rng, heard = random.Random(1), threading.Event()
def send():
    for _ in range({times}):
        time.sleep(rng.uniform(0.002, 0.03))
        os.kill(os.getpid(), signal.SIGINT)
        heard.wait(5)
        heard.clear()
sender = threading.Thread(target=send, daemon=True)
sender.start()
while sender.is_alive():
    try:
        while sender.is_alive():
            wrong += text() != want
    except KeyboardInterrupt:
        came += 1
        heard.set()
print(json.dumps([came, wrong]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    if done.returncode != 0 and "KeyboardInterrupt" in done.stderr:
        pytest.skip("a Ctrl-C came outside of the calls")
    came, wrong = json.loads(done.stdout)
    assert wrong == 0 and came >= 0.95 * times, done.stderr[-2000:]
    assert "ctypes callback" not in done.stderr


def test_a_call_that_ctrl_c_left_holds_nothing() -> None:
    """Where it comes just when the model was taken; then the thread runs nothing of ours."""
    use, taken, others = Use(), threading.Event(), threading.Event()

    def leaves_it_held() -> None:
        use._lock.acquire()
        taken.set()
        others.wait(30)

    holder = threading.Thread(target=leaves_it_held)
    holder.start()
    taken.wait(30)
    with use:
        pass
    others.set()
    holder.join()

    use, inside, over = Use(), threading.Event(), threading.Event()

    def is_in_a_call() -> None:
        with use:
            Use.is_called(inside, over)  # type: ignore[attr-defined]

    namespace: dict[str, Any] = {"__name__": "entmtp.test"}
    exec("def called(inside, over):\n    inside.set()\n    over.wait(30)\n", namespace)
    Use.is_called = staticmethod(namespace["called"])  # type: ignore[attr-defined]
    holder = threading.Thread(target=is_in_a_call)
    holder.start()
    inside.wait(30)
    with pytest.raises(BusyError), use:
        pass
    over.set()
    holder.join()
    del Use.is_called  # type: ignore[attr-defined]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_forked_process_says_so_of_embeddings() -> None:
    code = f"""
import os
from entmtp import Llama
llm = Llama({str(DEMO)!r}, embedding=True, n_ctx=128, n_threads=2, n_threads_batch=2, verbose=False)
llm.embed("Hi")
if os.fork() == 0:
    try:
        llm.embed("Hi")
    except Exception as e:
        print(e, flush=True)
    os._exit(0)
assert os.wait()[1] == 0
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "this process was forked after" in done.stdout, done.stderr[-1000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.parametrize("anew", [False, True])
def test_a_forked_process_says_so(anew: bool) -> None:
    """The threads of a pass do not come along: it waited for them for ever. On one thread it goes on."""
    code = f"""
import os
from entmtp import Llama
def made(n):
    return Llama({str(DEMO)!r}, draft="entmtp", n_ctx=128, n_threads=n, n_threads_batch=n, verbose=False)
llm = made(2)
want = llm.create_completion("Hi", max_tokens=4, temperature=0)["choices"][0]["text"]
if os.fork() == 0:
    try:
        one = made(2) if {anew} else llm
        print(one.create_completion("Hi", max_tokens=4, temperature=0), flush=True)
    except Exception as e:
        print(e, flush=True)
    assert made(1).create_completion("Hi", max_tokens=4, temperature=0)["choices"][0]["text"] == want
    os._exit(0)
assert os.wait()[1] == 0
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "this process was forked after" in done.stdout, done.stderr[-1000:]
