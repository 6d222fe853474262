"""Small disks, and disks that cannot be written to: mounted for one command, and seen by nobody else."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest


def in_disk(folder: Path, options: str, *command: object, **how: object) -> subprocess.CompletedProcess[str]:
    """Run a command with a tmpfs mounted on `folder`; options as `mount -o` takes them."""
    mount = f'mount -t tmpfs -o {options} none "{folder}" && exec "$@"'
    words = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, **how)  # type: ignore[call-overload, no-any-return]


def in_small_disk(
    folder: Path, megabytes: int, *command: object, **how: object
) -> subprocess.CompletedProcess[str]:
    """With a disk of so many megabytes."""
    return in_disk(folder, f"size={megabytes}m", *command, **how)


@functools.cache
def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        return bool(shutil.which("unshare")) and in_small_disk(Path(folder), 1, "true").returncode == 0


def need_mount() -> None:
    """Skip where no disk can be mounted."""
    if not can_mount():
        pytest.skip("this system lets no user mount a small disk (unshare --user --mount)")
