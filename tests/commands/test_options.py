"""The options that every command loads its model with."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import re
import shutil
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

import entmtp.llama
from entmtp import Bank, drafting
from entmtp.measure.known import machine_key
from entmtp.native import abi, arrays, stats
from entmtp.options import table
from entmtp.options.model import add_model_options, arguments, load, words
from entmtp.options.table import OPTIONS, Option
from entmtp.serve.settings import setting

LOADING = ("chat.cli", "doctor.cli", "generate", "tune.cli")

# a value of each option that is not the default; files are put in place of A and B
OTHER = {
    "model": "A", "heads": "B", "ctx": "512", "threads": "2", "n_gpu_layers": "0", "rpc": "127.0.0.1:1",
    "tensor_split": "2,1", "flash_attn": "yes", "cache_type": "q8_0", "kernels": "off", "outputs": "rows",
    "draft": "best-depth",
    "drafters": "text,heads", "draft_model": "C", "draft_vocab": "1024", "lookup": "D,E",
    "trees": "generic-hydra", "score": "top1", "calibrate": "no", "adapt": "no", "accept": "typical",
    "typical_epsilon": "0.5", "typical_alpha": "0.7",
}  # fmt: skip


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    return parser.parse_args(arguments)


def written(option: Option, flag: str, word: str) -> list[str]:
    """An option as a user writes it."""
    if option.type is not bool:
        return [flag, word]
    return [flag if word == "yes" else f"--no-{flag[2:]}"]


#
# the table
#


def test_the_table_is_whole() -> None:
    """What `entmtp.Llama` adds to llama-cpp-python's are options, and each option is an argument of it."""
    own = inspect.signature(entmtp.Llama.__init__).parameters
    stock = inspect.signature(llama_cpp.Llama.__init__).parameters
    named = [name for option in OPTIONS for name in option.arguments]
    assert len(named) == len(set(named)) and set(named) <= own.keys() | stock.keys()
    assert own.keys() - set(named) == {"self", "draft", "stats", "kwargs"}
    said = {True: "yes", False: "no", None: "auto"}
    for option in OPTIONS:
        if option.group == "drafting" and option.name not in ("draft", "trees", "lookup"):
            default = own[option.arguments[0]].default
            assert option.usual == said.get(default, str(default)), option.name


def test_names_are_the_librarys() -> None:
    assert tuple(abi.POLICIES) == table.POLICIES
    assert tuple(abi.SCORES) == table.SCORES
    assert set(table.OUTPUTS) == set(drafting.OUTPUTS) == set(abi.OUTPUTS)
    assert table.ACCEPT == drafting.ACCEPT
    assert table.NEED_HEADS == arrays.NEED_HEADS
    assert tuple(abi.SOURCES) == table.DRAFTERS == stats.DRAFTERS


@pytest.mark.parametrize("command", LOADING)
def test_every_command_lists_the_options(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # no line is broken
    parser = importlib.import_module(f"entmtp.{command}").setup_arg_parser()
    text = " ".join(parser.format_help().split())
    for option in OPTIONS:
        there = option.group != "drafting" or command != "tune.cli"
        listed = (re.search(rf"{flag}[ ,]", text) is not None for flag in option.spellings)
        assert {*listed, option.help in text} == {there}, option.name


def test_the_server_lists_the_options() -> None:
    from entmtp.serve.cli import setup_arg_parser

    text = setup_arg_parser().format_help()
    assert all(f"\n  --{setting(option)} " in text for option in OPTIONS)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: o.name)
def test_a_command_line_of_options(option: Option) -> None:
    """Each spelling gives the value, `words` gives the value again, and `arguments` the argument of `Llama`."""
    nothing = vars(parse())
    for flag in option.spellings:
        args = parse(*written(option, flag, OTHER[option.name]))
        changed = {name for name, value in vars(args).items() if value != nothing[name]}
        assert changed == {option.name}
        assert parse(*words(args)) == args
        found = arguments(args, Path("heads"))
        if option.group != "files":
            assert {name: found[name] for name in option.arguments} == dict.fromkeys(
                option.arguments, getattr(args, option.name)
            )
    assert arguments(parse(), None) == {"draft": "entmtp", "heads": None}
    assert arguments(parse("--draft", "off"), None) == {}
    assert arguments(parse(), Path("h")) == {"draft": "entmtp", "heads": Path("h")}


