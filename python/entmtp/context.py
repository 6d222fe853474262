"""Around llama-cpp-python's `Llama`: types of a cache, one sequence of a context, one that is gone, quantising."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
from llama_cpp import _logger
from llama_cpp._internals import LlamaContext

from .common.errors import CLOSED, ClosedError, ConvertError
from .common.kv_types import CACHE_TYPES
from .models.base import files_of
from .models.formats.gguf_header import TensorInfo, read_gguf_header


def check_adapter(path: Path, model: Path) -> None:
    """Refuse a LoRA adapter that llama.cpp would take and end the process with at the first text.

    Raises:
        ValueError: names the tensor, or what is wrong with the file.
    """
    try:
        header = read_gguf_header(path)
    except ConvertError as e:
        raise ValueError(f"lora_path: {e}") from None
    stacks: dict[str, int] = {}  # of matrices, one for each expert
    for name, tensor in header.tensors.items():
        is_weight = tensor.type.name in ("F32", "F16", "BF16") or gguf.GGML_QUANT_SIZES[tensor.type][0] > 1
        n = tensor.shape[2] if len(tensor.shape) > 2 else 1
        if n > 1 and not stacks:
            stacks = {t.name: t.shape[2] for file in files_of(model) for t in _stacks(file)}
        if not is_weight or len(tensor.shape) > 3 or n not in (1, stacks.get(name.rpartition(".")[0])):
            shape = " x ".join(map(str, tensor.shape))
            raise ValueError(
                f"lora_path: {path}: {name} is {shape} of {tensor.type.name}, no matrix of weights"
            )


def _stacks(file: Path) -> list[TensorInfo]:
    return [tensor for tensor in read_gguf_header(file).tensors.values() if len(tensor.shape) == 3]


class Gone:
    """In place of what a closed model has no more."""

    def __getattr__(self, name: str) -> Any:
        raise ClosedError(CLOSED)


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


def context_of(model: Any, params: Any, verbose: bool = True) -> Any:
    """A context of llama-cpp-python, in whose passes whole batches fit where tokens see later ones, or are pooled:
    llama.cpp ends the process over a text that does not fit there."""
    arch = _told(model, "general.architecture")
    is_causal = _told(model, f"{arch}.attention.causal") != "false"
    sees_all = params.attention_type == llama_cpp.LLAMA_ATTENTION_TYPE_NON_CAUSAL
    if params.embeddings or sees_all or not is_causal or llama_cpp.llama_model_has_encoder(model.model):
        params.n_ubatch = params.n_batch
    return LlamaContext(model=model, params=params, verbose=verbose)


def _told(model: Any, key: str) -> str:
    """By the model's file, of which other values may be no UTF-8."""
    value = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_meta_val_str(model.model, key.encode(), value, len(value))
    return value.value.decode("utf-8", "replace")


def cache_types(given: dict[str, Any]) -> dict[str, Any]:
    """Types of the cache as numbers, where arguments of `Llama` name them, and the flash attention that quantised
    values want.

    Raises:
        ValueError: there is no such type, or flash attention is not wanted.
    """
    types = {name: given[name] for name in ("type_k", "type_v") if given.get(name) is not None}
    known = {name: int(gguf.GGMLQuantizationType[name.upper()]) for name in CACHE_TYPES}
    for name, value in types.items():
        number = known.get(value.lower(), -1) if isinstance(value, str) else value
        if number not in known.values():
            raise ValueError(
                f"{name} is {value!r}, it must be a type that a cache can have: {', '.join(known)}"
            )
        types[name] = number
    sizes = {int(quant): block for quant, (block, _) in gguf.GGML_QUANT_SIZES.items()}
    if sizes.get(types.get("type_v", 0), 1) == 1:
        return types
    if given.get("flash_attn") is False:
        raise ValueError(
            "quantised values in the cache need flash attention; leave flash_attn out, or type_v"
        )
    return {**types, "flash_attn": True}


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


class Processors(llama_cpp.LogitsProcessorList):
    """Several, which a logit bias joins: llama-cpp-python takes what `extend` returns for all of them."""

    def extend(self, others: Any) -> Any:
        return Processors([*self, *others])


class Watched:
    """Logits processors, each through `watch`; a list that grows meanwhile is followed, as in llama-cpp-python."""

    def __init__(self, processors: Any, watch: Callable[[Any], Any]):
        self._processors, self._watch = processors, watch

    def __iter__(self) -> Iterator[Any]:
        return map(self._watch, self._processors)
