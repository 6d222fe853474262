"""What commands write: names and texts for a terminal, ASCII, where there is no room, and two commands at once."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import pytest

from entmtp import Llama
from entmtp.chat.conversation import Conversation
from entmtp.common.errors import EntmtpError
from entmtp.measure import speed
from helpers.rewritten import rewritten
from helpers.typed import DEMO

EVIL = "\x1b]0;owned\x07\x1b[31mred\nok      model   fine"
ESCAPES = re.compile(r"\x1b|\x07")


def run(*args: object, **how: Any) -> subprocess.CompletedProcess[str]:
    settings: dict[str, Any] = {
        "capture_output": True,
        "text": True,
        "timeout": 120,
        "stdin": subprocess.DEVNULL,
    }
    command = [sys.executable, "-m", "entmtp", *map(str, args)]
    done = subprocess.run(command, **{**settings, **how})
    assert "Traceback" not in (done.stderr or ""), done.stderr
    return done


def renamed(path: Path, name: str, template: str = "") -> Path:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_name(name)
        if template:
            writer.add_chat_template(template)

    return rewritten(DEMO, path, ("general.name",), more)


def test_names_in_files_do_not_take_hold_of_the_terminal(tmp_path: Path) -> None:
    model = renamed(tmp_path / "evil.gguf", EVIL)
    doctor = run("doctor", "-m", model, "--no-gain")
    assert not ESCAPES.search(doctor.stdout) and "\nok      model   fine" not in doctor.stdout
    assert "owned" in doctor.stdout
    failing = renamed(tmp_path / "raises.gguf", "x", "{{ raise_exception('\x1b]0;owned\x07') }}")
    done = run("generate", "-m", failing, "hi", "--threads", 1)
    assert done.returncode == 1 and not ESCAPES.search(done.stderr) and "owned" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals are of POSIX")
def test_answers_do_not_take_hold_of_the_terminal(tmp_path: Path) -> None:
    grammar = tmp_path / "escapes.gbnf"
    grammar.write_text('root ::= "\\x1b]0;owned\\x07hi"')
    command = ["generate", "-m", str(DEMO), "--raw", "--grammar", str(grammar), "--threads", "1", "x"]
    reader, writer = os.openpty()
    subprocess.run(
        [sys.executable, "-m", "entmtp", *command], stdout=writer, stdin=subprocess.DEVNULL, timeout=120
    )
    assert b"\\x1b]0;owned\\x07hi" in os.read(reader, 4096)
    os.close(reader)
    os.close(writer)
    assert "\x1b]0;owned\x07hi" in run(*command).stdout  # a pipe has it as it is


@pytest.mark.parametrize("command", ["chat", "generate", "tune", "bench run", "demo", "doctor", "serve"])
def test_help_on_a_terminal_of_ascii(command: str) -> None:
    done = run(*command.split(), "--help", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0 and "usage" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("command", ["--help", "--version", "doctor --no-gain"])
def test_no_room_for_what_is_written(command: str) -> None:
    with open("/dev/full", "w") as full:
        done = run(*command.split(), stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1


@pytest.mark.skipif(os.name != "posix", reason="files are locked by flock")
def test_two_commands_on_one_file_of_answers(tmp_path: Path) -> None:
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text(
        "".join(json.dumps({"id": str(i), "prompt": "The sea was"}) + "\n" for i in range(40))
    )
    options = [
        "generate",
        "-m",
        str(DEMO),
        "--prompts",
        str(questions),
        "--threads",
        "1",
        "--tokens",
        "40",
        "-o",
        str(answers),
    ]
    first = subprocess.Popen([sys.executable, "-m", "entmtp", *options], stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (answers.exists() and answers.stat().st_size) and time.monotonic() < end:
        time.sleep(0.02)
    second = run(*options)
    assert first.wait(120) == 0
    if second.returncode != 0:  # else the first had ended before
        assert "another command writes its answers there" in second.stderr
    ids = [json.loads(line)["id"] for line in answers.read_text().splitlines()]
    assert sorted(ids, key=int) == [str(i) for i in range(40)]


@pytest.mark.parametrize("option", ["--flash-attn", "--cache-type q8_0", "--kernels off"])
def test_what_an_answer_depends_on_is_beside_it(tmp_path: Path, option: str) -> None:
    questions, answers = tmp_path / "q.jsonl", tmp_path / "a.jsonl"
    questions.write_text('{"prompt": "The sea was"}\n{"prompt": "Tom has"}\n')
    common = ["generate", "-m", DEMO, "--prompts", questions, "--threads", 1, "--tokens", 4, "-o", answers]
    assert run(*common, "--limit", 1).returncode == 0
    other = run(*common, *option.split())
    assert other.returncode == 2 and "answers with other settings" in other.stderr
    assert run(*common).returncode == 0
    assert run(*common, "--overwrite", "--parallel", 2).returncode == 0
    assert run(*common, "--flash-attn").returncode == 0  # as several at a time have it


def test_conversations_without_a_question(tmp_path: Path) -> None:
    odd = {"entmtp_chat": 1, "model": "x", "messages": [{"role": "assistant", "content": "Hi"}] * 2}
    (tmp_path / "odd.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(odd).encode())
    done = run(
        "chat",
        "-m",
        DEMO,
        "--threads",
        1,
        "--tokens",
        3,
        stdin=None,
        input=f"/load {tmp_path}/odd.json\n/regen\n",
    )
    assert "there is no question to answer" in done.stdout + done.stderr
    llm = Llama(DEMO, n_ctx=128, n_threads=1, verbose=False)
    with pytest.raises(EntmtpError, match="no question"):
        Conversation("", odd["messages"]).fit(llm, 8)  # type: ignore[arg-type]
    llm.close()


def test_a_plain_pass_is_timed_on_the_threads_it_began_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also where the number of threads follows a busy machine: costs of another number know nothing of the heads."""
    monkeypatch.setenv("ENTMTP_CACHE", str(tmp_path))
    llm = Llama(DEMO, draft="entmtp", n_ctx=256, verbose=False)
    monkeypatch.setattr(speed, "cached", lambda *args: None)
    threads = llm._threads
    if threads is not None:
        numbers = iter([1, 2] * 10_000)
        monkeypatch.setattr(type(threads), "look", lambda *args: next(numbers))
    for _ in range(3):
        assert speed.PlainPass.of(llm).us
        assert (llm._threads is threads and llm.tree is None) or llm.bank
    llm.close()
