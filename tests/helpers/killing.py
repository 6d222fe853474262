"""Commands that are killed (kill -9) at random moments and given again: what they are, and what must be true then.

A row of `CASES` names a command and how its result is read. `Matrix.run` runs it undisturbed, then kills it so many
times, then lets it finish: the result must be the undisturbed one's, no file may lie half-written under its own name,
nothing done may be lost, and no file may be left that the undisturbed run does not leave. `python tests/kill_matrix.py`
prints the table.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from entmtp.models.assets import assets

from .hub_server import hub_environment, serve
from .models import model_path
from .settings import prompts

ROOT = Path(__file__).resolve().parents[2]
BASE = assets() / "demo-base-q8_0.gguf"
PATIENCE = 300.0  # seconds; only a run that hangs takes so long
Result = Any


@dataclass(frozen=True)
class Case:
    """A command that is killed.

    Attributes:
        command: its words, by its folder.
        result: what it made, as something that can be compared; None while it is not there.
        prepare: puts into the folder what the command reads.
        progress: units of work that a killed run would not do again.
        around: a context for all runs, which gives variables of their environment.
        torch: it needs PyTorch.
        spared: patterns of files that may differ between runs: locks, and what is kept for the next command.
    """

    name: str
    command: Callable[[Path], list[object]]
    result: Callable[[Path], Result | None]
    prepare: Callable[[Path], None] = lambda folder: None
    progress: Callable[[Path], int] = lambda folder: 0
    around: Callable[[Path], contextlib.AbstractContextManager[dict[str, str]]] = field(
        default=lambda folder: contextlib.nullcontext({})
    )
    torch: bool = False
    spared: tuple[str, ...] = ("*.lock",)


#
# the table
#


def _bytes(path: Path) -> Result | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def _module(name: str, *words: object) -> list[object]:
    return [sys.executable, "-m", f"entmtp.{name}", *words]


def _convert(folder: Path) -> list[object]:
    return _module(
        "convert", assets() / "hydra", "--base", BASE, "--outfile", folder / "heads.gguf", "--outtype", "q4_0"
    )


def _questions(folder: Path) -> None:
    lines = [json.dumps({"id": f"q{i}", "prompt": p[:200]}) for i, p in enumerate(prompts()[:12])]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")


def _generate(folder: Path) -> list[object]:
    return _module(
        "generate", "-m", BASE, "--prompts", folder / "questions.jsonl", "-o", folder / "answers.jsonl", "--raw",
        "--tokens", 200, "--ctx", 512, "--threads", 1, "--no-calibrate",
    )  # fmt: skip


def _answers(folder: Path) -> Result | None:
    path = folder / "answers.jsonl"
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    rows = [
        json.loads(line) for line in lines if line.endswith("\n")
    ]  # a last line without an end is cut off
    return sorted((r["id"], r["text"]) for r in rows) if len(rows) == 12 and len(lines) == 12 else None


def _n_answers(folder: Path) -> int:
    path = folder / "answers.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _two_tasks(folder: Path) -> None:
    for task in ("code", "story"):
        lines = [
            json.dumps({"prompt": p[:100]})
            for p in prompts("humaneval" if task == "code" else "literature")[:3]
        ]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")


def _tune(folder: Path) -> list[object]:
    return _module(
        "tune", "--model", BASE, "--heads", folder / "heads.gguf", "--prompts", folder / "code.jsonl",
        folder / "story.jsonl", "-o", folder / "bank.json", "--tokens", 48, "--rounds", 1, "--contexts", 16, "--ctx",
        512, "--threads", 1, "--sizes", 2, 4,
    )  # fmt: skip


def _tune_prepare(folder: Path) -> None:
    _two_tasks(folder)
    subprocess.run([str(w) for w in _convert(folder)], check=True, capture_output=True)


def _bank(folder: Path) -> Result | None:
    """Its rollouts' figures: what this machine's passes cost differs from run to run."""
    path = folder / "bank.json"
    if not path.exists():
        return None
    bank = json.loads(path.read_text())
    return bank["source"], bank["heads"], [len(tree["paths"]) for tree in bank["trees"] if not tree["paths"]]


LOAD = """
import sys
from entmtp import Llama
from entmtp.measure import at_load
at_load.is_steady = lambda costs: True  # other programs run beside this one
Llama(sys.argv[1], heads=sys.argv[2], draft="entmtp", n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False).close()
"""


def _costs(folder: Path) -> Result | None:
    found = list((folder / "cache" / "costs").glob("*.json"))
    return [sorted(json.loads(p.read_text())) for p in found] or None


@contextlib.contextmanager
def _hub(folder: Path) -> Iterator[dict[str, str]]:
    """A hub on this machine with a model of some megabytes, which dawdles."""
    at = folder.parent / "hub" / "owner" / "repo" / "main"
    at.mkdir(parents=True, exist_ok=True)
    (at / "model.gguf").write_bytes(BASE.read_bytes() + np.random.default_rng(0).bytes(12 << 20))
    with serve(folder.parent / "hub", pause=0.01) as (endpoint, _):
        yield hub_environment(endpoint, folder / "hf")


FETCH = (
    "import sys; from entmtp.models.names import resolve; print(resolve('hf:owner/repo/model.gguf', 'model'))"
)


def _download(folder: Path) -> Result | None:
    found = list((folder / "hf").rglob("snapshots/*/model.gguf"))
    return [_bytes(p) for p in found] or None


CMAKE = """#!/bin/sh
# a cmake that builds slowly
set -e
case "$1" in
--build)
    mkdir -p "$2"
    for i in 1 2 3 4 5 6 7 8; do
        [ -f "$2/$i.o" ] || { sleep 0.05; echo "object $i" > "$2/$i.o.new"; mv "$2/$i.o.new" "$2/$i.o"; }
    done ;;
