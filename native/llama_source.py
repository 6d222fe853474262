"""The source of llama.cpp: fetched with pip or copied from a user's directory, unpacked and patched."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from native.llama_cache import RECIPE, BuildError, file_lock, log, make_key, pip_download, sha256_file
from native.llama_patches import apply_patches, patches_id, unapply_patches

PIN_FILE = Path(__file__).resolve().parent / "llama.cpp.pin.json"

# Directories of llama.cpp that no build needs, about 110 MB of test vocabularies and pictures.
UNUSED_DIRS = {"models", "docs", "media"}

# Directories in a user's checkout that are not source.
NOT_SOURCE = re.compile(r"^(\.git|\.venv|\.cache|build.*|models|__pycache__)$")


def clear(folder: Path, pattern: str) -> None:
    """Remove the folders that killed runs left; for who holds the lock that they were made under."""
    for left in folder.glob(pattern):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)


def load_pin(path: Path = PIN_FILE) -> dict[str, str]:
    pin: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return pin


def verify_sdist(path: Path, sha256: str) -> None:
    """Raise BuildError and remove the file unless its SHA-256 is the pinned one."""
    found = sha256_file(path)
    if found != sha256:
        path.unlink()
        raise BuildError(
            f"{path.name}: SHA-256 is {found}, but {sha256} is pinned in {PIN_FILE.name}. The file was removed; "
            "run again to fetch it anew. If this repeats, the package index serves a different file."
        )


def download_sdist(package: str, version: str | None, folder: Path, sha256: str | None = None) -> Path | None:
    """The source distribution that pip puts into the folder, the newest without a version; None if it cannot."""
    requirement = f"{package}=={version}" if version else package
    log(f"downloading the source of {requirement} (76 MB)")
    found: Path | None = pip_download(requirement, folder, source=True, sha256=sha256)
    return found


def fetch_sdist(cache: Path, pin: dict[str, str]) -> Path:
    """The verified source distribution; downloaded with pip unless it is in the cache."""
    path = cache / "sdist" / pin["sdist"]
    with file_lock(cache / "sdist" / ".lock"):
        if path.exists():
            verify_sdist(path, pin["sha256"])
            return path
        clear(path.parent, "tmp*")
        with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
            downloaded = download_sdist(pin["package"], pin["version"], Path(tmp), pin["sha256"])
            if downloaded is None or downloaded.name != path.name:
                raise BuildError(
                    f"could not download {pin['package']}=={pin['version']} with the SHA-256 of {PIN_FILE.name}; pip's "
                    f"reason is above. Without a network, put {path.name} into {path.parent}, or build from your own "
                    "llama.cpp with -DENTMTP_LLAMA_CPP_DIR=<path>."
                )
            verify_sdist(downloaded, pin["sha256"])
            os.replace(downloaded, path)
    return path


def extract_source(archive: Path, source_dir: str, dest: Path) -> None:
    """Extract one directory of a source distribution into dest: regular files only, none outside dest."""
    log(f"extracting {source_dir}")
    root = dest.resolve()
    with tarfile.open(archive) as tar:
        for member in tar:
            # <package>-<version>/<source_dir>/<path>
            _, _, inside = member.name.partition("/")
            if not inside.startswith(source_dir + "/") or not member.isfile():
                continue
            relative = inside[len(source_dir) + 1 :]
            # .git is a link to a repository that does not exist here, and git would trip over it
            if relative == ".git" or relative.split("/")[0] in UNUSED_DIRS:
                continue
            target = (root / relative).resolve()
            if root not in target.parents:
                raise BuildError(f"{archive.name} holds an unsafe path: {member.name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            content = tar.extractfile(member)
            assert content is not None
            with content, target.open("wb") as file:
                shutil.copyfileobj(content, file)
            if member.mode & 0o100:
                target.chmod(0o755)
    if not (root / "CMakeLists.txt").exists():
        raise BuildError(f"{archive.name} holds no {source_dir}")


def iter_source_files(root: Path) -> Iterator[Path]:
    """Source files of a user's checkout, relative to it, in a fixed order."""
    for folder, dirs, files in os.walk(root):
        here = Path(folder)
        if here == root:
            dirs[:] = [d for d in dirs if not NOT_SOURCE.match(d)]
            files = [f for f in files if f != ".git"]  # a file in worktrees and submodules
        dirs[:] = sorted(d for d in dirs if d != "__pycache__")
        for name in sorted(files):
            if (here / name).is_file():
                yield (here / name).relative_to(root)


def copy_user_source(llama_dir: Path, dest: Path) -> None:
    for relative in iter_source_files(llama_dir):
        target = dest / relative
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(llama_dir / relative, target)


def hash_user_source(llama_dir: Path) -> str:
    if not (llama_dir / "src" / "llama.cpp").is_file() or not (llama_dir / "ggml").is_dir():
        raise BuildError(
            f"{llama_dir} is not a llama.cpp source directory (no src/llama.cpp and ggml/ in it)"
        )
    digest = hashlib.sha256()
    for relative in iter_source_files(llama_dir):
        digest.update(f"{relative.as_posix()}\0{sha256_file(llama_dir / relative)}\n".encode())
    return digest.hexdigest()


def source_key(origin: str, patches: Sequence[Path]) -> str:
    """Key of a patched tree. origin: SHA-256 of the archive, or the content hash of the user's directory."""
    return make_key(["source", RECIPE, origin, patches_id(patches)])


def prepare_source(
    cache: Path, pin: dict[str, str], patches: Sequence[Path], llama_dir: Path | None = None
) -> tuple[Path, str]:
    """The patched source tree and its key. A user's directory is copied, never changed."""
    origin = hash_user_source(llama_dir) if llama_dir else pin["sha256"]
    key = source_key(origin, patches)
    path = cache / "source" / key
    if path.is_dir():
        return path, key
    archive = None if llama_dir else fetch_sdist(cache, pin)
    with file_lock(cache / "source" / f".{key}.lock"):
        if path.is_dir():  # another process was faster
            return path, key
        clear(path.parent, f".{key}.tmp*")
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{key}.tmp") as tmp:
            tree = Path(tmp) / "tree"
            tree.mkdir()
            if llama_dir:
                log(f"copying {llama_dir}")
                copy_user_source(llama_dir, tree)
                if already := unapply_patches(tree, patches):
                    log(f"already applied in {llama_dir}: {', '.join(p.name for p in already)}")
            else:
                assert archive is not None
                extract_source(archive, pin["source_dir"], tree)
            apply_patches(tree, patches)
            log(f"applied {len(patches)} patches")
            os.replace(tree, path)
    return path, key
