"""What goes wrong for a user: one sentence on stderr, exit code 1 (2 for wrong usage), and no output file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from entmtp.common.errors import ConvertError
from entmtp.convert import convert, main
from helpers.checkpoints import (
    hydra_config,
    hydra_state,
    medusa_config,
    medusa_state,
    save_torch,
    tiny_base,
    write_checkpoint,
)

FIXTURE_OK = list(HealthCheck)  # tmp_path is shared by the examples; a busy machine is no failure


@pytest.fixture
def base(tmp_path):
    return tiny_base(tmp_path / "base.gguf")


@pytest.fixture
def run(tmp_path, base, capsys):
    """Convert a checkpoint through the command; returns exit code and stderr. Nothing else may be left behind."""

    def call(checkpoint, base=base, *more):
        out = tmp_path / "out"
        out.mkdir(exist_ok=True)
        (out / "h.gguf").unlink(missing_ok=True)
        code = main([str(checkpoint), "--base", str(base), "--outfile", str(out / "h.gguf"), *more])
        err = capsys.readouterr().err
        if code:
            assert list(out.iterdir()) == []
            errors = [line for line in err.splitlines() if line.startswith("error: ")]
            assert len(errors) == 1 and err.count("\n") == 1 + err.count("note: "), err
            assert "Traceback" not in err
        return code, err

    return call


def failed(result, *words):
    code, err = result
    assert code == 1
    for word in words:
        assert word in err, err


# checkpoints


@pytest.fixture
def medusa(tmp_path):
    return write_checkpoint(tmp_path / "m", medusa_state(), medusa_config())


@pytest.mark.parametrize("kind", ["medusa", "hydra", "prefix"])
def test_every_tensor_is_needed(tmp_path, run, kind):
    """A renamed or missing tensor is named, whichever it is."""
    if kind == "medusa":
        state, config, optional = medusa_state(2, 2), medusa_config(2, 2), ()
    else:
        prefix = kind == "prefix"
        state, config = hydra_state(2, 2, True, prefix), hydra_config(2, 2, True, prefix)
        optional = ("input_embed_fn", "embed_tokens", "inv_freq", "hydra_lm_head")
    for name in state:
        renamed = {(f"{key}_" if key == name else key): array for key, array in state.items()}
        failed(
            run(write_checkpoint(tmp_path / "c", renamed, config)),
            f"'{name}_'",
            "restore the published names",
        )
        if not any(word in name for word in optional):
            missing = {key: array for key, array in state.items() if key != name}
            failed(run(write_checkpoint(tmp_path / "c", missing, config)), f"'{name}'", "missing")


@pytest.mark.parametrize("present", [(0, 1, 3), (0, 2), (1,)])
def test_a_head_missing_in_between(tmp_path, run, present):
    state = {name: array for name, array in medusa_state(4).items() if int(name[0]) in present}
    gap = next(i for i in range(4) if i not in present)
    failed(
        run(write_checkpoint(tmp_path / "c", state, medusa_config(4))), f"'{gap}.0.linear.weight' is missing"
    )


@pytest.mark.parametrize(
    ("extra", "config", "words"),
    [
        ("0.1.linear.weight", medusa_config(2), "before its output"),
        ("hydra_mlp.1.0.res_connection.weight", hydra_config(2, grounded=False), "block 0 of an ungrounded head"),
        ("hydra_mlp.0.2.linear.weight", hydra_config(2, prefix=True), "whose blocks have odd numbers"),
    ],
)  # fmt: skip
def test_tensors_that_heads_of_this_kind_lack(tmp_path, run, extra, config, words):
    if "medusa_num_heads" in config:
        state = medusa_state(2)
    else:
        state = hydra_state(2, 1, config["grounded_heads"], config["hydra_head_arch"] == "prefix-mlp")
    state[extra] = np.ones((32, 32), np.float32)
    failed(run(write_checkpoint(tmp_path / "c", state, config)), f"'{extra}'", words)


def test_heads_without_a_part(tmp_path, run):
    whole = hydra_state(2)
    blocks = {name: array for name, array in whole.items() if "lm_head" not in name}
    outputs = {name: array for name, array in whole.items() if "hydra_mlp" not in name}
    one = {name: array for name, array in whole.items() if name != "hydra_lm_head.1.weight"}
    for state, missing in (
        (blocks, "hydra_lm_head.0.weight"),
        (outputs, "hydra_mlp.0.0.linear.weight"),
        (one, "hydra_lm_head.1.weight"),
    ):
        folder = tmp_path / missing
        failed(run(write_checkpoint(folder, state, hydra_config(2))), f"'{missing}' is missing")
    failed(run(write_checkpoint(tmp_path / "m", {}, medusa_config(2))), "the file holds no tensors")


@pytest.mark.parametrize("values", [(1.0, 0.1, 0.0, 0.001), (1.0, 0.1, -0.01, 0.001), (1.0, 1.0, 1.0, 1.0)])
def test_no_rotary_frequencies(tmp_path, run, values):
    state = hydra_state(1, prefix=True)
    name = "prefix_embeding_layer.layers.0.self_attn.rotary_emb.inv_freq"
    state[name] = np.array(values, np.float32)
    folder = write_checkpoint(tmp_path / "c", state, hydra_config(1, prefix=True))
    failed(run(folder), "holds no rotary frequencies")


@pytest.mark.parametrize("heads", [(0, 0), (4, 0), (4, 3), (5, 5)])
def test_attention_heads_that_do_not_divide(tmp_path, run, heads):
    base = tiny_base(
        tmp_path / "b.gguf", skip=("attention.head_count", "attention.head_count_kv"),
        attention__head_count=heads[0], attention__head_count_kv=heads[1],
    )  # fmt: skip
    folder = write_checkpoint(tmp_path / "c", hydra_state(1, prefix=True), hydra_config(1, prefix=True))
    failed(run(folder, base), f"{heads[0]} attention heads ({heads[1]} for keys) do not divide a width of 32")


def test_an_outtype_that_is_not_known(tmp_path, medusa, base):
    with pytest.raises(ConvertError, match="outtype 'q3' is not known; use one of f32, "):
        convert(medusa, base, tmp_path / "h.gguf", "q3")


def test_last_head_missing_is_believed_with_a_note(tmp_path, run):
    code, err = run(write_checkpoint(tmp_path / "c", medusa_state(2), medusa_config(3)))
    assert code == 0 and "config.json says 3 heads, and the checkpoint holds 2" in err


@pytest.mark.parametrize("kind", ["medusa", "prefix"])
@pytest.mark.parametrize("change", ["transpose", "cut", "grow", "flat"])
def test_every_shape_is_checked(tmp_path, run, kind, change):
    state = medusa_state(2) if kind == "medusa" else hydra_state(2, 1, True, True)
    config = medusa_config(2) if kind == "medusa" else hydra_config(2, 1, True, True)
    for name, array in state.items():
        if "input_embed_fn" in name or "embed_tokens" in name:
            continue  # copies of the base model's embedding, not read
        wrong = {
            "transpose": lambda a: (
                a[None] if a.ndim == 1 else a.T.copy() if a.shape[0] != a.shape[1] else a[:1]
            ),
            "cut": lambda a: a[:-1].copy(),
            "grow": lambda a: np.concatenate([a, a[:1]]),
            "flat": lambda a: a.reshape(-1) if a.ndim == 2 else a.reshape(-1, 1),
        }[change](array)
        failed(run(write_checkpoint(tmp_path / "c", {**state, name: wrong}, config)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["1.0.linear.bias", "2.1.weight"])
def test_nan_and_inf(tmp_path, run, value, name):
    state = {key: array.copy() for key, array in medusa_state().items()}
    state[name].flat[-3] = value
    failed(run(write_checkpoint(tmp_path / "c", state, medusa_config())), f"'{name}'", "NaN or infinite")


@pytest.mark.parametrize(("outtype", "value"), [("f16", 7e4), ("q8_0", 1e7), ("q4_0", 1e6), ("bf16", 3.4e38)])
def test_values_too_large_for_the_type(tmp_path, run, base, outtype, value):
    state = {key: array.copy() for key, array in medusa_state().items()}
    state["0.1.weight"][3, 5] = value
    folder = write_checkpoint(tmp_path / "c", state, medusa_config())
    failed(run(folder, base, "--outtype", outtype), "'0.1.weight'", "too large", "--outtype f32")
    assert run(folder, base, "--outtype", "f32")[0] == 0


def test_unsupported_dtype(tmp_path, run):
    for file in ("medusa_lm_head.pt", "medusa_lm_head.safetensors"):
        folder = write_checkpoint(tmp_path / file, medusa_state(), medusa_config(), "float64", file)
        failed(run(folder), "is float64", ".to(torch.float32)")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hydra_head_arch": "cross-attn"}, ("'cross-attn'", "not supported")),
        ({"hydra_head_arch": "eagle-attn"}, ("'eagle-attn'", "not supported")),
        ({"hidden_state_offset": 2}, ("hidden_state_offset = 2", "not supported")),
        ({"hydra_num_heads": "three"}, ("'hydra_num_heads' is 'three'",)),
        ({"rope_theta": -1}, ("'rope_theta' is -1",)),
        ({"rope_theta": 1}, ("'rope_theta' is 1 in place of a number above 1",)),
        ({"rope_theta": 500000.0}, ("another base than 500000",)),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("RoPE scaling",)),
    ],
)
def test_unsupported_hydra(tmp_path, run, change, words):
    config = hydra_config(3, prefix=True, **change)
    failed(run(write_checkpoint(tmp_path / "c", hydra_state(3, prefix=True), config)), *words)


def test_prefix_layer_in_one_of_config_and_file(tmp_path, run):
    mlp, prefix = hydra_state(2), hydra_state(2, prefix=True)
    failed(
        run(write_checkpoint(tmp_path / "a", mlp, hydra_config(2, prefix=True))), "q_proj.weight' is missing"
    )
    code, err = run(write_checkpoint(tmp_path / "b", prefix, hydra_config(2)))
    assert code == 0 and "config.json says 'mlp'" in err


def test_first_medusa_release(tmp_path, run):
    state = {name: array for name, array in medusa_state().items() if "linear" in name}
    failed(run(write_checkpoint(tmp_path / "c", state, medusa_config())), "first Medusa release")


def test_model_without_heads(tmp_path, run):
    state = {
        "model.embed_tokens.weight": np.ones((48, 32)),
        "model.layers.0.mlp.up_proj.weight": np.ones((64, 32)),
    }
    failed(run(write_checkpoint(tmp_path / "c", state, {}, file="model.safetensors")), "a model without")


def test_two_sets_of_heads(tmp_path, run):
    state = {f"{p}medusa_head.{name}": a for name, a in medusa_state().items() for p in ("", "old.")}
    failed(run(write_checkpoint(tmp_path / "c", state, medusa_config())), "comes twice")


# files


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "config.json is missing"), ("{", "not valid JSON"), ("[]", "no JSON object"), ("[" * 9000, "not valid")],
)  # fmt: skip
def test_config(run, medusa, text, words):
    (medusa / "config.json").unlink()
    if text is not None:
        (medusa / "config.json").write_text(text)
    failed(run(medusa), words)


def test_missing_and_misplaced_files(tmp_path, run, medusa, base):
    failed(run(tmp_path / "nowhere"), "no such folder or file", "hf:owner/repo")
    failed(run(medusa, tmp_path / "nowhere.gguf"), "no such base model file")
    failed(run(medusa, medusa), "no such base model file")
    (medusa / "medusa_lm_head.pt").rename(medusa / "heads.pt")
    failed(run(medusa), "there is no medusa_lm_head or hydra_lm_head file")
    assert run(medusa / "heads.pt")[0] == 0
    failed(run(medusa / "config.json"), "config.json", "not a PyTorch checkpoint")
    (medusa / "heads.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    failed(run(medusa / "heads.pt"), "Git LFS pointer", "git lfs pull")
    (medusa / "heads.pt").write_bytes(b"")
    failed(run(medusa / "heads.pt"), "empty")


def test_index_of_shards(tmp_path, run):
    folder = write_checkpoint(tmp_path / "m", {}, medusa_config(), file="unused.pt")
    for weight_map, words in (
        ({"medusa_head.0.0.linear.weight": "a.safetensors"}, "a.safetensors is missing"),
        ({"medusa_head.0.0.linear.weight": "../base.gguf"}, "outside the checkpoint"),
        ({"model.norm.weight": "a.safetensors"}, "a model without heads"),
        (["a"], "no 'weight_map'"),
    ):
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        failed(run(folder), words)


@pytest.mark.parametrize("file", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_truncated_anywhere(tmp_path, run, file):
    folder = write_checkpoint(tmp_path / "c", medusa_state(), medusa_config(), file=file)
    whole = (folder / file).read_bytes()
    for cut in (
        *range(0, 400, 7),
        *range(400, len(whole), len(whole) // 60),
        *range(len(whole) - 40, len(whole)),
    ):
        (folder / file).write_bytes(whole[:cut])
        failed(run(folder), file)


@settings(max_examples=150, deadline=None, suppress_health_check=FIXTURE_OK)
@given(st.data())
def test_flipped_bytes_in_a_torch_file(tmp_path, run, data):
    """Wherever a byte is flipped: refused, or (in a field that does not matter) the output is the same."""
    folder = write_checkpoint(tmp_path / "c", medusa_state(1), medusa_config(1))
    path, out = folder / "medusa_lm_head.pt", tmp_path / "out" / "h.gguf"
    if not (tmp_path / "good").exists():
        assert run(folder)[0] == 0
        out.rename(tmp_path / "good")
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    if run(folder)[0] == 0:
        assert out.read_bytes() == (tmp_path / "good").read_bytes()


# base models


@pytest.mark.parametrize(
    ("key", "words"), [("tokens", "tokenizer.ggml.tokens"), ("embedding_length", "embedding_length")]
)
def test_base_without(tmp_path, run, medusa, key, words):
    failed(run(medusa, tiny_base(tmp_path / "b.gguf", skip=(key,))), words)


@pytest.mark.parametrize(
    "key", ["attention.head_count", "attention.layer_norm_rms_epsilon", "feed_forward_length"]
)
def test_base_without_what_a_prefix_layer_needs(tmp_path, run, key):
    folder = write_checkpoint(tmp_path / "c", hydra_state(prefix=True), hydra_config(prefix=True))
    failed(run(folder, tiny_base(tmp_path / "b.gguf", skip=(key,))), f"llama.{key}")
    scaled = tiny_base(tmp_path / "s.gguf", rope__scaling__type="linear")
    failed(run(folder, scaled), "RoPE scaling")
    no_number = tiny_base(tmp_path / "n.gguf", skip=(key,), **{key.replace(".", "__"): "x"})
    failed(run(folder, no_number), f"llama.{key}")


def test_base_of_another_size(tmp_path, run, medusa):
    failed(run(medusa, tiny_base(tmp_path / "b.gguf", n_vocab=50)), "48 tokens", "50", "lmsys/vicuna-7b-v1.3")
    failed(run(medusa, tiny_base(tmp_path / "b.gguf", n_embd=64)), "32 wide", "64", "lmsys/vicuna-7b-v1.3")
    assert run(medusa)[0] == 0
    heads = tmp_path / "heads.gguf"
    (tmp_path / "out" / "h.gguf").rename(heads)
    failed(run(medusa, heads), "heads file, not a base model")


def test_base_truncated_anywhere(tmp_path, run, medusa, base):
    whole = base.read_bytes()
    for cut in (*range(0, 120, 5), *range(120, len(whole), len(whole) // 60), len(whole) - 1):
        (tmp_path / "cut.gguf").write_bytes(whole[:cut])
        failed(run(medusa, tmp_path / "cut.gguf"), "cut.gguf")
    for start, words in (
        (b"GGML", "not a GGUF file"),
        (b"GGUF\0\0\0\3", "version"),
        (b"GGUF\1\0\0\0", "version 1 "),
    ):
        (tmp_path / "cut.gguf").write_bytes(start + whole[len(start) :])
        failed(run(medusa, tmp_path / "cut.gguf"), words)


@settings(max_examples=60, deadline=None, suppress_health_check=FIXTURE_OK)
@given(st.data())
def test_flipped_bytes_in_the_base(tmp_path, run, base, data):
    """Never a traceback, and never a loop over a count that a damaged file gives."""
    folder = write_checkpoint(tmp_path / "c", medusa_state(1), medusa_config(1))
    whole = bytearray(base.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, 3000))] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "b.gguf").write_bytes(whole)
    run(folder, tmp_path / "b.gguf")


# the command


def test_output_without_a_folder(tmp_path, run, medusa, base):
    failed(run(medusa, base, "--outfile", str(tmp_path / "no" / "h.gguf")), "no/h.gguf", "change --outfile")
    failed(run(medusa, base, "--outfile", str(tmp_path)), "change --outfile")


def test_output_over_an_input(medusa, base, capsys):
    before = base.read_bytes(), (medusa / "medusa_lm_head.pt").read_bytes()
    for out in (base, medusa / "medusa_lm_head.pt"):
        assert main([str(medusa), "--base", str(base), "--outfile", str(out)]) == 1
        assert "one of the files to read" in capsys.readouterr().err
    assert before == (base.read_bytes(), (medusa / "medusa_lm_head.pt").read_bytes())


@pytest.mark.parametrize(
    "args",
    [[], ["m"], ["--base", "b"], ["m", "--base", "b", "--outtype", "q2"], ["m", "--base", "b", "--revision", "r"],
     ["m", "--inspect", "h"], ["--inspect", "h", "--outtype", "f16"], ["m", "--base", "b", "--what"]],
)  # fmt: skip
def test_usage_errors(args, capsys):
    with pytest.raises(SystemExit) as info:
        main(args)
    assert info.value.code == 2
    assert "usage: entmtp convert" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as info:
        main(["--help"])
    assert info.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out and "hf:" in out and "--inspect" in out


@pytest.mark.skipif(os.name == "nt", reason="limits a process as POSIX does")
def test_full_disk(tmp_path, medusa, base):
    """A write that fails leaves nothing behind. The limit on file size stands in for a full disk."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000));"
        "from entmtp.convert import main; sys.exit(main(sys.argv[1:]))"
    )
    out = tmp_path / "out"
    out.mkdir()
    args = [str(medusa), "--base", str(base), "--outfile", str(out / "h.gguf")]
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert (done.returncode, list(out.iterdir())) == (1, [])
    assert (
        done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "file too large" in done.stderr
    )


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c(tmp_path):
    n_embd, n_vocab = 512, 16384
    base = tiny_base(tmp_path / "base.gguf", n_embd, n_vocab)
    state = medusa_state(1, 1, n_embd, n_vocab)
    for i in range(1, 5):  # five heads, written once
        state.update({f"{i}{name[1:]}": array for name, array in state.items() if name.startswith("0.")})
    folder = tmp_path / "m"
    write_checkpoint(folder, {}, medusa_config(5))
    save_torch(folder / "medusa_lm_head.pt", state)
    out = tmp_path / "out"
    out.mkdir()
    args = [str(folder), "--base", str(base), "--outfile", str(out / "h.gguf"), "--outtype", "q4_0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "entmtp.convert", *args],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # a test run in the background may have been started with the signal ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(out.iterdir()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, "stopped; nothing was written")
    assert list(out.iterdir()) == []
