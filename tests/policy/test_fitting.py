"""What is fitted to traces, and what answers in turn say, on numbers made here: against plain loops and formulas."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.optimize import minimize

from entmtp.bank import PLAIN, Bank, Tree
from entmtp.bank.calibration import N_ACCEPT, N_AHEAD, N_BEST, N_GUESS
from entmtp.bank.costs import Costs, relative
from entmtp.measure import calibration, search
from entmtp.measure import speed as figures
from entmtp.measure.compare import Comparison, quartiles, time_split
from entmtp.measure.fitting import fit, fit_sizes, ladders
from entmtp.measure.loops import LOOP, TIMES, before_loop, cut
from entmtp.measure.speed import ENOUGH, Meter, PlainPass, Speed, sparkline
from entmtp.measure.turns import Answer
from entmtp.native.stats import STEP_DTYPE, DraftStats
from helpers.traces import make_traces, random_ranks

COSTS = relative({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.9, 16: 3.5, 64: 20.0}, [0.0, 0.05, 0.1, 0.15])


#
# calibration
#


def test_logistic_weights_are_the_most_likely_ones() -> None:
    """Against a minimiser that knows nothing of Newton's method, on inputs of different scale."""
    rng = np.random.default_rng(0)
    x = np.stack([np.ones(300), 50 * rng.normal(size=300), 0.01 * rng.normal(size=300)], axis=1)
    y = 1 / (1 + np.exp(-(0.5 + 0.04 * x[:, 1] - 80 * x[:, 2]))) * 0.9 + 0.05
    scale = np.array([1.0, x[:, 1].std(), x[:, 2].std()])

    def unlikely(w: np.ndarray) -> float:  # of weights in units of the inputs
        z = np.clip((x / scale) @ w, -30, 30)
        return float((np.logaddexp(0, z) - y * z).sum() + 0.5 * (np.array([1e-3, 2.0, 2.0]) * w**2).sum())

    best = minimize(unlikely, np.zeros(3), tol=1e-12).x
    assert calibration.fit_logistic(x, y, ridge=2.0) == pytest.approx(best / scale, rel=1e-3)
    # what nothing tells apart stays small instead of growing for ever
    certain = calibration.fit_logistic(np.stack([np.ones(50), np.arange(50.0)], axis=1), np.arange(50) >= 25)
    assert np.isfinite(certain).all() and 0 < certain[1] < 5


def test_running_hits_by_hand() -> None:
    """The mean before each position moves by 2 / (window + 1) of what it is off, and starts anew with each text."""
    ranks = np.array([[0], [3], [0], [-1], [0], [-1]], dtype=np.int32)
    traces = make_traces(ranks, [4, 2])
    found = calibration.running_hits(traces, 0.5, 3.0)
    assert found == pytest.approx([0.5, 0.75, 0.375, 0.6875, 0.5, 0.75])


def test_inputs_of_the_acceptance_model() -> None:
    p = np.array([[0.5, 0.25], [1.0, 1e-3]])
    inputs = calibration.accept_inputs(
        np.log(p), np.array([1.0, 2.0]), np.array([3.0, 4.0]), np.array([-5.0, -6.0]), np.array([0.7, 0.8])
    )
    assert inputs.shape == (2, 2, N_ACCEPT)
    for i, rank in itertools.product((0, 1), (0, 1)):
        spread = -sum(q * np.log(q) for q in p[i])
        rest = np.log(1 - min(p[i, rank], 0.9999))
        wanted = [
            1.0,
            np.log(p[i, rank]),
            rest,
            1.0 + i,
            3.0 + i,
            np.log(rank + 1),
            -5.0 - i,
            0.7 + i / 10,
            spread,
        ]
        assert inputs[i, rank] == pytest.approx(wanted)


