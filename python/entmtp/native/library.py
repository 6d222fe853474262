"""Finds the native libraries and makes sure that a process holds one llama.cpp, ours."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path


class LibrariesMissing(ImportError):
    """The native libraries were not built."""


# what builds for a GPU need at run time, and what to do where it is missing
_NEEDED = {
    "libcuda.so": "install NVIDIA's driver, or, to run without one, build with -DGGML_CUDA_NO_VMM=ON",
    "libcublas": "install CUDA, or `pip install nvidia-cublas` of the version that it was built with",
    "libcudart": "install CUDA, or `pip install nvidia-cuda-runtime` of the version that it was built with",
    "libvulkan": "install the Vulkan loader (on Debian and Ubuntu: apt install libvulkan1)",
}

_NAMES = {"darwin": ("lib{}.dylib", "lib{}.so"), "win32": ("{}.dll", "lib{}.dll")}


def library_path(name: str, folder: Path) -> Path | None:
    """The shared library `name` in `folder`, or None."""
    for pattern in _NAMES.get(sys.platform, ("lib{}.so",)):
        path = folder / pattern.format(name)
        if path.exists():
            return path
    return None


def library_folder() -> Path:
    """Folder of libentmtp, libllama and the ggml libraries.

    `ENTMTP_LIB_PATH` names another build's.

    Raises:
        LibrariesMissing: they are not there.
    """
    override = os.environ.get("ENTMTP_LIB_PATH")
    # an editable install keeps the libraries in site-packages, away from the sources: look along the package's path
    package = sys.modules["entmtp"]
    folders = [Path(override)] if override else [Path(p) / "lib" for p in package.__path__]
    for folder in folders:
        if library_path("entmtp", folder) and library_path("llama", folder):
            return folder.resolve()
    where = " or ".join(str(f) for f in folders)
    raise LibrariesMissing(
        f"entmtp: libentmtp and libllama are not in {where}; build them with `make build` or `pip install .`"
    )


def prepare() -> Path:
    """Make llama_cpp load our libllama when it is imported, before or after this package's own modules.

    Raises:
        ImportError: llama_cpp was imported before with other libraries, or the libraries are missing.
    """
    folder = library_folder()

    loaded = sys.modules.get("llama_cpp.llama_cpp")
    if loaded is not None:
        theirs = Path(str(loaded._base_path)).resolve()
        if theirs != folder:
            raise ImportError(
                f"entmtp: llama_cpp was imported before, with the libraries in {theirs}; "
                "a process can hold one llama.cpp only, so import entmtp first"
            )
    os.environ["LLAMA_CPP_LIB_PATH"] = str(folder)
    return folder


def load() -> ctypes.CDLL:
    """Load libentmtp, and through llama_cpp the libllama beside it.

    Raises:
        ImportError: see `prepare`; or a library of the system that ours need is missing.
    """
    folder = prepare()

    if sys.platform == "win32":
        os.add_dll_directory(str(folder))

    try:
        import llama_cpp  # noqa: F401  (loads libllama, which libentmtp then shares)
    except RuntimeError as e:  # of its loader: a library that ours need is not there
        mend = next((mend for name, mend in _NEEDED.items() if name in str(e)), "see docs/build.md")
        raise ImportError(f"entmtp: {e}; {mend}") from e

    path = library_path("entmtp", folder)
    assert path is not None
    return ctypes.CDLL(str(path))


def load_llama() -> ctypes.CDLL:
    """libllama itself, the one that llama_cpp uses: for what our patches add to it."""
    path = library_path("llama", library_folder())
    assert path is not None
    return ctypes.CDLL(str(path))
