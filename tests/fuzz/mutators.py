"""Changes to files that keep their form: counts, lengths, offsets and checksums are right again, so that a reader goes
on after its first check. A file that cannot be taken apart, and now and then any other, has its bytes changed instead.
"""

from __future__ import annotations

import io
import json
import lzma
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Bytes = Callable[[bytes], bytes]  # changes bytes that have no form
Mutator = Callable[[bytes, random.Random, Bytes], bytes]

NUMBERS = (
    0, 1, 2, 3, 7, 8, 31, 32, 33, 63, 64, 65, 127, 255, 256, 1 << 16, 1 << 24, 1 << 31, 1 << 32, 1 << 47, 1 << 48,
    (1 << 63) - 1, (1 << 64) - 1,
)  # fmt: skip
OFTEN = 8  # of so many changes one is of plain bytes


def shuffle(items: list[Any], rng: random.Random, change: Callable[[Any], Any]) -> None:
    """One item is changed, there twice, gone, or somewhere else."""
    if not items:
        return
    i = rng.randrange(len(items))
    what = rng.randrange(6)
    if what == 0:
        del items[i]
    elif what == 1:
        items.insert(rng.randrange(len(items) + 1), items[i])
    elif what == 2:
        items.insert(rng.randrange(len(items)), items.pop(i))
    else:
        items[i] = change(items[i])


# GGUF

GGUF_WIDTH = {
    0: 1,
    1: 1,
    2: 2,
    3: 2,
    4: 4,
    5: 4,
    6: 4,
    7: 1,
    10: 8,
    11: 8,
    12: 8,
}  # bytes of a value, by type
GGUF_TEXT, GGUF_LIST = 8, 9


@dataclass
class GGUFTensor:
    name: bytes
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass
class GGUFFile:
    version: int
    keys: list[tuple[bytes, int, bytes]]  # name, type, value as stored
    tensors: list[GGUFTensor]
    data: bytes

    def dump(self, n_keys: int | None = None, n_tensors: int | None = None) -> bytes:
        out = [b"GGUF", struct.pack("<I", self.version)]
        counts = (
            len(self.tensors) if n_tensors is None else n_tensors,
            len(self.keys) if n_keys is None else n_keys,
        )
        out.append(struct.pack("<QQ", *counts))
        for name, kind, value in self.keys:
            out += [gguf_string(name), struct.pack("<I", kind), value]
        for t in self.tensors:
            out += [gguf_string(t.name), struct.pack("<I", len(t.shape))]
            out += [struct.pack("<Q", n & (1 << 64) - 1) for n in t.shape]
            out.append(struct.pack("<IQ", t.type & 0xFFFFFFFF, t.offset & (1 << 64) - 1))
        head = b"".join(out)
        return head + bytes(-len(head) % 64) + self.data


def gguf_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def gguf_key(name: str, kind: int, value: bytes) -> tuple[bytes, int, bytes]:
    return name.encode(), kind, value


def gguf_list(kind: int, items: bytes, n: int) -> bytes:
    return struct.pack("<IQ", kind, n) + items


def load_gguf(data: bytes) -> GGUFFile:
    """Raises struct.error, KeyError or ValueError where it has no such form."""
    at = 24
    version, n_tensors, n_keys = struct.unpack_from("<IQQ", data, 4)

    def take(fmt: str) -> Any:
        nonlocal at
        values = struct.unpack_from(fmt, data, at)
        at += struct.calcsize(fmt)
        return values if len(values) > 1 else values[0]

    def string() -> bytes:
        nonlocal at
        n = take("<Q")
        if n > len(data) - at:
            raise ValueError("cut")
        at += n
        return data[at - n : at]

    def skip(kind: int) -> None:
        nonlocal at
        if kind == GGUF_TEXT:
            string()
        elif kind == GGUF_LIST:
            item, n = take("<IQ")
            if n > len(data) or item == GGUF_LIST:
                raise ValueError("cut")
            for _ in range(n):
                skip(item)
        else:
            at += GGUF_WIDTH[kind]
            if at > len(data):
                raise ValueError("cut")

    keys, tensors = [], []
    for _ in range(n_keys):
        name, kind = string(), take("<I")
        start = at
        skip(kind)
        keys.append((name, kind, data[start:at]))
    for _ in range(n_tensors):
        name, n_dims = string(), take("<I")
        shape = tuple(take("<Q") for _ in range(n_dims)) if n_dims <= 8 else ()
        tensors.append(GGUFTensor(name, shape, *take("<IQ")))
    return GGUFFile(version, keys, tensors, data[at + (-at % 64) :])


