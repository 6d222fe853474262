"""A tiny model to train heads for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from entmtp.train.base import Base
from helpers.models import model_path
from helpers.training import SEQ_LEN


@pytest.fixture(scope="module")
def tiny() -> Path:
    """A llama of 64 dimensions and 320 tokens with random weights."""
    return model_path("llama")


@pytest.fixture(scope="module")
def base(tiny: Path) -> Iterator[Base]:
    base = Base(tiny, SEQ_LEN, n_threads=1)
    yield base
    base.close()
