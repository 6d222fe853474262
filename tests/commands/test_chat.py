"""The chat, driven as a person would, on the bundled demo model."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from entmtp.chat.commands import COMMANDS

if sys.platform == "win32":
    pytest.skip("pexpect needs a Unix terminal", allow_module_level=True)
from helpers.terminal import Terminal

QUESTION = "Tom has 12 boxes with 8 apples each. How many apples does he have?"
DRAFTS = ("--draft", "static", "--trees", "generic-hydra:n4")
ENDLESS = ("--temp", "1.5", "--grammar")  # and a grammar that never ends
COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-9]|4[0-9]|9[0-7])[0-9;]*m")

Open = Callable[..., Terminal]


@pytest.fixture(scope="module")
def env(demo_cache: Path) -> dict[str, str]:
    unwanted = ("NO_COLOR", "COLUMNS", "LINES")  # the terminal of this run is not theirs
    return {k: v for k, v in os.environ.items() if k not in unwanted} | {"ENTMTP_CACHE": str(demo_cache)}


@pytest.fixture
def chat(env: dict[str, str]) -> Iterator[Open]:
    """chat(*options): a started chat that waits for a question."""
    opened = []

    def start(*options: str, **settings: object) -> Terminal:
        more = settings.pop("env", {})
        terminal = Terminal("entmtp.chat", "--threads", "1", *options, env={**env, **more}, **settings)  # type: ignore[arg-type]
        opened.append(terminal)
        terminal.wait("\n>")
        return terminal

    yield start
    for terminal in opened:
        terminal.close()


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A grammar whose answers end with the context only."""
    path = tmp_path_factory.mktemp("grammar") / "endless.gbnf"
    path.write_text('root ::= ([a-z]{1,9} " ")+\n')
    return str(path)


def turn(terminal: Terminal, line: str, part: str) -> str:
    """Type a line, and read until a part of the answer and the next prompt are there. White space is not kept."""
    typed = f"> {line[:60]}"
    n = terminal.text().count(typed)

    def said(text: str) -> str:
        return text[text.rindex(typed) + len(typed) :] if text.count(typed) > n else ""

    terminal.line(line)
    text = terminal.wait_for(lambda t: part in " ".join(said(t).split()) and "\n>" in said(t), what=part)
    return " ".join(said(text).split())


def run(env: dict[str, str], lines: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "entmtp.chat", "--threads", "1", *options],
        input=lines, env=env, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def test_a_session(chat: Open, demo_cache: Path, endless: str) -> None:
    """Streaming, Ctrl-C in an answer, another question, Ctrl-D."""
    terminal = chat("--temp", "1.5", "--grammar", endless, "--ctx", "1024")
    before = terminal.n_reads
    terminal.line(QUESTION)
    terminal.wait("tokens/step")  # the status line, while it writes
    assert terminal.n_reads > before + 3
    terminal.send("\x03")
    text = terminal.wait_for(lambda t: "\n>" in t and "(stopped)" in t, after=QUESTION)
    partial = text[: text.index("(stopped)")].strip()
    assert re.fullmatch(r"[a-z\s]+", partial), partial
    assert "tokens/s" not in partial

    # what was said stays in the conversation, and the program goes on
    terminal.line("/save partial.json".replace("partial.json", str(demo_cache / "partial.json")))
    terminal.wait("saved 1 question")
    saved = json.loads((demo_cache / "partial.json").read_text("utf-8"))
    assert saved["messages"][0] == {"role": "user", "content": QUESTION}
    assert saved["messages"][1]["content"].split()[:5] == partial.split()[:5]

    terminal.line("And now?")
    terminal.wait("tokens/step", after="And now?")
    terminal.send("\x03")
    terminal.wait_for(lambda t: "\n>" in t and "(stopped)" in t, after="And now?")

    # Ctrl-C at the prompt empties the line
    terminal.send("half a quest\x03")
    terminal.send("\x04")
    assert terminal.wait_end() == 0

    history = demo_cache / "chat-history"
    assert QUESTION in history.read_text("utf-8")
    assert history.stat().st_mode & 0o077 == 0


