"""Bad surroundings: what commands do where they cannot write, have no home, are not alone, or the clock was set back.

The result is success or one clear sentence, and nothing half-written.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from entmtp.convert import convert
from entmtp.models.assets import assets
from helpers.disks import in_disk, need_mount
from helpers.hub_server import hub_environment, serve
from helpers.killing import BASE, ROOT, _llama, _two_tasks
from helpers.settings import prompts

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the conditions are made with POSIX's means")

LOAD = """
import sys
from entmtp import Llama
llm = Llama(sys.argv[1], heads=sys.argv[2], draft="entmtp", n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False)
print(llm("The sea", max_tokens=4, temperature=0)["choices"][0]["text"])
llm.close()
"""


@dataclass(frozen=True)
class Row:
    """A command that writes to a disk.

    Attributes:
        command: its words, by the folder with its files and the disk.
        says: part of the sentence that it ends with where the disk is full or cannot be written to; None: it works.
        environment: variables, by the disk.
    """

    command: Callable[[Path, Path], list[object]]
    says: str | None
    environment: Callable[[Path], dict[str, str]] = lambda disk: {}


def _module(name: str, *words: object) -> list[object]:
    return [sys.executable, "-m", f"entmtp.{name}", *words]


def _cache(disk: Path) -> dict[str, str]:
    return {"ENTMTP_CACHE": str(disk / "cache")}


ROWS = {
    "convert": Row(
        lambda f, disk: _module("convert", assets() / "hydra", "--base", BASE, "--outfile", disk / "heads.gguf"),
        "heads.gguf",
    ),
    "generate": Row(
        lambda f, disk: _module(
            "generate", "-m", BASE, "--raw", "The sea", "-n", 3000, "--ctx", 4096, "--temp", 1.5, "-o",
            disk / "a.txt", "--no-calibrate",
        ),
        "a.txt",
    ),
    "generate --prompts": Row(
        lambda f, disk: _module(
            "generate", "-m", BASE, "--raw", "--prompts", f / "questions.jsonl", "-n", 300, "-o", disk / "a.jsonl",
            "--ctx", 512, "--no-calibrate",
        ),
        "a.jsonl",
    ),
    "tune": Row(
        lambda f, disk: _module(
            "tune", "--model", BASE, "--heads", f / "heads.gguf", "--prompts", f / "code.jsonl", f / "story.jsonl",
            "-o", disk / "bank.json", "--tokens", 16, "--rounds", 1, "--contexts", 16, "--ctx", 512, "--threads", 1,
        ),
        "bank.json",
    ),
    "costs": Row(lambda f, disk: [sys.executable, "-c", LOAD, BASE, f / "heads.gguf"], None, _cache),
    "demo": Row(
        lambda f, disk: _module("generate", "-m", "demo", "--raw", "The sea", "-n", 4), "set ENTMTP_CACHE", _cache
    ),
    "build": Row(
        lambda f, disk: [
            sys.executable, ROOT / "native" / "llama_cpp.py", "build", "--cache", disk, "--llama-dir", f / "llama.cpp",
            "--patches", f / "patches", "--cmake", f / "cmake",
        ],
        "",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read."""
    at = tmp_path_factory.mktemp("surroundings")
    convert(assets() / "hydra", BASE, at / "heads.gguf", outtype="q4_0", progress=False)
    lines = [json.dumps({"id": f"q{i}", "prompt": p[:200]}) for i, p in enumerate(prompts()[:8])]
    (at / "questions.jsonl").write_text("\n".join(lines) + "\n")
    _two_tasks(at)
    _llama(at)
    return at


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    return {**os.environ, "ENTMTP_CACHE": str(tmp_path / "own-cache"), "PYTHONPATH": str(ROOT), **more}