def gguf(data: bytes, rng: random.Random, change: Bytes) -> bytes:
    try:
        if rng.randrange(OFTEN) == 0:
            raise ValueError("plain")
        file = load_gguf(data)
    except (struct.error, KeyError, ValueError):
        return b"GGUF\3\0\0\0" + change(data[8:])

    def key(item: tuple[bytes, int, bytes]) -> tuple[bytes, int, bytes]:
        name, kind, value = item
        what = rng.randrange(4)
        if what == 0:
            return change(name), kind, value
        if what == 1:
            kind = rng.choice([*GGUF_WIDTH, GGUF_TEXT, GGUF_LIST, 13])
            value = bytes(GGUF_WIDTH.get(kind, 0)) or gguf_string("x") if kind == GGUF_TEXT else value
            return name, kind, value
        if what == 2 and kind in GGUF_WIDTH:
            return name, kind, (rng.choice(NUMBERS)).to_bytes(8, "little")[: GGUF_WIDTH[kind]]
        return name, kind, change(value)

    def tensor(t: GGUFTensor) -> GGUFTensor:
        name, shape, kind, offset = t.name, list(t.shape), t.type, t.offset
        what = rng.randrange(4)
        if what == 0:
            name = change(name)
        elif what == 1:
            if not shape or rng.randrange(3) == 0:
                shape.append(1)
            shuffle(shape, rng, lambda n: rng.choice(NUMBERS))
        elif what == 2:
            kind = rng.choice((*range(42), 1 << 31))
        else:
            offset = rng.choice((*NUMBERS, offset + 32, len(file.data)))
        return GGUFTensor(name, tuple(shape), kind, offset)

    what = rng.randrange(9)
    if what < 4:
        shuffle(file.keys, rng, key)
    elif what < 7:
        shuffle(file.tensors, rng, tensor)
    elif what == 7:
        file.version = rng.choice((0, 1, 2, 3, 4, 3 << 24))
    else:
        return file.dump(rng.choice((None, *NUMBERS)), rng.choice((None, *NUMBERS)))
    return file.dump()


# JSON

VALUES = (
    None, True, False, 0, 1, -1, 2, 0.5, -0.0, 1e308, 1e-320, 10**400, 1 << 63, "", "a", "1", "\u0664", "\ud800", [],
    {}, [[]], float("nan"), float("inf"),
)  # fmt: skip


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every container with each of its keys or indices."""
    stack = [value]
    while stack:
        here = stack.pop()
        for key in here if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ():
            found.append((here, key))
            stack.append(here[key])
    return found


def change_value(value: Any, rng: random.Random, change: Bytes) -> Any:
    """Parsed JSON with a change at one place."""
    found = places(value, [])
    if not found or rng.randrange(20) == 0:
        return rng.choice(VALUES)
    container, key = rng.choice(found)
    old = container[key]
    what = rng.randrange(7)
    if what == 0:
        del container[key]
    elif what == 1 and isinstance(container, list):
        container.insert(rng.randrange(len(container) + 1), old)
    elif what == 1:
        container[rng.choice(("1", "", "\u0664", "x", str(rng.choice(NUMBERS)), "9" * 5000))] = old
    elif what == 2 and isinstance(old, str):
        container[key] = change(old.encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
    elif what == 3 and isinstance(old, int | float) and old == old and abs(old) < 1e300:
        container[key] = rng.choice((old + 1, -old, old * 2, int(old), rng.choice(NUMBERS)))
    elif what == 4:
        other, at = rng.choice(found)
        container[key] = json.loads(json.dumps(other[at]))
    elif what == 5 and isinstance(old, list):
        rng.shuffle(old)
    else:
        container[key] = rng.choice(VALUES)
    return value


def load_json(data: bytes) -> Any:
    """Raises ValueError where it is none."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("deep") from None