def test_every_command(chat: Open, tmp_path: Path) -> None:
    terminal = chat("--seed", "1")
    helped = turn(terminal, "/help", "leaves")
    assert all(f"/{name}" in helped for name in COMMANDS)
    assert "nothing was answered yet" in turn(terminal, "/stats", "yet")
    assert "no question" in turn(terminal, "/regen", "no question")
    answer = turn(terminal, QUESTION, "####")
    stats = turn(terminal, "/stats", "drafting")
    assert re.search(r"tokens per step +\d\.\d\d in \d+ steps", stats)
    assert re.search(r"context +\d+ of 1024 tokens", stats)
    assert re.search(r"speed-up +\d+\.\d\d over plain decoding", stats)

    # drafting in other ways, in the running model
    for policy, said in {
        "off": "plain decoding", "confidence": "confidence: trees of", "entropy": "entropy: trees of",
        "ladder": "ladder: trees of", "auto": "auto: from text, recycling, heads", "static": "static: tree",
        "static n8": "static: tree n8 of generic-hydra",
    }.items():  # fmt: skip
        assert said in turn(terminal, f"/draft {policy}", said)
    assert "best-depth and auto" in turn(terminal, "/draft sideways", "sideways")
    assert "has no tree n99" in turn(terminal, "/draft static n99", "n99")
    listed = turn(terminal, "/trees", "other banks")
    assert "n8 (in use)" in listed and "mc_sim_7b_63" in listed
    assert "static: tree n4" in turn(terminal, "/trees n4", "n4 of")
    assert "static: tree mc_sim_7b_63" in turn(terminal, "/trees mc_sim_7b_63", "static: tree mc")
    assert "static: tree n2" in turn(terminal, "/trees generic-hydra:n2", "n2 of")
    assert "no tree bank nothing" in turn(terminal, "/trees nothing", "nothing")

    # the same seed, now with a tree: another text, as /regen counts the seed on
    assert turn(terminal, "/regen", "####") != answer
    assert "> 0" not in turn(terminal, "/stats", "n2")
    assert "leaves system messages out" in turn(terminal, "/system Be brief.", "Be brief.")
    assert "Be brief." in turn(terminal, "/system", "Be brief.")
    assert "none" in turn(terminal, "/system none", "none")

    path = tmp_path / "talk.json"
    assert "needs a file name" in turn(terminal, "/save", "file name")
    assert "saved 1 question" in turn(terminal, f"/save {path}", "saved")
    saved = json.loads(path.read_text("utf-8"))
    assert [m["role"] for m in saved["messages"]] == ["user", "assistant"]
    assert "a new conversation" in turn(terminal, "/clear", "new")
    assert "no question" in turn(terminal, "/regen", "no question")
    assert "loaded 1 question" in turn(terminal, f"/load {path}", "loaded")
    other = tmp_path / "other.json"
    other.write_text('{"a": 1}')
    assert "is no conversation" in turn(terminal, f"/load {other}", "no conv")
    assert "choose another name" in turn(terminal, f"/save {other}", "choose")
    assert other.read_text() == '{"a": 1}'
    assert "cannot be read" in turn(terminal, f"/load {tmp_path / 'none.json'}", "cannot")
    assert "did you mean /regen" in turn(terminal, "/reg", "did you")
    assert "no command /etc" in turn(terminal, "/etc", "no command")
    terminal.line("/quit")
    assert terminal.wait_end() == 0
    assert "Traceback" not in terminal.raw


def test_completion_and_several_lines(chat: Open, tmp_path: Path) -> None:
    terminal = chat("--tokens", "1")
    terminal.send("/dr")
    terminal.wait("how to choose the tree")  # the menu
    terminal.send("\t")
    terminal.send(" conf\t")
    terminal.wait("/draft confidence")
    terminal.send("\r")
    terminal.wait("confidence: trees of", after="/draft confidence\n")

    pasted = "\x1b[200~def f(x):\n    return x\n\x1b[201~"
    terminal.send(pasted + "one\x1b\rtwo\\\rthree")
    terminal.wait("three")
    assert "two\\" not in terminal.text()
    terminal.send("\r")
    terminal.wait("--tokens")
    path = tmp_path / "a.json"
    turn(terminal, f"/save {path}", "saved 1 question")
    assert (
        json.loads(path.read_text("utf-8"))["messages"][0]["content"]
        == "def f(x):\n    return x\none\ntwo\nthree"
    )

    # an earlier question comes back whole
    terminal.send("\x1b[A\x1b[A")
    terminal.wait("three", after=str(path))
    terminal.send("\x03\x04")
    assert terminal.wait_end() == 0


def test_context_overflow(chat: Open) -> None:
    terminal = chat("--ctx", "256", "--seed", "2", "--tokens", "40")
    for i in range(12):
        text = turn(terminal, f"{i}: {QUESTION}", "")
        if "forgotten" in text:
            break
    assert "oldest question" in text and "are forgotten" in text, terminal.text()
    assert i >= 2
    too_long = turn(terminal, "one two three four five six seven eight nine ten " * 30, "larger --ctx")
    assert "the context has room for 256" in too_long
    turn(terminal, QUESTION, "")  # and it goes on
    terminal.send("\x04")
    assert terminal.wait_end() == 0


def test_drafts_are_coloured(chat: Open) -> None:
    terminal = chat(*DRAFTS, "--show-drafts", "--temp", "0")
    turn(terminal, QUESTION, "####")
    stats = turn(terminal, "/stats", "drafting")
    accepted = int(re.search(r"(\d+) of \d+ \(", stats)[1])  # type: ignore[index]
    assert accepted > 0
    # a chunk of text is a token here, and the last one may be the end of the text, which is not shown
    green = len(re.findall(r"\x1b\[32m[^\x1b]+\x1b\[0m", terminal.raw))
    assert accepted - 1 <= green <= accepted


