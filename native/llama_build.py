"""A patched source tree of llama.cpp, built as shared libraries."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from native.llama_cache import RECIPE, BuildError, file_lock, log, make_key

PATH_MAP = Path(__file__).resolve().parent / "cmake" / "PathMap.cmake"

# Environment variables that CMake reads when it first configures a build.
ENV_FLAGS = (
    "CFLAGS",
    "CXXFLAGS",
    "LDFLAGS",
    "CUDAFLAGS",
    "HIPFLAGS",
    "CUDAARCHS",
    "MACOSX_DEPLOYMENT_TARGET",
)

# Compilers enter the key by what they are, not by the name they were called by (cc, gcc).
IDENTIFIED = {"CMAKE_C_COMPILER", "CMAKE_CXX_COMPILER", "CMAKE_CUDA_COMPILER"}

DEFAULT_FLAGS = {
    "BUILD_SHARED_LIBS": "ON",
    "LLAMA_BUILD_COMMON": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_TOOLS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
    "LLAMA_OPENSSL": "OFF",
    # Layers on other machines (docs/rpc.md): half a megabyte. RDMA would tie the libraries to libibverbs.
    "GGML_RPC": "ON",
    "GGML_RPC_RDMA": "OFF",
    # One name per library: no libllama.so -> libllama.so.0 links, which a wheel cannot hold. Were a link stored as
    # a copy, llama_cpp (libllama.so) and libentmtp (libllama.so.0) would each load their own llama.cpp.
    "CMAKE_PLATFORM_NO_VERSIONED_SONAME": "ON",
    # Libraries find each other in their own directory, wherever that is copied to.
    "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
    "CMAKE_INSTALL_RPATH": "@loader_path" if sys.platform == "darwin" else "$ORIGIN",
    "CMAKE_INSTALL_LIBDIR": "lib",
    "CMAKE_INSTALL_BINDIR": "lib",
}


# CUDA's libraries as NVIDIA's Python packages install them, seen from entmtp/lib: CUDA 13, then CUDA 12
CUDA_RPATH = ";".join(
    ["$ORIGIN", *(f"$ORIGIN/../../nvidia/{name}/lib" for name in ("cu13", "cublas", "cuda_runtime"))]
)


def find_tool(name: str) -> str | None:
    """A program on PATH or beside this Python, where pip puts cmake and ninja in an inactive environment."""
    here = str(Path(sys.executable).parent)
    return shutil.which(name) or shutil.which(name, path=here)


def find_compiler(flags: dict[str, str], variable: str, env: str, names: Sequence[str]) -> str:
    """The compiler CMake would choose; empty where that is CMake's business (MSVC)."""
    chosen = flags.get(variable) or os.environ.get(env)
    if chosen:
        # CC may carry arguments: "ccache gcc"
        return chosen if Path(chosen).exists() else shutil.which(shlex.split(chosen)[0]) or chosen
    return next((found for name in names if (found := shutil.which(name))), "")


def compiler_identity(path: str) -> str:
    """What `cc --version` says, so that an upgraded compiler builds anew."""
    if not path:
        return "default"
    try:
        out = subprocess.run(
            [path, "--version"], capture_output=True, text=True, stdin=subprocess.DEVNULL
        ).stdout
    except OSError:
        out = ""
    real = os.path.realpath(path)
    # not the first word, the name it was called by (c++, g++); nvcc tells its release on a later line
    return f"{real} {' '.join(out.split()[1:])}"


def cpu_identity() -> str:
    """Instruction sets of this CPU. GGML_NATIVE code made for one CPU may crash on another that shares the cache."""
    try:
        if sys.platform == "linux":
            text = Path("/proc/cpuinfo").read_text()
            lines = re.findall(r"^(?:flags|Features|isa)\s*:\s*(.*)$", text, re.MULTILINE)
            return " ".join(sorted(lines[0].split())) if lines else platform.processor()
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        pass
    return platform.processor()


def is_native(flags: dict[str, str]) -> bool:
    return flags.get("GGML_NATIVE", "ON").upper() not in ("OFF", "0", "NO", "FALSE", "N", "")


def build_key(source: str, flags: dict[str, str], compilers: Sequence[str]) -> str:
    """Key of built libraries. source: key of the patched tree; compilers: their identities."""
    env = {name: os.environ[name] for name in ENV_FLAGS if os.environ.get(name)}
    cpu = cpu_identity() if is_native(flags) else ""
    machine = [platform.system(), platform.machine(), cpu]
    return make_key(["build", RECIPE, source, flags, list(compilers), machine, env, is_native(flags)])


def default_jobs() -> int:
    if os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", "").isdigit():
        return int(os.environ["CMAKE_BUILD_PARALLEL_LEVEL"])
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))  # in a container often fewer than the machine has
    return os.cpu_count() or 1


