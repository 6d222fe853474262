"""The wheel's bill of materials says what pyproject.toml, the pin, the patches and the built libraries say."""

from __future__ import annotations

import ctypes
import importlib.metadata
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from entmtp.native import library
from native import sbom

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
SBOM = json.loads((ROOT / "native" / "entmtp.cdx.json").read_text("utf-8"))
PIN = json.loads((ROOT / "native" / "llama.cpp.pin.json").read_text("utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def components(of: dict[str, Any] = SBOM) -> dict[str, dict[str, Any]]:
    """By name, also those inside others."""
    found = {}
    for component in of.get("components", []):
        found |= {component["name"]: component, **components(component)}
    return found


def test_it_is_what_its_sources_say():
    assert sbom.SBOM.read_text("utf-8") == sbom.sbom(), "run `make sbom`"  # which is also valid CycloneDX


def test_it_follows_its_sources(monkeypatch):
    monkeypatch.setattr(sbom, "load_pin", lambda: {**PIN, "commit": "abc"})
    assert sbom.SBOM.read_text("utf-8") != sbom.sbom()


def test_what_is_installed_beside_it():
    beside = {c["name"]: c for c in components().values() if c.get("isExternal")}
    said = {c["properties"][0]["value"] for c in beside.values()}
    assert said == set(PROJECT["dependencies"])
    assert beside["llama-cpp-python"]["version"] == PIN["version"]
    assert beside["llama-cpp-python"]["purl"] == f"pkg:pypi/llama-cpp-python@{PIN['version']}"
    assert "version" not in beside["numpy"]  # whichever pip finds


def test_the_copy_of_llama_cpp():
    copy = components()["llama.cpp"]
    assert copy["version"] == PIN["commit"]
    assert [p["diff"]["url"] for p in copy["pedigree"]["patches"]] == [
        f"native/patches/{path.name}" for path in sorted((ROOT / "native" / "patches").glob("*.patch"))
    ]
    (archive,) = copy["pedigree"]["ancestors"]
    assert archive["hashes"] == [{"alg": "SHA-256", "content": PIN["sha256"]}]
    assert SBOM["metadata"]["component"]["version"] == PROJECT["version"]


def test_licences_are_those_of_third_party():
    text = (ROOT / "THIRD_PARTY.md").read_text("utf-8")
    for name, component in components().items():
        (licence,) = component["licenses"]
        row = re.search(rf"^\| \[?{re.escape(name)}\b.*$", text, re.MULTILINE)
        if component.get("isExternal"):
            assert row and licence["expression"].replace("OR", "or") in row[0], name


def built() -> dict[str, Any]:
    info: dict[str, Any] = json.loads((library.library_folder() / "build-info.json").read_text("utf-8"))
    if info["commit"] == "custom":
        pytest.skip("built from another llama.cpp")
    return info


def test_versions_are_those_of_the_libraries():
    assert built()["commit"] == components()["llama.cpp"]["version"]
    library.load()
    path = library.library_path("ggml-base", library.library_folder())
    assert path
    version = ctypes.CDLL(str(path)).ggml_version
    version.restype = ctypes.c_char_p
    assert version().decode() == components()["ggml"]["version"]


def test_it_is_installed():
    built()
    files = importlib.metadata.files("entmtp") or []
    (found,) = (file for file in files if file.match("*.dist-info/sboms/entmtp.cdx.json"))
    assert found.read_binary() == sbom.SBOM.read_bytes()
