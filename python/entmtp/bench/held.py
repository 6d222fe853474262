"""What a process holds in memory of a model, told by that process: `python -m entmtp.bench.held MODEL HOW KERNELS`.

It prints what it holds as a JSON object once the model is loaded, has computed and has given its context back; then,
for every line that it reads, what it holds by then.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp

from ..common.machine import held_memory
from ..llama import Llama

# how weights are held, as arguments of `Llama`
WAYS: dict[str, dict[str, Any]] = {
    "mapped": {"use_mmap": True},
    "read": {"use_mmap": False},
    "locked": {"use_mlock": True},
    "none": {"vocab_only": True},  # the vocabulary alone, to compare with
}
N_TOKENS = 48  # evaluated, so that all is touched that passes touch


def peak() -> int:
    """Most bytes that this process had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def held() -> dict[str, int]:
    """Bytes of this process in memory, without what the C library keeps for later."""
    with contextlib.suppress(OSError, AttributeError):  # glibc
        ctypes.CDLL(None).malloc_trim(0)
    found = held_memory()
    return {k: found[k] for k in ("Rss", "Pss", "Anonymous", "Locked", "AnonHugePages")}


class Watched(Llama):
    """A model that tells what the process held at most by the end of its loading."""

    peak = 0

    def prepare_model(self, params: Any) -> None:
        super().prepare_model(params)

        @llama_cpp.llama_progress_callback
        def loaded(share: float, _: Any) -> bool:
            self.peak = peak()
            return True

        self._loaded = loaded  # as long as llama.cpp may call it
        params.progress_callback = loaded


def main(argv: list[str]) -> int:
    path, how, kernels = argv
    start = time.perf_counter()
    # a small context: what it takes is given back, but not the peak of a process that loads
    llm = Watched(path, n_ctx=64, n_batch=64, n_threads=1, verbose=False, kernels=kernels, **WAYS[how])
    seconds = time.perf_counter() - start
    if how != "none":
        for i in range(N_TOKENS):
            llm.eval([7 + i * 31 % 251])
        llm.decoder.close()
        llm.free_context()
    print(json.dumps({"seconds": seconds, "peak": llm.peak} | held()), flush=True)
    for _ in sys.stdin:
        print(json.dumps(held()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
