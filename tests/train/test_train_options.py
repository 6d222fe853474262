"""The trainer's options, which are fields of one class. Needs no PyTorch."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import pytest

from entmtp.train import Options
from entmtp.train.options import PRESETS, Settings, options_of, setup_arg_parser
from entmtp.train.options import parse as parse_line

NEEDED = ("--model", "m.gguf", "-o", "h.gguf")

# flag: field, a word that is not the default, its value
FLAGS = {
    "--torch-dir": ("torch_folder", "folder", Path("folder")), "--outtype": ("outtype", "q4_0", "q4_0"),
    "--arch": ("arch", "medusa", "medusa"), "--heads": ("n_heads", "2", 2), "--layers": ("n_layers", "3", 3),
    "--draft-vocab": ("draft_vocab", "100", 100), "--lm-head": ("lm_head", "shared", "shared"),
    "--data": ("data", "a.txt", ("a.txt",)), "--tokens": ("n_tokens", "500k", 500_000),
    "--seq-len": ("seq_len", "64", 64), "--own": ("own", "0.5", 0.5), "--temps": ("temps", "0,1", (0.0, 1.0)),
    "--raw": ("raw", None, True), "--made-up": ("made_up", "0.25", 0.25),
    "--held-out": ("n_held_out", "6", 6), "--epochs": ("epochs", "1.5", 1.5),
    "--batch-tokens": ("batch_tokens", "300", 300), "--lr": ("lr", "0.01", 0.01),
    "--schedule": ("schedule", "linear", "linear"), "--weight-decay": ("weight_decay", "0", 0.0),
    "--clip": ("clip", "2", 2.0), "--head-decay": ("head_decay", "1", 1.0), "--noise": ("noise", "5", 5.0),
    "--loss": ("loss", "text", "text"), "--top-k": ("k", "8", 8), "--bf16": ("bf16", "off", False),
    "--seed": ("seed", "7", 7), "--threads": ("n_threads", "1", 1), "--n-gpu-layers": ("n_gpu_layers", "-1", -1),
    "--eval-every": ("eval_every", "9", 9), "--save-every": ("save_every", "9", 9),
    "--cache-gb": ("cache_gb", "1", 1.0), "--work": ("work", "w", Path("w")), "--keep-work": ("keep_work", None, True),
    "--resume": ("resume", None, True), "--restart": ("restart", None, True),
}  # fmt: skip


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of that name."""
    monkeypatch.chdir(tmp_path)
    Path("m.gguf").write_bytes(b"GGUF")
    return Path("m.gguf")


def parse(*words: str) -> Options:
    return options_of(setup_arg_parser().parse_args([*NEEDED, *words]))


def test_a_command_without_options_is_options_without_arguments(model: Path) -> None:
    assert parse() == Options(model, Path("h.gguf"))


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_sets_its_field(flag: str, model: Path) -> None:
    name, word, value = FLAGS[flag]
    found = parse(*[flag] if word is None else [flag, word])
    assert getattr(found, name) == value != getattr(parse(), name)
    assert found == Options(model, Path("h.gguf"), **{name: value})


def test_all_fields_are_flags() -> None:
    assert {f.name for f in fields(Options)} - {name for name, _, _ in FLAGS.values()} == {
        "model", "outfile", "warmup",
    }  # fmt: skip
    text = setup_arg_parser().format_help()
    assert all(f"  {flag}" in text for flag in FLAGS)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str, model: Path) -> None:
    """A preset is its options; those given beside it are preferred, wherever they stand."""
    expected = Options(model, Path("h.gguf"), **PRESETS[name])
    assert options_of(parse_line([*NEEDED, "--preset", name])) == expected != parse()
    own = parse_line(["--tokens", "5k", *NEEDED, "--preset", name, "--arch", "medusa"])
    assert options_of(own) == replace(expected, n_tokens=5000, arch="medusa")


def test_the_name_of_before(model: Path) -> None:
    assert parse("--share-lm-head").lm_head == "base"
    assert parse("--draft-vocab", "all").draft_vocab is None and parse().draft_vocab == "auto"


def test_the_loops_part(model: Path) -> None:
    options = Options(model, Path("h.gguf"), lr=0.5, seed=3, epochs=2.0, batch_tokens=100, warmup=0.1)
    assert options.settings == Settings(lr=0.5, seed=3, epochs=2.0, batch_tokens=100, warmup=0.1)
    assert options.n_steps(1000) == 20 and options.n_steps(10) == 1
    # two steps up to the highest rate, then down to none
    assert [options.rate(step, 20) for step in (0, 1, 2, 11, 20)] == pytest.approx(
        [0.25, 0.5, 0.5, 0.25, 0.0]
    )
