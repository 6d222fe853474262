"""What models are asked: `--prompts` and `--suite`, as conversations where they have several turns."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from ..common.errors import EntmtpError, UsageError
from ..common.prompts import Question, by_task, read_questions
from ..llama import Llama
from ..measure.turns import Prompt, decode
from ..models.assets import assets
from ..models.templates import fitting_tokens

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
