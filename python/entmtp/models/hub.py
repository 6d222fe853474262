"""Files on the Hugging Face Hub: `hf:owner/repo[/file][@revision]` to files in huggingface-hub's cache, checked."""

from __future__ import annotations

import errno
import hashlib
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.errors import ModelError

PREFIX = "hf:"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 22


@dataclass(frozen=True)
class Name:
    """The parts of `hf:owner/repo[/file][@revision]`."""

    text: str
    repo: str
    file: str | None
    revision: str | None

    @classmethod
    def parse(cls, text: str, revision: str | None = None) -> Name:
        """Raises ModelError where it is no such name; `revision` is used where the name has none."""
        path, _, at = text.removeprefix(PREFIX).partition("@")
        parts = path.split("/", 2)
        if len(parts) < 2 or not all(parts) or ("@" in text and not at):
            raise ModelError(
                f"{text}: a repository on the Hugging Face Hub is given as hf:owner/repo[/file][@revision]"
            )
        return cls(text, "/".join(parts[:2]), parts[2] if len(parts) == 3 else None, at or revision)


@dataclass
class Repository:
    """One commit of a repository; without a network, what of it was downloaded before.

    Attributes:
        files: its files, with their SHA-256 where it is known.
        local: where they lie, if the Hub cannot be asked.
        why_local: why it cannot.
    """

    name: Name
    files: dict[str, str | None]
    license: str | None = None
    commit: str | None = None
    local: dict[str, Path] = field(default_factory=dict)
    why_local: str | None = None

    def get(self, file: str) -> Path:
        """Path of a file, downloaded if it is not in the cache, its SHA-256 compared.

        Raises:
            ModelError: the Hub refuses, or the file is not what the Hub says it is.
            OSError: the disk is full or cannot be written to.
        """
        if self.why_local:
            path = self.local[file]
        else:
            hub = _library(self.name.text)
            revision = self.commit or self.name.revision
            if expected := self.files[file]:
                _sweep(self.name.repo, expected)
            path = Path(
                ask(self.name.text, lambda: hub.hf_hub_download(self.name.repo, file, revision=revision))
            )
        if expected := self.files[file]:
            check(path, expected, self.name.text)
        return path

    def remember(self, file: str) -> None:
        """Let huggingface-hub note which commit the revision is, for times without a network."""
        if not self.why_local:
            hub, revision = _library(self.name.text), self.name.revision
            ask(self.name.text, lambda: hub.hf_hub_download(self.name.repo, file, revision=revision))


def open_repository(name: Name, progress: bool = True) -> Repository:
    """The files of a repository at the name's revision.

    Raises:
        ModelError: there is no such repository, it is not for you, or the Hub cannot be reached and nothing of the
            repository was downloaded before.
    """
    hub = _library(name.text)
    if not (progress and sys.stderr.isatty()):
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    try:
        info = ask(
            name.text,
            lambda: hub.HfApi().model_info(name.repo, revision=name.revision, files_metadata=True),
        )
    except Unreachable as e:
        local = _downloaded(name)
        if not local:
            raise
        return Repository(name, {f: _sha_of_blob(p) for f, p in local.items()}, local=local, why_local=e.why)
    hashes = {s.rfilename: s.lfs.sha256 if s.lfs else None for s in info.siblings or []}
    files = {file: found if found and _SHA256.fullmatch(found) else None for file, found in hashes.items()}
    license = info.card_data.get("license") if info.card_data else None
    return Repository(name, files, license if isinstance(license, str) else None, info.sha)


class Unreachable(ModelError):
    """The Hub gave no answer."""

    def __init__(self, source: str, why: str, mend: str):
        super().__init__(
            f"{source}: {why} and it was not downloaded before; {mend}, or give the folder or file itself"
        )
        self.why = why


