"""`--inspect`: what it prints, and that it tells a heads file from everything else."""

from __future__ import annotations

import re

import numpy as np
import pytest
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entmtp.common.errors import ConvertError
from entmtp.convert import convert, inspect_heads, main
from helpers.checkpoints import (
    hydra_config,
    hydra_state,
    medusa_config,
    medusa_state,
    tiny_base,
    write_checkpoint,
)


@pytest.fixture
def heads(tmp_path):
    base = tiny_base(tmp_path / "base.gguf")
    folder = write_checkpoint(tmp_path / "c", hydra_state(2, 2, prefix=True), hydra_config(2, 2, prefix=True))
    return convert(folder, base, tmp_path / "heads.gguf", "f16").outfile


def rewrite(path, out, keys=None, tensors=None):
    """Copy a heads file, with keys and tensors replaced (None: left out)."""
    reader = GGUFReader(path)
    fields = {name: f for name, f in reader.fields.items() if not name.startswith("GGUF.")}
    arch = (keys or {}).pop("general.architecture", fields.pop("general.architecture").contents())
    writer = GGUFWriter(out, arch)
    values = {name: (f.contents(), f.types[0]) for name, f in fields.items()} | (keys or {})
    for name, value in values.items():
        if value is not None:
            writer.add_key_value(name, *value)
    arrays = {t.name: (t.data, t.tensor_type) for t in reader.tensors}
    for name, array in (tensors or {}).items():
        arrays[name] = array if array is None else (array, None)
    for name, array in arrays.items():
        if array is not None:
            writer.add_tensor(name, array[0], raw_dtype=array[1])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def test_prints_keys_tensors_and_parameters(heads, capsys):
    assert main(["--inspect", str(heads)]) == 0
    out = capsys.readouterr().out
    for words in (
        "hydra.predict_heads",
        "entmtp.tokenizer.fingerprint",
        "prefix.attn_q.weight",
        "head.1.blk.1.bias",
    ):
        assert words in out
    assert re.search(r"head\.1\.output\.weight.* 32 x 48 .*F16.* 3,072 ", out)
    # block 0 and its residual map [32, 64], block 1 [32, 32], output [48, 32], and their biases
    assert re.search(rf"head\.0 .* {2 * (32 * 64 + 32) + 32 * 32 + 32 + 48 * 32 + 48:,} ", out)


def test_parameters_are_counted_per_head(heads):
    found = inspect_heads(heads).parameters
    assert list(found) == ["head.0", "head.1", "prefix"]
    assert found["head.1"] - found["head.0"] == 2 * 32 * 32
    assert found["prefix"] == 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 3 * 32


