"""Chats of `llama_cpp.Llama`: messages as OpenAI's clients send them, templates that cannot be read or fail."""

from __future__ import annotations

import warnings
from typing import Any

import llama_cpp

from .grammars import followed
from .models.messages import (
    TEMPLATE,
    answer_chat,
    in_template,
    plain_messages,
    top_of,
    unreadable,
    with_texts,
)
from .request import by_name, check_request, with_parameters, with_schema


class Chatting(llama_cpp.Llama):
    """`llama_cpp.Llama` that chats."""

    _given: dict[str, Any]  # arguments that it was made with
    _no_template = ""  # why the template of its file cannot be read

    @property
    def metadata(self) -> dict[str, str]:
        """What the model's file says of it, without chat templates that cannot be read."""
        return self._metadata

    @metadata.setter
    def metadata(self, found: dict[str, str]) -> None:
        unread = {
            name: why
            for name, text in found.items()
            if name.startswith(TEMPLATE) and (why := unreadable(text))
        }
        self._no_template = unread.get(TEMPLATE, "")
        for name, why in unread.items():
            warnings.warn(
                f"{name} of the model cannot be read, and is left out: {why}", RuntimeWarning, stacklevel=4
            )
        self._metadata = {name: text for name, text in found.items() if name not in unread}

    def create_chat_completion(
        self, messages: Any, *args: Any, chat_template_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> Any:
        """As `llama_cpp.Llama.create_chat_completion`, and with OpenAI's `json_schema` as a response format; what it
        would pass over in silence is a ValueError.

        Args:
            chat_template_kwargs: further names for the chat template, such as `{"enable_thinking": False}`.
        """
        if not messages:
            raise ValueError("messages are empty: there is nothing to answer")
        asked = by_name("create_chat_completion", messages, args, kwargs)
        asked["response_format"] = with_schema(asked.get("response_format") or None)
        check_request(self.n_vocab(), asked)
        if self._no_template and self._given.get("chat_format") is None and self.chat_handler is None:
            raise ValueError(
                f"the model's chat template cannot be read ({self._no_template}): give chat_format or chat_handler"
            )
        if isinstance(asked.get("stop"), tuple):
            asked["stop"] = list(asked["stop"])
        for name in ("tools", "functions"):
            if asked.get(name) is not None:
                asked[name] = [with_parameters(tool) for tool in asked[name]]
        n_top = asked.get("top_logprobs") or 0
        if asked.get("logprobs"):
            asked["top_logprobs"] = n_top
        messages = plain_messages(self, messages)
        with followed():
            answer = self._chat(messages, asked, chat_template_kwargs)
        if not asked.get("logprobs"):
            return answer
        return (top_of(chunk, n_top) for chunk in answer) if asked.get("stream") else top_of(answer, n_top)

    def _chat(self, messages: Any, asked: dict[str, Any], names: Any) -> Any:
        try:
            try:
                return answer_chat(self, messages, asked, names)
            except Exception as e:
                if not in_template(e) or all(message.get("content") is not None for message in messages):
                    raise
                return answer_chat(self, with_texts(messages), asked, names)
        except Exception as e:
            if in_template(e):
                raise ValueError(f"the model's chat template cannot write these messages: {e}") from e
            raise