def test_a_calibration_tells_what_came_true() -> None:
    """Heads that say 0.4, 0.2, ... always, but are right the more often the less the entropy: that is learnt."""
    lengths = [400] * 4
    rng = np.random.default_rng(0)
    entropy = rng.random(1600) * 3
    ranks = random_ranks(1, lengths, 3, 0.8)
    wrong = rng.random(1600) < entropy / 4
    ranks[wrong & (ranks[:, 0] >= 0), 0] = search.UNRANKED
    traces = make_traces(ranks, lengths, entropy)
    found = calibration.fit(traces, 8.0, n_bins=3, n_scenarios=2)
    assert found.accept.shape == (3, N_ACCEPT) and found.ahead.shape == (3, N_AHEAD)
    assert found.edges.shape == (3, 2) and found.scenarios.shape == (3, 3, 2, 3, N_BEST)
    known = ranks[:, 0] >= 0
    assert found.hits == pytest.approx((ranks[known, 0] == 0).mean())
    assert (np.diff(found.edges, axis=1) > 0).all(), "edges increase"
    share = [(ranks[ranks[:, 0] >= 0, 0] == r).mean() for r in range(2)]
    assert found.scenarios[0, :, :, 0, :2].mean(axis=(0, 1)) == pytest.approx(share, abs=0.05)
    # two levels down the greedy path: the product of what both said, for here nothing tells more
    both = ((ranks[:, :2] == 0).all(axis=1) & (ranks[:, 1] >= 0)).sum() / (ranks[:, 1] >= 0).sum()
    assert found.scenarios[0, :, :, 1, 0].mean() == pytest.approx(both, abs=0.06)
    assert (found.scenarios[2, :, :, :2] == 0).all(), "of levels above nothing is foreseen"
    assert (np.diff(found.scenarios[:, :, :, :, 0].mean(axis=1)[0, :, 0]) >= 0).all(), (
        "scenarios from bad to good"
    )
    sure, unsure = (found.scenarios[0, b, :, 0, 0].mean() for b in (2, 0))
    assert (
        sure == pytest.approx((ranks[known & (entropy < 1), 0] == 0).mean(), abs=0.06)
        and sure > unsure + 0.25
    )
    cut_off = calibration.fit(traces, 8.0, without=("running entropy", "hits", "root"))
    left_out = [name in ("running entropy", "hits", "root") for name in calibration.ACCEPT]
    assert not cut_off.accept[:, left_out].any() and cut_off.accept[0].any()
    assert not cut_off.ahead[
        :, [name in ("running entropy", "hits", "root") for name in calibration.AHEAD]
    ].any()


def test_weights_are_fitted_to_what_could_be_seen() -> None:
    """Against plain loops: the guesses after a path are judged where the text went along it and did not end."""
    lengths = [150, 90]
    rng = np.random.default_rng(3)
    ranks = random_ranks(4, lengths, 2, 0.6)
    traces = make_traces(ranks, lengths, rng.random(240) * 3)
    traces.log_p[:] = np.log(-np.sort(-rng.dirichlet(np.full(20, 0.4), (240, 2)))[..., :N_GUESS])
    log_p = traces.log_p.astype(np.float64)
    found = calibration.fit(traces, 8.0, n_bins=2, n_scenarios=2)
    running, entropy = traces.running(8.0), traces.entropy
    hits = calibration.running_hits(traces, found.hits, 39.0)
    best = []  # calibrated probability of the first guess on each level
    for level in range(2):
        rows, right = [], []
        above = log_p[:, 0, 0] if level else np.zeros(240)
        inputs = calibration.accept_inputs(log_p[:, level], running, entropy, above, hits)
        for i in range(240):
            # heads that do not see the path guess the same after each of the four first guesses
            width = 1 if level == 0 else 4
            for c in range(width):
                came_along = level == 0 or ranks[i, 0] == calibration.expanded_path(level, c)[0]
                if came_along and ranks[i, level] >= 0:
                    up = log_p[i, 0, calibration.expanded_path(level, c)[0]] if level else 0.0
                    own = inputs[i].copy()
                    own[:, 6] = up
                    rows += list(own)
                    right += [float(ranks[i, level] == r) for r in range(N_GUESS)]
        weights = calibration.fit_logistic(np.array(rows), np.array(right))
        assert found.accept[level] == pytest.approx(weights, rel=1e-6, abs=1e-9)
        best.append(1 / (1 + np.exp(-(inputs[:, 0] @ weights))))
    for level in range(2):
        x = np.zeros((240, N_AHEAD))
        for i in range(240):
            x[i, :5] = 1.0, running[i], entropy[i], traces.log_root[i], hits[i]
            if level:
                x[i, 5] = x[i, 6] = log_p[i, 0, 0]
        assert found.ahead[level] == pytest.approx(
            calibration.fit_logistic(x, best[level]), rel=1e-6, abs=1e-9
        )


def test_edges_are_moved_apart() -> None:
    assert calibration._increasing(np.array([0.5, 0.5, 0.5, 0.7])) == pytest.approx(
        [0.5, 0.5001, 0.5002, 0.7]
    )


