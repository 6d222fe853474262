"""Replay is exact: what a policy does over traces is, step by step, what it does on the live model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entmtp import Bank, Llama
from entmtp.bank import calibration as tables
from entmtp.bank.bank import Ladder
from entmtp.bank.calibration import Calibration
from entmtp.bank.costs import Costs, relative
from entmtp.bank.traces import MAX_RANK, Traces, join
from entmtp.bank.tree import PLAIN
from entmtp.common.errors import BankError, EntmtpError
from entmtp.measure import calibration as cal
from entmtp.measure import judge
from entmtp.measure.replay import Replay, replay
from entmtp.measure.rollouts import record, rollout
from entmtp.measure.tuning import sample_text
from entmtp.native.arrays import PUBLISHED, SCORES
from entmtp.native.stats import STEP_DTYPE
from helpers.settings import F32, prompts

N_TOKENS = 80
TEMPS = (0.0, 0.8)
# a machine on which trees of several sizes pay
COSTS = relative({1: 1.0, 2: 1.05, 4: 1.15, 8: 1.5, 16: 2.6, 64: 9.0}, [0, 0.03, 0.06, 0.09, 0.12])


def asked(llm: Llama, texts: list[str]) -> list[tuple[str, list[int]]]:
    """Task and tokens of each text."""
    return [(f"task{i % 2}", llm.tokenize(text.encode())) for i, text in enumerate(texts)]


@pytest.fixture(scope="module", params=["medusa", "hydra"])
def traced(request: pytest.FixtureRequest, load: Callable[..., Llama]) -> tuple[Llama, Traces]:
    llm = load(heads=request.param)
    llm.set_trees(Bank("off", (PLAIN,)), policy="off")
    return llm, record(llm, asked(llm, prompts()[::24]), temps=TEMPS, n_tokens=N_TOKENS)


def bank_of(llm: Llama, traces: Traces) -> Bank:
    assert llm._heads is not None
    generic = Bank.load(f"generic-{llm._heads.arch}")
    middle = float(np.median(traces.signals[:, 0]))
    ladder = Ladder((0.5 * middle, middle), (3, 2, 1))
    return replace(
        generic,
        costs=COSTS,
        calibration=cal.fit(traces, generic.ema_window),
        published={
            "entropy": ladder,
            "top1": Ladder((0.3, 0.6), (3, 2, 1)),
            "path": Ladder((0.9, 0.99), (3, 2, 1)),
        },
    )


def live(llm: Llama, bank: Bank, policy: str, static_tree: int = 0, **settings: Any) -> np.ndarray:
    """Steps of the live model over the same prompts, seeds and temperatures as the traces."""
    assert llm._decoder is not None
    llm.reset()
    llm._decoder.set_bank(bank, policy, static_tree, **settings)
    llm.reset_draft_stats()
    for i, text in enumerate(prompts()[::24]):
        prompt = llm.tokenize(text.encode(), add_bos=True, special=True)
        for temp in TEMPS:
            llm.reset()
            llm.set_seed(i)
            for n, token in enumerate(llm.generate(prompt, temp=temp), 1):
                if n == N_TOKENS or token == llm.token_eos():
                    break
    return llm.draft_stats.steps


CASES = [
    ("off", {}),
    *(("static", {"static_tree": i}) for i in (1, 3, 5)),
    ("entropy", {"adapt": False}),
    ("confidence", {"adapt": False}),
    *((policy, {"score": score}) for policy in PUBLISHED for score in SCORES),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: " ".join([c[0], *map(str, c[1].values())]))
def test_replay_is_what_the_live_model_does(case: tuple[str, Any], traced: tuple[Llama, Traces]) -> None:
    llm, traces = traced
    policy, settings = case
    bank = bank_of(llm, traces)
    expected = live(llm, bank, policy, **settings)
    got = replay(traces, bank, policy, **settings).steps
    for field in ("tree", "n_nodes", "n_accepted"):
        assert got[field].tolist() == expected[field].tolist(), field
    assert got["entropy"] == pytest.approx(expected["entropy"], abs=1e-3)
    if policy == "confidence":
        assert len(set(got["n_nodes"])) > 1, "one size only: this run proves little"
        lone = got["n_nodes"] == 1  # a tree of no guesses is plain decoding
        assert ((got["tree"] == 0) == lone).all()
    elif policy != "off":
        assert got["n_accepted"].sum() > 0


def test_criterion_price_too(traced: tuple[Llama, Traces]) -> None:
    llm, traces = traced
    bank = replace(bank_of(llm, traces), criterion="price")
    expected = live(llm, bank, "entropy", adapt=False)
    assert replay(traces, bank, "entropy", adapt=False).steps["tree"].tolist() == expected["tree"].tolist()


def test_ranks_are_those_of_the_heads_logits(traced: tuple[Llama, Traces]) -> None:
    """Independent of the top-k graphs: full logits of each head, sorted by numpy."""
    llm, traces = traced
    assert llm._heads is not None and llm._decoder is not None
    prompt = llm.tokenize(prompts()[0].encode(), add_bos=True, special=True)
    llm.set_trees(Bank("off", (PLAIN,)), policy="off")
    llm.reset()
    llm.set_seed(0)
    tokens, states = [], []
    for token in llm.generate(prompt, temp=0.0):
        tokens.append(token)
        states.append(llm._decoder.hidden().copy())
        logits = llm._decoder.logits(llm.n_vocab()).astype(np.float64)
        p = np.exp(logits - logits.max())
        p /= p.sum()
        i = len(tokens) - 1
        assert traces.signals[i] == pytest.approx(
            [-(p * np.log(p)).sum(), p.max(), np.log(p[token])], abs=1e-3
        )
        if len(tokens) == 24:
            break
    for i in range(16):
        for h in range(4):
            logits = llm._heads.logits(h, states[i], tokens[i : i + h + 1])
            rank = int((logits > logits[tokens[i + h + 1]]).sum())
            assert traces.ranks[i, h] == min(rank, MAX_RANK)
            # and ln p of the greedy path's guesses, where the real tokens follow it
            if i < 8 and h == 0:
                x = np.sort(logits.astype(np.float64))[::-1]
                assert traces.level(0)[i, 0] == pytest.approx(
                    x[:8] - np.log(np.exp(x - x[0]).sum()) - x[0], abs=1e-3
                )


def test_a_policy_that_adapts_finds_the_true_costs(traced: tuple[Llama, Traces]) -> None:
    """The bank believes that trees are cheap; they are not."""
    llm, traces = traced
    bank = bank_of(llm, traces)
    dear = relative({1: 1.0, 2: 3.0, 64: 65.0}, [0, 0.5, 1.0, 1.5, 2.0])
    plain = replay(traces, bank, "off", costs=dear)
    frozen = replay(traces, bank, "entropy", adapt=False, costs=dear)
    assert frozen.us > 1.3 * plain.us
    for policy in ("entropy", "confidence"):
        assert replay(traces, bank, policy, costs=dear).us < 1.06 * plain.us


def test_useless_heads_cost_next_to_nothing(traced: tuple[Llama, Traces]) -> None:
    """Never slower, by counted cost: no guess is ever right, and the bank promises the opposite."""
    llm, traces = traced
    bank = bank_of(llm, traces)
    traces = join([traces, traces])
    useless = replace(traces, ranks=np.where(traces.ranks >= 0, MAX_RANK, -1).astype(np.int32))
    plain = replay(useless, bank, "off")
    for policy in ("entropy", "confidence"):
        assert replay(useless, bank, policy).us < plain.us / 0.98


def test_what_cannot_be_replayed_is_said(traced: tuple[Llama, Traces]) -> None:
    llm, traces = traced
    bank = bank_of(llm, traces)
    with pytest.raises(BankError, match="no calibration"):
        replay(traces, replace(bank, calibration=None), "confidence")
    with pytest.raises(BankError, match="no costs"):
        replay(traces, replace(bank, costs=None), "entropy")
    with pytest.raises(BankError, match="no ladder"):
        replay(traces, replace(bank, published={}), "ladder")
    shallow = replace(traces, ranks=np.ascontiguousarray(traces.ranks[:, :1]))
    with pytest.raises(EntmtpError, match="deeper than the heads"):
        replay(shallow, bank, "entropy")
    empty = replace(traces, n_tokens=np.zeros(len(traces.n_tokens), dtype=np.int32))
    with pytest.raises(EntmtpError, match="no tokens"):
        replay(empty, bank, "off")


# traces as files


def test_traces_survive_a_file(traced: tuple[Llama, Traces], tmp_path: Path) -> None:
    _, traces = traced
    path = tmp_path / "t.npz"
    traces.save(path)
    again = Traces.load(path)
    assert again.task == traces.task and again.prompt == traces.prompt and again.about == traces.about
    for name in ("n_tokens", "signals", "ranks", "log_p"):
        assert np.array_equal(getattr(again, name), getattr(traces, name)), name


def test_halves_share_no_prompt(traced: tuple[Llama, Traces]) -> None:
    _, traces = traced
    a, b = traces.split()
    assert not set(zip(a.task, a.prompt, strict=True)) & set(zip(b.task, b.prompt, strict=True))
    assert len(a.n_tokens) + len(b.n_tokens) == len(traces.n_tokens)
    assert set(a.task) == set(b.task) == set(traces.task)


def test_an_interrupted_recording_goes_on(load: Callable[..., Llama], tmp_path: Path) -> None:
    llm = load(heads="medusa")
    llm.set_trees(Bank("off", (PLAIN,)), policy="off")
    path = tmp_path / "t.npz"
    many = [("t", tokens) for _, tokens in asked(llm, prompts()[:10])]
    expected = record(llm, many, temps=(0.8,), n_tokens=8, top_k=30)

    class Stop(Exception):
        pass

    def stop(done: int) -> None:
        if done == 7:
            raise Stop

    with pytest.raises(Stop):
        record(llm, many, temps=(0.8,), n_tokens=8, top_k=30, partial=path, advance=stop)
    assert len(Traces.load(path).n_tokens) == 7
    counted: list[int] = []
    resumed = record(llm, many, temps=(0.8,), n_tokens=8, top_k=30, partial=path, advance=counted.append)
    assert np.array_equal(resumed.ranks, expected.ranks) and np.array_equal(resumed.log_p, expected.log_p)
    # other settings start anew
    other = record(llm, many[:2], temps=(0.0,), n_tokens=8, partial=path)
    assert len(other.n_tokens) == 2


@pytest.mark.parametrize("damage", ["truncated", "text", "missing", "shape", "pickle", "nan"])
def test_damaged_trace_files(damage: str, traced: tuple[Llama, Traces], tmp_path: Path) -> None:
    _, traces = traced
    path = tmp_path / "t.npz"
    traces.save(path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "missing":
        path.unlink()
    else:
        data = dict(np.load(path))
        if damage == "shape":
            data["ranks"] = data["ranks"][:-1]
        elif damage == "nan":
            data["log_p"] = data["log_p"] * np.nan
        else:
            data["ranks"] = np.array([{"a": 1}], dtype=object)
        np.savez(path, **data)
    with pytest.raises(ValueError, match="traces"):
        Traces.load(path)


# calibration


def test_logistic_fit_finds_the_weights_that_made_the_data() -> None:
    rng = np.random.default_rng(1)
    w = np.array([-0.5, 1.5, -2.0])
    x = np.concatenate([np.ones((20000, 1)), rng.normal(size=(20000, 2)) * [1.0, 0.3]], axis=1)
    y = (rng.random(20000) < 1 / (1 + np.exp(-x @ w))).astype(float)
    fitted = cal.fit_logistic(x, y)
    assert fitted == pytest.approx(w, abs=0.15)
    # at the optimum the gradient of the likelihood vanishes, but for the small prior
    p = 1 / (1 + np.exp(-x @ fitted))
    assert np.abs(x.T @ (y - p)).max() < 20
    # a column without information
    assert abs(cal.fit_logistic(np.c_[x, np.zeros(len(x))], y)[3]) < 1e-6


def test_calibrated_probabilities_come_true(traced: tuple[Llama, Traces]) -> None:
    """On held-out texts: of the guesses said to be right with p, about p are."""
    _, traces = traced
    a, b = traces.split()
    c = cal.fit(a, 8.0)
    hits = cal.running_hits(b, c.hits, c.hits_window)
    x = cal.accept_inputs(b.level(0)[:, 0], b.running(8.0), b.entropy, np.zeros(len(b.entropy)), hits)
    said = 1 / (1 + np.exp(-x @ c.accept[0]))
    known = b.ranks[:, 0] >= 0
    right = b.ranks[:, 0][:, None] == np.arange(8)
    for low, high in ((0.0, 0.1), (0.1, 0.4), (0.4, 0.7), (0.7, 1.0)):
        inside = (said >= low) & (said < high) & known[:, None]
        if inside.sum() > 100:
            error = 3 * np.sqrt(0.25 / inside.sum()) + 0.06
            assert right[inside].mean() == pytest.approx(said[inside].mean(), abs=error)


def test_expanded_paths_hold_their_parents() -> None:
    for level in range(1, 6):
        paths = [tables.expanded_path(level, i) for i in range(tables.WIDTH)]
        assert len(set(paths)) == tables.WIDTH
        for i, path in enumerate(paths):
            assert path[:-1] == tables.expanded_path(level - 1, tables.expanded_parent(level, i))


BROKEN = {
    "accept": (lambda d: d.update(accept=[[1.0]]), "accept"),
    "accept text": (lambda d: d.update(accept="x"), "accept"),
    "accept nan": (lambda d: d["accept"][0].__setitem__(0, float("nan")), "accept"),
    "ahead": (lambda d: d["ahead"].pop(), "ahead"),
    "edges fall": (lambda d: d["edges"][0].reverse(), r"edges\[0\]"),
    "scenarios": (lambda d: d["scenarios"].pop(), "scenarios"),
    "scenarios above 1": (lambda d: d["scenarios"][0][0][0][0].__setitem__(0, 2.0), "scenarios"),
    "hits": (lambda d: d.update(hits=1.5), "hits"),
    "hits_window": (lambda d: d.pop("hits_window"), "hits_window"),
    "unknown": (lambda d: d.update(more=1), "more"),
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_broken_calibrations_name_the_field(case: str) -> None:
    import copy
    import json

    good: Calibration | None = Bank.load("generic-hydra").calibration
    assert good is not None
    data = copy.deepcopy(good.to_json())
    again = tables.from_json(json.loads(json.dumps(data)), "x")
    assert again.to_json() == data
    change, match = BROKEN[case]
    change(data)
    with pytest.raises(BankError, match=match):
        tables.from_json(data, "x")


def test_all_that_steps_and_tokens_take_counts() -> None:
    steps = np.zeros(3, STEP_DTYPE)
    steps["t_draft_us"], steps["t_verify_us"] = 10, 100
    costs = Costs({16: {1: 100.0}}, (0.0,), (), sample=7.0, host=3.0, token=2.0)
    run = Replay(steps, 5, costs)
    assert run.us == 3 * 110 and run.us_total == 3 * (110 + 3) + 5 * (7 + 2)
    assert run.speed == pytest.approx(5e6 / 384) and run.tokens_per_step == 5 / 3
    assert Replay(steps[:1], 1, costs).tokens_per_step == 1.0 and Replay(steps[:0], 0, costs).speed == 0.0


def test_recordings(load: Callable[..., Llama], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens as asked for at each temperature; what a file holds is not made again, nor written."""
    from entmtp.measure import rollouts

    llm = load(heads="medusa")
    llm.set_trees(Bank("off", (PLAIN,)), policy="off")
    texts = asked(llm, prompts()[:2])
    path = tmp_path / "traces.npz"
    traces = record(llm, texts, n_tokens=5, partial=path)
    assert traces.n_tokens.tolist() == [5] * 4 and traces.prompt == (0, 0, 1, 1)
    assert traces.texts is not None and traces.texts.temp.tolist() == pytest.approx([0.0, 0.8] * 2)
    mean = np.mean([len(tokens) for _, tokens in texts])
    assert traces.about["context"] == int(mean + 2.5) and Traces.load(path).about["complete"]

    made: list[int] = []
    own = rollouts.rollout
    monkeypatch.setattr(rollouts, "rollout", lambda *a, **k: made.append(1) or own(*a, **k))
    before = path.stat()
    again = record(llm, texts, n_tokens=5, partial=path)
    assert not made and again.texts is not None and (again.texts.tokens == traces.texts.tokens).all()
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    record(llm, texts, n_tokens=6, partial=path)  # other traces than those of the file
    assert len(made) == 4


