"""What `entmtp doctor` looks at, one check after another. Native code runs in processes of its own (probes.py)."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.cache import cache_folder
from ..common.errors import EntmtpError
from ..common.machine import cpu_name, cpu_quota, fast_cores, free_memory, usable_cpus
from ..common.version import __version__
from ..models import hub
from ..options.model import model_files, words
from ..threads import Load

GB = 1e9


@dataclass(frozen=True)
class Check:
    """One line of the report. `mend` says what to do about it, where `found` does not say it yet."""

    what: str
    status: str  # "ok", "note" or "broken"
    found: str
    mend: str = ""


def ok(what: str, found: str) -> Check:
    return Check(what, "ok", found)


def probe(name: str, *arguments: str, timeout: float = 600) -> dict[str, Any]:
    """Run one of doctor/probes.py in a process of its own; `error` in the result says why there is no result."""
    command = [sys.executable, "-m", "entmtp.doctor.probes", name, *arguments]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result after {timeout:.0f} seconds"}
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        return {"error": f"the process ended with {name}", "signal": name}
    try:
        return dict(json.loads(done.stdout.decode("utf-8", "replace").strip().splitlines()[-1]))
    except (ValueError, IndexError):
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        return {"error": lines[-1] if lines else f"the process ended with code {done.returncode}"}


def check_python() -> Iterator[Check]:
    found = f"{platform.python_version()} ({platform.system()} {platform.machine()})"
    if sys.maxsize < 2**32:
        yield Check("Python", "broken", found + ", 32 bits", "install a 64-bit Python")
    else:
        yield ok("Python", found)


def check_packages() -> Iterator[Check]:
    """What pyproject.toml asks for against what is installed."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(r) for r in importlib.metadata.requires("entmtp") or []]
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", "broken", "entmtp is not installed", "run 'pip install .' or 'make install'")
        return
    wrong, right = [], []
    for requirement in wanted:
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement} is missing")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            own = requirement.name == "llama-cpp-python" and _has_libraries("llama_cpp")
            right.append(
                f"{requirement.name} {version}" + (" (its own libraries are not used)" if own else "")
            )
        else:
            wrong.append(f"{requirement.name} is {version}, needed is {requirement.specifier}")
    if not wrong:
        yield ok("packages", ", ".join(right))
    else:
        yield Check(
            "packages", "broken", "; ".join(wrong),
            'install EntMTP again: CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" pip install .',
        )  # fmt: skip


def _has_libraries(package: str) -> bool:
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    return any(p.is_file() for folder in folders or [] for p in Path(folder, "lib").glob("*llama*"))


def check_libraries(found: dict[str, Any]) -> Iterator[Check]:
    """Versions, one copy of ggml, devices, kernels: all from one process that loaded them."""
    if "error" in found:
        mend = "" if "; " in found["error"] else "build them with 'make build' or 'pip install .'"
        if found.get("signal") == "SIGILL":
            mend = "they were built for another processor: build again here, or with NATIVE=0"
        elif "kernels" in found["error"]:
            mend = "unset ENTMTP_KERNELS"
        yield Check("libraries", "broken", found["error"], mend)
        return
    text = f"libentmtp {found['libentmtp']}, llama.cpp {found['llama.cpp']}, in {found['folder']}"
    if found["libentmtp"] != __version__:
        yield Check(
            "libraries",
            "broken",
            f"{text}; the Python package is {__version__}",
            "build again: 'make install'",
        )
    else:
        yield ok("libraries", text)

    loaded = found["loaded"]
    if loaded is None:
        yield Check("one llama.cpp", "note", "this system does not tell which libraries are loaded")
    else:
        names = [Path(p).name.split(".")[0] for p in loaded]
        strange = [p for p in loaded if Path(p).parent != Path(found["folder"])]
        if strange or len(names) != len(set(names)):
            yield Check(
                "one llama.cpp", "broken", f"also loaded: {', '.join(strange or loaded)}",
                "unset LLAMA_CPP_LIB_PATH and LD_PRELOAD, and import entmtp before other users of a llama.cpp",
            )  # fmt: skip
        else:
            yield ok("one llama.cpp", f"{len(loaded)} libraries, each once, all of this package")

    for backend, devices in found["backends"].items():
        names = [
            f"{d['name']}: {d['description']}" + (f", {d['free'] / GB:.1f} GB free" if d["free"] else "")
            for d in devices
        ]
        if names:
            yield ok(f"backend {backend}", "; ".join(names))
        elif backend == "RPC":
            yield ok("backend RPC", "for layers on other machines (--rpc)")
        else:
            yield Check(
                f"backend {backend}", "note", "built in, but it found no device",
                "check the driver of the device (nvidia-smi, vulkaninfo), or ignore it to run on the CPU",
            )  # fmt: skip
    yield check_kernels(found)


