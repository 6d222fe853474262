"""A conversation with a model, and how it is shown.

The answer comes from `Llama.create_chat_completion(stream=True)`, so the model's own chat template is used.
"""

from __future__ import annotations

import contextlib
import random
import sys
import time
from argparse import Namespace
from collections import deque
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console

from ..common.errors import EntmtpError
from ..common.interrupt import ctrl_c_stops
from ..common.sampling import sampling
from ..common.streams import printable
from ..llama import Llama
from ..measure.speed import Meter, PlainPass, Speed
from ..models.channels import TAGS, TEXT, THOUGHT, Channels, Piece
from ..models.templates import CONTINUE
from ..options.grammar import grammar
from .conversation import Conversation
from .screen import Screen, is_colourful, no_echo

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
        self.score = args.score or "entropy"  # of /draft with a published policy
        self.plain = PlainPass.of(llm)
        self.speed: Speed | None = None  # of the last answer
        self.saved: Path | None = None  # the file of /save and /load
        self.stopped = False  # the last answer, by Ctrl-C
        self.thinks = False  # what is written is no answer yet
        colour = live and is_colourful()
        self.screen = Screen(sys.stdout, live, colour)
        # what is not an answer goes to stderr where stdout is no terminal
        self.console = Console(
            stderr=not live, highlight=False, soft_wrap=not live, no_color=not colour, markup=False,
        )  # fmt: skip

    def say(self, text: str) -> None:
        """A note to the user."""
        self.console.print(
            printable(text), style="dim" if self.console.is_terminal and self.screen.colour else None
        )

    def warn(self, text: str) -> None:
        """What went wrong."""
        self.console.print(printable(text), style="red" if self.screen.colour else None)

    def ask(self, question: str) -> bool:
        """Answer a question. Returns whether there is an answer."""
        self.n_regenerated = 0
        turns = self.conversation.turns
        if turns and turns[-1]["role"] == "user":  # never answered; templates want answers in turn
            turns.pop()
        self.conversation.add("user", question)
        return self.answer()

    def regenerate(self) -> None:
        """Answer the last question again, drawn anew."""
        turns = self.conversation.turns
        if turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if not turns or turns[-1]["role"] != "user":
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
        except BaseException:  # Ctrl-C before the answer begins
            turns.pop()
            raise
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

        def on_token(token: int, drafters: int) -> None:
            meter.token()
            if painter:
                painter.token(token, drafters)

        seed = random.randrange(SEEDS) if self.seed is None else self.seed + self.n_regenerated
        parts: list[str] = []
        reason, self.thinks = None, False
        with contextlib.ExitStack() as stack:
            stopped = stack.enter_context(ctrl_c_stops(llm.cancel))
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
            shown, channels = time.perf_counter(), Channels()
            for chunk in stream:
                choice = chunk["choices"][0]
                reason = choice["finish_reason"] or reason
                text = choice["delta"].get("content") or ""
                if self.live and (now := time.perf_counter()) - shown > REFRESH:
                    screen.set_status(meter.speed().line(screen.width - 1))
                    shown = now
                for piece in channels.add(text, last=choice["finish_reason"] is not None):
                    self._show(piece, painter)
                    if piece.kind == TEXT:
                        parts.append(piece.text)
                if stopped.is_set():
                    stream.close()
                    break
            was_stopped = stopped.is_set()
        self.speed = meter.speed()
        self.plain.observe(self.speed.stats)
        return "".join(parts).lstrip(" "), reason, was_stopped

    def _show(self, piece: Piece, painter: _Painter | None) -> None:
        """A piece of an answer; what the model thinks is for terminals alone."""
        if piece.kind == THOUGHT and self.live:
            self.thinks = True
        elif piece.kind == TEXT and self.thinks:
            self.screen.text("\n\n")
            self.thinks = False
        if piece.kind == TAGS or (piece.kind == THOUGHT and not self.live):
            if painter:
                painter.skip(piece.text)
        elif painter:
            painter.text(piece.text)
        else:
            self.screen.text(piece.text, soft=self.thinks)


class _Painter:
    """Colours text by where its tokens came from.

    A chunk of text may hold several tokens, or end within a character's bytes: the bytes of the tokens drawn so far are
    laid along the text, and a character has the colour of the token that begins it.
    """

    def __init__(self, llm: Llama, screen: Screen):
        self.llm, self.screen = llm, screen
        self.flags: deque[int] = deque()  # per byte still to come: who drafted it, 0: the model alone

    def token(self, token: int, drafters: int) -> None:
        self.flags.extend([drafters] * len(self.llm.detokenize([token])))

    def text(self, text: str) -> None:
        """Write the next text."""
        for drafters, group in groupby(text, self._of):
            self.screen.text("".join(group), drafters)

    def skip(self, text: str) -> None:
        """The next text is not written."""
        for c in text:
            self._of(c)

    def _of(self, c: str) -> int:
        flags = [self.flags.popleft() for _ in c.encode() if self.flags]
        return flags[0] if flags else 0
