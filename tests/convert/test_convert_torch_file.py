"""The reader of PyTorch files: views and strides, damaged archives, and pickles that try to run code."""

from __future__ import annotations

import os
import pickle
import struct
import warnings
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entmtp.common.errors import ConvertError
from entmtp.models.formats.torch_file import read_torch_file
from helpers.checkpoints import (
    View,
    as_stored,
    medusa_state,
    p_dict,
    p_global,
    p_int,
    p_storage,
    p_str,
    p_tensor,
    p_tuple,
    save_torch,
    to_bits,
    torch_entries,
    write_zip,
)

FIXTURE_OK = list(HealthCheck)  # tmp_path is shared by the examples; a busy machine is no failure
DTYPES = ["float32", "float16", "bfloat16"]


def values(tensor):
    """All values of a SourceTensor, in its shape."""
    return np.concatenate([chunk.ravel() for chunk in tensor.chunks()] or [[]]).reshape(tensor.shape)


# tensors and views


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_exact(tmp_path, dtype):
    state = {
        "a": np.arange(12, dtype=np.float32).reshape(3, 4) / 7,
        "b": np.float32([-1.5]),
        "c": np.zeros((0, 3)),
    }
    state["shared"] = state["a"]
    tensors = read_torch_file(save_torch(tmp_path / "x.pt", state, dtype))
    assert set(tensors) == set(state)
    for name, array in state.items():
        assert tensors[name].dtype == dtype
        np.testing.assert_array_equal(values(tensors[name]), as_stored(array, dtype), err_msg=name)
    assert tensors["shared"].same_place(tensors["a"])
    assert not tensors["b"].same_place(tensors["a"])


def test_many_chunks(tmp_path):
    array = np.random.default_rng(0).standard_normal((700, 1000)).astype(np.float32)  # more than two chunks
    state = {"m": array, "t": View(array.ravel(), 0, (1000, 700), (1, 1000))}
    tensors = read_torch_file(save_torch(tmp_path / "x.pt", state))
    np.testing.assert_array_equal(values(tensors["m"]), array)
    np.testing.assert_array_equal(values(tensors["t"]), array.T)
    assert max(chunk.nbytes for chunk in tensors["m"].chunks()) <= 1 << 20


@st.composite
def views(draw):
    """A view of a storage that stays inside it: any strides, also 0, overlapping and permuted."""
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=4))
    strides = draw(st.lists(st.integers(0, 9), min_size=len(shape), max_size=len(shape)))
    offset, slack = draw(st.integers(0, 7)), draw(st.integers(0, 7))
    span = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return offset, tuple(shape), tuple(strides), offset + span + slack, draw(st.sampled_from(DTYPES))


@settings(max_examples=100, deadline=None, suppress_health_check=FIXTURE_OK)
@given(views())
def test_views_read_as_numpy_reads_them(tmp_path, view):
    offset, shape, strides, n, dtype = view
    storage = np.arange(n, dtype=np.float32) - n / 2
    path = save_torch(tmp_path / "x.pt", {"v": View(storage, offset, shape, strides, dtype)})
    stored = as_stored(storage, dtype)
    expected = np.lib.stride_tricks.as_strided(stored[offset:], shape, [4 * s for s in strides])
    np.testing.assert_array_equal(values(read_torch_file(path)["v"]), expected)


INTEGERS = st.one_of(st.integers(-3, 12), st.sampled_from([2**31, 2**47, 2**63, 2**64, -(2**63), 2**200]))


@settings(max_examples=120, deadline=None, suppress_health_check=FIXTURE_OK)
@given(INTEGERS, st.lists(INTEGERS, max_size=4), st.lists(INTEGERS, max_size=4))
def test_no_view_reaches_outside(tmp_path, offset, shape, strides):
    """Any numbers at all: read rightly if every element lies in the storage of 10, else refused."""
    storage = np.arange(10, dtype=np.float32)
    path = save_torch(tmp_path / "x.pt", {"v": View(storage, offset, shape, strides)})
    numbers = [offset, *shape, *strides]
    inside = len(shape) == len(strides) and min(numbers) >= 0 and max(numbers) < 2**48
    if inside and 0 not in shape:
        inside = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) < 10
    if not inside:
        with pytest.raises(ConvertError, match=r"impossible shape|beyond its stored bytes"):
            read_torch_file(path)
    elif np.prod(shape, dtype=object) < 10**5 and max(shape, default=0) < 10**5:
        expected = np.lib.stride_tricks.as_strided(storage[offset:], shape, [4 * s for s in strides])
        np.testing.assert_array_equal(values(read_torch_file(path)["v"]), expected)