def _library(source: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as e:
        raise ModelError(
            f"{source}: downloads need huggingface-hub; run 'pip install huggingface-hub'"
        ) from e
    return huggingface_hub


def ask(source: str, call: Callable[[], Any]) -> Any:
    """Run a call of huggingface_hub. Raises ModelError that says what went wrong, OSError for a local disk."""
    try:
        return call()
    except Exception as e:  # the library raises its own errors, its HTTP client's and OSError's
        if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            raise
        kind = type(e).__name__
        status = getattr(getattr(e, "response", None), "status_code", None)
        if kind == "HFValidationError":
            what = "that is no repository name; give it as hf:owner/repo"
        elif status in (401, 403):
            what = (
                "the Hub refuses access: the repository does not exist, or is private or gated; check the name, ask "
                "for access on its page and set HF_TOKEN"
            )
        elif status == 404:
            what = "the Hub has no such repository, revision or file; check the name"
        elif kind == "OfflineModeIsEnabled":
            raise Unreachable(source, "HF_HUB_OFFLINE is set", "unset it") from e
        else:
            reason = f"HTTP status {status}" if status else kind
            raise Unreachable(
                source, f"the Hugging Face Hub cannot be reached ({reason})", "check the network"
            ) from e
        raise ModelError(f"{source}: {what}") from e


def _downloaded(name: Name) -> dict[str, Path]:
    """The files of a repository that are in huggingface-hub's cache, at the name's revision."""
    hub = _library(name.text)
    from huggingface_hub.utils import CacheNotFound

    try:
        repos = hub.scan_cache_dir().repos
    except CacheNotFound:
        return {}
    wanted = name.revision or "main"
    for repo in repos:
        if repo.repo_id == name.repo and repo.repo_type == "model":
            for at in repo.revisions:
                if wanted in at.refs or at.commit_hash == wanted:
                    return {
                        f.file_path.relative_to(at.snapshot_path).as_posix(): f.file_path for f in at.files
                    }
    return {}


def _sweep(repo: str, sha256: str) -> None:
    """Remove what killed downloads of a file left: huggingface-hub begins each anew, under another name."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils import WeakFileLock

    cache, folder = Path(constants.HF_HUB_CACHE), repo_folder_name(repo_id=repo, repo_type="model")
    left = list((cache / folder / "blobs").glob(f"{sha256}.*.incomplete"))
    if not left:
        return
    try:
        # who downloads it now holds this
        with WeakFileLock(str(cache / ".locks" / folder / f"{sha256}.lock"), timeout=0.1):
            for path in left:
                path.unlink(missing_ok=True)
    except OSError:  # a lock that is held among them
        return


def _sha_of_blob(path: Path) -> str | None:
    """huggingface-hub names large files in its cache by their SHA-256."""
    name = path.resolve().name
    return name if _SHA256.fullmatch(name) else None


#
# checksums
#


def check(path: Path, expected: str, source: str) -> None:
    """Compare a file with its SHA-256; a file that was compared before and has not changed since is not read again.

    Raises:
        ModelError: they differ.
    """
    from ..common.atomic import atomic_path
    from ..common.cache import cache_folder

    stat = path.stat()
    seen = cache_folder() / "checked" / expected
    mark = f"{stat.st_size} {stat.st_mtime_ns}"
    try:
        if seen.read_text("utf-8") == mark:
            return
    except OSError:
        pass
    found = sha256(path)
    if found != expected:
        raise ModelError(
            f"{source}: {path.name} does not have the checksum that the Hub gives (SHA-256 {found[:12]}... in place of "
            f"{expected[:12]}...), so it was damaged on the way or on disk; delete {path.resolve()} and run again"
        )
    try:
        seen.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(seen) as temporary:
            temporary.write_text(mark, "utf-8")
    except OSError:
        pass  # checked again next time


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex, with a progress bar on a terminal where it takes a while."""
    from rich.console import Console
    from rich.progress import wrap_file

    digest, size = hashlib.sha256(), path.stat().st_size
    console = Console(stderr=True)
    hidden = size < 1 << 28 or not console.is_terminal
    with (
        open(path, "rb") as raw,
        wrap_file(
            raw, size, description=f"checking {path.name}", disable=hidden, transient=True, console=console
        ) as file,
    ):
        while data := file.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


#
# which file
#

_PART = re.compile(r"(?P<stem>.*)-(?P<i>\d{5})-of-(?P<n>\d{5})\.gguf$")


def parts(file: str) -> list[str]:
    """All the files of a GGUF that is split into `-00001-of-0000N`; of others the file itself."""
    if not (m := _PART.match(file)):
        return [file]
    return [f"{m['stem']}-{i:05}-of-{m['n']}.gguf" for i in range(1, int(m["n"]) + 1)] or [file]


def choose_gguf(files: Iterable[str], name: Name, kind: str) -> str:
    """The GGUF that a name means: the file itself, or the only one whose name contains the text.

    Split GGUFs count as one, by their first part. Files with "heads" in their name are heads, others models, as
    entmtp.convert names them. Without a file in the name that decides between several.

    Raises:
        ModelError: there is none, or there are several; they are listed.
    """
    ggufs = [f for f in files if f.lower().endswith(".gguf")]
    firsts = sorted({parts(f)[0] for f in ggufs})
    if name.file:
        if name.file in ggufs or name.file in firsts:
            return parts(name.file)[0]
        found = [f for f in firsts if name.file.lower() in f.lower()]
        if not found:
            there_are, *listed = _listing(firsts)
            raise ModelError(
                f"{name.text}: no GGUF file of {name.repo} matches {name.file}; {there_are}", *listed
            )
    else:
        found = firsts
    if len(found) > 1:
        found = [f for f in found if ("heads" in f.lower()) == (kind == "heads")] or found
    if len(found) > 1:
        found = [f for f in found if "mmproj" not in f.lower()] or found
    if len(found) == 1:
        return found[0]
    if not found:
        raise ModelError(f"{name.text}: {name.repo} has no GGUF file; give a repository that has one")
    example = f"hf:{name.repo}/{found[0]}" + (f"@{name.revision}" if name.revision else "")
    there_are, *listed = _listing(found)
    raise ModelError(
        f"{name.text}: {len(found)} GGUF files match, name one as in {example}; {there_are}", *listed
    )


def _listing(files: list[str]) -> list[str]:
    """How a sentence ends, and the lines below it."""
    if not files:
        return ["it has none"]
    shown = [f"{f} ({len(parts(f))} parts)" if len(parts(f)) > 1 else f for f in files]
    return ["there are", *(f"  {f}" for f in shown)]


def fetch_gguf(name: Name, kind: str, say: Callable[[str], None]) -> Path:
    """Path of the GGUF that a name means, all its parts downloaded and compared with their checksums; the first part.

    Raises:
        ModelError: see `open_repository`, `choose_gguf` and `Repository.get`.
        OSError: the disk is full or cannot be written to.
    """
    repository = open_repository(name)
    try:
        file = choose_gguf(repository.files, name, kind)
    except ModelError as e:
        if repository.why_local:
            raise ModelError(f"{e} (only files downloaded before are known: {repository.why_local})") from e
        raise
    needed = parts(file)
    if missing := [part for part in needed if part not in repository.files]:
        raise ModelError(
            f"{name.text}: {missing[0]} is missing, one of {len(needed)} parts of the model; "
            + ("run again with a network" if repository.why_local else "give another file or repository")
        )
    if repository.why_local:
        say(f"{name.text}: {repository.why_local}; using the file downloaded before")
    paths = [repository.get(part) for part in needed]
    repository.remember(needed[0])
    return paths[0]
