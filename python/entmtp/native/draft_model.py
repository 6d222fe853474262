"""A model that drafts as a Python object: lifetime, and errors as exceptions."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import llama_cpp

from ..common.errors import EntmtpError
from . import abi as n


class DraftModel:
    """A smaller model with the same vocabulary, or a model's own layers for multi-token prediction, as a drafter.

    Args:
        ctx: `llama_context *` of the model that is drafted for, which must outlive this.
        context_params: its `llama_context_params`.
        path: file of the smaller model; None: the model's own prediction layers, with which it was loaded.
        model_params: `llama_model_params` that the model was loaded with.
        draft_vocab: tokens that it can propose, 0 for all, -1 for what pays about.

    Raises:
        EntmtpError: llama.cpp cannot load it, or its vocabulary is another one; the text says what differs.
    """

    def __init__(
        self, ctx: int, context_params: Any, path: str | None, model_params: Any, draft_vocab: int = -1
    ):
        self._ptr = self._model = None
        if path is not None:
            params = type(model_params).from_buffer_copy(model_params)
            params.load_mtp = False
            self._model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
            if not self._model:
                raise EntmtpError(f"draft model: llama.cpp cannot load {path}")
        self.path = path
        self._ptr = n.draft_model_init(ctx, self._model, ctypes.addressof(context_params), draft_vocab)
        if not self._ptr:
            message = n.last_error()
            self.close()
            raise EntmtpError(message + (f" ({path})" if path else ""))

    @property
    def broken(self) -> str:
        """Why it does not draft any more, one sentence; empty: it does."""
        return n.draft_model_broken(self._ptr).decode("utf-8", "replace") if self._ptr else "it is closed"

    @property
    def draft_vocab(self) -> int:
        """Tokens that it can propose."""
        return int(n.draft_model_vocab(self._ptr)) if self._ptr else 0

    @property
    def token_us(self) -> float:
        """Microseconds of drafting one token."""
        return float(n.draft_model_cost(self._ptr)) if self._ptr else 0.0

    def close(self) -> None:
        if self._ptr:
            n.draft_model_free(self._ptr)
        if self._model:
            llama_cpp.llama_model_free(self._model)
        self._ptr = self._model = None
