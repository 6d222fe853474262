"""Checkpoints of every published kind, converted and compared with what was put in."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from entmtp.common.errors import ConvertError
from entmtp.convert import convert, inspect_heads, main
from entmtp.models.assets import assets
from helpers.checkpoints import (
    N_EMBD,
    N_VOCAB,
    as_stored,
    hydra_config,
    hydra_state,
    medusa_config,
    medusa_state,
    read_heads,
    save_safetensors,
    save_torch,
    tiny_base,
    write_checkpoint,
)

PREFIX_NAMES = {
    "attn_norm": "layers.0.input_layernorm", "attn_q": "layers.0.self_attn.q_proj",
    "attn_k": "layers.0.self_attn.k_proj", "attn_v": "layers.0.self_attn.v_proj",
    "attn_output": "layers.0.self_attn.o_proj", "ffn_norm": "layers.0.post_attention_layernorm",
    "ffn_gate": "layers.0.mlp.gate_proj", "ffn_up": "layers.0.mlp.up_proj",
    "ffn_down": "layers.0.mlp.down_proj", "output_norm": "norm",
}  # fmt: skip


@pytest.fixture
def base(tmp_path):
    return tiny_base(tmp_path / "base.gguf")


def medusa_expected(state, n_heads, n_layers, shared=True):
    """The heads file's tensors, by the published names."""
    expected = {}
    for i in range(n_heads):
        for j in range(1 if shared else n_layers):
            expected[f"head.{i}.blk.{j}.weight"] = state[f"{i}.{j}.linear.weight"]
            expected[f"head.{i}.blk.{j}.bias"] = state[f"{i}.{j}.linear.bias"]
        expected[f"head.{i}.output.weight"] = state[f"{i}.{n_layers}.weight"]
    return expected


def hydra_expected(state, n_heads, n_layers, grounded, prefix):
    expected = {}
    for i in range(n_heads):
        for j in range(min(n_layers, 2 if grounded else 1)):  # later blocks repeat
            name = f"hydra_mlp.{i}.{1 + 2 * j if prefix else j}"
            for kind in ("weight", "bias"):
                expected[f"head.{i}.blk.{j}.{kind}"] = state[f"{name}.linear.{kind}"]
                if grounded and j == 0:
                    expected[f"head.{i}.blk.0.res.{kind}"] = state[f"{name}.res_connection.{kind}"]
        for kind in ("weight", "bias"):
            name = f"hydra_lm_head.{i}.1.{kind}" if prefix else f"hydra_lm_head.{i}.{kind}"
            expected[f"head.{i}.output.{kind}"] = state[name]
    if prefix:
        for ours, theirs in PREFIX_NAMES.items():
            expected[f"prefix.{ours}.weight"] = state[f"prefix_embeding_layer.{theirs}.weight"]
    return expected


