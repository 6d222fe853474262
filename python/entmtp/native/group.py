"""Decoders of several sequences that share the passes of one context."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

from ..common.errors import EntmtpError
from . import abi as n
from .decoder import Decoder
from .heads import Heads


class Passes(NamedTuple):
    """Passes of a group.

    Attributes:
        n: how many there were.
        parts: decoders that took part, added up.
        tokens: that were evaluated.
    """

    n: int
    parts: int
    tokens: int


class Group:
    """`n_seq` decoders of one context (native/include/entmtp_group.h): each is called from a thread of its own.

    A pass begins when every active one has said what it wants evaluated; nobody is waited for much longer than a pass
    takes. What a decoder computes does not depend on the others.

    Args:
        ctx: `llama_context *` made for so many sequences, with one cache for all.
        heads: draft heads for all of them, or None.
        n_ctx: tokens that each may hold.

    Raises:
        EntmtpError: the context or the heads are not made for that.
    """

    def __init__(self, ctx: int, heads: Heads | None, n_seq: int, n_ctx: int):
        self._ptr = n.group_init(ctx, heads._ptr if heads else None, n_seq, n_ctx)
        if not self._ptr:
            raise EntmtpError(n.last_error())
        self.decoders = [Decoder.of_group(n.group_decoder(self._ptr, i), heads) for i in range(n_seq)]

    def set_active(self, i: int, active: bool) -> None:
        """Whether passes wait for a decoder."""
        if self._ptr:
            n.group_set_active(self._ptr, i, active)

    def set_stall(self, seconds: float) -> None:
        """While others wait, prompts are evaluated in pieces that take about so long."""
        n.group_set_stall(self._ptr, 1e6 * seconds)

    @property
    def passes(self) -> Passes:
        """What was evaluated so far."""
        counts = [ctypes.c_int64() for _ in Passes._fields]
        n.group_get_passes(self._ptr, *map(ctypes.byref, counts))
        return Passes(*(c.value for c in counts))

    def close(self) -> None:
        """Free all; no thread may be in a call of a decoder."""
        for decoder in self.decoders:
            decoder.close()
        n.group_free(self._ptr)
        self._ptr = None