def in_one_sentence(name: str, done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode in (1, 2), (name, done.returncode, done.stderr[-1500:])
    assert "Traceback" not in done.stderr, done.stderr[-1500:]
    said = [line for line in done.stderr.strip().splitlines() if line.startswith(("entmtp", "error"))]
    assert said and says in said[-1], (name, done.stderr[-1500:])


# one page is room for a file's beginning; and no room for any file
DISKS = {"full in the middle": "size=4k", "full": "size=4k,nr_inodes=1", "read-only": "ro"}


@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("name", ROWS)
def test_a_disk_that_takes_nothing(name: str, disk: str, folder: Path, tmp_path: Path) -> None:
    need_mount()
    row, at = ROWS[name], tmp_path / "disk"
    at.mkdir()
    words = [str(w) for w in row.command(folder, at)]
    look = 'at=$1; shift; "$@"; code=$?; find "$at" -type f; exit $code'
    done = in_disk(
        at, DISKS[disk], "sh", "-c", look, "sh", at, *words, env=environment(tmp_path, **row.environment(at))
    )
    if row.says is None:
        assert done.returncode == 0, done.stderr
        return
    in_one_sentence(name, done, row.says)
    left = [Path(line).name for line in done.stdout.splitlines() if line.startswith(str(at))]
    # answers are appended: what is there of them is whole but for the last line
    assert [n for n in left if n not in ("a.jsonl", ".lock") and not n.endswith(".lock")] == [], left


@pytest.mark.parametrize("disk", ["size=2m", "size=2m,nr_inodes=2", "ro"])
def test_a_download_to_a_disk_that_takes_nothing(disk: str, tmp_path: Path) -> None:
    need_mount()
    at, source = tmp_path / "disk", tmp_path / "hub" / "owner" / "repo" / "main"
    at.mkdir()
    source.mkdir(parents=True)
    (source / "model.gguf").write_bytes(BASE.read_bytes())
    with serve(tmp_path / "hub") as (endpoint, _):
        env = {**hub_environment(endpoint, at), "ENTMTP_CACHE": str(at / "cache")}
        words = _module("generate", "-m", "hf:owner/repo/model.gguf", "--raw", "The sea", "-n", 4)
        done = in_disk(at, disk, *words, env=env)
    in_one_sentence("download", done, "")


def test_no_more_than_a_file_of_some_size(folder: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE, as some hosts set it: other than a full disk, it is an error of its own."""
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = subprocess.run(
        [str(w) for w in ROWS["convert"].command(folder, tmp_path)], capture_output=True, text=True,
        env=environment(tmp_path), preexec_fn=limit,
    )  # fmt: skip
    in_one_sentence("convert", done, "heads.gguf")
    assert list(tmp_path.iterdir()) == []


NO_HOME = """
import os, pwd, runpy, sys
def none(*_): raise KeyError("no such user")
pwd.getpwuid = none
for name in ("HOME", "ENTMTP_CACHE", "XDG_CACHE_HOME", "HF_HOME"):
    os.environ.pop(name, None)
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__") if sys.argv[0].startswith("entmtp") else exec(sys.argv[0])
"""


def test_no_home(folder: Path, tmp_path: Path) -> None:
    """A user that the system does not know, as in containers: what needs no cache works, what needs one says so."""

    def run(*words: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", NO_HOME, *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment(tmp_path)
        )

    loaded = run(
        LOAD.replace("sys.argv[1]", repr(str(BASE))).replace("sys.argv[2]", repr(str(folder / "heads.gguf")))
    )
    assert loaded.returncode == 0, loaded.stderr
    answered = run("entmtp.generate", "-m", BASE, "--raw", "The sea", "-n", 4)
    assert answered.returncode == 0, answered.stderr
    in_one_sentence(
        "demo", run("entmtp.generate", "-m", "demo", "--raw", "The sea", "-n", 4), "set ENTMTP_CACHE"
    )
    tuned = run(
        "entmtp.tune", "--model", BASE, "--heads", folder / "heads.gguf", "--prompts", folder / "code.jsonl",
        folder / "story.jsonl", "-o", tmp_path / "bank.json", "--tokens", 16, "--rounds", 1, "--contexts", 16, "--ctx",
        512,
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["bank.json"]


@contextlib.contextmanager
def started(*commands: list[object], **how: object) -> Iterator[list[subprocess.Popen[str]]]:
    yield [
        subprocess.Popen(
            [str(w) for w in c], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how
        )  # type: ignore[call-overload]
        for c in commands
    ]


def test_several_first_starts_at_once(tmp_path: Path) -> None:
    """On one empty cache: the demo's model and heads are made, costs are measured, a model is downloaded."""
    source = tmp_path / "hub" / "owner" / "repo" / "main"
    source.mkdir(parents=True)
    (source / "model.gguf").write_bytes(BASE.read_bytes())
    with serve(tmp_path / "hub") as (endpoint, _):
        env = environment(tmp_path, **hub_environment(endpoint, tmp_path / "hf"))
        env |= {"ENTMTP_CACHE": str(tmp_path / "cache")}
        for model in ("demo", "hf:owner/repo/model.gguf"):
            ask = _module("generate", "-m", model, "--raw", "The sea", "-n", 8, "--ctx", 256, "--threads", 1)
            with started(ask, ask, ask, env=env) as processes:
                said = [p.communicate(timeout=300) for p in processes]
            assert [p.returncode for p in processes] == [0, 0, 0], said
            assert len({out for out, _ in said}) == 1 and said[0][0].strip()
    assert not [p for p in (tmp_path / "cache").rglob("*") if ".tmp" in p.name]


def test_files_from_the_future(folder: Path, tmp_path: Path) -> None:
    """The clock was set back: what the cache holds bears dates to come."""
    env = environment(tmp_path)
    ask = [
        str(w)
        for w in _module("generate", "-m", "demo", "--raw", "The sea", "-n", 8, "--ctx", 256, "--threads", 1)
    ]
    build = [str(w) for w in ROWS["build"].command(folder, tmp_path / "build")]

    def run() -> list[str]:
        done = [subprocess.run(c, capture_output=True, text=True, env=env) for c in (ask, build)]
        assert [d.returncode for d in done] == [0, 0], [d.stderr for d in done]
        return [d.stdout for d in done]

    first = run()
    future = time.time() + 20 * 365 * 86400
    made = {
        p: p.read_bytes() for at in ("own-cache", "build") for p in (tmp_path / at).rglob("*") if p.is_file()
    }
    for path in made:
        os.utime(path, (future, future))
    assert run() == first
    found = {p for at in ("own-cache", "build") for p in (tmp_path / at).rglob("*") if p.is_file()}
    assert set(made) <= found
    # costs are kept once their timings agree, which they may not have done the first time
    assert all(path.parent.name == "costs" for path in found - set(made))
