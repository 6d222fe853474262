"""`python -m entmtp.chat`: talk with a model in the terminal.

The prompt is prompt_toolkit's, the answer comes from `Llama.create_chat_completion(stream=True)`, so the model's own
chat template is used. Without a terminal it is a filter: a question per line comes in, answers go out.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import time
from argparse import Namespace
from collections import deque
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from . import options
from .chat_conversation import CONTINUE, Conversation, prompt_length
from .chat_screen import Screen, is_colourful, no_echo
from .errors import EntmtpError
from .interrupt import ctrl_c_stops
from .llama import Llama
from .sampling import UsageError, add_sampling_options, grammar, sampling
from .speed import Meter, PlainPass, Speed

REFRESH = 0.1  # seconds between two states of the status line
CONTINUED = 200  # tokens of an answer where the model has no chat template, and so no end
SEEDS = 1 << 31


class Chat:
    """A conversation with a model, and how it is shown.

    Args:
        live: there is a terminal: status line, colours, notes between the answers.
    """

    def __init__(self, llm: Llama, args: Namespace, live: bool):
        self.llm, self.live = llm, live
        self.conversation = Conversation(args.system or "")
        self.settings = sampling(args)
        self.grammar = grammar(args, llm)
        self.max_tokens: int | None = args.tokens or None
        if llm.chat_format == CONTINUE and args.tokens is None:
            self.max_tokens = CONTINUED
        self.seed = args.seed
        self.n_regenerated = 0
        self.show_drafts = args.show_drafts
        self.plain = PlainPass.of(llm)
        self.speed: Speed | None = None  # of the last answer
        self.saved: Path | None = None  # the file of /save and /load
        self.stopped = False  # the last answer, by Ctrl-C
        colour = live and is_colourful()
        self.screen = Screen(sys.stdout, live, colour)
        # what is not an answer goes to stderr where stdout is no terminal
        self.console = Console(
            stderr=not live, highlight=False, soft_wrap=not live, no_color=not colour, markup=False,
        )  # fmt: skip

    def say(self, text: str) -> None:
        """A note to the user."""
        self.console.print(text, style="dim" if self.console.is_terminal and self.screen.colour else None)

    def warn(self, text: str) -> None:
        """What went wrong."""
        self.console.print(text, style="red" if self.screen.colour else None)

    def ask(self, question: str) -> bool:
        """Answer a question. Returns whether there is an answer."""
        self.n_regenerated = 0
        self.conversation.add("user", question)
        return self.answer()

    def regenerate(self) -> None:
        """Answer the last question again, drawn anew."""
        turns = self.conversation.turns
        if turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns:
            raise EntmtpError("there is no question to answer again")
        self.n_regenerated += 1
        self.answer()

    def answer(self) -> bool:
        """Answer the last question; a partial answer counts."""
        turns = self.conversation.turns
        try:
            quarter = self.llm.n_ctx() // 4
            dropped = self.conversation.fit(self.llm, min(self.max_tokens or quarter, quarter))
            if dropped:
                turn = "oldest question" if dropped == 1 else f"{dropped} oldest questions"
                self.say(f"(the context is full: the {turn} and what was answered are forgotten)")
            text, reason, self.stopped = self._stream()
        except (EntmtpError, ValueError) as e:
            turns.pop()  # or every later question would fail, too
            self.warn(str(e))
            return False
        if not text and self.stopped:
            turns.pop()
        else:
            self.conversation.add("assistant", text)
        if self.stopped:
            self.say("(stopped)")
        elif reason == "length" and self.live:
            full = self.max_tokens is None or self.speed is None or self.speed.n_tokens < self.max_tokens
            why = "the context is full" if full else f"{self.max_tokens} tokens, the limit of --tokens"
            self.say(f"(the answer ends here: {why})")
        if self.live:
            self.say("")
        return True

    def _stream(self) -> tuple[str, str | None, bool]:
        """The answer's text, why it ended, and whether the user stopped it."""
        llm, screen = self.llm, self.screen
        meter = Meter(llm, self.plain)
        painter = _Painter(llm, screen) if self.show_drafts and screen.colour else None

        def on_token(token: int, drafted: bool) -> None:
            meter.token()
            if painter:
                painter.token(token, drafted)

        seed = random.randrange(SEEDS) if self.seed is None else self.seed + self.n_regenerated
        parts: list[str] = []
        reason = None
        with contextlib.ExitStack() as stack:
            stopped = stack.enter_context(ctrl_c_stops(llm))
            if self.live:
                stack.enter_context(no_echo())
            stack.callback(screen.end)
            stack.callback(setattr, llm, "on_token", None)
            llm.on_token = on_token
            messages: Any = self.conversation.messages
            stream: Any = llm.create_chat_completion(
                messages,
                stream=True,
                max_tokens=self.max_tokens,
                seed=seed,
                grammar=self.grammar,
                **self.settings,
            )
            shown = time.perf_counter()
            for chunk in stream:
                choice = chunk["choices"][0]
                reason = choice["finish_reason"] or reason
                text = choice["delta"].get("content") or ""
                if self.live and (now := time.perf_counter()) - shown > REFRESH:
                    screen.set_status(meter.speed().line(screen.width - 1))
                    shown = now
                if text:
                    if painter:
                        painter.text(text)
                    else:
                        screen.text(text)
                    parts.append(text)
                if stopped.is_set():
                    stream.close()
                    break
            was_stopped = stopped.is_set()
        self.speed = meter.speed()
        self.plain.observe(self.speed.stats)
        return "".join(parts).lstrip(" "), reason, was_stopped