def text(data: bytes, rng: random.Random, change: Bytes) -> bytes:
    """JSON."""
    try:
        what = rng.randrange(2 * OFTEN)
        if what < 2:
            raise ValueError("plain")
        value = load_json(data)
    except ValueError:
        return change(data)
    if (
        what == 2 and rng.randrange(16) == 0
    ):  # deep: a value in thousands of lists, or a number of thousands of digits
        at = rng.randrange(len(data))
        n = rng.choice((100, 2000, 100_000))
        return data[:at] + rng.choice((b"[" * n + b"]" * n, b"9" * 5000)) + data[at:]
    return json.dumps(change_value(value, rng, change), allow_nan=True).encode()


def dump_safetensors(header: Any, data: bytes) -> bytes:
    head = json.dumps(header).encode()
    return struct.pack("<Q", len(head)) + head + data


def safetensors(data: bytes, rng: random.Random, change: Bytes) -> bytes:
    try:
        if rng.randrange(OFTEN) == 0:
            raise ValueError("plain")
        (n,) = struct.unpack_from("<Q", data)
        header = load_json(data[8 : 8 + n])
        if not isinstance(header, dict):
            raise ValueError("no header")
    except (ValueError, struct.error):
        return change(data)
    header = change_value(header, rng, change)
    if isinstance(header, dict) and rng.randrange(4):
        repair(header)
    try:
        end = max(v["data_offsets"][1] for k, v in header.items() if k != "__metadata__")
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        end = 0
    size = end if isinstance(end, int) and 0 <= end < 4096 and rng.randrange(8) else len(data) - 8 - n
    return dump_safetensors(header, (data[8 + n :] + bytes(max(size, 0)))[: max(size, 0)])


def repair(header: dict[str, Any]) -> None:
    """The tensors lie one after the other, as large as their shapes ask for."""
    width = {
        "F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "U16": 2,
        "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
    }  # fmt: skip
    at = 0
    for name, info in header.items():
        try:
            if name != "__metadata__":
                size = width[info["dtype"]]
                for n in info["shape"]:
                    size *= n if type(n) is int else 1
                if not 0 <= size < 1 << 16:
                    continue
                info["data_offsets"] = [at, at + size]
                at += size
        except (KeyError, TypeError):
            continue


# zip archives


def dump_zip(entries: dict[str, bytes], compress: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compress) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data, compress)
    return out.getvalue()


