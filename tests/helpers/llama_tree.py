"""The llama.cpp calls that the tests use, those of our patches included, behind two small classes."""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_int32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import entmtp  # noqa: F401  (llama_cpp then loads the patched libraries)

from .models import GPU_LAYERS

from llama_cpp import llama_cpp as C  # isort: skip

F32, F16, Q8_0 = 0, 1, 8  # enum ggml_type


def _bind(name: str, restype: Any, *argtypes: Any) -> Any:
    function = getattr(C._lib, name)
    function.restype = restype
    function.argtypes = list(argtypes)
    return function


# bool llama_batch_ext_set_parent(struct llama_batch_ext * batch, int32_t idx, int32_t parent_idx);
batch_set_parent = _bind("llama_batch_ext_set_parent", c_bool, c_void_p, c_int32, c_int32)

# bool llama_memory_tree_commit(llama_memory_t mem, llama_seq_id seq_id, const int32_t * idx, int32_t n);
memory_tree_commit = _bind("llama_memory_tree_commit", c_bool, c_void_p, c_int32, POINTER(c_int32), c_int32)

# void llama_set_embeddings_out(struct llama_context * ctx, bool value);
set_embeddings_out = _bind("llama_set_embeddings_out", None, c_void_p, c_bool)

# const struct ggml_tensor * llama_model_get_tensor(const struct llama_model * model, const char * name);
model_get_tensor = _bind("llama_model_get_tensor", c_void_p, c_void_p, c_char_p)


@C.llama_log_callback
def _quiet(_level: int, _text: bytes, _data: Any) -> None:
    """Refusals are logged as errors; the tests provoke many."""


class Model:
    """A loaded model, freed with the object or at the end of the process."""

    def __init__(self, path: Path) -> None:
        C.llama_log_set(_quiet, None)
        params = C.llama_model_default_params()
        params.n_gpu_layers = GPU_LAYERS
        self.ptr = C.llama_model_load_from_file(str(path).encode(), params)
        assert self.ptr, f"cannot load {path}"
        weakref.finalize(self, C.llama_model_free, self.ptr)
        self.n_vocab = C.llama_vocab_n_tokens(C.llama_model_get_vocab(self.ptr))
        self.n_embd = C.llama_model_n_embd(self.ptr)


@dataclass
class Cells:
    """Cells of one sequence in one KV cache, sorted by position."""

    pos: np.ndarray  # [n]
    k: list[np.ndarray]  # per layer [n, n_embd_k]; bytes if the type is not f32
    v: list[np.ndarray]


class Context:
    """A context; every decode that is not a tree goes the way of any llama.cpp program."""

    def __init__(
        self,
        model: Model,
        *,
        n_ctx: int = 1024,
        n_ubatch: int = 64,
        flash: bool = False,
        kv: int = F32,
        n_seq: int = 1,
        unified: bool = True,
        swa_full: bool = False,
    ) -> None:
        params = C.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_ctx
        params.n_ubatch = n_ubatch
        params.n_seq_max = n_seq
        params.n_outputs_max = n_ctx
        params.n_threads = params.n_threads_batch = (
            1  # threads that wait for each other cost more than they give
        )
        params.flash_attn_type = int(flash)  # 0 off, 1 on; not "auto"
        params.type_k = params.type_v = kv
        params.kv_unified = unified
        params.swa_full = swa_full  # False: a small cache for sliding windows, its cells soon used again
        params.offload_kqv = params.op_offload = False
        params.no_perf = True
        self.model = model
        self.ptr = C.llama_init_from_model(model.ptr, params)
        assert self.ptr, "cannot make a context"
        self.mem = C.llama_get_memory(self.ptr)
        self.batch = C.llama_batch_ext_init(self.ptr)

    def close(self) -> None:
        C.llama_batch_ext_free(self.batch)
        C.llama_free(self.ptr)

    def process(
        self,
        tokens: Sequence[int],
        pos: Sequence[int],
        parents: Sequence[int] | None = None,
        outputs: Sequence[int] | None = None,
        seq: int | Sequence[int] = 0,
    ) -> int:
        """Decode a batch and return llama_process's status. parents: -1 for a root. outputs: None means all rows."""
        C.llama_batch_ext_clear(self.batch)
        for i, token in enumerate(tokens):
            seq_id = seq if isinstance(seq, int) else seq[i]
            assert C.llama_batch_ext_add_token(self.batch, seq_id, token) == i
            assert C.llama_batch_ext_set_pos(self.batch, i, (c_int32 * 1)(pos[i]))
            assert C.llama_batch_ext_set_output_logits(self.batch, i, outputs is None or i in outputs)
            if parents is not None and parents[i] >= 0:
                assert batch_set_parent(self.batch, i, parents[i])
        return C.llama_process(self.ptr, C.LLAMA_PROCESS_TYPE_DECODE, self.batch)

    def decode(
        self, tokens: Sequence[int], parents: Sequence[int] | None = None, **kwargs: Any
    ) -> np.ndarray:
        """Decode after the cached tokens; positions follow from the parents. Returns logits [n_outputs, n_vocab]."""
        start = self.pos_max(kwargs.get("seq", 0)) + 1
        if parents is None:
            pos = [start + i for i in range(len(tokens))]
        else:
            pos = []
            for p in parents:
                pos.append(start if p < 0 else pos[p] + 1)
        assert self.process(tokens, pos, parents, **kwargs) == 0
        outputs = kwargs.get("outputs")
        return self.logits(len(tokens) if outputs is None else len(outputs))

    def logits(self, n: int) -> np.ndarray:
        """Logits of the n output rows of the last batch, in batch order."""
        return np.ctypeslib.as_array(C.llama_get_logits(self.ptr), (n, self.model.n_vocab)).copy()

    def hidden(self, i: int) -> np.ndarray | None:
        """Hidden state of the batch's token i, None if it has none."""
        row = C.llama_get_embeddings_ith(self.ptr, i)
        return np.ctypeslib.as_array(row, (self.model.n_embd,)).copy() if row else None

    def commit(self, path: Sequence[int], seq: int = 0) -> bool:
        return memory_tree_commit(self.mem, seq, (c_int32 * len(path))(*path), len(path))

    def rm(self, p0: int, p1: int = -1, seq: int = 0) -> None:
        assert C.llama_memory_seq_rm(self.mem, seq, p0, p1)

    def clear(self) -> None:
        C.llama_memory_clear(self.mem, False)

    def pos_max(self, seq: int = 0) -> int:
        return C.llama_memory_seq_pos_max(self.mem, seq)

    def pos_min(self, seq: int = 0) -> int:
        return C.llama_memory_seq_pos_min(self.mem, seq)

    def state(self, seq: int = 0) -> bytes:
        """llama_state_seq_get_data."""
        size = C.llama_state_seq_get_size(self.ptr, seq)
        data = (ctypes.c_uint8 * size)()
        assert C.llama_state_seq_get_data(self.ptr, data, size, seq) == size
        return bytes(data)

    def cells(self, seq: int = 0) -> list[Cells]:
        """The cells of a sequence: one entry for a plain cache, two (global, sliding window) for an iSWA cache."""
        return parse_state(self.state(seq))


