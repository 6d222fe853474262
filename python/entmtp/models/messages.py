"""Messages of a chat as templates know them, and what their answers tell."""

from __future__ import annotations

import traceback
from inspect import signature
from typing import Any

import llama_cpp
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import (
    Jinja2ChatFormatter,
    LlamaChatCompletionHandlerRegistry,
    get_chat_completion_handler,
)

TEMPLATE = "tokenizer.chat_template"  # the key in a file's metadata; those of further ones begin with it


SIGNATURE = signature(llama_cpp.Llama.create_chat_completion)
FORMATS = frozenset(LlamaChatCompletionHandlerRegistry()._chat_handlers)  # those that come with it
# what templates, and the functions that call them, have by these names
TAKEN = {
    "llama", "bos_token", "eos_token", "add_generation_prompt", "raise_exception", "strftime_now",
    *SIGNATURE.parameters,
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


def plain_message(message: Any, knows_calls: bool = True) -> dict[str, Any]:
    """A message with its content as one text, where OpenAI has lists of parts, or nothing.

    Args:
        knows_calls: its reader looks for None beside calls of tools; others would print it.

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
    return {**message, "content": content if knows_calls and message.get("tool_calls") else content or ""}


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


def answer_chat(llm: Any, messages: Any, asked: dict[str, Any], names: Any) -> Any:
    """What `llama_cpp.Llama.create_chat_completion` does, with further names for the chat template.

    Raises:
        ValueError: one that templates have anyway, or that is none.
    """
    if not isinstance(names or {}, dict):
        raise ValueError(f"chat_template_kwargs is {names!r:.40}, it must be a dict of names")
    for name in names or {}:
        if not isinstance(name, str) or not name.isidentifier() or name in TAKEN:
            raise ValueError(f"chat_template_kwargs: {name!r:.40} is no name that templates can be given")
    bound = SIGNATURE.bind(None, messages, **asked)
    bound.apply_defaults()
    given = {name: value for name, value in bound.arguments.items() if name != "self"}
    handler = (
        llm.chat_handler
        or llm.chat_handlers.get(llm.chat_format)
        or get_chat_completion_handler(llm.chat_format)
    )
    return handler(llama=llm, **{**(names or {}), **given})


def plain_messages(llm: Any, messages: Any) -> Any:
    """Those of a chat as `plain_message` has them, where its file's template, or a format of llama-cpp-python, writes
    the prompt; handlers of users take more.

    Raises:
        ValueError: one is no message.
    """
    is_template = llm.chat_format in llm.chat_handlers
    if llm.chat_handler is not None or not (is_template or llm.chat_format in FORMATS):
        return messages
    knows_calls = not is_template or "tool_calls" in template_of(llm)
    return [plain_message(message, knows_calls) for message in messages]


def template_of(llm: Any) -> str:
    """The chat template of its file that writes its prompts, or nothing where a format of llama-cpp-python does."""
    if llm.chat_handler is None and llm.chat_format in FORMATS:
        return ""
    named = f"tokenizer.{str(llm.chat_format).removesuffix('.default')}"
    return str(llm.metadata.get(named) or llm.metadata.get(TEMPLATE, ""))


def with_texts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same with an empty text where there is none: some templates join it to others unasked."""
    return [{**message, "content": message.get("content") or ""} for message in messages]
