"""The source of llama.cpp is compared with its pin before any code of it runs: pip asks for metadata, which is code."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from pathlib import Path

import pytest

from native import llama_cache, llama_source

# a build backend that leaves a mark when it is asked for metadata
BACKEND = """
import os, pathlib

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    pathlib.Path(os.environ["MARK"]).touch()
    info = pathlib.Path(metadata_directory, "parcel-1.0.dist-info")
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: parcel\\nVersion: 1.0\\n")
    return info.name

def build_wheel(*args, **more):
    raise NotImplementedError
"""
FILES = {
    "backend.py": BACKEND,
    "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    '[project]\nname = "parcel"\nversion = "1.0"\n',
    "PKG-INFO": "Metadata-Version: 2.1\nName: parcel\nVersion: 1.0\n",
}


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that appears when code of the source distribution runs, which pip finds in a folder."""
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return tmp_path / "mark"


def write_parcel(path: Path) -> dict[str, str]:
    """A source distribution, and its pin."""
    with tarfile.open(path, "w:gz") as tar:
        for name, text in FILES.items():
            member = tarfile.TarInfo(f"parcel-1.0/{name}")
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text.encode()))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"package": "parcel", "version": "1.0", "sdist": path.name, "sha256": digest}


def test_the_pinned_file_is_fetched(tmp_path, mark):
    pin = write_parcel(tmp_path / "parcel-1.0.tar.gz")
    path = llama_source.fetch_sdist(tmp_path / "cache", pin)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == pin["sha256"]
    assert mark.exists()  # so that its absence means something


def test_no_code_of_another_file_runs(tmp_path, mark, capfd):
    pin = write_parcel(tmp_path / "parcel-1.0.tar.gz")
    with pytest.raises(llama_cache.BuildError, match="with the SHA-256 of"):
        llama_source.fetch_sdist(tmp_path / "cache", {**pin, "sha256": 64 * "0"})
    assert "DO NOT MATCH THE HASHES" in capfd.readouterr().err
    assert not mark.exists()
    assert not list((tmp_path / "cache").rglob("*.tar.gz"))
