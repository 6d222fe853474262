"""The options that every command loads its model with."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import pytest

from entmtp.options.model import add_model_options, load


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_model_options(parser)
    return parser.parse_args(arguments)


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
        (["-m", "BASE", "--trees", "generic-hydra"], "--trees: for drafting"),
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
    "arguments", [["--threads", "0"], ["--ctx", "-1"], ["--ctx", "x"], ["--draft", "best"]]
)
def test_usage_errors(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as e:
        parse(*arguments)
    assert e.value.code == 2
