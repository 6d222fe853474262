"""Short runs of tests/soak.py: random calls to a drafting model and a plain twin."""

from __future__ import annotations

import pytest
from soak import soak


@pytest.mark.filterwarnings("ignore:the memory of this model cannot hold a token tree")
@pytest.mark.parametrize(
    ("name", "n_tokens"), [("demo", 6000), ("window", 6000), ("lfm2", 3000), ("qwen35", 2500)]
)
def test_random_calls_give_the_plain_twins_tokens(name: str, n_tokens: int) -> None:
    found = soak(n_tokens, seed=4, name=name)
    assert found["tokens"] >= n_tokens and found["accepted_drafts"] > 0
    assert len(found["calls"]) >= 8  # kinds of calls
    assert found["files"][1] <= found["files"][0]