def parse_state(data: bytes) -> list[Cells]:
    """Parse the state of one sequence; the format is llama_kv_cache::state_write's."""
    at = 8  # magic, sequence

    def take(fmt: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize(fmt)
        return struct.unpack_from(fmt, data, at - struct.calcsize(fmt))

    def rows(n: int, width: int, kind: int) -> np.ndarray:
        nonlocal at
        at += n * width
        raw = np.frombuffer(data, np.uint8, n * width, at - n * width).reshape(n, width)
        return raw.view(np.float32) if kind == F32 else raw

    caches = []
    while at < len(data):
        (n_stream,) = take("=I")
        for _ in range(n_stream):
            (n,) = take("=I")
            if n == 0:
                caches.append(Cells(np.zeros(0, np.int32), [], []))
                continue
            meta = [take("=iIi") for _ in range(n)]  # position, number of sequences (one), sequence
            assert all(m[1] == 1 for m in meta)
            pos = np.array([m[0] for m in meta])
            order = np.argsort(pos, kind="stable")
            transposed, n_layer = take("=II")
            k, v = [], []
            for _ in range(n_layer):
                kind, width = take("=iQ")
                k.append(rows(n, width, kind)[order])
            for _ in range(n_layer):
                if transposed:  # without flash attention a row of V is one dimension of all cells
                    kind, width, n_embd = take("=iII")
                    v.append(
                        rows(n_embd, n * width, kind)
                        .reshape(n_embd, n, -1)
                        .transpose(1, 0, 2)
                        .reshape(n, -1)[order]
                    )
                else:
                    kind, width = take("=iQ")
                    v.append(rows(n, width, kind)[order])
            caches.append(Cells(pos[order], k, v))
    assert at == len(data)
    return caches


@dataclass(frozen=True)
class Tree:
    parents: list[int]  # -1 for a root; levels in order, as llama.cpp wants positions not to decrease
    tokens: list[int]

    def __len__(self) -> int:
        return len(self.parents)

    def path(self, node: int) -> list[int]:
        """Nodes from the root to `node`."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def leaf_paths(self) -> list[list[int]]:
        return [self.path(i) for i in range(len(self)) if i not in self.parents]


def make_tree(choices: Sequence[int], tokens: Sequence[int], max_depth: int, forest: bool = False) -> Tree:
    """Node i hangs below node choices[i] mod i, or below its first ancestor that is not too deep."""
    parent, depth = [-1], [1]
    for i in range(1, len(choices)):
        p = choices[i] % (i + forest) - forest
        while p >= 0 and depth[p] >= max_depth:
            p = parent[p]
        parent.append(p)
        depth.append(depth[p] + 1 if p >= 0 else 1)
    # by level, in any order within one
    order = sorted(range(len(choices)), key=lambda i: (depth[i], choices[i] // 7 % 5))
    where = {old: new for new, old in enumerate(order)}
    return Tree([where[parent[i]] if parent[i] >= 0 else -1 for i in order], [tokens[i] for i in order])


def plain_path(ctx: Context, tree: Tree, path: list[int]) -> np.ndarray:
    """Decode the path as plain tokens and return their logits.

    The batch is as large as the tree, so that ggml takes the same kernels: what follows a path cannot change it, and is
    removed.
    """
    end = ctx.pos_max() + 1 + len(path)
    logits = ctx.decode([tree.tokens[i] for i in path] + [0] * (len(tree) - len(path)))
    ctx.rm(end)
    return logits[: len(path)]


def plain_rows(ctx: Context, tree: Tree, hidden: bool = False) -> np.ndarray:
    """Row of each node from decoding its path as plain tokens; the context is left as it was."""
    start = ctx.pos_max() + 1
    rows: dict[int, np.ndarray] = {}
    for path in tree.leaf_paths():
        logits = plain_path(ctx, tree, path)
        rows |= {i: ctx.hidden(k) if hidden else logits[k] for k, i in enumerate(path)}
        ctx.rm(start)
    return np.stack([rows[i] for i in range(len(tree))])
