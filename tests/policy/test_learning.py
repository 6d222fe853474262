"""The policy auto replayed over recorded texts is what the live model does; weights are learned from the same texts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize

from entmtp import Bank, Llama
from entmtp.bank import PLAIN, Traces
from entmtp.bank.acceptance import INPUTS, N_INPUTS, N_SETS, SETS, as_array, of_array
from entmtp.bank.bank import dumps
from entmtp.bank.costs import relative
from entmtp.common.errors import EntmtpError
from entmtp.measure import learning
from entmtp.measure.replay import AGREEMENT, replay_auto
from entmtp.measure.rollouts import record
from helpers.settings import F32, prompts

N_TOKENS = 80
TEMPS = (0.0, 0.8)
# a machine on which trees of several sizes pay
COSTS = relative({1: 1.0, 2: 1.05, 4: 1.15, 8: 1.5, 16: 2.6, 64: 9.0}, [0, 0.03, 0.06, 0.09, 0.12])
OFF = Bank("off", (PLAIN,))


def asked(llm: Llama) -> list[tuple[str, list[int]]]:
    return [(f"task{i % 2}", llm.tokenize(text.encode())) for i, text in enumerate(prompts()[::24])]


@pytest.fixture(scope="module")
def headless(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    """The base in a folder of its own, where no heads are found."""
    path = shutil.copy(models["f32"], tmp_path_factory.mktemp("alone"))
    with closing(Llama(path, draft="entmtp", **F32)) as llm:
        yield llm


@pytest.fixture(scope="module", params=["headless", "medusa", "hydra"])
def recorded(
    request: pytest.FixtureRequest, load: Callable[..., Llama], headless: Llama
) -> tuple[Llama, Traces]:
    llm = load(heads=request.param) if request.param != "headless" else headless
    llm.set_trees(OFF, policy="off")
    return llm, record(llm, asked(llm), temps=TEMPS, n_tokens=N_TOKENS)


def bank_of(llm: Llama) -> Bank:
    if llm._heads is None:
        return Bank("text", (PLAIN,), costs=COSTS)
    return Bank(
        "text", (PLAIN,), costs=COSTS, calibration=Bank.load(f"generic-{llm._heads.arch}").calibration
    )


def live(llm: Llama, bank: Bank, drafters: tuple[str, ...]) -> np.ndarray:
    """Steps of the live model over the same prompts, seeds and temperatures, learning nothing."""
    llm.reset()
    llm.decoder.set_bank(bank, "auto", drafters=drafters, adapt=False)
    llm.decoder.forget()
    llm.reset_draft_stats()
    for i, (_, prompt) in enumerate(asked(llm)):
        for temp in TEMPS:
            llm.reset()
            llm.set_seed(i)
            for n, token in enumerate(llm.generate(prompt, temp=temp), 1):
                if n == N_TOKENS or token == llm.token_eos():
                    break
    return llm.draft_stats.steps


@pytest.mark.parametrize(
    "drafters", [("text",), ("text", "recycling"), ("text", "recycling", "heads"), ("heads",)], ids="+".join
)
def test_replay_is_what_the_live_model_does(
    drafters: tuple[str, ...], recorded: tuple[Llama, Traces]
) -> None:
    llm, traces = recorded
    if "heads" in drafters and llm._heads is None:
        pytest.skip("a model without heads")
    bank = bank_of(llm)
    got = replay_auto(traces, bank, llm._heads, drafters=drafters, adapt=False).steps
    expected = live(llm, bank, drafters)
    for field in ("n_nodes", "n_accepted", "n_by"):
        assert got[field].tolist() == expected[field].tolist(), field
    assert got["entropy"] == pytest.approx(expected["entropy"], abs=1e-3)
    assert len(set(got["n_nodes"])) > 2, "hardly any sizes: this run proves little"
    assert got["n_accepted"].sum() > 0


def test_other_weights_are_replayed_too(recorded: tuple[Llama, Traces]) -> None:
    llm, traces = recorded
    who = ("text", "recycling")
    weights = learning.shipped()
    weights[:, 0] += 1.5
    bank = replace(bank_of(llm), acceptance_model=of_array(weights))
    got = replay_auto(traces, bank, drafters=who, adapt=False).steps
    assert got["n_nodes"].tolist() == live(llm, bank, who)["n_nodes"].tolist()
    assert (
        got["n_nodes"].sum()
        > replay_auto(traces, bank_of(llm), drafters=who, adapt=False).steps["n_nodes"].sum()
    )


def test_samples_are_the_proposals_at_places_that_were_reached(recorded: tuple[Llama, Traces]) -> None:
    llm, traces = recorded
    r = replay_auto(traces, bank_of(llm), llm._heads, proposals=True, adapt=False)
    found = r.proposals
    assert found is not None and len(found)
    # what is accepted was right, and its sample says so
    assert (found["right"] == 1).sum() >= r.steps["n_accepted"].sum()
    sets, x = learning.inputs_of(found)
    z = (x * learning.shipped()[sets]).sum(axis=1)
    assert found["p"] == pytest.approx(1 / (1 + np.exp(-z)), abs=1e-4)
    assert (x[:, 0] == 1).all()
    text = sets & 1 == 1
    assert (x[~text][:, [INPUTS.index("match length"), INPUTS.index("rank of match")]] == 0).all()
    assert set(np.unique(sets)) <= set(range(1, 8 if llm._heads is not None else 4))


def test_what_is_left_out_says_nothing(recorded: tuple[Llama, Traces]) -> None:
    llm, traces = recorded
    names = INPUTS[1:]
    blind = replay_auto(
        traces, bank_of(llm), drafters=("text", "recycling"), without=names, proposals=True, adapt=False
    )
    assert blind.proposals is not None
    assert (blind.proposals["inputs"][:, 1:] == 0).all()
    for k in np.unique(blind.proposals["sources"]):
        assert np.ptp(blind.proposals["p"][blind.proposals["sources"] == k]) == 0
    alone = replay_auto(
        traces, bank_of(llm), drafters=("text", "recycling"), without=[AGREEMENT], proposals=True
    )
    assert alone.proposals is not None
    assert set(np.unique(alone.proposals["sources"])) <= {1, 2}


def test_inputs_left_out_afterwards_are_those_that_a_replay_leaves_out(
    recorded: tuple[Llama, Traces],
) -> None:
    """The log loss of an ablation is of the same inputs that the native model is left with."""
    llm, traces = recorded
    # one step for all: what is proposed then does not depend on the model
    for without in (("match length", "depth"), (AGREEMENT,)):
        bank = replace(bank_of(llm), acceptance_model=of_array(np.zeros((N_SETS, N_INPUTS))))
        whole, less = (
            replay_auto(traces, bank, llm._heads, without=w, proposals=True, adapt=False).proposals
            for w in ((), without)
        )
        assert whole is not None and less is not None and len(whole) == len(less)
        sets, x = learning.inputs_of(whole, without)
        assert sets.tolist() == less["sources"].tolist()
        assert x == pytest.approx(less["inputs"], abs=1e-6)


def test_the_fit_finds_the_weights_that_made_the_data() -> None:
    rng = np.random.default_rng(1)
    w = np.array([-0.5, 1.5, -2.0])
    x = np.concatenate([np.ones((20000, 1)), rng.normal(size=(20000, 2)) * [1.0, 0.3]], axis=1)
    y = (rng.random(20000) < 1 / (1 + np.exp(-x @ w))).astype(float)
    assert learning.fit_towards(x, y, np.array([2.0, 0.0, 1.0])) == pytest.approx(w, abs=0.15)
    # little was seen, or nothing: near where it was
    prior = np.array([2.0, 0.0, 1.0])
    assert learning.fit_towards(x[:2], y[:2], prior) == pytest.approx(prior, abs=0.1)
    kept = learning.fit_towards(np.c_[x, np.zeros(len(x))], y, np.append(prior, 7.0))
    assert kept[3] == 7.0


def test_the_fit_is_the_most_likely_one_around_the_prior() -> None:
    """Against a minimiser that knows nothing of Newton's method, from a prior far away."""
    rng = np.random.default_rng(2)
    x = np.c_[np.ones(60), 3 * rng.normal(size=60), np.full(60, 0.5)]
    y = (rng.random(60) < 1 / (1 + np.exp(1 - 2 * x[:, 1]))).astype(float)
    prior = np.array([9.0, -7.0, 2.0])
    scale = np.sqrt((x**2).mean(axis=0))

    def unlikely(w: np.ndarray) -> float:  # of weights in units of the inputs
        z = (x / scale) @ w
        return float((np.logaddexp(0, z) - y * z).sum() + 0.5 * 8.0 * ((w - prior * scale) ** 2).sum())

    best = minimize(unlikely, np.zeros(3), tol=1e-12).x
    assert learning.fit_towards(x, y, prior, strength=8.0) == pytest.approx(best / scale, rel=1e-3, abs=1e-4)


