"""`entmtp chat`: talk with a model in the terminal.

Without a terminal it is a filter: a question per line comes in, answers go out.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from .. import options
from ..common.errors import EntmtpError, UsageError
from ..common.sampling import add_sampling_options
from ..common.streams import leave, printable
from ..llama import Llama
from ..models.templates import CONTINUE, prompt_length
from .commands import run
from .session import CONTINUED, Chat


def filter_lines(chat: Chat) -> int:
    """A question per line of stdin, answers to stdout."""
    failed = False
    for line in sys.stdin:
        question = line.strip()
        if not question:
            continue
        try:
            if question.startswith("/"):
                run(chat, question)
            elif not chat.ask(question):
                failed = True
            if chat.stopped:
                return 130
        except EOFError:
            break
        except EntmtpError as e:
            chat.warn(f"entmtp.chat: {e}")
            failed = True
    return 1 if failed else 0


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="entmtp chat",
        description="Talk with a model. Without arguments: with SmolLM2-135M-Instruct, which is fetched once. "
        "/help lists what can be typed.",
        epilog="example: entmtp chat -m model.gguf --heads heads.gguf --show-drafts. "
        "Ctrl-C stops an answer, Ctrl-D leaves. Where stdin or stdout is no terminal, every line of stdin is a "
        "question, and only answers are printed: echo 'Tom has 3 boxes ...' | entmtp chat. "
        "The speed-up in the status line is against one pass per token, timed on this machine: docs/chat.md.",
    )
    options.add_model_options(parser)
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--tokens", type=int, metavar="N",
        help=f"most tokens of an answer, 0 for as many as fit (default: 0; {CONTINUED} for a model without chat "
        "template)",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=int, help="of every answer; /regen adds 1 (default: another each time)"
    )
    parser.add_argument(
        "--show-drafts",
        action="store_true",
        help="colours for tokens that came from an accepted draft: cyan from the text, blue recycled, green from "
        "heads, magenta from a model",
    )
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a saved conversation")
    parser.add_argument(
        "--chat-format", help="a chat format of llama-cpp-python instead of the model's own template"
    )
    add_sampling_options(parser, temperature=0.2)
    return parser


def load_model(args: Namespace) -> Llama:
    """The model, ready to draft even for `--draft off`, so that /draft can switch it on."""
    more: dict[str, Any] = {"chat_format": args.chat_format}
    if args.draft == "off" and not args.heads:
        args = Namespace(**{**vars(args), "draft": None})
        more["policy"] = "off"
    llm = options.load(args, **more)
    if args.chat_format is None and not any(k.startswith("tokenizer.chat_template") for k in llm.metadata):
        llm.chat_format = CONTINUE  # llama-cpp-python would take that of Llama 2
    return llm


def main(argv: list[str] | None = None) -> int:
    parser = setup_arg_parser()
    args = parser.parse_args(argv)
    if args.tokens is not None and args.tokens < 0:
        parser.error(f"--tokens is {args.tokens}, it must be 0 or more")
    live = sys.stdin.isatty() and sys.stdout.isatty()
    with contextlib.suppress(AttributeError):
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        llm = load_model(args)
        with contextlib.closing(llm):
            chat = Chat(llm, args, live)
            if args.load:
                from .conversation import load

                chat.conversation, chat.saved = load(args.load), args.load
            prompt_length(llm, [{"role": "user", "content": "?"}])  # an unusable template fails here
            if not live:
                return filter_lines(chat)
            from .repl import repl

            repl(chat)
    except BrokenPipeError:  # the reader left
        leave()
        return 1
    except (EntmtpError, ValueError, OSError) as e:
        print(f"entmtp.chat: {printable(str(e))}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0
