"""The tuner as its users run it: a bank that loads, pictures, resumed traces, one clear sentence for every mistake."""

from __future__ import annotations

import json
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entmtp import Bank, Llama
from entmtp.bank.costs import N_VERIFY
from entmtp.bank.traces import Traces
from entmtp.common.prompts import read_questions
from entmtp.measure.replay import replay
from entmtp.measure.timing import SIZES
from entmtp.measure.tuning import EVERY_SIZE_BELOW, tune
from entmtp.tune.cli import main
from helpers.settings import F32, N_THREADS


def write_prompts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": t}) + "\n" for t in texts))
    return path


@pytest.fixture(scope="module")
def tuned(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small tuning run through the command line."""
    folder = tmp_path_factory.mktemp("tune")
    code = write_prompts(
        folder / "code.jsonl", ["def add(a, b):\n", "class Stack:\n", "import os\n", "for i in range("]
    )
    story = write_prompts(folder / "story.jsonl", ["It was a dark night, and", "The old man said"])
    paths = {"bank": folder / "bank.json", "traces": folder / "traces.npz", "code": code, "story": story}
    arguments = [
        "--model", models["q8_0"], "--heads", models["hydra"], "--prompts", code, story, "-o", paths["bank"],
        "--traces", paths["traces"], "--tokens", "48", "--rounds", "2", "--contexts", "64", "--ctx", "512",
        "--task", "t", "--threads", str(N_THREADS),
    ]  # fmt: skip
    assert main([str(a) for a in arguments]) == 0
    return paths | {"arguments": arguments}  # type: ignore[dict-item]


def test_the_bank_is_whole_and_usable(
    tuned: dict[str, Path], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = Bank.load(tuned["bank"])
    assert bank.task == "t" and bank.trees[0].paths == () and len(bank.trees) <= 8
    assert bank.calibration is not None and set(bank.published) == {"entropy", "top1", "path"}
    assert set(bank.report["held_out"]) == {"all", "code", "story"}
    rows = bank.report["held_out"]["all"]
    assert rows["plain"]["speed"] == 1.0
    # nobody who drafts from the heads alone beats their future; the policy auto has the text, too
    assert (
        rows["oracle"]["speed"] >= max(r["speed"] for k, r in rows.items() if not k.startswith("auto")) - 1e-6
    )
    assert rows["auto"]["tokens_per_step"] > 1.0
    front = np.array(bank.report["front"])
    assert (np.diff(front[:, 1]) >= 0).all() and front[0].tolist()[:2] == [1, 1.0]
    costs = bank.need_costs()
    assert costs.token > 0 and costs.sample > 0 and costs.key
    every = costs.curve()[0] < EVERY_SIZE_BELOW
    assert set(costs.verify) == {64} and set(costs.verify[64]) == set(
        range(1, N_VERIFY + 1) if every else SIZES
    )

    settings = {"n_ctx": 512, "n_threads": N_THREADS, "n_threads_batch": N_THREADS, "verbose": False}
    # it was tuned here: nothing is measured again, however busy this machine was then
    monkeypatch.setattr("entmtp.measure.at_load.were_disturbed", lambda *_: False)
    llm = Llama(models["q8_0"], draft="entmtp", heads=models["hydra"], trees=tuned["bank"], **settings)
    assert llm._decoder.bank.costs == costs  # type: ignore[union-attr]
    for policy in ("entropy", "confidence", "ladder", "hysteresis", "best-depth"):
        llm.set_trees(tuned["bank"], policy=policy)
        assert llm("def add(a, b):", max_tokens=16, temperature=0.0)["usage"]["completion_tokens"] > 0  # type: ignore[index]
    llm.close()


def test_from_python_without_a_word(models: dict[str, Path], tmp_path: Path) -> None:
    """As the command, greedily and at 0.8, where nobody wants to see how far it is."""
    with closing(Llama(models["q8_0"], draft="entmtp", heads=models["hydra"], policy="off", **F32)) as llm:
        asked = [("t", llm.tokenize(text)) for text in (b"def add(a, b):", b"It was a dark night")]
        bank = tune(llm, asked, n_tokens=8, n_rounds=1, contexts=(16,), traces=tmp_path / "traces.npz")
    assert bank.name == "tuned" and set(bank.need_costs().verify) == {16}
    assert Traces.load(tmp_path / "traces.npz").about["temps"] == [0.0, 0.8]


def test_held_out_figures_are_those_of_a_replay(tuned: dict[str, Path]) -> None:
    bank = Bank.load(tuned["bank"])
    _, held_out = Traces.load(tuned["traces"]).split()
    plain, entropy = replay(held_out, bank, "off"), replay(held_out, bank, "entropy")
    assert bank.report["held_out"]["all"]["entropy"]["speed"] == pytest.approx(
        plain.us / entropy.us, rel=1e-3
    )


def test_traces_are_used_again(
    tuned: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("the rollouts were made again")

    monkeypatch.setattr("entmtp.measure.rollouts.rollout", never)
    arguments = [str(a) for a in tuned["arguments"]]  # type: ignore[attr-defined]
    arguments[arguments.index("-o") + 1] = str(tmp_path / "again.json")
    assert main(arguments) == 0
    a, b = Bank.load(tuned["bank"]), Bank.load(tmp_path / "again.json")
    assert a.calibration is not None and b.calibration is not None
    assert a.source == b.source


def test_traces_of_other_heads_are_refused(
    tuned: dict[str, Path], models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(a) for a in tuned["arguments"]]  # type: ignore[attr-defined]
    arguments[arguments.index("--heads") + 1] = str(models["medusa"])
    arguments[arguments.index("-o") + 1] = str(tmp_path / "bank.json")
    assert main(arguments) == 1
    assert "other heads" in capsys.readouterr().err
    assert not (tmp_path / "bank.json").exists()


def test_pictures(tuned: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--plot", str(tuned["bank"])]) == 0
    said = capsys.readouterr().out
    for name in ("costs", "fronts", "trees", "text"):
        picture = tuned["bank"].with_name(f"bank-{name}.png")
        assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > 2000
        assert str(picture) in said
    assert main(["--plot", "generic-hydra"]) == 1
    assert "no report" in capsys.readouterr().err


BAD = {
    "no prompts file": (["--prompts", "{tmp}/none.jsonl"], "none.jsonl"),
    "prompts no JSON": (["--prompts", "{tmp}/text.jsonl"], "line 1"),
    "one prompt": (["--prompts", "{tmp}/one.jsonl"], "two prompts"),
    "no model": (["--model", "{tmp}/none.gguf"], "none.gguf"),
    "no heads": (["--heads", "{tmp}/none.gguf"], "none.gguf"),
    "traces no traces": (["--traces", "{tmp}/text.jsonl"], "traces"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_mistakes_are_told_in_a_sentence(
    case: str, tuned: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.jsonl").write_text("hello\n")
    write_prompts(tmp_path / "one.jsonl", ["x"])
    change, match = BAD[case]
    arguments = [str(a) for a in tuned["arguments"]]  # type: ignore[attr-defined]
    at = arguments.index("--prompts")
    del arguments[at + 2]  # one file of prompts
    arguments[arguments.index("-o") + 1] = str(tmp_path / "bank.json")
    arguments[arguments.index("--traces") + 1] = str(tmp_path / "traces.npz")
    for key, value in zip(change[::2], change[1::2], strict=True):
        arguments[arguments.index(key) + 1] = value.format(tmp=tmp_path)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert match in error and "Traceback" not in error
    assert not (tmp_path / "bank.json").exists()


def test_heads_beside_the_model_or_none(
    tuned: dict[str, Path], models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --heads they are looked for; where there are none, what the text drafts by is tuned alone."""
    model = tmp_path / "m.gguf"
    shutil.copy(models["q8_0"], model)
    arguments = [str(a) for a in tuned["arguments"]]  # type: ignore[attr-defined]
    arguments[arguments.index("--model") + 1] = str(model)
    arguments[arguments.index("-o") + 1] = str(tmp_path / "bank.json")
    at = arguments.index("--heads")
    del arguments[at : at + 2]
    arguments[arguments.index("--traces") + 1] = str(tmp_path / "traces.npz")
    assert main([*arguments, "--rounds", "1"]) == 0
    assert "Acceptance model:" in capsys.readouterr().out
    alone = Bank.load(tmp_path / "bank.json")
    assert alone.heads is None and alone.acceptance is None and len(alone.trees) == 1
    assert alone.need_costs().key and set(alone.report["held_out"]) == {"all", "code", "story"}
    rows = alone.report["held_out"]["all"]
    assert rows["plain"]["tokens_per_step"] == 1.0 and rows["auto"]["tokens_per_step"] > 1.0
    assert main(["--plot", str(tmp_path / "bank.json")]) == 1
    assert "no trees to draw" in capsys.readouterr().err
    shutil.copy(models["hydra"], tmp_path / "h.gguf")
    (tmp_path / "traces.npz").unlink()
    less = ("--rounds", "1", "--sizes", "2", "4")
    assert main([*arguments, *less, "--kernels", "auto", "--outputs", "host"]) == 0
    assert Bank.load(tmp_path / "bank.json").heads == "hydra: h.gguf"


def test_interrupted_runs_leave_no_bank(
    tuned: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("entmtp.measure.tuning.fit", interrupt)
    arguments = [str(a) for a in tuned["arguments"]]  # type: ignore[attr-defined]
    arguments[arguments.index("-o") + 1] = str(tmp_path / "bank.json")
    assert main(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_arguments_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as e:
        main([])
    assert e.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a"}\n\n{"turns": ["b", "c"]}\n')
    assert [q.turns for q in read_questions(path)] == [("a",), ("b", "c")]
    assert [q.text for q in read_questions(path, 1)] == ["a"]


def test_one_prompt_of_each_task(
    tuned: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is in the half that is fitted: nothing is left to judge by."""
    files = [write_prompts(tmp_path / f"{x}.jsonl", [x]) for x in ("one", "two")]
    arguments = [str(a) for a in tuned["arguments"]]  # type: ignore[attr-defined]
    at = arguments.index("--prompts")
    arguments[at + 1 : at + 3] = map(str, files)
    arguments[arguments.index("-o") + 1] = str(tmp_path / "bank.json")
    arguments[arguments.index("--traces") + 1] = str(tmp_path / "traces.npz")
    assert main(arguments) == 1
    assert "too few prompts: at least two of a task are needed" in capsys.readouterr().err
    assert not (tmp_path / "bank.json").exists()
