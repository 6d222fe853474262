"""The base model as a teacher: many sequences at once, with logits and hidden states of every token."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from gguf import quants

from ..common.errors import EntmtpError, ModelError
from ..llama import Llama
from ..models.base import read_header
from ..models.formats.gguf_header import TensorInfo
from ..native import abi as n
from ..options.model import explained

MAX_SEQS = 64
KV_BYTES = 1 << 30  # memory for the caches of sequences that are written side by side
OUTPUT_BYTES = 1 << 26  # memory for the logits of one pass


class Base:
    """A GGUF model with a context for `n_seqs` independent sequences of `seq_len` tokens.

    The model is loaded as it would be for decoding, by the same library with the same kernels: what it says here is
    what it will say when it verifies.

    Args:
        path: the model.
        seq_len: tokens of the longest sequence.
        n_threads: CPU threads; None: as `Llama`.
        n_gpu_layers: layers on the GPU.
        layers: whose inputs are the hidden states that are kept, side by side; none: the input of the LM head is.

    Raises:
        ModelError: heads cannot be trained for this model; the text says why.
    """

    def __init__(
        self,
        path: Path,
        seq_len: int,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        layers: Sequence[int] = (),
    ):
        self.layers = tuple(layers)
        self._stack = contextlib.ExitStack()
        threads: dict[str, Any] = (
            {} if n_threads is None else {"n_threads": n_threads, "n_threads_batch": n_threads}
        )
        try:
            self.llm = Llama(path, n_ctx=64, n_gpu_layers=n_gpu_layers, verbose=False, **threads)
        except ValueError as e:
            raise explained(e, path, 64) from e
        self._stack.callback(self.llm.close)
        try:
            self._check(path)
            self._open(seq_len)
        except BaseException:
            self.close()
            raise

    def _check(self, path: Path) -> None:
        model = self.llm.model
        if llama_cpp.llama_model_has_encoder(model) or not llama_cpp.llama_model_has_decoder(model):
            raise ModelError(f"{path}: this model is an encoder, it writes no text; choose one that does")
        self.n_embd = llama_cpp.llama_model_n_embd(model)
        if llama_cpp.llama_model_n_embd_out(model) != self.n_embd:
            raise ModelError(
                f"{path}: its hidden states are not as wide as its embeddings, so it cannot have draft heads; "
                "choose another model"
            )
        self.n_vocab = self.llm.n_vocab()
        vocab = llama_cpp.llama_model_get_vocab(model)
        self.eog = frozenset(t for t in range(self.n_vocab) if llama_cpp.llama_vocab_is_eog(vocab, t))
        self.bos = [self.llm.token_bos()] if llama_cpp.llama_vocab_get_add_bos(vocab) else []

    def _open(self, seq_len: int) -> None:
        model, threads = self.llm.model, self.llm.n_threads_batch
        per_token = 4 * llama_cpp.llama_model_n_layer(model) * self._n_embd_kv()  # keys and values, f16
        self.seq_len = seq_len
        self.n_seqs = int(np.clip(KV_BYTES // (per_token * seq_len), 4, MAX_SEQS))
        self.n_batch = int(np.clip(OUTPUT_BYTES // (4 * self.n_vocab), self.n_seqs, 512))

        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.n_seqs * -(-seq_len // 256) * 256  # each sequence's share is a multiple of 256
        params.n_seq_max = self.n_seqs
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        self.ctx = llama_cpp.llama_init_from_model(model, params)
        if not self.ctx:
            raise ModelError("no memory for the base model's context; choose a smaller --seq-len")
        self._stack.callback(llama_cpp.llama_free, self.ctx)
        if self.layers:
            for layer in self.layers:
                n.check(n.follow_layer(self.ctx, layer))
        else:
            n.llama_set_embeddings_out(self.ctx, True)
        self.memory = llama_cpp.llama_get_memory(self.ctx)
        self._batch = llama_cpp.llama_batch_init(self.n_batch, 0, 1)
        self._stack.callback(llama_cpp.llama_batch_free, self._batch)
        size = (self.n_batch,)
        self._token = np.ctypeslib.as_array(self._batch.token, size)
        self._pos = np.ctypeslib.as_array(self._batch.pos, size)
        np.ctypeslib.as_array(self._batch.n_seq_id, size)[:] = 1
        np.ctypeslib.as_array(self._batch.logits, size)[:] = 1

    def _n_embd_kv(self) -> int:
        model = self.llm.model
        width = self.n_embd // max(llama_cpp.llama_model_n_head(model), 1)
        return width * max(llama_cpp.llama_model_n_head_kv(model), 1)

    @property
    def fingerprint(self) -> str:
        """Of the vocabulary, as heads files have it."""
        return f"{n.vocab_fingerprint(self.llm.model):016x}"

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, without BOS."""
        return self.llm.tokenize(text.encode("utf-8"), add_bos=False, special=False)

    def eval(
        self, tokens: Sequence[int], positions: Sequence[int], seqs: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """One pass over at most `n_batch` tokens of several sequences.

        Returns:
            Logits [n, n_vocab], valid until the next pass.

        Raises:
            EntmtpError: llama.cpp could not evaluate them.
        """
        size = len(tokens)
        self._batch.n_tokens = size
        self._token[:size] = tokens
        self._pos[:size] = positions
        for i, seq in enumerate(seqs):
            self._batch.seq_id[i][0] = seq
        if status := llama_cpp.llama_decode(self.ctx, self._batch):
            raise EntmtpError(f"llama.cpp could not evaluate the base model (llama_decode gave {status})")
        logits = llama_cpp.llama_get_logits(self.ctx)
        if not logits:
            raise EntmtpError(
                "the base model gives no next-token logits, so it writes no text; choose one that does"
            )
        return np.ctypeslib.as_array(logits, (size, self.n_vocab))

    def hidden(self, size: int) -> npt.NDArray[np.float32]:
        """Hidden states of the last pass: [size, n_embd], the input of the LM head; or [size, n_layers n_embd], inputs
        of the layers that were asked for."""
        if self.layers:
            inputs = (n.layer_inputs(self.ctx, layer) for layer in self.layers)
            return np.concatenate([np.ctypeslib.as_array(x, (size, self.n_embd)) for x in inputs], 1)
        rows = llama_cpp.llama_get_embeddings(self.ctx)
        if not rows:
            raise EntmtpError("the base model gives no hidden states, which heads need; choose another model")
        return np.ctypeslib.as_array(rows, (size, self.n_embd))

    def forget(self, seq: int) -> None:
        """Empty a sequence."""
        llama_cpp.llama_memory_seq_rm(self.memory, seq, -1, -1)

    def close(self) -> None:
        self._stack.close()


def read_matrices(path: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The model's token embeddings and output projection, each [n_vocab, n_embd], as float32; tied ones are one array.

    Raises:
        ModelError: the file does not hold them.
    """
    tensors = read_header(path).tensors
    if "token_embd.weight" not in tensors:
        raise ModelError(f"{path}: it has no tensor token_embd.weight, so it cannot have draft heads")
    embedding = _matrix(tensors["token_embd.weight"])
    return embedding, _matrix(tensors["output.weight"]) if "output.weight" in tensors else embedding


def _matrix(info: TensorInfo) -> npt.NDArray[np.float32]:
    """A tensor [n_cols, n_rows] of a GGUF as float32 [n_rows, n_cols]; a few rows at a time in between."""
    n_cols, n_rows = info.shape
    stored = np.memmap(info.path, np.uint8, "r", info.offset, (info.nbytes,)).reshape(n_rows, -1)
    out = np.empty((n_rows, n_cols), np.float32)
    for first in range(0, n_rows, 4096):
        part = slice(first, first + 4096)
        out[part] = quants.dequantize(np.array(stored[part]), info.type)
    return out