def load_zip(data: bytes) -> dict[str, bytes]:
    """Raises ValueError where it is none, or a large one."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if sum(info.file_size for info in archive.infolist()) > 1 << 16:
                raise ValueError("large")
            return {info.filename: archive.read(info) for info in archive.infolist()}
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        EOFError,
        RuntimeError,
        struct.error,
        lzma.LZMAError,
        zlib.error,
        OSError,
        KeyError,
    ) as e:
        raise ValueError("no zip") from e


def change_entries(
    entries: dict[str, bytes], rng: random.Random, change: Bytes, inside: Callable[[str, bytes], bytes]
) -> dict[str, bytes]:
    """One entry goes, comes again under another name, or has its content changed by `inside`."""
    name = rng.choice(list(entries))
    what = rng.randrange(12)
    if what == 0:
        del entries[name]
    elif what == 1:
        entries[change(name.encode()).decode("utf-8", "replace").replace("\0", "_") or "x"] = entries[name]
    else:
        entries[name] = inside(name, entries[name])
    return entries


def split_pickle(data: bytes) -> list[bytes]:
    """The operations of a pickle. Raises ValueError where it is none."""
    try:
        starts = [pos for _, _, pos in pickletools.genops(data) if pos is not None]
    except Exception as e:  # whatever pickletools says
        raise ValueError("no pickle") from e
    return [data[a:b] for a, b in zip(starts, [*starts[1:], len(data)], strict=True)]


OPERATIONS = [
    b"(", b"t", b"R", b"Q", b"}", b"]", b")", b"N", b"\x88", b"\x89", b"u", b"s", b"e", b"a", b"b", b"0", b"2", b"1",
    b"q\0", b"q\1", b"h\0", b"h\1", b"r\0\0\0\0", b"j\0\0\0\0", b"\x94", b"\x93", b"\x85", b"\x86", b"\x87", b"K\2",
    b"M\0\1", b"J\xff\xff\xff\xff", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8a\0", b"X\1\0\0\0a", b"\x8c\1a",
    b"G\x7f\xf0\0\0\0\0\0\0", b"I1\n", b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch._utils\n_rebuild_parameter\n", b"cos\nsystem\n",
    b"\x95\1\0\0\0\0\0\0\0", b"\x80\4", b"X\4\0\0\0data", b"\x8d\1\0\0\0\0\0\0\0a", b"\x8e\1\0\0\0\0\0\0\0a", b"\x81",
    b"\x8f", b"P1\n",
]  # fmt: skip


def torch(data: bytes, rng: random.Random, change: Bytes) -> bytes:
    """An archive of torch.save: its pickle changed operation by operation."""

    def number(op: bytes) -> bytes:
        n = rng.choice(NUMBERS)
        if op[:1] in (b"K", b"M", b"J", b"\x8a"):
            return b"\x8a\x09" + n.to_bytes(9, "little")
        return rng.choice(OPERATIONS)

    def inside(name: str, old: bytes) -> bytes:
        if not name.endswith("data.pkl") or rng.randrange(8) == 0:
            return change(old)
        try:
            ops = split_pickle(old)
        except ValueError:
            return change(old)
        for _ in range(rng.choice((1, 1, 2))):
            if rng.randrange(4) == 0:
                ops.insert(rng.randrange(len(ops) + 1), rng.choice(OPERATIONS))
            else:
                shuffle(ops, rng, number)
        return b"".join(ops)

    try:
        if rng.randrange(OFTEN) == 0:
            raise ValueError("plain")
        entries = load_zip(data)
        if not entries:
            raise ValueError("empty")
    except ValueError:
        return change(data)
    pickles = [name for name in entries if name.endswith("data.pkl")]
    if pickles and rng.randrange(4):
        entries[pickles[0]] = inside(pickles[0], entries[pickles[0]])
        return dump_zip(entries)
    return dump_zip(change_entries(entries, rng, change, inside))


def dump_array(header: bytes, data: bytes) -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + data


def traces(data: bytes, rng: random.Random, change: Bytes) -> bytes:
    """An archive of arrays, the headers of which are texts."""

    def inside(name: str, old: bytes) -> bytes:
        if old[:6] != b"\x93NUMPY" or len(old) < 10:
            return change(old)
        (n,) = struct.unpack_from("<H", old, 8)
        header, values = old[10 : 10 + n], old[10 + n :]
        what = rng.randrange(4)
        if name == "text.npy" and what:
            values = text(values, rng, change)
            header = header.replace(b"(%d,)" % (len(old) - 10 - n), b"(%d,)" % len(values))
        elif what == 0:
            header = change(header)
        elif what == 1:
            for old_type in (b"<f4", b"<i4", b"|i1", b"|b1", b"|u1"):
                header = header.replace(
                    old_type, rng.choice((b"<f4", b"<i8", b"|O", b"<U4", b"<M8[s]", b"|V4", b"<c8", b"<f2"))
                )
        elif what == 2:
            digits = [i for i, c in enumerate(header) if 48 <= c < 58]
            i = rng.choice(digits) if digits else 0
            header = header[:i] + str(rng.choice(NUMBERS)).encode() + header[i + 1 :]
        else:
            values = change(values)
        return dump_array(header, values)

    try:
        if rng.randrange(OFTEN) == 0:
            raise ValueError("plain")
        entries = load_zip(data)
        if not entries:
            raise ValueError("empty")
    except ValueError:
        return change(data)
    compress = zipfile.ZIP_DEFLATED if rng.randrange(4) == 0 else zipfile.ZIP_STORED
    return dump_zip(change_entries(entries, rng, change, inside), compress)
