"""Our patches, and how a source tree of llama.cpp gets them."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from native.llama_cache import BuildError, sha256_file

PATCH_DIR = Path(__file__).resolve().parent / "patches"


def list_patches(patch_dir: Path = PATCH_DIR) -> list[Path]:
    return sorted(patch_dir.glob("*.patch"))


def patches_id(patches: Sequence[Path]) -> list[list[str]]:
    return [[p.name, sha256_file(p)] for p in patches]


def _run_patch(tree: Path, patch: Path, reverse: bool, dry_run: bool) -> tuple[bool, str]:
    if git := shutil.which("git"):
        command = [git, "apply", "--whitespace=nowarn", "-p1"]
        command += ["--reverse"] if reverse else []
        command += ["--check"] if dry_run else []
    elif tool := shutil.which("patch"):
        command = [tool, "-p1", "--force", "--no-backup-if-mismatch", "--fuzz=0", "--reject-file=-"]
        command += ["--reverse"] if reverse else ["--forward"]
        command += ["--dry-run"] if dry_run else []
        command += ["-i"]
    else:
        raise BuildError("neither git nor patch is installed; one of them is needed to patch llama.cpp")
    # Inside some other repository, git apply would silently skip what that repository does not hold.
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(tree.resolve().parent)
    result = subprocess.run(
        [*command, str(patch.resolve())],
        cwd=tree,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return result.returncode == 0, (result.stderr or result.stdout).strip()


def unapply_patches(tree: Path, patches: Sequence[Path]) -> list[Path]:
    """Take back the patches that the tree already holds, last first; returns them in their own order.

    Only the newest patch of a series is sure to reverse cleanly, as later ones may touch the same lines.
    """
    taken = []
    for patch in reversed(patches):
        if _run_patch(tree, patch, reverse=True, dry_run=True)[0]:
            _run_patch(tree, patch, reverse=True, dry_run=False)
            taken.append(patch)
    return taken[::-1]


def apply_patches(tree: Path, patches: Sequence[Path]) -> None:
    """Apply the patches in name order; a patch that does not apply raises BuildError with its path."""
    for patch in patches:
        # the check first, so that a patch is applied wholly or not at all
        ok, message = _run_patch(tree, patch, reverse=False, dry_run=True)
        if ok:
            ok, message = _run_patch(tree, patch, reverse=False, dry_run=False)
        if not ok:
            raise BuildError(f"patch does not apply to this llama.cpp: {patch}\n{message}")
