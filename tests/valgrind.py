"""`make test-valgrind`: load, generate, close, plainly and with heads, from Python, under valgrind.

Printed is what it reports with libentmtp or llama.cpp among the callers: bytes read before they were written, memory
used after it was freed or beyond its end, blocks that nobody can free any more. Python's and NumPy's own are counted.
Valgrind knows no AVX-512, so libraries must be built with `NATIVE=0`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from entmtp.models.assets import assets

OURS = "/entmtp/lib/"
OPTIONS = ("--leak-check=full", "--show-leak-kinds=all", "--error-limit=no", "--num-callers=40")
REACHABLE = "Leak_StillReachable"
PROGRAM = """
import sys
from entmtp import Llama

for draft in ({}, {"draft": "entmtp"}):
    llm = Llama(sys.argv[1], n_ctx=256, n_threads=1, n_threads_batch=1, verbose=False, **draft)
    print(repr(llm("def add(a, b):", max_tokens=12, temperature=0)["choices"][0]["text"]), flush=True)
    llm.close()
"""


def reports(xml: Path) -> Iterator[tuple[str, list[str], bool]]:
    """Kind, callers and whether one of them is ours, of everything that valgrind reports."""
    for error in ElementTree.parse(xml).getroot().iter("error"):
        frames = list(error.iter("frame"))
        calls = [f"{f.findtext('fn') or '?'} ({Path(f.findtext('obj') or '?').name})" for f in frames]
        yield error.findtext("kind") or "?", calls, any(OURS in (f.findtext("obj") or "") for f in frames)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="entmtp-valgrind-") as folder:
        xml = Path(folder) / "report.xml"
        tool = ["valgrind", *OPTIONS, "--xml=yes", f"--xml-file={xml}"]
        program = [sys.executable, "-c", PROGRAM, str(assets() / "demo-base-q8_0.gguf")]
        env = os.environ | {"PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
        status = subprocess.run([*tool, *program], env=env).returncode
        if status != 0:
            print(f"the program ended with status {status}; libraries must be built with NATIVE=0")
            return 1
        found = list(reports(xml))
    bad = [(kind, calls) for kind, calls, ours in found if ours and kind != REACHABLE]
    for kind, calls in bad:
        print(kind, *calls, sep="\n    ")
    others = sum(not ours for _, _, ours in found)
    kept = sum(ours for _, _, ours in found) - len(bad)
    print(f"{len(bad)} reports with libentmtp or llama.cpp among the callers")
    print(
        f"{kept} blocks of theirs live as long as the process; {others} reports of Python and its packages alone"
    )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
