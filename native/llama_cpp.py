#!/usr/bin/env python3
"""Fetch, patch, build and cache llama.cpp.

    python native/llama_cpp.py sdist                      path of the verified source distribution
    python native/llama_cpp.py source                     path of the patched source tree
    python native/llama_cpp.py build [-DGGML_CUDA=ON ..]  path of the built libraries and headers

The source is the copy inside the llama-cpp-python source distribution, pinned by version and SHA-256 in
llama.cpp.pin.json, or a directory of the user's (--llama-dir). Only the path goes to stdout; progress goes to
stderr. CMakeLists.txt calls `build`; nothing outside the standard library is needed, as this runs before any
package is installed.

Layout of the cache (--cache, $ENTMTP_CACHE or the user's cache directory):

    sdist/           downloaded archives
    source/<key>/    patched source trees; key: pin (or content of the user's directory) + patches
    work/<key>/      builds under way; kept when a build is interrupted, so that the next one continues it
    build/<key>/     lib/ include/ src/ build-info.json; key: source + flags + compiler + machine

source/<key> and build/<key> appear by a rename, so a directory that exists is complete.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

NATIVE_DIR = Path(__file__).resolve().parent
PIN_FILE = NATIVE_DIR / "llama.cpp.pin.json"
PATCH_DIR = NATIVE_DIR / "patches"

# Part of every key: raise it when the recipe below changes what it produces.
RECIPE = 1

# Directories of llama.cpp that no build needs, about 110 MB of test vocabularies and pictures.
UNUSED_DIRS = {"models", "docs", "media"}

# Directories in a user's checkout that are not source.
NOT_SOURCE = re.compile(r"^(\.git|\.venv|\.cache|build.*|models|__pycache__)$")

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


class BuildError(Exception):
    """A failure whose message tells the user what to do; shown without a traceback."""


def log(message: str) -> None:
    print(f"entmtp: {message}", file=sys.stderr, flush=True)


def load_pin(path: Path = PIN_FILE) -> dict[str, str]:
    pin: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
    return pin


def list_patches(patch_dir: Path = PATCH_DIR) -> list[Path]:
    return sorted(patch_dir.glob("*.patch"))


def default_cache() -> Path:
    if os.environ.get("ENTMTP_CACHE"):
        return Path(os.environ["ENTMTP_CACHE"]).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "entmtp"
    if sys.platform == "win32" and os.environ.get("LOCALAPPDATA"):
        return Path(os.environ["LOCALAPPDATA"]) / "entmtp" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "entmtp"


# -- hashing --


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def make_key(parts: object) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]


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


def patches_id(patches: Sequence[Path]) -> list[list[str]]:
    return [[p.name, sha256_file(p)] for p in patches]


def source_key(origin: str, patches: Sequence[Path]) -> str:
    """Key of a patched tree. origin: SHA-256 of the archive, or the content hash of the user's directory."""
    return make_key(["source", RECIPE, origin, patches_id(patches)])


# -- locking --


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Exclusive lock between processes. The system drops it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        if sys.platform == "win32":
            import msvcrt
            import time

            while True:
                try:
                    file.seek(0)
                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                    break
                except OSError:
                    time.sleep(0.5)
            try:
                yield
            finally:
                file.seek(0)
                msvcrt.locking(file.fileno(), msvcrt.LK_UNLCK, 1)
        else:
            import fcntl

            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another build ({path})")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield  # closing the file unlocks it


# -- source --


def verify_sdist(path: Path, sha256: str) -> None:
    """Raise BuildError and remove the file unless its SHA-256 is the pinned one."""
    found = sha256_file(path)
    if found != sha256:
        path.unlink()
        raise BuildError(
            f"{path.name}: SHA-256 is {found}, but {sha256} is pinned in {PIN_FILE.name}. The file was removed; "
            "run again to fetch it anew. If this repeats, the package index serves a different file."
        )


