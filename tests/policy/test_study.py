"""The benchmark's own parts: useless heads that load, models of any shape, tables that say what was measured."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from entmtp import Llama
from entmtp.bench import study, whatif
from entmtp.bench.cli import main
from entmtp.models.shapes import SHAPES, write_heads, write_model
from helpers.settings import N_THREADS, prompts


def write_tasks(folder: Path) -> list[str]:
    paths = []
    for task in ("humaneval", "literature"):
        path = folder / f"{task}.jsonl"
        path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts(task)[:4]))
        paths.append(str(path))
    return paths


@pytest.fixture(scope="module")
def studied(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small study through the command line."""
    folder = tmp_path_factory.mktemp("study")
    arguments = [
        "--study", "--model", str(models["q8_0"]), "--heads", str(models["hydra"]), "--prompts", *write_tasks(folder),
        "--tokens", "32", "--temp", "0.8", "--ctx", "1024", "--threads", str(N_THREADS),
        "--traces", str(folder / "traces"), "--banks", str(folder / "banks"), "-o", str(folder / "study.json"),
    ]  # fmt: skip
    assert main(arguments) == 0
    return folder


def test_a_study_reports_every_method_on_every_task(studied: Path) -> None:
    (report,) = json.loads((studied / "study.json").read_text())["studies"]
    assert set(report["tasks"]) == {"humaneval", "literature", "all"}
    for rows in report["tasks"].values():
        assert set(rows) == {*study.METHODS, "oracle"}
        assert rows[study.PLAIN_LABEL]["ratio"] == [1.0, 1.0, 1.0]
        assert rows[study.PLAIN_LABEL]["tokens_per_step"] == 1.0
        assert all(
            r["answers"] == rows[study.PLAIN_LABEL]["answers"] > 0 for k, r in rows.items() if k != "oracle"
        )
        assert rows[study.PUBLISHED_TREE]["tokens_per_step"] > 1.0
        assert rows["oracle"]["predicted"] >= rows[study.ENTROPY]["predicted"] - 0.02
    assert len(list((studied / "banks").glob("*.json"))) == 1


def test_a_study_can_be_drawn(studied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plot", str(studied / "study.json")]) == 0
    assert (studied / "study.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    (studied / "other.json").write_text("{}")
    assert main(["--plot", str(studied / "other.json")]) == 1
    assert "no studies" in capsys.readouterr().err
    assert not (studied / "other.png").exists()


def test_what_if_replays_the_same_traces(studied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = studied / "whatif.json"
    folder = str(studied / "traces")
    assert (
        main(["--what-if", "flat", "tiny", "--traces", folder, "--threads", str(N_THREADS), "-o", str(out)])
        == 0
    )
    flat, tiny = json.loads(out.read_text())["what_if"]
    (row,) = flat["rows"]
    assert row["best single tree"] > 1.0 and row["oracle"] >= row["confidence"]
    assert len(tiny["rows"]) == 1 and tiny["costs"]["hydra"]["verify"]
    assert "#### costs: flat" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no trace files"):
        whatif.run(studied / "banks", "flat", N_THREADS)


def test_parts_of_the_policies_are_weighed(studied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = studied / "ablation.json"
    assert main(["--ablate", "roofline", "--traces", str(studied / "traces"), "-o", str(out)]) == 0
    rows = json.loads(out.read_text())["ablation"]
    assert {f"confidence, {name}" for name in whatif.VARIANTS} <= set(rows)
    assert all(len(v) == 1 and 0.3 < v[0] < 3.0 for v in rows.values())
    assert "| confidence, without hits |" in capsys.readouterr().out


def test_useless_heads_are_never_right(models: dict[str, Path], tmp_path: Path) -> None:
    path = study.make_useless(models["hydra"], tmp_path / "useless.gguf")
    settings = {"n_ctx": 256, "n_threads": N_THREADS, "n_threads_batch": N_THREADS, "verbose": False}
    llm = Llama(
        models["q8_0"], draft="entmtp", heads=path, trees="generic-hydra:n8", policy="static", **settings
    )
    plain = Llama(models["q8_0"], **settings)
    prompt = llm.tokenize(b"def add(a, b):\n")
    a, b = (study.decode(m, prompt, 48, 0.0, 1)["tokens"] for m in (llm, plain))
    assert a == b
    assert llm.draft_stats.n_accepted <= 0.02 * llm.draft_stats.n_drafted
    llm.close()
    plain.close()


@pytest.mark.parametrize("arch", ["medusa", "hydra"])
def test_models_of_a_shape_decode(arch: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.gguf", SHAPES["tiny"])
    heads = write_heads(tmp_path / "h.gguf", model, SHAPES["tiny"], arch)
    settings = {"n_ctx": 256, "n_threads": N_THREADS, "n_threads_batch": N_THREADS, "verbose": False}
    llm = Llama(model, draft="entmtp", heads=heads, trees=f"generic-{arch}:n4", policy="static", **settings)
    tokens = study.decode(llm, [1, 2, 3], 16, 0.0, 1)["tokens"]
    assert len(tokens) == 16 and llm.draft_stats.n_drafted > 0
    assert np.isfinite(llm._decoder.logits(llm.n_vocab())).all()  # type: ignore[union-attr]
    llm.close()
