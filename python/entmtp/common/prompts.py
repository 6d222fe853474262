"""Files of prompts: JSON lines, as benchmarks and chat datasets have them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .fields import parse_json
from .files import read_text

IDS = ("id", "task_id", "question_id")
ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, str]  # role, content
FORMS = "prompt (text), messages (role and content) or turns (texts of the user)"


@dataclass(frozen=True)
class Question:
    """One line of a file: what the user says, and what was said before.

    Attributes:
        turns: of the user, in their order; each is asked after the answer to the one before.
        before: messages in front of the first turn.
    """

    id: str
    turns: tuple[str, ...]
    before: tuple[Message, ...] = ()

    @property
    def text(self) -> str:
        """What the user says first."""
        return self.turns[0]

    @property
    def messages(self) -> list[Message]:
        """The conversation up to the first answer."""
        return [*self.before, {"role": "user", "content": self.text}]


def question_of(item: Any, name: str) -> Question:
    """A line's question; `name` is its id if it has none.

    Raises:
        KeyError, IndexError, TypeError, ValueError: it holds none.
    """
    before: list[Message] = []
    if "prompt" in item:
        turns = [item["prompt"]]
    elif "messages" in item:
        *before, last = [{"role": m["role"], "content": m["content"]} for m in item["messages"]]
        while last["role"] == "assistant":  # an answer is there already
            *before, last = before
        if last["role"] != "user" or any(m["role"] not in ROLES for m in before):
            raise ValueError("messages do not end with the user's")
        turns = [last["content"]]
    else:
        turns = item["turns"]
    texts = [*turns, *(m["content"] for m in before)]
    if not turns or not isinstance(turns, list) or not all(isinstance(t, str) for t in texts):
        raise TypeError("no text")
    name = str(next((item[k] for k in IDS if k in item), name))
    return Question(name, tuple(turns), tuple(before))


def by_task(path: str | Path) -> dict[str, list[Question]]:
    """The questions of a file whose lines name their task, by task.

    Raises:
        ValueError, OSError: as `read_questions`.
    """
    found: dict[str, list[Question]] = {}
    lines = [line for line in read_text(path).split("\n") if line.strip()]
    for line, question in zip(lines, read_questions(path), strict=True):
        found.setdefault(str(parse_json(line).get("task", Path(path).stem)), []).append(question)
    return found


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """A question of each line of a JSONL file; lines without an id are called by their number.

    Raises:
        ValueError: a line that is none; the text names it. OSError: no such file.
    """
    found: list[Question] = []
    for i, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(question_of(parse_json(line), str(i)))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError):
            raise ValueError(f"{path}, line {i}: expected a JSON object with {FORMS}") from None
    if not found:
        raise ValueError(f"{path} holds no prompts")
    return found[:limit]
