"""What steps cost, measured on the real thing, kept, and found again."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from entmtp import Llama
from entmtp.bank.costs import Costs, from_json
from entmtp.measure import at_load, known, timing
from entmtp.measure.speed import PlainPass
from helpers.hybrids import hybrid_path
from helpers.settings import F32


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENTMTP_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def llm(models: dict[str, Path]) -> Any:
    settings = F32 | {"n_ctx": 512}
    model = Llama(models["q8_0"], draft="entmtp", heads=models["hydra"], policy="off", **settings)
    yield model
    model.close()


def test_measured_on_a_real_model(llm: Llama) -> None:
    c = timing.measure(llm, sizes=(1, 2, 4, 8), contexts=(64, 256), n_rounds=2)
    assert set(c.verify) == {64, 256}
    assert all(set(row) == {1, 2, 4, 8} and min(row.values()) > 0 for row in c.verify.values())
    assert len(c.chain) == 5 and c.chain[0] == 0 and list(c.chain) == sorted(c.chain) and c.chain[1] > 0
    assert np.shape(c.level) == (4, 3) and np.min(c.level) > 0
    assert from_json(json.loads(json.dumps(c.to_json())), "x") == c
    # the model is as it was: a fresh start, nothing counted
    assert llm.n_tokens == 0 and llm.draft_stats.n_steps == 0


def test_a_budget_still_measures_what_is_needed(llm: Llama) -> None:
    c = timing.measure(llm, at_load.QUICK_SIZES, contexts=(64,), n_rounds=8, budget=0.0)
    assert {1, 2} <= set(c.verify[64])
    assert len(c.chain) == 5


def test_a_memory_without_trees_is_timed_in_rows(cache: Path) -> None:
    """As many tokens in a row as it can be cut back by, and one; in large rounds the budget ends it."""
    with closing(Llama(hybrid_path("qwen35"), draft="entmtp", **F32)) as model:
        assert not model.decoder.can_tree()
        n_back = llama_cpp.llama_n_rs_seq(model.ctx)
        c = timing.measure(model, n_rounds=3)
        assert n_back > 1 and list(c.verify) == [16] and list(c.verify[16]) == list(range(1, 2 + n_back))
        assert min(c.verify[16].values()) > 0 and (c.chain, c.level, c.context) == ((0.0,), (), 16)
        assert c.key == known.machine_key(model) and 0 <= c.spread < 10
        assert model.n_tokens == 0 and model.draft_stats.n_steps == 0
        few = timing.measure(model, n_rounds=10**9, budget=0.0)
        assert set(few.verify[16]) == set(c.verify[16])


def test_how_fast_plain_decoding_is_known_to_be(llm: Llama, cache: Path, trusting: None) -> None:
    """Measured where nothing is in the cache, and the trees are as before; else what is there."""
    llm.set_trees("mc_sim_7b_63", policy="static")
    before = llm.bank, llm.policy, llm.tree
    found = PlainPass.of(llm)
    kept = known.cached(llm)
    assert kept is not None and found.us == kept.curve()[0] > 0
    assert (llm.bank, llm.policy, llm.tree) == before
    known.keep(replace(kept, verify={d: {n: 7.0 * n for n in row} for d, row in kept.verify.items()}))
    assert PlainPass.of(llm).us == pytest.approx(7.0)
    with closing(Llama(llm.model_path, **F32)) as plain:  # it holds no trees to time
        assert plain.bank is None and PlainPass.of(plain).us is None


def test_costs_and_banks_are_kept_by_key(cache: Path) -> None:
    costs = Costs({16: {1: 100.0}}, (0.0,), (), key="abc")
    known.keep(costs)
    (file,) = cache.rglob("abc.json")
    assert file.parent.name == "costs" and from_json(json.loads(file.read_text()), "x") == costs
    assert known.tuned_path("abc") == cache / "banks" / "abc.json"


@pytest.fixture
def trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timings are kept however busy this machine is."""
    monkeypatch.setattr(at_load, "is_steady", lambda _: True)