@pytest.mark.parametrize(
    "numbers", [b"\x88", p_str("5"), b"N", p_tuple(p_int(1)), b"G" + struct.pack(">d", 2.0)]
)
def test_sizes_must_be_whole_numbers(tmp_path, numbers):
    storage = np.arange(10, dtype=np.float32)
    for view in (
        View(storage, numbers, (2,), (1,)),
        View(storage, 0, (numbers,), (1,)),
        View(storage, 0, (2,), (numbers,)),
        View(storage, 0, numbers, (1,)),
    ):
        if view.shape is numbers and numbers.endswith(b"t"):
            continue  # a tuple is a shape
        with pytest.raises(ConvertError, match="impossible shape"):
            read_torch_file(save_torch(tmp_path / "x.pt", {"v": view}))


def test_other_dtypes_are_refused_when_read(tmp_path):
    storage = np.arange(4)
    state = {"steps": View(storage, 0, (4,), (1,), "int64"), "ok": np.ones(3, np.float32)}
    tensors = read_torch_file(save_torch(tmp_path / "x.pt", state))
    assert values(tensors["ok"]).tolist() == [1, 1, 1]
    with pytest.raises(ConvertError, match=r"'steps' of x.pt is int64"):
        values(tensors["steps"])


# archives


@pytest.fixture
def entries():
    return torch_entries(medusa_state(1), root="x")


def refused(path, match):
    with pytest.raises(ConvertError, match=match) as info:
        read_torch_file(path)
    assert "\n" not in str(info.value)
    assert path.name in str(info.value)


def test_compressed(tmp_path, entries):
    refused(write_zip(tmp_path / "x.pt", entries, zipfile.ZIP_DEFLATED), "compressed or encrypted")


def test_big_endian(tmp_path, entries):
    refused(write_zip(tmp_path / "x.pt", {**entries, "x/byteorder": b"big"}), "big-endian")


def test_missing_storage_and_pickle(tmp_path, entries):
    without = {name: data for name, data in entries.items() if name != "x/data/1"}
    refused(write_zip(tmp_path / "x.pt", without), "'data/1' are missing")
    del entries["x/data.pkl"]
    refused(write_zip(tmp_path / "x.pt", entries), "not a PyTorch checkpoint")


def test_short_storage(tmp_path, entries):
    refused(
        write_zip(tmp_path / "x.pt", {**entries, "x/data/0": bytes(16)}), "hold 16 bytes in place of 4096"
    )


def test_entry_twice_or_outside(tmp_path, entries):
    path = write_zip(tmp_path / "x.pt", entries)
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("x/data/0", entries["x/data/0"])
    refused(path, "twice or outside")
    refused(write_zip(path, {**entries, "y/data/0": b""}), "twice or outside")
    refused(write_zip(path, {**entries, "y/data.pkl": b"."}), "2 files named")


def test_huge_pickle(tmp_path, entries):
    refused(write_zip(tmp_path / "x.pt", {**entries, "x/data.pkl": bytes(3 << 20)}), "at most")


def test_old_format(tmp_path):
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
    (tmp_path / "x.pt").write_bytes(magic + pickle.dumps(1001, protocol=2))
    refused(tmp_path / "x.pt", "old format.*save it again with torch.save")


def test_not_a_zip(tmp_path):
    (tmp_path / "x.pt").write_bytes(b"hello" * 100)
    refused(tmp_path / "x.pt", "not a PyTorch checkpoint")


def test_local_header_that_points_elsewhere(tmp_path, entries):
    path = write_zip(tmp_path / "x.pt", entries)
    data = bytearray(path.read_bytes())
    at = data.index(b"x/data/0")
    data[at : at + 8] = b"x/data/9"  # the entry's own name, not the directory's
    path.write_bytes(data)
    refused(path, "truncated or damaged at 'x/data/0'")


