#!/usr/bin/env python3
"""The wheel's bill of materials, native/entmtp.cdx.json (CycloneDX; PEP 770 says where it lies in the wheel).

    python native/sbom.py [--check]

Made from pyproject.toml, llama.cpp.pin.json and the patches; what they do not say is in the tables here. No time and no
serial number: the same sources give the same file. auditwheel adds a file of its own for the libraries that it adds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cyclonedx.model import HashAlgorithm, HashType, Property, XsUri
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentType, Diff, Patch, PatchClassification, Pedigree
from cyclonedx.model.license import LicenseExpression
from cyclonedx.output.json import JsonV1Dot7
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from packageurl import PackageURL
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from native.llama_patches import list_patches  # noqa: E402
from native.llama_source import load_pin  # noqa: E402

SBOM = ROOT / "native" / "entmtp.cdx.json"

# of what is installed beside the wheel; THIRD_PARTY.md has the same
LICENCES = {
    "gguf": "MIT",
    "huggingface-hub": "Apache-2.0",
    "llama-cpp-python": "MIT",
    "numpy": "BSD-3-Clause",
    "packaging": "Apache-2.0 OR BSD-2-Clause",
    "prompt_toolkit": "BSD-3-Clause",
    "psutil": "BSD-3-Clause",
    "rich": "MIT",
    "safetensors": "Apache-2.0",
}

# Data in the wheel that others' work went into: name, where, licence
DATA = (
    ("smollm2-135m-instruct-hydra", "entmtp/assets/heads", "Apache-2.0"),
    ("published trees of Medusa and Hydra", "entmtp/trees", "Apache-2.0"),
    ("demo model and heads", "entmtp/assets", "PSF-2.0 AND MIT"),
    ("benchmark prompts", "entmtp/assets/prompts", "MIT AND Apache-2.0"),
)


def component(name: str, licence: str, version: str | None = None, where: str = "", **more: Any) -> Component:
    """One entry. where: the folder in the wheel."""
    kind = more.pop("type", ComponentType.LIBRARY)
    properties = [Property(name="entmtp:folder", value=where)] if where else []
    return Component(
        name=name,
        version=version,
        type=kind,
        bom_ref=name,
        licenses=[LicenseExpression(licence)],
        properties=[*properties, *more.pop("properties", [])],
        **more,
    )


def llama_cpp(pin: dict[str, str]) -> Component:
    """The copy in entmtp/lib, and what is in it that has a version or an author of its own."""
    patches = [
        Patch(type=PatchClassification.UNOFFICIAL, diff=Diff(url=XsUri(f"native/patches/{patch.name}")))
        for patch in list_patches()
    ]
    archive = HashType(alg=HashAlgorithm.SHA_256, content=pin["sha256"])
    source = Component(
        name=pin["sdist"],
        version=pin["version"],
        type=ComponentType.FILE,
        bom_ref=pin["sdist"],
        hashes=[archive],
        purl=PackageURL("pypi", None, pin["package"], pin["version"]),
    )
    return component(
        "llama.cpp",
        "MIT",
        pin["commit"],
        "entmtp/lib",
        purl=PackageURL("github", "ggml-org", "llama.cpp", pin["commit"]),
        copyright="2023-2026 The ggml authors",
        pedigree=Pedigree(ancestors=[source], patches=patches),
        components=[
            component("ggml", "MIT", pin["ggml"], purl=PackageURL("github", "ggml-org", "ggml")),
            component("llamafile sgemm", "MIT", copyright="2024 Mozilla Foundation"),
            component("YaRN", "MIT", copyright="2023 Jeffrey Quesnelle and Bowen Peng"),
            component("ggllm.cpp", "MIT", purl=PackageURL("github", "cmp-nct", "ggllm.cpp")),
        ],
    )  # fmt: skip


def dependencies(project: dict[str, Any]) -> Iterator[Component]:
    """What pip installs beside the wheel; a version where one is pinned, else the range that is asked for."""
    for text in project["dependencies"]:
        requirement = Requirement(text)
        exact = [s.version for s in requirement.specifier if s.operator == "=="]
        yield component(
            requirement.name,
            LICENCES[requirement.name],
            exact[0] if exact else None,
            purl=PackageURL("pypi", None, requirement.name, exact[0] if exact else None),
            properties=[Property(name="entmtp:requirement", value=text)],
            is_external=True,
        )


def sbom() -> str:
    """The text of the file; valid CycloneDX 1.7."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    name, version = project["name"], project["version"]
    root = component(name, project["license"], version, purl=PackageURL("pypi", None, name, version))
    parts = [
        llama_cpp(load_pin()),
        *(component(n, licence, where=where, type=ComponentType.DATA) for n, where, licence in DATA),
        *dependencies(project),
    ]
    bom = Bom(metadata=BomMetaData(component=root), components=parts)
    bom.register_dependency(root, parts)
    text = json.loads(JsonV1Dot7(bom).output_as_string())
    del text["serialNumber"], text["metadata"]["timestamp"]
    written = json.dumps(text, indent=2, sort_keys=True) + "\n"
    if error := JsonStrictValidator(SchemaVersion.V1_7).validate_str(written):
        raise ValueError(f"not CycloneDX: {error}")
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the wheel's bill of materials.")
    parser.add_argument("--check", action="store_true", help="only see whether it is up to date")
    check = parser.parse_args().check
    text = sbom()
    if not check:
        SBOM.write_text(text, encoding="utf-8", newline="\n")
    elif not SBOM.exists() or SBOM.read_text(encoding="utf-8") != text:
        print(f"{SBOM.relative_to(ROOT)} is not what its sources say; run 'make sbom'", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
