"""Studies: tuned policies live and by replay, traces under other costs, useless heads, models of any shape."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from entmtp import Llama
from entmtp.bank.bank import Bank
from entmtp.bank.traces import Traces
from entmtp.bench import ablate, study
from entmtp.bench.cli import main
from entmtp.bench.passes import weights_per_pass
from entmtp.measure import search
from entmtp.measure.replay import replay
from entmtp.measure.turns import Prompt, decode
from entmtp.models.shapes import SHAPES, write_heads, write_model
from helpers.loaded import every_model
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
    with every_model() as made:
        assert main([*arguments, "--flash-attn"]) == 0
    assert len(made) == 9, "to tune, and for every method"
    assert {(m.n_ctx, m.threads, m.flash_attn) for m in made} == {(1024, (N_THREADS, N_THREADS), True)}
    return folder


def test_a_study_reports_every_method_on_every_task(studied: Path) -> None:
    (report,) = json.loads((studied / "study.json").read_text())["studies"]
    assert set(report["tasks"]) == {"humaneval", "literature", "all"}
    for rows in report["tasks"].values():
        assert set(rows) == {*study.METHODS, "oracle"}
        assert rows[study.PLAIN_LABEL]["ratio"] == [1.0, 1.0, 1.0]
        assert rows[study.PLAIN_LABEL]["tokens_per_step"] == 1.0
        found = [(r["answers"], r["pairs"]) for k, r in rows.items() if k != "oracle"]
        assert set(found) == {(found[0][0], found[0][0])} and found[0][0] > 0
        assert rows[study.PUBLISHED_TREE]["tokens_per_step"] > 1.0
        assert rows["oracle"]["predicted"] >= rows[study.ENTROPY]["predicted"] - 0.02
    assert report["tasks"]["all"][study.PLAIN_LABEL]["answers"] == 4  # half of the prompts
    assert len(list((studied / "banks").glob("*.json"))) == 1
    table = (studied / "study.md").read_text("utf-8")
    assert all(f"| {m} |" in table for m in study.METHODS) and "nan" not in table


def test_predictions_are_those_of_the_tuned_bank(studied: Path) -> None:
    """Replay with the bank's own costs says the same as what the tuner found."""
    (report,) = json.loads((studied / "study.json").read_text())["studies"]
    (bank_file,) = (studied / "banks").glob("*.json")
    bank = Bank.load(bank_file)
    (traces,) = (studied / "traces").glob("*.npz")
    held_out = Traces.load(traces).split()[1]
    runs = {m: replay(held_out, bank, p) for m, p in ((study.PLAIN_LABEL, "off"), (study.ENTROPY, "entropy"))}
    plain = runs[study.PLAIN_LABEL].us_total
    for method, run in runs.items():
        assert report["tasks"]["all"][method]["predicted"] == pytest.approx(plain / run.us_total, abs=2e-3)
    costs = bank.need_costs()
    whole = search.oracle(held_out, costs) * 1e6 + runs[study.PLAIN_LABEL].n_tokens * (
        costs.sample + costs.token
    )
    assert report["tasks"]["all"]["oracle"]["predicted"] == pytest.approx(plain / whole, abs=2e-3)


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
    arguments = ["--what-if", "flat", "tiny", "--traces", folder, "--threads", "1", "--flash-attn"]
    with every_model() as made:
        assert main([*arguments, "-o", str(out)]) == 0
    assert [(m.n_ctx, m.threads, m.flash_attn) for m in made] == [(512, (1, 1), True)]
    flat, tiny = json.loads(out.read_text())["what_if"]
    (row,) = flat["rows"]
    assert row["best single tree"] > 1.0 and row["oracle"] >= row["confidence"]
    assert len(tiny["rows"]) == 1 and tiny["costs"]["hydra"]["verify"]
    assert "#### costs: flat" in capsys.readouterr().out
    (file,) = Path(folder).glob("*.npz")
    assert main(["what-if", "flat", "--traces", str(file), "-o", str(out)]) == 0
    (again,) = json.loads(out.read_text())["what_if"]
    assert again == flat, "a file of the folder, and the folder"
    assert main(["what-if", "flat", "--traces", str(studied / "banks")]) == 1
    assert "no trace files" in capsys.readouterr().err


def test_parts_of_the_policies_are_weighed(studied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = studied / "ablation.json"
    assert main(["--ablate", "roofline", "--traces", str(studied / "traces"), "-o", str(out)]) == 0
    rows = json.loads(out.read_text())["ablation"]
    assert {f"confidence, {name}" for name in ablate.VARIANTS} <= set(rows)
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
    a, b = (decode(m, Prompt(prompt, 48)).tokens for m in (llm, plain))
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
    tokens = decode(llm, Prompt([1, 2, 3], 16)).tokens
    assert len(tokens) == 16 and llm.draft_stats.n_drafted > 0
    assert np.isfinite(llm._decoder.logits(llm.n_vocab())).all()  # type: ignore[union-attr]
    llm.close()


@pytest.mark.parametrize(("name", "quant"), [("30b-a3b", "q4_k"), ("gpt-oss-20b", "mxfp4")])
def test_models_of_a_shape_with_experts_decode(name: str, quant: str, tmp_path: Path) -> None:
    small = {"n_layer": 2, "n_embd": 256, "n_ff": 256, "n_head": 4, "n_head_kv": 2, "n_head_dim": 64}
    shape = replace(SHAPES[name], **small, n_expert=16, n_vocab=4352)
    model = write_model(tmp_path / "m.gguf", shape, quant=quant)
    llm = Llama(model, n_ctx=256, n_threads=N_THREADS, n_threads_batch=N_THREADS, verbose=False)
    assert len(decode(llm, Prompt([1, 2, 3], 16)).tokens) == 16
    logits = llm.decoder.logits(llm.n_vocab())
    assert np.isfinite(logits).all() and 0.1 < logits.std() < 10.0
    llm.close()
    # of 16 experts a token multiplies as many as are used
    n_attention, n_expert = 2 * 256 * 64 * (4 + 2), 3 * 256 * 256
    n_layer = n_attention + shape.n_expert_used * n_expert + 16 * 256
    assert weights_per_pass(model)[1] == 2 * n_layer + 4352 * 256