--install)
    mkdir -p prefix/lib
    for i in 1 2 3 4; do sleep 0.02; cat "$2"/*.o > prefix/lib/libllama$i.so; done ;;
*) sleep 0.1 ;;
esac
"""


def _llama(folder: Path) -> None:
    tree = folder / "llama.cpp"
    for name in ("CMakeLists.txt", "LICENSE", "src/llama.cpp", "include/llama.h", "ggml/CMakeLists.txt"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(f"{name}\n")
    for i in range(400):
        (tree / "src" / f"{i}.cpp").write_text("int x;\n" * 200)
    (folder / "patches").mkdir()
    (folder / "cmake").write_text(CMAKE)
    (folder / "cmake").chmod(0o755)


def _build(folder: Path) -> list[object]:
    return [
        sys.executable, ROOT / "native" / "llama_cpp.py", "build", "--cache", folder / "cache", "--llama-dir",
        folder / "llama.cpp", "--patches", folder / "patches", "--cmake", folder / "cmake",
    ]  # fmt: skip


def _built(folder: Path) -> Result | None:
    entries = list((folder / "cache" / "build").glob("*"))
    return (
        {p.relative_to(e).as_posix(): _bytes(p) for e in entries for p in e.rglob("*.so")}
        if entries
        else None
    )


def _train(folder: Path) -> list[object]:
    return _module(
        "train", "--model", model_path("llama"), "-o", folder / "heads.gguf", "--arch", "medusa", "--tokens", 3000,
        "--seq-len", 64, "--epochs", 6, "--batch-tokens", 256, "--save-every", 10, "--held-out", 6, "--threads", 1,
        "--outtype", "f32", "--resume",
    )  # fmt: skip


def _n_trained(folder: Path) -> int:
    work = folder / "heads.gguf.train"
    done = len(list(work.glob("text-*.npz")))
    for path in work.glob("*/checkpoint.safetensors"):
        from safetensors import safe_open

        with safe_open(path, "np") as file:
            done += int(json.loads((file.metadata() or {})["run"])["step"])
    return done


CASES = {
    case.name: case
    for case in (
        Case("convert", _convert, lambda f: _bytes(f / "heads.gguf")),
        Case("generate --prompts", _generate, _answers, _questions, _n_answers),
        Case("tune", _tune, _bank, _tune_prepare),
        Case(
            "cache of costs", lambda f: [sys.executable, "-c", LOAD, BASE, f / "heads.gguf"], _costs,
            lambda f: subprocess.run([str(w) for w in _convert(f)], check=True, capture_output=True) and None,
        ),
        # dummy_file: empty, of a look of huggingface-hub's at whether the disk knows links
        Case(
            "download", lambda f: [sys.executable, "-c", FETCH], _download, around=_hub,
            spared=("*.lock", "dummy_file_*"),
        ),
        Case("build cache", _build, _built, _llama),
        Case(
            "train", _train, lambda f: _bytes(f / "heads.gguf"), progress=_n_trained, torch=True,
        ),
    )
}  # fmt: skip


