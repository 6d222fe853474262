"""The prompt that a model's chat template makes of messages."""

from __future__ import annotations

from typing import Any, cast

import llama_cpp
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import ChatFormatterResponse, register_chat_format

from ..common.errors import EntmtpError

Message = dict[str, str]
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


def prompt_length(llm: llama_cpp.Llama, messages: list[Message]) -> int:
    """Tokens of the prompt that the model's chat template makes of messages.

    Raises:
        EntmtpError: the template refuses them.
    """
    renderer = _Renderer(llm)
    try:
        llama_cpp.Llama.create_chat_completion(
            cast(Any, renderer), messages=cast(Any, messages), stream=True, max_tokens=1
        )
    except (TemplateError, ValueError) as e:
        raise EntmtpError(f"the model's chat template refuses this conversation: {e}") from None
    prompt = renderer.prompt
    return len(llm.tokenize(prompt.encode(), special=True) if isinstance(prompt, str) else prompt)
