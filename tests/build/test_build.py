"""native/llama_*.py: fetching, patching and caching llama.cpp. No test here compiles or downloads anything."""

from __future__ import annotations

import hashlib
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import pytest

from entmtp.native import library
from native import (
    llama_baselines,
    llama_build,
    llama_cache,
    llama_cpp,
    llama_patches,
    llama_source,
)

ROOT = Path(__file__).resolve().parents[2]

SOURCE = {
    "CMakeLists.txt": "project(llama)\n",
    "LICENSE": "MIT\n",
    "src/llama.cpp": "one\ntwo\nthree\n",
    "include/llama.h": "int a;\n",
    "ggml/CMakeLists.txt": "project(ggml)\n",
}

GOOD_PATCH = """a reason

diff --git a/src/llama.cpp b/src/llama.cpp
--- a/src/llama.cpp
+++ b/src/llama.cpp
@@ -1,3 +1,4 @@
 one
 two
+two and a half
 three
"""

# touches the lines of GOOD_PATCH again, so GOOD_PATCH alone cannot be reversed once this is applied
SECOND_PATCH = """diff --git a/src/llama.cpp b/src/llama.cpp
--- a/src/llama.cpp
+++ b/src/llama.cpp
@@ -1,4 +1,5 @@
 one
 two
+two and a quarter
 two and a half
 three
"""

BROKEN_PATCH = GOOD_PATCH.replace(" one", " uno")


def write_tree(root: Path) -> Path:
    for name, text in SOURCE.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def write_patches(folder: Path, **texts: str) -> list[Path]:
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        (folder / f"{name}.patch").write_text(text)
    return llama_patches.list_patches(folder)


def read_tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def write_sdist(path: Path, extra: dict[str, str] | None = None) -> dict[str, str]:
    """A source distribution in miniature; returns its pin."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = {f"vendor/llama.cpp/{name}": text for name, text in SOURCE.items()}
    files.update(
        {"vendor/llama.cpp/.git": "gitdir: nowhere\n", "llama_cpp/llama.py": "x = 1\n"}, **extra or {}
    )
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(f"pkg-1.0/{name}")
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))
        link = tarfile.TarInfo("pkg-1.0/vendor/llama.cpp/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return {
        "package": "pkg",
        "version": "1.0",
        "sdist": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "source_dir": "vendor/llama.cpp",
        "commit": "abc",
    }


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def test_pin_and_patches_of_the_repository():
    pin = llama_source.load_pin()
    assert len(pin["sha256"]) == 64
    assert pin["sdist"] == f"{pin['package'].replace('-', '_')}-{pin['version']}.tar.gz"
    # the bindings a user gets must be those of the llama.cpp that is built
    assert f'"{pin["package"]}=={pin["version"]}"' in (ROOT / "pyproject.toml").read_text()
    assert llama_patches.list_patches(), "no patches found"


def test_versions_agree():
    assert 'version = "0.1.0"' in (ROOT / "pyproject.toml").read_text()
    assert "project(entmtp VERSION 0.1.0 " in (ROOT / "CMakeLists.txt").read_text()


def test_wrong_sha256_is_an_error_and_the_file_goes(cache):
    archive = cache / "sdist" / "pkg-1.0.tar.gz"
    pin = write_sdist(archive)
    archive.write_bytes(archive.read_bytes() + b"tampered")
    with pytest.raises(llama_cache.BuildError, match="SHA-256") as error:
        llama_source.prepare_source(cache, pin, [])
    assert pin["sha256"] in str(error.value)
    assert not archive.exists()


def test_failed_download_says_what_to_do(cache, monkeypatch):
    pin = write_sdist(cache / "elsewhere.tar.gz")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1))
    with pytest.raises(llama_cache.BuildError, match="ENTMTP_LLAMA_CPP_DIR"):
        llama_source.fetch_sdist(cache, pin)


def test_source_is_extracted_and_patched(cache, tmp_path):
    pin = write_sdist(cache / "sdist" / "pkg-1.0.tar.gz", {"vendor/llama.cpp/models/big.gguf": "x"})
    patches = write_patches(tmp_path / "p", **{"0001-a": GOOD_PATCH, "0002-b": SECOND_PATCH})
    tree, _ = llama_source.prepare_source(cache, pin, patches)
    assert set(read_tree(tree)) == set(SOURCE)  # no .git, no link, no models, nothing from beside llama.cpp
    assert (tree / "src/llama.cpp").read_text() == "one\ntwo\ntwo and a quarter\ntwo and a half\nthree\n"


def test_archive_with_a_path_outside_is_refused(cache):
    pin = write_sdist(cache / "sdist" / "pkg-1.0.tar.gz", {"vendor/llama.cpp/../../../../evil": "x"})
    with pytest.raises(llama_cache.BuildError, match="unsafe path"):
        llama_source.prepare_source(cache, pin, [])
    assert not list(cache.rglob("evil"))


@pytest.mark.parametrize("tool", ["git", "patch"])
def test_broken_patch_stops_and_names_the_file(cache, tmp_path, monkeypatch, tool):
    if not shutil.which(tool):
        pytest.skip(f"{tool} is not installed")
    if tool == "patch":
        which = shutil.which
        monkeypatch.setattr(
            llama_patches.shutil, "which", lambda name: None if name == "git" else which(name)
        )
    pin = write_sdist(cache / "sdist" / "pkg-1.0.tar.gz")
    patches = write_patches(tmp_path / "p", **{"0001-good": GOOD_PATCH})
    tree, _ = llama_source.prepare_source(cache, pin, patches)
    assert "two and a half" in (tree / "src/llama.cpp").read_text()

    patches = write_patches(tmp_path / "p", **{"0002-broken": BROKEN_PATCH})
    with pytest.raises(llama_cache.BuildError, match=r"0002-broken\.patch"):
        llama_source.prepare_source(cache, pin, patches)
    # no half-patched tree is left behind
    assert [p.name for p in (cache / "source").iterdir() if p.is_dir()] == [tree.name]


def test_command_line_names_the_broken_patch(cache, tmp_path):
    write_patches(tmp_path / "p", **{"0001-broken": BROKEN_PATCH})
    user = write_tree(tmp_path / "user")
    command = [sys.executable, str(ROOT / "native" / "llama_cpp.py"), "source", "--cache", str(cache)]
    result = subprocess.run(
        [*command, "--llama-dir", str(user), "--patches", str(tmp_path / "p")], capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "0001-broken.patch" in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_patches_apply_inside_another_repository(tmp_path):
    """git apply skips files silently when it believes itself in a repository that lacks them."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    pin = write_sdist(tmp_path / "cache" / "sdist" / "pkg-1.0.tar.gz")
    patches = write_patches(tmp_path / "p", **{"0001-good": GOOD_PATCH})
    tree, _ = llama_source.prepare_source(tmp_path / "cache", pin, patches)
    assert "two and a half" in (tree / "src/llama.cpp").read_text()


