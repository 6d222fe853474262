"""The readers of untrusted files that are fuzzed: what each may raise, files to begin with, and how files are changed.

A reader either reads a file or says in one sentence what is wrong with it. Whatever else it raises is a bug.
"""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fuzz import mutators

from entmtp.bank import Bank
from entmtp.bank import bank as bank_file
from entmtp.bank.texts import Texts
from entmtp.bank.traces import Traces
from entmtp.bank.tree import Tree
from entmtp.chat import conversation
from entmtp.common.errors import BankError, ConvertError, EntmtpError
from entmtp.measure.replay import replay_auto
from entmtp.models.formats import gguf_header, safetensors_file, torch_file
from entmtp.models.formats.tensors import SourceTensor

MAX_VALUES = (
    1 << 16
)  # of a tensor whose values are read: larger ones are asked for by no conversion of such small files
WRITTEN = Path(tempfile.mkdtemp(prefix="entmtp-fuzz-"))


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        read: reads the file at a path.
        refusals: what it raises, with one sentence, for files that it does not read.
        source: the file of the reader, for counting lines.
        suffix: of its files.
        seeds: whole files.
        mutate: a changed file; see mutators.py.
    """

    read: Callable[[Path], None]
    refusals: tuple[type[Exception], ...]
    source: str
    suffix: str
    seeds: Callable[[], list[bytes]]
    mutate: mutators.Mutator

    def run(self, data: bytes) -> bool:
        """Whether the file was read. Raises what is a bug."""
        path = WRITTEN / f"file{self.suffix}"
        path.write_bytes(data)
        try:
            self.read(path)
        except self.refusals as e:
            if not str(e) or "\n" in str(e):
                raise AssertionError(f"no sentence: {e!r}") from e
            return False
        return True


# GGUF


def read_gguf(path: Path) -> None:
    keys = gguf_header.read_gguf_keys(path, lambda key: key.startswith("general."), 2)
    header = gguf_header.read_gguf_header(path)
    assert all(header.keys.get(key) == value or value != value for key, value in keys.items())
    size = path.stat().st_size
    for t in header.tensors.values():
        assert 0 <= t.offset <= t.offset + t.nbytes <= size


def gguf_seeds() -> list[bytes]:
    key = mutators.gguf_key
    keys = [
        key("general.architecture", 8, mutators.gguf_string("llama")),
        key("general.alignment", 4, (64).to_bytes(4, "little")),
        *(key(f"k{kind}", kind, bytes(mutators.GGUF_WIDTH[kind])) for kind in mutators.GGUF_WIDTH),
        key("list", 9, mutators.gguf_list(5, b"\0" * 12, 3)),
        key("words", 9, mutators.gguf_list(8, mutators.gguf_string("a") + mutators.gguf_string(""), 2)),
    ]
    tensors = [mutators.GGUFTensor(b"a", (32, 2), 0, 0), mutators.GGUFTensor(b"b", (32, 3), 8, 256)]
    whole = mutators.GGUFFile(3, keys, tensors, bytes(1024))
    return [whole.dump(), mutators.GGUFFile(2, keys[:1], tensors[:1], bytes(512)).dump()]


# checkpoints


def use(tensors: dict[str, SourceTensor]) -> None:
    """Read the values of all tensors."""
    for t in tensors.values():
        if t.size <= MAX_VALUES:
            try:
                n = sum(part.size for part in t.chunks())
            except ConvertError:  # a type that is not converted, or a wrong checksum
                continue
            assert n == t.size


def read_safetensors(path: Path) -> None:
    use(safetensors_file.read_safetensors_file(path))


def safetensors_seeds() -> list[bytes]:
    header = {
        "__metadata__": {"format": "pt", "shared": "a"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "c": {"dtype": "F16", "shape": [], "data_offsets": [32, 34]},
        "d": {"dtype": "I64", "shape": [0, 7], "data_offsets": [34, 34]},
    }
    return [mutators.dump_safetensors(header, bytes(range(34)))]


def read_torch(path: Path) -> None:
    use(torch_file.read_torch_file(path))


def torch_seeds() -> list[bytes]:
    from helpers.checkpoints import View, torch_entries

    values = np.arange(12, dtype=np.float32)
    state: dict[str, Any] = {
        "w": values.reshape(3, 4),
        "t": View(values, 0, (4, 3), (1, 4)),
        "e": View(values, 1, (5, 2), (0, 1)),
    }
    seeds = []
    for dtype, root in (("float32", "archive"), ("bfloat16", "m")):
        seeds.append(mutators.dump_zip({f"{k}": v for k, v in torch_entries(state, dtype, root).items()}))
    return seeds


# JSON


def read_bank(path: Path) -> None:
    bank = bank_file.Bank.load(path)
    again = bank_file.from_json(json.loads(bank_file.dumps(bank)), "again")
    assert again.trees == bank.trees and again.published == bank.published
    assert bank.pruned(1).trees[0].paths == ()
    if bank.costs is not None:
        assert np.isfinite(bank.costs.curve()).all()


def bank_seeds() -> list[bytes]:
    costs = {
        "verify": {"64": {"1": 100.0, "2": 120.0}, "512": {"1": 130.0, "4": 200.0}},
        "chain": [0.0, 10.0], "level": [[10.0, 10.0, 10.0]], "context": 64, "build": 5.0, "key": "k",
    }  # fmt: skip
    calibration = {
        "accept": [[0.0] * 9], "ahead": [[0.0] * 7], "edges": [[0.5]], "scenarios": [[[[[0.5, 0.2, 0.1]]]] * 2],
        "hits": 0.5, "hits_window": 32.0,
    }  # fmt: skip
    bank = {
        "version": 2, "name": "seed", "source": "s", "task": "t", "heads": "h", "device": "d",
        "trees": [{"name": "plain", "paths": []}, {"name": "a", "paths": [[0], [1], [0, 0]]}],
        "ema_window": 8, "bin_edges": [0.5], "acceptance": [[[], [0.6, 0.2, 0.3]], [[], [0.4, 0.1, 0.1]]],
        "criterion": "price", "costs": costs, "calibration": calibration,
        "published": {"entropy": {"edges": [0.5], "trees": [1, 0]}}, "report": {"front": [[1, 1.0]]},
    }  # fmt: skip
    small = {"version": 2, "trees": [{"name": Tree("p", ()).name, "paths": []}]}
    return [json.dumps(bank).encode(), json.dumps(small).encode()]


def read_conversation(path: Path) -> None:
    text = conversation.load(path)
    copy = path.with_name("copy.json")
    copy.unlink(missing_ok=True)
    text.save(copy, "model")
    assert conversation.load(copy) == text


def conversation_seeds() -> list[bytes]:
    messages = [{"role": r, "content": r} for r in ("system", "user", "assistant", "user")]
    return [json.dumps({"entmtp_chat": 1, "model": "m", "messages": messages}).encode()]


# traces


def read_traces(path: Path) -> None:
    traces = Traces.load(path)
    assert len(traces.slices()) == len(traces.task)
    assert sum(len(traces.of_task(task).signals) for task in set(traces.task)) == len(traces.signals)
    for head in range(traces.n_heads):
        assert traces.level(head).shape[0] == len(traces.signals)
    if traces.texts is not None:
        replayed = replay_auto(traces, Bank.without_heads(), drafters=("text", "recycling"))
        assert replayed.n_tokens == int((traces.n_tokens - 1).sum())


def traces_seeds() -> list[bytes]:
    seeds = []
    texts = Texts(
        n_prompt=np.array([3, 1], np.int32), temp=np.array([0, 1], np.float32),
        tokens=np.array([1, 2, 1, 2, 1, 3, 4], np.int32), best=np.tile(np.arange(7, -1, -1, np.int32), (3, 1)),
        log_p=np.full((3, 8), -1, np.float32), states=np.zeros((3, 2), np.float32),
    )  # fmt: skip
    for sees_path, rows, more in ((False, 2, None), (True, 5, None), (False, 2, texts)):
        traces = Traces(
            n_tokens=np.array([2, 1], np.int32), task=("a", "b"), prompt=(0, 1),
            signals=np.zeros((3, 3), np.float32), ranks=np.zeros((3, 2), np.int32),
            log_p=np.full((3, rows, 8), -1, np.float32), sees_path=sees_path, about={"model": "m"},
            texts=more,
        )  # fmt: skip
        path = WRITTEN / "seed.npz"
        traces.save(path)
        with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
            seeds.append(mutators.dump_zip({name: archive.read(name) for name in archive.namelist()}))
    return seeds


TARGETS = {
    "gguf": Target(read_gguf, (ConvertError,), gguf_header.__file__, ".gguf", gguf_seeds, mutators.gguf),
    "safetensors": Target(
        read_safetensors, (ConvertError,), safetensors_file.__file__, ".safetensors", safetensors_seeds,
        mutators.safetensors,
    ),
    "torch": Target(read_torch, (ConvertError,), torch_file.__file__, ".pt", torch_seeds, mutators.torch),
    "bank": Target(read_bank, (BankError,), bank_file.__file__, ".json", bank_seeds, mutators.text),
    "conversation": Target(
        read_conversation, (EntmtpError,), conversation.__file__, ".json", conversation_seeds, mutators.text,
    ),
    "traces": Target(
        read_traces, (ValueError,), Traces.load.__code__.co_filename, ".npz", traces_seeds, mutators.traces,
    ),
}  # fmt: skip
