"""What the subcommands are given: prompts, traces, lists, and models, real ones or random weights by shape."""

from __future__ import annotations

import tempfile
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..common.errors import EntmtpError, UsageError
from ..common.prompts import Question, by_task, read_questions
from ..llama import Llama
from ..measure.turns import Prompt, decode
from ..models.assets import assets
from ..models.shapes import SHAPES, write_heads, write_model
from ..models.templates import fitting_tokens
from ..options import DEMO, load, model_files, no_heads

PAPER = ("humaneval", "gsm8k", "literature", "sharegpt")
SUITES = ("paper", "spec-bench")


def read_tasks(args: Namespace) -> dict[str, list[Question]]:
    """Questions of `--prompts` by the name of their file, and of `--suite` by task.

    Raises:
        UsageError: neither is given.
    """
    tasks: dict[str, list[Question]] = {}
    suite: str | None = getattr(args, "suite", None)
    if not args.prompts and not suite:
        raise UsageError(f"give --prompts with a file of prompts, or --suite with one of {', '.join(SUITES)}")
    if suite == "spec-bench":
        for task, questions in by_task(assets() / "prompts" / "spec_bench.jsonl").items():
            tasks[task] = questions[: args.limit]
    elif suite:
        tasks = {task: read_questions(assets() / "prompts" / f"{task}.jsonl", args.limit) for task in PAPER}
    for path in args.prompts or ():
        tasks.setdefault(Path(path).stem, []).extend(read_questions(path, args.limit))
    return tasks


def tokens_of(llm: Llama, question: Question, args: Namespace) -> list[int]:
    """A question as the model is asked it, cut to leave room for an answer of `--tokens`."""
    return fitting_tokens(llm, question, llm.n_ctx() - args.tokens - 1, args.raw)


def turns_of(llm: Llama, question: Question, args: Namespace) -> list[list[int]]:
    """Every turn of a question as the model is asked it, after its own greedy answers to the turns before."""
    found = [tokens_of(llm, question, args)]
    said = [*question.before, {"role": "user", "content": question.text}]
    for turn in question.turns[1:]:
        answer = decode(llm, Prompt(found[-1], args.tokens)).tokens
        text = llm.detokenize([t for t in answer if t != llm.token_eos()]).decode("utf-8", errors="replace")
        said.append({"role": "assistant", "content": text})
        asked = Question(question.id, (turn,), tuple(said))
        try:
            found.append(tokens_of(llm, asked, args))
        except EntmtpError:
            break  # no room for this turn
        said.append({"role": "user", "content": turn})
    return found


def asked_of(llm: Llama, tasks: dict[str, list[Question]], args: Namespace) -> list[tuple[str, list[int]]]:
    """Task and tokens of every question."""
    return [(task, tokens_of(llm, question, args)) for task in tasks for question in tasks[task]]


def prompts_of(llm: Llama, questions: Sequence[Question], args: Namespace, temp: float) -> list[Prompt]:
    """Every turn of some questions, as they are answered at a temperature."""
    return [Prompt(t, args.tokens, temp) for question in questions for t in turns_of(llm, question, args)]


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
    return changed(args, draft="off", heads=None, draft_model=None)


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