def test_user_directory_is_not_touched(cache, tmp_path):
    user = write_tree(tmp_path / "user")
    (user / "build").mkdir()
    (user / "build" / "junk.o").write_text("junk")
    before = read_tree(user)
    patches = write_patches(tmp_path / "p", **{"0001-good": GOOD_PATCH})
    tree, _ = llama_source.prepare_source(cache, {}, patches, user)
    assert read_tree(user) == before
    assert "two and a half" in (tree / "src/llama.cpp").read_text()
    assert not (tree / "build").exists()

    # the same content is found again, other content is not
    assert llama_source.prepare_source(cache, {}, patches, user)[0] == tree
    (user / "include/llama.h").write_text("int b;\n")
    assert llama_source.prepare_source(cache, {}, patches, user)[0] != tree


@pytest.mark.parametrize("n_applied", [1, 2])
def test_user_directory_that_is_patched_already(cache, tmp_path, capsys, n_applied):
    user = write_tree(tmp_path / "user")
    patches = write_patches(tmp_path / "p", **{"0001-a": GOOD_PATCH, "0002-b": SECOND_PATCH})
    llama_patches.apply_patches(user, patches[:n_applied])
    before = read_tree(user)
    tree, _ = llama_source.prepare_source(cache, {}, patches, user)
    assert (tree / "src/llama.cpp").read_text() == "one\ntwo\ntwo and a quarter\ntwo and a half\nthree\n"
    assert read_tree(user) == before
    message = capsys.readouterr().err
    assert "already applied" in message
    assert "0001-a.patch" in message


def test_user_directory_must_hold_llama_cpp(cache, tmp_path):
    with pytest.raises(llama_cache.BuildError, match="not a llama"):
        llama_source.prepare_source(cache, {}, [], tmp_path)


