"""A short run of tests/soak.py: random calls to a drafting model and a plain twin."""

from __future__ import annotations

from soak import soak


def test_random_calls_give_the_plain_twins_tokens() -> None:
    found = soak(6000, seed=4)
    assert found["tokens"] >= 6000 and found["accepted_drafts"] > 0
    assert len(found["calls"]) >= 8  # kinds of calls
    assert found["files"][1] <= found["files"][0]
