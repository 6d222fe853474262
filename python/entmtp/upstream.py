"""llama-cpp-python's `Llama` as ours needs it: all that is used of it without being published, in one place.

Read in version 0.3.36, which pyproject.toml pins. Where that version moves, tests/decode/test_upstream.py names what is
missing, and this file is what has to be looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import os
import random
import threading
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _internals
from llama_cpp import llama as stock

from .chatting import Chatting
from .common.errors import EntmtpError
from .common.interrupt import heeded
from .completion import Ending
from .context import Gone, Processors, SequenceContext, Watched, cache_types, check_adapter, context_of
from .models.tokenizer import Tokenizer, check_tokens
from .native import custom_sampler, log
from .native.decoder import sample
from .request import (
    HALF,
    by_name,
    check_request,
    check_sizes,
    check_texts,
    grammar_fault,
    whole_tokens,
)

_internals.LlamaSampler.add_custom = custom_sampler.add  # type: ignore[method-assign, assignment]
PARAMETERS = inspect.signature(llama_cpp.Llama.__init__).parameters

# What of `llama_cpp.Llama` is used, and what for.
NEEDS = {
    "input_ids": "tokens evaluated so far, [n_ctx]: `generate` compares a prompt with them",
    "n_tokens": "how many there are",
    "scores": "logits by token with logits_all, [n_ctx, n_vocab]: logprobs are read from them; part of a state",
    "n_batch": "tokens that one call may evaluate",
    "tokenizer_": "replaced by one that does not detokenise the same text again and again",
    "_requires_eval": "the last token's logits are not there: `generate` must not sample before it evaluates",
    "_logits_all": "the argument logits_all",
    "_n_vocab": "width of a row of logits",
    "_ctx": "wrapper of the context: get_logits(), kv_cache_seq_rm(), kv_cache_clear()",
    "_model": "wrapper of the model: its vocabulary, and tokens to fill in with",
    "_lora_adapter": "the adapter of lora_path",
    "model_params": "parameters of the model, set before it is loaded",
    "context_params": "parameters of the context, set before the arguments are put into them",
    "_n_ctx": "tokens that a text may have, [input_ids]",
    "_chat_handlers": "what answers chats by the templates of the model's file",
    "_is_recurrent": "the memory holds a state, not cells",
    "_is_hybrid": "it holds both",
    "_stack": "what is freed with the object; the wrappers have one each, `_exit_stack`",
    "_sampler": "the sampler chain of the running `generate`, with its pointer `sampler` and close()",
    "_init_sampler": "makes such a chain from the arguments of `sample`",
}

# which CPU kernels pack the weights of a model is chosen for the process; and llama-cpp-python points stdout and stderr
# of all of it elsewhere while it loads a model quietly, which is left out
loading = threading.RLock()


@contextlib.contextmanager
def _loading() -> Iterator[None]:
    """One model is loaded at a time; what others print meanwhile is printed (llama.cpp is quiet by its log)."""
    places: tuple[Any, ...] = (stock, _internals)
    with loading:
        before, made = [place.suppress_stdout_stderr for place in places], _internals.LlamaContext
        for place in places:
            place.suppress_stdout_stderr = lambda disable: contextlib.nullcontext()
        _internals.LlamaContext = context_of  # type: ignore[misc, assignment]
        try:
            yield
        finally:
            for place, what in zip(places, before, strict=True):
                place.suppress_stdout_stderr = what
            _internals.LlamaContext = made  # type: ignore[misc]


class Upstream(Chatting):
    """`llama_cpp.Llama`, with public names for what ours builds upon."""

    _given: dict[str, Any]  # arguments that it was made with

    def __init__(self, model_path: str, **kwargs: Any):
        self._stale = True
        self.failed: BaseException | None = None  # what a logits processor raised
        self._warned: set[str] = set()
        if kwargs.get("seed") == -1:  # documented as random; llama-cpp-python begins with a fixed one
            kwargs["seed"] = random.randrange(1, 1 << 32)
        if HALF.search(model_path):  # llama-cpp-python reads names as UTF-8
            raise ValueError(f"{model_path!a}: the file's name is no UTF-8; give it another")
        check_sizes(kwargs)
        if unknown := [name for name in kwargs if name not in PARAMETERS]:
            warnings.warn(
                f"Llama has no argument {', '.join(unknown)}: passed over", RuntimeWarning, stacklevel=3
            )
        adapter = kwargs.pop("lora_path", None)
        if adapter:
            kwargs["use_mmap"] = False  # as llama-cpp-python has it
        with _loading(), log.said():
            super().__init__(model_path, **{**kwargs, **cache_types(kwargs)})
        self._last_seed = self._seed
        self._take_over()
        if adapter:
            self._put_on(Path(adapter))
        # llama.cpp rounds small contexts up, llama-cpp-python's arrays are as long as the argument says
        if len(self.input_ids) < self.n_ctx():
            self.input_ids = np.zeros(self.n_ctx(), dtype=np.intc)
            if self.logits_all:
                self.scores = np.zeros((self.n_ctx(), self.vocab_size), dtype=np.single)
        if not self.logits_all:
            # none are kept; llama-cpp-python has a row for every token of a batch, and copies as many into each state
            self.scores = np.zeros((1, self.vocab_size), dtype=np.single)

    def _take_over(self) -> None:
        """The wrappers free model and context when they are collected as garbage, in any order, before what uses them
        even; here they go with the object, the context first."""
        freed = contextlib.ExitStack()
        freed.push(self._model._exit_stack.pop_all())
        self._context = freed.enter_context(self._ctx._exit_stack.pop_all())
        freed.push(self._stack.pop_all())
        self._stack = freed

    def _put_on(self, path: Path) -> None:
        """A LoRA adapter. llama-cpp-python takes one that cannot be read for one, and refers to itself for its end."""
        if not path.is_file():
            raise ValueError(f"lora_path: there is no file {path}")
        check_adapter(path, Path(self.model_path))
        log.forget()
        adapter = llama_cpp.llama_adapter_lora_init(self.model, os.fsencode(path))
        if not adapter:
            raise ValueError(f"lora_path: {path} is no LoRA adapter of this model: {log.last_error()}")
        self._stack.callback(llama_cpp.llama_adapter_lora_free, adapter)
        self._lora_adapter, self.lora_path = adapter, str(path)
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        if llama_cpp.llama_set_adapters_lora(self.ctx, adapters, 1, (ctypes.c_float * 1)(self.lora_scale)):
            raise ValueError(f"lora_path: llama.cpp cannot use {path} with this model: {log.last_error()}")

    def begin_as(self, other: Upstream, n_ctx: int) -> None:
        """Share the model and the context of another, in place of `__init__`, for a text of up to n_ctx tokens."""
        self.__dict__.update(other.__dict__, _ctx=SequenceContext(other._ctx, n_ctx), _n_ctx=n_ctx)
        self._stack = contextlib.ExitStack()  # the other frees them
        self.cache = None  # of states, which hold all texts of a context
        self.input_ids = np.zeros(n_ctx, dtype=np.intc)
        self.n_tokens = 0
        self._sampler = None
        self._stale = True
        self.failed = None
        self._warned = set()

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or of one in another process: the arguments that it was made with, as they are now."""
        set_since = ("chat_format", "chat_handler", "spm_infill", "lora_scale", "verbose")
        return {**self._given, "seed": self._seed, **{name: getattr(self, name) for name in set_since}}

    @property
    def chat_handlers(self) -> dict[str, Any]:
        """By the names of the templates in the model's file."""
        return dict(self._chat_handlers)

    @property
    def is_recurrent(self) -> bool:
        """The memory holds a state of its text, or that beside cells: it cannot hold several texts as one cache."""
        return bool(self._is_recurrent or self._is_hybrid)

    def prepare_model(self, params: Any) -> None:
        """Called with the `llama_model_params` before the model is loaded, to change them."""

    def prepare_context(self, params: Any) -> None:
        """Called with the `llama_context_params` before the arguments are put into them, to change them."""

    def free_context(self) -> None:
        """Free the context alone, after which the model can only be closed."""
        self._context.close()

    def free(self) -> None:
        """Free the model; what is asked of it afterwards is an error."""
        super().close()
        self.forget_model()

    def forget_model(self) -> None:
        """It is freed."""
        gone: Any = Gone()
        self._model = self._ctx = self.tokenizer_ = gone

    def must_evaluate(self) -> bool:
        """Whether the logits of the last token are not there to sample from."""
        return self._stale

    @property
    def model_params(self) -> Any:
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        self.prepare_model(params)
        self._model_params = params

    @property
    def context_params(self) -> Any:
        return self._context_params

    @context_params.setter
    def context_params(self, params: Any) -> None:
        self.prepare_context(params)
        self._context_params = params

    # `generate` asks before it samples without evaluating; the answer must come from what is true of the memory, as any
    # evaluation may fail on its way
    @property
    def _requires_eval(self) -> bool:
        return self.must_evaluate()

    @_requires_eval.setter
    def _requires_eval(self, value: bool) -> None:
        self._stale = value

    @property
    def logits_all(self) -> bool:
        """Logits of every token are kept, for logprobs."""
        return bool(self._logits_all)

    @property
    def _scores(self) -> npt.NDArray[np.single]:
        """Rows of logits up to the last token; its last row is read even where there is none."""
        return self.scores[: max(self.n_tokens, 1)]

    def load_state(self, state: llama_cpp.LlamaState) -> None:
        """As `llama_cpp.Llama.load_state`; where a state cannot be loaded, the text is empty.

        Raises:
            EntmtpError: it is of another model or context, or of more tokens than this context has room for.
        """
        n, size = state.n_tokens, len(state.llama_state)
        if not size or n < 0:
            raise EntmtpError("the state is empty: it was not made by save_state")
        if n > self._n_ctx:
            raise EntmtpError(
                f"the state has {n} tokens, and this context has room for {self._n_ctx} (n_ctx)"
            )
        if self.logits_all and len(state.scores) < n:
            raise EntmtpError("the state has no logits of its tokens, which this model keeps (logits_all)")
        self.check_tokens(state.input_ids[:n].tolist())
        self.n_tokens, self._stale = 0, True
        data = (ctypes.c_uint8 * size).from_buffer_copy(state.llama_state)
        if llama_cpp.llama_state_set_data(self.ctx, data, size) != size:
            self._ctx.kv_cache_clear()
            raise EntmtpError(
                "the state cannot be loaded: it is of another model, or of a context with another cache (n_ctx, types)"
            )
        if llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(self.ctx), 0) + 1 < n:
            self._ctx.kv_cache_clear()
            raise EntmtpError(f"the state is damaged: it says that it holds {n} tokens, and holds fewer")
        self.input_ids[:n] = state.input_ids[:n]
        if self.logits_all:
            self.scores[:n] = state.scores[:n]
        self.n_tokens, self._seed = n, state.seed

    def set_seed(self, seed: int) -> None:
        super().set_seed(seed)
        self._last_seed = seed

    def next_seed(self) -> int:
        """For a text that names none, by the one before, as llama-cpp-python draws it.

        A state that is loaded in between does not bring its own back, which would write its text again and again.
        """
        self._last_seed = random.Random(self._last_seed).randint(0, 1 << 32)
        return self._last_seed

    @property
    def vocab_size(self) -> int:
        """Width of a row of logits."""
        return int(self._n_vocab)

    def record(self, asked: dict[str, Any], begin: int) -> Any:
        """What keeps log probabilities of a completion (`Logprobs`); None: nobody, or llama-cpp-python does.

        Args:
            asked: its arguments.
            begin: characters before its text.
        """
        return None

    def ends_text(self, token: int) -> bool:
        """Whether it ends an answer, of which it is no part."""
        return bool(llama_cpp.llama_vocab_is_eog(self._model.vocab, token))

    @cached_property
    def end_tokens(self) -> list[int]:
        """All that end an answer."""
        return [token for token in range(self._n_vocab) if self.ends_text(token)]

    def create_completion(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """As `llama_cpp.Llama.create_completion`; what it would pass over in silence is a ValueError.

        Of several stop strings the first in the text counts, empty ones are none; `echo` may be streamed, and `suffix`
        needs a model that was trained to fill in.
        """
        asked = by_name("create_completion", prompt, args, kwargs)
        check_request(self._n_vocab, {**asked, "prompt": prompt})
        text = prompt
        if isinstance(prompt, (bytes, bytearray)):
            raise ValueError("the prompt is bytes, it must be a text or a list of tokens")
        if not isinstance(prompt, str):
            prompt = whole_tokens(prompt)
            self.check_tokens(prompt)
            text = self.detokenize(prompt).decode("utf-8", "ignore")
        if (suffix := asked.pop("suffix", None)) is not None:
            prompt = self._between(prompt, suffix)
        if asked.get("seed") is None:
            asked["seed"] = self.next_seed()
        if (processors := asked.get("logits_processor")) is not None:
            asked["logits_processor"] = Processors(processors) if asked.get("logit_bias") else processors
        record = self.record(asked, len(text))
        first = [self.token_bos()] if prompt == "" else []
        is_stocks = asked.get("logprobs") is not None and record is None  # from logits that are kept
        ending = Ending(self, {**asked, "stop": None} if is_stocks else asked, record, first)
        asked["stopping_criteria"] = ending
        if is_stocks:
            if asked.get("echo") and not isinstance(prompt, str):
                raise ValueError(
                    "echo with logprobs needs a prompt of text where logits are kept (logits_all)"
                )
            kept: Any = super().create_completion(prompt, **asked)
            if ending.early and not ending.streamed:
                kept["choices"][0]["finish_reason"] = "length"
            return kept
        echoed = text if asked.pop("echo", False) else ""
        answer: Any = super().create_completion(prompt, **{**asked, "stop": [], "logprobs": None})
        if ending.streamed:
            return ending.pieces(answer, echoed)
        return ending.whole(answer, echoed, lambda token: token not in first and not self.ends_text(token))

    def _between(self, prompt: str | list[int], suffix: str) -> list[int]:
        """Tokens of a prompt for what comes between two texts, as models that were trained for it have them;
        llama-cpp-python writes token 0 in their places."""
        before, behind, between = (
            self._model.token_prefix(), self._model.token_suffix(), self._model.token_middle()
        )  # fmt: skip
        if min(before, behind, between) < 0:
            raise ValueError("suffix: this model has no tokens to fill in with")

        def tokens(text: str) -> list[int]:
            return self.tokenize(text.encode(), add_bos=False, special=False)

        first = tokens(prompt) if isinstance(prompt, str) else prompt
        # some vocabularies put a space before every text: not where it goes on
        marker = tokens("\u263a")
        last = tokens("\u263a" + suffix)
        last = last[len(marker) :] if last[: len(marker)] == marker else tokens(suffix)
        bos = [self.token_bos()] if self._model.add_bos_token() else []
        if self.spm_infill:
            return [*bos, behind, *last, before, *first, between]
        return [*bos, before, *first, behind, *last, between]

    def embed(self, input: Any, *args: Any, **kwargs: Any) -> Any:
        """As `llama_cpp.Llama.embed`.

        Raises:
            ValueError: the input is no text or list of texts, or the model ranks pairs of texts and has no embeddings.
        """
        check_texts(input)
        # llama-cpp-python would read a vector where llama.cpp has one number for each text
        if self.pooling_type() == llama_cpp.LLAMA_POOLING_TYPE_RANK:
            raise ValueError("this model ranks pairs of texts (a reranker): it has scores, and no embeddings")
        return super().embed(input, *args, **kwargs)

    def detokenize(self, tokens: Any, *args: Any, **kwargs: Any) -> bytes:
        """As `llama_cpp.Llama.detokenize`; a token that is none is a ValueError, not the end of the process."""
        if not isinstance(self.tokenizer_, Tokenizer):  # ours looks at tokens that are new to it
            self.check_tokens(tokens)
        return bytes(super().detokenize(tokens, *args, **kwargs))

    def check_tokens(self, tokens: Any) -> None:
        """Raise ValueError unless all are tokens of this vocabulary."""
        check_tokens(tokens, self._n_vocab)

    def warn_once(self, text: str) -> None:
        """A warning, the first time that this model has a reason for it."""
        if text not in self._warned:
            self._warned.add(text)
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def rows(self, n: int) -> npt.NDArray[np.single]:
        """Logits of the last batch of n tokens, [n, n_vocab]; valid until the next."""
        return np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n, self._n_vocab))

    def _init_sampler(self, *args: Any, **settings: Any) -> Any:
        grammar = settings.get("grammar")
        if grammar is not None and (why := grammar_fault(self.model, grammar)):
            raise ValueError(f"the grammar cannot be read: {why}")
        if (processors := settings.get("logits_processor")) is not None:
            if not isinstance(processors, Iterable):
                raise ValueError("logits_processor must be a list of functions (LogitsProcessorList)")
            settings["logits_processor"] = Watched(processors, self._watched)
        return super()._init_sampler(*args, **settings)

    def note(self, error: BaseException) -> None:
        """It was raised in what llama.cpp calls back."""
        self.failed = self.failed or error

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """What is raised in this, where no exception can leave, is raised at its end, before what it led to."""
        try:
            with heeded(self.note):
                yield
        finally:
            if self.failed is not None:
                error, self.failed = self.failed, None
                raise error

    def _watched(self, processor: Any) -> Any:
        """A logits processor whose error is not lost: llama.cpp calls it, through which none passes."""

        def call(tokens: Any, logits: Any) -> Any:
            try:
                changed = np.asarray(processor(tokens, logits))
                if changed.shape[-1:] != logits.shape or changed.size != logits.size:  # or a batch of one
                    raise ValueError(f"logits_processor: gave {changed.shape} logits for {logits.shape}")
                changed = changed.reshape(logits.shape)
            except BaseException as e:
                self.note(e)
                return logits
            return changed

        return call

    @contextlib.contextmanager
    def chain(self, **settings: Any) -> Iterator[Any]:
        """The sampler chain of the running generation, or, outside of one, a new one; `.sampler` is its pointer."""
        if self._sampler is not None:
            yield self._sampler
        else:
            with contextlib.closing(self._init_sampler(**settings)) as chain:
                yield chain

    def sample_after(self, idx: int, settings: dict[str, Any]) -> int:
        """Draw what follows token number `idx`, of which `scores` has the row.

        Raises:
            ValueError: the model keeps no rows, or there is no such token. EntmtpError: nothing was evaluated.
        """
        if not self.logits_all:
            raise ValueError("sampling before the last evaluated token needs a model with logits_all=True")
        if not 0 <= idx < self.n_tokens:
            raise ValueError(f"idx is {idx}, it must lie among the {self.n_tokens} tokens that are evaluated")
        with log.kept():
            at = llama_cpp.llama_get_logits_ith(self.ctx, -1)
        if not at:
            raise EntmtpError("there are no logits to sample from: evaluate a token first")
        row = np.ctypeslib.as_array(at, shape=(self._n_vocab,))
        kept = row.copy()
        row[:] = self.scores[idx]  # samplers draw from a context's row
        try:
            with self.chain(**settings) as chain:
                return sample(self.ctx, chain.sampler, -1)
        finally:
            row[:] = kept

    def end_chain(self) -> None:
        """The generation is over: `sample` must not go on with its seed, biases and grammar."""
        if self._sampler is not None:
            self._sampler.close()  # it refers to itself: it would stay until garbage is collected
        self._sampler = None
