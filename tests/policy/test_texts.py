"""The texts of rank traces: some of them, several as one, in a file, and parts that do not fit together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from entmtp.bank.texts import N_BEST, Texts, join
from entmtp.bank.traces import Traces

N_PROMPT, N_TOKENS = (2, 1, 3), (3, 2, 1)  # of three texts: the tokens of text i are 100 i, 100 i + 1, ...
Array = npt.NDArray[Any]
LENGTHS = np.array(N_TOKENS, np.int32)


def make() -> Texts:
    n, rng = sum(N_TOKENS), np.random.default_rng(0)
    tokens = [
        100 * i + j for i, (p, t) in enumerate(zip(N_PROMPT, N_TOKENS, strict=True)) for j in range(p + t)
    ]
    return Texts(
        n_prompt=np.array(N_PROMPT, np.int32), temp=np.array([0.0, 0.5, 1.0], np.float32),
        tokens=np.array(tokens, np.int32), best=rng.integers(-1, 1000, (n, N_BEST)).astype(np.int32),
        log_p=-rng.random((n, N_BEST), np.float32), states=rng.normal(size=(n, 4)).astype(np.float32),
    )  # fmt: skip


def same(a: Texts, b: Texts) -> bool:
    return all(
        np.array_equal(x, vars(b)[name]) and x.dtype == vars(b)[name].dtype for name, x in vars(a).items()
    )


def test_some_of_them() -> None:
    """Tokens of a text are its prompt's and what came after; the other rows are of what came."""
    texts = make()
    some = texts.pick(LENGTHS, [2, 0])
    assert some.n_prompt.tolist() == [3, 2] and some.temp.tolist() == [1.0, 0.0]
    assert some.tokens.tolist() == [200, 201, 202, 203, 0, 1, 2, 3, 4]
    for name in ("best", "log_p", "states"):
        assert np.array_equal(vars(some)[name], vars(texts)[name][[5, 0, 1, 2]])
    assert some.fit(LENGTHS[[2, 0]])
    assert len(texts.pick(LENGTHS, []).tokens) == 0


def test_several_as_one() -> None:
    texts = make()
    assert same(join([texts.pick(LENGTHS, [0]), texts.pick(LENGTHS, [1, 2])]), texts)


def traces_of(texts: Texts) -> Traces:
    n = sum(N_TOKENS)
    return Traces(
        LENGTHS, ("a", "a", "b"), (0, 1, 0), np.zeros((n, 3), np.float32), np.zeros((n, 1), np.int32),
        np.zeros((n, 1, 8), np.float32), True, {}, texts,
    )  # fmt: skip


def test_a_file_holds_them(tmp_path: Path) -> None:
    traces = traces_of(make())
    traces.save(tmp_path / "t.npz")
    again = Traces.load(tmp_path / "t.npz").texts
    assert again is not None and same(again, make())
    picked = traces.pick([1]).texts
    assert picked is not None and picked.tokens.tolist() == [100, 101, 102]
    replace(traces, texts=None).save(tmp_path / "t.npz")
    assert Traces.load(tmp_path / "t.npz").texts is None
    with pytest.raises(ValueError, match="damaged"):
        replace(traces, texts=replace(make(), n_prompt=make().n_prompt + 1)).check("x")


STRANGE: dict[str, tuple[str, Callable[[Array], Array], str]] = {
    "complex states": ("states", lambda x: x.astype(np.complex64), "text_states holds values of type complex64"),
    "broken tokens": ("tokens", lambda x: x + 0.5, "text_tokens holds values of type float64"),
    "words": ("n_prompt", lambda x: x.astype("U4"), "text_n_prompt holds values of type <U4"),
    "tokens that 32 bits would make others": ("tokens", lambda x: x.astype(np.int64) + (1 << 32), "any vocabulary"),
    "the largest token": ("best", lambda x: np.full_like(x, 2**31 - 1), "any vocabulary"),
    "less than no token": ("best", lambda x: np.full_like(x, -2), "any vocabulary"),
    "the smallest prompt": ("n_prompt", lambda x: np.full(3, -(2**63)), "any vocabulary"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE, ids=str)
def test_a_file_of_something_else(case: str, tmp_path: Path) -> None:
    name, change, why = STRANGE[case]
    traces_of(make()).save(path := tmp_path / "t.npz")
    good = dict(np.load(path))
    np.savez(path, **good | {f"text_{name}": change(good[f"text_{name}"])})
    with pytest.raises(ValueError, match=rf"t\.npz holds no rank traces: .*{why}"):
        Traces.load(path)


BROKEN: dict[str, Callable[[Texts], dict[str, object]]] = {
    "a prompt too few": lambda t: {"n_prompt": t.n_prompt[1:]},
    "a temperature too few": lambda t: {"temp": t.temp[1:]},
    "an empty prompt": lambda t: {"n_prompt": np.array([2, 0, 4], np.int32)},
    "a token too few": lambda t: {"tokens": t.tokens[1:]},
    "tokens in a table": lambda t: {"tokens": t.tokens[:, None]},
    "a token below zero": lambda t: {"tokens": t.tokens - 1},
    "a probable token below -1": lambda t: {"best": np.full_like(t.best, -2)},
    "a row of tokens too few": lambda t: {"best": t.best[1:]},
    "a column of tokens too few": lambda t: {"best": t.best[:, 1:]},
    "a row of probabilities too few": lambda t: {"log_p": t.log_p[1:]},
    "a state too few": lambda t: {"states": t.states[1:]},
    "states without a width": lambda t: {"states": t.states[:, 0]},
    "a temperature that is no number": lambda t: {"temp": t.temp * np.nan},
    "a probability that is no number": lambda t: {"log_p": t.log_p * np.nan},
    "a state that is none": lambda t: {"states": t.states * np.inf},
}


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_parts_that_do_not_fit_together(case: str) -> None:
    texts = make()
    assert texts.fit(LENGTHS)
    assert not replace(texts, **BROKEN[case](texts)).fit(LENGTHS)