def test_weights_are_learned_where_that_pays_and_only_there(recorded: tuple[Llama, Traces]) -> None:
    llm, traces = recorded
    timid = learning.shipped()
    timid[:, 0] -= 9.0  # nothing is ever worth a guess
    bank = replace(bank_of(llm), acceptance_model=of_array(timid))
    learned = learning.learn(traces, bank, llm._heads, adapt=False)
    assert learned.acceptance_model not in (None, bank.acceptance_model)
    assert (
        replay_auto(traces, learned, llm._heads).us
        < 0.99 * replay_auto(traces, bank, llm._heads, adapt=False).us
    )
    # nothing pays where trees are dear, and one text is too few to judge by
    dear = replace(bank, costs=relative({1: 1.0, 2: 30.0, 64: 900.0}, [0, 0.03, 0.06, 0.09, 0.12]))
    assert learning.learn(traces, dear, llm._heads, adapt=False) is dear
    assert learning.learn(traces.pick([0]), bank, llm._heads) is bank


def test_learned_weights_know_held_out_texts_better(recorded: tuple[Llama, Traces]) -> None:
    llm, traces = recorded
    fitted, held_out = traces.split()
    bank = bank_of(llm)
    seen, new = (replay_auto(t, bank, llm._heads, proposals=True).proposals for t in (fitted, held_out))
    assert seen is not None and new is not None
    weights = learning.fit(seen)
    assert learning.log_loss(seen, weights) < learning.log_loss(seen, learning.shipped())
    assert learning.log_loss(new, weights) < learning.log_loss(new, learning.shipped())
    rows = list(learning.ablate(fitted, held_out, bank, llm._heads, ("text", "recycling", "heads")))
    assert [name for name, _, _ in rows] == [
        learning.LIBRARY,
        "nothing",
        learning.FROZEN,
        *list(learning.PARTS)[1:],
    ]