def fetch_sdist(cache: Path, pin: dict[str, str]) -> Path:
    """The verified source distribution; downloaded with pip unless it is in the cache."""
    path = cache / "sdist" / pin["sdist"]
    with file_lock(cache / "sdist" / ".lock"):
        if path.exists():
            verify_sdist(path, pin["sha256"])
            return path
        requirement = f"{pin['package']}=={pin['version']}"
        log(f"downloading the source of {requirement} (76 MB)")
        with tempfile.TemporaryDirectory(dir=path.parent) as tmp:
            # --no-binary names the one package: with :all: pip would compile its build tools from source, too.
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
            pip += ["--no-binary", pin["package"], "--dest", tmp, requirement]
            # pip asks the package for its metadata; options meant for our own build must not reach that.
            env = {k: v for k, v in os.environ.items() if k not in ("CMAKE_ARGS", "CMAKE_GENERATOR")}
            env = {k: v for k, v in env.items() if not k.startswith("SKBUILD_")}
            result = subprocess.run(pip, env=env, stdin=subprocess.DEVNULL, stdout=sys.stderr)
            downloaded = Path(tmp) / pin["sdist"]
            if result.returncode != 0 or not downloaded.exists():
                raise BuildError(
                    f"could not download {requirement}. Without a network, put {pin['sdist']} into {path.parent} "
                    "or build from your own llama.cpp with -DENTMTP_LLAMA_CPP_DIR=<path>."
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


def _run_patch(tree: Path, patch: Path, reverse: bool, dry_run: bool) -> tuple[bool, str]:
    if git := shutil.which("git"):
        command = [git, "apply", "--whitespace=nowarn", "-p1"]
        command += ["--reverse"] if reverse else []
        command += ["--check"] if dry_run else []
    elif tool := shutil.which("patch"):
        command = [tool, "-p1", "--force", "--no-backup-if-mismatch", "--fuzz=0", "--reject-file=-"]
        command += ["--reverse"] if reverse else ["--forward"]
        command += ["--dry-run"] if dry_run else []
        command += ["-i"]
    else:
        raise BuildError("neither git nor patch is installed; one of them is needed to patch llama.cpp")
    # Inside some other repository, git apply would silently skip what that repository does not hold.
    env = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    env["GIT_CEILING_DIRECTORIES"] = str(tree.resolve().parent)
    result = subprocess.run(
        [*command, str(patch.resolve())],
        cwd=tree,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    return result.returncode == 0, (result.stderr or result.stdout).strip()


def unapply_patches(tree: Path, patches: Sequence[Path]) -> list[Path]:
    """Take back the patches that the tree already holds, last first; returns them in their own order.

    Only the newest patch of a series is sure to reverse cleanly, as later ones may touch the same lines.
    """
    taken = []
    for patch in reversed(patches):
        if _run_patch(tree, patch, reverse=True, dry_run=True)[0]:
            _run_patch(tree, patch, reverse=True, dry_run=False)
            taken.append(patch)
    return taken[::-1]


def apply_patches(tree: Path, patches: Sequence[Path]) -> None:
    """Apply the patches in name order; a patch that does not apply raises BuildError with its path."""
    for patch in patches:
        # the check first, so that a patch is applied wholly or not at all
        ok, message = _run_patch(tree, patch, reverse=False, dry_run=True)
        if ok:
            ok, message = _run_patch(tree, patch, reverse=False, dry_run=False)
        if not ok:
            raise BuildError(f"patch does not apply to this llama.cpp: {patch}\n{message}")


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
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{key}.") as tmp:
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


# -- build --


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
    # ggml's own default: native, unless the build shall be reproducible
    default = "OFF" if "SOURCE_DATE_EPOCH" in os.environ else "ON"
    return flags.get("GGML_NATIVE", default).upper() not in ("OFF", "0", "NO", "FALSE", "N", "")


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
    # inherited stderr: a build of minutes must be seen to move
    if subprocess.run(command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=sys.stderr).returncode != 0:
        raise BuildError(
            f"building llama.cpp failed in {cwd}; the cause is above. Command: {shlex.join(command)}"
        )


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

    cmake = cmake or find_tool("cmake")
    if not cmake:
        raise BuildError("cmake was not found; install it with: pip install cmake ninja")
    if not generator and (ninja := find_tool("ninja")):
        generator, make_program = "Ninja", make_program or ninja

    with file_lock(cache / "work" / f".{key}.lock"):
        if path.is_dir():
            return path
        work = cache / "work" / key
        work.mkdir(parents=True, exist_ok=True)
        log(f"building llama.cpp {commit} (once for these options; minutes) in {work}")
        # CMake refuses to change the generator of a directory that an interrupted build left
        build_dir = work / f"build-{generator or 'default'}".replace(" ", "-")
        configure = [cmake, "-S", str(source), "-B", str(build_dir)]
        configure += ["-G", generator] if generator else []
        configure += [f"-DCMAKE_MAKE_PROGRAM={make_program}"] if generator == "Ninja" and make_program else []
        # the tree is no git checkout, and a repository around it must not lend its commit
        configure += [f"-DLLAMA_BUILD_COMMIT={commit}", "-DLLAMA_BUILD_NUMBER=0"]
        configure += [f"-DCMAKE_INSTALL_PREFIX={work / 'prefix'}"]
        configure += [f"-D{name}={value}" for name, value in sorted(all_flags.items())]
        run_step(configure, work)
        build_type = all_flags["CMAKE_BUILD_TYPE"]
        build = [cmake, "--build", str(build_dir), "--config", build_type]
        run_step([*build, "--parallel", str(jobs or default_jobs())], work)

        prefix = work / "prefix"
        shutil.rmtree(prefix, ignore_errors=True)
        run_step([cmake, "--install", str(build_dir), "--config", build_type], work)
        shutil.rmtree(prefix / "include", ignore_errors=True)  # some backends' headers are missing in it
        for unused in ("cmake", "pkgconfig"):
            shutil.rmtree(prefix / "lib" / unused, ignore_errors=True)
        collect_headers(source, prefix)
        info = {
            "key": key,
            "commit": commit,
            "source": key_of_source,
            "flags": all_flags,
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


# -- command line --


def parse_definitions(items: Sequence[str]) -> dict[str, str]:
    """["GGML_CUDA=ON", "GGML_X:BOOL=ON"] -> {"GGML_CUDA": "ON", "GGML_X": "ON"}"""
    flags = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise BuildError(f"-D{item}: expected -DNAME=VALUE")
        flags[name.partition(":")[0]] = value
    return flags


def setup_arg_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llama_cpp.py", description="Fetch, patch, build and cache llama.cpp."
    )
    parser.add_argument("command", choices=("sdist", "source", "build"))
    parser.add_argument("-D", dest="definitions", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--cache", type=Path, help="default: $ENTMTP_CACHE or the user's cache directory")
    parser.add_argument("--llama-dir", type=Path, help="build from this llama.cpp directory (it is copied)")
    parser.add_argument("--patches", type=Path, default=PATCH_DIR)
    parser.add_argument("--cmake", help="path of cmake")
    parser.add_argument("--generator", help="CMake generator; default: Ninja if found")
    parser.add_argument("--make-program", help="path of ninja")
    parser.add_argument("--jobs", type=int, help="parallel compile jobs")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = setup_arg_parser().parse_args(argv)
    try:
        flags = parse_definitions(args.definitions)
        cache = (args.cache or default_cache()).expanduser().resolve()
        pin = load_pin()
        if args.command == "sdist":
            print(fetch_sdist(cache, pin))
            return 0
        llama_dir = args.llama_dir.expanduser().resolve() if args.llama_dir else None
        source, key = prepare_source(cache, pin, list_patches(args.patches), llama_dir)
        if args.command == "source":
            print(source)
            return 0
        commit = "custom" if llama_dir else pin["commit"]
        print(
            build_libraries(
                cache, source, key, flags, commit, args.cmake, args.generator, args.make_program, args.jobs
            )
        )
        return 0
    except (BuildError, OSError) as error:  # OSError: disk full, no permission
        print(f"entmtp: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
