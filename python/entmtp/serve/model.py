"""The models that are served, whose turn they are, and their answers as they are counted and stopped."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp.server.model import LlamaProxy

from ..common.errors import EntmtpError
from ..completion import Ending
from ..engine import Engine, Host
from ..llama import Llama
from ..measure.speed import PlainPass
from ..models.base import context_length
from ..models.messages import answer_chat
from ..models.names import resolve
from ..native.group import Passes
from ..options.model import arguments, explained, model_files
from ..slot import Slot
from .errors import Refused
from .metrics import Metrics
from .requests import ServedRequest, current
from .settings import OURS, ModelSettings


class Counted(Exception):
    """A prompt has so many tokens."""


class Counting:
    """A model that tells how long the prompt of a completion is, in place of writing it."""

    def __init__(self, llama: Any):
        self._llama = llama

    def __getattr__(self, name: str) -> Any:
        return getattr(self._llama, name)

    def create_completion(self, prompt: Any, **_: Any) -> None:
        raise Counted(
            len(prompt if isinstance(prompt, list) else self.tokenize(prompt.encode(), special=True))
        )


class Served(Llama):
    """A model whose generations belong to a request: stopped with it, and counted at their end."""

    alias = ""
    metrics: Metrics | None = None
    plain = PlainPass()  # what a step of plain decoding takes

    @cached_property
    def longest_token(self) -> int:
        """Bytes of the longest token, as the model's file writes it."""
        return max(len(llama_cpp.llama_vocab_get_text(self._model.vocab, i)) for i in range(self.n_vocab()))

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """As `Llama.tokenize`; a text that cannot fit, for no token is so long, costs no time."""
        if len(text) > self.n_ctx() and len(text) > self.n_ctx() * (longest := self.longest_token):
            raise Refused(
                f"This model's maximum context length is {self.n_ctx()} tokens, and the prompt has at least "
                f"{len(text) // longest}; shorten it.",
                "messages", code="context_length_exceeded",
            )  # fmt: skip
        return super().tokenize(text, add_bos, special)

    def count(self, chat: dict[str, Any]) -> int:
        """Tokens of the prompt that `create_chat_completion` makes of its arguments."""
        counting = Counting(self)
        names = chat.pop("chat_template_kwargs", None) or {}
        try:
            answer_chat(counting, chat.pop("messages"), chat, names)
        except Counted as found:
            return int(found.args[0])
        raise AssertionError("a chat that asks for no completion")

    def generate(
        self, tokens: Sequence[int], *args: Any, **kwargs: Any
    ) -> Generator[int, Sequence[int] | None, None]:
        """As `Llama.generate`, but takes no tokens in between."""
        request = current.get() or ServedRequest("")
        n_tokens, details = 0, request.details
        request.n_prompt += len(tokens)
        self.reset_draft_stats()
        if self._decoder is not None:
            self._decoder.forget()  # or the speed of an answer would tell of another client's text
        with request.generating(self):
            try:
                with details.follow(self, self.plain) if details else contextlib.nullcontext():
                    for token in () if request.over else super().generate(tokens, *args, **kwargs):
                        if n_tokens == 0:
                            request.mark_first_token()
                        n_tokens += 1
                        request.at_end = llama_cpp.llama_vocab_is_eog(self._model.vocab, token)
                        request.n_tokens += not request.at_end
                        yield token
                        if request.over:
                            break
                if request.expired and isinstance(ending := kwargs.get("stopping_criteria"), Ending):
                    ending.early = True
            finally:
                stats = self.draft_stats
                if self.metrics is not None:
                    self.metrics.generation(self.alias, len(tokens), n_tokens, stats)
                if self.one_text:  # passes that are shared take longer
                    self.plain.observe(stats)
                self.reset_draft_stats()  # a record per step would grow


class ServedLlama(Served):
    """A `Llama` for one request after the other."""


class ServedHost(Served, Host):
    """The model of an engine."""


class ServedSlot(Served, Slot):
    """Of an engine, for one request among others."""


def _name(models: list[ModelSettings]) -> None:
    """Give each model a name for clients: its file's, with a number where another has it.

    A path would tell of the machine.
    """
    taken = [m.model_alias for m in models if m.model_alias]
    if twice := [name for name in taken if taken.count(name) > 1]:
        raise EntmtpError(f"models: two are called {twice[0]!r}; give each a model_alias of its own")
    for settings in (m for m in models if not m.model_alias):
        stem = Path(settings.model).stem
        names = (stem, *(f"{stem}-{n}" for n in range(2, len(models) + 2)))
        settings.model_alias = next(name for name in names if name not in taken)
        taken.append(settings.model_alias)


