"""A short run of tests/soak_settings.py: models and settings drawn at random, alone and in company."""

from __future__ import annotations

import pytest
from soak_settings import soak

from entmtp import kernels


@pytest.mark.slow
@pytest.mark.skipif(not kernels.available(), reason="bits are equal with the CPU kernels only")
def test_random_settings_give_plain_texts() -> None:
    found = soak(24, 120.0, seed=4000)
    assert found["wrong"] == []
    assert found["alone"] > 5 and found["in company"] > 3 and found["accepted drafts"] > 100
    assert all(len(why) > 20 and "\n" not in why for why in found["refused"])  # a sentence
