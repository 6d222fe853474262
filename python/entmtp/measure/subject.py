"""What can be measured: a model with draft heads and a decoder. `entmtp.Llama` is one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..bank import Bank
from ..native.decoder import Decoder
from ..native.heads import Heads
from ..native.stats import DraftStats


class Subject(Protocol):
    """The part of `entmtp.Llama` that measuring needs; what it does is said there."""

    model_path: str
    heads_path: str | None
    bank: Bank | None
    policy: str
    tree: str | None
    n_batch: int
    n_threads: int
    n_threads_batch: int
    context_params: Any
    tensor_split: Any

    @property
    def model_params(self) -> Any: ...
    @property
    def model(self) -> Any: ...
    @property
    def ctx(self) -> Any: ...
    @property
    def n_tokens(self) -> int: ...
    @property
    def decoder(self) -> Decoder: ...
    @property
    def draft_heads(self) -> Heads: ...
    @property
    def draft_stats(self) -> DraftStats: ...
    @property
    def rpc_servers(self) -> list[str]: ...

    def compute_on(self, n_threads: int) -> None: ...
    def n_ctx(self) -> int: ...
    def n_vocab(self) -> int: ...
    def token_eos(self) -> int: ...
    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]: ...
    def reset(self) -> None: ...
    def set_seed(self, seed: int) -> None: ...
    def eval(self, tokens: Sequence[int]) -> None: ...
    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]: ...
    def reset_draft_stats(self) -> None: ...
    def set_trees(
        self,
        trees: str | Path | Bank | None = None,
        policy: str = "auto",
        score: str = "entropy",
        tree: str | None = None,
        drafters: str | Sequence[str] | None = None,
    ) -> None: ...