class Models(LlamaProxy):
    """The models of the server by alias, one of them loaded: llama-cpp-python's, with our `Llama` in it.

    Args:
        parallel: answers at a time; with several there is an engine, and one model.
        kv_tokens: of all of them.
        stall: seconds that they may have to wait for a prompt.
        interrupts: a streamed answer ends when another request comes.
    """

    def __init__(
        self, models: list[ModelSettings], metrics: Metrics, parallel: int = 1, kv_tokens: int | None = None,
        stall: float = 0.2, interrupts: bool = False,
    ):  # fmt: skip
        self.interrupts = interrupts
        self.metrics, self.parallel, self.kv_tokens, self.stall = metrics, parallel, kv_tokens, stall
        self.engine: Engine | None = None
        self._turns = asyncio.Semaphore(parallel)  # in the order in which requests came
        self._n_waiting = 0
        if parallel > 1 and len(models) > 1:
            raise EntmtpError("parallel answers are for one model: name one, or leave parallel out")
        _name(models)
        super().__init__(list[Any](models))

    @asynccontextmanager
    async def turn(self, name: str | None, run: Callable[..., Awaitable[Any]]) -> AsyncIterator[Any]:
        """A model for the request that asks for it, when it is its turn.

        Args:
            name: alias; another than those there are: the default one.
            run: runs what uses a model, in a thread of its own.
        """
        self._n_waiting += 1
        try:
            await self._turns.acquire()
        finally:
            self._n_waiting -= 1
        try:
            if request := current.get():
                request.start()
            if self.engine is not None:
                with self.engine.slot() as slot:
                    yield slot
            else:
                yield await run(self, name and self.known(name))
        finally:
            self._turns.release()

    def known(self, name: str) -> str:
        """The name of a model, as Ollama's clients write it or as it is."""
        return name if name in list(self) else name.removesuffix(":latest")

    def interrupted(self) -> bool:
        """Whether a stream should end because others wait."""
        return self.interrupts and self.engine is None and self._n_waiting > 0

    @property
    def passes(self) -> Callable[[], Passes] | None:
        """What counts the passes that answers share; None: they share none."""
        return None if self.engine is None else lambda: self.engine.group.passes  # type: ignore[union-attr]

    def metadata(self, name: str) -> dict[str, str]:
        """What the file of a model says of itself, where it is loaded."""
        llama = self._current_model if name == self._current_model_alias else None
        return dict(llama.metadata) if llama is not None else {}

    def file(self, name: str) -> Path:
        return Path(self._model_settings_dict[name].model)

    def free(self) -> None:
        if self.engine is not None:
            self.engine.close()
        else:
            super().free()

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
            known: dict[str, Any] = {"model": str(model), "draft_model": None}  # it is among ours
            if "n_ctx" not in settings.model_fields_set and (trained := context_length(model)):
                known["n_ctx"] = min(settings.n_ctx, trained)
            if settings.rpc_servers and "n_gpu_layers" not in settings.model_fields_set:
                known["n_gpu_layers"] = -1
            settings = settings.model_copy(update=known)
        else:  # llama-cpp-python fetches the model
            heads = resolve(settings.heads, "heads") if settings.heads else None
        ours = arguments(names, heads)
        if "type_v" in ours and self.parallel == 1 and "flash_attn" not in settings.model_fields_set:
            ours["flash_attn"] = None  # as the type wants it
        llm = self._load(settings, ours) if self.parallel == 1 else self._load_engine(settings, ours)
        for served in (llm, *(self.engine.slots if self.engine else ())):
            served.alias, served.metrics = alias, self.metrics
            costs = served.measured_costs
            served.plain = PlainPass(float(costs.curve()[0]) if costs else None)
        return llm

    def _load(self, settings: ModelSettings, ours: dict[str, Any], kind: type[Served] = ServedLlama) -> Any:
        with _built_with(kind, ours):
            try:
                return LlamaProxy.load_llama_from_model_settings(settings)
            except ValueError as e:
                raise explained(e, Path(settings.model), settings.n_ctx) from e

    def _load_engine(self, settings: ModelSettings, ours: dict[str, Any]) -> Any:
        if settings.embedding or settings.logits_all:
            raise EntmtpError(
                "parallel answers cannot be combined with embedding or logits_all; leave parallel out"
            )
        if settings.cache:
            raise EntmtpError(
                "parallel answers cannot be combined with cache, whose states are of one text; leave it out: texts are "
                "begun from each other's cells without it"
            )
        if of_one := [name for name in ("draft_model", "draft_vocab") if name in ours]:
            raise EntmtpError(
                f"parallel answers cannot be combined with {of_one[0]}: a model that drafts follows one text; "
                "leave one out"
            )
        known = {} if "flash_attn" in settings.model_fields_set else {"flash_attn": True}

        def load(n_cells: int) -> Any:
            large = settings.model_copy(update={**known, "n_ctx": n_cells})
            return self._load(large, {**ours, "n_slots": self.parallel}, ServedHost)

        n_ctx = settings.n_ctx or context_length(Path(settings.model)) or 0
        self.engine = Engine.around(load, self.parallel, n_ctx, self.kv_tokens, self.stall, ServedSlot)
        return self.engine.host


@contextmanager
def _built_with(kind: type[Served], ours: dict[str, Any]) -> Iterator[None]:
    """Within this, `llama_cpp.Llama(...)` makes one of `kind` with further arguments.

    llama-cpp-python turns its forty settings into arguments, chat handlers and caches in one function, which names
    the class; so the name is lent for the time of that call, rather than the function written anew.
    """

    class Configured(kind):  # type: ignore[misc, valid-type]
        def __init__(self, **kwargs: Any):
            kwargs.pop("mul_mat_q", None)  # of an older one
            super().__init__(**{**kwargs, **ours})

    stock = llama_cpp.Llama
    llama_cpp.Llama = Configured  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        llama_cpp.Llama = stock  # type: ignore[misc]