#
# search
#


def test_names_of_trees() -> None:
    """By nodes and levels, letters for others of the same size, each tree once, plain decoding first."""
    a, b = Tree.from_paths("", [[0], [1]]), Tree.from_paths("", [[0], [2]])
    deep = Tree.from_paths("", [[0], [0, 0], [0, 0, 0]])
    found = search.named([deep, b, PLAIN, a, a])
    assert [t.name for t in found] == ["plain", "n3d1", "n3d1b", "n4d3"]
    assert [t.paths for t in found] == [(), a.paths, b.paths, deep.paths]


def test_front_of_every_size() -> None:
    """Nodes, tokens per step and tokens per second of the best tree that greedy growth gives at any depth."""
    p = search.node_probabilities(random_ranks(2, [500], 3, 0.6))
    rows = search.pareto(p, COSTS)
    assert [n for n, _, _ in rows] == list(range(1, 65))
    assert rows[0] == (1, 1.0, pytest.approx(1e6 / COSTS.step(PLAIN)))
    for n in (2, 5, 9):
        trees = [Tree("", search.grow(p, n, d)) for d in (1, 2, 3)]
        assert rows[n - 1][1] == pytest.approx(max(1 + search.expected(t.paths, p) for t in trees))
        assert rows[n - 1][2] == pytest.approx(
            1e6 * max((1 + search.expected(t.paths, p)) / COSTS.step(t) for t in trees)
        )


def test_growth_goes_no_deeper_than_told() -> None:
    p = {(0,): 0.9, (0, 0): 0.8, (1,): 0.1, (0, 0, 0): 0.7, (1, 0): 0.05}
    assert search.grow(p, 4) == ((0,), (0, 0), (0, 0, 0))
    assert search.grow(p, 4, 1) == ((0,), (1,))
    assert search.grow(p, 4, 2) == ((0,), (1,), (0, 0)) and search.grow(p, 1) == ()


def test_spares_are_the_best_of_their_size() -> None:
    lengths = [300] * 3
    traces = make_traces(random_ranks(4, lengths, 3, 0.6), lengths)
    p = search.node_probabilities(traces.ranks)
    found = search.spares(traces, COSTS, sizes=(2, 4, 8))
    assert [len(paths) + 1 for paths in found] == [2, 4, 8]
    for n, paths in zip((2, 4, 8), found, strict=True):
        own = search.objective(Tree("", paths), p, COSTS, None)
        assert own == max(search.objective(Tree("", search.grow(p, n, d)), p, COSTS, None) for d in (1, 2, 3))


def test_edges_of_equally_filled_bins() -> None:
    running = np.arange(1000) / 100.0
    edges = search.entropy_edges(running, 4)
    assert edges == pytest.approx([2.4975, 4.995, 7.4925], abs=1e-3)
    assert search.entropy_edges(running, 1) == () and search.entropy_edges(np.zeros(9), 4) == ()
    assert search.entropy_edges(np.array([0.0] * 5 + [1.0] * 5), 2) == (0.5,)


def test_acceptance_of_a_bank_is_counted_by_bins() -> None:
    lengths = [300] * 2
    entropy = np.repeat([0.5, 2.5], 300)
    ranks = random_ranks(9, lengths, 2, 0.6)
    traces = make_traces(ranks, lengths, entropy)
    trees = (PLAIN, Tree.from_paths("t", [[0], [1], [0, 0]]))
    bank = search.calibrated(traces, COSTS, trees, 2.0, 2)
    running = traces.running(2.0)
    assert bank.acceptance is not None and len(bank.acceptance) == 2 and bank.ema_window == 2.0
    for b, rows in enumerate((running < bank.bin_edges[0], running >= bank.bin_edges[0])):
        p = search.node_probabilities(ranks[rows])
        assert bank.acceptance[b][1] == pytest.approx([p[path] for path in trees[1].paths], abs=1e-4)


def test_a_bank_holds_what_it_must_and_no_more_than_it_may() -> None:
    lengths = [400] * 3
    traces = make_traces(random_ranks(6, lengths, 3, 0.7), lengths, np.random.default_rng(0).random(1200) * 4)
    wanted = Tree.from_paths("", [[3], [5]])
    bank = search.bin_bank(traces, COSTS, 8.0, 4, "ratio", more=[wanted], max_trees=5)
    assert len(bank.trees) == 5 and bank.trees[0] == PLAIN and wanted.paths in [t.paths for t in bank.trees]
    assert bank.criterion == "ratio" and len(bank.bin_edges) == 3
    assert search.bin_bank(traces, COSTS, 8.0, 2, "price").criterion == "price"


