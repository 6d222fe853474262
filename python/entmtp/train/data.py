"""What the user gives to train on: documents, and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..common.errors import ModelError
from ..common.fields import parse_json
from ..common.files import expanded
from ..common.prompts import FORMS, Question, question_of


@dataclass(frozen=True)
class Data:
    """The user's data: documents to read, prompts to answer."""

    documents: tuple[str, ...]
    prompts: tuple[Question, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.documents)} documents"] * bool(self.documents)
        parts += [f"{len(self.prompts)} prompts"] * bool(self.prompts)
        return " and ".join(parts) or "nothing"


def read_data(paths: Sequence[str]) -> Data:
    """Read files and folders: JSON lines with a field `text` (a document), or `prompt`, `messages` or `turns` (to be
    answered), or plain text. Of a folder, all files that are UTF-8 text are read.

    Raises:
        ModelError: a file that cannot be read, or no text in all of them.
    """
    documents: list[str] = []
    prompts: list[Question] = []
    for name in paths:
        path = expanded(name)
        if not path.exists():
            raise ModelError(f"--data {name}: there is no such file or folder")
        if path.is_dir():
            for inner in sorted(p for p in path.rglob("*") if p.is_file()):
                documents += [text for text in [_utf8(inner)] if text]
        elif path.suffix == ".jsonl":
            _read_lines(path, documents, prompts)
        else:
            text = _utf8(path)
            if text is None:
                raise ModelError(f"--data {name}: this is no UTF-8 text; give text files, or .jsonl")
            documents.append(text)
    data = Data(tuple(t for t in documents if t.strip()), tuple(q for q in prompts if q.text.strip()))
    if paths and not data.documents and not data.prompts:
        raise ModelError(
            f"--data {' '.join(paths)}: there is no text in it; leave --data out to train without any"
        )
    return data


def _utf8(path: Path) -> str | None:
    """A file's text; None if it holds something else."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _read_lines(path: Path, documents: list[str], prompts: list[Question]) -> None:
    text = _utf8(path)
    if text is None:
        raise ModelError(f"--data {path}: this is no UTF-8 text")
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = parse_json(line)
            if "text" in item:
                documents.append(item["text"] + "")
            else:
                prompts.append(question_of(item, str(i)))
        except (KeyError, IndexError, TypeError, AttributeError, ValueError) as e:
            raise ModelError(
                f"--data {path}, line {i}: expected a JSON object with text (a document), {FORMS}"
            ) from e
