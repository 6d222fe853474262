"""Draft heads as a Python object: lifetime, errors as exceptions, arrays as numpy."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.errors import EntmtpError
from . import abi as n


class Heads:
    """Draft heads on the device of the base model's output layer.

    Args:
        path: heads file (docs/heads-gguf.md).
        model: `llama_model *` of the base model, which must outlive the heads.
        n_threads: CPU threads to draft with.

    Raises:
        EntmtpError: the file is damaged, or was made for another base model; the text says what differs.
    """

    def __init__(self, path: str | Path, model: int, n_threads: int):
        self._ptr = n.heads_load(os.fsencode(path), model, n_threads)
        if not self._ptr:
            raise EntmtpError(n.last_error())
        self.info = n.HeadsInfo()
        n.heads_get_info(self._ptr, ctypes.byref(self.info))

    @property
    def n_heads(self) -> int:
        return self.info.n_heads

    @property
    def arch(self) -> str:
        """`medusa` or `hydra`."""
        return "hydra" if self.info.hydra else "medusa"

    def _states(self, hidden: npt.NDArray[np.float32], n_dims: int) -> npt.NDArray[np.float32]:
        h = np.ascontiguousarray(hidden, dtype=np.float32)
        if h.ndim != n_dims or h.shape[-1] != self.info.n_embd:
            raise ValueError(
                f"hidden has shape {h.shape}, its last dimension must be {self.info.n_embd} of {n_dims}"
            )
        return h

    def logits(
        self, head: int, hidden: npt.NDArray[np.float32], path: Sequence[int]
    ) -> npt.NDArray[np.float32]:
        """Logits [n_vocab_draft] of one head.

        Args:
            head: its index.
            hidden: hidden state [n_embd]; with a prefix layer its output.
            path: the `head + 1` tokens after the hidden state's, read by grounded heads only.
        """
        h = self._states(hidden, 1)
        tokens = np.zeros(head + 1, dtype=np.int32)
        tokens[: len(path)] = path[: head + 1]
        out = np.empty(self.info.n_vocab_draft, dtype=np.float32)
        n.check(n.heads_logits(self._ptr, head, h.ctypes.data, tokens.ctypes.data, out.ctypes.data))
        return out

    def expand(
        self, head: int, hidden: npt.NDArray[np.float32], paths: Any, k: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The k best guesses of one head after each path, best first: base tokens [n, k] and their ln p [n, k].

        Args:
            hidden: hidden state [n_embd]; with a prefix layer its output.
            paths: tokens [n, head + 1], the root first; heads that do not see the path want n = 1.
        """
        h = self._states(hidden, 1)
        array = np.ascontiguousarray(paths, dtype=np.int32).reshape(-1, head + 1)
        tokens = np.empty((len(array), k), dtype=np.int32)
        log_p = np.empty((len(array), k), dtype=np.float32)
        n.check(
            n.heads_expand(
                self._ptr,
                head,
                h.ctypes.data,
                array.ctypes.data,
                len(array),
                k,
                tokens.ctypes.data,
                log_p.ctypes.data,
            )
        )
        return tokens, log_p

    def prefix(self, hidden: npt.NDArray[np.float32], pos0: int) -> npt.NDArray[np.float32]:
        """Output [n_embd] of the Hydra++ layer for the last of `hidden` [n, n_embd], positions from `pos0` on."""
        h = self._states(hidden, 2)
        out = np.empty(self.info.n_embd, dtype=np.float32)
        n.check(n.heads_prefix(self._ptr, h.ctypes.data, len(h), pos0, out.ctypes.data))
        return out

    def close(self) -> None:
        if self._ptr:
            n.heads_free(self._ptr)
            self._ptr = None
