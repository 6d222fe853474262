"""What people run today: llama-cpp-python's own loop on ggml's kernels, plain or with its prompt lookup."""

from __future__ import annotations

from typing import Any

import llama_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

from ..native import kernels
from .subject import Subject

STOCK = "llama-cpp-python"
LOOKUP = {f"{STOCK}, prompt lookup {n}": n for n in (10, 2)}  # guesses a step


def stock(like: Subject, lookup: int = 0, **more: Any) -> llama_cpp.Llama:
    """llama-cpp-python's model with the file, context, types of cache and threads of one of ours.

    Args:
        lookup: guesses that its prompt lookup makes for a step; 0: plain decoding.
        more: further arguments.
    """
    own = like.context_params
    same = {"n_threads": like.n_threads, "n_threads_batch": like.n_threads_batch}
    more = same | {"type_k": own.type_k, "type_v": own.type_v} | more
    drafter = LlamaPromptLookupDecoding(num_pred_tokens=lookup) if lookup else None
    with kernels.using(kernels.OFF):
        return llama_cpp.Llama(
            like.model_path, n_ctx=like.n_ctx(), draft_model=drafter, verbose=False, **more
        )
