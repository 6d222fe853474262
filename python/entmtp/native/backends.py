"""What the libraries of this package hold: llama.cpp's commit, ggml's backends and the devices they found."""

from __future__ import annotations

import ctypes
import json
from ctypes import c_char_p, c_int, c_size_t, c_void_p
from dataclasses import dataclass
from typing import Any

from . import library

# enum ggml_backend_dev_type
KINDS = {0: "CPU", 1: "GPU", 2: "integrated GPU", 3: "accelerator"}


@dataclass(frozen=True)
class Device:
    """A device that ggml found; memory in bytes, 0 where the backend does not say."""

    name: str
    description: str
    kind: str
    free: int
    total: int


def build_info() -> dict[str, Any]:
    """How llama.cpp was built, as native/llama_cpp.py left it beside the libraries; empty if it is not there."""
    try:
        data = json.loads((library.library_folder() / "build-info.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def llama_commit() -> str:
    """The commit of llama.cpp that was built, "unknown" for a llama.cpp of the user's own."""
    return str(build_info().get("commit") or "unknown")


def ggml() -> ctypes.CDLL:
    library.load()
    path = library.library_path("ggml", library.library_folder())
    if path is None:
        raise library.LibrariesMissing(
            f"entmtp: libggml is not in {library.library_folder()}; build it with `make build` or `pip install .`"
        )
    return ctypes.CDLL(str(path))  # loaded already: this is the same one


def backends() -> dict[str, list[Device]]:
    """The devices of every backend in the libraries, of some none.

    Raises:
        ImportError: the libraries cannot be loaded.
    """
    lib = ggml()

    def call(name: str, restype: Any, *args: Any) -> Any:
        function = getattr(lib, name)
        function.restype = restype
        function.argtypes = [c_size_t if isinstance(a, int) else c_void_p for a in args]
        return function(*args)

    def text(name: str, of: c_void_p) -> str:
        return (call(name, c_char_p, of) or b"").decode("utf-8", "replace")

    found: dict[str, list[Device]] = {}
    for i in range(call("ggml_backend_reg_count", c_size_t)):
        backend = c_void_p(call("ggml_backend_reg_get", c_void_p, i))
        devices = found.setdefault(text("ggml_backend_reg_name", backend), [])
        for j in range(call("ggml_backend_reg_dev_count", c_size_t, backend)):
            device = c_void_p(call("ggml_backend_reg_dev_get", c_void_p, backend, j))
            free, total = c_size_t(), c_size_t()
            call("ggml_backend_dev_memory", None, device, ctypes.byref(free), ctypes.byref(total))
            kind = KINDS.get(call("ggml_backend_dev_type", c_int, device), "other")
            devices.append(
                Device(
                    text("ggml_backend_dev_name", device),
                    text("ggml_backend_dev_description", device),
                    kind,
                    free.value,
                    total.value,
                )
            )
    return found
