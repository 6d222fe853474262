"""Memory that a conversion takes: one tensor at a time, in chunks."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from helpers.checkpoints import (
    medusa_config,
    medusa_state,
    save_safetensors,
    save_torch,
    tiny_base,
    write_checkpoint,
)

if sys.platform != "linux":
    pytest.skip("reads the memory of a process from /proc", allow_module_level=True)

MEASURE = """
import json, resource, sys, tracemalloc
from entmtp.convert import convert
def peak():
    for line in open('/proc/self/status'):
        if line.startswith('VmHWM'):
            return int(line.split()[1]) * 1024
small, folder, base, small_base, out, outtype, trace = sys.argv[1:]
convert(small, small_base, out, outtype, progress=False)   # loads what is loaded once
if trace == 'trace':
    tracemalloc.start()
before = peak()
convert(folder, base, out, outtype, progress=False)
print(json.dumps([peak() - before, tracemalloc.get_traced_memory()[1] if trace == 'trace' else 0]))
"""


@pytest.fixture(scope="module")
def big(tmp_path_factory):
    """Heads whose largest tensor is 32 MiB of float32, in both file formats, and base models."""
    folder = tmp_path_factory.mktemp("big")
    n_embd, n_vocab = 256, 32768
    tiny_base(folder / "base.gguf", n_embd, n_vocab)
    tiny_base(folder / "small.gguf")
    write_checkpoint(folder / "small", medusa_state(1), medusa_config(1))
    state = medusa_state(1, 1, n_embd, n_vocab)
    state.update({f"{i}{name[1:]}": array.copy() for name, array in state.items() for i in (1,)})
    for kind, save in (("pt", save_torch), ("safetensors", save_safetensors)):
        write_checkpoint(folder / kind, {}, medusa_config(2))
        (folder / kind / "medusa_lm_head.pt").unlink()
        save(folder / kind / f"medusa_lm_head.{kind}", state)
    return folder, 4 * n_embd * n_vocab


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize(
    ("kind", "outtype", "trace"),
    [("pt", "f32", "rss"), ("pt", "q4_0", "rss"), ("safetensors", "f16", "rss"), ("pt", "q8_0", "trace")],
)
def test_peak_memory_is_under_twice_the_largest_tensor(big, tmp_path, kind, outtype, trace):
    folder, largest = big
    names = [
        folder / "small",
        folder / kind,
        folder / "base.gguf",
        folder / "small.gguf",
        tmp_path / "h.gguf",
    ]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, names), outtype, trace],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    resident, allocated = json.loads(done.stdout)
    print(f"{resident / largest:.2f} {allocated / largest:.2f}")
    if trace == "trace":
        assert 0 < allocated < largest / 2  # what Python and numpy allocate: some chunks, and the vocabulary
    else:
        assert 0 < resident < 2 * largest, f"{resident / largest:.2f} times the largest tensor"
