"""Texts to draft from as a Python object: lifetime, and errors as exceptions."""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

from ..common.errors import EntmtpError
from . import abi as n


class Corpus:
    """Tokens of other texts, indexed for drafting (`Decoder.set_corpus`).

    Args:
        tokens: int32 [n], one text after the other; a negative one ends a text.

    Raises:
        EntmtpError: there are too many.
    """

    def __init__(self, tokens: npt.NDArray[np.int32]):
        tokens = np.ascontiguousarray(tokens, np.int32)
        self.n_tokens = int((tokens >= 0).sum())
        self.pointer = n.corpus_init(tokens.ctypes.data_as(ctypes.c_void_p), len(tokens))
        if not self.pointer:
            raise EntmtpError(n.last_error())

    def close(self) -> None:
        """Free it, after the decoders that draft from it."""
        if self.pointer:
            n.corpus_free(self.pointer)
        self.pointer = None
