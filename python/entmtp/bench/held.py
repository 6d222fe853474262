"""What a process holds in memory of a model, told by that process: `python -m entmtp.bench.held MODEL HOW KERNELS`.

It prints what it holds as a JSON object once the model is loaded, has computed and has given its context back (or, in
two of the ways, has written some answers and keeps it); then, for every line that it reads, what it holds by then.
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
from ..models.assets import assets

# how weights are held, as arguments of `Llama`
WAYS: dict[str, dict[str, Any]] = {
    "mapped": {"use_mmap": True},
    "read": {"use_mmap": False},
    "locked": {"use_mlock": True},
    "none": {"vocab_only": True},  # the vocabulary alone, to compare with
}
WRITES: dict[str, dict[str, Any]] = {
    "plain": {},
    "drafting": {"draft": "entmtp"},
}  # with the context they do it in
N_TOKENS = 48  # evaluated, so that all is touched that passes touch
N_CTX, N_ANSWERS, N_WRITTEN = 2048, 4, 200  # of those that write


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

    peak, seconds = 0, 0.0

    def prepare_model(self, params: Any) -> None:
        super().prepare_model(params)

        @llama_cpp.llama_progress_callback
        def loaded(share: float, _: Any) -> bool:
            self.peak = peak()
            return True

        self._loaded = loaded  # as long as llama.cpp may call it
        params.progress_callback = loaded


def write(path: str, how: str, kernels: str) -> Watched:
    """A model that has written an answer to a prompt of each benchmark."""
    llm = Watched(path, n_ctx=N_CTX, n_threads=1, verbose=False, kernels=kernels, **WRITES[how])
    for task in sorted((assets() / "prompts").glob("*.jsonl"))[:N_ANSWERS]:
        prompt = json.loads(task.read_text("utf-8").splitlines()[0])["prompt"]
        llm.create_completion(prompt, max_tokens=N_WRITTEN, temperature=0.0)
    return llm


def load(path: str, how: str, kernels: str) -> Watched:
    """A model that has evaluated some tokens, without its context."""
    start = time.perf_counter()
    # a small context: what it takes is given back, but not the peak of a process that loads
    llm = Watched(path, n_ctx=64, n_batch=64, n_threads=1, verbose=False, kernels=kernels, **WAYS[how])
    llm.seconds = time.perf_counter() - start
    if how != "none":
        for i in range(N_TOKENS):
            llm.eval([7 + i * 31 % 251])
        llm.decoder.close()
        llm.free_context()
    return llm


def main(argv: list[str]) -> int:
    how = argv[1]
    llm = (write if how in WRITES else load)(*argv)
    print(json.dumps({"seconds": llm.seconds, "peak": llm.peak} | held()), flush=True)
    for _ in sys.stdin:
        print(json.dumps(held()), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
