"""Messages of a chat as templates know them, and what their answers tell."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

import llama_cpp
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter, get_chat_completion_handler

TEMPLATE = "tokenizer.chat_template"  # the key in a file's metadata; those of further ones begin with it


# what templates, and the functions that call them, have by these names
TAKEN = {
    "llama", "bos_token", "eos_token", "add_generation_prompt", "raise_exception", "strftime_now",
    *signature(llama_cpp.Llama.create_chat_completion).parameters,
}  # fmt: skip


def unreadable(template: str) -> str:
    """Why a chat template cannot be read, or nothing."""
    try:
        Jinja2ChatFormatter(template, "", "")
    except (TemplateError, RecursionError) as e:
        return f"{type(e).__name__}: {e}".splitlines()[0]
    return ""


def in_template(error: BaseException) -> bool:
    """A chat template did with what it was given what cannot be done."""
    if error.__cause__ is not None and in_template(error.__cause__):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return isinstance(error, TemplateError) or "<template>" in (frame.filename for frame in frames)


def plain_message(message: Any) -> dict[str, Any]:
    """A message with its content as one text: OpenAI has lists of parts, and nothing beside calls of tools.

    Raises:
        ValueError: it is no message, or has a part that is no text.
    """
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f"messages: {message!r:.80} is no message: a dict with a role and a content")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        content = "\n".join(_text(part) for part in content)
    if content is not None and not isinstance(content, str):
        raise ValueError(f"messages: a content is {content!r:.80}, it must be a text, or a list of parts")
    return {**message, "content": content or ""}


def _text(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        raise ValueError(f"messages: a part of a content is {kind!r:.40}, and this model reads text")
    return str(part["text"])


def top_of(answer: Any, n: int) -> Any:
    """An answer of a chat, or a chunk of one, with no more than n tokens beside each: llama-cpp-python adds the token
    itself."""
    for choice in answer["choices"]:
        for token in (choice.get("logprobs") or {}).get("content") or ():
            token["top_logprobs"] = token["top_logprobs"][:n]
    return answer


@contextmanager
def with_names(llm: Any, names: dict[str, Any]) -> Iterator[None]:
    """Within this the chat template of a `llama_cpp.Llama` knows further names.

    Raises:
        ValueError: one that templates have anyway, or that is none.
    """
    if not names:
        yield
        return
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or name in TAKEN:
            raise ValueError(f"chat_template_kwargs: {name!r:.40} is no name that templates can be given")
    before = llm.chat_handler
    handler = (
        before or llm._chat_handlers.get(llm.chat_format) or get_chat_completion_handler(llm.chat_format)
    )
    llm.chat_handler = lambda **asked: handler(**{**names, **asked})
    try:
        yield
    finally:
        llm.chat_handler = before