#
# the kills
#


@dataclass
class Row:
    """What came of a case.

    Attributes:
        kills, completions: runs that were killed, and that were done before they could be.
        losses: units of work that were done, and were not any more after a kill.
        litter: files at the end that an undisturbed run does not leave.
    """

    name: str
    seconds: float = 0.0  # of the undisturbed run
    kills: int = 0
    completions: int = 0
    losses: int = 0
    litter: list[str] = field(default_factory=list)


def files(folder: Path, spared: tuple[str, ...]) -> set[str]:
    """All that lies in a folder, but for what is spared."""
    found = (p for p in folder.rglob("*") if p.is_file() and not any(p.match(s) for s in spared))
    return {p.relative_to(folder).as_posix() for p in found}


def run(case: Case, folder: Path, n_kills: int, seed: int) -> Row:
    """Kill a case `n_kills` times, in a folder of its own.

    Raises:
        AssertionError: what must hold does not; the text says after which kill.
    """
    row, draw = Row(case.name), random.Random(f"{seed} {case.name}")
    calm, killed = folder / "calm", folder / "killed"
    for one in (calm, killed):
        one.mkdir(parents=True)
        case.prepare(one)
    with case.around(calm) as more:
        begun = time.monotonic()
        _finish(case, calm, more)
        row.seconds = time.monotonic() - begun
    expected = case.result(calm)
    assert expected is not None, f"{case.name}: an undisturbed run made nothing"

    with case.around(killed) as more:
        for i in range(n_kills):
            before = case.progress(killed)
            _, done = _kill(case, killed, more, draw, row.seconds)
            row.kills, row.completions = row.kills + (not done), row.completions + done
            found = case.result(killed)
            assert found in (None, expected), f"{case.name}, kill {i + 1}: {found} in place of {expected}"
            assert found is not None or not done, f"{case.name}, run {i + 1} was done, and made nothing"
            if (
                found is None
            ):  # a run that made its result has tidied its progress away, even if it was killed after that
                row.losses += max(0, before - case.progress(killed))
            if done:  # and anew
                row.litter += files(killed, case.spared) - files(calm, case.spared)
                shutil.rmtree(killed)
                killed.mkdir()
                case.prepare(killed)
        _finish(case, killed, more)
    found = case.result(killed)
    assert found == expected, f"{case.name}, at the end: {found} in place of {expected}"
    row.litter = sorted({*row.litter, *(files(killed, case.spared) - files(calm, case.spared))})
    return row


def _start(case: Case, folder: Path, more: dict[str, str]) -> subprocess.Popen[bytes]:
    env = {**os.environ, **more, "ENTMTP_CACHE": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    env.pop("PYTEST_CURRENT_TEST", None)
    return subprocess.Popen(
        [str(word) for word in case.command(folder)], cwd=folder, env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip


def _finish(case: Case, folder: Path, more: dict[str, str]) -> None:
    process = _start(case, folder, more)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, f"{case.name}: {said.decode('utf-8', 'replace')[-2000:]}"


def _kill(
    case: Case, folder: Path, more: dict[str, str], draw: random.Random, seconds: float
) -> tuple[str, bool]:
    """Run it, and kill it and all that it started: at a moment, or as soon as the n-th new file is there.

    Returns:
        What was waited for, and whether the run was done before.
    """
    by_file = draw.random() < 0.5
    n_new, after = draw.randint(1, 3), draw.uniform(0.2, 1.0) * seconds
    there = set(_names(folder))
    process = _start(case, folder, more)
    begun = time.monotonic()
    seen: set[str] = set()
    while process.poll() is None and time.monotonic() - begun < 3 * seconds + 10:
        if by_file:
            seen |= set(_names(folder)) - there
            if len(seen) >= n_new:
                time.sleep(draw.uniform(0, 0.02))
                break
        elif time.monotonic() - begun >= after:
            break
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode in (0, -signal.SIGKILL), (
        f"{case.name}: {said.decode('utf-8', 'replace')[-2000:]}"
    )
    return f"file {n_new}" if by_file else f"{after:.2f} s", process.returncode == 0


def _names(folder: Path) -> list[str]:
    return [str(Path(at) / name) for at, _, names in os.walk(folder) for name in names]
