"""A short run of tests/soak_serve.py: a server under sixteen clients, some of whom leave, break off or read slowly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from soak_serve import KINDS, Question, pieces, soak

from entmtp import kernels
from helpers.settings import LEEWAY
from helpers.typed import DEMO

SECONDS = 4.0
MEMORY = 400.0 * LEEWAY  # MB that a server of the toy may come to; 230 were measured


@pytest.mark.slow
@pytest.mark.skipif(
    os.name == "nt", reason="connections are reset, and the server is stopped, as POSIX has it"
)
@pytest.mark.skipif(not kernels.available(), reason="bits are equal with the CPU kernels only")
@pytest.mark.parametrize(
    ("parallel", "room"), [(1, ()), (4, ()), (4, ("--kv-tokens", 768))], ids=["one", "four", "room-for-one"]
)
def test_nobody_notices_the_others(models: dict[str, Path], parallel: int, room: tuple[object, ...]) -> None:
    found = soak(
        DEMO, "--heads", models["hydra"], *room, seconds=SECONDS, parallel=parallel, n_questions=12, seed=3
    )  # fmt: skip
    assert found["wrong"] == []
    assert len(found["requests"]) == len(KINDS)
    assert set(found["statuses"]) == {"200", "499"}
    assert found["memory_mb"][1] < MEMORY


def test_what_is_wrong_is_found() -> None:
    question = Question("/v1/completions", {"prompt": "x"}, "one two")
    assert question.wrong("one two", True) is None and question.wrong("one", False) is None
    assert question.wrong("one", True) and question.wrong("two", False)
    chunk = 'data: {"choices": [{"text": "one"}]}'
    assert list(pieces([chunk, "", "data: [DONE]"])) == ["one"]
    for lines, what in (([chunk], "cut"), (['data: {"error": {"message": "full"}}'], "full")):
        with pytest.raises(AssertionError, match=what):
            list(pieces(lines))