def test_bytes_missing_in_the_middle(tmp_path, entries):
    """An archive's directory counts from its end: some entries then begin before the file does."""
    path = write_zip(tmp_path / "x.pt", entries)
    data = path.read_bytes()
    path.write_bytes(data[:40] + data[len(data) // 2 :])
    refused(path, "truncated or damaged")


def test_flipped_weight_is_noticed(tmp_path, entries):
    path = write_zip(tmp_path / "x.pt", entries)
    data = bytearray(path.read_bytes())
    data[data.index(entries["x/data/0"]) + 100] ^= 1
    path.write_bytes(data)
    tensor = read_torch_file(path)["0.0.linear.weight"]
    with pytest.raises(ConvertError, match="checksum"):
        values(tensor)


# pickles


class Reduces:
    """Pickles as a call of any function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def write_pickle(path, data, storage=bytes(64)):
    return write_zip(path, {"x/data.pkl": data, "x/data/0": storage, "x/byteorder": b"little"})


GOOD = p_tensor(p_storage("0", "float32", 16), 0, (4, 4), (4, 1))


def touch(sentinel):
    return f"open({str(sentinel)!r}, 'w').close()"


def write_script(sentinel):
    script = sentinel.with_suffix(".py")
    script.write_text(touch(sentinel))
    return str(script)


HARMFUL = {
    "os.system": lambda sentinel: Reduces(os.system, f"touch {sentinel}"),
    "os.open": lambda sentinel: Reduces(os.open, str(sentinel), os.O_CREAT),
    "eval": lambda sentinel: Reduces(eval, touch(sentinel)),
    "exec": lambda sentinel: Reduces(exec, touch(sentinel)),
    "import": lambda sentinel: Reduces(__import__("runpy").run_path, write_script(sentinel)),
    "nested pickle": lambda sentinel: Reduces(pickle.loads, pickle.dumps(Reduces(eval, touch(sentinel)))),
    "in a list": lambda sentinel: [1, (2, {"a": Reduces(eval, touch(sentinel))})],
    "partial": lambda sentinel: Reduces(map, eval, [touch(sentinel)]),
}


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", HARMFUL)
def test_code_is_refused_and_not_run(tmp_path, kind, protocol):
    sentinel = tmp_path / "sentinel"
    evil = pickle.dumps({"0.0.linear.weight": HARMFUL[kind](sentinel)}, protocol=protocol)
    refused(write_pickle(tmp_path / "x.pt", evil), "nothing of it was run")
    assert not sentinel.exists()
    for _ in pickle.loads(evil)["0.0.linear.weight"] if kind == "partial" else [pickle.loads(evil)]:
        pass
    assert sentinel.exists(), "this pickle does no harm, so the test shows nothing"


@pytest.mark.parametrize("protocol", [2, 4])
def test_refused_by_name(tmp_path, protocol):
    for function, name in ((os.system, f"{os.name}.system"), (eval, "eval'"), (getattr, "getattr'")):
        evil = pickle.dumps({"0.0.linear.weight": Reduces(function, "x", "y")}, protocol=protocol)
        refused(write_pickle(tmp_path / "x.pt", evil), name)
        unused = pickle.dumps({"0.0.linear.weight": 1, "never called": function}, protocol=protocol)
        refused(write_pickle(tmp_path / "x.pt", unused), rf"asks for '\w+\.{name.split('.')[-1]}")


def raw(body):
    return b"\x80\x02" + body + b"."


REBUILD = p_global("torch._utils", "_rebuild_tensor_v2")
ODICT = p_global("collections", "OrderedDict")
EVIL_CALL = p_global("os", "system")
NESTED = b")" + b"q\x00h\x00\x86q\x00" * 60  # ((..., ...), (..., ...)): 2^60 leaves, if one walks them
TRICKS = {
    "other module, same name": p_global("os", "OrderedDict"),
    "attribute of a class": b"\x8c\x0bcollections\x8c\x12OrderedDict.update\x93",
    "name that is no string": b"\x80\x04K\x01K\x02\x93",
    "name that is a bomb": b"\x80\x04" + NESTED + b"h\x00\x93",
    "private storage": p_global("torch", "UntypedStorage"),
    "storage is called": p_global("torch", "FloatStorage") + b")R",
    "dict with arguments": ODICT + p_tuple(p_tuple(p_tuple(p_str("a"), p_int(1)))) + b"R",
    "rebuild with no arguments": REBUILD + b")R",
    "rebuild of a string": REBUILD + p_tuple(p_str("x"), p_int(0), b")", b")", b"\x89", b"}") + b"R",
    "rebuild parameter of a call": p_global("torch._utils", "_rebuild_parameter") + p_tuple(EVIL_CALL) + b"R",
    "call of a tensor": GOOD + b")R",
    "call of a string": p_str("os.system") + p_tuple(p_str("true")) + b"R",
    "new object": ODICT + b")\x81",
    "new object with keywords": ODICT + b")}\x92",
    "old object": b"(" + ODICT + b"o",
    "old instance": b"(icollections\nOrderedDict\n",
    "state of a tensor": GOOD + b"}b",
    "state of a function": ODICT + b"}b",
    "items of a tensor": GOOD + p_str("a") + p_int(1) + b"s",
    "append to a tuple": b")" + p_int(1) + b"a",
    "dict key is a bomb": b"}" + NESTED + b"h\x00K\x01s",
    "dict key is a tensor": b"}" + GOOD + b"K\x01s",
    "extension": b"\x82\x01",
    "text persistent id": b"P0\n",
    "huge number as text": b"I" + b"9" * 100_000 + b"\n",
    "huge binary number": b"\x8b" + struct.pack("<i", 50_000) + b"\xff" * 50_000,
    "buffer": b"\x97",
    "set": b"\x8f",
    "persistent id is a string": p_str("storage") + b"Q",
    "persistent id is short": p_tuple(p_str("storage")) + b"Q",
    "persistent id of another kind": p_tuple(p_str("module"), *[p_int(1)] * 4) + b"Q",
    "storage class is a string": p_tuple(p_str("storage"), p_str("FloatStorage"), *[p_str("0")] * 2, p_int(1))
    + b"Q",
    "storage of size -1": p_storage("0", "float32", -1),
    "storage size is huge": p_storage("0", "float32", 1 << 100),
    "storage outside the file": p_storage("../../../etc/passwd", "float32", 1),
    "top of an empty stack": b"q\x00",
    "memo that was never set": b"h\x07",
    "memo at a huge index": b"j\xff\xff\xff\xff",
    "mark that was never set": b"t",
    "number of an odd item": b"}(" + p_str("a") + b"u",
    "string longer than the file": b"X\xff\xff\xff\x7fabc",
    "no such opcode": b"\xf0",
    "list in place of a dict": b"]",
    "number in place of a dict": p_int(3),
    "deep nesting": b")" + b"\x85" * 200_000,
}


@pytest.mark.parametrize("trick", TRICKS)
def test_pickle_tricks(tmp_path, trick):
    refused(write_pickle(tmp_path / "x.pt", raw(TRICKS[trick])), ".")


def test_pickle_without_end(tmp_path):
    refused(write_pickle(tmp_path / "x.pt", b"\x80\x02}"), "damaged|too early")


def test_memo_at_a_huge_index_costs_nothing(tmp_path):
    """The C unpickler would reserve a table of that size."""
    data = b"\x80\x02" + b"}r\xff\xff\xff\xff(" + p_str("v") + GOOD + b"u."
    path = write_pickle(tmp_path / "x.pt", data)
    assert read_torch_file(path)["v"].shape == (4, 4)


def test_metadata_parameters_and_other_values(tmp_path):
    parameter = p_global("torch._utils", "_rebuild_parameter") + p_tuple(GOOD, b"\x88", ODICT + b")R") + b"R"
    items = {
        "p": parameter,
        "epoch": p_int(3),
        "list": b"](" + p_int(1) + p_int(2) + b"e",
        "t": GOOD,
        "n": b"N",
    }
    tensors = read_torch_file(write_pickle(tmp_path / "x.pt", p_dict(items)))
    assert set(tensors) == {"p", "t"}


@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURE_OK)
@given(st.data())
def test_mutated_pickles_never_crash(tmp_path, data):
    good = torch_entries(medusa_state(1, n_embd=4, n_vocab=5), root="x")
    pickled = bytearray(good["x/data.pkl"])
    for _ in range(data.draw(st.integers(1, 4))):
        pickled[data.draw(st.integers(0, len(pickled) - 1))] = data.draw(st.integers(0, 255))
    path = write_zip(tmp_path / "x.pt", {**good, "x/data.pkl": bytes(pickled)})
    try:
        for tensor in read_torch_file(path).values():
            if tensor.size < 10_000:
                values(tensor)
    except ConvertError as e:
        assert "\n" not in str(e)


# PyTorch itself


@pytest.mark.torch
@pytest.mark.parametrize("dtype", DTYPES)
def test_files_of_pytorch_itself(tmp_path, dtype):
    """What torch.save writes is read as torch.load reads it, and torch loads what our test maker writes."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    storage = torch.randn(64).to(getattr(torch, dtype))
    module = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2)).to(getattr(torch, dtype))
    state = module.state_dict()  # an OrderedDict with _metadata
    state.update(a=storage.view(8, 8), t=storage.view(8, 8).T, s=storage[3:40:5], e=storage[:1].expand(3, 2))
    state["p"] = torch.nn.Parameter(storage[10:20].clone())
    state["empty"] = torch.zeros(0, 4, dtype=getattr(torch, dtype))
    torch.save(state, tmp_path / "x.pt")
    tensors = read_torch_file(tmp_path / "x.pt")
    assert set(tensors) == set(state)
    for name, tensor in state.items():
        assert (tensors[name].dtype, tensors[name].shape) == (dtype, tuple(tensor.shape))
        np.testing.assert_array_equal(values(tensors[name]), tensor.detach().float().numpy(), err_msg=name)
    ours = {"m": np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)}
    loaded = torch.load(save_torch(tmp_path / "ours.pt", ours, dtype), weights_only=True)["m"]
    assert loaded.dtype == getattr(torch, dtype)
    bits = loaded.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else loaded.numpy()
    np.testing.assert_array_equal(bits, to_bits(ours["m"], dtype))
