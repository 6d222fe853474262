"""The prompt of the chat: history, several lines, completion."""

from __future__ import annotations

import os
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.formatted_text import AnyFormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.styles import Style

from ..common.cache import cache_folder
from ..common.errors import EntmtpError
from ..models.templates import CONTINUE
from .commands import CommandCompleter, how, run
from .session import Chat

STYLE = Style.from_dict({
    "bottom-toolbar": "noreverse fg:ansibrightblack bg:default",
    "prompt": "bold",
})  # fmt: skip


def history() -> History:
    """Earlier questions, from a file in the user's cache that only he can read."""
    path = cache_folder() / "chat-history"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY, 0o600))
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))


def key_bindings() -> KeyBindings:
    """Enter sends, unless the line ends with a backslash; Alt-Enter starts a new line; Tab completes."""
    bindings = KeyBindings()

    @bindings.add("tab")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        found = list(
            buffer.completer.get_completions(buffer.document, CompleteEvent(completion_requested=True))
        )
        if len(found) == 1:
            buffer.apply_completion(found[0])
        elif buffer.complete_state:
            buffer.complete_next()
        else:
            buffer.start_completion(insert_common_part=True)

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    return bindings


def repl(chat: Chat) -> None:
    """Ask and answer until the user leaves."""

    def toolbar() -> AnyFormattedText:
        drafting = f"{how(chat)} · "
        room = get_app().output.get_size().columns - len(drafting) - 1
        last = chat.speed.line(room) if chat.speed else "/help lists commands"
        return [("class:bottom-toolbar", drafting + last)]

    session: PromptSession[str] = PromptSession(
        history=history(),
        completer=CommandCompleter(chat),
        complete_while_typing=True,
        key_bindings=key_bindings(),
        multiline=True,
        prompt_continuation="… ",
        bottom_toolbar=toolbar,
        style=STYLE,
    )
    llm = chat.llm
    chat.say(f"{Path(llm.model_path).name}, {llm.n_ctx()} tokens of context, {how(chat)}. Ctrl-D leaves.")
    if llm.chat_format == CONTINUE:
        chat.say("note: this model has no chat template: it continues your text")
    if chat.show_drafts and not chat.screen.colour:
        chat.say("note: --show-drafts needs colours, and NO_COLOR is set")
    while True:
        try:
            line = session.prompt("> ")
            if not line.strip():
                continue
            if line.startswith("/"):
                run(chat, line.strip())
            else:
                chat.ask(line)
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        except EntmtpError as e:
            chat.warn(str(e))
