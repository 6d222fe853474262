"""Makes small checkpoints in the published layouts, and base models to go with them. Needs no PyTorch.

The `.pt` files have the form that `torch.save` writes: a zip archive of stored entries `<root>/data.pkl`,
`<root>/byteorder`, `<root>/version` and `<root>/data/<key>`. The pickle is put together opcode by opcode.
"""

from __future__ import annotations

import json
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType, quants

from entmtp.convert.quantise import quantise

N_EMBD, N_VOCAB, N_HEAD, N_HEAD_KV, N_FF = 32, 48, 4, 2, 64

STORAGE_CLASS = {
    "float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage",
    "float64": "DoubleStorage", "int64": "LongStorage", "uint8": "ByteStorage",
}  # fmt: skip


@dataclass(eq=False)
class View:
    """A tensor that is a view of a 1-D storage; offset and strides in elements."""

    storage: np.ndarray
    offset: Any
    shape: Any
    strides: Any
    dtype: str = "float32"


# values


def to_bits(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array in `dtype`; bfloat16 is returned as its uint16 bits (rounded to nearest even)."""
    if dtype != "bfloat16":
        return array.astype(dtype)
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def as_stored(array: np.ndarray, dtype: str) -> np.ndarray:
    """The float32 values of an array that was saved in `dtype`."""
    bits = to_bits(array, dtype)
    if dtype == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).reshape(array.shape)
    return bits.astype(np.float32)


# torch.save


def p_str(text: str) -> bytes:
    """A string, as a pickle opcode."""
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def p_int(value: int) -> bytes:
    """A whole number, as a pickle opcode."""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def p_tuple(*items: bytes) -> bytes:
    """A tuple of already pickled items."""
    return b"(" + b"".join(items) + b"t"


def p_global(module: str, name: str) -> bytes:
    """A reference to a name in a module."""
    return f"c{module}\n{name}\n".encode()


def p_storage(key: str, dtype: str, numel: int) -> bytes:
    """A persistent id of a storage."""
    cls = p_global("torch", STORAGE_CLASS[dtype])
    return p_tuple(p_str("storage"), cls, p_str(key), p_str("cpu"), p_int(numel)) + b"Q"


def _p_value(value: Any) -> bytes:
    if isinstance(value, bytes):  # already pickled
        return value
    if isinstance(value, (tuple, list)):
        return p_tuple(*map(_p_value, value))
    return p_int(value)


def p_tensor(storage: bytes, offset: Any, shape: Any, strides: Any) -> bytes:
    """A call of `_rebuild_tensor_v2`. Offset, shape and strides may be pickled bytes, to make nonsense."""
    hooks = p_global("collections", "OrderedDict") + b")R"
    args = (storage, *map(_p_value, (offset, shape, strides)), b"\x89", hooks)
    return p_global("torch._utils", "_rebuild_tensor_v2") + p_tuple(*args) + b"R"


def p_dict(items: dict[str, bytes], metadata: bool = True) -> bytes:
    """A whole pickle of an OrderedDict of already pickled values, with `_metadata` as a module's state dict has."""
    body = b"".join(p_str(name) + value for name, value in items.items())
    build = b"}" + p_str("_metadata") + p_global("collections", "OrderedDict") + b")Rsb" if metadata else b""
    return b"\x80\x02" + p_global("collections", "OrderedDict") + b")R(" + body + b"u" + build + b"."


def torch_entries(state: dict[str, Any], dtype: str = "float32", root: str = "archive") -> dict[str, bytes]:
    """The zip entries of a saved state dict: arrays, or `View`s. An array given twice is stored once."""
    entries: dict[str, bytes] = {}
    keys: dict[int, str] = {}
    items: dict[str, bytes] = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            strides = tuple(int(np.prod(value.shape[i + 1 :])) for i in range(value.ndim))
            value, owner = View(value.ravel(), 0, value.shape, strides, dtype), value
        else:
            owner = value.storage
        key = keys.setdefault(id(owner), str(len(keys)))
        entries[f"{root}/data/{key}"] = to_bits(value.storage, value.dtype).tobytes()
        storage = p_storage(key, value.dtype, value.storage.size)
        items[name] = p_tensor(storage, value.offset, value.shape, value.strides)
    head = {f"{root}/data.pkl": p_dict(items), f"{root}/byteorder": b"little"}
    return {**head, **entries, f"{root}/version": b"3\n"}


def write_zip(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write the entries of a torch file."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(zipfile.ZipInfo(name), data, compression)
    return path


def save_torch(path: Path, state: dict[str, Any], dtype: str = "float32") -> Path:
    """Write a state dict as `torch.save` does."""
    return write_zip(path, torch_entries(state, dtype, path.stem))


def save_safetensors(
    path: Path, state: dict[str, np.ndarray], dtype: str = "float32", metadata: dict[str, str] | None = None
) -> Path:
    """Write a state dict as a safetensors file."""
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}[dtype]
    header: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    blob = b""
    for key, array in state.items():
        data = to_bits(array, dtype).tobytes()
        offsets = [len(blob), len(blob) + len(data)]
        header[key] = {"dtype": name, "shape": list(array.shape), "data_offsets": offsets}
        blob += data
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + blob)
    return path


