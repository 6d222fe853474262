"""Whether our patches apply to the llama.cpp of another llama-cpp-python. Nothing of the pinned build changes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from native.llama_cache import BuildError, file_lock, sha256_file
from native.llama_source import download_sdist, extract_source


@dataclass(frozen=True)
class Outcome:
    """What became of one patch.

    fuzzy: hunks that went in although lines around them have changed, as {file: ["1", "2"]}
    failed: hunks that did not
    skipped: files that were not even tried, and why
    """

    patch: Path
    fuzzy: dict[str, list[str]]
    failed: dict[str, list[str]]
    skipped: dict[str, str]

    @property
    def applies(self) -> bool:
        return not self.failed and not self.skipped

    def __str__(self) -> str:
        if self.applies:
            return f"with fuzz: {_hunks(self.fuzzy)}" if self.fuzzy else "cleanly"
        parts = [_hunks(self.failed)] if self.failed else []
        return f"fails: {'; '.join([*parts, *(f'{file} {why}' for file, why in self.skipped.items())])}"


def _hunks(found: dict[str, list[str]]) -> str:
    return "; ".join(
        f"{file} hunk{'s' if len(numbers) > 1 else ''} {', '.join(numbers)}"
        for file, numbers in found.items()
    )


def fetch_candidate(cache: Path, package: str, version: str | None) -> Path:
    """The source distribution of a version, or the newest; no hash of it is known yet."""
    folder = cache / "sdist"
    with file_lock(folder / ".lock"):
        path = folder / f"{package.replace('-', '_')}-{version}.tar.gz"
        if version and path.exists():
            return path
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            downloaded = download_sdist(package, version, Path(tmp))
            if downloaded is None:
                raise BuildError(
                    f"could not download {package} {version or ''}".rstrip() + "; pip says why above"
                )
            path = folder / downloaded.name
            if not path.exists():
                os.replace(downloaded, path)
            elif sha256_file(path) != sha256_file(downloaded):
                raise BuildError(
                    f"{path} is not the file that the package index serves; remove it and run again"
                )
    return path


def read_report(patch: Path, text: str) -> Outcome:
    """What GNU patch says of one patch."""
    fuzzy: dict[str, list[str]] = {}
    failed: dict[str, list[str]] = {}
    skipped: dict[str, str] = {}
    file, reason = "", ""
    for line in text.splitlines():
        if found := re.match(r"patching file '?(.+?)'?$", line):
            file, reason = found[1], "is not tried"
        elif found := re.match(r"\|\+\+\+ b/(\S+)", line):  # the header of a file that is not there
            file, reason = found[1], "is gone"
        elif found := re.match(r"The next patch would (create|delete) the file '?(.+?)'?,$", line):
            file, reason = found[2], "is there already" if found[1] == "create" else "is gone"
        elif "previously applied" in line:
            reason = "has it already"
        elif re.match(r"\d+ out of \d+ hunks? ignored", line):
            skipped[file] = reason
        elif found := re.match(r"Hunk #(\d+) FAILED", line):
            failed.setdefault(file, []).append(found[1])
        elif found := re.match(r"Hunk #(\d+) succeeded .*with fuzz", line):
            fuzzy.setdefault(file, []).append(found[1])
    return Outcome(patch, fuzzy, failed, skipped)


def try_patches(tree: Path, patches: Sequence[Path]) -> list[Outcome]:
    """Apply all that can be applied, hunk by hunk in name order, to a tree that is thrown away afterwards."""
    tool = shutil.which("patch")
    if not tool:
        raise BuildError("patch is not installed")
    outcomes = []
    for patch in patches:
        # two of three lines of context may differ; without any, added lines would fit everywhere
        command = [tool, "-p1", "--batch", "--forward", "--fuzz=2"]
        command += ["--no-backup-if-mismatch", "--reject-file=-"]
        result = subprocess.run(
            [*command, "-i", str(patch.resolve())],
            cwd=tree,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        outcome = read_report(patch, result.stdout)
        if result.returncode != 0 and outcome.applies:
            raise BuildError(f"{patch.name} cannot be tried: {(result.stderr or result.stdout).strip()}")
        outcomes.append(outcome)
    return outcomes


def bump(cache: Path, pin: dict[str, str], patches: Sequence[Path], version: str | None = None) -> bool:
    """Print how each patch fares on a version, the newest without one; False if one of them fails."""
    archive = fetch_candidate(cache, pin["package"], version)
    with tempfile.TemporaryDirectory() as tmp:
        tree = Path(tmp) / "tree"
        tree.mkdir()
        extract_source(archive, pin["source_dir"], tree)
        outcomes = try_patches(tree, patches)
    print(f"{archive.name}  SHA-256 {sha256_file(archive)}")
    width = max((len(o.patch.name) for o in outcomes), default=0)
    for outcome in outcomes:
        print(f"{outcome.patch.name:{width}}  {outcome}")
    return all(o.applies for o in outcomes)