def assert_holds(path, expected, dtype="float32"):
    """The file at path holds exactly these tensors, bit for bit."""
    heads = read_heads(path)
    assert list(heads.tensors) == list(dict.fromkeys(heads.tensors))
    assert set(heads.tensors) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(heads.tensors[name], as_stored(array, dtype), err_msg=name)
    inspect_heads(path)  # and it follows the format
    return heads.keys


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
@pytest.mark.parametrize(("n_heads", "n_layers"), [(1, 1), (5, 1), (2, 3), (2, 0)])
def test_medusa(tmp_path, base, file, dtype, n_heads, n_layers):
    state = medusa_state(n_heads, n_layers)
    folder = write_checkpoint(tmp_path / "m", state, medusa_config(n_heads, n_layers), dtype, file)
    done = convert(folder, base, tmp_path / "h.gguf", "f32")
    assert done.notes == ()
    expected = medusa_expected(state, n_heads, n_layers) if n_layers else {
        f"head.{i}.output.weight": state[f"{i}.0.weight"] for i in range(n_heads)
    }  # fmt: skip
    keys = assert_holds(tmp_path / "h.gguf", expected, dtype)
    assert keys["general.architecture"] == "medusa"
    assert keys["entmtp.format_version"] == 1
    assert keys["medusa.predict_heads"] == n_heads
    assert keys["medusa.block_count"] == n_layers
    assert keys["medusa.embedding_length"] == N_EMBD
    assert keys["medusa.vocab_size"] == N_VOCAB
    assert keys["general.file_type"] == 0
    assert keys["general.name"] == "m"


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("grounded", [False, True])
@pytest.mark.parametrize("n_layers", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_hydra(tmp_path, base, dtype, n_layers, grounded, prefix):
    state = hydra_state(3, n_layers, grounded, prefix)
    folder = write_checkpoint(tmp_path / "h", state, hydra_config(3, n_layers, grounded, prefix), dtype)
    assert convert(folder, base, tmp_path / "h.gguf", "f32").notes == ()
    keys = assert_holds(tmp_path / "h.gguf", hydra_expected(state, 3, n_layers, grounded, prefix), dtype)
    assert keys["hydra.grounded"] is grounded
    assert keys["hydra.prefix_layer"] is prefix
    assert keys["hydra.block_count"] == n_layers
    assert ("hydra.rope.freq_base" in keys) is prefix
    if prefix:
        assert keys["hydra.attention.head_count"] == 4
        assert keys["hydra.attention.head_count_kv"] == 2
        assert keys["hydra.feed_forward_length"] == 64
        assert keys["hydra.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
        assert keys["hydra.rope.freq_base"] == 10000.0


@pytest.mark.parametrize(
    ("outtype", "type", "file_type", "tolerance"),
    [("f16", "F16", 1, 5e-4), ("bf16", "BF16", 32, 4e-3), ("q8_0", "Q8_0", 7, 5e-3), ("q4_0", "Q4_0", 2, 0.126)],
)  # fmt: skip
def test_outtypes(tmp_path, base, outtype, type, file_type, tolerance):
    state = hydra_state(2, 2, True, True)
    folder = write_checkpoint(tmp_path / "h", state, hydra_config(2, 2, True, True))
    convert(folder, base, tmp_path / "h.gguf", outtype)
    heads = read_heads(tmp_path / "h.gguf")
    assert heads.keys["general.file_type"] == file_type
    expected = hydra_expected(state, 2, 2, True, True)
    assert set(heads.tensors) == set(expected)
    for name, array in expected.items():
        assert heads.types[name] == (type if array.ndim == 2 else "F32"), name
        error = np.abs(heads.tensors[name] - array).max()
        assert error <= (tolerance * np.abs(array).max() if array.ndim == 2 else 0), name
    inspect_heads(tmp_path / "h.gguf")


def test_rows_that_fit_no_block_are_f16(tmp_path):
    base = tiny_base(tmp_path / "base.gguf", n_embd=40)
    folder = write_checkpoint(tmp_path / "m", medusa_state(1, n_embd=40), medusa_config(1))
    convert(folder, base, tmp_path / "h.gguf", "q4_0")
    heads = read_heads(tmp_path / "h.gguf")
    assert heads.types["head.0.output.weight"] == "F16"
    assert heads.keys["general.file_type"] == 2
    inspect_heads(tmp_path / "h.gguf")


@pytest.mark.parametrize(
    ("type", "outtype"), [("F32", "f32"), ("F16", "f16"), ("BF16", "bf16"), ("Q4_0", "q8_0")]
)
def test_auto_follows_the_base(tmp_path, type, outtype):
    base = tiny_base(tmp_path / "base.gguf", type=GGMLQuantizationType[type])
    folder = write_checkpoint(tmp_path / "m", medusa_state(), medusa_config())
    assert convert(folder, base, tmp_path / "h.gguf").outtype == outtype
    assert read_heads(tmp_path / "h.gguf").types["head.0.output.weight"] == outtype.upper()


def test_understated_head_count(tmp_path, base, capsys):
    folder = write_checkpoint(tmp_path / "m", medusa_state(5), medusa_config(2))
    assert main([str(folder), "--base", str(base), "--outfile", str(tmp_path / "h.gguf")]) == 0
    assert "config.json says 2 heads, and the checkpoint holds 5" in capsys.readouterr().err
    assert read_heads(tmp_path / "h.gguf").keys["medusa.predict_heads"] == 5


def test_differing_blocks_are_each_stored(tmp_path, base, capsys):
    state = medusa_state(2, 3, shared=False)
    state["1.2.linear.weight"], state["1.2.linear.bias"] = (
        state["1.1.linear.weight"],
        state["1.1.linear.bias"],
    )
    done = convert(
        write_checkpoint(tmp_path / "m", state, medusa_config(2, 3)), base, tmp_path / "h.gguf", "f32"
    )
    expected = medusa_expected(state, 2, 3, shared=False)
    del expected["head.1.blk.2.weight"], expected["head.1.blk.2.bias"]
    assert_holds(tmp_path / "h.gguf", expected)
    assert len(done.notes) == 2
    assert "residual blocks of head 0 differ" in capsys.readouterr().err


def test_equal_but_separate_blocks_are_stored_once(tmp_path, base):
    state = {name: array.copy() for name, array in medusa_state(2, 3).items()}
    convert(write_checkpoint(tmp_path / "m", state, medusa_config(2, 3)), base, tmp_path / "h.gguf", "f32")
    assert_holds(tmp_path / "h.gguf", medusa_expected(state, 2, 3))


def combined_state(n_heads=3):
    """A Medusa-2 model: base and heads together. The base's tensors are of no use, and of a strange dtype."""
    heads = {f"medusa_head.{name}": array for name, array in medusa_state(n_heads).items()}
    rng = np.random.default_rng(5)
    return {
        "model.layers.0.mlp.up_proj.weight": rng.random((8, 8)),
        "lm_head.weight": rng.random((8, 8)),
        **heads,
    }


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_medusa_2_whole_model(tmp_path, base, file):
    folder = write_checkpoint(tmp_path / "m", combined_state(), medusa_config(3), file=file)
    convert(folder, base, tmp_path / "h.gguf", "f32")
    assert_holds(tmp_path / "h.gguf", medusa_expected(medusa_state(3), 3, 1))


@pytest.mark.parametrize(("ending", "save"), [("safetensors", save_safetensors), ("bin", save_torch)])
def test_medusa_2_shards_without_heads_are_not_read(tmp_path, base, ending, save):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(medusa_config(3)))
    stem = "model" if ending == "safetensors" else "pytorch_model"
    shards = [f"{stem}-0000{i}-of-00003.{ending}" for i in (1, 2, 3)]
    weight_map = {}
    for i, name in enumerate(combined_state()):
        weight_map[name] = shards[0] if not name.startswith("medusa") else shards[1 + i % 2]
    for shard in shards[1:]:
        save(folder / shard, {name: a for name, a in combined_state().items() if weight_map[name] == shard})
    (folder / f"{stem}.{ending}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert(folder, base, tmp_path / "h.gguf", "f32")  # the first shard does not even exist
    assert_holds(tmp_path / "h.gguf", medusa_expected(medusa_state(3), 3, 1))


def test_shared_tensors_of_save_model(tmp_path, base):
    """safetensors.torch.save_model stores shared weights once and lists the copies in the metadata."""
    state = medusa_state(2, 2)
    kept = {name: array for name, array in state.items() if ".1.linear" not in name}
    copies = {f"{i}.1.linear.{kind}": f"{i}.0.linear.{kind}" for i in range(2) for kind in ("weight", "bias")}
    folder = write_checkpoint(tmp_path / "m", {}, medusa_config(2, 2), file="medusa_lm_head.safetensors")
    save_safetensors(folder / "medusa_lm_head.safetensors", kept, metadata=copies)
    convert(folder, base, tmp_path / "h.gguf", "f32")
    assert_holds(tmp_path / "h.gguf", medusa_expected(state, 2, 2))


@pytest.mark.parametrize("grounded", [False, True])
@pytest.mark.parametrize("told", [None, True, False])
def test_shapes_tell_whether_heads_are_grounded(tmp_path, base, grounded, told):
    config = hydra_config(2, 1, grounded)
    config.pop("grounded_heads")
    if told is not None:
        config["grounded_heads"] = told
    state = hydra_state(2, 1, grounded)
    done = convert(write_checkpoint(tmp_path / "h", state, config), base, tmp_path / "h.gguf", "f32")
    assert read_heads(tmp_path / "h.gguf").keys["hydra.grounded"] is grounded
    assert len(done.notes) == (told is not None and told is not grounded)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    ("theta", "buffer", "expected"),
    [(None, 10000.0, 10000), (None, 500000.0, 500000), (None, None, 10000), (20000.0, None, 20000), (1e6, 1e6, 1e6)],
)  # fmt: skip
def test_rope_base(tmp_path, base, dtype, theta, buffer, expected):
    name = "prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq"
    state = hydra_state(1, prefix=True)
    state.pop(name)
    if buffer:
        state[name] = (buffer ** (-np.arange(0, 8, 2) / 8)).astype(np.float32)
    config = hydra_config(1, prefix=True, **({"rope_theta": theta} if theta else {}))
    convert(write_checkpoint(tmp_path / "h", state, config, dtype), base, tmp_path / "h.gguf")
    assert read_heads(tmp_path / "h.gguf").keys["hydra.rope.freq_base"] == expected


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_another_number_of_blocks_is_told(tmp_path, base, kind):
    state = medusa_state(2) if kind == "medusa" else hydra_state(2)
    for told, notes in (
        (1, ()), (None, ()),
        (3, ("config.json says 3 residual blocks per head, and the checkpoint holds 1: using 1",)),
    ):  # fmt: skip
        config = medusa_config(2) if kind == "medusa" else hydra_config(2)
        config[f"{kind}_num_layers"] = told
        done = convert(write_checkpoint(tmp_path / "c", state, config), base, tmp_path / "h.gguf")
        assert done.notes == notes
        assert read_heads(tmp_path / "h.gguf").keys[f"{kind}.block_count"] == 1


def test_heads_of_different_depths_are_refused(tmp_path, base):
    state = {
        name: array
        for i, n_blocks in enumerate((2, 3))
        for name, array in medusa_state(2, n_blocks).items()
        if name.startswith(f"{i}.")
    }
    with pytest.raises(ConvertError, match=r"different numbers of residual blocks \(\[2, 3\]\)"):
        convert(write_checkpoint(tmp_path / "c", state, medusa_config(2, 2)), base, tmp_path / "h.gguf")


def test_hydra_outputs_without_bias(tmp_path, base):
    state = hydra_state(2)
    for i in range(2):
        del state[f"hydra_lm_head.{i}.bias"]
    convert(write_checkpoint(tmp_path / "c", state, hydra_config(2)), base, tmp_path / "h.gguf", "f32")
    found = read_heads(tmp_path / "h.gguf").tensors
    assert [name for name in found if "output" in name] == [f"head.{i}.output.weight" for i in range(2)]


@pytest.mark.parametrize("n_head_kv", [1, None])
def test_heads_of_keys_and_values(tmp_path, n_head_kv):
    """One for all queries; as many as there are queries, where the base model does not say."""
    skip = ("attention.head_count_kv",)
    more = {"attention__head_count_kv": n_head_kv} if n_head_kv else {}
    base = tiny_base(tmp_path / "base.gguf", skip=skip, **more)
    state = hydra_state(1, prefix=True)
    width = N_EMBD // 4 * (n_head_kv or 4)
    for name in ("k_proj", "v_proj"):
        key = f"prefix_embeding_layer.layers.0.self_attn.{name}.weight"
        state[key] = np.arange(width * N_EMBD, dtype=np.float32).reshape(width, N_EMBD)
    convert(write_checkpoint(tmp_path / "h", state, hydra_config(1, prefix=True)), base, tmp_path / "h.gguf")
    keys = read_heads(tmp_path / "h.gguf").keys
    assert keys["hydra.attention.head_count"] == 4
    assert keys["hydra.attention.head_count_kv"] == (n_head_kv or 4)


def fnv1a(data: bytes) -> int:
    h = 14695981039346656037
    for byte in data:
        h = (h ^ byte) * 1099511628211 % 2**64
    return h


@pytest.mark.parametrize("tokens", [[b"a", b"b"], ["héé".encode(), b"", b"\xe2\x96\x81the", b"\xff"]])
def test_fingerprint_and_base_name(tmp_path, tokens):
    assert fnv1a(b"foobar") == 0x85944171F73967E8  # published test vector
    base = tiny_base(tmp_path / "base.gguf", n_vocab=len(tokens), tokens=tokens, name=None)
    folder = write_checkpoint(tmp_path / "m", medusa_state(1, n_vocab=len(tokens)), medusa_config(1))
    convert(folder, base, tmp_path / "h.gguf")
    keys = read_heads(tmp_path / "h.gguf").keys
    assert keys["entmtp.tokenizer.fingerprint"] == f"{fnv1a(b''.join(t + bytes(1) for t in tokens)):016x}"
    assert keys["entmtp.base.name"] == ""
    assert keys["entmtp.base.architecture"] == "llama"
    assert not [key for key in keys if "url" in key or "license" in key], "there is nothing to say"


def test_weight_file_given_directly_and_licence(tmp_path, base, monkeypatch):
    folder = write_checkpoint(tmp_path / "m", medusa_state(), medusa_config())
    write_checkpoint(tmp_path / "m", hydra_state(), None)
    (folder / "README.md").write_text("---\ntags:\n- x\nlicense: apache-2.0\n---\nHeads.\n")
    with pytest.raises(ConvertError, match="both Medusa and Hydra"):
        convert(folder, base, tmp_path / "h.gguf")
    monkeypatch.chdir(tmp_path)
    done = convert(folder / "medusa_lm_head.pt", base)
    assert done.outfile == Path("m-heads.gguf")
    assert read_heads(done.outfile).keys["general.license"] == "apache-2.0"


def test_existing_output_is_replaced(tmp_path, base):
    folder = write_checkpoint(tmp_path / "m", medusa_state(), medusa_config())
    (tmp_path / "h.gguf").write_bytes(b"old")
    convert(folder, base, tmp_path / "h.gguf")
    inspect_heads(tmp_path / "h.gguf")
    assert not list(tmp_path.glob(".*")), "temporary files are left"


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_demo_heads(tmp_path, models, kind):
    done = convert(assets() / kind, models["f16"], tmp_path / "h.gguf")
    assert (done.n_heads, done.outtype) == (4, "f16")
    heads = inspect_heads(done.outfile)
    assert heads.keys[f"{kind}.vocab_size"] == 4096
    assert sum(heads.parameters.values()) == {"medusa": 4_457_472, "hydra": 6_047_744}[kind]
