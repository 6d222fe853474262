"""What EntMTP is compared with: llama.cpp's own server, without our patches, and our driver of its drafting."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from native.llama_build import DEFAULT_FLAGS, Tools, configure, default_jobs, find_tools, named, run_step
from native.llama_cache import BuildError, file_lock, log, make_key, sha256_file
from native.llama_source import prepare_source

SERVER, DRIVER, MODELS = "llama-server", "entmtp-speculative", "entmtp-archs"
DRIVER_SOURCE = Path(__file__).resolve().parent / "baselines"
BUILD = Path(__file__).resolve().parents[1] / "build" / "baselines"  # what is compiled, for the next time

# One program that needs no libraries beside it; no web pages and no TLS, which the build would fetch.
SERVER_FLAGS = {
    "BUILD_SHARED_LIBS": "OFF",
    "LLAMA_BUILD_COMMON": "ON",
    "LLAMA_BUILD_TOOLS": "ON",
    "LLAMA_BUILD_SERVER": "ON",
    "LLAMA_BUILD_UI": "OFF",
    "LLAMA_USE_PREBUILT_UI": "OFF",
}


def flags_of(info: dict[str, object]) -> dict[str, str]:
    """The options that the libraries were built with, as their user gave them."""
    flags = info["flags"]
    assert isinstance(flags, dict)
    return {name: value for name, value in flags.items() if DEFAULT_FLAGS.get(name) != value}


def build_target(tools: Tools, source: Path, name: str, target: str, definitions: dict[str, str]) -> Path:
    """The program that a target makes; what is compiled stays for the next time."""
    build_dir = configure(tools, source, BUILD / name, definitions)
    build = tools.build(build_dir, definitions.get("CMAKE_BUILD_TYPE", "Release"))
    run_step([*build, "--target", target, "--parallel", str(default_jobs())], build_dir)
    programs = [p for p in build_dir.rglob(f"{target}*") if p.suffix in ("", ".exe") and p.is_file()]
    if not programs:
        raise BuildError(f"{target} was built in {build_dir}, but is not there")
    return programs[0]


def keep(program: Path, folder: Path) -> None:
    """Copy a program, whole or not at all, over one that may be running."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{program.name}.new"
    shutil.copy2(program, temporary)
    os.replace(temporary, folder / program.name)


def build_baselines(
    cache: Path,
    pin: dict[str, str],
    patches: Sequence[Path],
    libraries: Path,
    llama_dir: Path | None = None,
    tools: Tools | None = None,
) -> Path:
    """The folder of both programs in the cache, `baselines/<key of the libraries>`; what it holds is not made again.

    Args:
        libraries: folder of the libraries that are compared, with their build-info.json: both programs are made from
            the same source with the same options.
        llama_dir: where that source comes from, if it is not the pinned one.

    Raises:
        BuildError: the libraries were built from another source, or a step failed.
    """
    info, patched, prefix = _of_libraries(cache, pin, patches, libraries, llama_dir)
    folder = cache / "baselines" / info["key"]
    tools = tools or find_tools()
    with file_lock(cache / "baselines" / f".{info['key']}.lock"):
        if not (folder / SERVER).exists():
            keep(_server(cache, pin, info, llama_dir, tools), folder)

        sources = make_key([[p.name, sha256_file(p)] for p in sorted(DRIVER_SOURCE.iterdir())])
        stamp = folder / "driver.key"
        if not stamp.exists() or stamp.read_text() != sources:
            log("building the driver of llama.cpp's drafting (minutes at first)")
            keep(_driver(tools, info, patched, prefix, DRIVER), folder)
            stamp.write_text(sources)
    log(f"the baselines are built: {folder}")
    return folder


def build_archs(
    cache: Path,
    pin: dict[str, str],
    patches: Sequence[Path],
    libraries: Path,
    llama_dir: Path | None = None,
    tools: Tools | None = None,
) -> Path:
    """llama.cpp's own test of its architectures on the libraries: it writes a small random model of each (`-o FOLDER`).

    Raises:
        BuildError: as `build_baselines`.
    """
    info, patched, prefix = _of_libraries(cache, pin, patches, libraries, llama_dir)
    return _driver(tools or find_tools(), info, patched, prefix, MODELS)


def _of_libraries(
    cache: Path, pin: dict[str, str], patches: Sequence[Path], libraries: Path, llama_dir: Path | None
) -> tuple[dict[str, Any], Path, Path]:
    """What libraries say of their build, the patched source that they are of, and where they were installed."""
    info = json.loads((libraries / "build-info.json").read_text(encoding="utf-8"))
    patched, key_of_source = prepare_source(cache, pin, patches, llama_dir)
    prefix = cache / "build" / info["key"]
    if info["source"] != key_of_source or not prefix.is_dir():
        raise BuildError(f"the libraries in {libraries} are not of this source; run make install first")
    return info, patched, prefix


def _server(
    cache: Path, pin: dict[str, str], info: dict[str, Any], llama_dir: Path | None, tools: Tools
) -> Path:
    """The server in the cache, which stays the same when our patches change."""
    plain, key_of_source = prepare_source(cache, pin, [], llama_dir)
    definitions = {**DEFAULT_FLAGS, **flags_of(info), **SERVER_FLAGS, **named(info["commit"])}
    key = make_key([key_of_source, definitions, info.get("compilers")])
    folder = cache / "baselines" / f"server-{key}"
    with file_lock(cache / "baselines" / f".server-{key}.lock"):
        if not (folder / SERVER).exists():
            log("building llama.cpp's own server, without our patches (once; about ten minutes on two cores)")
            keep(build_target(tools, plain, f"server-{key}", SERVER, definitions), folder)
    return folder / SERVER


def _driver(tools: Tools, info: dict[str, Any], patched: Path, prefix: Path, target: str) -> Path:
    """A program of native/baselines/ on the libraries in `prefix`."""
    compilers = {k: v for k, v in flags_of(info).items() if re.match("CMAKE_(C|CXX)_(COMP|FLAGS)", k)}
    definitions = {"LLAMA_SOURCE": str(patched), "LLAMA_PREFIX": str(prefix), "CMAKE_BUILD_TYPE": "Release"}
    definitions |= {**compilers, **named(info["commit"])}
    return build_target(tools, DRIVER_SOURCE, f"driver-{info['key']}", target, definitions)