#
# banks
#


def test_the_fitted_bank_is_the_fastest_that_was_tried() -> None:
    from entmtp.measure.replay import replay

    lengths = [300] * 4
    wrong = np.repeat([False, True, False, True], 300)
    ranks = random_ranks(7, lengths, 3, 0.9)
    ranks[wrong & (ranks[:, 0] >= 0)] = search.UNRANKED
    traces = make_traces(ranks, lengths, np.where(wrong, 3.0, 0.2))
    steps: list[tuple[str, int, int]] = []
    bank = fit(traces, COSTS, lambda *step: steps.append(step))
    assert steps == [("search", i, 24) for i in range(1, 25)]
    single = search.best_single(traces, COSTS)
    assert single.paths in [t.paths for t in bank.trees], "the best single tree is in it"
    us = replay(traces, bank, "entropy").us
    for window, n_bins, criterion in itertools.product((2.0, 8.0, 32.0), (1, 2, 4, 7), ("ratio", "price")):
        other = search.bin_bank(traces, COSTS, window, n_bins, criterion, more=[single])
        assert us <= replay(traces, other, "entropy").us * (1 + 2e-3)
    assert bank.calibration is not None and set(bank.published) == {"entropy", "top1", "path"}


def test_where_nothing_is_gained_text_is_still_told_apart() -> None:
    """All banks decode plainly there: the one of four bins and a window of eight tokens is taken."""
    lengths = [300] * 2
    traces = make_traces(random_ranks(8, lengths, 2, 0.7), lengths, np.random.default_rng(1).random(600) * 4)
    bank = fit(traces, relative({1: 1.0, 64: 6400.0}, [0, 1.0, 2.0]))
    assert (bank.ema_window, bank.criterion, len(bank.bin_edges)) == (8.0, "ratio", 3)


def test_banks_of_given_sizes() -> None:
    lengths = [300] * 2
    traces = make_traces(random_ranks(8, lengths, 3, 0.7), lengths, np.random.default_rng(1).random(600) * 4)
    bank = fit_sizes(traces, COSTS, [1, 2, 4, 8])
    assert [(t.name, t.n_nodes) for t in bank.trees] == [("plain", 1), ("n2", 2), ("n4", 4), ("n8", 8)]
    assert bank.ema_window == 8.0 and len(bank.bin_edges) == 3 and bank.calibration is not None


def test_ladders_have_equally_filled_rungs() -> None:
    """The larger the tree the more predictable the text: rung by rung down in size as the score goes up."""
    lengths = [400] * 2
    entropy = np.random.default_rng(2).random(800) * 4
    traces = make_traces(random_ranks(3, lengths, 3, 0.7), lengths, entropy)
    traces.signals[:, 1] = 1 - entropy / 5
    sizes = [Tree.from_paths(f"t{n}", [[r] for r in range(n)]) for n in (1, 2, 3)]
    found = ladders(traces, Bank("b", (PLAIN, *sizes), ema_window=8.0))
    assert set(found) == {"entropy", "top1", "path"}
    for score, values in {"entropy": traces.running(8.0), "top1": entropy / 5}.items():
        rungs = np.searchsorted(found[score].edges, values, side="right")
        counts = Counter(rungs.tolist())
        assert len(counts) == 4 and max(counts.values()) - min(counts.values()) < 8
        assert found[score].trees == (3, 2, 1, 0)
    assert len(found["path"].edges) <= 1, "heads that always say the same have one score"


#
# answers in turn
#


def steps_of(*steps: tuple[int, int, int, int]) -> DraftStats:
    """Of (nodes, accepted, draft µs, verify µs) each; every step takes 30 µs for sampling and 10 on the host."""
    found = np.zeros(len(steps), STEP_DTYPE)
    for step, (nodes, accepted, draft, verify) in zip(found, steps, strict=True):
        step["n_nodes"], step["n_accepted"], step["t_draft_us"], step["t_verify_us"] = (
            nodes,
            accepted,
            draft,
            verify,
        )
    found["t_sample_us"], found["t_host_us"], found["entropy"] = 30, 10, 0.5
    return DraftStats(found, ["plain"])


