"""`entmtp train` and the room it takes on disk and in memory: as it says before it starts, and none of it half-used."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the train extra)")

from helpers.disks import in_small_disk, need_mount  # noqa: E402
from helpers.training import arguments  # noqa: E402

pytestmark = pytest.mark.torch


def test_a_disk_that_is_too_small(tiny: Path, tmp_path: Path) -> None:
    """It is said before anything is computed."""
    need_mount()
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = arguments(tiny, tmp_path / "heads.gguf", "--work", str(disk / "work"))
    done = in_small_disk(disk, 2, sys.executable, "-m", "entmtp.train", *argv)
    assert done.returncode == 1
    assert "GB are needed and" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr


FILL = """
import sys
from entmtp.train import cli, loop, plan
plan.check_disk = lambda need, folder: None   # as if another program took the room later
save, calls = loop.Trainer.save, []
def fill_then_save(self):
    calls.append(1)
    if len(calls) == 2:
        with open(sys.argv[1] + "/other", "wb") as file:
            try:
                while True:
                    file.write(bytes(1 << 16)); file.flush()
            except OSError:
                pass
    save(self)
loop.Trainer.save = fill_then_save
code = cli.main(sys.argv[2:])
from safetensors import safe_open
from pathlib import Path
for path in Path(sys.argv[1]).glob("work/*/checkpoint.safetensors"):
    with safe_open(path, "np") as file:
        print(file.metadata()["run"])
print(*Path(sys.argv[1]).glob("work/*/.*"))
sys.exit(code)
"""


def test_a_disk_that_fills_up(tiny: Path, tmp_path: Path) -> None:
    """The error says so, and the last checkpoint is whole."""
    need_mount()
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = arguments(
        tiny, tmp_path / "heads.gguf", "--work", str(disk / "work"), "--save-every", "5", "--epochs", "4"
    )
    done = in_small_disk(disk, 8, sys.executable, "-c", FILL, str(disk), *argv)
    assert done.returncode == 1, done.stderr
    assert "error: " in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "no space left on device" in done.stderr
    assert '"step": 5' in done.stdout
    assert "tmp" not in done.stdout  # nothing half-written
    assert not (tmp_path / "heads.gguf").exists()

    # and where there is no room for the hidden states, before they are computed
    done = in_small_disk(disk, 1, sys.executable, "-c", FILL, str(disk), *argv)
    assert done.returncode == 1
    assert "no space left on device" in done.stderr


PEAK = """
import re, sys, threading, time
from entmtp.train import cli, plan
peak, stop = [0], threading.Event()
def watch():
    while not stop.wait(0.005):
        peak[0] = max(peak[0], plan.resident())
threading.Thread(target=watch, daemon=True).start()
code = cli.main(sys.argv[1:])
stop.set()
print(peak[0] / 1e6)
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
@pytest.mark.parametrize("arch", ["medusa", "hydra++"])
def test_disk_and_memory_are_as_said(models: dict[str, Path], tmp_path: Path, arch: str) -> None:
    """Within a tenth of what it said before it started; hydra++ less where the heap frays less than allowed."""
    work = tmp_path / "work"
    argv = [
        "--model", str(models["q8_0"]), "-o", str(tmp_path / "heads.gguf"), "--arch", arch, "--threads", "1",
        "--tokens", "20k", "--held-out", "12", "--seq-len", "256", "--epochs", "1", "--work", str(work), "--keep-work",
        "--save-every", "2", "--draft-vocab", "all", "--lm-head", "own",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", PEAK, *argv], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    memory = float(re.findall(r"memory: (\d+) MB", done.stderr)[0])
    least = 0.9 if arch == "medusa" else 0.8
    assert least * memory <= float(done.stdout) <= 1.1 * memory
    cache = float(re.findall(r"of which (\d+) MB hidden states", done.stderr)[0])
    used = sum(p.stat().st_size for p in work.glob("states.*")) / 1e6
    assert used == pytest.approx(cache, rel=0.1)
