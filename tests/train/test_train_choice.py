"""How many rows heads get, of which kind, by what they cost and bring; how long a training will take."""

from __future__ import annotations

import math
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the train extra)")
torch.set_num_threads(1)  # xdist workers share the cores

from entmtp.bank import Costs  # noqa: E402
from entmtp.convert.draft_vocab import STEP  # noqa: E402
from entmtp.models.base import read_base  # noqa: E402
from entmtp.train import choice, forecast, plan, price  # noqa: E402
from entmtp.train.base import Base, read_matrices  # noqa: E402
from entmtp.train.forecast import JUDGING, Rates, minutes  # noqa: E402
from entmtp.train.heads import Shape, initial  # noqa: E402
from entmtp.train.options import Options  # noqa: E402
from entmtp.train.plan import n_parameters  # noqa: E402
from entmtp.train.price import LM_HEADS, Prices, measure_prices  # noqa: E402
from helpers.training import SEQ_LEN  # noqa: E402

pytestmark = pytest.mark.torch

SHAPE = Shape("hydra", 3, 1, 64, "own")
N_VOCAB = 4096
# Zipf: token i is as frequent as 1 / (i + 1)
COVERAGE = np.cumsum(1 / np.arange(1, N_VOCAB + 1)) / np.sum(1 / np.arange(1, N_VOCAB + 1))


def prices(us_per_row: float, cheaper: float = 1.0, n_heads: int = 3) -> Prices:
    """A pass takes 1,000 us and a little more for each token; rows of a projection for all heads cost `cheaper`."""
    rows = {"own": us_per_row, "shared": us_per_row * cheaper, "base": us_per_row * 2}
    return Prices(
        Costs({16: {1: 1000.0, 2: 1100.0, 4: 1300.0}}, (0.0,), ()),
        {kind: np.full(n_heads, 5.0) for kind in rows},
        {kind: np.full(n_heads, us) for kind, us in rows.items()},
    )


def speed_by_hand(p: Prices, lm_head: str, n: int) -> float:
    """Tokens per second of the best chain of SHAPE, written out."""
    a = choice.RIGHT["hydra"] * choice.KEPT[lm_head] * COVERAGE[n - 1]
    row, own = p.row[lm_head][0], p.row["own"][0]
    us = [5.0 + row * n + own * 64 * 2 * (i + 2) for i in range(3)]  # two matrices of (i + 2) 64 x 64
    return 1e6 * max(
        (1 + a) / (1100 + us[0]),
        (1 + a + a**2) / (1200 + us[0] + us[1]),
        (1 + a + a**2 + a**3) / (1300 + sum(us)),
    )


@pytest.mark.parametrize("us_per_row", [1e-5, 0.003, 0.02, 0.1])
def test_the_fastest_number_of_rows(us_per_row: float) -> None:
    """Against every size tried by hand."""
    p = prices(us_per_row)
    sizes = choice.sizes(N_VOCAB)
    assert sizes == [*range(STEP, N_VOCAB, STEP), N_VOCAB]
    [found] = choice.choose(p, SHAPE, COVERAGE, ["own"], sizes)
    by_hand = {n: speed_by_hand(p, "own", n) for n in sizes}
    assert found.n_rows == max(by_hand, key=by_hand.__getitem__)
    assert found.speed == pytest.approx(by_hand[found.n_rows])
    assert found.coverage == pytest.approx(COVERAGE[found.n_rows - 1])


def test_dear_rows_are_few() -> None:
    n = [
        choice.choose(prices(us), SHAPE, COVERAGE, ["own"], choice.sizes(N_VOCAB))[0].n_rows
        for us in (0, 0.01, 1)
    ]
    assert n[0] == N_VOCAB > n[1] > n[2] == STEP


def test_the_kind_of_projections_is_chosen_by_speed() -> None:
    sizes = choice.sizes(N_VOCAB)
    own, *others = choice.choose(prices(0.01), SHAPE, COVERAGE, LM_HEADS, sizes)
    assert own.lm_head == "own" and {c.lm_head for c in others} == {"shared", "base"}
    # guesses of one projection for all are right less often: it wins where its rows are much cheaper
    shared, *_ = choice.choose(prices(0.05, cheaper=0.1), SHAPE, COVERAGE, LM_HEADS, sizes)
    assert shared.lm_head == "shared"
    assert shared.speed > speed_by_hand(prices(0.05), "own", shared.n_rows)
    # and where there is no memory for the others
    found = choice.choose(
        prices(0.01), SHAPE, COVERAGE, LM_HEADS, sizes, lambda kind, n: kind == "base" and n <= 512
    )
    assert [c.lm_head for c in found] == ["base"] and found[0].n_rows <= 512
    assert choice.choose(prices(0.01), SHAPE, COVERAGE, LM_HEADS, sizes, lambda kind, n: False) == []
    said = choice.compared(found, ["own", "shared"])
    assert (
        said.startswith("projections: the base model's, ")
        and "no memory to train each head's own or one" in said
    )


