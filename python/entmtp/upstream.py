"""llama-cpp-python's `Llama` as ours needs it: all that is used of it without being published, in one place.

Read in version 0.3.36, which pyproject.toml pins. Where that version moves, tests/decode/test_upstream.py names what is
missing, and this file is what has to be looked at.
"""

from __future__ import annotations

import threading
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt

# What of `llama_cpp.Llama` is used, and what for.
NEEDS = {
    "input_ids": "tokens evaluated so far, [n_ctx]: `generate` compares a prompt with them",
    "n_tokens": "how many there are",
    "scores": "logits by token with logits_all, [n_ctx, n_vocab]: logprobs are read from them",
    "n_batch": "tokens that one call may evaluate",
    "tokenizer_": "replaced by one that does not detokenise the same text again and again",
    "_requires_eval": "the last token's logits are not there: `generate` must not sample before it evaluates",
    "_logits_all": "the argument logits_all",
    "_n_vocab": "width of a row of logits",
    "_ctx": "wrapper of the context: get_logits()",
    "_model_params": "parameters of the model, set through `model_params` before it is loaded",
    "_sampler": "the sampler chain of the running `generate`, with its pointer `sampler`",
    "_init_sampler": "makes such a chain from the arguments of `sample`",
}

# llama-cpp-python points stdout and stderr of the whole process elsewhere while it loads a model quietly: two threads
# at that at once could leave them there
_loading = threading.Lock()


class Upstream(llama_cpp.Llama):
    """`llama_cpp.Llama`, with public names for what ours builds upon."""

    def __init__(self, model_path: str, **kwargs: Any):
        self._stale = True
        with _loading:
            super().__init__(model_path, **kwargs)

    def prepare_model(self, params: Any) -> None:
        """Called with the `llama_model_params` before the model is loaded, to change them."""

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
    def vocab_size(self) -> int:
        """Width of a row of logits."""
        return int(self._n_vocab)

    def rows(self, n: int) -> npt.NDArray[np.single]:
        """Logits of the last batch of n tokens, [n, n_vocab]; valid until the next."""
        return np.ctypeslib.as_array(self._ctx.get_logits(), shape=(n, self._n_vocab))

    def chain(self, **settings: Any) -> Any:
        """The sampler chain of the running generation, or, outside of one, a new one; `.sampler` is its pointer."""
        return self._sampler if self._sampler is not None else self._init_sampler(**settings)


def is_readable_grammar(model: Any, grammar: Any, root: str = "root") -> bool:
    """Whether llama.cpp can read a `LlamaGrammar`; llama-cpp-python would go on without it, or end the process.

    Args:
        model: `llama_model *` whose vocabulary it is for.
        root: name of its first rule.
    """
    vocab = llama_cpp.llama_model_get_vocab(model)
    sampler = llama_cpp.llama_sampler_init_grammar(vocab, grammar._grammar.encode(), root.encode())
    if not sampler:
        return False
    llama_cpp.llama_sampler_free(sampler)
    return True
