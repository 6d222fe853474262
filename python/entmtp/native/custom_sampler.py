"""Functions of Python in a sampler chain, which llama.cpp owns.

llama-cpp-python allocates such samplers itself, and takes them out of a chain before it is freed: where a Ctrl-C comes
between two of its steps, llama.cpp frees what it did not allocate.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import llama_cpp

_functions: dict[int, Callable[[Any], None]] = {}  # by the `ctx` of their samplers, until those are freed
_numbers = itertools.count(1)


@llama_cpp.llama_sampler_i_apply
def _apply(sampler: Any, candidates: Any) -> None:
    if (function := _functions.get(sampler.contents.ctx or 0)) is not None:
        function(candidates)


@llama_cpp.llama_sampler_i_free
def _free(sampler: Any) -> None:
    _functions.pop(sampler.contents.ctx or 0, None)


_interface = llama_cpp.llama_sampler_i()
_interface.apply, _interface.free = _apply, _free


def add(chain: Any, function: Callable[[Any], None]) -> None:
    """Put a function of `llama_token_data_array *` behind a chain (`llama_cpp._internals.LlamaSampler`)."""
    number = next(_numbers)
    _functions[number] = function
    sampler = llama_cpp.llama_sampler_init(ctypes.byref(_interface), ctypes.c_void_p(number))
    llama_cpp.llama_sampler_chain_add(chain.sampler, sampler)