def test_key_changes_with_all_that_matters(tmp_path, monkeypatch):
    for name in llama_build.ENV_FLAGS:
        monkeypatch.delenv(name, raising=False)
    patches = write_patches(tmp_path / "p", **{"0001-a": GOOD_PATCH})
    source = llama_source.source_key("pin", patches)
    key = llama_build.build_key(source, {"GGML_CUDA": "ON", "GGML_RPC": "ON"}, ["gcc 12"])

    assert key == llama_build.build_key(source, {"GGML_RPC": "ON", "GGML_CUDA": "ON"}, ["gcc 12"])
    assert key != llama_build.build_key(source, {"GGML_CUDA": "OFF", "GGML_RPC": "ON"}, ["gcc 12"])
    assert key != llama_build.build_key(source, {"GGML_CUDA": "ON", "GGML_RPC": "ON"}, ["gcc 13"])
    monkeypatch.setenv("CXXFLAGS", "-O1")
    assert key != llama_build.build_key(source, {"GGML_CUDA": "ON", "GGML_RPC": "ON"}, ["gcc 12"])

    assert source != llama_source.source_key("other pin", patches)
    write_patches(tmp_path / "p", **{"0001-a": GOOD_PATCH.replace("half", "third")})
    assert source != llama_source.source_key("pin", patches)
    assert source != llama_source.source_key("pin", [])


def test_native_code_is_not_shared_between_cpus(monkeypatch):
    """A cache in a shared home directory must not hand AVX-512 code to a CPU without it."""
    flags = {"native": {}, "portable": {"GGML_NATIVE": "OFF"}}
    first = {name: llama_build.build_key("s", f, []) for name, f in flags.items()}
    monkeypatch.setattr(llama_build, "cpu_identity", lambda: "another CPU")
    second = {name: llama_build.build_key("s", f, []) for name, f in flags.items()}
    assert first["native"] != second["native"]
    assert first["portable"] == second["portable"]