def test_quartiles() -> None:
    assert quartiles([4.0, 1.0, 2.0, 3.00006]) == [2.5, 1.75, 3.25] and quartiles([]) is None


def test_shares_of_the_time() -> None:
    stats = [steps_of((4, 1, 100, 300), (4, 0, 100, 300)), steps_of((1, 0, 0, 200))]
    split = time_split(stats, 2e-3)
    assert split == pytest.approx({"draft": 0.1, "verify": 0.4, "sample": 0.045, "host": 0.015, "rest": 0.44})
    assert time_split(stats, 1e-3)["rest"] == 0.0


def test_where_a_loop_begins() -> None:
    """Where a run of 16 tokens ends that comes for the third time."""
    assert (LOOP, TIMES) == (16, 3)
    start, cycle = [900, 901, 902], list(range(16))
    assert before_loop(start + cycle * 5) == 3 + 48
    assert before_loop(start + cycle * 2) == 35 and before_loop([7] * 40) == 18
    assert before_loop(list(range(100))) == 100 and before_loop([]) == 0


def test_answers_are_cut_with_their_steps() -> None:
    """The first token is the prompt's; then a step makes one token and those that it accepted."""
    stats = steps_of((4, 2, 0, 0), (4, 0, 0, 0), (4, 1, 0, 0), (1, 0, 0, 0))  # tokens 1-3, 4, 5-6, 7
    answer = Answer(list(range(8)), 7.0, stats, [float(i) for i in range(8)])
    assert cut(answer, 8) is answer and cut(answer, 99) is answer
    for n, n_steps in ((7, 3), (6, 3), (5, 2), (4, 1), (2, 1)):
        short = cut(answer, n)
        assert (short.tokens, short.seconds, short.times) == (
            list(range(n)),
            n - 1.0,
            [float(i) for i in range(n)],
        )
        assert short.stats is not None and short.stats.n_steps == n_steps
    assert cut(Answer([1, 2], 1.0, None, [0.0, 1.0]), 0).seconds == 0.0


def test_rows_of_drafting_and_of_programs_that_tell_their_passes() -> None:
    stats = [steps_of(*[(4, 1, 100, 300)] * 10), steps_of(*[(4, 0, 100, 300)] * 10)]
    times = [0.1 * i for i in range(21)]
    turns = [
        {"ours": Answer(list(range(21)), 2.0, s, times), "theirs": Answer(list(range(21)), 4.0, None, times, passes),
         "unknown": Answer(list(range(20)), 4.0)}
        for s, passes in zip(stats, (10, 15), strict=True)
    ]  # fmt: skip
    found = Comparison(turns)
    ours, theirs, unknown = (found.row(label, "theirs") for label in turns[0])
    assert ours["tokens_per_step"] == 1.5 and ours["entropy"] == pytest.approx(0.5)
    assert ours["time_split"] == pytest.approx(time_split(stats, 4.0))
    assert (ours["overall"], ours["identical"], unknown["identical"]) == (2.0, 2, 0)
    assert theirs["tokens_per_step"] == pytest.approx(40 / 25) and "time_split" not in theirs
    assert "tokens_per_step" not in unknown
    looped = [{"a": Answer([7] * 40, 39.0, None, [float(i) for i in range(40)])}]
    (turn,) = Comparison(looped).without_loops().turns
    assert (len(turn["a"].tokens), turn["a"].seconds) == (18, 17.0)


#
# speed
#


def test_what_a_plain_pass_takes() -> None:
    """The answer's own single passes where there are enough, else those of answers before, at first the calibration."""
    few, many = (
        steps_of(*[(1, 0, 0, 200)] * (ENOUGH - 1), (4, 1, 0, 900)),
        steps_of(*[(1, 0, 0, 300)] * ENOUGH),
    )
    plain = PlainPass()
    assert plain.during(few) is plain.seen_in(few) is None
    plain = PlainPass(100.0)
    assert (plain.during(few), plain.seen_in(few)) == (100.0, "calibration")
    assert (plain.during(many), plain.seen_in(many)) == (300.0, "this answer")
    plain.observe(few)
    assert plain.us == 100.0, "too few say nothing"
    plain.observe(steps_of((1, 0, 0, 520)))
    assert plain.us == pytest.approx((15 * 200 + 520) / 16)
    assert plain.seen_in(few) == "answers before" and plain.during(few) == plain.us


