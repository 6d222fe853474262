"""Parts of the chat that can be seen without a model at work: the screen, the conversation, the interrupt."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import entmtp
from entmtp.chat.conversation import Conversation
from entmtp.chat.conversation import load as load_conversation
from entmtp.chat.screen import Screen, printable
from entmtp.common.interrupt import ctrl_c_stops
from entmtp.measure.speed import Meter, PlainPass, sparkline
from entmtp.models.templates import CONTINUE, prompt_length
from entmtp.native.abi import SOURCES
from entmtp.native.stats import STEP_DTYPE, DraftStats, OlderSteps

pyte = pytest.importorskip("pyte")


def shown(text: str, columns: int, rows: int) -> list[str]:
    """What a terminal shows of text, its scrolled lines too."""
    screen = pyte.HistoryScreen(columns, rows, history=10000)
    pyte.Stream(screen).feed(text.replace("\n", "\r\n"))
    top = ["".join(line[i].data for i in range(columns)) for line in screen.history.top]
    lines = [line.rstrip() for line in [*top, *screen.display]]
    while lines and not lines[-1]:
        lines.pop()
    return lines


@pytest.mark.parametrize("columns", [7, 20, 80])
def test_status_line_leaves_the_text_alone(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    rng = random.Random(columns)
    # pyte cuts a wide character at the edge in two, where terminals wrap it
    letters = "abc défgh\n\n日本🙂" if columns > 40 else "abc défgh\n"
    for _ in range(60):
        pieces = [
            "".join(rng.choice(letters) for _ in range(rng.randrange(6))) for _ in range(rng.randrange(1, 40))
        ]
        pieces[0] = "x" + pieces[0]
        out = io.StringIO()
        screen = Screen(out, live=True, colour=True)
        for i, piece in enumerate(pieces):
            if i % 3 == 0:
                screen.set_status(f"status {i} " * 4)
            screen.text(piece, drafters=(i % 3) * (1 + i % 4))
        screen.end()
        assert shown(out.getvalue(), columns, 6) == shown("".join(pieces), columns, 6)
        assert "status" not in "".join(shown(out.getvalue(), columns, 6))


def test_status_line_is_there_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm")
    out = io.StringIO()
    screen = Screen(out, live=True, colour=False)
    screen.set_status("100 tokens/s")
    screen.text("Hello")
    assert shown(out.getvalue(), 40, 6) == ["Hello", "100 tokens/s"]
    screen.text(", world\n")
    assert shown(out.getvalue(), 40, 6) == ["Hello, world", "", "100 tokens/s"]


def test_a_model_cannot_steer_the_terminal() -> None:
    assert printable("a\x1b]0;title\x07b\r\x9b2Jc\td\n") == "a\\x1b]0;title\\x07b\\x0d\\x9b2Jc\td\n"


def test_conversation_file(tmp_path: Path) -> None:
    talk = Conversation("be brief", [])
    talk.add("user", "naïve 🙂?")
    talk.add("assistant", "yes")
    path = tmp_path / "a.json"
    talk.save(path, "m.gguf")
    assert load_conversation(path) == talk
    assert list(tmp_path.iterdir()) == [path]
    robot, half = ({"messages": [{"role": r, "content": c}]} for r, c in (("robot", ""), ("user", "\ud800")))
    for text in (
        "",
        "[]",
        "{}",
        '{"messages": 3}',
        "[" * 100_000,
        "9" * 5000,
        json.dumps(robot),
        json.dumps(half),
    ):
        path.write_text(text)
        with pytest.raises(entmtp.EntmtpError, match="no conversation"):
            load_conversation(path)
        with pytest.raises(entmtp.EntmtpError, match="choose another name"):
            talk.save(path, "m.gguf")
        assert path.read_text() == text


def test_oldest_turns_go(load: Callable[..., entmtp.Llama]) -> None:
    llm = load("f32")
    talk = Conversation("system")
    for i in range(60):
        talk.add("user", f"{i}: how many apples are there in the boxes?")
        talk.add("assistant", "There are many, many apples.")
    talk.add("user", "and now?")
    assert prompt_length(llm, talk.messages) > llm.n_ctx()
    assert (dropped := talk.fit(llm, 200)) > 0
    assert prompt_length(llm, talk.messages) <= llm.n_ctx() - 200
    assert talk.turns[0]["content"].startswith(f"{dropped}:")
    assert talk.turns[-1]["content"] == "and now?"
    assert talk.fit(llm, 200) == 0
    with pytest.raises(entmtp.EntmtpError, match="larger --ctx"):
        Conversation(turns=[{"role": "user", "content": "word " * 3000}]).fit(llm, 200)


def test_without_a_template_text_goes_on(load: Callable[..., entmtp.Llama]) -> None:
    llm = load("f32")
    before = llm.chat_format
    llm.chat_format = CONTINUE
    try:
        talk = Conversation()
        talk.add("user", "It was a dark")
        n = prompt_length(llm, talk.messages)
        assert n == len(llm.tokenize(b"It was a dark"))
        got: Any = llm.create_chat_completion(talk.messages, max_tokens=8, temperature=0.0)
        plain: Any = llm.create_completion("It was a dark", max_tokens=8, temperature=0.0)
        assert got["choices"][0]["message"]["content"] == plain["choices"][0]["text"]
    finally:
        llm.chat_format = before


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to itself")
def test_ctrl_c_cancels_and_leaves_no_trace(load: Callable[..., entmtp.Llama]) -> None:
    llm = load("f32", "hydra")
    before = signal.getsignal(signal.SIGINT)
    prompt = llm.tokenize(b"It was a cold and windy night")
    with ctrl_c_stops(llm.cancel) as stopped:
        n = 0
        for n, _ in enumerate(llm.generate(prompt, temp=1.0), 1):
            if n == 5:
                os.kill(os.getpid(), signal.SIGINT)
            assert n < 400
        assert stopped.is_set() and n >= 5
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.set_wakeup_fd(-1) == -1
    assert len(list(zip(range(20), llm.generate(prompt, temp=0.0), strict=False))) == 20


@pytest.mark.skipif(os.name != "posix", reason="sends a signal to itself")
def test_ctrl_c_needs_no_python_in_the_main_thread() -> None:
    """While llama.cpp works through a prompt, no signal handler runs."""

    class Model:
        cancelled_by: threading.Thread | None = None

        def cancel(self) -> None:
            self.cancelled_by = threading.current_thread()

    model: Any = Model()
    with ctrl_c_stops(model.cancel) as stopped:
        os.kill(os.getpid(), signal.SIGINT)
        assert stopped.wait(60)
    assert model.cancelled_by not in (None, threading.main_thread())


def test_who_drew_a_token(load: Callable[..., entmtp.Llama]) -> None:
    """on_token tells of each token whether it was an accepted draft."""
    llm = load("f32", "hydra", policy="static", trees="generic-hydra:n8")
    told: list[tuple[int, int]] = []
    llm.on_token = lambda token, drafters: told.append((token, drafters))
    try:
        llm.reset_draft_stats()
        tokens = [
            t for _, t in zip(range(100), llm.generate(llm.tokenize(b"def f(x):"), temp=0.8), strict=False)
        ]
    finally:
        llm.on_token = None
    assert [t for t, _ in told] == tokens
    # what was drawn last has not been evaluated
    assert {d for _, d in told} == {0, SOURCES["heads"]}
    assert sum(d > 0 for _, d in told[:-1]) == llm.draft_stats.n_accepted > 10
    assert not told[0][1]


def test_trees_change_in_a_running_model(load: Callable[..., entmtp.Llama]) -> None:
    llm = load("f32", "hydra", policy="static", trees="generic-hydra:n8", n_ctx=512)
    assert (llm.policy, llm.tree) == ("static", "n8")
    llm.set_trees(policy="static", tree="n4")
    assert llm.tree == "n4"
    with pytest.raises(ValueError, match="n99"):
        llm.set_trees(policy="static", tree="n99")
    with pytest.raises(ValueError, match="no costs"):
        llm.set_trees("mc_sim_7b_63", policy="confidence")
    assert llm.bank is not None
    assert (llm.policy, llm.tree, llm.bank.name) == ("static", "n4", "generic-hydra")
    llm.create_completion("def f(x):", max_tokens=20, temperature=0.0)
    assert set(llm.draft_stats.trees_used) == {"n4"}
    llm.set_trees("mc_sim_7b_63", policy="static")
    llm.set_trees("generic-hydra", policy="off")
    assert llm.draft_stats.n_steps == 0  # records name trees of the bank
    assert llm.tree is None


def test_speed_against_plain(load: Callable[..., entmtp.Llama]) -> None:
    llm = load("f32", "hydra", policy="off")
    plain = PlainPass(1.0)
    meter = Meter(llm, plain)
    llm.on_token = lambda token, drafters: meter.token()
    try:
        llm.create_completion("def f(x):", max_tokens=60, temperature=1.0, seed=1)
    finally:
        llm.on_token = None
    speed = meter.speed()
    assert speed.n_tokens == 60
    assert speed.stats.n_steps == 59
    # plain decoding is as fast as itself
    assert speed.speedup == pytest.approx(1.0, abs=0.01)
    assert "tokens/s" in speed.line() and "nats" in speed.line()
    assert len(speed.line(20)) <= 20
    plain.observe(speed.stats)
    assert plain.us is not None and plain.us > 1.0


def test_older_steps_count() -> None:
    """Records that were given up count in every figure."""
    rng = np.random.default_rng(0)
    steps = np.zeros(500, STEP_DTYPE)
    steps["tree"] = rng.integers(0, 3, 500)
    steps["n_nodes"] = rng.integers(1, 9, 500)
    steps["n_accepted"] = rng.integers(0, 2, 500)
    steps["entropy"] = rng.random(500)
    for k in ("draft", "verify", "sample", "host"):
        steps[f"t_{k}_us"] = rng.integers(0, 1000, 500)
    names = ["plain", "a", "b", "grown"]
    whole = DraftStats(steps, names)
    old, new = steps[:300], steps[300:]
    older = OlderSteps(
        n_steps=300, n_nodes=int(old["n_nodes"].sum()), n_accepted=int(old["n_accepted"].sum()),
        entropy=float(old["entropy"].sum(dtype=np.float64)), by_tree=np.bincount(old["tree"], minlength=4),
        **{f"t_{k}_us": int(old[f"t_{k}_us"].sum()) for k in ("draft", "verify", "sample", "host")},
    )  # fmt: skip
    kept = DraftStats(new, names, older)
    for figure in ("n_steps", "n_drafted", "n_accepted", "tokens_per_step", "acceptance", "trees_used"):
        assert getattr(kept, figure) == getattr(whole, figure)
    assert kept.mean_entropy == pytest.approx(whole.mean_entropy)
    assert kept.time_split == pytest.approx(whole.time_split)
    assert str(DraftStats())


def test_sparkline() -> None:
    assert sparkline([0, 1, 2, 4, 8], 5) == " ▁▂▄█"
    assert sparkline([]) == ""
    assert len(sparkline(range(1000), 10)) == 10