def test_a_bank_with_weights_starts_the_model_there_and_it_goes_on(headless: Llama) -> None:
    llm = headless
    rng = np.random.default_rng(2)
    weights = of_array(learning.shipped() + rng.normal(size=(N_SETS, N_INPUTS)) * 0.01)
    llm.set_trees(replace(bank_of(llm), acceptance_model=weights), policy="auto")
    assert llm.decoder.acceptance() == pytest.approx(as_array(weights))
    for _ in llm.generate(asked(llm)[0][1], temp=0.0):
        if llm.n_tokens > 150:
            break
    llm.reset()
    later = llm.decoder.acceptance()
    assert not np.allclose(later[1:4], as_array(weights)[1:4]), "it learned nothing"
    assert np.allclose(later[4:], as_array(weights)[4:]), "nobody proposed anything there"
    llm.decoder.set_acceptance(learning.shipped())
    assert llm.decoder.acceptance() == pytest.approx(learning.shipped().astype(np.float32))
    with pytest.raises(EntmtpError, match="no number"):
        llm.decoder.set_acceptance(np.full((N_SETS, N_INPUTS), np.nan, np.float32))
    with pytest.raises(ValueError, match="must be"):
        llm.decoder.set_acceptance(np.zeros(3, np.float32))
    llm.set_trees(bank_of(llm), policy="auto")
    assert llm.decoder.acceptance() == pytest.approx(learning.shipped().astype(np.float32))


def test_a_bank_of_weights_alone_is_for_the_policy_auto(models: dict[str, Path], tmp_path: Path) -> None:
    path, model = tmp_path / "bank.json", shutil.copy(models["q8_0"], tmp_path)
    weights = of_array(learning.shipped() + 0.25)
    path.write_text(dumps(Bank("mine", (PLAIN,), costs=COSTS, acceptance_model=weights)))
    with closing(Llama(model, draft="entmtp", trees=path, n_ctx=256, verbose=False, calibrate=False)) as llm:
        assert llm.policy == "auto"
        assert llm.decoder.acceptance()[1:] == pytest.approx(as_array(weights)[1:])


def test_what_cannot_be_replayed_is_said(recorded: tuple[Llama, Traces]) -> None:
    llm, traces = recorded
    with pytest.raises(ValueError, match="no texts"):
        replay_auto(replace(traces, texts=None), bank_of(llm))
    with pytest.raises(EntmtpError, match="a model that drafts"):
        replay_auto(traces, bank_of(llm), drafters=("text", "model"))
    assert traces.texts is not None
    empty = replace(traces.texts, n_prompt=np.zeros_like(traces.texts.n_prompt))
    with pytest.raises(EntmtpError, match="no prompt"):
        replay_auto(replace(traces, texts=empty), bank_of(llm))


def test_sets_are_named_by_their_bits() -> None:
    assert len(SETS) == N_SETS and SETS[0] == "" and SETS[5] == "text+heads" and SETS[15].count("+") == 3


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("tokens", 100_000, "token 100000 is not in the vocabulary"),
        ("tokens", 2**31 - 1, "token 2147483647 is not in the vocabulary"),
        ("best", 100_000, "token 100000 is not in the vocabulary"),
        ("best", -2, "token -2 is not in the vocabulary"),
        ("states", None, "hidden states of 3 values"),
    ],
)
def test_texts_of_another_model_are_refused(
    field: str, value: int | None, why: str, recorded: tuple[Llama, Traces]
) -> None:
    """Who wrote a file of traces may have written anything: what the heads are asked about must be theirs."""
    llm, traces = recorded
    assert traces.texts is not None
    values = getattr(traces.texts, field)[:, :3] if value is None else getattr(traces.texts, field).copy()
    if value is not None:
        values[len(values) // 2 :] = value
    strange = replace(traces, texts=replace(traces.texts, **{field: np.ascontiguousarray(values)}))
    if llm._heads is None and (value is None or 0 <= value < 1 << 24):
        # any vocabulary will do, and no states are read
        assert len(replay_auto(strange, bank_of(llm)).steps) > 0
        return
    with pytest.raises((EntmtpError, ValueError), match=why):
        replay_auto(strange, bank_of(llm), llm._heads)
