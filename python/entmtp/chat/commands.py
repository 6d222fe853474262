"""What can be typed besides questions: slash commands, and how they are completed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from rich.table import Table

from ..bank.bank import Bank, names
from ..bank.tree import PLAIN
from ..common.errors import EntmtpError
from ..common.files import expanded
from ..models.templates import prompt_length
from ..options.table import POLICIES
from .conversation import load
from .session import Chat

FILES = "files"  # completed from the file system


@dataclass(frozen=True)
class Command:
    """A slash command.

    Attributes:
        argument: how it is shown in /help.
        run: called with the chat and the argument, "" for none.
        complete: what the argument may be.
    """

    argument: str
    help: str
    run: Callable[[Chat, str], None]
    complete: Callable[[Chat], Iterable[str]] | str = ()  # type: ignore[assignment]


def _bank(chat: Chat) -> Bank:
    if chat.llm.bank is None:
        raise EntmtpError("the memory of this model cannot hold a token tree, decoding is plain")
    return chat.llm.bank


def best_tree(bank: Bank) -> str:
    """The tree that pays most at average entropy, by the bank's own figures; the smallest where it has none."""
    trees = [t for t in bank.trees if t.n_nodes > 1]
    if not trees:
        raise EntmtpError(f"bank {bank.name} holds no tree but plain decoding")
    if bank.acceptance is None or bank.costs is None:
        return min(trees, key=lambda t: t.n_nodes).name
    expected = dict(zip((t.name for t in bank.trees), bank.expected().mean(axis=0), strict=True))
    costs = bank.costs
    return max(trees, key=lambda t: (1.0 + expected[t.name]) / costs.step(t)).name


def how(chat: Chat) -> str:
    """How guesses are made at present, in a few words."""
    llm = chat.llm
    if llm.bank is None:
        return "plain decoding (the memory of this model holds no token trees)"
    if llm.policy == "off":
        return "off: plain decoding"
    if llm.policy == "auto":
        return "auto: from " + ", ".join(llm.drafters)
    return (
        f"static: tree {llm.tree} of {llm.bank.name}"
        if llm.tree
        else f"{llm.policy}: trees of {llm.bank.name}"
    )


def _help(chat: Chat, _: str) -> None:
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, command in COMMANDS.items():
        table.add_row(f"/{name} {command.argument}".strip(), command.help)
    table.add_row("", "")
    for keys, text in {
        "Alt-Enter, or \\ at the end": "a new line in the question; pasted text stays whole",
        "Tab": "completes commands and what follows them",
        "Ctrl-C": "stops an answer, or empties the line",
        "Ctrl-D": "leaves",
    }.items():
        table.add_row(keys, text)
    chat.console.print(table)


def _stats(chat: Chat, _: str) -> None:
    speed = chat.speed
    if speed is None:
        raise EntmtpError("nothing was answered yet")
    s = speed.stats
    rows = {
        "last answer": f"{speed.n_tokens} tokens, {speed.tokens_per_second:.1f} per second, "
        f"the first after {speed.first * 1e3:.0f} ms",
        "tokens per step": f"{s.tokens_per_step:.2f} in {s.n_steps} steps",
        "drafts accepted": f"{s.n_accepted} of {s.n_drafted} ({s.acceptance:.0%})"
        + "".join(f", {n} from {name}" for name, n in s.accepted_by.items() if n)
        if s.n_drafted
        else "none drafted",
        "entropy": f"{s.mean_entropy:.2f} nats on average",
    }
    if speed.speedup is not None and chat.plain.us is not None:
        rows["speed-up"] = (
            f"{speed.speedup:.2f} over plain decoding, of which a pass takes {chat.plain.us / 1e3:.2f} ms here"
        )
    if s.trees_used:
        rows["trees"] = ", ".join(f"{name} {count}" for name, count in s.trees_used.items())
    if total := sum(s.time_split.values()):
        rows["time"] = ", ".join(f"{k} {v / total:.0%}" for k, v in s.time_split.items())
    n = prompt_length(chat.llm, chat.conversation.messages) if chat.conversation.messages else 0
    rows["context"] = f"{n} of {chat.llm.n_ctx()} tokens"
    rows["drafting"] = how(chat)
    table = Table(box=None, show_header=False, pad_edge=False)
    for row in rows.items():
        table.add_row(*row)
    chat.console.print(table)


def _draft(chat: Chat, argument: str) -> None:
    if argument:
        policy, _, tree = argument.partition(" ")
        if policy not in POLICIES:
            raise EntmtpError(f"/draft {policy}: there is {', '.join(POLICIES[:-1])} and {POLICIES[-1]}")
        bank = _bank(chat)
        if policy == "static":
            tree = tree.strip() or best_tree(bank)
        elif tree:
            raise EntmtpError(f"/draft {policy} takes no tree: only /draft static does")
        chat.llm.set_trees(policy=policy, score=chat.score, tree=tree or None)
    chat.say(how(chat))


def _trees(chat: Chat, argument: str) -> None:
    bank = _bank(chat)
    if not argument:
        _list_trees(chat, bank)
        return
    if argument in {t.name for t in bank.trees}:  # of the present bank
        policy, trees, tree = "static", None, argument
        if tree == PLAIN.name:
            policy, tree = "off", ""
    else:
        trees, tree = argument, ""
        policy = "entropy" if chat.llm.policy in ("off", "static", "auto") else chat.llm.policy
        is_one = ":" in argument and not Path(argument).exists()
        if is_one or Bank.load(argument).acceptance is None:
            policy = "static"
        if policy == "static" and not is_one:
            tree = best_tree(Bank.load(argument))
    chat.llm.set_trees(trees, policy=policy, score=chat.score, tree=tree or None)
    chat.say(how(chat))


