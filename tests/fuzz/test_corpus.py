"""The corpora of the fuzzers of Python readers, and changes drawn by a seed: a file is read, or refused in a sentence.

The corpora of the native fuzzers are run by ctest (native/fuzz/replay.cpp).
"""

from __future__ import annotations

import random

import pytest
from fuzz.run import CORPUS, NATIVE, READERS
from fuzz.targets import TARGETS

N_CHANGED = 1000  # files


def change_bytes(rng: random.Random, data: bytes) -> bytes:
    """A few bytes are others, gone, or there twice."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, n = rng.randrange(len(out) + 1), rng.randrange(1, 9)
        what = rng.randrange(3)
        if what == 0:
            out[i : i + n] = rng.randbytes(n)
        elif what == 1:
            del out[i : i + n]
        else:
            out[i:i] = out[i : i + n]
    return bytes(out)


def test_every_fuzzer_has_a_corpus() -> None:
    assert set(TARGETS) == set(READERS)
    assert {p.name for p in CORPUS.iterdir()} == {*NATIVE, *READERS}
    assert sum(p.stat().st_size for p in CORPUS.glob("*/*")) < 1 << 20


@pytest.mark.parametrize("name", READERS)
def test_corpus(name: str) -> None:
    read = [TARGETS[name].run(path.read_bytes()) for path in sorted((CORPUS / name).iterdir())]
    assert True in read and False in read


@pytest.mark.parametrize("name", READERS)
def test_changed_files(name: str) -> None:
    """Changes of changes, so that some are far from a whole file."""
    target, rng = TARGETS[name], random.Random(1)
    files = target.seeds()
    assert all(target.run(data) for data in files)
    read = []
    for _ in range(N_CHANGED):
        data = target.mutate(rng.choice(files), rng, lambda x: change_bytes(rng, x))
        read.append(target.run(data))
        if len(data) < 1 << 16 and (read[-1] or rng.randrange(8) == 0):
            files.append(data)
    assert min(read.count(True), read.count(False)) > 20
