"""Servers that several files ask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from helpers.serving import Server
from helpers.typed import DEMO


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "parallel"])
def chatting(request: pytest.FixtureRequest) -> Iterator[Server]:
    """The toy with a chat template, for one answer at a time and for two."""
    with Server(
        "--model", DEMO, "--ctx", 512, "--threads", 1, "--parallel", request.param, "--chat_format", "chatml"
    ) as running:
        yield running
