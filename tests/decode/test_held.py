"""Weights are held once, however they are loaded: tied embeddings, too, which are looked up where they are packed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_invariance import decode, needs_kernels

from entmtp import Llama
from entmtp.bench.memory import Holder
from entmtp.common.machine import held_memory
from entmtp.models.gguf_expand import expand
from entmtp.models.shapes import SHAPES, write_model
from entmtp.native import kernels
from helpers.models import SPECS
from helpers.models import write_model as write_spec

SETTINGS: dict[str, Any] = {"n_ctx": 128, "n_threads": 2, "n_threads_batch": 2, "verbose": False}
TOKENS = np.random.default_rng(1).integers(0, 256, 90).tolist()

needs_smaps = pytest.mark.skipif("Rss" not in held_memory(), reason="this system does not say what is held")


def logits(model: Path, **more: Any) -> np.ndarray:
    with kernels.using(kernels.current()):
        llm = Llama(model, **SETTINGS | more)
        found = decode(llm, TOKENS, 0)
        llm.close()
    return found


@needs_kernels
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q5_0", "F16", "BF16", "F32", "Q4_K", "Q6_K", "IQ3_S"])
@pytest.mark.parametrize("more", [{"use_mmap": False}, {"use_mlock": True}], ids=["read", "locked"])
def test_tied_embeddings_give_the_same_bits(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    spec = replace(
        SPECS["llama-tied"], n_embd=256, head_dim=64, types=(("token_embd", kind), ("attn_", "Q8_0"))
    )
    model = write_spec(tmp_path / "tied.gguf", spec)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "use_mlock")  # not every system lets tests lock memory
        np.testing.assert_array_equal(logits(model, kernels="auto", **more), logits(model, kernels="auto"))
    # and they are the embeddings: ggml's kernels on the same weights in f32 come near
    exact = logits(expand(model, tmp_path / "exact.gguf"), kernels="off")
    assert np.abs(logits(model, kernels="auto", **more) - exact).max() < 0.1 * exact.std()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """55 of 60 MB are embeddings, which are also the output projection."""
    shape = replace(SHAPES["tiny"], n_embd=256, n_vocab=200_000, tied=True)
    path = write_model(tmp_path_factory.mktemp("tied") / "model.gguf", shape, quant="q8_0")
    yield path
    path.unlink()


@needs_kernels
@needs_smaps
def test_small_matrices_are_held_once_too(tmp_path: Path) -> None:
    """Those of attention in a model of 135M are 69 to 207 KB each, a fifth of its file."""
    shape = replace(SHAPES["tiny"], n_layer=40, n_embd=256, n_ff=512, n_head=4, n_head_kv=2)
    path = write_model(tmp_path / "model.gguf", shape, quant="q8_0")
    with Holder(path, "none", "off") as process:
        base = process.loaded
    with Holder(path, "mapped", "auto") as process:
        held = process.loaded["Rss"] - base["Rss"]
    weights = path.stat().st_size
    assert 0.95 * weights < held < 1.25 * weights, f"{held / 1e6:.1f} MB of {weights / 1e6:.1f}"


@needs_kernels
@needs_smaps
@pytest.mark.parametrize("how", ["mapped", "read", "locked"])
def test_weights_are_held_once(how: str, large: Path) -> None:
    weights = 200_000 * 256 * 34 / 32
    with Holder(large, "none", "off") as process:
        base = process.loaded
    with Holder(large, how, "auto") as process:
        held = process.loaded["Rss"] - base["Rss"]
        assert 0.95 * weights < held < 1.1 * weights, f"{held / 1e6:.1f} MB of {weights / 1e6:.1f}"
        if how == "locked" and process.loaded["Locked"] == 0:
            pytest.skip("this system does not let tests lock memory")
        assert how != "locked" or process.loaded["Locked"] > 0.95 * weights
