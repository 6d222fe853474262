"""Files that commands are given: what is read is never written over, what is written replaces nothing but files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from entmtp.common.atomic import atomic_path
from entmtp.common.errors import UsageError
from entmtp.common.files import check_output, expanded, read_text
from entmtp.models.assets import assets

DEMO = ["-m", "demo", "--threads", "1"]


def run(*args: object, cwd: Path | None = None, **how: object) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "entmtp", *map(str, args)],
        **{"capture_output": True, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL, "cwd": cwd, **how},
    )  # type: ignore[call-overload] # fmt: skip
    assert "Traceback" not in (done.stderr or ""), done.stderr
    return done


@pytest.fixture
def base(models: dict[str, Path], tmp_path: Path) -> Path:
    path = tmp_path / "base.gguf"
    path.write_bytes(models["q8_0"].read_bytes())
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"id": "a", "prompt": "Tom has 3 boxes"}\n', "utf-8")
    return path


COMMANDS: dict[str, Callable[[Path, Path, Path], list[object]]] = {
    "generate, a model": lambda b, q, c: ["generate", "-m", b, "hi", "-o", b, "--overwrite"],
    "generate, a batch": lambda b, q, c: ["generate", "-m", b, "--prompts", q, "-o", b, "--overwrite"],
    "generate, prompts": lambda b, q, c: ["generate", "-m", b, "--prompts", q, "-o", q, "--overwrite"],
    "tune, a model": lambda b, q, c: ["tune", "-m", b, "--prompts", q, "-o", b],
    "tune, prompts": lambda b, q, c: ["tune", "-m", b, "--prompts", q, "-o", q],
    "convert, a configuration": lambda b, q, c: ["convert", c, "--base", b, "--outfile", c / "config.json"],
    "convert, text": lambda b, q, c: [
        "convert", c, "--base", b, "--draft-vocab", "100", "--draft-text", q, "--outfile", q,
    ],
    "bench, a model": lambda b, q, c: ["bench", "curve", "-m", b, "-o", b],
    "bench, prompts": lambda b, q, c: ["bench", "run", "-m", b, "--prompts", q, "-o", q],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_read_is_not_written_over(base: Path, questions: Path, tmp_path: Path, name: str) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    for file in (assets() / "hydra").iterdir():
        (checkpoint / file.name).write_bytes(file.read_bytes())
    files = [base, questions, *checkpoint.iterdir()]
    before = [file.read_bytes() for file in files]
    done = run(*COMMANDS[name](base, questions, checkpoint))
    assert done.returncode in (1, 2) and "this is one of the files to read" in done.stderr
    assert [file.read_bytes() for file in files] == before


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "note1", "value": 5, "text": "my own data"}\n',
        '{"id": "a", "settings": 5, "prompt": "x"}\n',
        '{"id": 5, "settings": {}, "prompt": "x"}\n',
    ],
)
def test_a_file_of_somebody_elses_lines_is_left_alone(questions: Path, tmp_path: Path, line: str) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(line, "utf-8")
    done = run("generate", *DEMO, "--prompts", questions, "-o", own, "--tokens", 3)
    assert done.returncode == 2 and "line 1: this is no answer" in done.stderr
    assert own.read_text("utf-8") == line


def test_an_answer_cut_off_by_a_kill_is_written_again(questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    for cut in (b"", b'{"i', b'{"id": "a", "prom'):
        out.write_bytes(cut)
        done = run("generate", *DEMO, "--prompts", questions, "-o", out, "--tokens", 3)
        assert done.returncode == 0, done.stderr
        assert json.loads(out.read_text("utf-8"))["id"] == "a"


def test_homes_of_nobody(tmp_path: Path) -> None:
    for words in (
        ["generate", "-m", "~nosuchuser/x.gguf", "hi"],
        ["generate", *DEMO, "--lookup", "~nosuchuser/x", "hi"],
        ["doctor", "-m", "~nosuchuser/x"],
    ):
        done = run(*words)
        assert done.returncode != 0 and "~nosuchuser" in done.stderr + done.stdout
    assert expanded("~") == Path.home()


def test_a_chat_goes_on_after_names_that_cannot_be() -> None:
    lines = f"/load ~nosuchuser/x\n/save {'x' * 300}\n/trees {'x' * 300}\n/help\n"
    done = run("chat", *DEMO, stdin=None, input=lines)
    assert done.returncode in (0, 1) and "/regen" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", *DEMO, "--threads", "100000", "hi"], "at most 1024"),
        (["generate", *DEMO, "--top-p", "nan", "hi"], "--top-p"),
        (["generate", *DEMO, "--repeat-penalty", "0", "hi"], "above 0"),
        (["tune", "--rounds", "0"], "--rounds"),
        (["tune", "--tokens", "-5"], "--tokens"),
        (["tune", "--temp", "nan"], "--temp"),
        (["bench", "curve", "--rounds", "0"], "--rounds"),
        (["bench", "run", "--tokens", "0"], "--tokens"),
        (["train", "-m", "demo", "-o", "x.gguf", "--tokens", "inf"], "--tokens"),
        (["train", "-m", "demo", "-o", "x.gguf", "--epochs", "nan"], "--epochs"),
        (["bench", "curve", *DEMO, "-o", "/nosuch/dir/x.json"], "there is no folder /nosuch/dir"),
        (["bench", "curve", *DEMO, "-o", "out.md"], "the figures are JSON"),
    ],
)
def test_numbers_and_names_are_looked_at_before_any_work(words: list[str], said: str, tmp_path: Path) -> None:
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2 and said in done.stderr and "-> None" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_texts_that_are_not_utf_8(questions: Path) -> None:
    text = questions.read_text("utf-8")
    questions.write_text(text, "utf-8-sig")
    assert run("generate", *DEMO, "--prompts", questions, "--tokens", 2).returncode == 0
    questions.write_text(text, "utf-16")
    done = run("generate", *DEMO, "--prompts", questions, "--tokens", 2)
    assert done.returncode == 2 and f"{questions}: this is no UTF-8 text" in done.stderr
    with pytest.raises(UsageError, match="no UTF-8"):
        read_text(questions)


@pytest.mark.skipif(os.name == "nt", reason="POSIX's descriptors")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
@pytest.mark.parametrize("command", ["generate -m demo --threads 1 --tokens 2 hi", "chat -m demo", "--help"])
def test_closed_streams(command: str, closed: str) -> None:
    words = f"exec {sys.executable} -m entmtp {command} {closed}"
    done = subprocess.run(
        ["sh", "-c", words], capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX's pipes")
@pytest.mark.parametrize(
    "words", ["entmtp --help", "entmtp --version", "entmtp.demo --help", "entmtp.doctor --help"]
)
def test_readers_who_leave(words: str) -> None:
    for unbuffered in ("", "1"):
        done = subprocess.run(
            ["bash", "-c", f"{sys.executable} -m {words} | true"],
            capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )  # fmt: skip
        assert not done.stderr


@pytest.mark.skipif(os.name == "nt", reason="POSIX's links, rights and devices")
def test_links_rights_and_devices(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_text("old", "utf-8")
    target.chmod(0o600)
    link.symlink_to(target)
    with atomic_path(link) as temporary:
        temporary.write_text("new", "utf-8")
    assert link.is_symlink() and target.read_text("utf-8") == "new"
    assert target.stat().st_mode & 0o777 == 0o600
    with atomic_path(os.devnull) as temporary:
        temporary.write_text("gone", "utf-8")
    assert Path(os.devnull).is_char_device()
    with pytest.raises(UsageError, match="is a folder"):
        check_output(tmp_path, [])
    with pytest.raises(UsageError, match="one of the files to read"):
        check_output(link, [None, tmp_path / "none", target])


@pytest.mark.parametrize(
    "content",
    [
        {"studies": [{}]},
        {"studies": 5},
        {"curves": [{"model": "m", "passes": [{"context": 1, "kernels": "k", "n": 40, "ms": 1}]}]},
        {
            "gpu_study": [
                {
                    "costs": {"verify": {"0": {"1": 1.0}}, "chain": [0.0], "level": []},
                    "model": "m",
                    "speeds": {"0": {"a": {"63 nodes": 1, "EntMTP": 1, "plain": 0}}},
                }
            ]
        },
    ],
)
def test_reports_that_are_none(tmp_path: Path, content: object) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the plot extra)")
    report = tmp_path / "report.json"
    report.write_text(json.dumps(content))
    done = run("bench", "plot", report)
    assert done.returncode == 1 and f"{report} cannot be drawn" in done.stderr
    # names are names, not mathematics
    row = {"load": "x$\\frac$", "server": "a", "tokens_per_second": 1, "first_ms": None, "gap_ms": None}
    report.write_text(json.dumps({"serve": [row]}))
    assert run("bench", "plot", report).returncode == 0
