"""`python -m entmtp.generate`: one prompt, batches, and batches that were interrupted."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from entmtp.common.prompts import Question, read_questions
from entmtp.generate import UsageError, main, resume

PROMPT = "Question: Tom has 12 boxes with 8 apples each. How many apples does he have?\nAnswer:"
N = 6

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def generate(demo_cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """generate(*options) -> status, stdout, stderr, on the demo model."""
    monkeypatch.setenv("ENTMTP_CACHE", str(demo_cache))

    def run(*options: object) -> tuple[int, str, str]:
        capfd.readouterr()
        try:
            status = main(["--threads", "1", *map(str, options)])
        except SystemExit as e:
            status = int(e.code or 0)
        return status, *capfd.readouterr()

    return run


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"task_id": f"t/{i}", "prompt": f"Question: {i} apples and {i} pears?\nAnswer:"} for i in range(N)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_one_prompt(generate: Run, tmp_path: Path) -> None:
    status, text, err = generate(PROMPT, "-n", 40)
    assert status == 0 and not err and "apples" in text and text.endswith("\n")
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    assert generate("--prompt", PROMPT, "-n", 40)[1] == text
    assert generate("-f", file, "-n", 40)[1] == text
    # drafting changes nothing; another seed does
    assert generate(PROMPT, "-n", 40, "--draft", "off")[1] == text
    assert generate(PROMPT, "-n", 40, "--draft", "static", "--trees", "generic-hydra:n4")[1] == text
    assert generate(PROMPT, "-n", 40, "--seed", 3)[1] != text
    # the demo's chat template
    chat = generate("--chat", "How many apples are in 3 boxes of 4 apples?", "-n", 60)[1]
    assert chat.strip() and "Answer:" not in chat

    out = tmp_path / "out.txt"
    status, shown, err = generate(PROMPT, "-n", 40, "-o", out, "--stats")
    assert status == 0 and not shown
    assert out.read_text().rstrip("\n") == text.rstrip("\n")
    assert re.search(r"\d+ tokens/s · \d\.\d\d× plain · \d\.\d\d tokens/step · entropy .+ nats", err)
    status, _, err = generate(PROMPT, "-o", out)
    assert status == 2 and "--overwrite" in err


def test_sampling_options(generate: Run, tmp_path: Path) -> None:
    text = generate(PROMPT, "--stop", "####", "-n", 60)[1]
    assert text.strip() and "####" not in text
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}')
    assert json.loads(generate(PROMPT, "--json-schema", schema, "-n", 60)[1])["n"] in (1, 2)
    grammar = tmp_path / "g.gbnf"
    grammar.write_text('root ::= "日本 🙂" [0-9]')
    assert re.fullmatch(r"日本 🙂\d\n", generate(PROMPT, "--grammar", grammar)[1])


def test_an_answer_in_channels(generate: Run, tmp_path: Path) -> None:
    """As gpt-oss writes: what it says, without what it thinks; as text to go on with, all of it."""
    wrote = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Twelve."
    grammar = tmp_path / "channels.gbnf"
    grammar.write_text(f"root ::= {json.dumps(wrote)}\n")
    assert generate(PROMPT, "--chat", "--grammar", grammar, "-n", 200)[1] == "Twelve.\n"
    assert generate(PROMPT, "--raw", "--grammar", grammar, "-n", 200)[1] == wrote + "\n"


def test_a_prompt_from_stdin(demo_cache: Path) -> None:
    command = [sys.executable, "-m", "entmtp.generate", "--threads", "1", "-n", "5", "--temp", "0"]
    env = {**os.environ, "ENTMTP_CACHE": str(demo_cache)}
    got = subprocess.run(
        command, input=PROMPT, env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert got.stdout.strip() and not got.stderr


def test_a_batch_is_resumed(generate: Run, prompts: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    status, shown, err = generate("--prompts", prompts, "-o", whole, "-n", 8, "--stats")
    assert status == 0 and not shown and f"{N} of {N} answers" in err and "tokens/step" in err
    rows = answers(whole)
    assert [r["id"] for r in rows] == [f"t/{i}" for i in range(N)]
    assert set(rows[0]) == {"id", "prompt", "text", "finish_reason", "settings", "stats"}
    assert rows[0]["stats"]["tokens"] <= 8

    # on stdout the same lines
    status, shown, err = generate("--prompts", prompts, "-n", 8)
    assert [json.loads(line)["text"] for line in shown.splitlines()] == [r["text"] for r in rows]

    # killed while it wrote the third answer
    lines = whole.read_bytes().splitlines(keepends=True)
    for cut in (1, 9, len(lines[2]) - 1):
        part = tmp_path / "part.jsonl"
        part.write_bytes(b"".join(lines[:2]) + lines[2][:cut])
        status, _, err = generate("--prompts", prompts, "-o", part, "-n", 8, "--draft", "off")
        assert status == 0 and "2 of them from before" in err
        assert [(r["id"], r["text"]) for r in answers(part)] == [(r["id"], r["text"]) for r in rows]

    # complete: nothing to do; fewer prompts than it holds
    before = whole.read_bytes()
    assert f"{N} of them from before" in generate("--prompts", prompts, "-o", whole, "-n", 8)[2]
    assert "2 of 2 answers" in generate("--prompts", prompts, "-o", whole, "-n", 8, "--limit", 2)[2]
    assert whole.read_bytes() == before

    # other settings, another prompt, another file
    for options, said in {("-n", 9): "tokens: 8 there, 9 now", ("-n", 8, "--temp", 0): "temperature"}.items():
        status, _, err = generate("--prompts", prompts, "-o", whole, *options)
        assert status == 2 and said in err and "--overwrite" in err and err.count("\n") == 1
    assert generate("--prompts", prompts, "-o", prompts, "-n", 8)[0] == 2
    assert whole.read_bytes() == before
    status, _, _ = generate("--prompts", prompts, "-o", whole, "-n", 3, "--overwrite", "--limit", 2)
    assert status == 0 and len(answers(whole)) == 2


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_answers_in_parallel(generate: Run, prompts: Path, tmp_path: Path) -> None:
    """Several at a time are the answers of one after the other, in a file that goes on as any."""
    one, several = tmp_path / "one.jsonl", tmp_path / "several.jsonl"
    options = ("--prompts", prompts, "-n", 30, "--flash-attn")
    assert generate(*options, "-o", one)[0] == 0
    assert generate(*options, "-o", several, "--parallel", 3, "--limit", 4)[0] == 0
    status, _, err = generate(*options, "-o", several, "--parallel", 3, "--stats")
    assert status == 0 and f"{N} of {N} answers" in err and "4 of them from before" in err

    def texts(path: Path) -> dict[str, str]:
        return {row["id"]: row["text"] for row in answers(path)}

    assert texts(several) == texts(one) and len(answers(several)) == N
    # without --flash-attn one at a time is computed without, so its answers may be others
    assert "flash_attn" in generate(*options[:-1], "-o", several)[2]
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "word " * 5000}) + "\n" + prompts.read_text("utf-8"), "utf-8")
    status, out, err = generate("--prompts", long, "-n", 5, "--parallel", 2)
    assert status == 1 and len(out.splitlines()) == N and "exceed" in err
    assert "--parallel" in generate(PROMPT, "--parallel", 2)[2]


def test_a_lossy_batch_is_another(generate: Run, prompts: Path, tmp_path: Path) -> None:
    """Text that typical acceptance shaped depends on the threshold and the trees, and says so."""
    out = tmp_path / "answers.jsonl"
    options = ("--prompts", prompts, "--limit", 1, "-n", 4, "--draft", "static", "-o", out)
    typical = ("--accept", "typical", "--typical-epsilon", "0.2", "--trees", "generic-hydra:n4")
    assert generate(*options, *typical)[0] == 0
    settings = answers(out)[0]["settings"]
    assert settings == settings | {"accept": "typical", "typical_epsilon": 0.2, "trees": "generic-hydra:n4"}
    for other in (("--accept", "lossless"), ("--typical-epsilon", "0.3"), ("--trees", "generic-hydra:n8")):
        status, _, err = generate(*options, *typical, *other)
        assert status == 2 and "other settings" in err
    out.unlink()
    assert generate(*options, "--trees", "generic-hydra:n4", "--no-adapt", "--outputs", "rows")[0] == 0
    assert answers(out)[0]["settings"].keys() == {"model", "tokens", "chat"}


def test_ctrl_c_keeps_what_is_done(demo_cache: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    grammar = tmp_path / "long.gbnf"
    grammar.write_text('root ::= ([a-z]{1,9} " ")+\n')
    command = [
        sys.executable, "-m", "entmtp.generate", "--threads", "1", "--prompts", str(prompts), "-o", str(out),
        "-n", "250", "--temp", "1.5", "--grammar", str(grammar),
    ]  # fmt: skip
    env = {**os.environ, "ENTMTP_CACHE": str(demo_cache)}
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out.exists() and out.read_bytes().count(b"\n")):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130, err
    done = answers(out)
    assert 1 <= len(done) < N
    assert f"{len(done)} of {N} answers are in {out}; the same command goes on" in err
    again = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert again.returncode == 0, again.stderr
    assert answers(out)[: len(done)] == done
    assert [r["id"] for r in answers(out)] == [f"t/{i}" for i in range(N)]


def test_a_prompt_too_long_stops_no_batch(generate: Run, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "word " * 400}) + "\n" + json.dumps({"prompt": "a"}) + "\n")
    out = tmp_path / "o.jsonl"
    status, _, err = generate("--prompts", path, "-o", out, "--ctx", 256, "-n", 3)
    assert status == 1 and "1: Requested tokens" in err
    assert [r["id"] for r in answers(out)] == ["2"]


def test_mistakes(generate: Run, prompts: Path, tmp_path: Path) -> None:
    for options, status, said in [
        (("a", "--prompt", "b"), 2, "PROMPT and --prompt are given"),
        (("a", "--system", "b", "--raw"), 2, "--system has no place with --raw"),
        (("a", "--limit", 3), 2, "--limit"),
        (("a", "-n", -1), 2, "--tokens"),
        (("-f", tmp_path / "none"), 1, "none: No such file"),
        (("--prompts", tmp_path / "none"), 1, "none: No such file"),
        (("a", "-o", tmp_path / "no" / "where"), 2, "there is no folder"),
        (("a", "--mirostat", 3), 2, "--mirostat"),
    ]:
        got, shown, err = generate(*options)
        assert (got, shown) == (status, ""), err
        assert said in err and err.count("\n") == 1, err
    twice = tmp_path / "twice.jsonl"
    twice.write_text('{"id": 1, "prompt": "a"}\n{"id": 1, "prompt": "b"}\n')
    assert "two prompts have the id 1" in generate("--prompts", twice)[2]


def test_resume_reads_only_its_own_files(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    items = [Question("1", ("a",)), Question("2", ("b",))]
    good = json.dumps({"id": "1", "prompt": "a", "text": "", "settings": {}}) + "\n"
    for data in (b"", b"{", b'{"id"', good.encode(), good.encode() + b'{"id": "2", "pro'):
        path.write_bytes(data)
        assert resume(path, {}, items) == ({"1"} if data.startswith(good.encode()) else set())
        assert path.read_bytes() == (good.encode() if data.startswith(good.encode()) else b"")
    for data in (
        b"my notes",
        b"my notes\n",
        b'{"a": 1}\n' + good.encode(),
        good.encode().replace(b'"a"', b'"z"'),
    ):
        path.write_bytes(data)
        with pytest.raises(UsageError):
            resume(path, {}, items)
        assert path.read_bytes() == data


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [
        '{"prompt": "a\u2028b"}',
        "",
        '{"question_id": 7, "turns": ["c", "d"]}',
        '{"id": "x", "prompt": "e"}',
    ]
    path.write_text("\n".join(lines), "utf-8")
    found = read_questions(path)
    assert [(q.id, q.turns) for q in found] == [("1", ("a\u2028b",)), ("7", ("c", "d")), ("x", ("e",))]
    said = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    again = {"role": "user", "content": "c"}
    path.write_text(json.dumps({"messages": [*said, again]}) + "\n" + json.dumps({"messages": said}) + "\n")
    assert [q.messages for q in read_questions(path)] == [[*said, again], said[:2]]
    bad = (
        "",
        "{}",
        "3",
        '{"prompt": 3}',
        "no",
        '{"messages": []}',
        '{"turns": [1]}',
        '{"turns": []}',
        '{"turns": "a"}',
    )
    for text in (
        *bad,
        '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "system", "content": "a"}]}',
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"p\.jsonl"):
            read_questions(path)
