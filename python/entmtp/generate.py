"""`entmtp generate`: text for one prompt, or a file of answers for a file of prompts.

A batch (`--prompts`) writes an answer per line as soon as it has it. Started again with the same settings it goes on
where it stopped, be it by Ctrl-C, a kill or a power cut.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
import threading
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import options
from .common.atomic import atomic_path, named
from .common.errors import EntmtpError, UsageError
from .common.fields import parse_json
from .common.files import alone, check_output, read_text
from .common.interrupt import ctrl_c_stops
from .common.numbers import COUNT
from .common.progress import progress_bar
from .common.prompts import FORMS, Question, read_questions
from .common.sampling import add_sampling_options, sampling
from .common.streams import leave, printable, run_command
from .llama import Llama
from .measure.speed import Meter, PlainPass, Speed
from .models.channels import CALL, TEXT, Channels
from .models.templates import has_template
from .native import kernels
from .options.grammar import grammar


class Stopped(Exception):
    """The user stopped the answer."""


@dataclass
class Answer:
    """What a prompt got.

    Attributes:
        finish_reason: `"stop"` (the model, or --stop, ended it) or `"length"`.
    """

    text: str
    finish_reason: str
    speed: Speed


class Generator:
    """Gives answers of a model with the same settings, each independent of the ones before."""

    def __init__(self, llm: Llama, args: Namespace):
        self.llm = llm
        self.seed = args.seed
        self.chat, self.system = args.chat, args.system
        self.settings = sampling(args) | {"max_tokens": args.tokens or None}
        self.grammar = grammar(args, llm)
        self.plain = PlainPass.of(llm) if args.stats and args.parallel == 1 else PlainPass()

    def answer(
        self, question: Question, stopped: threading.Event, write: Callable[[str], None] | None = None
    ) -> Answer:
        """The answer to one prompt; `write` gets it piece by piece.

        Raises:
            Stopped: `stopped` was set meanwhile. ValueError: the prompt does not fit into the context.
        """
        llm = self.llm
        llm.reset()  # answers shall not depend on what is in the memory
        meter = Meter(llm, self.plain)
        llm.on_token = lambda token, drafted: meter.token()
        settings: dict[str, Any] = {
            **self.settings,
            "seed": self.seed,
            "grammar": self.grammar,
            "stream": True,
        }
        stream: Any
        if self.chat:
            head = [{"role": "system", "content": self.system}] if self.system else []
            messages: Any = [*head, *question.messages]
            stream = llm.create_chat_completion(messages, **settings)
        else:
            stream = llm.create_completion(question.text, **settings)
        parts: list[str] = []
        channels = Channels()
        reason = "length"
        try:
            for chunk in stream:
                choice = chunk["choices"][0]
                reason = choice["finish_reason"] or reason
                text = choice["delta"].get("content") or "" if self.chat else choice["text"]
                if self.chat:  # of gpt-oss without its thoughts
                    pieces = channels.add(text, last=choice["finish_reason"] is not None)
                    text = "".join(piece.text for piece in pieces if piece.kind in (TEXT, CALL))
                parts.append(text)
                if write and text:
                    write(text)
                if stopped.is_set():
                    raise Stopped
        finally:
            stream.close()
            llm.on_token = None
        if stopped.is_set():
            raise Stopped
        speed = meter.speed()
        self.plain.observe(speed.stats)
        return Answer("".join(parts), reason, speed)


def figures(speed: Speed) -> dict[str, Any]:
    """What --stats tells of an answer."""
    s = speed.stats
    data: dict[str, Any] = {
        "tokens": speed.n_tokens,
        "tokens_per_second": round(speed.tokens_per_second, 1),
        "tokens_per_step": round(s.tokens_per_step, 3),
        "acceptance": round(s.acceptance, 3),
        "entropy": round(s.mean_entropy, 3),
    }
    return data | ({} if speed.speedup is None else {"speedup": round(speed.speedup, 3)})


#
# one prompt
#


def one(generator: Generator, prompt: str, args: Namespace) -> int:
    """Stream one answer to stdout, or put it in a file."""
    if args.outfile and args.outfile.exists() and not args.overwrite:
        raise UsageError(f"{args.outfile} is there already; give --overwrite to replace it, or another name")

    def write(text: str) -> None:
        sys.stdout.write(printable(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()

    with ctrl_c_stops(generator.llm.cancel) as stopped:
        try:
            answer = generator.answer(Question("", (prompt,)), stopped, None if args.outfile else write)
        except Stopped:
            if not args.outfile:
                write("\n")
            return 130
    if args.outfile:
        with atomic_path(args.outfile) as temporary:
            temporary.write_text(answer.text, "utf-8")
    elif not answer.text.endswith("\n"):
        write("\n")
    if args.stats:
        print(answer.speed.line(), file=sys.stderr)
    return 0


#
# a batch
#


def settings_of(args: Namespace, model: Path) -> dict[str, Any]:
    """What an answer depends on, besides its prompt. Drafting is none of it, unless it accepts what is typical."""
    n, size = 1 << 18, model.stat().st_size
    with model.open("rb") as file:
        ends = file.read(n)
        file.seek(max(size - n, 0))
        ends += file.read(n)
    digest = hashlib.sha256(ends + str(size).encode()).hexdigest()[:12]
    facts = {
        "model": f"{model.name} {digest}", "seed": args.seed, "tokens": args.tokens, "ctx": args.ctx,
        "chat": args.chat, "system": args.system, **sampling(args),
    }  # fmt: skip
    # what rounds otherwise: sums in another order, another type of cache, ggml's kernels, devices
    on = args.parallel > 1 if args.flash_attn is None else args.flash_attn
    cache = None if args.cache_type == "f16" else args.cache_type
    where = {
        "flash_attn": True if on else None, "cache_type": cache,
        "kernels": "off" if kernels.current() == kernels.OFF else None,
        "n_gpu_layers": args.n_gpu_layers or None, "rpc": True if args.rpc else None,
    }  # fmt: skip
    facts |= {name: value for name, value in where.items() if value is not None}
    for name in ("grammar", "json_schema"):
        if path := getattr(args, name):
            facts[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    if args.accept == "typical":
        lossy = ("accept", "typical_epsilon", "typical_alpha", "draft", "trees")
        facts |= {name: value for name in lossy if (value := getattr(args, name)) is not None}
    # what is as usual goes without saying
    usual = Namespace(**vars(setup_arg_parser().parse_args([])))
    known = {
        "seed": usual.seed,
        "tokens": usual.tokens,
        "ctx": None,
        "chat": False,
        "system": None,
        **sampling(usual),
    }
    return {k: v for k, v in facts.items() if k not in known or v != known[k]}


def resume(path: Path, settings: dict[str, Any], questions: list[Question]) -> set[str]:
    """The ids that a file of answers has already. A half-written last line is cut off.

    Args:
        questions: all of the prompts file, even where --limit takes fewer.

    Raises:
        UsageError: the file is something else, or its answers have other settings; the text says which.
    """
    prompts = {q.id: q.text for q in questions}
    data = path.read_bytes()
    done: set[str] = set()
    keep = 0
    for i, line in enumerate(data.splitlines(keepends=True), 1):
        try:
            if not line.endswith(b"\n"):
                raise ValueError
            row = parse_json(line)
            name, had, prompt = row["id"], row["settings"], row["prompt"]
            if not isinstance(name, str) or not isinstance(had, dict):
                raise ValueError
        except (ValueError, KeyError, TypeError):
            if not line.endswith(b"\n") and (done or b'{"id": '.startswith(line[:7])):
                break  # the last line: the run was killed while it wrote
            raise UsageError(
                f"{path}, line {i}: this is no answer of entmtp.generate; give --overwrite to replace the file, or "
                "another name"
            ) from None
        differ = [k for k in {**settings, **had} if settings.get(k) != had.get(k)]
        if differ:
            k = differ[0]
            raise UsageError(
                f"{path} holds answers with other settings ({k}: {_said(had, k)} there, {_said(settings, k)} now); "
                "give --overwrite to replace it, or another name"
            )
        if prompts.get(name) != prompt:
            raise UsageError(
                f"{path}, line {i}: answers another prompt than {name} of the prompts file; give --overwrite to "
                "replace it, or another name"
            )
        done.add(name)
        keep += len(line)
    if keep < len(data):
        with path.open("r+b") as file:
            file.truncate(keep)
    return done


def _said(settings: dict[str, Any], key: str) -> str:
    return str(settings[key]) if key in settings else "the default"


def batch(
    generators: list[Generator], questions: list[Question], args: Namespace, settings: dict[str, Any]
) -> int:
    """Answer all prompts that have no answer yet, as many at a time as there are generators."""
    with alone(args.outfile):
        return _batch(generators, questions, args, settings)


def _batch(
    generators: list[Generator], questions: list[Question], args: Namespace, settings: dict[str, Any]
) -> int:
    path: Path | None = args.outfile
    done: set[str] = set()
    if path and path.stat().st_size and not args.overwrite:
        done = resume(path, settings, questions)
    questions = questions[: args.limit]
    done &= {q.id for q in questions}
    todo = [q for q in questions if q.id not in done]
    speeds: list[Speed] = []
    failed: list[str] = []
    lock = threading.Lock()  # of the file, and of what is told

    def cancel() -> None:
        for generator in generators:
            generator.llm.cancel()

    with named(path), contextlib.ExitStack() as stack:
        file = (
            stack.enter_context(path.open("w" if args.overwrite else "a", encoding="utf-8"))
            if path
            else sys.stdout
        )
        advance = stack.enter_context(progress_bar(len(done), len(questions)))
        stopped = stack.enter_context(ctrl_c_stops(cancel))
        following = iter(todo)

        def answer_some(generator: Generator) -> None:
            while not stopped.is_set():
                with lock:
                    question = next(following, None)
                if question is None:
                    return
                row: dict[str, Any] = {"id": question.id, "prompt": question.text}
                try:
                    answer = generator.answer(question, stopped)
                except Stopped:
                    return
                except ValueError as e:  # this prompt is too long; others may not be
                    with lock:
                        print(
                            f"entmtp.generate: {printable(question.id)}: {printable(str(e))}", file=sys.stderr
                        )
                        failed.append(question.id)
                    continue
                row |= {"text": answer.text, "finish_reason": answer.finish_reason, "settings": settings}
                if args.stats:
                    row["stats"] = figures(answer.speed)
                with lock:
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    speeds.append(answer.speed)
                    advance()

        if len(generators) == 1:
            answer_some(generators[0])
        else:
            with ThreadPoolExecutor(len(generators)) as pool:
                for one_of_them in [pool.submit(answer_some, g) for g in generators]:
                    one_of_them.result()
    n = len(done) + len(speeds)
    if stopped.is_set():
        where = f"{n} of {len(questions)} answers are in {path}; the same command goes on from there" if path else (
            f"{n} of {len(questions)} answers were written; with -o FILE a run can be resumed"
        )  # fmt: skip
        print(f"entmtp.generate: stopped: {where}", file=sys.stderr)
        return 130
    if path:
        had = f", {len(done)} of them from before" if done else ""
        print(f"{n} of {len(questions)} answers in {path}{had}", file=sys.stderr)
    if args.stats and speeds:
        print(summary(speeds), file=sys.stderr)
    return 1 if failed else 0


def summary(speeds: list[Speed]) -> str:
    """Figures over a batch, in one line."""
    n = sum(s.n_tokens for s in speeds)
    seconds = sum(s.seconds for s in speeds)
    steps = sum(s.stats.n_steps for s in speeds)
    accepted, drafted = sum(s.stats.n_accepted for s in speeds), sum(s.stats.n_drafted for s in speeds)
    entropy = sum(s.stats.mean_entropy * s.stats.n_steps for s in speeds) / max(steps, 1)
    parts = [
        f"{n} tokens",
        f"{(n - len(speeds)) / max(seconds, 1e-9):.0f} tokens/s",
        f"{1 + accepted / max(steps, 1):.2f} tokens/step",
        f"{accepted} of {drafted} drafts accepted",
        f"entropy {entropy:.2f} nats",
    ]
    if known := [s for s in speeds if s.speedup]:
        plain = sum(s.seconds * (s.speedup or 0.0) for s in known)
        parts.insert(2, f"{plain / max(sum(s.seconds for s in known), 1e-9):.2f}× plain")
    return " · ".join(parts)


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="entmtp generate",
        description="Answer a question, or a file of them. A model without a chat template goes on with the text.",
        epilog="examples: entmtp generate -m model.gguf 'Why is the sky blue?' --stats; "
        "entmtp generate -m model.gguf --raw 'def fibonacci(n):'; "
        "entmtp generate -m model.gguf --prompts questions.jsonl -o answers.jsonl. "
        "Without a prompt it is read from stdin. A batch that was stopped goes on when the same command is given "
        "again.",
    )
    parser.add_argument("text", nargs="?", metavar="PROMPT", help="question, or text to go on with")
    parser.add_argument("-p", "--prompt", help="the same, as an option")
    parser.add_argument("-f", "--file", type=Path, help="file with the prompt; - for stdin")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="JSONL",
        help=f"a question per line: objects with {FORMS}, and an id if any",
    )
    parser.add_argument("--limit", type=COUNT, metavar="N", help="only the first N prompts of --prompts")
    parser.add_argument(
        "--parallel",
        type=int,
        default=1,
        metavar="N",
        help="answers of --prompts at a time, in shared passes (default: 1)",
    )
    parser.add_argument(
        "-o", "--outfile", type=Path, metavar="FILE",
        help="where the answer goes, or with --prompts the answers, as JSON lines (default: stdout)",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the output file instead of resuming it"
    )
    parser.add_argument(
        "--stats", action="store_true", help="figures on stderr, and with every answer of a batch"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument(
        "--chat", action="store_true",
        help="the prompt is a question: put it into the model's chat template (default where the model has one)",
    )  # fmt: skip
    how.add_argument("--raw", action="store_true", help="the prompt is text to go on with")
    parser.add_argument("--system", metavar="TEXT", help="system message, in a chat template")
    parser.add_argument(
        "-n", "--tokens", "--max-tokens", "--n-predict", type=int, default=256, metavar="N",
        help="most tokens of an answer, 0 for as many as fit (default: 256)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="of every answer (default: 0, so that a run can be repeated)"
    )
    options.add_model_options(parser)
    add_sampling_options(parser)
    return parser


def read_prompt(args: Namespace) -> str:
    """The one prompt that the options name, or stdin's text."""
    if args.text is not None or args.prompt is not None:
        return args.text if args.text is not None else args.prompt
    if args.file and str(args.file) != "-":
        return read_text(args.file)
    if sys.stdin.isatty():
        print("entmtp.generate: reading the prompt from the terminal; Ctrl-D ends it", file=sys.stderr)
    return sys.stdin.read()


