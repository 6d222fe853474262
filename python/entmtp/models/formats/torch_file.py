"""Read the tensors of a PyTorch file (`torch.save`) without PyTorch and without running anything it holds.

Such a file is a zip archive: `<name>/data.pkl` is a pickle that describes the tensors, `<name>/data/<key>` are
their bytes. A pickle is a program for a small stack machine. The one here knows the few operations that
`torch.save` writes for a dict of tensors, and builds nothing but strings, numbers, containers and tensor
descriptions: a name in the pickle is only ever compared with a list, never imported, so there is nothing to run.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...common.errors import ConvertError
from .tensors import SourceTensor, Storage

MAX_PICKLE_BYTES = 2 << 20  # a model of 1,000 tensors needs about 0.2 MB
MAX_DIMS = 8
MAX_SIZE = 1 << 48  # larger dimensions, strides and offsets are nonsense
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"

# storage class in module `torch`: dtype, bytes per element
STORAGES = {
    "FloatStorage": ("float32", 4), "HalfStorage": ("float16", 2), "BFloat16Storage": ("bfloat16", 2),
    "DoubleStorage": ("float64", 8), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
}  # fmt: skip

# every name that a pickle may mention
ALLOWED = {
    "collections.OrderedDict",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    *(f"torch.{name}" for name in STORAGES),
}


@dataclass(frozen=True)
class _Global:
    """A name that the pickle mentions. It stands for itself and cannot be called."""

    name: str


@dataclass(frozen=True)
class _StorageRef:
    dtype: str
    itemsize: int
    storage: Storage


@dataclass(frozen=True)
class _TensorRef:
    storage: _StorageRef
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_MARK = object()
_PUSH = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_CONSTANT: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "MARK": lambda: _MARK,
}  # fmt: skip
_TUPLE = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _size(value: object) -> bool:
    """Whether a value can be a dimension, stride or offset. (bool is an int in Python, but not here.)"""
    return type(value) is int and 0 <= value < MAX_SIZE


class _Machine:
    """Runs one pickle. `find_storage(key, itemsize, numel)` gives the bytes of a storage."""

    def __init__(self, label: str, find_storage: Callable[[str, int, int], Storage]):
        self.label = label
        self.find_storage = find_storage
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def refuse(self, what: str) -> ConvertError:
        return ConvertError(
            f"{self.label}: the file {what}, which a checkpoint of plain tensors never does; nothing of it was run; "
            "get the file from its author, or save the state dict alone again with torch.save"
        )

    def run(self, pickle: bytes) -> Any:
        """Return what the pickle builds. Raises ConvertError for anything but plain tensors in plain containers."""
        try:
            for op, arg, _pos in pickletools.genops(io.BytesIO(pickle)):
                if op.name == "STOP":
                    return self.stack.pop()
                self.step(op.name, arg)
        except (ValueError, IndexError, KeyError, TypeError, UnicodeError, OverflowError, struct.error) as e:
            raise ConvertError(
                f"{self.label}: data.pkl is damaged ({type(e).__name__}); download the file again"
            ) from e
        raise ConvertError(f"{self.label}: data.pkl ends too early; download the file again")

    def pop_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise ValueError("no mark")

    def pop_n(self, n: int) -> list[Any]:
        if n > len(self.stack):
            raise IndexError("stack is empty")
        items = self.stack[-n:]
        del self.stack[-n:]
        return items

    def step(self, op: str, arg: Any) -> None:
        stack = self.stack
        if op in _PUSH:
            stack.append(arg)
        elif op in _CONSTANT:
            stack.append(_CONSTANT[op]())
        elif op in ("BINPUT", "LONG_BINPUT"):
            self.memo[arg] = stack[-1]
        elif op == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif op in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[arg])
        elif op == "TUPLE":
            stack.append(tuple(self.pop_mark()))
        elif op in _TUPLE:
            stack.append(tuple(self.pop_n(_TUPLE[op])))
        elif op in ("GLOBAL", "STACK_GLOBAL"):
            names = arg.split(" ", 1) if op == "GLOBAL" else self.pop_n(2)
            if not all(type(name) is str for name in names):
                raise self.refuse("asks for something whose name is not a string (operation STACK_GLOBAL)")
            name = ".".join(names)
            if name not in ALLOWED:
                raise self.refuse(f"asks for '{name[:100]}'")
            stack.append(_Global(name))
        elif op == "BINPERSID":
            stack.append(self.storage(stack.pop()))
        elif op == "REDUCE":
            func, args = self.pop_n(2)
            stack.append(self.reduce(func, args))
        elif op == "BUILD":  # attributes of an OrderedDict (`_metadata`): not needed
            self.pop_n(1)
            if not isinstance(stack[-1], dict):
                raise self.refuse("sets the state of an object that is not a dict (operation BUILD)")
        elif op in ("SETITEM", "SETITEMS"):
            items = self.pop_mark() if op == "SETITEMS" else self.pop_n(2)
            self.set_items(stack[-1], items)
        elif op in ("APPEND", "APPENDS"):
            items = self.pop_mark() if op == "APPENDS" else self.pop_n(1)
            if not isinstance(stack[-1], list):
                raise self.refuse(f"appends to something that is not a list (operation {op})")
            stack[-1].extend(items)
        elif op not in ("PROTO", "FRAME"):
            raise self.refuse(f"uses the pickle operation {op}")

    def set_items(self, target: Any, items: list[Any]) -> None:
        if type(target) is not dict or len(items) % 2:
            raise self.refuse("sets items of something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.refuse("uses a dict key that is neither a string nor a number")
            target[key] = value

    def reduce(self, func: Any, args: Any) -> Any:
        name = func.name if isinstance(func, _Global) else None
        if name is None or type(args) is not tuple:
            raise self.refuse("calls something that is not a function (operation REDUCE)")
        if name == "collections.OrderedDict" and args == ():
            return {}
        if name == "torch._utils._rebuild_parameter" and args and isinstance(args[0], _TensorRef):
            return args[0]
        if name == "torch._utils._rebuild_tensor_v2" and len(args) in (6, 7):
            return self.tensor(*args[:4])
        raise self.refuse(f"calls '{name}' with arguments that do not belong to it")

    def storage(self, pid: Any) -> _StorageRef:
        if (
            type(pid) is not tuple
            or len(pid) != 5
            or pid[0] != "storage"
            or not (isinstance(pid[1], _Global) and pid[1].name.removeprefix("torch.") in STORAGES)
            or type(pid[2]) is not str
            or not _size(pid[4])
        ):
            raise self.refuse("describes a storage in a form that torch.save does not write")
        dtype, itemsize = STORAGES[pid[1].name.removeprefix("torch.")]
        return _StorageRef(dtype, itemsize, self.find_storage(pid[2], itemsize, pid[4]))

    def tensor(self, ref: Any, offset: Any, shape: Any, strides: Any) -> _TensorRef:
        if (
            not isinstance(ref, _StorageRef)
            or not _size(offset)
            or type(shape) is not tuple
            or type(strides) is not tuple
            or len(shape) != len(strides)
            or len(shape) > MAX_DIMS
            or not all(_size(n) for n in (*shape, *strides))
        ):
            raise self.refuse("describes a tensor with an impossible shape, stride or offset")
        if all(shape):
            last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
            if (last + 1) * ref.itemsize > ref.storage.nbytes:
                raise self.refuse("describes a tensor that reaches beyond its stored bytes")
        return _TensorRef(ref, offset, shape, strides)


class _Archive:
    """The zip file around the pickle, with every entry's place in the file checked."""

    def __init__(self, path: Path):
        self.path, self.label = path, path.name
        self.file_size = path.stat().st_size
        self.check_start()
        try:
            with zipfile.ZipFile(path) as archive:
                self.entries = self.check_entries(archive.infolist())
                self.pickle = self.read_small(archive, "data.pkl", MAX_PICKLE_BYTES)
                order = (
                    self.read_small(archive, "byteorder", 64) if "byteorder" in self.entries else b"little"
                )
        except (
            zipfile.BadZipFile,
            NotImplementedError,
            EOFError,
            RuntimeError,
            struct.error,
            ValueError,
            OSError,  # a place before the file's beginning
        ) as e:
            raise ConvertError(
                f"{self.label}: the file is truncated or damaged ({e}); download or copy it again"
            ) from e
        if order.strip() != b"little":
            raise ConvertError(
                f"{self.label}: the weights were saved on a big-endian machine, which is not supported; load and save "
                "them again with torch on a little-endian machine"
            )

    def check_start(self) -> None:
        with open(self.path, "rb") as f:
            start = f.read(64)
        if start.startswith(LEGACY_MAGIC):
            raise ConvertError(
                f"{self.label}: the file is in PyTorch's old format (before 1.6); load it and save it again with "
                "torch.save of a recent version"
            )
        if not start.startswith(b"PK\x03\x04"):
            raise ConvertError(
                f"{self.label}: this is not a PyTorch checkpoint (no zip archive); check that the file was "
                "downloaded whole and is what its name says"
            )

    def check_entries(self, infos: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
        """Return the entries by their name below the archive's one top folder."""
        pickles = [info.filename for info in infos if info.filename.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ConvertError(
                f"{self.label}: this is not a PyTorch checkpoint (a zip archive with {len(pickles)} files named "
                "data.pkl in place of one); give the file that torch.save wrote"
            )
        root = pickles[0].removesuffix("data.pkl")
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in infos:
            if (
                info.compress_type != zipfile.ZIP_STORED
                or info.flag_bits & 1
                or info.compress_size != info.file_size
            ):
                raise ConvertError(
                    f"{self.label}: '{info.filename}' is compressed or encrypted, and torch.save stores files as "
                    "they are; load and save it again with torch.save"
                )
            name = info.filename.removeprefix(root)
            if name in entries or not info.filename.startswith(root):
                raise ConvertError(
                    f"{self.label}: the archive holds '{info.filename}' twice or outside its folder, so it was not "
                    "written by torch.save; get the file from its author"
                )
            entries[name] = info
        return entries

    def read_small(self, archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
        info = self.entries[name]
        if info.file_size > limit:
            raise ConvertError(
                f"{self.label}: {name} takes {info.file_size} bytes and at most {limit} are read; a checkpoint of "
                "plain tensors needs far fewer, save the state dict alone again with torch.save"
            )
        return archive.read(info)

    def data_offset(self, info: zipfile.ZipInfo) -> int:
        """Offset in bytes of an entry's content, from its local header."""
        with open(self.path, "rb") as f:
            f.seek(info.header_offset)
            header = f.read(30)
            if len(header) == 30 and header.startswith(b"PK\x03\x04"):
                n_name, n_extra = struct.unpack("<HH", header[26:30])
                start = info.header_offset + 30 + n_name + n_extra
                name = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437", "replace")
                if f.read(n_name) == name and start + info.file_size <= self.file_size:
                    return start
        raise ConvertError(
            f"{self.label}: the file is truncated or damaged at '{info.filename}'; download or copy it again"
        )

    def storage(self, key: str) -> Storage:
        info = self.entries.get(f"data/{key}")
        if info is None:
            raise ConvertError(
                f"{self.label}: the weights 'data/{key}' are missing from the file; download or copy it again"
            )
        return Storage(self.path, self.label, self.data_offset(info), info.file_size, info.CRC)


def read_torch_file(path: Path) -> dict[str, SourceTensor]:
    """Return the tensors of a file written by `torch.save(dict_of_tensors)`, by name, not loaded.

    Raises ConvertError when the file is damaged, not such a file, or holds more than plain tensors.
    """
    archive = _Archive(path)
    storages: dict[str, Storage] = {}

    def find_storage(key: str, itemsize: int, numel: int) -> Storage:
        if key not in storages:
            storages[key] = archive.storage(key)
        if numel * itemsize > storages[key].nbytes:
            raise ConvertError(
                f"{archive.label}: the weights 'data/{key}' hold {storages[key].nbytes} bytes in place of "
                f"{numel * itemsize}; the file is damaged, download or copy it again"
            )
        return storages[key]

    root = _Machine(archive.label, find_storage).run(archive.pickle)
    if type(root) is not dict:
        raise ConvertError(
            f"{archive.label}: the file holds no dict of tensors; save the heads' state_dict() with torch.save"
        )
    tensors: dict[str, SourceTensor] = {}
    for name, ref in root.items():
        if isinstance(name, str) and isinstance(ref, _TensorRef):
            store = ref.storage
            tensors[name] = SourceTensor(
                name, store.dtype, ref.shape, ref.strides, ref.offset, store.itemsize, store.storage
            )
    return tensors