#
# what reaches the model
#


def test_all_options_reach_llama(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """`Llama` is made with every value, but for RPC servers (tests/decode/test_rpc.py), and a model that drafts and
    texts to draft from, which go with another policy."""
    seen: dict[str, Any] = {}

    class Seen(entmtp.Llama):
        def __init__(self, path: Path, **settings: Any):
            seen.update(settings, model_path=path)
            super().__init__(path, **settings)

    monkeypatch.setattr("entmtp.llama.Llama", Seen)
    files = {"A": str(models["q8_0"]), "B": str(models["hydra"])}
    words = [
        word for option in OPTIONS if option.name not in ("rpc", "draft_model", "lookup")
        for word in written(option, option.flag, files.get(OTHER[option.name], OTHER[option.name]))
    ]  # fmt: skip
    with contextlib.closing(load(parse(*words))) as llm:
        assert seen == {
            "model_path": models["q8_0"], "draft": "entmtp", "heads": models["hydra"], "n_ctx": 512, "n_threads": 2,
            "n_threads_batch": 2, "n_gpu_layers": 0, "tensor_split": [2.0, 1.0], "flash_attn": True, "kernels": "off",
            "outputs": "rows", "policy": "best-depth", "trees": "generic-hydra", "score": "top1", "calibrate": False,
            "drafters": "text,heads", "draft_vocab": 1024, "type_k": "q8_0", "type_v": "q8_0",
            "adapt": False, "accept": "typical", "typical_epsilon": 0.5, "typical_alpha": 0.7, "verbose": False,
        }  # fmt: skip
        assert llm.policy == "best-depth" and llm.decoder.outputs.mode == "rows"
        assert (llm.context_params.type_k, llm.context_params.type_v) == (8, 8)


def test_a_model_that_drafts(models: dict[str, Path]) -> None:
    """`--draft-model` reaches `Llama`, and drafts."""
    drafter = ["--draft-model", str(models["q8_0"]), "--draft-vocab", "1024"]
    with contextlib.closing(load(parse("-m", str(models["q8_0"]), *drafter))) as llm:
        assert llm.draft_vocab == 1024
        assert llm.drafters[-1] == "model"
        assert llm.draft_model_path == str(models["q8_0"])


def test_texts_to_draft_from(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--lookup` reaches `Llama`: files and folders, with commas between them."""
    monkeypatch.setenv("ENTMTP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "folder").mkdir()
    for name in ("a.txt", "folder/b.txt"):
        (tmp_path / name).write_text("Tom has 12 boxes.")
    word = f"{tmp_path / 'a.txt'},{tmp_path / 'folder'}"
    with contextlib.closing(load(parse("-m", str(models["q8_0"]), "--lookup", word))) as llm:
        assert llm.n_lookup == 2 * len(llm.tokenize(b"Tom has 12 boxes.", add_bos=False))


def rejected(models: dict[str, Path], *options: str) -> int:
    """Guesses that were not taken, at temperature 0.8."""
    common = ("-m", str(models["q8_0"]), "--heads", str(models["hydra"]), "--threads", "1", "--ctx", "256")
    one = ("--draft", "static", "--trees", "generic-hydra:n2")
    with contextlib.closing(load(parse(*common, *one, *options))) as llm:
        llm.create_completion("Question: Tom has 12 boxes", max_tokens=40, temperature=0.8, seed=1)
        assert llm.draft_stats.n_accepted > 5
        return llm.draft_stats.n_drafted - llm.draft_stats.n_accepted


@pytest.mark.parametrize("option", ["--typical-epsilon", "--typical-alpha"])
def test_typical_acceptance(models: dict[str, Path], option: str) -> None:
    """Where nothing is asked of a guess, every one is taken but that of the last step, after the end."""
    assert rejected(models, "--accept", "typical", option, "0") <= 1
    assert rejected(models, option, "0") > 5  # losslessly


def test_costs_are_measured_unless_told(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENTMTP_CACHE", str(tmp_path))
    common = ("-m", str(models["q8_0"]), "--heads", str(models["hydra"]), "--threads", "1", "--ctx", "256")
    for option, own in (("--no-calibrate", False), ("--calibrate", True)):
        with contextlib.closing(load(parse(*common, option))) as llm:
            assert llm.bank is not None and llm.bank.costs is not None
            assert (llm.bank.costs == Bank.load("generic-hydra").pruned(4).costs) != own
            assert (llm.bank.costs.key == machine_key(llm)) == own


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENTMTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_without_options_it_is_the_demo_and_drafts(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = load(parse(), calibrate=False)
    assert Path(llm.model_path).is_relative_to(cache) and Path(llm.heads_path or "").is_relative_to(cache)
    assert llm.n_ctx() == 1024, "the model's own, which is less than the default"
    llm.close()
    assert capsys.readouterr() == ("", "")


def test_options_reach_the_model(models: dict[str, Path]) -> None:
    common = ("-m", str(models["q8_0"]), "--ctx", "256", "--threads", "1")
    llm = load(parse(*common, "--draft", "off"))
    assert (llm.n_ctx(), llm.n_threads, llm.n_threads_batch, llm.heads_path) == (256, 1, 1, None)
    llm.close()
    drafting = ("--heads", str(models["hydra"]), "--draft", "static", "--trees", "generic-hydra:n4")
    llm = load(parse(*common, *drafting), n_ctx=512)
    assert llm.n_ctx() == 512, "what the program asks for comes before the options"
    llm.create_completion("def f(", max_tokens=16, temperature=0.0)
    assert set(llm.draft_stats.trees_used) == {"n4"}
    llm.close()


def test_heads_beside_the_model(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copy(models["q8_0"], tmp_path / "m.gguf")
    for name in ("medusa", "hydra"):
        shutil.copy(models[name], tmp_path / f"{name}.gguf")
    llm = load(parse("-m", str(model)), calibrate=False)
    assert llm.heads_path == str(tmp_path / "hydra.gguf")
    llm.close()
    assert capsys.readouterr().err == "note: 2 heads files fit m.gguf: using hydra.gguf, not medusa.gguf\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "no-such.gguf"], "there is no such model file"),
        (["-m", "BASE", "--heads", "no-such.gguf"], "there is no such heads file"),
        (["-m", "HYDRA"], "this is a heads file, not a base model"),
        (["-m", "BASE", "--heads", "BASE"], "not draft heads"),
        (["-m", "BASE", "--draft", "confidence"], "--draft confidence needs draft heads"),
        (
            ["-m", "BASE", "--draft", "off", "--trees", "generic-hydra"],
            "--trees: for drafting, but --draft is off",
        ),
        (["-m", "BASE", "--drafters", "heads"], "heads are to draft, but there are none"),
        (["-m", "BASE", "--draft", "off", "--score", "top1"], "--score: for drafting"),
        (["-m", "BASE", "--heads", "HYDRA", "--draft", "off"], "--heads are given, but --draft is off"),
        (["-m", "BASE", "--heads", "HYDRA", "--draft", "static"], "needs one tree"),
        (["-m", "BASE", "--heads", "HYDRA", "--trees", "no-such"], "no tree bank"),
        (["-m", "BASE", "--kernels", "mmx"], "no kernels named mmx"),
        (["-m", "BASE", "--ctx", "100000000"], "more than 64 times the 1024 tokens"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_get_one_sentence(arguments: list[str], words: str, models: dict[str, Path]) -> None:
    files = {"BASE": str(models["q8_0"]), "HYDRA": str(models["hydra"])}
    with pytest.raises((RuntimeError, ValueError), match=words) as e:
        load(parse(*(files.get(a, a) for a in arguments)), calibrate=False)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--threads", "0"], ["--ctx", "-1"], ["--ctx", "x"], ["--draft", "best"], ["--policy", "best"],
        ["--typical-epsilon=-1"], ["--typical-alpha", "nan"], ["--n-gpu-layers=-2"], ["--outputs", "gpu"],
        ["--accept", "most"], ["--drafters", "mind"], ["--rpc", "nowhere"], ["--tensor-split", "0,0"],
    ],
)  # fmt: skip
def test_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as e:
        parse(*arguments)
    assert e.value.code == 2