def test_a_rollout_ends_with_the_context(models: dict[str, Path]) -> None:
    settings = F32 | {"n_ctx": 24, "calibrate": False}
    with closing(Llama(models["f32"], draft="entmtp", heads=models["medusa"], **settings)) as llm:
        llm.set_trees(Bank("off", (PLAIN,)), policy="off")
        prompt = llm.tokenize(b"def add(a, b):")
        r, room = rollout(llm, prompt, 1000, temp=0.0), llm.n_ctx()
    # the last token that is drawn is not evaluated: it has no place in the context, and needs none
    assert len(prompt) + int(r.n_tokens[0]) == room


def test_rows_of_replays_are_against_plain_decoding() -> None:
    steps = np.zeros(3, STEP_DTYPE)
    steps["t_draft_us"], steps["t_verify_us"] = [10, 0, 20], [400, 300, 400]
    costs = replace(COSTS, sample=5.0, host=7.0, token=11.0)
    one, mine = Replay(steps[:1], 1, costs), Replay(steps, 8, costs)  # of 410 and 1130 microseconds
    assert judge.rows_of({"plain": one, "mine": mine}) == {
        "plain": {"speed": 1.0, "tokens_per_second": round(1e6 / 433, 1), "tokens_per_step": 1.0},
        "mine": {
            "speed": round(410 / 1130, 4),
            "tokens_per_second": round(8e6 / 1279, 1),
            "tokens_per_step": 2.667,
        },
    }


def test_a_bank_without_weights_has_no_row_for_them(traced: tuple[Llama, Traces]) -> None:
    llm, traces = traced
    bank = replace(bank_of(llm, traces), acceptance_model=None)
    assert set(judge.autos(traces, bank, llm._heads, ("text",))) == {judge.AUTO}
    assert judge.autos(replace(traces, texts=None), bank, llm._heads, ("text",)) == {}


def test_a_text_for_pictures(traced: tuple[Llama, Traces]) -> None:
    """The longest one, with the token at which each step begins."""
    llm, traces = traced
    bank = bank_of(llm, traces)
    found = sample_text(traces, bank)
    longest = traces.pick([int(np.argmax(traces.n_tokens))])
    steps = replay(longest, bank, "entropy", adapt=False).steps
    at, begins = 0, []
    for n in steps["n_accepted"]:
        begins.append(at)
        at += 1 + int(n)
    assert list(found["position"]) == begins and found["tree"] == steps["tree"].tolist()
    assert found["entropy"] == pytest.approx(longest.entropy, abs=1e-3) and sum(steps["n_accepted"]) > 0