def test_why_says_what_the_next_rows_cost_and_bring() -> None:
    p = prices(0.01)
    n, coverage = 1024, float(COVERAGE[1023])
    said = choice.why(p, SHAPE, choice.Choice("own", n, coverage, 0.0), COVERAGE)
    now, then = ({n: speed_by_hand(p, "own", n) for n in (n, n + STEP)}[m] for m in (n, n + STEP))
    assert f"1024 of 4096 tokens, {coverage:.1%} of the text; 256 more would cost a step " in said
    us = float(said.split("cost a step ")[1].split(" us")[0])
    assert us in (2.6, 5.1, 7.7)  # 256 rows of 0.01 us for one, two or three heads
    cost, gain = (float(x.split("%")[0]) / 100 for x in (said.split("(")[1], said.split("bring ")[1]))
    assert then / now == pytest.approx((1 + gain) / (1 + cost), abs=2e-4)
    assert (
        choice.why(p, SHAPE, choice.Choice("own", N_VOCAB, 1.0, 0.0), COVERAGE)
        == "draft vocabulary: all 4096 tokens"
    )


def test_large_vocabularies_are_cut() -> None:
    assert max(choice.sizes(262_144)) == choice.MOST
    assert choice.sizes(320) == [256, 320] and choice.sizes(200) == [200]


@pytest.mark.parametrize("arch", ["medusa", "hydra", "hydra++"])
@pytest.mark.parametrize("lm_head", LM_HEADS)
def test_what_is_trained_is_counted(arch: str, lm_head: str) -> None:
    """Parameters that the screen tells of, and rows that the blocks are priced as, are those of the state."""
    shape = Shape(arch, 3, 2, 64, lm_head, n_head=4, n_head_kv=2, n_ff=96, rms_eps=1e-5, rope_base=1e4)
    state = initial(shape, torch.zeros(48, 64), 1.0, 0)
    assert n_parameters(shape, 48) == sum(t.numel() for t in state.values())
    for head in range(3):
        blocks = [shape.block(head, j) for j in range(2)]
        matrices = [
            t for name, t in state.items() if t.dim() == 2 and name.startswith(tuple(f"{b}." for b in blocks))
        ]
        assert shape.block_rows(head) == sum(t.numel() for t in matrices) // 64


def test_prices_of_a_model(base: Base, tmp_path: Path) -> None:
    """Heads of all kinds are timed on the model, and hold as many rows as they should."""
    facts = read_base(Path(base.llm.model_path))
    found = measure_prices(base, facts, SHAPE, "f32", LM_HEADS, seconds=0.0)
    for kind in LM_HEADS:
        assert found.fixed[kind].shape == found.row[kind].shape == (3,)
        assert np.isfinite(found.fixed[kind]).all() and (found.row[kind] >= 0).all()
        assert found.head(kind, 2, 320, 64) >= found.head(kind, 2, 40) > 0
    assert found.costs.curve()[0] > 0
    bytes_of = {}
    for kind in LM_HEADS:
        with closing(price._probe(tmp_path, base, facts, 3, "f32", kind, 40)) as heads:
            assert heads.info.n_vocab_draft == 40 and heads.n_heads == 3
            assert np.isfinite(heads.logits(2, np.ones(64, np.float32), [])).all()
            bytes_of[kind] = heads.info.n_bytes
    assert bytes_of["own"] - bytes_of["shared"] >= 2 * 40 * 64 * 4
    # nothing of it is left in the model's memory: it writes as before
    assert base.eval([5], [0], [0]).shape == (1, base.n_vocab)
    base.forget(0)


def test_forecast_of_the_stages(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Options(Path("m"), Path("h"), epochs=2.0, batch_tokens=1000, n_held_out=10, seq_len=100)
    writing, training = Rates(text=50.0, training=200.0).seconds(options, 10_000, n_done=4_000)
    assert writing == pytest.approx(6_000 / 50)
    assert training == pytest.approx((20_000 + JUDGING * 11 * 1000) / 200)
    whole = Rates(50.0, 200.0).preset(options, "quick")
    assert whole == Rates(50.0, 200.0).seconds(replace(options, n_tokens=350_000, epochs=2.0), 350_000)
    assert [minutes(s) for s in (30, 900, 7200)] == ["30 s", "15 min", "2.0 h"]
    # the clock stands at the number of passes: one second each
    p = plan.make(Options(tiny, tmp_path / "h", n_tokens=3000, seq_len=SEQ_LEN, n_held_out=4, bf16=False))
    with closing(Base(tiny, SEQ_LEN, n_threads=1)) as base:
        passes = []
        real = base.eval
        monkeypatch.setattr(base, "eval", lambda *args: (passes.append(len(args[0])), real(*args))[1])
        monkeypatch.setattr(forecast.time, "perf_counter", lambda: float(len(passes)))
        rate = forecast.text_rate(p, base)
        assert rate == pytest.approx(forecast.LATER * np.mean(passes[-forecast.N_PASSES :]), rel=0.3)
        monkeypatch.undo()
        embedding, output = map(torch.from_numpy, read_matrices(tiny))
        assert 0 < forecast.training_rate(p, embedding, output) < math.inf
        # nothing of it is left: the text begins as if it had not been
        assert base.eval([5], [0], [0]).shape == (1, base.n_vocab)


def test_rows_are_weighed_where_no_guess_pays() -> None:
    """Passes over two tokens that cost nine: heads are slower than none, and still not cut to the least."""
    p = prices(0.01)
    dear = Prices(Costs({16: {1: 1000.0, 2: 9000.0}}, (0.0,), ()), p.fixed, p.row)
    [found] = choice.choose(dear, SHAPE, COVERAGE, ["own"], choice.sizes(N_VOCAB))
    assert found.n_rows == N_VOCAB and found.speed < 1000