class _Painter:
    """Colours text by where its tokens came from.

    A chunk of text may hold several tokens, or end within a character's bytes: the bytes of the tokens drawn so far are
    laid along the text, and a character has the colour of the token that begins it.
    """

    def __init__(self, llm: Llama, screen: Screen):
        self.llm, self.screen = llm, screen
        self.flags: deque[bool] = deque()  # per byte still to come: it is from a draft

    def token(self, token: int, drafted: bool) -> None:
        self.flags.extend([drafted] * len(self.llm.detokenize([token])))

    def text(self, text: str) -> None:
        """Write the next text."""
        for drafted, group in groupby(text, self._of):
            self.screen.text("".join(group), drafted)

    def _of(self, c: str) -> bool:
        flags = [self.flags.popleft() for _ in c.encode() if self.flags]
        return bool(flags) and flags[0]


def filter_lines(chat: Chat) -> int:
    """A question per line of stdin, answers to stdout."""
    from .chat_commands import run

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
        prog="python -m entmtp.chat",
        description="Talk with a model. Without arguments: with a small bundled demo, which knows simple arithmetic "
        "and little else. /help lists what can be typed.",
        epilog="example: python -m entmtp.chat -m model.gguf --heads heads.gguf --show-drafts. "
        "Ctrl-C stops an answer, Ctrl-D leaves. Where stdin or stdout is no terminal, every line of stdin is a "
        "question, and only answers are printed: echo 'Tom has 3 boxes ...' | python -m entmtp.chat. "
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
        "--show-drafts", action="store_true", help="green for tokens that came from an accepted draft"
    )
    parser.add_argument("--load", type=Path, metavar="FILE", help="go on with a saved conversation")
    parser.add_argument(
        "--chat-format", help="a chat format of llama-cpp-python instead of the model's own template"
    )
    add_sampling_options(parser, temperature=0.2)
    return parser


def load_model(args: Namespace) -> Llama:
    """The model, with its heads even for `--draft off`, so that /draft can switch them on."""
    more: dict[str, Any] = {"chat_format": args.chat_format}
    if args.draft == "off" and not args.heads:
        _, heads = options.model_files(Namespace(**{**vars(args), "draft": None}))
        if heads is not None:
            more |= {"draft": "entmtp", "heads": heads, "trees": args.trees, "policy": "off"}
            args = Namespace(**{**vars(args), "trees": None})
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
                from .chat_conversation import load

                chat.conversation, chat.saved = load(args.load), args.load
            prompt_length(llm, [{"role": "user", "content": "?"}])  # an unusable template fails here
            if not live:
                return filter_lines(chat)
            from .chat_prompt import repl

            repl(chat)
    except BrokenPipeError:  # the reader left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (EntmtpError, ValueError, OSError) as e:
        print(f"entmtp.chat: {e}", file=sys.stderr)
        return 2 if isinstance(e, UsageError) else 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
