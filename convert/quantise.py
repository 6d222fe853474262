"""From float32 to ggml's types: by the gguf package, and where it cannot (K-quants) by ggml itself."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int, c_int64, c_size_t, c_void_p
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from entmtp.common.errors import ConvertError
from entmtp.native import library

_BY_GGML = (GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_K, GGMLQuantizationType.Q6_K)


@functools.cache
def _ggml() -> Any:
    """ggml's quantiser, from the libraries that models run with."""
    try:
        path = library.library_path("ggml-base", library.prepare())
        if path is None:
            raise ImportError("libggml-base is not beside libentmtp")
        # size_t ggml_quantize_chunk(enum ggml_type type, const float * src, void * dst, int64_t start, int64_t nrows,
        #         int64_t n_per_row, const float * imatrix);
        function = ctypes.CDLL(str(path)).ggml_quantize_chunk
    except (ImportError, OSError, AttributeError) as e:
        raise ConvertError(
            f"K-quants need the native libraries ({e}); build them with make build, or use --outtype q4_0"
        ) from e
    function.restype = c_size_t
    function.argtypes = [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]
    return function


def quantise(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Rows of float32 [n_rows, n_cols] in a ggml type: bytes [n_rows, ..], or the values of a plain type.

    Raises:
        ConvertError: a K-quant, and the native libraries are missing.
    """
    if kind not in _BY_GGML:
        return quants.quantize(rows, kind)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows = np.ascontiguousarray(rows, np.float32)
    out = np.empty((len(rows), rows.shape[1] // block * block_bytes), np.uint8)
    written = _ggml()(int(kind), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, None)
    assert written == out.nbytes
    return out
