#!/usr/bin/env python3
"""Does a portable wheel come out the same, byte for byte, when it is built again elsewhere?

    python tests/wheel/rebuild.py dist/entmtp-0.1.0-py3-none-linux_x86_64.whl

The sources are copied to another folder and built there, llama.cpp too: with an empty cache, and with another umask.
Takes as long as a first build (`make wheel-check`).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from native.llama_cache import default_cache  # noqa: E402
from native.llama_source import fetch_sdist, load_pin  # noqa: E402


def copy_sources(folder: Path) -> None:
    """What git tracks, and what it would track."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def build_again(folder: Path) -> Path:
    """The wheel of the same sources, built in `folder`."""
    copy_sources(folder / "sources")
    cache = folder / "cache"
    (cache / "sdist").mkdir(parents=True)
    shutil.copy2(fetch_sdist(default_cache(), load_pin()), cache / "sdist")  # only what is built shall differ
    subprocess.run(
        ["make", "wheel", "NATIVE=0", f"VENV={Path(sys.prefix)}"],
        cwd=folder / "sources", env={**os.environ, "ENTMTP_CACHE": str(cache)}, umask=0o077, check=True,
    )  # fmt: skip
    (wheel,) = (folder / "sources" / "dist").glob("*.whl")
    return wheel


def differences(first: Path, second: Path) -> Iterator[str]:
    """What differs, a line each: the contents of files, else how they lie in the archive."""
    with zipfile.ZipFile(first) as a, zipfile.ZipFile(second) as b:
        names = set(a.namelist()) | set(b.namelist())
        for name in sorted(names):
            if name not in a.namelist() or name not in b.namelist():
                yield f"{name}: only in one of them"
            elif a.read(name) != b.read(name):
                yield f"{name}: other contents"
            elif (x := a.getinfo(name)).date_time != (y := b.getinfo(name)).date_time:
                yield f"{name}: other time, {x.date_time} and {y.date_time}"
            elif x.external_attr != y.external_attr:
                yield f"{name}: other rights, {x.external_attr >> 16:o} and {y.external_attr >> 16:o}"
        if a.namelist() != b.namelist():
            yield "the order of the files"


def main() -> int:
    parser = argparse.ArgumentParser(description="Build a wheel again elsewhere and compare the bytes.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--with", dest="other", type=Path, help="compare with this one, and build none")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="entmtp-built-elsewhere-") as folder:
        other = args.other or build_again(Path(folder))
        same = args.wheel.read_bytes() == other.read_bytes()
        if not same:
            print(f"{args.wheel.name} is not the same:", *differences(args.wheel, other), sep="\n  ")
            return 1
    digest = hashlib.sha256(args.wheel.read_bytes()).hexdigest()
    print(f"{args.wheel.name} is the same, byte for byte: SHA-256 {digest}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
