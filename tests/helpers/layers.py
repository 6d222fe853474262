"""The direction of imports: import-linter's contracts (pyproject.toml) over the package as a wheel installs it.

`make lint` runs this as a program. The sources lie in three folders, which only an install joins, so they are copied
together, and Python is started without site-packages' hooks, which would find the sources in their place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]


def install(folder: Path) -> Path:
    """Copy the package together in `folder`; returns its path."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    for target, source in settings["tool"]["scikit-build"]["wheel"]["packages"].items():
        shutil.copytree(
            ROOT / source, folder / target, ignore=shutil.ignore_patterns("assets", "__pycache__")
        )
    return folder / "entmtp"


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    """import-linter's verdict about the package in `folder`; its exit code is 0 where every contract is kept."""
    program = (
        "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"
    )
    path = os.pathsep.join([str(folder), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return subprocess.run(
        [sys.executable, "-S", "-c", program, "--no-cache", "--config", str(ROOT / "pyproject.toml")],
        cwd=folder, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="entmtp-layers-") as name:
        folder = Path(name)
        install(folder)
        done = check(folder)
    print(
        done.stdout[done.stdout.find("Contracts\n") :] if done.returncode == 0 else done.stdout + done.stderr
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
