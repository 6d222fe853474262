"""The study of heads: names of checkpoints, and a small study through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from entmtp.bench.cli import main
from entmtp.bench.heads import FORMS, checkpoints
from entmtp.models.assets import assets
from helpers.loaded import every_model
from helpers.settings import prompts


def test_checkpoints_and_their_forms() -> None:
    every = tuple(FORMS)
    assert checkpoints(["a/hydra", "b=c", "d:shared,shared+vocab=e"], every) == [
        ("hydra", "a/hydra", every), ("b", "c", every), ("d", "e", ("shared", "shared+vocab")),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no form 'small'"):
        checkpoints(["a:small=b"], every)
    with pytest.raises(ValueError, match="the same name"):
        checkpoints(["x/hydra", "y/hydra"], every)


def write_prompts(folder: Path, n: int) -> list[str]:
    path = folder / "gsm8k.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts("gsm8k")[:n]), "utf-8")
    return [str(path)]


def test_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(prompts()), "utf-8")
    out = tmp_path / "study.json"
    arguments = [
        "heads", str(assets() / "medusa"), "-m", str(assets() / "demo-base-q8_0.gguf"),
        "--prompts", *write_prompts(tmp_path, 2), "--draft-text", str(text),
        "--forms", "full", "shared+vocab", "--types", "q4_k", "--heads-vocab", "512", "--tokens", "24",
        "--rounds", "1", "--threads", "1", "--ctx", "768", "--flash-attn", "-o", str(out),
    ]  # fmt: skip
    with every_model() as made:
        assert main(arguments) == 0
    assert len(made) == 3, "plain, and each heads file"
    assert {(m.n_ctx, m.threads, m.flash_attn) for m in made} == {(768, (1, 1), True)}
    report = json.loads(out.read_text("utf-8"))
    full, cheap = report["heads"]
    assert (full["form"], cheap["form"]) == ("full", "shared+vocab")
    assert cheap["bytes"] < full["bytes"] / 3 and cheap["memory"] < full["memory"]
    assert report["draft_vocab"]["size"] == 512
    for row in (full, cheap):
        assert len(row["draft_us"]) == 4 and min(row["draft_us"]) > 0
        assert 1.0 <= row["chain"] <= 5.0 and row["tokens_per_step"] >= 1.0
        assert row["tokens_per_second"] > 0 and row["pairs"] == row["answers"] == 2
    table = out.with_suffix(".md").read_text("utf-8")
    assert table.strip() in capsys.readouterr().out
    assert table.count("\n| ") == 3 and "Draft vocabulary: 512 tokens by text.txt" in table
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(prompts()), "utf-8")
    files = write_prompts(tmp_path, 2)
    assert main(["heads", str(tmp_path / "none"), "--prompts", *files, "--draft-text", str(text)]) == 1
    assert "there is no such folder" in capsys.readouterr().err
    assert main(["heads", str(assets() / "medusa"), "--prompts", str(tmp_path / "none.jsonl")]) == 1
    assert "none.jsonl" in capsys.readouterr().err
    assert main(["heads", "a:small=b", "--prompts", *files]) == 2
    assert "no form 'small'" in capsys.readouterr().err
    assert main(["heads", str(assets() / "medusa"), "--prompts", *files, "--heads", "h.gguf"]) == 2
    assert "--heads has no place here" in capsys.readouterr().err