def run_step(command: Sequence[str], cwd: Path) -> None:
    # ggml takes the variable for a wish for processors without AVX2; wishes are in the flags, and so in the key
    env = {k: v for k, v in os.environ.items() if k != "SOURCE_DATE_EPOCH"}
    # inherited stderr: a build of minutes must be seen to move
    if subprocess.run(command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode != 0:
        raise BuildError(
            f"building llama.cpp failed in {cwd}; the cause is above. Command: {shlex.join(command)}"
        )


class Tools(NamedTuple):
    """CMake, and what it makes files for."""

    cmake: str
    generator: str | None  # None: CMake's own choice
    make_program: str | None

    def build(self, build_dir: Path, build_type: str) -> list[str]:
        return [self.cmake, "--build", str(build_dir), "--config", build_type]


def find_tools(
    cmake: str | None = None, generator: str | None = None, make_program: str | None = None
) -> Tools:
    """The tools that were named, else those on PATH or beside this Python: Ninja, if it is there."""
    cmake = cmake or find_tool("cmake")
    if not cmake:
        raise BuildError("cmake was not found; install it with: pip install cmake ninja")
    if not generator and (ninja := find_tool("ninja")):
        generator, make_program = "Ninja", make_program or ninja
    return Tools(cmake, generator, make_program)


def named(commit: str) -> dict[str, str]:
    """The version of a tree that is no git checkout: a repository around it must not lend its commit."""
    return {"LLAMA_BUILD_COMMIT": commit, "LLAMA_BUILD_NUMBER": "0"}


def configure(tools: Tools, source: Path, build_dir: Path, definitions: dict[str, str]) -> Path:
    """Let CMake configure a build; returns its directory, `build_dir` with the generator in its name."""
    # CMake refuses to change the generator of a directory that an interrupted build left
    build_dir = build_dir.with_name(f"{build_dir.name}-{tools.generator or 'default'}".replace(" ", "-"))
    build_dir.parent.mkdir(parents=True, exist_ok=True)
    command = [tools.cmake, "-S", str(source), "-B", str(build_dir)]
    command += ["-G", tools.generator] if tools.generator else []
    if tools.generator == "Ninja" and tools.make_program:
        command += [f"-DCMAKE_MAKE_PROGRAM={tools.make_program}"]
    command += [f"-D{name}={value}" for name, value in sorted(definitions.items())]
    run_step(command, build_dir.parent)
    return build_dir


def collect_headers(source: Path, dest: Path) -> None:
    """include/: public headers of llama.cpp and ggml. src/: the internal ones, for llama-ext.h."""
    (dest / "include").mkdir(exist_ok=True)
    for folder in ("include", "ggml/include"):
        for header in sorted((source / folder).glob("*.h")):
            shutil.copy2(header, dest / "include" / header.name)
    (dest / "src").mkdir(exist_ok=True)
    for header in sorted((source / "src").glob("*.h")):
        shutil.copy2(header, dest / "src" / header.name)
    shutil.copy2(source / "LICENSE", dest / "LICENSE")


def build_libraries(
    cache: Path,
    source: Path,
    key_of_source: str,
    flags: dict[str, str],
    commit: str,
    cmake: str | None = None,
    generator: str | None = None,
    make_program: str | None = None,
    jobs: int | None = None,
) -> Path:
    """Build llama.cpp as shared libraries, or return the cached result.

    flags: CMake cache entries; they win over the defaults above.
    """
    all_flags = {**DEFAULT_FLAGS, "CMAKE_BUILD_TYPE": "Release", **flags}
    cc = find_compiler(flags, "CMAKE_C_COMPILER", "CC", ("cc", "gcc", "clang"))
    cxx = find_compiler(flags, "CMAKE_CXX_COMPILER", "CXX", ("c++", "g++", "clang++"))
    identities = [compiler_identity(cc), compiler_identity(cxx)]
    if flags.get("GGML_CUDA", "OFF").upper() == "ON":
        if sys.platform == "linux":
            all_flags["CMAKE_INSTALL_RPATH"] = flags.get("CMAKE_INSTALL_RPATH", CUDA_RPATH)
        nvcc = flags.get("CMAKE_CUDA_COMPILER") or os.environ.get("CUDACXX") or shutil.which("nvcc") or ""
        identities.append(compiler_identity(nvcc))
    hashed = {k: v for k, v in all_flags.items() if k not in IDENTIFIED}
    key = build_key(key_of_source, hashed, identities)
    path = cache / "build" / key
    if path.is_dir():
        log(f"llama.cpp is in the cache: {path}")
        return path

    tools = find_tools(cmake, generator, make_program)

    with file_lock(cache / "work" / f".{key}.lock"):
        if path.is_dir():
            return path
        work = cache / "work" / key
        work.mkdir(parents=True, exist_ok=True)
        log(f"building llama.cpp {commit} (once for these options; minutes) in {work}")
        definitions = {
            "CMAKE_INSTALL_PREFIX": str(work / "prefix"),
            "CMAKE_PROJECT_llama.cpp_INCLUDE": PATH_MAP.as_posix(),
            **named(commit),
            **all_flags,
        }
        build_dir = configure(tools, source, work / "build", definitions)
        build_type = all_flags["CMAKE_BUILD_TYPE"]
        run_step([*tools.build(build_dir, build_type), "--parallel", str(jobs or default_jobs())], work)

        prefix = work / "prefix"
        shutil.rmtree(prefix, ignore_errors=True)
        run_step([tools.cmake, "--install", str(build_dir), "--config", build_type], work)
        shutil.rmtree(prefix / "include", ignore_errors=True)  # some backends' headers are missing in it
        for unused in ("cmake", "pkgconfig"):
            shutil.rmtree(prefix / "lib" / unused, ignore_errors=True)
        collect_headers(source, prefix)
        info = {
            "key": key,
            "commit": commit,
            "source": key_of_source,
            "flags": hashed,
            "compilers": identities,
        }
        (prefix / "build-info.json").write_text(
            json.dumps(info, indent=4, sort_keys=True) + "\n", encoding="utf-8"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(prefix, path)
        shutil.rmtree(work, ignore_errors=True)
    log(f"llama.cpp is built: {path}")
    return path
