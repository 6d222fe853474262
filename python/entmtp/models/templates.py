"""The prompt that a model's chat template makes of messages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import llama_cpp
from llama_cpp.llama_chat_format import ChatFormatterResponse, register_chat_format

from ..common.errors import EntmtpError
from ..common.prompts import Message, Question
from .messages import in_template

CONTINUE = "entmtp-continue"


@register_chat_format(CONTINUE)
def _continue(messages: list[Any], **_: Any) -> ChatFormatterResponse:
    """For models without a chat template, which only know how to go on: what was said so far, as one text."""
    text = ""
    for message in messages:
        text += message["content"] + ("\n\n" if message["role"] == "system" else "")
        text += "\n" if message["role"] == "assistant" and not text.endswith("\n") else ""
    return ChatFormatterResponse(prompt=text)


class _Renderer:
    """Stands in for a model where the chat template is applied, and keeps the prompt instead of completing it."""

    def __init__(self, llm: llama_cpp.Llama):
        self._llm = llm
        self.prompt: list[int] | str = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llm, name)

    def create_completion(self, prompt: list[int] | str, **_: Any) -> Any:
        self.prompt = prompt
        return iter(())


def has_template(llm: llama_cpp.Llama) -> bool:
    """Whether the model's file says how a conversation is put to it."""
    return any(key.startswith("tokenizer.chat_template") for key in llm.metadata)


def conversation_tokens(llm: llama_cpp.Llama, messages: Sequence[Message]) -> list[int]:
    """The prompt that the model's chat template makes of messages, for the answer to the last of them.

    Special tokens of the template are tokens here. A vocabulary that wants a BOS has one in front, whether the template
    writes it or not, as llama.cpp's server does it.

    Raises:
        EntmtpError: the template refuses them.
    """
    renderer = _Renderer(llm)
    try:
        llama_cpp.Llama.create_chat_completion(
            cast(Any, renderer), messages=cast(Any, list(messages)), stream=True, max_tokens=1
        )
    except Exception as e:
        if not isinstance(e, ValueError) and not in_template(e):
            raise
        raise EntmtpError(f"the model's chat template refuses this conversation: {e}") from None
    prompt = renderer.prompt
    tokens = llm.tokenize(prompt.encode(), add_bos=False, special=True) if isinstance(prompt, str) else prompt
    if not llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(llm.model)):
        return tokens
    bos = llm.token_bos()
    written = next((i for i, token in enumerate(tokens) if token != bos), len(tokens))
    return [bos, *tokens[written:]]


def prompt_length(llm: llama_cpp.Llama, messages: Sequence[Message]) -> int:
    """Tokens of the prompt that the model's chat template makes of messages.

    Raises:
        EntmtpError: the template refuses them.
    """
    return len(conversation_tokens(llm, messages))


def question_tokens(llm: llama_cpp.Llama, question: Question, raw: bool = False) -> list[int]:
    """A question as the model is asked it: by its chat template, or without one (or `raw`) as text to go on with.

    Raises:
        EntmtpError: the template refuses it, or raw text is asked for and there are messages before it.
    """
    if has_template(llm) and not raw:
        return conversation_tokens(llm, question.messages)
    if question.before:
        why = "--raw takes text alone" if raw else "this model has no chat template"
        raise EntmtpError(f"prompt {question.id} holds messages, and {why}; give lines with a field prompt")
    return llm.tokenize(question.text.encode(), add_bos=True, special=False)


def fitting_tokens(llm: llama_cpp.Llama, question: Question, room: int, raw: bool = False) -> list[int]:
    """`question_tokens`, of a question whose end is cut off until it takes `room` tokens at most.

    Raises:
        EntmtpError: as `question_tokens`, or what stands around the question has no room.
    """
    text = question.text
    while len(tokens := question_tokens(llm, question, raw)) > room:
        if not text:
            raise EntmtpError(
                f"prompt {question.id} takes {len(tokens)} tokens, and there is room for {room}"
            )
        text = text[: min(len(text) - 1, len(text) * room // len(tokens))]
        question = replace(question, turns=(text,))
    return tokens


def frame(llm: llama_cpp.Llama) -> tuple[list[int], list[int]]:
    """What the chat template puts before a user's first message, and between it and the answer, as tokens: what two
    prompts have in common that share no token of the message.

    Raises:
        EntmtpError: the template refuses a message.
    """
    a, b = (conversation_tokens(llm, [{"role": "user", "content": text}]) for text in ("Why?", "(1)"))
    before = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    after = next(i for i, (x, y) in enumerate(zip(reversed(a), reversed(b), strict=False)) if x != y)
    return a[:before], a[len(a) - after :]
