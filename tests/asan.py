"""`make test-asan-python`: the Python tests on a libentmtp with AddressSanitizer and UBSan, leaks included.

    python tests/asan.py build/asan-python/lib [arguments of pytest]

Every process that the tests start reports into a folder. A report fails the run where libentmtp or llama.cpp is among
the callers: Python's own memory, and that of programs like git, is theirs. Places are told as LIBRARY+OFFSET, which
`addr2line -Cfe LIBRARY OFFSET` makes a line of: to look them up for all of Python's takes minutes a process.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from entmtp.native.library import library_folder

# what holds memory for other reasons under AddressSanitizer, a test that preloads a library itself, one of what users
# get, and those that call curl, which waits for ever with it
UNFIT = (
    "tests/decode/test_held.py",
    "tests/policy/test_bench.py::test_memory_of_weights",
    "tests/convert/test_convert_resources.py::test_peak_memory_is_under_twice_the_largest_tensor",
    "tests/commands/test_command.py::test_doctor_sees_a_second_ggml",
    "tests/build/test_build.py::test_no_path_of_this_machine_in_the_libraries",
    "tests/build/test_docs.py::test_commands_run[serve.md",
)
# llama.cpp's devices of RPC servers, which stay as long as the process, with what they hold
KEPT = "leak:libggml-rpc"
# the last is how UBSan's reports begin, which is in libentmtp alone
OURS = re.compile(r"libentmtp|libllama|libggml|runtime error:")


def runtime(name: str) -> str:
    """A library of GCC's, which must be there before all others."""
    return subprocess.run(
        ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def reports(folder: Path) -> list[str]:
    """What the processes wrote, error by error and leak by leak."""
    texts = [path.read_text("utf-8", "replace") for path in sorted(folder.iterdir())]
    parts = [
        part for text in texts for part in re.split(r"(?m)^(?==+\d+==ERROR|(?:In)?[Dd]irect leak )", text)
    ]
    return [part for part in parts if part.strip()]


def main(built: str, *pytest: str) -> int:
    with tempfile.TemporaryDirectory(prefix="entmtp-asan-") as tmp:
        libraries, logs = Path(tmp) / "lib", Path(tmp) / "logs"
        shutil.copytree(library_folder(), libraries)
        logs.mkdir()
        kept = Path(tmp) / "kept.txt"
        kept.write_text(f"{KEPT}\n", "utf-8")
        for library in Path(built).glob("libentmtp.*"):
            shutil.copy2(library, libraries)
        options = f"log_path={logs}/report:allocator_may_return_null=1:handle_segv=0:symbolize=0"
        env = os.environ | {
            "ENTMTP_LIB_PATH": str(libraries),
            "LD_PRELOAD": " ".join(map(runtime, ("libasan.so", "libubsan.so", "libstdc++.so"))),
            "ASAN_OPTIONS": f"{options}:detect_leaks=1",
            "LSAN_OPTIONS": f"exitcode=0:suppressions={kept}:print_suppressions=0",
            "UBSAN_OPTIONS": f"log_path={logs}/report:print_stacktrace=1",
            "OMP_WAIT_POLICY": "passive",
        }
        command = [sys.executable, "-m", "pytest", "-q", *(f"--deselect={test}" for test in UNFIT), *pytest]
        status = subprocess.run(command, env=env).returncode
        found = reports(logs)
    ours = [report for report in found if OURS.search(report)]
    print(*ours, sep="\n")
    print(
        f"{len(ours)} reports with libentmtp or llama.cpp among the callers, {len(found) - len(ours)} others"
    )
    return status or bool(ours)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
