"""Answers under a JSON schema follow it (jsonschema says), or the schema is refused."""

from __future__ import annotations

import ctypes
import json
import math
import random
import re
import time
from collections.abc import Iterator
from typing import Any

import jsonschema
import llama_cpp
import pytest

from entmtp import Llama
from entmtp.request import grammar_fault, grammar_of_schema
from helpers.typed import DEMO

STRING, ITEM = (
    {"type": "string"},
    {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
)


def of(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties)}


def short(n: int = 3) -> dict[str, Any]:
    return {"type": "string", "maxLength": n}


FOLLOWED: list[Any] = [
    of(k={"type": ["string", "null"], "enum": ["a", "b", None]}),
    {"type": ["string", "integer"], "maxLength": 3},
    {"type": ["array", "null"], "items": {"type": "boolean"}},
    {"type": ["object", "null"], "properties": {"a": {"const": 1}}, "required": ["a"]},
    {"type": "array", "minItems": 2, "maxItems": 3},
    {"prefixItems": [{"const": 1}, {"const": "b"}], "minItems": 2},
    {"type": "array", "prefixItems": [{"const": 1}], "items": {"type": "boolean"}},
    {"type": "array", "items": False},
    {"type": "object", "required": ["a"]},
    {"type": "object", "required": ["a"], "additionalProperties": short()},
    {"type": "object", "properties": {"a": short()}, "additionalProperties": {"type": "integer"}},
    {"type": "object", "additionalProperties": {"type": "boolean"}},
    {"allOf": [of(a={"const": 1}), {"type": "object", "properties": {"b": {"const": 2}}, "required": ["b"]}]},
    {**of(a={"const": 1}), "allOf": [{"properties": {"b": {"const": 2}}, "required": ["b"]}]},
    {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"enum": ["x", "y"]}}},
    {"type": "string", "anyOf": [{"const": "a"}, {"type": "string", "maxLength": 2}]},
    {"oneOf": [{"const": 1}, {"const": "one"}]},
    {"enum": [1, "a", None], "type": "integer"},
    {"const": {"a": [1]}},
    {**of(item=ITEM, other={"$ref": "#/$defs/item"}), "$defs": {"item": {"enum": ["a", "b"]}}},
    {**of(a={"$ref": "#/$defs/string"}), "$defs": {"string": {"const": 5}}},
    {
        **of(a={"$ref": "#/$defs/x/v"}, b={"$ref": "#/definitions/v"}),
        "$defs": {"x": {"v": {"const": 1}}},
        "definitions": {"v": {"const": 2}},
    },
    {"$ref": "#/$defs/b", "$defs": {"a": {"const": "end"}, "b": {"$ref": "#/$defs/a"}}},
    {
        "$ref": "#/$defs/t",
        "$defs": {
            "t": {
                "type": "object",
                "properties": {"n": {"type": "integer"}, "t": {"$ref": "#/$defs/t"}},
                "required": ["n"],
            }
        },
    },
    {"$ref": "#/$defs/a~1b", "$defs": {"a/b": {"const": 3}}},
    {"$ref": "#/$defs/Foo%5Bint%5D", "$defs": {"Foo[int]": {"const": 3}}},
    {"$ref": "#/$defs/5%25", "$defs": {"5%": {"const": 3}}},
    of(a={"anyOf": [{"const": 1}, {"const": "b"}]}, b={"$ref": "#/properties/a/anyOf/1"}),
    {"anyOf": [{"const": "end"}, of(more={"$ref": "#"})]},
    {"enum": ["größe 😀"]},
    {"enum": ["C:\\new\\table"]},
    {"enum": ["a\nb"]},
    {"enum": ['say "hi"']},
    {"enum": ["\x00\x7f"]},
    of(**{"a\\b": {"const": 1}}),
    of(**{'q"': {"const": 1}}),
    of(**{"größe": {"const": 1}}),
    of(poem=short(12)),
    of(**{"": {"const": 1}, "b": {"type": "boolean"}}),
    {"allOf": [{**of(a={"const": 1}), "additionalProperties": False}, {"required": ["a"]}]},
    {"description": "anything"},
    of(a=True, b={}),
    {"type": "array", "items": True, "maxItems": 2},
    {},
    {"items": {"const": 1}},
    {"type": "string", "format": "date", "maxLength": 20},
    {"type": "string", "format": "email", "maxLength": 9},
    {"type": "string", "minLength": 2, "maxLength": 4},
    {"type": "number"},
    {"type": "integer"},
    {"type": "null"},
]
REFUSED: list[tuple[Any, str]] = [
    (
        {"allOf": [{**of(a={"type": "boolean"}), "additionalProperties": False}, of(b={"type": "boolean"})]},
        "additionalProperties in allOf",
    ),
    (False, "false"),
    ({"type": "text"}, "no type 'text'"),
    ({"type": "array", "minItems": 3, "maxItems": 2}, "minItems"),
    ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
    ({"prefixItems": [{}], "minItems": 2}, "minItems"),
    ({"type": "string", "pattern": "^a$", "maxLength": 1}, "pattern beside"),
    ({"enum": ["a"], "type": "integer"}, "none of"),
    ({"enum": ["ab"], "maxLength": 1}, "beside maxLength"),
    ({"$ref": "#/$defs/a", "type": "string", "$defs": {"a": {}}}, "beside"),
    ({"anyOf": [{"required": ["a"]}], "properties": {"a": {}}}, "anyOf beside properties"),
    ({"allOf": [{"type": "string"}, {"maxLength": 2}]}, "allOf"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "required"),
    ({"allOf": [of(a={"const": 1}), of(a={"const": 2})]}, "two schemas"),
    ({"items": False, "minItems": 1}, "items is false"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, "itself"),
    ({"allOf": [{"$ref": "#/$defs/a"}, {}], "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "itself"),
    *(
        ({"type": "string", "pattern": p}, "pattern")
        for p in (r"^(?=a)b$", r"^(a)\1$", r"^a\bb$", "^(", r"^\p{L}$", "^a^b$", r"^[\x00-\x07]$")
    ),
]


@pytest.fixture(scope="module")
def llm() -> Iterator[Llama]:
    made = Llama(DEMO, draft="entmtp", n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)
    yield made
    made.close()


@pytest.mark.parametrize("schema", FOLLOWED, ids=lambda s: json.dumps(s)[:60])
def test_answers_follow(llm: Llama, schema: Any) -> None:
    checker = jsonschema.Draft202012Validator(schema)
    n_whole = 0
    for seed in range(8):
        answer: Any = llm.create_completion(
            "Answer:",
            grammar=grammar_of_schema(schema),
            max_tokens=120,
            temperature=1.3,
            top_k=0,
            top_p=1.0,
            seed=seed,
        )
        if answer["choices"][0]["finish_reason"] != "stop":
            continue
        value = json.loads(answer["choices"][0]["text"])
        checker.validate(value)
        n_whole += 1
    assert n_whole > 0


PATTERNS = [
    r"^ab$|^ba$", r"^$|^\d+$", r"^\d{2}$|^\d{3}$", r"^(a|b)c$|^$", r"^a(b|c)$|^ax|x$",
    r"^.{1,3}$", r"^[^a]{3}$", r'^["x]$', r"^(a|b)$", r"^a+?$", r"^a\.b$", r"^\d{2,4}$", r"^[^\s]{1,5}$", r"^\w+\\$",
    r'^a/b"c$', r"^[\t\n]$", r"^(?:ab){2}$", r"^[a-c\-]{2}$", r"^a|b$", r"^x", r"a$", "a", r"^\S\D\W$",
    r"^ä{1,2}[b-ü]$", r"^(a(b(c)?)?)?$", r"^$", r"a.*b", r"^a{2,}$", r"^(a|)b$", r"^[\d\s]+$", r"^[\w.-]+@\w+$",
]  # fmt: skip
LETTERS = 'aaabbbcx1 2.-/@\n\t"\\\\äéü'


def accepts(llm: Llama, grammar: Any, text: str) -> bool:
    """Whether llama.cpp's grammar takes a text, and an end after it."""
    vocab = llama_cpp.llama_model_get_vocab(llm.model)
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar._grammar.encode(), grammar._root.encode())
    try:
        for token in [*llm.tokenize(text.encode(), add_bos=False), llm.token_eos()]:
            data = (llama_cpp.llama_token_data * 1)(llama_cpp.llama_token_data(token, 0.0, 0.0))
            array = llama_cpp.llama_token_data_array(data, 1, -1, False)
            llama_cpp.llama_sampler_apply(sampler, ctypes.byref(array))
            if data[0].logit == -math.inf:
                return False
            llama_cpp.llama_sampler_accept(sampler, token)
        return True
    finally:
        llama_cpp.llama_sampler_free(sampler)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_patterns_take_what_python_finds(llm: Llama, pattern: str) -> None:
    grammar, rng = grammar_of_schema({"type": "string", "pattern": pattern}), random.Random(pattern)
    found = [0, 0]
    examples = [
        "ba",
        "123",
        "ac",
        "bc",
        "a",
        "ab",
        "abab",
        "a.b",
        "12",
        'a/b"c',
        "\n",
        "x",
        '"',
        "aä",
        "a\\",
        "a-",
        "é-!",
        "ä-",
        "a1@b",
        "",
        "aa",
        " 1",
        "äb",
    ]
    for n in range(400):
        text = examples[n] if n < len(examples) else "".join(rng.choices(LETTERS, k=rng.randrange(6)))
        is_found = re.search(pattern.replace("$", r"\Z"), text, re.ASCII) is not None
        assert accepts(llm, grammar, json.dumps(text, ensure_ascii=False)) == is_found, text
        found[is_found] += 1
    assert all(found)


@pytest.mark.parametrize(("schema", "said"), REFUSED, ids=lambda s: json.dumps(s)[:60])
def test_schemas_that_no_grammar_follows(llm: Llama, schema: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        grammar = grammar_of_schema(schema)
        assert grammar_fault(llm.model, grammar) == ""
        llm.create_completion("x", grammar=grammar, max_tokens=1)


def test_schemas_that_double(llm: Llama) -> None:
    defs: dict[str, Any] = {"d0": of(a={"const": 1})}
    for i in range(1, 40):
        defs[f"d{i}"] = {"allOf": [{"$ref": f"#/$defs/d{i - 1}"}, {"$ref": f"#/$defs/d{i - 1}"}]}
    with pytest.raises(ValueError, match=r"too much|more than"):
        grammar_of_schema({"$ref": "#/$defs/d39", "$defs": defs})


def test_schemas_that_take_long(llm: Llama) -> None:
    """Titles and names made to slow the converter down: at once, or refused at once."""
    begun = time.monotonic()
    grammar_of_schema({"type": "object", "title": "re" + "f" * 120_000})
    with pytest.raises(ValueError, match="262144"):
        grammar_of_schema(of(**{chr(0x4E00 + i): {"const": i} for i in range(10_000)}))
    assert time.monotonic() - begun < 5


def test_chats_and_tools(llm: Llama) -> None:
    """By llama-cpp-python's own handlers, too; what it makes for others stays as it is."""
    schema = of(size={"enum": ["größe 😀"]}, path={"enum": ["C:\\new"]})
    made = Llama(DEMO, n_ctx=512, n_threads=1, verbose=False, chat_format="chatml")
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    hi: Any = [{"role": "user", "content": "Hi"}]
    want = {"size": "größe 😀", "path": "C:\\new"}
    answer: Any = made.create_chat_completion(hi, response_format=form)
    assert json.loads(answer["choices"][0]["message"]["content"]) == want
    tool: Any = {
        "type": "function",
        "function": {"name": "f", "parameters": {"$ref": "#/$defs/a", "$defs": {"a": schema}}},
    }
    answer = made.create_chat_completion(
        hi, tools=[tool], tool_choice={"type": "function", "function": {"name": "f"}}
    )
    assert json.loads(answer["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"]) == want
    made.close()
    assert "ref" not in llama_cpp.llama_grammar.json_schema_to_gbnf(json.dumps({"type": "string"}))