def test_absurd_timings_are_not_kept(llm: Llama, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = Costs({64: {1: 100.0, 2: 130.0, 4: 200.0}}, (0.0, 10.0), ((10.0, 12.0, 20.0),), spread=0.05)
    assert at_load.is_steady(good)
    assert not at_load.is_steady(replace(good, spread=0.8))
    assert not at_load.is_steady(replace(good, verify=good.verify | {64: {1: 100.0, 2: 80000.0}}))
    monkeypatch.setattr(at_load, "is_steady", lambda _: False)
    assert isinstance(at_load.quick(llm, seconds=0.05), Costs)
    assert not (cache / "costs").exists()


def times(costs: Costs, factor: float) -> Costs:
    """The same, with passes and drafts `factor` times as expensive."""
    return replace(
        costs,
        verify={d: {n: us * factor for n, us in row.items()} for d, row in costs.verify.items()},
        chain=tuple(us * factor for us in costs.chain),
    )


def test_quick_costs_are_kept_per_model_and_machine(llm: Llama, cache: Path, trusting: None) -> None:
    first = at_load.quick(llm, seconds=0.1)
    (file,) = (cache / "costs").iterdir()
    assert file.stem == first.key == known.machine_key(llm)
    assert known.cached(llm) == first
    # a damaged file is measured anew, not believed
    file.write_text('{"verify": ')
    again = at_load.quick(llm, seconds=0.1)
    assert from_json(json.loads(file.read_text()), "x") == again


def test_costs_of_a_busy_machine_are_measured_again(llm: Llama, cache: Path, trusting: None) -> None:
    right = at_load.quick(llm, seconds=0.1)
    fast = times(right, 1e-6)  # never outdone, however busy this machine was or is now
    for wrong in (times(right, 1000), replace(right, chain=times(right, 1000).chain)):
        known.keep(wrong)
        again = at_load.quick(llm, seconds=0.1)
        assert again == known.cached(llm) and again.chain[-1] < wrong.chain[-1] / 10
        # a tuned bank's, too; those of the cache serve then
        known.keep(fast)
        assert at_load.quick(llm, seconds=0.1, tuned=wrong) == fast


def test_costs_that_a_busy_machine_exceeds_are_kept(llm: Llama, cache: Path) -> None:
    fast = times(at_load.quick(llm, seconds=0.1), 1e-6)
    known.keep(fast)
    assert at_load.quick(llm, seconds=0.1) == fast
    assert at_load.quick(llm, seconds=0.1, tuned=times(fast, 0.5)) == times(fast, 0.5)


def test_key_depends_on_the_settings(llm: Llama, models: dict[str, Path]) -> None:
    with_heads = Llama(models["q8_0"], draft="entmtp", heads=models["medusa"], policy="off", **F32)
    assert known.machine_key(with_heads) != known.machine_key(llm)
    with_heads.close()


def test_key_depends_on_the_build(llm: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is written beside the libraries, wherever they lie."""
    here, there = known.library.library_folder() / "build-info.json", tmp_path / "build-info.json"
    before = known.machine_key(llm)
    monkeypatch.setattr(known.library, "library_folder", lambda: tmp_path)
    assert known.machine_key(llm) != before
    there.write_bytes(here.read_bytes())
    assert known.machine_key(llm) == before
    there.write_text('{"key": "another"}')
    assert known.machine_key(llm) != before


@pytest.mark.parametrize("calibrate", [True, False])
def test_llama_measures_at_first_use(
    calibrate: bool, models: dict[str, Path], cache: Path, trusting: None
) -> None:
    settings = F32 | {"calibrate": calibrate}
    llm = Llama(models["q8_0"], draft="entmtp", heads=models["hydra"], **settings)
    assert (cache / "costs").exists() == calibrate
    assert llm.draft_stats.n_steps == 0
    bank = llm._decoder.bank  # type: ignore[union-attr]
    assert bank is not None and (bank.need_costs().key == known.machine_key(llm)) == calibrate
    llm.close()


def test_a_tuned_bank_of_this_machine_is_found(models: dict[str, Path], cache: Path) -> None:
    from entmtp.bank.bank import Bank, dumps
    from entmtp.common.atomic import atomic_path

    llm = Llama(models["q8_0"], draft="entmtp", heads=models["hydra"], policy="off", **F32)
    key = known.machine_key(llm)
    generic = Bank.load("generic-hydra")
    path = known.tuned_path(key)
    path.parent.mkdir(parents=True)
    with atomic_path(path) as temporary:
        mine = replace(generic, name="mine", costs=replace(generic.need_costs(), key=key))
        temporary.write_text(dumps(mine))
    llm.close()
    llm = Llama(models["q8_0"], draft="entmtp", heads=models["hydra"], **F32)
    assert llm._decoder.bank.name == "mine"  # type: ignore[union-attr]
    llm.close()


def test_an_unwritable_cache_is_no_reason_to_fail(
    llm: Llama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("ENTMTP_CACHE", str(blocked))
    assert isinstance(at_load.quick(llm, seconds=0.05), Costs)
