"""llama-cpp-python's `Llama` as ours needs it: all that is used of it without being published, in one place.

Read in version 0.3.36, which pyproject.toml pins. Where that version moves, tests/decode/test_upstream.py names what is
missing, and this file is what has to be looked at.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import logging
import math
import random
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import numpy.typing as npt
from llama_cpp import _logger
from llama_cpp.llama_grammar import json_schema_to_gbnf

from .common.errors import NO_CONTEXT
from .common.json_schema import check_schema
from .models.tokenizer import Tokenizer, check_tokens

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
    "_ctx": "wrapper of the context: get_logits(), kv_cache_seq_rm(), close()",
    "model_params": "parameters of the model, set before it is loaded",
    "context_params": "parameters of the context, set before the arguments are put into them",
    "_n_ctx": "tokens that a text may have, [input_ids]",
    "_is_recurrent": "the memory holds a state, not cells",
    "_is_hybrid": "it holds both",
    "_stack": "what is freed with the object",
    "_sampler": "the sampler chain of the running `generate`, with its pointer `sampler` and close()",
    "_init_sampler": "makes such a chain from the arguments of `sample`",
}

# enum ggml_log_level; llama-cpp-python reads an older one, by which warnings are errors and errors are nothing
LEVELS = {1: logging.DEBUG, 2: logging.INFO, 3: logging.WARNING, 4: logging.ERROR}
LONGEST_GRAMMAR = 1 << 18  # characters
CONTINUED = 5  # belongs to the message before
# what llama.cpp reports as an error where a pass was stopped (GGML_STATUS_ABORTED), which is none
STOPPED = (b"compute status: 1\n", b"failed with error 1\n")

# llama-cpp-python points stdout and stderr of the whole process elsewhere while it loads a model quietly: two threads
# at that at once could leave them there
_loading = threading.Lock()

_shown = False  # the last message
_error = ""  # the last one that was an error


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, _: Any) -> None:
    """llama.cpp's messages on stderr: all with verbose=True, else errors."""
    global _shown, _error
    if LEVELS.get(level) == logging.ERROR:
        _error = text.decode("utf-8", "replace").strip()
    if level != CONTINUED:
        quiet = _logger.logger.level > logging.DEBUG
        _shown = _logger.logger.level <= LEVELS.get(level, logging.DEBUG) and not (
            quiet and text.endswith(STOPPED)
        )
    if _shown:
        print(text.decode("utf-8", "replace"), end="", flush=True, file=sys.stderr)


llama_cpp.llama_log_set(_log, None)


@contextlib.contextmanager
def said() -> Iterator[None]:
    """Why a context cannot be made, as llama.cpp says it, is in the error, too."""
    global _error
    _error = ""
    try:
        yield
    except ValueError as e:
        if "llama_context" not in str(e):
            raise
        why = _error.partition(": ")[2] or "memory may be too small, or the model cannot have such a cache"
        raise ValueError(f"{NO_CONTEXT}: {why}") from e


class SequenceContext:
    """A context as llama-cpp-python sees it, reduced to one of its sequences, which a decoder looks after."""

    def __init__(self, shared: Any, n_ctx: int):
        self._shared, self._n_ctx = shared, n_ctx

    def n_ctx(self) -> int:
        return self._n_ctx

    def kv_cache_seq_rm(self, seq_id: int, p0: int, p1: int) -> bool:
        """The decoder cuts its sequence back itself, when it evaluates what comes next."""
        return True

    def kv_cache_clear(self) -> None:
        raise ValueError("the cache holds the texts of others, too")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shared, name)


def cache_types(given: dict[str, Any]) -> dict[str, Any]:
    """Types of the cache as numbers, where arguments of `Llama` name them, and the flash attention that quantised
    values want.

    Raises:
        ValueError: there is no such type, or flash attention is not wanted.
    """
    types = {name: given[name] for name in ("type_k", "type_v") if given.get(name) is not None}
    for name, value in types.items():
        if isinstance(value, str):
            if value.upper() not in gguf.GGMLQuantizationType.__members__:
                raise ValueError(f"{name} is {value!r}, which is no type of ggml, such as f16 or q8_0")
            types[name] = int(gguf.GGMLQuantizationType[value.upper()])
    sizes = {int(quant): block for quant, (block, _) in gguf.GGML_QUANT_SIZES.items()}
    if sizes.get(types.get("type_v", 0), 1) == 1:
        return types
    if given.get("flash_attn") is False:
        raise ValueError(
            "quantised values in the cache need flash attention; leave flash_attn out, or type_v"
        )
    return {**types, "flash_attn": True}


