"""Functions of Python in a sampler chain, which llama.cpp owns.

llama-cpp-python allocates such samplers itself, and takes them out of a chain before it is freed: where a Ctrl-C comes
between two of its steps, llama.cpp frees what it did not allocate.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import llama_cpp


@llama_cpp.llama_sampler_i_apply
def _apply(sampler: Any, candidates: Any) -> None:
    ctypes.cast(sampler.contents.ctx, ctypes.py_object).value(candidates)


_interface = llama_cpp.llama_sampler_i()
_interface.apply = _apply
# no `free`: chains are also freed between calls, where nobody hears of a Ctrl-C within it


def add(chain: Any, function: Callable[[Any], None]) -> None:
    """Put a function of `llama_token_data_array *` behind a chain (`llama_cpp._internals.LlamaSampler`), which keeps it
    for as long as it has its samplers."""
    chain.functions = [*getattr(chain, "functions", ()), function]
    sampler = llama_cpp.llama_sampler_init(ctypes.byref(_interface), ctypes.c_void_p(id(function)))
    llama_cpp.llama_sampler_chain_add(chain.sampler, sampler)
