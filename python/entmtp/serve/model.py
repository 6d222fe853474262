"""Our `Llama` in llama-cpp-python's server: the model it loads, and its answers as they are counted and stopped."""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp.server.model import LlamaProxy

from ..llama import Llama
from ..models.base import context_length
from ..models.names import resolve
from ..options.model import arguments, explained, model_files
from .metrics import Metrics
from .requests import ServedRequest, current
from .settings import OURS, ModelSettings


class ServedLlama(Llama):
    """A `Llama` whose generations belong to a request: stopped with it, and counted at their end."""

    alias = ""
    metrics: Metrics | None = None

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """As `Llama.generate`, but takes no tokens in between."""
        request = current.get() or ServedRequest("")
        n_tokens = 0
        self.reset_draft_stats()
        if self._decoder is not None:
            self._decoder.forget()  # or the speed of an answer would tell of another client's text
        with request.generating(self):
            try:
                if request.stopped:
                    return
                for token in super().generate(tokens, *args, **kwargs):
                    if n_tokens == 0:
                        request.mark_first_token()
                    n_tokens += 1
                    yield token
                    if request.stopped:
                        return
            finally:
                if self.metrics is not None:
                    self.metrics.generation(self.alias, len(tokens), n_tokens, self.draft_stats)
                self.reset_draft_stats()  # a record per step would grow


class Models(LlamaProxy):
    """The models of the server by alias, one of them loaded: llama-cpp-python's, with our `Llama` in it."""

    def __init__(self, models: list[ModelSettings], metrics: Metrics):
        self.metrics = metrics
        super().__init__(list[Any](models))

    def __call__(self, model: str | None = None) -> llama_cpp.Llama:
        # called once by every request that needs a model, at its turn
        if request := current.get():
            request.start()
        return super().__call__(model)

    def load_llama_from_model_settings(self, settings: ModelSettings) -> llama_cpp.Llama:  # type: ignore[override]
        """The model that the settings name, with its heads.

        Raises:
            EntmtpError, ValueError: with one sentence for the user.
        """
        alias = settings.model_alias or settings.model
        names = argparse.Namespace(**{option.name: getattr(settings, option.name) for option in OURS})
        heads: Path | None
        if settings.hf_model_repo_id is None:
            if (settings.embedding or settings.vocab_only) and not (names.heads or names.draft):
                names.draft = "off"  # there is nothing to draft
            model, heads = model_files(names)
            known: dict[str, Any] = {"model": str(model)}
            if "n_ctx" not in settings.model_fields_set and (trained := context_length(model)):
                known["n_ctx"] = min(settings.n_ctx, trained)
            if settings.rpc_servers and "n_gpu_layers" not in settings.model_fields_set:
                known["n_gpu_layers"] = -1
            settings = settings.model_copy(update=known)
        else:  # llama-cpp-python fetches the model
            heads = resolve(settings.heads, "heads") if settings.heads else None
        with _built_with(arguments(names, heads)):
            try:
                llm = LlamaProxy.load_llama_from_model_settings(settings)
            except ValueError as e:
                raise explained(e, Path(settings.model), settings.n_ctx) from e
        assert isinstance(llm, ServedLlama)
        llm.alias, llm.metrics = alias, self.metrics
        return llm


@contextmanager
def _built_with(ours: dict[str, Any]) -> Iterator[None]:
    """Within this, `llama_cpp.Llama(...)` makes a `ServedLlama` with further arguments.

    llama-cpp-python turns its forty settings into arguments, chat handlers and caches in one function, which names
    the class; so the name is lent for the time of that call, rather than the function written anew.
    """

    class Configured(ServedLlama):
        def __init__(self, **kwargs: Any):
            super().__init__(**kwargs, **ours)

    stock = llama_cpp.Llama
    llama_cpp.Llama = Configured  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        llama_cpp.Llama = stock  # type: ignore[misc]
