"""`python -m entmtp.train --report`: shares, forecast and advice, of trainings that ended, stopped, or never were."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the train extra)")
torch.set_num_threads(1)  # xdist workers share the cores

from entmtp.bank import Costs  # noqa: E402
from entmtp.train import stages  # noqa: E402
from entmtp.train.cli import main  # noqa: E402
from entmtp.train.heads import Shape  # noqa: E402
from entmtp.train.loop import Measured  # noqa: E402
from entmtp.train.price import Prices  # noqa: E402
from entmtp.train.record import Record  # noqa: E402
from entmtp.train.report import advice, costs_of, report, right  # noqa: E402
from helpers.training import arguments  # noqa: E402

pytestmark = pytest.mark.torch


def test_shares_by_level_and_rank() -> None:
    ranks = [
        np.array([[0, 0], [0, 2], [1, 0], [0, 0]], np.int32),
        np.array([[5, 0], [0, -1], [-1, -1]], np.int32),
    ]
    # six positions with one guess, five with two; after a right first guess the second was right twice of three times,
    # and the third guess came true once
    shares = right(ranks)
    assert shares[0] == [round(4 / 6, 4), round(1 / 6, 4), 0.0, 0.0]
    assert shares[1] == pytest.approx([2 / 5 / (4 / 6), 0.0, 1 / 5 / (4 / 6), 0.0], abs=1e-4)


def test_forecast_against_a_count_by_hand() -> None:
    """Guesses that are right in every second step: a chain of one pays, by the ratio of the costs."""
    ranks = np.array([[0], [64], [0]] * 40 + [[-1]], np.int32)
    prices = Prices(
        Costs({16: {1: 1000.0, 2: 1100.0}}, (0.0,), ()), {k: np.array([10.0]) for k in ("own", "shared")},
        {"own": np.array([0.01]), "shared": np.array([0.02])},
    )  # fmt: skip
    shape = Shape("medusa", 1, 1, 50, "shared")
    record = Record(shape, "auto", 1000, 7, 9, [], [ranks, ranks], [0.0, 0.0])
    told = report(record, prices)
    draft = 10 + 0.02 * 1000 + 0.01 * 50
    assert costs_of(prices, shape, 1000).chain == pytest.approx((0.0, draft))
    group = told["temperatures"]["0"]
    assert group["tree"] == "n2d1" and group["texts"] == 2 and group["tokens"] == 242
    roots = n_steps = 0  # a right guess brings a token more
    while roots < len(ranks) - 1:
        roots += 2 if ranks[roots, 0] == 0 else 1
        n_steps += 1
    per_step = (len(ranks) - 1) / n_steps
    assert group["tokens_per_step"] == pytest.approx(per_step, rel=0.03)
    assert group["tokens_per_second"] == pytest.approx(1e6 * per_step / (1100 + draft), rel=0.03)
    assert group["plain_tokens_per_second"] == pytest.approx(1000.0, rel=0.01)
    assert (told["step"], told["n_steps"], told["lm_head"], told["draft_vocab"]) == (7, 9, "shared", 1000)


def history(*losses: float, trained: float | None = None) -> list[Measured]:
    return [Measured(10 * i, trained or x, x, 1.5, 2.0) for i, x in enumerate(losses, 1)]


FALLS, STANDS, RISES = (2.9, 2.8, 2.7, 2.6, 2.5), (2.6, 2.5, 2.5, 2.5, 2.5), (2.6, 2.5, 2.5, 2.6, 2.7)


@pytest.mark.parametrize(
    ("rows", "step", "said"),
    [
        (history(3.0, 2.9), 20, "too early to say whether to go on: 20 of 60"),
        (history(3.0, 2.9, float("nan")), 30, "too early"),
        (history(3.0, *FALLS), 59, "go on with --resume: the held-out loss fell by 7.4% since step 40"),
        (history(3.0, *STANDS), 59, "the held-out loss stands still since step 40"),
        (history(3.0, *RISES), 59, "the held-out loss rose since step 40"),
        (history(3.0, *FALLS), 60, "train longer (--epochs, --tokens): the held-out loss still fell by 7.4%"),
        (history(3.0, *STANDS), 60, "enough for heads of this size: the held-out loss stands still"),
        (history(3.0, *RISES), 60, "enough for heads of this size: the held-out loss rose"),
        (
            history(3.0, *STANDS, trained=2.0),
            60,
            "train with more text (--tokens): the held-out loss is 25% above",
        ),
    ],
)
def test_advice(rows: list[Measured], step: int, said: str) -> None:
    assert said in advice(rows, step, 60)


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> Any:
    capsys.readouterr()
    assert main([*argv, "--report", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_report_of_a_training(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted, it is told of by its checkpoint; ended, by what lies beside the heads; both times alike."""
    out = tmp_path / "heads.gguf"
    argv = arguments(tiny, out, "--epochs", "2", "--outtype", "f32")

    def stop(*args: Any) -> Any:
        raise KeyboardInterrupt

    assert main([*argv, "--report"]) == 1
    assert "there is no training of it" in capsys.readouterr().err
    with monkeypatch.context() as m:
        m.setattr(stages, "write_files", stop)
        assert main(argv) == 130
    before = told(capsys, *argv)
    assert before["step"] == before["n_steps"] == 20 == before["history"][-1]["step"]
    assert set(before["temperatures"]) == {"0", "0.8"} and len(before["history"]) == 10
    assert len(before["temperatures"]["0"]["right"]) == 2
    assert main([*argv, "--resume"]) == 0
    after = told(capsys, *argv)
    assert after["history"] == before["history"] and after["advice"] == before["advice"]
    for name, group in after["temperatures"].items():
        # measured on half precision
        assert group["right"] == [
            pytest.approx(row, abs=0.02) for row in before["temperatures"][name]["right"]
        ]
    assert main([*argv, "--report"]) == 0
    printed = capsys.readouterr().out
    assert "tokens/step" in printed and after["advice"] in printed
    kept = tmp_path / "heads" / "training.json"
    content = json.loads(kept.read_text())
    content["history"][0][2:] = [None] * 3  # no held-out text: NaN, for which JSON has no word
    kept.write_text(json.dumps(content))
    without = told(capsys, *argv)
    assert (
        list(without["history"][0].values())[2:] == [None] * 3
        and without["history"][1:] == after["history"][1:]
    )
    kept.write_text("{")
    assert main([*argv, "--report"]) == 1
    assert "damaged" in capsys.readouterr().err
