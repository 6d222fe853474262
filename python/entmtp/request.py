"""What a call asks for: its arguments by name, refused in a sentence where llama-cpp-python would pass them over."""

from __future__ import annotations

import inspect
import json
import math
import numbers
import operator
import re
from collections.abc import Iterable
from typing import Any

import llama_cpp

from .grammars import LONGEST_GRAMMAR, gbnf_of_schema
from .native import log

LONGEST_REST = 3  # tokens beyond max_tokens that an answer may have, for the rest of a character
WHOLE = ("max_tokens", "top_k", "logprobs", "top_logprobs", "seed", "mirostat_mode")
REAL = (
    "temperature", "top_p", "min_p", "typical_p", "tfs_z", "repeat_penalty", "frequency_penalty", "presence_penalty",
    "mirostat_tau", "mirostat_eta",
)  # fmt: skip
LARGEST = (1 << 31) - 1
HALF = re.compile(r"[\ud800-\udfff]")  # of a surrogate pair
FORMS = ("text", "json_object", "json_schema")


# of its methods; the class itself may be lent to another one (serve)
SIGNATURES = {
    name: inspect.signature(getattr(llama_cpp.Llama, name))
    for name in ("create_completion", "create_chat_completion")
}


def by_name(call: str, first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a method of `llama_cpp.Llama` behind its first, those that were given, by their names.

    Raises:
        TypeError: it has none of that name, or one is there twice.
    """
    given = SIGNATURES[call].bind(None, first, *args, **kwargs).arguments
    return dict(list(given.items())[2:])


def most_tokens(asked: dict[str, Any]) -> int | None:
    """`max_tokens` of `create_completion`; None: as many as fit."""
    most = asked.get("max_tokens", 16)
    return None if most is None or most <= 0 else int(most)


def grammar_fault(model: Any, grammar: Any) -> str:
    """Why llama.cpp cannot read a `LlamaGrammar`, or nothing; llama-cpp-python goes on without it, or ends the process.

    Args:
        model: `llama_model *` whose vocabulary it is for.
    """
    vocab = llama_cpp.llama_model_get_vocab(model)
    with log.kept() as said:  # it repeats the grammar, which may be a stranger's
        sampler = llama_cpp.llama_sampler_init_grammar(
            vocab, grammar._grammar.encode(), grammar._root.encode()
        )
    if sampler:
        llama_cpp.llama_sampler_free(sampler)
        return ""
    reasons = [line.partition("error parsing grammar: ")[2] for line in said]
    why = "".join(c if c.isprintable() else "?" for c in next(filter(None, reasons), ""))
    return why.strip() or "it is not GBNF, has no rule named root, or leads to too much"


def grammar_of_text(text: str) -> Any:
    """A `LlamaGrammar` of GBNF.

    Raises:
        ValueError: it is too long to be read while others wait.
    """
    if len(text) > LONGEST_GRAMMAR:
        raise ValueError(f"grammar: it has {len(text)} characters, it may have {LONGEST_GRAMMAR}")
    return llama_cpp.LlamaGrammar.from_string(text, verbose=False)


def grammar_of_schema(schema: Any) -> Any:
    """A `LlamaGrammar` that answers follow a JSON schema by.

    Raises:
        ValueError: the schema has a part that no grammar is made of; the text names it.
    """
    if len(written := json.dumps(schema)) > LONGEST_GRAMMAR:
        raise ValueError(f"schema: it has {len(written)} characters, it may have {LONGEST_GRAMMAR}")
    try:
        return grammar_of_text(gbnf_of_schema(schema))
    except (
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        RecursionError,
        OverflowError,
    ) as e:
        raise ValueError(f"schema: no grammar can be made of this JSON schema: {e}") from None


def check_request(n_vocab: int, asked: dict[str, Any]) -> None:
    """Refuse what llama-cpp-python would pass over in silence, and what is of another type.

    Args:
        asked: arguments of `create_completion` or `create_chat_completion`, by name.

    Raises:
        ValueError: with one sentence for the user.
    """
    for names, number, what in (
        (WHOLE, numbers.Integral, "a whole number"),
        (REAL, numbers.Real, "a number"),
    ):
        for name in names:
            if asked.get(name) is not None and not isinstance(asked[name], number):
                raise ValueError(f"{name} is {asked[name]!r:.40}, it must be {what}")
    for name in REAL:
        if asked.get(name) is not None and not _is_number(asked[name]):
            raise ValueError(f"{name} is {asked[name]!r:.40}, it must be a number")
    for name in ("top_k", "logprobs", "top_logprobs"):
        if asked.get(name) is not None and not -LARGEST <= asked[name] <= LARGEST:
            raise ValueError(f"{name} is {asked[name]!r:.40}, it may be up to {LARGEST}")
    if asked.get("mirostat_mode") not in (None, 0, 1, 2):
        raise ValueError(f"mirostat_mode is {asked['mirostat_mode']!r:.40}, it must be 0, 1 or 2")
    stop = asked.get("stop")
    if stop is not None and not isinstance(stop, str) and not all(isinstance(s, str) for s in _listed(stop)):
        raise ValueError("stop must be a text, or a list of texts")
    for name, text in (
        ("prompt", asked.get("prompt")),
        *(("stop", s) for s in ([stop] if isinstance(stop, str) else stop or ())),
    ):
        if isinstance(text, str) and HALF.search(text):
            raise ValueError(f"{name} has half of a surrogate pair, which is no text")
    for name, kind, what in (
        ("logit_bias", dict, "a dict of tokens and biases"),
        ("response_format", dict, 'a dict, such as {"type": "json_object"}'),
        ("tools", list, "a list"),
        ("functions", list, "a list"),
        ("grammar", llama_cpp.LlamaGrammar, "a LlamaGrammar, which LlamaGrammar.from_string makes of a text"),
    ):
        if asked.get(name) is not None and not isinstance(asked[name], kind):
            raise ValueError(f"{name} must be {what}")
    _check_bias(n_vocab, asked.get("logit_bias") or {})
    temperature = asked.get("temperature")
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {float(temperature):g}, it must be 0 or more")
    penalty = asked.get("repeat_penalty")
    if penalty is not None and not 0 < penalty < 1e6:
        raise ValueError(
            f"repeat_penalty is {float(penalty):g}, it must be above 0 (1: none) and below a million"
        )
    logprobs = asked.get("logprobs")
    if logprobs is not None and logprobs < 0:
        raise ValueError(f"logprobs is {logprobs}, it must be 0 or more")
    top = asked.get("top_logprobs")
    if top is not None and top < 0:
        raise ValueError(f"top_logprobs is {top}, it must be 0 or more")
    if top and not logprobs:
        raise ValueError("top_logprobs are told with logprobs=True")
    _check_form(asked.get("response_format") or {})
    # functions are of before tools
    tools = asked.get("tools") or [{"function": function} for function in asked.get("functions") or []]
    called = asked.get("function_call")
    _check_tools(
        tools, asked.get("tool_choice") or ({"function": called} if isinstance(called, dict) else None)
    )


def check_texts(texts: Any) -> None:
    """Refuse what no embeddings can be made of.

    Raises:
        ValueError: it is neither a text nor a list of them, or empty.
    """
    if isinstance(texts, str):
        return
    if not isinstance(texts, (list, tuple)) or not all(isinstance(text, str) for text in texts):
        raise ValueError("input must be a text, or a list of texts")
    if not texts:
        raise ValueError("input is empty: there is nothing to embed")


def check_sizes(given: dict[str, Any]) -> None:
    """Refuse sizes of a context that llama-cpp-python would cut to 32 bits, or end the process with.

    Raises:
        ValueError: names the argument.
    """
    for name, least in (("n_ctx", 0), ("n_batch", 1), ("n_ubatch", 1)):
        value = given.get(name)
        if value is None:
            continue
        is_whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not is_whole or not least <= int(value) <= LARGEST:
            raise ValueError(f"{name} is {value!r}, it must be a whole number from {least} to {LARGEST}")
    if not math.isfinite(given.get("lora_scale") or 0.0):
        raise ValueError(f"lora_scale is {given['lora_scale']}, it must be a finite number")


def whole_tokens(prompt: Any) -> list[int]:
    """A prompt of tokens.

    Raises:
        ValueError: one of them is no whole number.
    """
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise ValueError("the prompt must be a text, or a list of tokens, which are whole numbers") from None


def _is_number(value: Any) -> bool:
    try:
        return not math.isnan(float(value))
    except OverflowError:
        return False


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else [None]


def _check_bias(n_vocab: int, biases: dict[Any, Any]) -> None:
    if len(biases) > n_vocab:
        raise ValueError(f"logit_bias has more entries than there are tokens, {n_vocab}")
    for key, value in biases.items():
        try:
            token, bias = int(key) if isinstance(key, str) else operator.index(key), float(value)
        except (TypeError, ValueError, OverflowError):
            token, bias = -1, math.nan
        if not 0 <= token < n_vocab or math.isnan(bias):
            raise ValueError(f"logit_bias: {key!r}: {value!r} is no bias of a token from 0 to {n_vocab - 1}")


def _check_form(form: dict[str, Any]) -> None:
    if form and form.get("type") not in FORMS:
        raise ValueError(
            f"response_format: its type is {form.get('type')!r}, it must be one of {', '.join(FORMS)}"
        )
    if form.get("type") == "json_object" and form.get("schema") is not None:
        grammar_of_schema(form["schema"])


def with_schema(form: dict[str, Any] | None) -> dict[str, Any] | None:
    """A response format as llama-cpp-python knows it: OpenAI's `json_schema` is a `json_object` with its schema.

    Raises:
        ValueError: there is no schema.
    """
    if not isinstance(form, dict) or form.get("type") != "json_schema":
        return form
    named = form.get("json_schema")
    if not isinstance(named, dict) or not isinstance(named.get("schema"), dict):
        raise ValueError("response_format: json_schema has no schema")
    return {"type": "json_object", "schema": named["schema"]}


def with_parameters(tool: Any) -> Any:
    """A tool, or a function of before tools, with parameters, which may be left out."""
    if isinstance(tool, dict) and isinstance(tool.get("function"), dict):
        return {**tool, "function": with_parameters(tool["function"])}
    if not isinstance(tool, dict) or "name" not in tool or tool.get("parameters") is not None:
        return tool
    return {**tool, "parameters": {"type": "object", "properties": {}}}


def _check_tools(tools: list[Any], choice: Any) -> None:
    functions = {}
    for tool in tools:
        function = (tool.get("function") if isinstance(tool, dict) else None) or {}
        if (
            not isinstance(function, dict)
            or not isinstance(function.get("name"), str)
            or not function["name"]
        ):
            raise ValueError(f"tools: {tool!r:.80} names no function")
        functions[function["name"]] = function
    if isinstance(choice, dict):
        chosen = choice.get("function")
        wanted = chosen.get("name") if isinstance(chosen, dict) else chosen
        if not isinstance(wanted, str) or wanted not in functions:
            raise ValueError(f"tool_choice: there is no {wanted!r} in tools")
        grammar_of_schema(functions[wanted].get("parameters") or {"type": "object"})
    elif choice not in (None, "none", "auto"):
        raise ValueError(f"tool_choice is {choice!r}, it must be none, auto, or name a function of tools")
