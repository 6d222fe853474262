#!/usr/bin/env python3
"""Does a wheel work where it is installed alone, without a compiler?

    python tests/wheel/install.py dist/entmtp-0.1.0-py3-none-manylinux_2_34_x86_64.whl

Makes a virtual environment that sees no compiler and nothing of this repository, installs the wheel with pip, and runs
doctor, generate with every set of CPU kernels of this processor, and the demo there, on the bundled toy.
"""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COMPILERS = ("cc", "gcc", "c++", "g++", "clang", "clang++", "cl", "nvcc", "cmake", "ninja", "make")
OURS = ("ENTMTP_", "CMAKE", "SKBUILD_", "PYTHON", "LD_", "DYLD_", "GGML_", "LLAMA_", "VIRTUAL_ENV")
PROMPT = "Question: Tom has 3 boxes of 4 apples. How many apples has he?"


class Installed:
    """A virtual environment with the wheel."""

    def __init__(self, folder: Path, wheel: Path, emulator: list[str]) -> None:
        venv = folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
        self.bin = venv / ("Scripts" if os.name == "nt" else "bin")
        self.emulator = emulator
        self.cwd = folder / "empty"
        self.cwd.mkdir()
        system = [str(Path(os.environ["SYSTEMROOT"], "System32"))] if os.name == "nt" else []
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(OURS) and k not in ("CC", "CXX")}
        self.env |= {
            "PATH": os.pathsep.join([str(self.bin), *system]),
            "ENTMTP_CACHE": str(folder / "cache"),
            "ENTMTP_MODEL": "demo",
            "HF_HUB_OFFLINE": "1",
            "PYTHONUTF8": "1",
            "SKBUILD_WHEEL_CMAKE": "false",  # llama-cpp-python as Python code alone
        }
        if found := [c for c in COMPILERS if shutil.which(c, path=self.env["PATH"])]:
            raise SystemExit(f"the environment must see no compiler, but there is {', '.join(found)}")
        self.run("-m", "pip", "install", "--quiet", "--no-cache-dir", str(wheel.resolve()), emulated=False)

    def run(self, *arguments: str, emulated: bool = True, **env: str) -> str:
        """What Python prints; the end of this program if it fails."""
        command = [*(self.emulator if emulated else []), str(self.bin / "python"), *arguments]
        print("$", *(f"{k}={v}" for k, v in env.items()), shlex.join(["python", *arguments]), flush=True)
        done = subprocess.run(
            command, cwd=self.cwd, env=self.env | env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
            encoding="utf-8",
        )  # fmt: skip
        print(done.stdout, flush=True)
        if done.returncode:
            raise SystemExit(f"ended with status {done.returncode}")
        return done.stdout


def check(condition: bool, wrong: str) -> None:
    if not condition:
        raise SystemExit(wrong)


def main() -> None:
    parser = argparse.ArgumentParser(description="Install a wheel where there is no compiler, and use it.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--emulator", default="", help="run Python by this, e.g. 'qemu-x86_64 -cpu Haswell'")
    parser.add_argument("--skip-demo", action="store_true", help="doctor and generate only")
    args = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    emulator = args.emulator.split()
    if emulator:
        check(shutil.which(emulator[0]) is not None, f"{emulator[0]} was not found")
        emulator[0] = str(shutil.which(emulator[0]))
    with tempfile.TemporaryDirectory(prefix="entmtp-installed-") as folder:
        there = Installed(Path(folder).resolve(), args.wheel, emulator)
        path = there.run("-c", "from entmtp.native import library; print(library.library_folder())")
        check(Path(folder).resolve() in Path(path.strip()).parents, "the libraries are not the wheel's")
        known = there.run(
            "-c", "import entmtp, llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
        )
        if platform.machine() in ("x86_64", "AMD64"):
            check("AVX2 = 1" in known, "ggml was built for older processors than those with AVX2")
        there.run("-m", "entmtp", "doctor")  # whose own processes no emulator runs
        found = there.run("-c", "from entmtp import kernels; print(*kernels.available())").split()
        texts = {
            name: there.run("-m", "entmtp", "generate", PROMPT, "--tokens", "24", ENTMTP_KERNELS=name)
            for name in found
        }
        check(len({*texts.values()}) == 1 and all(t.strip() for t in texts.values()), f"other texts: {texts}")
        if not args.skip_demo:
            demo = there.run("-m", "entmtp.demo", "--tokens", "24")
            check("every text of ours is plain decoding's: yes" in demo, "the demo's texts are not the same")
    print(f"{args.wheel.name} works without a compiler, with kernels {', '.join(texts)}")


if __name__ == "__main__":
    main()