def test_a_line_of_figures() -> None:
    stats = steps_of(*[(4, 1, 0, 0)] * 8)
    speed = Speed(17, 2.0, 0.1, 1.25, stats)
    assert speed.tokens_per_second == 8.0
    front = "8 tokens/s · 1.25× plain · 2.00 tokens/step"
    assert speed.line() == f"{front} · entropy ████████ 0.50 nats"
    # the bars get the room that is left, or none
    n = len(f"{front} · entropy  0.50 nats")
    assert speed.line(n + 4) == f"{front} · entropy ████ 0.50 nats" and speed.line(n + 3) == front
    assert speed.line(30) == front[:30]
    assert Speed(17, 2.0, 0.1, None, stats).line().startswith("8 tokens/s · 2.00")
    assert Speed(1, 0.0, 0.1, None, DraftStats()).line() == "… tokens/s"
    assert Speed(1, 2.0, 0.1, None, DraftStats()).tokens_per_second == 0.0
    assert Speed(5, 0.0, 0.1, None, DraftStats()).tokens_per_second == 0.0


def test_bars_are_means() -> None:
    assert sparkline([0, 0, 4, 4, 8, 8], 3) == " ▄█" and sparkline([0.0, 0.0]) == "  "
    assert sparkline(range(9)) == " ▁▂▃▄▅▆▇█" and sparkline([8.0, 0.0, 4.0], 2) == "█▂"
    assert sparkline(range(120)) == sparkline([np.mean([2 * i, 2 * i + 1]) for i in range(60)])


def test_costs_of_a_pass_are_those_of_its_size() -> None:
    """`relative` in thousandths of a second, as the tables above have it."""
    assert isinstance(COSTS, Costs) and COSTS.step(PLAIN) == pytest.approx(1000.0) and N_GUESS == 8


class Answering:
    """Drafts as it is told, and counts how often its statistics are begun anew."""

    def __init__(self) -> None:
        self.draft_stats, self.n_resets = steps_of(), 0

    def reset_draft_stats(self) -> None:
        self.n_resets += 1


def test_an_answers_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """speedup = (tokens of steps * plain pass + rest) / wall, rest = wall - drafts - passes."""
    clock, llm = SimpleNamespace(now=100.0), Answering()
    monkeypatch.setattr(figures, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    meter = Meter(llm, PlainPass(1000.0))  # type: ignore[arg-type]
    assert llm.n_resets == 1
    none = meter.speed()
    assert (none.n_tokens, none.seconds, none.first, none.speedup) == (0, 0.0, 0.0, None)
    clock.now = 100.5  # the prompt
    meter.token()
    llm.draft_stats = steps_of((1, 0, 0, 1000))
    first = meter.speed()
    assert (first.n_tokens, first.seconds, first.first, first.speedup) == (1, 0.0, 0.5, None)
    for i in range(1, 5):
        clock.now = 100.5 + 0.002 * i
        meter.token()
    llm.draft_stats = steps_of((4, 2, 200, 1300), (4, 1, 200, 1300))  # five tokens; 3 ms in drafts and passes
    found = meter.speed()
    assert (found.n_tokens, found.seconds, found.first) == (5, pytest.approx(0.008), 0.5)
    assert found.speedup == pytest.approx((5 * 0.001 + 0.005) / 0.008)
    assert found.tokens_per_second == pytest.approx(4 / 0.008) and found.stats is llm.draft_stats
    # passes that seem longer than the clock: there is no rest
    llm.draft_stats = steps_of((4, 2, 1000, 9000), (4, 1, 1000, 9000))
    assert meter.speed().speedup == pytest.approx(5 * 0.001 / 0.020)
    # what a plain pass takes is not known
    meter.plain = PlainPass()
    assert meter.speed().speedup is None
    meter.plain, llm.draft_stats = PlainPass(1000.0), steps_of()
    assert meter.speed().speedup is None


def test_plain_passes_of_answers() -> None:
    """The latest 256 of them."""
    plain = PlainPass()
    plain.observe(steps_of(*[(1, 0, 0, 100)] * 300))
    assert plain.us == 100.0 and len(plain.seen) == 256
    plain.observe(steps_of(*[(1, 0, 0, 500)] * 128, *[(2, 0, 0, 7)] * 128))
    assert plain.us == 300.0