def test_no_color(chat: Open) -> None:
    terminal = chat(*DRAFTS, "--show-drafts", env={"NO_COLOR": "1"})
    terminal.wait("--show-drafts needs colours")
    turn(terminal, QUESTION, "####")
    turn(terminal, "/stats", "drafting")
    turn(terminal, "/etc", "no command")
    terminal.send("/dr")
    terminal.wait("how to choose the tree")
    assert not COLOUR.search(terminal.raw)


def test_narrow_terminal(chat: Open, endless: str) -> None:
    """Lines wrap and scroll below a status line, and nothing of it stays."""
    terminal = chat("--temp", "1.5", "--grammar", endless, "--tokens", "150", rows=12, columns=30)
    terminal.line("x")
    text = terminal.wait("--tokens)", after="> x")
    answer = text[: text.index("(the answer ends here")]
    assert re.fullmatch(r"[a-z\s]+", answer), answer


def test_filter(env: dict[str, str]) -> None:
    """Not a terminal: answers only; the text does not depend on drafting."""
    lines = f"{QUESTION}\n\nA train has 5 cars with 20 seats each. How many seats are there?\n"
    answers = {}
    for draft in ("off", "static", "confidence"):
        options = DRAFTS if draft == "static" else ("--draft", draft)
        got = run(env, lines, "--seed", "5", "--temp", "0.8", *options)
        assert got.returncode == 0, got.stderr
        assert not got.stderr
        answers[draft] = got.stdout
    assert answers["off"].count("####") == 2
    assert "\x1b" not in answers["off"]
    assert answers["static"] == answers["off"]
    assert answers["confidence"] == answers["off"]


def test_filter_commands_and_errors(env: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    got = run(env, f"/system Hello\n{QUESTION}\n/save {path}\n/nope\n/quit\nnever asked\n", "--seed", "1")
    assert got.returncode == 1
    assert "no command /nope" in got.stderr and "Traceback" not in got.stderr
    assert got.stdout.count("\n#### ") == 1
    assert len(json.loads(path.read_text("utf-8"))["messages"]) == 3

    again = run(env, "Why?\n", "--load", str(path), "--tokens", "4")
    assert again.returncode == 0
    assert again.stdout.endswith("\n")

    for options, said in {
        ("--load", str(tmp_path / "none")): "cannot be read",
        ("--temp", "-1"): "--temp/--temperature: must be a number of at least 0",
        ("--grammar", str(path)): "llama.cpp cannot read this grammar",
        ("-m", str(tmp_path / "none.gguf")): "there is no such model file",
    }.items():
        got = run(env, "", *options)
        assert got.returncode != 0
        assert said in got.stderr, got.stderr
        # argparse shows how it is used, and llama.cpp itself says what is wrong with a grammar
        assert got.stderr.count("\n") == 1 or {"--grammar", "--temp"} & {*options}, got.stderr
    assert run(env, "", "--tokens", "-1").returncode == 2


def test_unicode_split_over_tokens(chat: Open, tmp_path: Path) -> None:
    grammar = tmp_path / "unicode.gbnf"
    grammar.write_text('root ::= "naïve 🙂 日本語 Ελλάδα"\n', encoding="utf-8")
    for options in (("--show-drafts", *DRAFTS), ("--draft", "off")):
        terminal = chat("--grammar", str(grammar), *options)
        terminal.line("?")
        text = terminal.wait("Ελλάδα")
        assert "naïve 🙂 日本語 Ελλάδα" in text.replace("🙂 ", "🙂").replace("🙂", "🙂 ").replace(
            "日 本 語", "日本語"
        )
        assert "�" not in terminal.raw


def test_thoughts_in_channels(chat: Open, env: dict[str, str], tmp_path: Path) -> None:
    """As gpt-oss answers: its template refuses an answer with tags when the next question is asked."""
    wrote = "<|channel|>analysis<|message|>I think.<|end|><|start|>assistant<|channel|>final<|message|>The answer."
    grammar, talk = tmp_path / "channels.gbnf", tmp_path / "talk.json"
    grammar.write_text(f"root ::= {json.dumps(wrote)}\n")
    got = run(env, f"{QUESTION}\n/save {talk}\n", "--grammar", str(grammar))
    assert got.returncode == 0 and got.stdout == "The answer.\n", got
    assert [m["content"] for m in json.loads(talk.read_text())["messages"]] == [QUESTION, "The answer."]
    for options in (("--show-drafts", *DRAFTS), ()):
        terminal = chat("--grammar", str(grammar), *options)
        terminal.line("?")
        text = terminal.wait("The answer.")
        assert re.search(r"I think\.\s+The answer\.", text) and "<|" not in terminal.raw
        if not options:  # thoughts are dim, the answer is not
            assert "\x1b[2mI" in terminal.raw and "\x1b[2mThe" not in terminal.raw