U32, F32, STR = GGUFValueType.UINT32, GGUFValueType.FLOAT32, GGUFValueType.STRING
ZEROS = np.zeros
BAD = {
    "newer format": ({"entmtp.format_version": (2, U32)}, {}, "format version 2"),
    "no format version": ({"entmtp.format_version": None}, {}, "no heads file"),
    "another model": ({"general.architecture": "llama"}, {}, "no heads file"),
    "fingerprint": ({"entmtp.tokenizer.fingerprint": ("xyz", STR)}, {}, "16 hex digits"),
    "no vocabulary": ({"hydra.vocab_size": None}, {}, "'hydra.vocab_size'"),
    "type of a key": ({"hydra.vocab_size": (48.0, F32)}, {}, "'hydra.vocab_size' (UINT32)"),
    "no rope": ({"hydra.rope.freq_base": None}, {}, "'hydra.rope.freq_base'"),
    "eps of 0": ({"hydra.attention.layer_norm_rms_epsilon": (0.0, F32)}, {}, "prefix layer's numbers"),
    "no heads": ({"hydra.predict_heads": (0, U32)}, {}, "cannot be"),
    "a thousand million heads": ({"hydra.predict_heads": (10**9, U32)}, {}, "cannot be"),
    "as many blocks": ({"hydra.block_count": (10**9, U32)}, {}, "cannot be"),
    "a head more": ({"hydra.predict_heads": (3, U32)}, {}, "'head.2.blk.0.weight' is missing"),
    "a head fewer": ({"hydra.predict_heads": (1, U32)}, {}, "not part of the format"),
    "a block fewer": ({"hydra.block_count": (1, U32)}, {}, "not part of the format"),
    "no output": ({}, {"head.1.output.weight": None}, "'head.1.output.weight' is missing"),
    "no second block": ({}, {"head.1.blk.1.weight": None}, "'head.1.blk.1.weight' is missing"),
    "shape": ({}, {"head.1.blk.0.bias": ZEROS(31, np.float32)}, "shape [31] in place of [32]"),
    "type of a vector": ({}, {"head.1.blk.0.bias": ZEROS(32, np.float16)}, "F16 in place of F32"),
    "type of a matrix": ({}, {"prefix.attn_q.weight": ZEROS((32, 32), np.float32)}, "F32 in place of F16"),
    "unknown tensor": ({}, {"head.0.extra": ZEROS(3, np.float32)}, "'head.0.extra' is not part"),
    "map of floats": ({}, {"d2t": ZEROS(48, np.float32)}, "'d2t' is not a list"),
    "map outside": ({}, {"d2t": np.full(48, 48, np.int64)}, "tokens that the base model lacks"),
    "map with a token twice": ({}, {"d2t": np.array([*range(47), 0])}, "names a token twice"),
    "not grounded, nor ungrounded": ({"hydra.grounded": None}, {}, "'hydra.grounded'"),
    "map too short": ({}, {"d2t": np.arange(47)}, "shape [32, 48] in place of [32, 47]"),
}


@pytest.mark.parametrize("kind", BAD)
def test_files_that_break_the_format(tmp_path, heads, capsys, kind):
    keys, tensors, words = BAD[kind]
    path = rewrite(heads, tmp_path / "bad.gguf", dict(keys), dict(tensors))
    assert main(["--inspect", str(path)]) == 1
    out, err = capsys.readouterr()
    assert words in err and err.startswith("error: ") and err.count("\n") == 1 and not out


def test_draft_vocabulary_and_missing_output_bias_are_part_of_the_format(tmp_path, heads):
    tensors = {"d2t": np.arange(0, 48, 2)}
    for i in range(2):
        tensors[f"head.{i}.output.weight"] = ZEROS((24, 32), np.float16)
        tensors[f"head.{i}.output.bias"] = None
    found = inspect_heads(rewrite(heads, tmp_path / "d2t.gguf", tensors=tensors))
    assert found.tensors["d2t"].shape == (24,)


def test_other_files(tmp_path, heads, capsys):
    for path, words in (
        (tmp_path / "nowhere.gguf", "no such file"),
        (tmp_path, "this is a folder"),
        (tmp_path / "base.gguf", "no heads file"),
        (tmp_path / "c" / "config.json", "not a GGUF file"),
    ):
        assert main(["--inspect", str(path)]) == 1
        assert words in capsys.readouterr().err


def test_truncated_anywhere(tmp_path, heads):
    whole = heads.read_bytes()
    for cut in (*range(0, 2000, 13), *range(2000, len(whole), 997), len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        if whole[cut:].strip(b"\0"):  # more than padding is gone
            with pytest.raises(ConvertError, match=r"truncated|not a GGUF"):
                inspect_heads(tmp_path / "cut.gguf")


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_flipped_bytes_never_crash(tmp_path, heads, data):
    whole = bytearray(heads.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, 3000))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "bad.gguf").write_bytes(whole)
    try:
        inspect_heads(tmp_path / "bad.gguf")
    except ConvertError as e:
        assert "\n" not in str(e)


def test_medusa(tmp_path):
    base = tiny_base(tmp_path / "base.gguf")
    done = convert(
        write_checkpoint(tmp_path / "c", medusa_state(2, 3), medusa_config(2, 3)), base, tmp_path / "h"
    )
    assert inspect_heads(done.outfile).parameters == {f"head.{i}": 32 * 32 + 32 + 48 * 32 for i in range(2)}