# heads


class _Maker:
    def __init__(self, seed: int):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape: int) -> np.ndarray:
        return (self.rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def medusa_state(
    n_heads: int = 3,
    n_layers: int = 1,
    n_embd: int = N_EMBD,
    n_vocab: int = N_VOCAB,
    shared: bool = True,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Medusa heads. The published code repeats one residual block, so by default the layers share arrays."""
    make, state = _Maker(seed), {}
    for i in range(n_heads):
        block = None
        for j in range(n_layers):
            if block is None or not shared:
                block = make(n_embd, n_embd), make(n_embd)
            state[f"{i}.{j}.linear.weight"], state[f"{i}.{j}.linear.bias"] = block
        state[f"{i}.{n_layers}.weight"] = make(n_vocab, n_embd)
    return state


def hydra_state(
    n_heads: int = 3,
    n_layers: int = 1,
    grounded: bool = True,
    prefix: bool = False,
    n_embd: int = N_EMBD,
    n_vocab: int = N_VOCAB,
    n_ff: int = N_FF,
    shared: bool = True,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Hydra heads, `mlp` or `prefix-mlp`, with the copies and buffers that published files hold beside them."""
    make, state = _Maker(seed), {}
    for i in range(n_heads):
        repeated = None
        for j in range(n_layers):
            wide = grounded and j == 0
            n_in = n_embd * (i + 2) if wide else n_embd
            name = f"hydra_mlp.{i}.{2 * j + 1 if prefix else j}"
            if wide:
                block = make(n_embd, n_in), make(n_embd)
                state[f"{name}.res_connection.weight"] = make(n_embd, n_in)
                state[f"{name}.res_connection.bias"] = make(n_embd)
            elif repeated is None or not shared:
                block = repeated = make(n_embd, n_embd), make(n_embd)
            else:
                block = repeated
            state[f"{name}.linear.weight"], state[f"{name}.linear.bias"] = block
    state["input_embed_fn.weight"] = make(n_vocab, n_embd)
    for i in range(n_heads):
        name = f"hydra_lm_head.{i}." + ("1." if prefix else "")
        state[name + "weight"], state[name + "bias"] = make(n_vocab, n_embd), make(n_vocab)
    if prefix:
        state.update(prefix_state(make, n_embd, n_vocab, n_ff))
    return state


def prefix_state(make: _Maker, n_embd: int, n_vocab: int, n_ff: int) -> dict[str, np.ndarray]:
    """The decoder layer of Hydra++."""
    width, head_dim = n_embd // N_HEAD * N_HEAD_KV, n_embd // N_HEAD
    layer = {
        "embed_tokens.weight": make(n_vocab, n_embd),
        "layers.0.self_attn.q_proj.weight": make(n_embd, n_embd),
        "layers.0.self_attn.k_proj.weight": make(width, n_embd),
        "layers.0.self_attn.v_proj.weight": make(width, n_embd),
        "layers.0.self_attn.o_proj.weight": make(n_embd, n_embd),
        "layers.0.self_attn.rotary_emb.inv_freq": 10000.0 ** (-np.arange(0, head_dim, 2) / head_dim),
        "layers.0.mlp.gate_proj.weight": make(n_ff, n_embd),
        "layers.0.mlp.up_proj.weight": make(n_ff, n_embd),
        "layers.0.mlp.down_proj.weight": make(n_embd, n_ff),
        "layers.0.input_layernorm.weight": 1 + make(n_embd),
        "layers.0.post_attention_layernorm.weight": 1 + make(n_embd),
        "norm.weight": 1 + make(n_embd),
    }
    return {f"prefix_embeding_layer.{name}": array.astype(np.float32) for name, array in layer.items()}


def medusa_config(n_heads: int = 3, n_layers: int = 1, **more: Any) -> dict[str, Any]:
    """config.json of Medusa heads."""
    sizes = {"medusa_num_heads": n_heads, "medusa_num_layers": n_layers}
    return {**sizes, "base_model_name_or_path": "lmsys/vicuna-7b-v1.3", **more}


def hydra_config(
    n_heads: int = 3, n_layers: int = 1, grounded: bool = True, prefix: bool = False, **more: Any
) -> dict[str, Any]:
    """config.json of Hydra heads."""
    config = {
        "hydra_num_heads": n_heads,
        "hydra_num_layers": n_layers,
        "hydra_head_arch": "prefix-mlp" if prefix else "mlp",
        "grounded_heads": grounded,
        "hidden_state_offset": 0,
        "base_model_name_or_path": "lmsys/vicuna-7b-v1.3",
    }
    return {**config, **more}


def write_checkpoint(
    folder: Path,
    state: dict[str, Any],
    config: dict[str, Any] | None,
    dtype: str = "float32",
    file: str | None = None,
) -> Path:
    """Write a checkpoint folder; the weight file's name is the published one unless given."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    kind = "hydra" if any(name.startswith("hydra_mlp") for name in state) else "medusa"
    path = folder / (file or f"{kind}_lm_head.pt")
    if path.suffix == ".safetensors":
        save_safetensors(path, state, dtype)
    else:
        save_torch(path, state, dtype)
    return folder


# base models


def tiny_base(
    path: Path,
    n_embd: int = N_EMBD,
    n_vocab: int = N_VOCAB,
    tokens: list[bytes] | None = None,
    type: GGMLQuantizationType = GGMLQuantizationType.F32,
    output: GGMLQuantizationType | None = None,
    arch: str = "llama",
    name: str | None = "tiny base",
    skip: tuple[str, ...] = (),
    **more: Any,
) -> Path:
    """A Llama of one layer with random weights, matrices of a `type`, the projection of the type `output`.

    Keys in `skip` are left out; `more` adds keys below `{arch}.`.
    """
    tokens = tokens or [b"<unk>", b"<s>", b"</s>", *(f"t{i}".encode() for i in range(n_vocab - 3))]
    writer = GGUFWriter(path, arch)
    if name:
        writer.add_name(name)
    writer.add_file_type(int(LlamaFileType.ALL_F32))
    u32 = {
        "block_count": 1, "context_length": 256, "embedding_length": n_embd, "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD_KV,
        "rope.dimension_count": n_embd // N_HEAD, "vocab_size": n_vocab,
    }  # fmt: skip
    for key, value in u32.items():
        if key not in skip:
            writer.add_uint32(f"{arch}.{key}", value)
    if "attention.layer_norm_rms_epsilon" not in skip:
        writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in more.items():
        key = f"{arch}.{key.replace('__', '.')}"
        if isinstance(value, int):
            writer.add_uint32(key, value)
        else:
            writer.add_string(key, value) if isinstance(value, str) else writer.add_array(key, value)
    if "tokens" not in skip:
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_scores([-float(i) for i in range(n_vocab)])
        writer.add_token_types(([2, 3, 3] + [1] * n_vocab)[:n_vocab])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(min(2, n_vocab - 1))
    make, width = _Maker(1), n_embd // N_HEAD * N_HEAD_KV
    tensors = {"token_embd.weight": make(n_vocab, n_embd), "output.weight": make(n_vocab, n_embd)}
    for part, shape in (
        ("attn_q", (n_embd, n_embd)), ("attn_k", (width, n_embd)), ("attn_v", (width, n_embd)),
        ("attn_output", (n_embd, n_embd)), ("ffn_gate", (N_FF, n_embd)), ("ffn_up", (N_FF, n_embd)),
        ("ffn_down", (n_embd, N_FF)), ("attn_norm", (n_embd,)), ("ffn_norm", (n_embd,)),
    ):  # fmt: skip
        tensors[f"blk.0.{part}.weight"] = make(*shape) if len(shape) == 2 else np.ones(shape, np.float32)
    tensors["output_norm.weight"] = np.ones(n_embd, np.float32)
    for key, array in tensors.items():
        if array.ndim == 1:
            writer.add_tensor(key, array)
        else:
            kind = output if output and key == "output.weight" else type
            writer.add_tensor(key, quantise(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


# heads files


@dataclass
class HeadsGGUF:
    """A heads file as the `gguf` package reads it: keys, and tensors as float32 in PyTorch's order."""

    keys: dict[str, Any]
    types: dict[str, str]
    tensors: dict[str, np.ndarray]


def read_heads(path: Path) -> HeadsGGUF:
    """Read a heads file."""
    reader = GGUFReader(path)
    keys = {key: f.contents() for key, f in reader.fields.items() if not key.startswith("GGUF.")}
    types = {t.name: t.tensor_type.name for t in reader.tensors}
    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
    values = {
        t.name: (
            np.array(t.data)
            if t.tensor_type == GGMLQuantizationType.I64
            else quants.dequantize(t.data, t.tensor_type)
        ).reshape(shapes[t.name])
        for t in reader.tensors
    }
    return HeadsGGUF(keys, types, values)