def check_kernels(found: dict[str, Any]) -> Check:
    asked = os.environ.get("ENTMTP_KERNELS")
    text = f"{found['kernels']} (of {', '.join(found['kernels_available'])})"
    if found["kernels"] == "off":
        if asked:
            return Check("CPU kernels", "note", f"{text}, by ENTMTP_KERNELS={asked}", "unset ENTMTP_KERNELS")
        return ok("CPU kernels", f"{text}: ggml's own serve this processor")
    return ok("CPU kernels", text)


def check_threads() -> Iterator[Check]:
    usable, quota = usable_cpus(), cpu_quota()
    threads = fast_cores()
    text = (
        f"{cpu_name()}, {usable} of {os.cpu_count()} processors, up to {threads} thread{'s' * (threads > 1)}"
    )
    if quota is not None and quota < usable:
        yield Check(
            "processor", "note", f"{text}, and time for {quota:g} of them",
            "without --threads models compute on as many as are granted",
        )  # fmt: skip
    else:
        yield ok("processor", text)
    load = Load()
    time.sleep(0.3)
    busy = load.others()
    if busy > 0.5:
        yield Check(
            "load", "note", f"other programs keep {busy:.1f} of {load.n_cpus} processors busy",
            "measure on an idle machine; without --threads models compute on the cores that are free",
        )  # fmt: skip


def check_cache() -> Iterator[Check]:
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        yield Check(
            "cache", "broken", f"{folder}: {(e.strerror or str(e)).lower()}",
            "set ENTMTP_CACHE to a folder that can be written, or mend the rights of this one",
        )  # fmt: skip
        return
    used = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    disk = shutil.disk_usage(folder)
    text = f"{folder}: {used / GB:.2f} GB in it, {disk.free / GB:.1f} GB of the disk free"
    if disk.free < GB:
        yield Check(
            "cache",
            "note",
            text,
            "make room; the folders in it can be deleted, they are made again when needed",
        )
    else:
        yield ok("cache", text)


def check_selftest(found: dict[str, Any]) -> Iterator[Check]:
    mend = "make the error part of a bug report, with the output of entmtp doctor --json"
    if "error" in found:
        if found.get("signal") == "SIGILL":
            mend = "the libraries were built for another processor: build again here, or with NATIVE=0"
        elif "ENTMTP_CACHE" in found["error"]:
            mend = ""
        yield Check("self-test", "broken", found["error"], mend)
    elif not found["same"]:
        yield Check(
            "self-test", "broken", "drafting gave other tokens than plain decoding on the demo model",
            "try ENTMTP_KERNELS=off, and report it with the output of entmtp doctor --json",
        )  # fmt: skip
    else:
        yield ok(
            "self-test",
            f"the demo's {found['tokens']} tokens are plain decoding's, {found['tokens_per_step']} per step",
        )


def check_model(args: argparse.Namespace) -> Iterator[Check]:
    """The model and heads that were named: there, small enough, loadable, made for each other, tuned."""
    try:
        model, heads = model_files(args)
    except (EntmtpError, OSError) as e:
        yield Check("model", "broken", str(e))
        return
    files = [model.with_name(p) for p in hub.parts(model.name)] + ([heads] if heads else [])
    size = sum(p.stat().st_size for p in files if p.is_file())
    free = free_memory()
    text = f"{model.name}{f' and {heads.name}' if heads else ''}: {size / GB:.2f} GB"
    if free is None:
        yield Check("memory", "note", f"{text}; this system does not tell how much is free")
    elif free < size:
        yield Check(
            "memory", "note" if args.n_gpu_layers or args.rpc else "broken",
            f"{text}, but {free / GB:.1f} GB of memory are free",
            "close programs, or take a smaller quantisation: what does not fit is read from disk at every token",
        )  # fmt: skip
    else:
        yield ok("memory", f"{text}, {free / GB:.1f} GB free")

    found = probe("model", *words(with_files(args, model, heads)))
    if "error" in found:
        mend = ""
        if found.get("signal") == "SIGKILL":
            mend = "the system killed it, most likely for want of memory: take a smaller model or --ctx"
        yield Check("model", "broken", found["error"], mend)
        return
    if "heads_error" in found:
        yield ok("model", f"{model.name} loads")
        yield Check(
            "heads", "broken", found["heads_error"],
            "give the heads of this model, or convert them again with entmtp convert --base and this model",
        )  # fmt: skip
        return
    if "model_error" in found:
        yield ok("model", f"{model.name} loads")
        yield Check("draft model", "broken", found["model_error"], "give another --draft-model, or none")
        return
    yield ok(
        "model", f"{found['name']}, {found['architecture']}, loads with a context of {found['n_ctx']} tokens"
    )
    if "weights" in found:
        yield check_weights(found["weights"])
    if found["lossless"] == "exact":
        yield ok("text", "drafts give plain decoding's text, bit for bit")
    else:
        yield Check(
            "text", "note", "drafts give plain decoding's text, but where two tokens are as near as what kernels round",
            "docs/how-it-works.md, When is the output not identical?, says where and why",
        )  # fmt: skip
    if held := found.get("held"):
        large = (
            f", {held['AnonHugePages'] / 1e6:.0f} MB of it in large pages" if "AnonHugePages" in held else ""
        )
        yield ok("held", f"{held['Rss'] / 1e6:.0f} MB more in memory with the model loaded{large}")
    if "outputs" in found:
        yield Check("logits", "note" if found["outputs_note"] else "ok", found["outputs"])
    if chain := found.get("chain"):
        text = f"up to {chain['tokens']} tokens in a row: its memory keeps as many states to go back to"
        yield ok("drafts", f"{text}, {chain['bytes'] / 1e6:.1f} MB")
    if drafter := found.get("drafter"):
        name = drafter["path"] or "its own layers for multi-token prediction"
        share = drafter["us"] / max(drafter["pass_us"], 1.0)
        text = f"{name}: {drafter['us'] / 1e3:.2f} ms a token, {share:.0%} of a pass of the model"
        if drafter["vocab"] < drafter["all"]:
            text += f", among {drafter['vocab']:,} of {drafter['all']:,} tokens"
        if share > DEAR:
            yield Check(
                "draft model", "note", text, "a token that it drafts costs too much to pay: leave it out"
            )
        else:
            yield ok("draft model", text)
    elif found.get("no_prediction"):
        yield Check(
            "draft model", "note", f"the file's prediction layers do not draft: {found['no_prediction']}"
        )
    if heads is None and drafter is None:
        yield Check(
            "heads", "note", "none named, and none that fit beside the model: drafts come from the text alone",
            "give --heads, or make them with entmtp train or entmtp convert",
        )  # fmt: skip
    if heads is None:
        return
    yield ok("heads", f"{heads.name}: {found['heads']}, made for this model")
    if found["tuned"]:
        yield ok("tuned trees", found["tuned"])
    else:
        yield Check(
            "tuned trees", "note", "none for this model, heads and machine: generic trees are used",
            f"entmtp tune --model {model} --heads {heads} --prompts my.jsonl finds better ones",
        )  # fmt: skip