class Upstream(llama_cpp.Llama):
    """`llama_cpp.Llama`, with public names for what ours builds upon."""

    def __init__(self, model_path: str, **kwargs: Any):
        self._stale = True
        self._warned: set[str] = set()
        if kwargs.get("seed") == -1:  # documented as random; llama-cpp-python begins with a fixed one
            kwargs["seed"] = random.randrange(1, 1 << 32)
        with _loading, said():
            super().__init__(model_path, **{**kwargs, **cache_types(kwargs)})
        # llama.cpp rounds small contexts up, llama-cpp-python's arrays are as long as the argument says
        if len(self.input_ids) < self.n_ctx():
            self.input_ids = np.zeros(self.n_ctx(), dtype=np.intc)
            if self.logits_all:
                self.scores = np.zeros((self.n_ctx(), self.vocab_size), dtype=np.single)
        if not self.logits_all:
            # none are kept; llama-cpp-python has a row for every token of a batch, and copies as many into each state
            self.scores = np.zeros((1, self.vocab_size), dtype=np.single)

    def begin_as(self, other: Upstream, n_ctx: int) -> None:
        """Share the model and the context of another, in place of `__init__`, for a text of up to n_ctx tokens."""
        self.__dict__.update(other.__dict__, _ctx=SequenceContext(other._ctx, n_ctx), _n_ctx=n_ctx)
        self._stack = contextlib.ExitStack()  # the other frees them
        self.input_ids = np.zeros(n_ctx, dtype=np.intc)
        self.n_tokens = 0
        self._sampler = None
        self._stale = True
        self._warned = set()

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
        self._ctx.close()

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
        if not self.logits_all and len(state.scores) > 1:
            state = copy.copy(state)  # of a model that keeps them, or of llama-cpp-python's
            state.scores = state.scores[:1]
        super().load_state(state)

    @property
    def vocab_size(self) -> int:
        """Width of a row of logits."""
        return int(self._n_vocab)

    def create_completion(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        """As `llama_cpp.Llama.create_completion`; what it would pass over in silence is a ValueError."""
        check_request(self, kwargs)
        if not isinstance(prompt, str):
            self.check_tokens(prompt)
        if processors := kwargs.get("logits_processor"):
            kwargs["logits_processor"] = Processors(processors)
        ending = kwargs.get("stopping_criteria")
        if not isinstance(ending, Ending):
            ending = Ending(args, kwargs)
        answer: Any = super().create_completion(prompt, *args, **{**kwargs, "stopping_criteria": ending})
        if ending.early and not ending.streamed:
            answer["choices"][0]["finish_reason"] = "length"
        return answer

    def create_chat_completion(self, messages: Any, *args: Any, **kwargs: Any) -> Any:
        """As `llama_cpp.Llama.create_chat_completion`; what it would pass over in silence is a ValueError."""
        if not messages:
            raise ValueError("messages are empty: there is nothing to answer")
        check_request(self, kwargs)
        return super().create_chat_completion(messages, *args, **kwargs)

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

    @contextlib.contextmanager
    def chain(self, **settings: Any) -> Iterator[Any]:
        """The sampler chain of the running generation, or, outside of one, a new one; `.sampler` is its pointer."""
        if self._sampler is not None:
            yield self._sampler
        else:
            with contextlib.closing(self._init_sampler(**settings)) as chain:
                yield chain

    def end_chain(self) -> None:
        """The generation is over: `sample` must not go on with its seed, biases and grammar."""
        if self._sampler is not None:
            self._sampler.close()  # it refers to itself: it would stay until garbage is collected
        self._sampler = None


def requantise(source: str | Path, target: str | Path, ftype: int) -> bool:
    """Write a model in another type by llama.cpp's quantiser, in silence; whether it could.

    Args:
        ftype: of enum llama_ftype.
    """
    _logger.set_verbose(False)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = ftype
    return (
        llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    )


LONGEST_REST = 3  # tokens beyond max_tokens that an answer may have, for the rest of a character


def most_tokens(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """`max_tokens` among the arguments of `create_completion` behind the prompt; None: as many as fit."""
    most = args[1] if len(args) > 1 else kwargs.get("max_tokens", 16)
    return None if most is None or most <= 0 else int(most)


class Ending:
    """A completion's stopping criteria, and whether its generation ended before it was told to.

    llama-cpp-python asks them once more behind the last token, and leaves an answer without its text where nothing
    ended it: neither a limit, nor an end of text, nor they. It looks at no limit while a character is not complete.

    Attributes:
        stops: criteria of the user, None for none.
        record: what keeps log probabilities on the way (`Logprobs`), None for nothing.
        early: it was cancelled, or nothing more fits, or is allowed, in the middle of a character; set by `generate`.
    """

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any], record: Any = None):
        self.stops: Callable[[Any, Any], bool] | None = kwargs.get("stopping_criteria")
        self.streamed, self.most = bool(kwargs.get("stream")), most_tokens(args, kwargs)
        self.record, self.early = record, False

    def __call__(self, tokens: Any, logits: Any) -> bool:
        if self.early:
            return not self.streamed  # what is streamed was given
        return self.stops is not None and len(tokens) > 0 and bool(self.stops(tokens, logits))

    @classmethod
    def of(cls, kwargs: dict[str, Any]) -> Ending | None:
        """That of the completion which calls `generate`, if one does; only criteria of the user stay."""
        ending = kwargs.get("stopping_criteria")
        if not isinstance(ending, cls):
            return None
        kwargs["stopping_criteria"] = ending.stops
        return ending

    def must_end(self, n_drawn: int, n_free: int) -> bool:
        """Whether the last token was the last one, with so many drawn and room for so many more in the context."""
        self.early = n_free < 1 or (self.most is not None and n_drawn >= self.most + LONGEST_REST)
        return self.early