def test_time_changes_no_code(tmp_path, monkeypatch):
    """ggml leaves AVX2 out where SOURCE_DATE_EPOCH is set, which no key tells: its build must not see it."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1")
    script = "import os, sys; sys.exit('SOURCE_DATE_EPOCH' in os.environ)"
    llama_build.run_step([sys.executable, "-c", script], tmp_path)


def test_definitions():
    parsed = llama_cpp.parse_definitions(
        ["GGML_CUDA=ON", "GGML_X:BOOL=OFF", "CMAKE_CUDA_ARCHITECTURES=89;90"]
    )
    assert parsed == {"GGML_CUDA": "ON", "GGML_X": "OFF", "CMAKE_CUDA_ARCHITECTURES": "89;90"}
    with pytest.raises(llama_cache.BuildError, match="expected -DNAME=VALUE"):
        llama_cpp.parse_definitions(["GGML_CUDA"])


def _hold_lock(path: Path, log: Path) -> None:
    with llama_cache.file_lock(path):
        with log.open("a") as file:
            file.write("in\n")
        time.sleep(0.2)
        with log.open("a") as file:
            file.write("out\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
def test_builds_exclude_each_other(tmp_path):
    context = multiprocessing.get_context("fork")
    jobs = [context.Process(target=_hold_lock, args=(tmp_path / "lock", tmp_path / "log")) for _ in range(3)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert (tmp_path / "log").read_text().split() == ["in", "out"] * 3


@pytest.mark.parametrize("fail_at", ["-S", "--build", "--install"])
def test_interrupted_build_leaves_no_entry(cache, tmp_path, monkeypatch, fail_at):
    """Only the last step, a rename, makes a cache entry."""
    source = write_tree(tmp_path / "tree")
    done: list[str] = []

    def run_step(command, cwd):
        done.append(command[1])
        if command[1] == fail_at and done.count(fail_at) == 1:
            raise KeyboardInterrupt
        if command[1] == "--install":
            (cwd / "prefix" / "lib").mkdir(parents=True)

    monkeypatch.setattr(llama_build, "run_step", run_step)
    with pytest.raises(KeyboardInterrupt):
        llama_build.build_libraries(cache, source, "key", {}, "abc", cmake="cmake")
    assert not (cache / "build").exists()

    path = llama_build.build_libraries(cache, source, "key", {}, "abc", cmake="cmake")
    assert (path / "build-info.json").exists()
    assert (path / "include" / "llama.h").exists()
    n_steps = len(done)
    assert llama_build.build_libraries(cache, source, "key", {}, "abc", cmake="cmake") == path
    assert len(done) == n_steps  # from the cache


def test_baselines_are_of_the_libraries_that_are_compared(cache, tmp_path, monkeypatch):
    """The server without our patches, with the options of the libraries; the driver again when its source changes."""
    tree = write_tree(tmp_path / "llama.cpp")
    patches = write_patches(tmp_path / "patches", one=GOOD_PATCH)
    patched, key = llama_source.prepare_source(cache, {}, patches, tree)
    flags = {**llama_build.DEFAULT_FLAGS, "GGML_NATIVE": "OFF", "CMAKE_CXX_FLAGS": "-O2"}
    libraries = tmp_path / "lib"
    libraries.mkdir()
    info = {"key": "k", "source": "another", "flags": flags, "commit": "custom"}
    (libraries / "build-info.json").write_text(json.dumps(info))
    tools = llama_build.Tools("cmake", "Ninja", None)
    driver = tmp_path / "driver"
    driver.mkdir()
    (driver / "driver.cpp").write_text("int main() {}")
    monkeypatch.setattr(llama_baselines, "DRIVER_SOURCE", driver)
    monkeypatch.setattr(llama_baselines, "BUILD", tmp_path / "build")
    configured = []

    def configure(tools, source, build_dir, definitions):
        configured.append((source, definitions))
        build_dir.mkdir(parents=True, exist_ok=True)
        return build_dir

    def run_step(command, cwd):
        (cwd / command[command.index("--target") + 1]).write_text(str(len(configured)))

    monkeypatch.setattr(llama_baselines, "configure", configure)
    monkeypatch.setattr(llama_baselines, "run_step", run_step)

    def build():
        return llama_baselines.build_baselines(cache, {}, patches, libraries, tree, tools)

    with pytest.raises(llama_cache.BuildError, match="run make install first"):
        build()
    (libraries / "build-info.json").write_text(json.dumps(info | {"source": key}))
    (cache / "build" / "k").mkdir(parents=True)
    folder = build()
    assert folder == cache / "baselines" / "k"
    (plain, server), (own, of_driver) = configured
    assert "two and a half" not in (plain / "src" / "llama.cpp").read_text()
    assert server["GGML_NATIVE"] == "OFF" and server["LLAMA_BUILD_SERVER"] == "ON"
    assert {server[name] for name in ("LLAMA_BUILD_UI", "LLAMA_USE_PREBUILT_UI", "LLAMA_OPENSSL")} == {"OFF"}
    assert (
        own == driver and of_driver["LLAMA_SOURCE"] == str(patched) and of_driver["CMAKE_CXX_FLAGS"] == "-O2"
    )
    assert of_driver["LLAMA_PREFIX"] == str(cache / "build" / "k")

    assert build() == folder and len(configured) == 2  # from the cache
    (driver / "driver.cpp").write_text("int main() { return 1; }")
    build()
    assert [source for source, _ in configured[2:]] == [driver]
    assert (folder / "entmtp-speculative").read_text() == "3" and (folder / "llama-server").read_text() == "1"
    # libraries with other patches: their driver is another, the server has none
    (libraries / "build-info.json").write_text(json.dumps(info | {"source": key, "key": "l"}))
    (cache / "build" / "l").mkdir()
    assert (build() / "llama-server").read_text() == "1" and [s for s, _ in configured[3:]] == [driver]


def test_cache_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("ENTMTP_CACHE", str(tmp_path))
    assert llama_cache.default_cache() == tmp_path
    monkeypatch.delenv("ENTMTP_CACHE")
    assert llama_cache.default_cache().is_absolute()


def bump(*args: str, cache: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "native" / "llama_cpp.py"), "bump", "--cache", str(cache), *args]
    return subprocess.run(command, capture_output=True, text=True)


needs_patch = pytest.mark.skipif(not shutil.which("patch"), reason="patch is not installed")


@needs_patch
def test_bump_to_the_pinned_version():
    pin, cache = llama_source.load_pin(), llama_cache.default_cache()
    if not (cache / "sdist" / pin["sdist"]).exists():
        pytest.skip("the source distribution is not in the cache")
    result = bump("--version", pin["version"], cache=cache)
    assert result.returncode == 0, result.stderr
    first, *table = result.stdout.splitlines()
    assert first == f"{pin['sdist']}  SHA-256 {pin['sha256']}"
    assert [line.split() for line in table] == [[p.name, "cleanly"] for p in llama_patches.list_patches()]


@needs_patch
def test_bump_names_what_does_not_apply(cache, tmp_path):
    """The patches of one version on another: untouched, with changed lines nearby, gone, and taken over by it."""
    pin = {**llama_source.load_pin(), "version": "9.9.9"}
    name = f"{pin['package'].replace('-', '_')}-9.9.9.tar.gz"
    ten = "".join(f"{i}\n" for i in range(10))
    files = {
        "src/moved.cpp": "new\n" + ten,
        "src/near.cpp": ten.replace("2", "two"),
        "src/taken.cpp": ten + "x\n",
    }
    write_sdist(cache / "sdist" / name, {f"vendor/llama.cpp/{k}": v for k, v in files.items()})

    def hunk(file: str, at: int) -> str:
        context = "".join(f" {i}\n" for i in range(at, at + 6))
        lines = context[: len(context) // 2] + "+x\n" + context[len(context) // 2 :]
        return f"--- a/{file}\n+++ b/{file}\n@@ -{at + 1},6 +{at + 1},7 @@\n{lines}"

    write_patches(
        tmp_path / "p",
        **{
            "0001-good": GOOD_PATCH,
            "0002-moved": hunk("src/moved.cpp", 2),
            "0003-near": hunk("src/near.cpp", 2),
            "0004-broken": hunk("src/llama.cpp", 2) + hunk("src/gone.cpp", 2),
            "0005-taken": "--- a/src/taken.cpp\n+++ b/src/taken.cpp\n@@ -8,3 +8,4 @@\n 7\n 8\n 9\n+x\n",
            "0006-second": SECOND_PATCH,  # on what 0001 made
        },
    )
    before = read_tree(cache)
    result = bump("--version", "9.9.9", "--patches", str(tmp_path / "p"), cache=cache)
    assert result.returncode == 1
    assert [line.split(maxsplit=1) for line in result.stdout.splitlines()[1:]] == [
        ["0001-good.patch", "cleanly"],
        ["0002-moved.patch", "cleanly"],
        ["0003-near.patch", "with fuzz: src/near.cpp hunk 1"],
        ["0004-broken.patch", "fails: src/llama.cpp hunk 1; src/gone.cpp is gone"],
        ["0005-taken.patch", "fails: src/taken.cpp has it already"],
        ["0006-second.patch", "cleanly"],
    ]
    assert {k: v for k, v in read_tree(cache).items() if k != "sdist/.lock"} == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/maps")
def test_one_llama_cpp_in_a_process():
    """Needs the built package. llama_cpp and libentmtp must share one libllama and one ggml."""
    pytest.importorskip("numpy")
    script = """
