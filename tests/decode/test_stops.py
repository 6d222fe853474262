"""Stop strings, echoes and suffixes: a stream is the whole answer in pieces, and what is asked for is checked."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import closing
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp import LlamaGrammar

from entmtp import Engine, Llama
from entmtp.completion import Ending
from entmtp.logprobs import Logprobs
from helpers.models import model_path

SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}


def joined(chunks: Any) -> tuple[str, str, list[str]]:
    """Text, reason and tokens of a stream."""
    text, tokens = "", []
    for chunk in chunks:
        choice = chunk["choices"][0]
        text += choice["text"]
        tokens += (choice["logprobs"] or {"tokens": []})["tokens"]
    return text, choice["finish_reason"], tokens


@pytest.mark.parametrize("how", [{}, {"heads": "hydra"}], ids=["plain", "drafting"])
@pytest.mark.parametrize(
    ("written", "stop", "left"),
    [
        ("cat 猫", ["猫犬"], "cat 猫"),  # held back, and then not cut off
        ("Hi 😀", ["😀 User:"], "Hi 😀"),
        ("so the end", ["e", "th"], "so "),  # the first in the text counts, not the first in the list
        ("so the end", ["th", "e"], "so "),
        ("so the end", ["", "end"], "so the "),  # an empty one is none
        ("so the end", "", "so the end"),
        ("one User: two", ["User:"], "one "),
        ("one User, two", ["User:"], "one User, two"),
    ],
)
def test_a_stream_is_the_whole_answer(
    load: Callable[..., Llama], how: dict[str, Any], written: str, stop: Any, left: str
) -> None:
    llm = load(**how)
    grammar = LlamaGrammar.from_string(f'root ::= "{written}"', verbose=False)
    asked: dict[str, Any] = {"max_tokens": 60, "stop": stop, "grammar": grammar, "temperature": 0.0}
    for logprobs in (None, 1):
        whole = llm("Write:", logprobs=logprobs, **asked)["choices"][0]
        text, reason, tokens = joined(llm("Write:", logprobs=logprobs, stream=True, **asked))
        assert whole["text"] == text == left
        assert whole["finish_reason"] == reason == "stop"
        if logprobs is not None:
            assert whole["logprobs"]["tokens"] == tokens


def test_an_engine_writes_what_a_model_writes() -> None:
    grammar = LlamaGrammar.from_string('root ::= "Hi 😀"', verbose=False)
    asked: dict[str, Any] = {"max_tokens": 60, "stop": ["😀 User:"], "grammar": grammar}
    with Engine(model_path("llama"), slots=2, **SETTINGS) as engine:
        assert engine.submit("Write:", **asked).text == "Hi 😀"
        assert engine.submit(tuple(b"Write:"), **asked).text == "Hi 😀"


class Bytes:
    """A vocabulary of the 256 bytes."""

    def detokenize(self, tokens: Any, prev_tokens: Any = None) -> bytes:
        return bytes(tokens)

    def ends_text(self, token: int) -> bool:
        return False


@given(
    st.lists(st.sampled_from(list("ab猫é😀".encode())), max_size=20),
    st.lists(st.text("ab猫é", max_size=4), max_size=3),
    st.integers(1, 5),
)
def test_pieces_are_the_text_to_the_first_stop(data: list[int], stop: list[str], step: int) -> None:
    """Against a search in all of it; bytes that form no character come, too."""
    text = bytes(data)
    found = [i for s in stop if s and (i := text.find(s.encode())) >= 0]
    ending = Ending(Bytes(), {"stop": stop, "stream": True, "max_tokens": None})

    def chunks() -> Any:
        for i, token in enumerate(data):
            ending.see(token)
            if i % step == 0:
                yield {"choices": [{"text": "?", "logprobs": None, "finish_reason": None}]}
            if ending.must_end(i + 1, 100):
                break
        yield {"choices": [{"text": "", "logprobs": None, "finish_reason": "length"}]}

    pieces, reason, _ = joined(ending.pieces(chunks(), ""))
    # the earliest of those that are complete with the same byte: what is generated ends there
    ends = [
        (text.find(s.encode()) + len(s.encode()), text.find(s.encode()))
        for s in stop
        if s and s.encode() in text
    ]
    first = min((end for end, _ in ends), default=None)
    at = min((i for end, i in ends if end == first), default=len(text))
    assert pieces == text[:at].decode("utf-8", "ignore")
    assert reason == ("stop" if found else "length")


@pytest.mark.parametrize("stream", [False, True])
def test_stops_where_llama_cpp_python_keeps_logits(stream: bool) -> None:
    """A `LlamaDraftModel`, whose log probabilities are read from all logits."""
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    lookup = LlamaPromptLookupDecoding(num_pred_tokens=4)
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "logprobs": 1, "stream": stream}
    texts = []
    for kind, how in ((Llama, {"draft_model": lookup}), (llama_cpp.Llama, {"logits_all": True})):
        with closing(kind(str(model_path("llama")), **SETTINGS, **how)) as llm:
            whole = llm.create_completion("ab ab ab", **asked | {"stream": False})["choices"][0]["text"]
            answer = llm.create_completion("ab ab ab", stop=[whole[3:5]], **asked)
            texts.append(joined(answer)[:2] if stream else (answer["choices"][0]["text"],))
    assert texts[0] == texts[1]


@pytest.mark.parametrize("prompt", ["Once upon", list(b"Once upon")])
@pytest.mark.parametrize("logprobs", [None, 0])
def test_echo(prompt: Any, logprobs: int | None) -> None:
    with closing(Llama(model_path("llama"), **SETTINGS)) as llm:
        asked: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "logprobs": logprobs}
        alone = llm.create_completion(prompt, **asked)["choices"][0]["text"]
        whole = llm.create_completion(prompt, echo=True, **asked)["choices"][0]
        text, _, _ = joined(llm.create_completion(prompt, echo=True, stream=True, **asked))
        assert whole["text"] == text == "Once upon" + alone
        if logprobs is not None:
            behind = llm.create_completion(prompt, **asked)["choices"][0]["logprobs"]
            assert behind["text_offset"][0] == len("Once upon")
            assert len(whole["logprobs"]["tokens"]) > len(behind["tokens"])


def test_a_suffix_needs_tokens_for_it(load: Callable[..., Llama]) -> None:
    with pytest.raises(ValueError, match="suffix: this model has no tokens to fill in with"):
        load()("def f(", suffix="return x")


@pytest.mark.parametrize("spm", [False, True])
def test_what_comes_between_two_texts(spm: bool) -> None:
    """With the model's own tokens; llama-cpp-python writes token 0 in their places."""
    ids = {"fim_pre": 290, "fim_suf": 291, "fim_mid": 292}
    how: dict[str, Any] = {"kv_overrides": {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}}
    with closing(Llama(model_path("llama"), spm_infill=spm, **SETTINGS, **how)) as llm:
        first, last = llm.tokenize(b"def f(", add_bos=False), llm.tokenize(b"return x", add_bos=False)
        written = [291, *last, 290, *first, 292] if spm else [290, *first, 291, *last, 292]
        asked: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0}
        filled = llm("def f(", suffix="return x", **asked)
        assert llm.input_ids[: len(written)].tolist() == written
        assert filled["choices"] == llm(written, **asked)["choices"]
        assert llm(list(first), suffix="return x", echo=True, **asked)["choices"][0]["text"].startswith(
            "def f("
        )


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"response_format": {"type": "yaml"}}, "its type is 'yaml'"),
        ({"response_format": "json_object"}, "response_format must be a dict"),
        ({"response_format": {"type": "json_schema"}}, "json_schema has no schema"),
        ({"tools": ["x"]}, "'x' names no function"),
        ({"tool_choice": "required"}, "tool_choice is 'required'"),
        ({"logit_bias": [1, 2]}, "logit_bias must be a dict"),
        ({"grammar": 'root ::= "a"'}, "LlamaGrammar.from_string"),
        ({"repeat_penalty": 0.0}, "repeat_penalty is 0"),
        ({"max_tokens": "3"}, "max_tokens is '3', it must be a whole number"),
        ({"max_tokens": 2.5}, "must be a whole number"),
        ({"temperature": "a"}, "temperature is 'a', it must be a number"),
        ({"seed": "x"}, "must be a whole number"),
        ({"stop": 5}, "stop must be a text"),
        ({"stop": [1]}, "stop must be a text"),
        ({"functions": 5}, "functions must be a list"),
    ],
)
def test_what_would_be_passed_over(load: Callable[..., Llama], asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load().create_chat_completion([{"role": "user", "content": "Hi"}], **asked)


def test_a_schema_as_openai_writes_it(load: Callable[..., Llama]) -> None:
    schema = {"type": "object", "properties": {"n": {"const": 7}}, "required": ["n"]}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    answer = load().create_chat_completion([{"role": "user", "content": "n?"}], response_format=form)
    assert answer["choices"][0]["message"]["content"].replace(" ", "") == '{"n":7}'


def test_arguments_by_place(load: Callable[..., Llama]) -> None:
    """As in llama-cpp-python: suffix, max_tokens, temperature, top_p, min_p, typical_p, logprobs, echo, stop."""
    llm = load()
    by_place = llm.create_completion("Tom has", None, 5, 0.0, 0.95, 0.05, 1.0, 1, True, ["zzz"])
    by_name = llm.create_completion(
        "Tom has", max_tokens=5, temperature=0.0, logprobs=1, echo=True, stop=["zzz"]
    )
    assert by_place["choices"] == by_name["choices"]
    with pytest.raises(TypeError, match="nonsense"):
        llm.create_completion("Tom has", nonsense=1)


def test_a_grammar_that_cannot_be_read_does_not_end_the_process(load: Callable[..., Llama]) -> None:
    llm = load()
    llm.eval(llm.tokenize(b"Tom"))
    with pytest.raises(ValueError, match="the grammar cannot be read"):
        llm.sample(grammar=_broken())


def _broken() -> Any:
    grammar = LlamaGrammar.from_string('root ::= "a"', verbose=False)
    grammar._grammar = "root = nothing that can be read ::"
    return grammar


@pytest.mark.parametrize("text", ["a猫b END", "Hi é you END", "👩‍👩‍👧 and 🙂 END"])
@pytest.mark.parametrize("stop", [[], ["猫"], ["é"], ["🙂"], [" END"]])
def test_tokenizers_that_write_half_a_character(text: str, stop: list[str]) -> None:
    """As U+FFFD, until the rest is there: Hugging Face's do. And tokens that end within a character have their own
    log probabilities each."""

    class Rewriting(Bytes):
        def detokenize(self, tokens: Any, prev_tokens: Any = None) -> bytes:
            return bytes(tokens).decode("utf-8", "replace").encode()

    for vocabulary in (Rewriting(), Bytes()):
        record = Logprobs(Bytes(), 1, False, 0)
        ending = Ending(vocabulary, {"stop": stop, "stream": True, "max_tokens": None}, record)
        data = text.encode()

        def chunks(data: bytes = data, ending: Ending = ending, record: Logprobs = record) -> Any:
            for i, token in enumerate(data):
                record.draw(np.zeros(256, np.float32), token)
                ending.see(token)
                yield {"choices": [{"text": "?", "logprobs": None, "finish_reason": None}]}
                if ending.must_end(i + 1, 1000):
                    break
            yield {"choices": [{"text": "", "logprobs": None, "finish_reason": "length"}]}

        told = list(ending.pieces(chunks(), ""))
        left = text.partition(stop[0])[0] if stop else text
        assert "".join(c["choices"][0]["text"] for c in told) == left
        n_told = sum(len((c["choices"][0]["logprobs"] or {"tokens": []})["tokens"]) for c in told)
        assert n_told == len(left.encode())


def test_log_probabilities_of_a_stream_are_those_of_the_whole(load: Callable[..., Llama]) -> None:
    """Also of tokens without a text of their own: halves of characters, at the end and before stop strings."""
    llm, rng = load(), random.Random(3)
    halves = [t for t in range(llm.n_vocab()) if any(b >= 0x80 for b in llm.detokenize([t]))]
    n_silent = 0
    for i in range(60):
        asked: dict[str, Any] = {
            "max_tokens": rng.randint(1, 12), "temperature": 1.0, "seed": i, "logprobs": rng.randint(0, 2),
            "logit_bias": {t: rng.choice([8, 30]) for t in rng.sample(halves, min(40, len(halves)))},
        }  # fmt: skip
        text = llm.create_completion("Tom has 3", **asked)["choices"][0]["text"]
        if text and i % 3 == 0:
            asked["stop"] = [text[rng.randrange(len(text)) :][:2]]
        whole = llm.create_completion("Tom has 3", **asked)["choices"][0]["logprobs"]
        streamed: dict[str, list[Any]] = {}
        for chunk in llm.create_completion("Tom has 3", stream=True, **asked):
            choice = chunk["choices"][0]
            for name, values in (choice["logprobs"] or {}).items():
                streamed.setdefault(name, []).extend(values)
                n_silent += name == "tokens" and not choice["text"]
        assert streamed == {name: values for name, values in whole.items() if values or streamed}, asked
    assert n_silent > 3
