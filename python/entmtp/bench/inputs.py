"""What the subcommands are given: traces, lists, and models, real ones or random weights by shape."""

from __future__ import annotations

import tempfile
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..llama import Llama
from ..models.shapes import SHAPES, write_heads, write_model
from ..options import DEMO, load, model_files, no_heads


def trace_files(path: str) -> list[Path]:
    """The .npz files that `--traces` names: one, or a folder of them.

    Raises:
        ValueError: there are none.
    """
    found = [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("*.npz"))
    if not found:
        raise ValueError(f"{path} holds no trace files (.npz): entmtp bench study --traces {path} makes them")
    return found


def context_lengths(text: str) -> list[int]:
    """Tokens of context from `512,4k,32k`."""
    found = []
    for part in text.split(","):
        number, factor = (part[:-1], 1024) if part.lower().endswith("k") else (part, 1)
        if not number.isdecimal() or not 0 < int(number) * factor <= 1 << 24:
            raise ArgumentTypeError(f"{part!r} is no number of tokens, like 512 or 4k")
        found.append(int(number) * factor)
    return found


def some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    """A comma-separated list of some of `names`."""

    def parse(text: str) -> list[str]:
        found = [part.strip().lower() for part in text.split(",")]
        if unknown := [part for part in found if part not in names]:
            raise ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(names)}")
        return found

    return parse


def flat(lists: Sequence[Sequence[Any]]) -> list[Any]:
    """One list of what was given with commas, blanks, or both."""
    return list(dict.fromkeys(part for some in lists for part in some))


def changed(args: Namespace, **other: Any) -> Namespace:
    """The options with some replaced."""
    return Namespace(**(vars(args) | other))


def undrafted(args: Namespace) -> Namespace:
    """The options without anything that drafts."""
    return changed(args, draft="off", heads=None, draft_model=None, draft_vocab=None)


def load_plain(args: Namespace, **more: Any) -> Llama:
    """The model that the options name, without heads."""
    return load(undrafted(args), **more)


def shape_of(name: str) -> tuple[str, str] | None:
    """Shape and type that a name like `1b:q4_k` or `1b` means; None of another name."""
    shape, _, quant = name.partition(":")
    return (shape, quant or "q4_0") if shape in SHAPES and name != DEMO and not Path(name).exists() else None


@contextmanager
def model_of(
    args: Namespace, name: str, drafts: bool = True, arch: str = "hydra", needs_heads: bool = True
) -> Iterator[Namespace]:
    """The options with the model that `name` means: as everywhere, or random weights, which are deleted afterwards.

    Args:
        drafts: with heads, which random weights get, of the kind `arch`.
        needs_heads: False: to draft from the text alone will do.

    Raises:
        ModelError: there is no such file, or there are no heads.
    """
    if shape := shape_of(name):
        with tempfile.TemporaryDirectory(prefix="entmtp-shape-") as folder:
            model = write_model(Path(folder) / "model.gguf", SHAPES[shape[0]], quant=shape[1])
            heads = Path(folder) / "heads.gguf"
            if drafts:
                write_heads(heads, model, SHAPES[shape[0]], arch)
            yield changed(args, model=str(model), heads=str(heads) if drafts else None)
        return
    model, found = model_files(changed(args if drafts else undrafted(args), model=name))
    if drafts and needs_heads and not found:
        raise no_heads("this", model)
    yield changed(args, model=str(model), heads=str(found) if found else None)