import sys
from entmtp.native import library
try:
    library.load()
except library.LibrariesMissing as error:
    print(error); sys.exit(77)
import llama_cpp
llama_cpp.llama_backend_init()
for line in open("/proc/self/maps"):
    print(line.split()[-1])
"""
    env = {k: v for k, v in os.environ.items() if k != "LLAMA_CPP_LIB_PATH"}
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env)
    if result.returncode == 77 or "No module named 'entmtp'" in result.stderr:
        pytest.skip("entmtp is not built")
    assert result.returncode == 0, result.stderr
    mapped = {Path(line) for line in result.stdout.splitlines() if ".so" in line}
    for name in ("libllama.", "libggml-base.", "libggml.", "libentmtp."):
        found = [p for p in mapped if p.name.startswith(name)]
        assert len(found) == 1, found
    ours = {p.parent for p in mapped if p.name.startswith(("libllama", "libggml", "libentmtp"))}
    assert len(ours) == 1, ours


@pytest.mark.skipif(sys.platform == "win32", reason="MSVC has no option for it that is not experimental")
@pytest.mark.parametrize("name", ["entmtp", "llama", "ggml-base", "ggml-cpu"])
def test_no_path_of_this_machine_in_the_libraries(name):
    """Or the same sources would give other bytes elsewhere (`make wheel-check` builds twice and compares all)."""
    path = library.library_path(name, library.library_folder())
    assert path
    held = path.read_bytes()
    assert b".cpp" in held  # assertions do name their source file
    for folder in (ROOT, llama_cache.default_cache(), Path.home(), Path(tempfile.gettempdir())):
        assert bytes(folder) + b"/" not in held, folder