def check_gain(args: argparse.Namespace) -> Check:
    """What drafts bring here."""
    from .gain import sentence  # needs the libraries, which are found sound by now

    try:
        model, heads = model_files(args)
    except (EntmtpError, OSError) as e:
        return Check("gain", "broken", str(e))
    found = probe("gain", *words(with_files(args, model, heads)))
    if "error" in found:
        return Check("gain", "note", f"could not be measured: {found['error']}")
    speeds = found["speeds"]
    each = ", ".join(f"{k} {x / speeds['plain']:.2f}" for k, x in speeds.items() if k != "plain")
    text = f"plain decoding {speeds['plain']:.0f} tokens/s, drafts times that: {each}"
    if taken := found.get("taken"):
        shares = ", ".join(f"{x:.0%}" for x in taken)
        text += f"; the heads' guesses are taken to depth 1, 2, … in {shares} of their steps"
    return ok("gain", f"{text}: {sentence(speeds)}")


DEAR = 0.6  # share of a pass that drafting a token may cost and still pay where most guesses are right
BY = {"panels": "in panels", "rows": "row by row", "ggml": "by ggml"}


def check_weights(rows: list[dict[str, Any]]) -> Check:
    """Which kernels compute how much of the model on the CPU, and what that means for drafts and for the text."""
    text = ", ".join(f"{r['tensors']} {r['type']} ({r['bytes'] / 1e6:.0f} MB) {BY[r['by']]}" for r in rows)
    total = sum(r["bytes"] for r in rows) or 1
    share = {by: sum(r["bytes"] for r in rows if r["by"] == by) / total for by in BY}
    if share["ggml"]:
        return Check(
            "weights", "note", text,
            f"ggml computes {share['ggml']:.0%} of them, and rounds otherwise for several tokens than for one: where "
            "two tokens are within that, drafting may take the other (docs/how-it-works.md); drafts gain less",
        )  # fmt: skip
    if share["rows"] > 0.2:
        return Check(
            "weights", "note", text,
            f"{share['rows']:.0%} of them cost as much again for every token of a pass, so drafts gain little; a file "
            "in Q4_K, Q5_K, Q8_0 or another type with panels (docs/kernels.md) gains more",
        )  # fmt: skip
    return ok("weights", text)


def with_files(args: argparse.Namespace, model: Path, heads: Path | None) -> argparse.Namespace:
    """The options with files in place of names, so that nothing is looked for again."""
    found = {"model": model, "heads": heads}
    return argparse.Namespace(**{**vars(args), **found})


def examine(args: argparse.Namespace, with_model: bool) -> Iterator[Check]:
    """All checks, as they are made."""
    yield from check_python()
    yield from check_packages()
    yield from check_threads()
    yield from check_cache()
    libraries = probe("libraries")
    yield from check_libraries(libraries)
    if "error" in libraries:
        return
    yield from check_selftest(probe("selftest"))
    if not with_model:
        return
    sound = True
    for check in check_model(args):
        sound = sound and check.status != "broken"
        yield check
    if sound and args.gain and args.draft != "off":
        yield check_gain(args)
