"""What drafting costs where it brings nothing, fixed chains to compare with, and what replay foretells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from entmtp import Bank, Llama
from entmtp.bank import PLAIN, Traces
from entmtp.bank.costs import relative
from entmtp.bank.texts import N_BEST, Texts
from entmtp.bank.traces import join
from entmtp.bench import mislead
from entmtp.bench.cli import main
from entmtp.measure.chains import chains
from entmtp.measure.foretell import Foretelling
from entmtp.measure.replay import replay_auto
from entmtp.measure.rollouts import rollout
from entmtp.measure.turns import Prompt
from helpers.settings import prompts

COSTS = relative({1: 1.0, 2: 1.05, 4: 1.15, 8: 1.5, 16: 2.6, 64: 9.0}, [0, 0.03, 0.06, 0.09, 0.12])


def traces_of(prompt: list[int], tokens: list[int]) -> Traces:
    """A text that was decoded without heads; what its distributions were is not known."""
    n = len(tokens)
    texts = Texts(
        np.array([len(prompt)], np.int32), np.zeros(1, np.float32), np.array([*prompt, *tokens], np.int32),
        np.full((n, N_BEST), -1, np.int32), np.zeros((n, N_BEST), np.float32), np.zeros((n, 0), np.float32),
    )  # fmt: skip
    nothing = np.zeros((n, 0, 8), np.float32)
    return Traces(
        np.array([n], np.int32), ("t",), (0,), np.zeros((n, 3), np.float32), np.zeros((n, 0), np.int32), nothing,
        False, texts=texts,
    )  # fmt: skip


def test_chains_by_hand() -> None:
    traces = traces_of([1, 2, 3, 4], [1, 2, 3, 4, 1])
    # after 1: (4, 1) is new. After 2: (1, 2) went on with 3, 4, and does again; the last token is not evaluated
    r = chains(traces, COSTS, 2, 2)
    assert list(zip(r.steps["n_nodes"].tolist(), r.steps["n_accepted"].tolist(), strict=True)) == [
        (1, 0),
        (3, 2),
    ]
    assert r.n_tokens == 4 and r.us == pytest.approx(1000 + 1100)
    # the latest place counts: 7, not 3
    later = traces_of([1, 2, 3, 1, 2, 7], [1, 2, 3, 5])
    r = chains(later, COSTS, 2, 1)
    assert list(zip(r.steps["n_nodes"].tolist(), r.steps["n_accepted"].tolist(), strict=True)) == [
        (1, 0),
        (2, 0),
        (2, 0),
    ]
    # one text after the other: in the second 7, 5 are guessed after (5, 6), and only 7 is left to come
    both = join([traces_of([1, 2, 3, 4], [1, 2, 3, 4, 1]), traces_of([5, 6, 7], [5, 6, 7, 8])])
    r = chains(both, COSTS, 2, 2)
    assert r.steps["n_nodes"].tolist() == [1, 3, 1, 3] and r.n_tokens == 7
    with pytest.raises(ValueError, match="no texts"):
        chains(Traces(**(vars(traces) | {"texts": None})), COSTS, 2, 2)


@pytest.mark.parametrize(("match", "draft"), [(1, 1), (2, 3), (3, 8)])
def test_chains_against_a_search_of_the_whole_text(match: int, draft: int) -> None:
    text = np.random.default_rng(match).integers(0, 3, 160).tolist()
    r = chains(traces_of(text[:10], text[10:]), COSTS, match, draft)
    at, expected = 10, []
    while at < len(text) - 1:
        known, end = text[: at + 1], text[at + 1 - match : at + 1]
        places = [i for i in range(match, at + 1) if known[i - match : i] == end]
        guesses = known[places[-1] : places[-1] + draft] if places else []
        came = text[at + 1 : -1]
        n_right = max(n for n in range(len(guesses) + 1) if guesses[:n] == came[:n] and n <= len(came))
        expected.append((1 + len(guesses), n_right))
        at += 1 + n_right
    assert list(zip(r.steps["n_nodes"].tolist(), r.steps["n_accepted"].tolist(), strict=True)) == expected


@pytest.mark.parametrize("kind", mislead.RUNS)
def test_texts_mislead(kind: str) -> None:
    """Runs come again, and what followed them is wrong."""
    text = mislead.misleading(4096, 600, *mislead.RUNS[kind], seed=1)
    assert text == mislead.misleading(4096, 600, *mislead.RUNS[kind], seed=1)
    assert text != mislead.misleading(4096, 600, *mislead.RUNS[kind], seed=2)
    last: dict[tuple[int, int], int] = {}
    n_match = n_right = 0
    for a, b, c in zip(text, text[1:], text[2:], strict=False):
        n_match += (a, b) in last
        n_right += last.get((a, b)) == c
        last[a, b] = c
    assert n_match > 60
    if kind == "runs of 2 tokens":
        traces = traces_of(text[:32], text[32:])
        assert n_right < 0.03 * n_match
        r, plain = (
            chains(traces, COSTS, 2, 4),
            replay_auto(traces, Bank("", (PLAIN,), costs=COSTS), drafters=()),
        )
        assert r.tokens_per_step < 1.02 and r.us > 1.02 * plain.us


def test_a_text_is_forced_on_a_model(load: Callable[..., Llama]) -> None:
    """Token by token, whatever would have been drawn; in the end the model is where reading it would have led."""
    llm, plain = load(heads="hydra"), load()
    llm.set_trees(policy="auto")
    text = mislead.misleading(llm.n_vocab(), 120, 2, 2, seed=0)
    answer = mislead.forcing(llm)(Prompt(text, 80, 0.8))
    assert answer.tokens == text[mislead.START : mislead.START + 80]
    assert len(answer.times) == 80 and answer.seconds == answer.times[-1] > 0
    assert answer.stats is not None and answer.stats.n_steps + answer.stats.n_accepted >= 79
    plain.reset()
    plain.eval(text[: mislead.START + 80])
    ours, theirs = (np.array(m.decoder.logits(m.n_vocab())) for m in (llm, plain))
    assert ours == pytest.approx(theirs, abs=1e-4)


def test_the_command_measures_both_kinds(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, out = tmp_path / "story.jsonl", tmp_path / "m.json"
    asked.write_text(json.dumps({"prompt": "It was a dark night, and"}) + "\n")
    arguments = [
        "mislead",
        "-m",
        models["q8_0"],
        "--heads",
        models["hydra"],
        "--limit",
        "1",
        "--tokens",
        "24",
        "--raw",
    ]
    arguments += ["--temp", "0.8", "--prompts", asked, "--threads", "1", "--ctx", "512", "-o", out]
    assert main([str(a) for a in arguments]) == 0
    found = json.loads(out.read_text())["mislead"]
    assert [len(t["rows"]) for t in found] == [3, 3, 2]
    assert all(r["identical"] == r["answers"] for t in found for r in t["rows"])
    assert all(0.5 < x < 2.0 for t in found[:2] for x in t["counted"].values())
    useless = found[-1]["rows"][1]
    assert useless["method"] == mislead.USELESS and useless["tokens_per_step"] < 1.1
    assert "### made to mislead, runs of 2 to 8 tokens, temperature 0.8" in capsys.readouterr().out


def test_what_is_foretold_is_a_replay_that_goes_on(load: Callable[..., Llama]) -> None:
    llm = load(heads="hydra")
    bank = Bank("text", (PLAIN,), costs=COSTS, calibration=Bank.load("generic-hydra").calibration)
    llm.set_trees(bank, policy="auto", drafters="text,recycling")
    bank = llm.bank or bank
    asked = [Prompt(llm.tokenize(t.encode()), 40, 0.0) for t in prompts()[::40]]
    told = Foretelling(llm, llm)
    us = [*told.answers(asked[:1]), *told.answers(asked[1:])]
    assert len(us) == len(asked) and min(us) > 0
    alone = [rollout(llm, list(p.tokens), 40, ranks_too=False, temp=0.0) for p in asked[:1]]
    assert us[0] == pytest.approx(replay_auto(alone[0], bank, drafters=["text", "recycling"]).us)
    assert told.us_plain() == pytest.approx(bank.need_costs().curve()[0])


def test_run_says_what_replay_foretells(
    models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, out = tmp_path / "story.jsonl", tmp_path / "run.json"
    asked.write_text(json.dumps({"prompt": "It was a dark night, and"}) + "\n")
    arguments = [
        "run",
        "-m",
        models["f32"],
        "--heads",
        models["hydra"],
        "--raw",
        "--prompts",
        asked,
        "--tokens",
        "40",
    ]
    arguments += [
        "--temp",
        "0",
        "--methods",
        "EntMTP",
        "--replay",
        "--threads",
        "1",
        "--ctx",
        "512",
        "-o",
        out,
    ]
    assert main([str(a) for a in arguments]) == 0
    (task,) = json.loads(out.read_text())["tasks"]
    told = task["replay"]
    ours = next(r for r in task["rows"] if r["method"] == "EntMTP")
    assert told["measured"] == pytest.approx(ours["overall_plain"], rel=0.02) and told["foretold"] > 0.3
    assert "Replay foretells EntMTP's speed against plain decoding" in capsys.readouterr().out
