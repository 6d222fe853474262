"""How the demo is loaded in tests, and the benchmark prompts that are committed."""

from __future__ import annotations

import json
import os
from pathlib import Path

from .models import ON_GPU

# xdist workers share the cores between them
N_THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))

# how much more memory and time AddressSanitizer takes, on a busy machine (`make test-asan-python`)
LEEWAY = 6 if "libasan" in os.environ.get("LD_PRELOAD", "") else 1

# f32 weights and cache: the only differences left between batch sizes are orders of summation
F32 = {
    "n_ctx": 1024,
    "n_threads": N_THREADS,
    "n_threads_batch": N_THREADS,
    "type_k": 0,
    "type_v": 0,
    "verbose": False,
    "calibrate": False,  # costs of the bank: timings of this machine would make runs differ
    **ON_GPU,
}


def prompts(*tasks: str) -> list[str]:
    """The committed benchmark prompts of some tasks."""
    texts = []
    for task in tasks or ("humaneval", "gsm8k", "literature"):
        lines = (Path(__file__).parents[1] / "prompts" / f"{task}.jsonl").read_text("utf-8").splitlines()
        texts += [json.loads(line)["prompt"] for line in lines]
    return texts


def has_amx() -> bool:
    """Whether ggml's own kernels, built for this processor, use AMX."""
    cpu = Path("/proc/cpuinfo")
    return cpu.exists() and "amx_int8" in cpu.read_text()
