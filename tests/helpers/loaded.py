"""What models a command really loads: a look at each `entmtp.Llama` that is made."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from entmtp import Llama
from entmtp.native import kernels


@dataclass(frozen=True)
class Loaded:
    n_ctx: int
    threads: tuple[int, int]
    flash_attn: bool
    kernels: str


@contextmanager
def every_model() -> Iterator[list[Loaded]]:
    """The models that are made within the block, as they were loaded."""
    made: list[Loaded] = []
    init = Llama.__init__

    def look(self: Llama, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        threads, flash = (self.n_threads, self.n_threads_batch), self.context_params.flash_attn_type == 1
        made.append(Loaded(self.n_ctx(), threads, flash, kernels.current()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Llama, "__init__", look)
        yield made
