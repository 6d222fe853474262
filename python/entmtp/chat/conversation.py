"""A conversation: its messages, what of them fits into the context, and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from ..common.atomic import atomic_path
from ..common.errors import EntmtpError
from ..common.fields import parse_json
from ..llama import Llama
from ..models.templates import Message, prompt_length


@dataclass
class Conversation:
    """Turns of user and assistant, after an optional system message."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + self.turns

    def add(self, role: str, content: str) -> None:
        self.turns.append({"role": role, "content": content})

    def fit(self, llm: Llama, reserve: int) -> int:
        """Drop the oldest turns until `reserve` tokens are left for the answer. Returns how many questions went.

        Raises:
            EntmtpError: the last question alone is too long.
        """
        starts = [i for i, m in enumerate(self.turns) if m["role"] == "user"]
        if not starts:
            raise EntmtpError("there is no question to answer")
        for dropped, start in enumerate(starts):
            rest = Conversation(self.system, self.turns[start if dropped else 0 :])
            n = prompt_length(llm, rest.messages)
            # of the last question, room for a short answer is enough
            if n <= llm.n_ctx() - reserve or (start == starts[-1] and n < llm.n_ctx() - 1):
                self.turns = rest.turns
                return dropped
        raise EntmtpError(
            f"this takes {n} tokens, the context has room for {llm.n_ctx()}: shorten it, or start with a larger --ctx"
        )

    def save(self, path: Path, model: str) -> None:
        """Write the conversation as JSON, whole or not at all.

        Raises:
            EntmtpError: there is a file that is no conversation, or it cannot be written.
        """
        if path.exists():
            try:
                load(path)
            except EntmtpError:
                raise EntmtpError(f"{path} is there and is no conversation: choose another name") from None
        data = {"entmtp_chat": 1, "model": model, "messages": self.messages}
        try:
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", "utf-8")
        except OSError as e:
            raise EntmtpError(f"{path} cannot be written: {(e.strerror or str(e)).lower()}") from None


def load(path: Path) -> Conversation:
    """A saved conversation.

    Raises:
        EntmtpError: the file is missing, or no conversation; the text says what is wrong.
    """
    try:
        if path.exists() and not path.is_file():
            raise EntmtpError(f"{path} is no conversation: it is no file")
        data = parse_json(path.read_text("utf-8-sig"))
    except OSError as e:
        raise EntmtpError(f"{path} cannot be read: {(e.strerror or str(e)).lower()}") from None
    except ValueError as e:
        raise EntmtpError(f"{path} is no conversation: it is not JSON ({e})") from None
    messages = data.get("messages") if isinstance(data, dict) else None
    if not isinstance(messages, list) or not all(
        isinstance(m, dict)
        and isinstance(m.get("content"), str)
        and m.get("role") in ("system", "user", "assistant")
        for m in messages
    ):
        raise EntmtpError(
            f"{path} is no conversation: it needs a list messages of objects with role (system, user or assistant) "
            "and content"
        )
    head = [m["content"] for m in messages if m["role"] == "system"]
    turns = [{"role": m["role"], "content": m["content"]} for m in messages if m["role"] != "system"]
    return Conversation("\n".join(head), turns)
