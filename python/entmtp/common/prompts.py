"""Files of prompts: JSON lines, as benchmarks have them."""

from __future__ import annotations

import json
from pathlib import Path

IDS = ("id", "task_id", "question_id")


def read_items(path: str | Path, limit: int | None = None) -> list[tuple[str, str]]:
    """(id, prompt) of each line of a JSONL file; lines without an id are called by their number.

    Spec-Bench's `turns` count by their first.

    Raises:
        ValueError: a line that is none; the text names it. OSError: no such file.
    """
    items: list[tuple[str, str]] = []
    for i, line in enumerate(Path(path).read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            prompt = item["prompt"] if "prompt" in item else item["turns"][0]
            name = str(next((item[k] for k in IDS if k in item), i))
        except (json.JSONDecodeError, KeyError, IndexError, TypeError):
            prompt = name = None
        if not isinstance(prompt, str) or name is None:
            raise ValueError(f"{path}, line {i}: expected a JSON object with a text field prompt")
        items.append((name, prompt))
    if not items:
        raise ValueError(f"{path} holds no prompts")
    return items[:limit]


def read_prompts(path: str | Path, limit: int | None = None) -> list[str]:
    """The prompts of `read_items`."""
    return [prompt for _, prompt in read_items(path, limit)]
