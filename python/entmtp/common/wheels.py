"""Packages from the package index, by pip: one file of a pinned version, its SHA-256 compared.

Also read by the build (native/llama_source.py), where entmtp is not installed: standard library only, no imports of
this package.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

_CHUNK = 1 << 20


def pip_download(
    requirement: str,
    folder: Path,
    *,
    source: bool,
    sha256: str | None = None,
    timeout: float | None = None,
) -> Path | None:
    """The file that pip puts into the folder, with pip's progress bar on stderr; None if it cannot.

    pip asks a source distribution for its metadata, which runs code of it and of its build backend: with a SHA-256 only
    of the file that is meant, and by the backend that is installed here, if it is.

    Args:
        requirement: as pip takes it, `name==1.0` for a pinned version.
        source: the source distribution; else the wheel.
        sha256: of the file; pip refuses another one.
        timeout: seconds that pip waits for an answer, without trying again; None: as pip does.
    """
    name = requirement.partition("==")[0]
    # --no-binary names the one package: with :all: pip would compile its build tools from source, too
    how = ["--no-binary", name] if source else ["--only-binary", ":all:"]
    calm = [] if sys.stderr.isatty() else ["--quiet"]
    patience = [] if timeout is None else ["--retries", "0", "--timeout", f"{timeout:g}"]
    # llama-cpp-python's backend, and ours; where it is installed, none is fetched
    backend = ["--no-build-isolation"] if source and importlib.util.find_spec("scikit_build_core") else []
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "download",
        "--no-deps",
        *how,
        *backend,
        *patience,
        *calm,
    ]
    # options meant for our own build must not reach that of a source distribution
    env = {k: v for k, v in os.environ.items() if k not in ("CMAKE_ARGS", "CMAKE_GENERATOR")}
    env = {k: v for k, v in env.items() if not k.startswith("SKBUILD_")}
    env |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # where a killed pip leaves what it was at
    wanted = [requirement]
    if sha256 is not None:
        listed = folder / "requirements.txt"
        listed.write_text(f"{requirement} --hash=sha256:{sha256}\n", encoding="utf-8")
        wanted = ["--require-hashes", "-r", str(listed)]
    result = subprocess.run(
        [*pip, "--dest", str(folder), *wanted], env=env, stdin=subprocess.DEVNULL, stdout=sys.stderr
    )
    found = sorted(folder.glob("*.tar.gz" if source else "*.whl"))
    return found[0] if result.returncode == 0 and found else None


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