def check(args: Namespace) -> None:
    """Options that exclude each other."""
    given = [name for name in ("text", "prompt", "file", "prompts") if getattr(args, name) is not None]
    if len(given) > 1:
        names = {"text": "PROMPT", "prompt": "--prompt", "file": "--file", "prompts": "--prompts"}
        raise UsageError(
            f"{' and '.join(names[g] for g in given)} are given: one prompt at a time, or --prompts"
        )
    if args.limit is not None and args.prompts is None:
        raise UsageError("--limit is for --prompts")
    if not 1 <= args.parallel <= 64 or (args.parallel > 1 and args.prompts is None):
        raise UsageError("--parallel is for --prompts, 1 to 64 at a time")
    if args.system and args.raw:
        raise UsageError("--system has no place with --raw")
    if args.tokens < 0:
        raise UsageError(f"--tokens is {args.tokens}, it must be 0 or more")


def main(argv: list[str] | None = None) -> int:
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        check(args)
        questions = read_questions(args.prompts) if args.prompts else []
        names = [q.id for q in questions]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(
                f"{args.prompts}: two prompts have the id {twice}; answers could not be told apart"
            )
        prompt = "" if args.prompts else read_prompt(args)
        check_output(args.outfile, [args.prompts, args.file])
        with contextlib.ExitStack() as stack:
            llms: list[Any]
            if args.parallel > 1:
                llms = stack.enter_context(options.load_engine(args, args.parallel)).slots
            else:
                llms = [stack.enter_context(contextlib.closing(options.load(args)))]
            llm = llms[0]
            check_output(args.outfile, [llm.model_path, llm.heads_path, llm.draft_model_path])
            args.chat = args.chat or (has_template(llm) and not args.raw)
            if args.system and not args.chat:
                raise UsageError("--system needs a model with a chat template, or --chat")
            generators = [Generator(one_llm, args) for one_llm in llms]
            if args.prompts:
                return batch(generators, questions, args, settings_of(args, Path(llm.model_path)))
            return one(generators[0], prompt, args)
    except UsageError as e:
        print(f"entmtp.generate: {printable(str(e))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader left
        leave()
        return 1
    except (EntmtpError, ValueError, OSError) as e:
        reason = f"{e.filename}: {e.strerror}" if isinstance(e, OSError) and e.filename else e
        print(f"entmtp.generate: {printable(str(reason))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(run_command(main))