def _list_trees(chat: Chat, bank: Bank) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold" if chat.screen.colour else "")
    for column in (f"trees of {bank.name}", "nodes", "depth", "cost of a step", "expected tokens"):
        table.add_column(column, justify="left" if column.startswith("trees") else "right")
    expected = bank.expected() if bank.acceptance is not None else None
    for i, tree in enumerate(bank.trees):
        cost = f"{bank.costs.step(tree) / bank.costs.step(PLAIN):.2f}" if bank.costs else ""
        tokens = (
            "" if expected is None else f"{1 + expected[:, i].min():.2f} to {1 + expected[:, i].max():.2f}"
        )
        mark = " (in use)" if tree.name == chat.llm.tree else ""
        table.add_row(tree.name + mark, str(tree.n_nodes), str(tree.max_depth), cost, tokens)
    chat.console.print(table)
    chat.say(f"{how(chat)}\nother banks: {', '.join(n for n in names() if n != bank.name)}")


def _system(chat: Chat, argument: str) -> None:
    conversation = chat.conversation
    if argument:
        conversation.system = "" if argument == "none" else argument
        question = [{"role": "user", "content": "?"}]
        head = [{"role": "system", "content": conversation.system}]
        if conversation.system and prompt_length(chat.llm, head + question) == prompt_length(
            chat.llm, question
        ):
            chat.say("note: this model's chat template leaves system messages out")
    chat.say(f"system message: {conversation.system or 'none'}")


def _regen(chat: Chat, _: str) -> None:
    chat.regenerate()


def _save(chat: Chat, argument: str) -> None:
    path = expanded(argument) if argument else chat.saved
    if path is None:
        raise EntmtpError("/save needs a file name, such as /save talk.json")
    chat.conversation.save(path, Path(chat.llm.model_path).name)
    chat.saved = path
    chat.say(f"saved {_turns(chat)} to {path}")


def _load(chat: Chat, argument: str) -> None:
    if not argument:
        raise EntmtpError("/load needs a file name, such as /load talk.json")
    path = expanded(argument)
    chat.conversation = load(path)
    chat.saved = path
    chat.say(f"loaded {_turns(chat)} from {path}")


def _turns(chat: Chat) -> str:
    n = sum(m["role"] == "user" for m in chat.conversation.turns)
    return f"{n} question{'' if n == 1 else 's'}"


def _clear(chat: Chat, _: str) -> None:
    chat.conversation.turns.clear()
    chat.say("a new conversation" + (", with the same system message" if chat.conversation.system else ""))


def _quit(chat: Chat, _: str) -> None:
    raise EOFError


def _draft_arguments(chat: Chat) -> Iterable[str]:
    trees = [t.name for t in chat.llm.bank.trees if t.n_nodes > 1] if chat.llm.bank else []
    return [*POLICIES, *(f"static {t}" for t in trees)]


def _tree_arguments(chat: Chat) -> Iterable[str]:
    return [*(t.name for t in chat.llm.bank.trees), *names()] if chat.llm.bank else []


COMMANDS = {
    "help": Command("", "this list", _help),
    "stats": Command("", "figures of the last answer", _stats),
    "draft": Command(
        "[off|static|entropy|…]", "how to choose the tree of guesses; the text stays the same", _draft,
        _draft_arguments,
    ),
    "trees": Command("[tree or bank]", "list the trees, or draft from others", _trees, _tree_arguments),
    "system": Command("[text|none]", "show or set the system message", _system, lambda _: ["none"]),
    "regen": Command("", "answer the last question again", _regen),
    "save": Command("[file]", "save the conversation as JSON", _save, FILES),
    "load": Command("file", "go on with a saved conversation", _load, FILES),
    "clear": Command("", "forget the conversation", _clear),
    "quit": Command("", "leave", _quit),
}  # fmt: skip


def run(chat: Chat, line: str) -> None:
    """Run a slash command.

    Raises:
        EntmtpError: it cannot be done; the text says why. EOFError: the user leaves.
    """
    name, _, argument = line[1:].partition(" ")
    if name not in COMMANDS:
        close = [c for c in COMMANDS if name and c.startswith(name)]
        hint = f"did you mean /{close[0]}?" if len(close) == 1 else "/help lists what there is"
        raise EntmtpError(f"there is no command /{name}: {hint}")
    command = COMMANDS[name]
    if argument.strip() and not command.argument:
        raise EntmtpError(f"/{name} takes nothing after it")
    try:
        command.run(chat, argument.strip())
    except OSError as e:
        raise EntmtpError(f"{e.filename}: {e.strerror}" if e.filename else str(e)) from None
    except ValueError as e:  # of trees and banks
        raise EntmtpError(str(e)) from None


class CommandCompleter(Completer):
    """Completes slash commands and their arguments."""

    def __init__(self, chat: Chat):
        self.chat = chat
        self.paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        name, space, argument = text[1:].partition(" ")
        if not space:
            for c, command in COMMANDS.items():
                if c.startswith(name):
                    yield Completion(f"/{c}", -len(text), display_meta=command.help)
            return
        if name not in COMMANDS:
            return
        complete = COMMANDS[name].complete
        if complete == FILES:
            yield from self.paths.get_completions(Document(argument), event)
        elif callable(complete):
            for option in complete(self.chat):
                if option.startswith(argument):
                    yield Completion(option, -len(argument))
