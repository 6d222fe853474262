"""`entmtp COMMAND`, `entmtp --version` and `entmtp doctor`, run as programs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

import entmtp
from entmtp.cli import COMMANDS
from helpers.typed import write_typed

ROOT = Path(__file__).parents[2]


def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "entmtp", *args],
        capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
        env={**os.environ, **env},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    return done


def test_help_lists_every_command_with_an_example() -> None:
    done = run("--help")
    assert done.returncode == 0
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout and f"  entmtp {name}" in done.stdout
    assert run().returncode == 2 and run().stderr == done.stdout


def test_help_is_lazy() -> None:
    program = "import sys, entmtp.__main__ as m; m.main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    loaded = set(done.stderr.split())
    assert not loaded & {"numpy", "rich", "llama_cpp", "gguf", "huggingface_hub", "entmtp.llama"}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help(name: str) -> None:
    done = run(name, "--help")
    assert done.returncode == 0
    assert re.search(rf"entmtp(\.{COMMANDS[name].module}| {name})\b", done.stdout)


def test_the_installed_script() -> None:
    script = shutil.which("entmtp", path=str(Path(sys.executable).parent))
    assert script, "pyproject.toml's console script was not installed; run make install"
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == run("--version").stdout


def test_version() -> None:
    lines = run("--version").stdout.splitlines()
    assert lines[0] == f"entmtp {entmtp.__version__}"
    pin = json.loads((ROOT / "native/llama.cpp.pin.json").read_text())
    assert lines[1] in (f"llama.cpp {pin['commit']}", "llama.cpp unknown")
    assert any(line.startswith("backend CPU: CPU") for line in lines)
    assert lines[-1].startswith("CPU kernels: ")
    assert "CPU kernels: off" in run("--version", ENTMTP_KERNELS="off").stdout


def test_usage_errors() -> None:
    done = run("chta")
    assert done.returncode == 2 and done.stderr == "entmtp: there is no command 'chta'; did you mean chat?\n"
    assert "there are chat" in run("zzz").stderr


def test_missing_libraries(tmp_path: Path) -> None:
    done = run("demo", ENTMTP_LIB_PATH=str(tmp_path))
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "make build" in done.stderr
    assert "make build" in run("--version", ENTMTP_LIB_PATH=str(tmp_path)).stdout


def test_every_folder_of_tests_is_run(request: pytest.FixtureRequest) -> None:
    """pytest leaves out folders by their names."""
    folders = {path.parent for path in (ROOT / "tests").rglob("test_*.py")}
    names = {name for folder in folders for name in folder.relative_to(ROOT).parts}
    left_out = request.config.getini("norecursedirs")
    assert names > {"tests", "build"}
    assert not [name for name in names if any(fnmatch(name, pattern) for pattern in left_out)]


#
# doctor
#


def doctor(*args: str, gain: bool = False, **env: str) -> tuple[int, dict[str, dict[str, Any]]]:
    done = run("doctor", "--json", "--gain" if gain else "--no-gain", *args, **env)
    report = json.loads(done.stdout)
    return done.returncode, {check["what"]: check for check in report["checks"]}


def test_doctor_on_a_sound_installation() -> None:
    code, checks = doctor()
    assert {c["what"] for c in checks.values() if c["status"] == "broken"} == set()
    assert code == 0
    assert checks["self-test"]["found"].startswith("the demo's 48 tokens are plain decoding's")
    assert "each once" in checks["one llama.cpp"]["found"] or sys.platform != "linux"
    assert "llama-cpp-python 0.3.36" in checks["packages"]["found"]


def test_doctor_plain_and_coloured() -> None:
    done = run("doctor")
    assert done.returncode == 0 and "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert all(line.split()[0] in ("ok", "note") for line in lines[:-1])
    assert lines[-1] == "nothing is broken"

    pty = pytest.importorskip("pty", reason="Windows has no pseudo-terminals")
    parent, child = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "entmtp", "doctor"], stdout=child, stdin=child, stderr=child, close_fds=True,
        env={k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"},
    ) as process:  # fmt: skip
        os.close(child)
        shown = b""
        while True:
            try:
                data = os.read(parent, 4096)
            except OSError:
                break
            if not data:
                break
            shown += data
    os.close(parent)
    assert process.returncode == 0 and "✓".encode() in shown and b"\x1b[" in shown


def test_doctor_with_a_model(models: dict[str, Path], tmp_path: Path) -> None:
    model, heads = str(models["f32"]), str(models["hydra"])
    code, checks = doctor("--model", model, "--heads", heads, ENTMTP_CACHE=str(tmp_path))
    assert code == 0
    assert "4 hydra heads" in checks["heads"]["found"]
    assert "loads with a context of 1024" in checks["model"]["found"]
    assert checks["tuned trees"]["status"] == "note" and "entmtp tune" in checks["tuned trees"]["mend"]
    assert checks["weights"]["status"] == "ok" and checks["weights"]["found"].endswith(" MB) in panels")


def test_doctor_measures_what_drafts_bring(models: dict[str, Path], tmp_path: Path) -> None:
    model, heads = str(models["q8_0"]), str(models["hydra"])
    code, checks = doctor("--model", model, "--heads", heads, gain=True, ENTMTP_CACHE=str(tmp_path))
    assert code == 0 and checks["gain"]["status"] == "ok"
    found = re.fullmatch(
        r"plain decoding (\d+) tokens/s, drafts times that: text ([\d.]+), heads ([\d.]+), together ([\d.]+); the "
        r"heads' guesses are taken to depth 1, 2, … in ([\d%, ]+) of their steps: (.+)",
        checks["gain"]["found"],
    )
    assert found is not None, checks["gain"]["found"]
    shares = [int(x.rstrip("%")) for x in found[5].split(", ")]
    assert 20 < shares[0] <= 100 and shares == sorted(shares, reverse=True) and len(shares) <= 4
    assert "gain" not in doctor("--model", model, "--draft", "off", gain=True)[1]


@pytest.mark.parametrize(
    ("speeds", "expected"),
    [
        ({"plain": 100, "text": 101}, "nothing pays here: plain decoding is as fast"),
        ({"plain": 100, "text": 130}, "drafts from the text pay here"),
        ({"plain": 100, "text": 120, "heads": 130, "together": 150},
         "drafts from the text and heads pay here, all together most"),
        ({"plain": 100, "text": 99, "heads": 130, "together": 131}, "heads pay here, all together most"),
        ({"plain": 100, "text": 102, "heads": 101, "together": 104}, "only all together pay here"),
        ({"plain": 100, "text": 140, "heads": 90, "together": 120},
         "drafts from the text alone: faster here than all together (--drafters text,recycling)"),
        ({"plain": 100, "text": 90, "heads": 80, "together": 99}, "nothing pays here: plain decoding is as fast"),
    ],
)  # fmt: skip
def test_what_pays_in_a_sentence(speeds: dict[str, float], expected: str) -> None:
    from entmtp.doctor.gain import sentence

    assert sentence(speeds) == expected


def test_doctor_tells_how_weights_are_computed(tmp_path: Path) -> None:
    """Each way in turn, on files of that type; a split file is counted whole."""
    slow = str(write_typed(tmp_path / "slow.gguf", "IQ3_S"))
    _, checks = doctor("--model", slow)
    assert checks["weights"]["status"] == "note" and "IQ3_S" in checks["weights"]["found"]
    assert "row by row" in checks["weights"]["found"] and "Q4_K" in checks["weights"]["mend"]
    _, checks = doctor("--model", slow, "--kernels", "off")
    assert "IQ3_S (2 MB) by ggml" in checks["weights"]["found"] and "by row" not in checks["weights"]["found"]
    assert "ggml computes 100% of them" in checks["weights"]["mend"]
    _, whole = doctor("--model", str(write_typed(tmp_path / "whole.gguf", "Q5_1")))
    _, split = doctor("--model", str(write_typed(tmp_path / "split.gguf", "Q5_1", per_file=20)))
    assert len(list(tmp_path.glob("split-*.gguf"))) > 1
    assert split["weights"] == whole["weights"] and "in panels" in whole["weights"]["found"]


def test_doctor_loads_with_the_options(models: dict[str, Path], tmp_path: Path) -> None:
    """What is said of how to run the model and how to draft holds where it is loaded, too."""
    named = ("-m", str(models["f32"]), "--heads", str(models["hydra"]))
    how = ("--ctx", "256", "--outputs", "rows", "--draft", "static", "--no-adapt", "--accept", "typical")
    code, checks = doctor(*named, *how, "--trees", "generic-hydra:n4", ENTMTP_CACHE=str(tmp_path))
    assert code == 0
    assert "loads with a context of 256" in checks["model"]["found"]
    assert "rows of logits stay where they are" in checks["logits"]["found"]
    code, checks = doctor(*named, *how, "--trees", "generic-hydra:n99", ENTMTP_CACHE=str(tmp_path))
    assert code == 1 and "has no tree n99" in checks["model"]["found"] + checks.get("heads", {}).get(
        "found", ""
    )


def test_doctor_finds_a_tuned_bank(models: dict[str, Path], tmp_path: Path) -> None:
    from entmtp.measure.known import machine_key

    llm = entmtp.Llama(
        models["f32"], draft="entmtp", heads=models["hydra"], verbose=False, calibrate=False, n_ctx=1024
    )
    bank = tmp_path / "banks" / f"{machine_key(llm)}.json"
    llm.close()
    bank.parent.mkdir()
    shutil.copy(ROOT / "trees/generic-hydra.json", bank)
    code, checks = doctor(
        "-m", str(models["f32"]), "--heads", str(models["hydra"]), ENTMTP_CACHE=str(tmp_path)
    )
    assert code == 0 and checks["tuned trees"]["status"] == "ok"


@pytest.mark.parametrize(
    ("args", "env", "what", "words"),
    [
        ([], {"ENTMTP_LIB_PATH": "EMPTY"}, "libraries", "make build"),
        ([], {"ENTMTP_KERNELS": "mmx"}, "libraries", "no kernels named mmx"),
        ([], {"ENTMTP_CACHE": "FILE"}, "cache", "set ENTMTP_CACHE"),
        (["-m", "no-such.gguf"], {}, "model", "there is no such model file"),
        (["-m", "FILE"], {}, "model", "not a GGUF file"),
        (["-m", "HEADS"], {}, "model", "this is a heads file"),
        (["-m", "BASE", "--heads", "BASE"], {}, "heads", "not draft heads"),
        (["-m", "OTHER", "--heads", "HEADS"], {}, "heads", "was made for"),
        (["-m", "BASE", "--draft", "entropy"], {}, "model", "needs draft heads"),
    ],
    ids=lambda x: "",
)
def test_doctor_says_what_is_broken(
    args: list[str], env: dict[str, str], what: str, words: str, models: dict[str, Path], tmp_path: Path
) -> None:
    from helpers.checkpoints import tiny_base

    (tmp_path / "file").write_text("no model")
    (tmp_path / "empty").mkdir()
    real = {
        "EMPTY": tmp_path / "empty", "FILE": tmp_path / "file", "BASE": models["q8_0"], "HEADS": models["hydra"],
        "OTHER": tiny_base(tmp_path / "other.gguf") if "OTHER" in args else "",
    }  # fmt: skip
    code, checks = doctor(
        *(str(real.get(a, a)) for a in args), **{k: str(real.get(v, v)) for k, v in env.items()}
    )
    assert code == 1
    assert checks[what]["status"] == "broken", checks
    assert words in checks[what]["found"] + checks[what]["mend"]


def test_doctor_survives_a_library_that_crashes(tmp_path: Path) -> None:
    """Libraries built for another processor end the process that loads them."""
    from entmtp.native import library

    if sys.platform != "linux":
        pytest.skip("builds a library as Linux wants it")
    for path in library.library_folder().iterdir():
        (tmp_path / path.name).symlink_to(path)
    source = tmp_path / "crash.c"
    source.write_text(
        "#include <signal.h>\n__attribute__((constructor)) static void f(void) { raise(SIGILL); }\n"
    )
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    target = tmp_path / "libentmtp.so"
    target.unlink()
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True, timeout=60)
    code, checks = doctor(ENTMTP_LIB_PATH=str(tmp_path))
    assert (
        code == 1 and "SIGILL" in checks["libraries"]["found"] and "NATIVE=0" in checks["libraries"]["mend"]
    )


def test_doctor_names_the_driver_that_is_missing(tmp_path: Path) -> None:
    """A build with CUDA on a machine without NVIDIA's driver."""
    from entmtp.native import library

    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("builds libraries as Linux wants them, with cc")
    for path in library.library_folder().iterdir():
        (tmp_path / path.name).symlink_to(path)
    driver, llama, source = tmp_path / "libcuda.so.1", tmp_path / "libllama.so", tmp_path / "empty.c"
    source.write_text("")
    llama.unlink()
    build = [compiler, "-shared", "-fPIC", str(source), "-o"]
    subprocess.run([*build, str(driver), "-Wl,-soname,libcuda.so.1"], check=True, timeout=60)
    subprocess.run([*build, str(llama), "-Wl,--no-as-needed", str(driver)], check=True, timeout=60)
    driver.unlink()
    code, checks = doctor(ENTMTP_LIB_PATH=str(tmp_path))
    found = checks["libraries"]["found"]
    assert code == 1 and "libcuda.so.1: cannot open" in found and "install NVIDIA's driver" in found


def test_doctor_sees_a_second_ggml(tmp_path: Path) -> None:
    """A copy of libggml-base that another package might bring."""
    from entmtp.native import library

    if sys.platform != "linux":
        pytest.skip("only Linux tells which libraries a process loaded")
    copy = tmp_path / "libggml-base.so"
    shutil.copy(library.library_folder() / copy.name, copy)
    code, checks = doctor(LD_PRELOAD=str(copy))
    assert code == 1 and checks["one llama.cpp"]["status"] == "broken"
    assert str(copy) in checks["one llama.cpp"]["found"]


def test_doctor_without_a_package(tmp_path: Path) -> None:
    """As if numpy had been removed."""
    (tmp_path / "numpy.py").write_text("raise ModuleNotFoundError(\"No module named 'numpy'\")\n")
    code, checks = doctor(PYTHONPATH=str(tmp_path))
    assert code == 1 and "numpy" in checks["libraries"]["found"]
