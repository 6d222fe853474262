"""What `create_completion` and `create_chat_completion` would pass over in silence is refused, with a reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from entmtp import Llama
from entmtp.common.json_schema import UNFOLLOWED, check_schema

QUESTION = [{"role": "user", "content": "What is left?"}]


@pytest.fixture
def llm(load: Callable[..., Llama]) -> Llama:
    return load(heads="hydra", trees="generic-hydra:n8", policy="static")


@pytest.mark.parametrize("bias", [{4096: 1.0}, {-1: 1.0}, {"x": 1.0}, {3: float("nan")}, {3: "much"}])
def test_biases_of_no_token(llm: Llama, bias: dict[Any, Any]) -> None:
    for call in (
        lambda: llm("Hello", max_tokens=2, logit_bias=bias),
        lambda: llm.create_chat_completion(QUESTION, max_tokens=2, logit_bias=bias),
    ):
        with pytest.raises(ValueError, match="logit_bias"):
            call()


def test_biases_of_tokens_count(llm: Llama) -> None:
    def text(**more: Any) -> str:
        return str(llm("def add(a, b):", max_tokens=6, temperature=0, **more)["choices"][0]["text"])

    plain = text()
    first = llm.tokenize(plain.encode(), add_bos=False)[0]
    assert text(logit_bias={str(first): -100.0}) != plain
    assert set(text(logit_bias={llm.n_vocab() - 1: 1000.0})) != set(plain)


def test_what_no_answer_can_be_to(llm: Llama) -> None:
    with pytest.raises(ValueError, match="messages are empty"):
        llm.create_chat_completion([])
    with pytest.raises(ValueError, match="temperature is -3"):
        llm("Hello", temperature=-3)
    from llama_cpp import LlamaGrammar

    with pytest.raises(ValueError, match="grammar cannot be read"):
        llm("Hello", grammar=LlamaGrammar.from_string("root ::= ("))


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([{"type": "function"}], "names no function"),
        ([{"type": "function", "function": {"parameters": {}}}], "names no function"),
        ([{"type": "function", "function": {"name": "g", "parameters": {}}}], "there is no 'f' in tools"),
        (None, "there is no 'f' in tools"),
    ],
)
def test_tools_that_are_none(llm: Llama, tools: Any, words: str) -> None:
    choice: Any = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(ValueError, match=words):
        llm.create_chat_completion(QUESTION, tools=tools, tool_choice=choice)


@pytest.mark.parametrize("keyword", sorted(UNFOLLOWED))
def test_keywords_that_no_grammar_follows(llm: Llama, keyword: str) -> None:
    """Each of them is passed over in silence by the converter, or ends in any JSON at all."""
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {keyword: 3}}}}
    with pytest.raises(ValueError, match=rf"schema\.properties\.a\.items: the keyword {keyword} cannot"):
        llm.create_chat_completion(QUESTION, response_format={"type": "json_object", "schema": schema})


def test_schemas_that_are_followed(llm: Llama) -> None:
    schema = {
        "title": "Fruit", "description": "what is left", "type": "object", "additionalProperties": False,
        "$defs": {"kind": {"enum": ["apple", "pear"]}},
        "properties": {"kind": {"$ref": "#/$defs/kind"}, "left": {"type": "boolean", "default": False}},
        "required": ["kind", "left"],
    }  # fmt: skip
    for seed in range(3):
        answer = llm.create_chat_completion(
            QUESTION,
            response_format={"type": "json_object", "schema": schema},
            max_tokens=60,
            seed=seed,
            temperature=1,
        )
        found = json.loads(answer["choices"][0]["message"]["content"])
        assert found["kind"] in ("apple", "pear") and isinstance(found["left"], bool) and len(found) == 2


KEYS = ("type", "items", "anyOf", "properties", "$defs", "not", "minimum", "enum", "additionalProperties")
json_values: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4),
    max_leaves=12,
)


def mentions(schema: Any) -> bool:
    """Whether a schema reached through schemas has such a keyword: written anew, without the checker's tables."""
    if not isinstance(schema, dict):
        return False
    if set(schema) & set(UNFOLLOWED):
        return True
    below = [schema.get("items"), schema.get("additionalProperties")]
    below += schema["anyOf"] if isinstance(schema.get("anyOf"), list) else []
    for key in ("properties", "$defs"):
        below += list(schema[key].values()) if isinstance(schema.get(key), dict) else []
    return any(map(mentions, below))


@given(json_values)
def test_any_json_is_refused_or_has_no_such_keyword(schema: Any) -> None:
    try:
        check_schema(schema)
    except ValueError as e:
        assert str(e).startswith("schema")
        return
    assert not mentions(schema)


def test_deep_schemas_are_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(10_000):
        schema = {"items": schema}
    with pytest.raises(ValueError, match="64 levels deep"):
        check_schema(schema)