class Processors(llama_cpp.LogitsProcessorList):
    """Several, which a logit bias joins: llama-cpp-python takes what `extend` returns for all of them."""

    def extend(self, others: Any) -> Any:
        return Processors([*self, *others])


def is_readable_grammar(model: Any, grammar: Any) -> bool:
    """Whether llama.cpp can read a `LlamaGrammar`; llama-cpp-python would go on without it, or end the process.

    Args:
        model: `llama_model *` whose vocabulary it is for.
    """
    vocab = llama_cpp.llama_model_get_vocab(model)
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar._grammar.encode(), grammar._root.encode())
    if not sampler:
        return False
    llama_cpp.llama_sampler_free(sampler)
    return True


def grammar_of_text(text: str) -> Any:
    """A `LlamaGrammar` of GBNF.

    Raises:
        ValueError: it is too long to be read while others wait.
    """
    if len(text) > LONGEST_GRAMMAR:
        raise ValueError(f"grammar: it has {len(text)} characters, it may have {LONGEST_GRAMMAR}")
    return llama_cpp.LlamaGrammar.from_string(text, verbose=False)


def grammar_of_schema(schema: Any) -> Any:
    """A `LlamaGrammar` that answers follow a JSON schema by.

    Raises:
        ValueError: the schema has a part that no grammar is made of; the text names it.
    """
    check_schema(schema)
    if len(written := json.dumps(schema)) > LONGEST_GRAMMAR:
        raise ValueError(f"schema: it has {len(written)} characters, it may have {LONGEST_GRAMMAR}")
    try:
        return grammar_of_text(json_schema_to_gbnf(written))
    except Exception as e:  # the converter's own: assertions, keys and types
        raise ValueError(f"schema: no grammar can be made of this JSON schema: {e}") from None


def check_request(llm: Upstream, settings: dict[str, Any]) -> None:
    """Refuse what llama-cpp-python would pass over in silence.

    Args:
        settings: arguments of `create_completion` or `create_chat_completion`.

    Raises:
        ValueError: with one sentence for the user.
    """
    n_vocab = llm.n_vocab()
    if len(settings.get("logit_bias") or {}) > n_vocab:
        raise ValueError(f"logit_bias has more entries than there are tokens, {n_vocab}")
    for key, value in (settings.get("logit_bias") or {}).items():
        try:
            token, bias = int(key), float(value)
        except (TypeError, ValueError):
            token, bias = -1, math.nan
        if not 0 <= token < n_vocab or math.isnan(bias):
            raise ValueError(f"logit_bias: {key!r}: {value!r} is no bias of a token from 0 to {n_vocab - 1}")
    temperature = settings.get("temperature")
    if temperature is not None and not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature:g}, it must be 0 or more")
    form = settings.get("response_format") or {}
    if form.get("type") == "json_object" and form.get("schema") is not None:
        grammar_of_schema(form["schema"])
    functions = {}
    for tool in settings.get("tools") or []:
        function = tool.get("function") or {}
        if not function.get("name"):
            raise ValueError(f"tools: {tool!r} names no function")
        functions[function["name"]] = function
    choice = settings.get("tool_choice")
    if isinstance(choice, dict):
        wanted = (choice.get("function") or {}).get("name")
        if wanted not in functions:
            raise ValueError(f"tool_choice: there is no {wanted!r} in tools")
        grammar_of_schema(functions[wanted].get("parameters", {"type": "object"}))
