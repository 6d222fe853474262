"""CPU kernels for passes of few tokens: which there are, and the switch. docs/kernels.md"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from . import abi

OFF = "off"


def available() -> list[str]:
    """Kernels that this processor can run, best first; the last is portable and slow."""
    names: list[str] = []
    while (name := abi.kernels_name(len(names))) is not None:
        names.append(name.decode())
    return names


def current() -> str:
    """The kernels that take part in what is loaded now, or `"off"`."""
    name = abi.kernels_current()
    return OFF if name is None else str(name.decode())


def use(name: str | None = None) -> None:
    """Choose the kernels for models loaded from now on, and for attention on the CPU, in the whole process.

    Args:
        name: one of `available()`, `"off"` for ggml's own, `"auto"` for the best of this processor. None: what
            the environment variable ENTMTP_KERNELS says, else `"auto"`.

    Raises:
        ValueError: this processor has no such kernels.
    """
    name = name or os.environ.get("ENTMTP_KERNELS") or "auto"
    if name in (OFF, "0"):
        abi.kernels_disable()
    elif name == "auto" and available()[0] == "portable":
        abi.kernels_disable()  # ggml has its own for this processor, which are faster than plain C++
    elif abi.kernels_enable(None if name in ("auto", "1") else name.encode()) != abi.OK:
        raise ValueError(f"kernels: {abi.last_error()}, or off")


@contextmanager
def using(name: str) -> Iterator[None]:
    """`use(name)`, and back."""
    before = current()
    use(name)
    try:
        yield
    finally:
        use(before)


def hold(embeddings: bool = False, locked: bool = False) -> None:
    """How the weights of models that are loaded from now on are held, in the whole process.

    Args:
        embeddings: token embeddings are packed, too: where they are also the output projection, they are held once. It
            costs memory where they are not and the file is mapped.
        locked: the system must keep packed weights in memory.
    """
    abi.kernels_hold(embeddings, locked)


def unlocked() -> int:
    """Bytes since the last `hold(locked=True)` that the system did not lock."""
    return int(abi.kernels_unlocked())


def of_type(number: int) -> str:
    """How products with matrices of a `ggml_type` are computed while kernels are on.

    Returns:
        `"panels"`: by kernels for passes of few tokens; `"rows"`: row by row, as ggml with one token, so that several
        tokens cost several times as much; both give the same bits in a pass of any size. `"ggml"`: in ggml's own ways.
    """
    return ("ggml", "rows", "panels")[abi.kernels_of(number)]


def missed() -> int:
    """Products on the CPU that ggml computed itself so far, while kernels were on."""
    return int(abi.kernels_missed())


def machine_peaks(n_threads: int) -> tuple[float, float]:
    """What this machine can do: bytes per second from memory, and int8 multiply-adds per second (0: unknown)."""
    read, macs = ctypes.c_double(), ctypes.c_double()
    abi.check(abi.machine_peaks(n_threads, ctypes.byref(read), ctypes.byref(macs)))
    return read.value, macs.value
