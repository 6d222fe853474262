"""Every type of weights that ggml knows: the same bits in a pass of any size, and the same text with a large tree."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from test_invariance import assert_passes_leave_no_trace, decode, needs_kernels

from entmtp import Llama
from entmtp.models.gguf_expand import expand
from entmtp.native import kernels
from helpers.settings import prompts
from helpers.typed import TYPES, write_typed

pytestmark = needs_kernels

SETTINGS: dict[str, Any] = {
    "n_ctx": 512,
    "n_threads": 1,
    "n_threads_batch": 1,
    "verbose": False,
    "kernels": "auto",
}


@pytest.fixture(scope="module", params=TYPES)
def typed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path]]:
    path = tmp_path_factory.mktemp("typed") / f"{request.param}.gguf"
    yield request.param, write_typed(path, request.param)
    path.unlink()


def test_every_type_is_in_the_list() -> None:
    """A type that a newer gguf brings must be tried, too."""
    no_weights = {
        "I8",
        "I16",
        "I32",
        "I64",
        "F64",
        "Q8_1",
        "Q8_K",
    }  # activations, and what is never multiplied
    assert {t.name for t in GGMLQuantizationType} - no_weights == set(TYPES)


def test_a_pass_of_any_size_gives_the_same_bits(typed: tuple[str, Path]) -> None:
    name, path = typed
    llm = Llama(path, **SETTINGS)
    text = llm.tokenize("".join(prompts()[:3]).encode(), special=True)
    assert_passes_leave_no_trace(llm, text[:90], text[90:154], name)
    llm.close()


def test_the_63_node_tree_gives_the_text_of_plain_decoding(
    typed: tuple[str, Path], models: dict[str, Path]
) -> None:
    name, path = typed
    plain = Llama(path, **SETTINGS)
    draft = Llama(
        path,
        draft="entmtp",
        heads=models["hydra"],
        trees="mc_sim_7b_63",
        policy="static",
        calibrate=False,
        **SETTINGS,
    )
    for i, text in enumerate(prompts()[::90]):
        prompt = plain.tokenize(text.encode(), special=True)[:200]
        for temp in (0.0, 0.8):
            found = []
            for llm in (plain, draft):
                llm.set_seed(i)
                found.append(list(islice(llm.generate(prompt, temp=temp), 24)))
            assert found[0] == found[1], f"{name}, prompt {i}, temperature {temp:g}"
    assert draft.draft_stats.n_drafted > 500
    plain.close()
    draft.close()


def test_as_near_to_exact_weights_as_ggml(typed: tuple[str, Path]) -> None:
    """Mean KL divergence of the next token's distribution from that of the same weights in f32."""
    name, path = typed
    exact = path.with_name(f"{name}-f32.gguf")
    try:
        expand(path, exact)
    except NotImplementedError:
        pytest.skip(
            f"the gguf package cannot dequantise {name}, so there is nothing independent to compare with"
        )
    logits = {}
    for label, file, kind in (("exact", exact, "auto"), ("ours", path, "auto"), ("ggml", path, "off")):
        with kernels.using(kernels.current()):
            llm = Llama(file, **SETTINGS | {"kernels": kind})
            text = llm.tokenize("".join(prompts()[:3]).encode(), special=True)[:200]
            logits[label] = np.concatenate([decode(llm, [t], i) for i, t in enumerate(text)]).astype(
                np.float64
            )
            llm.close()
    exact.unlink()

    def log_p(x: np.ndarray) -> np.ndarray:
        x = x - x.max(axis=1, keepdims=True)
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    p = log_p(logits["exact"])
    kl = {k: float((np.exp(p) * (p - log_p(logits[k]))).sum(axis=1).mean()) for k in ("ours", "ggml")}
    assert kl["ours"] <= 1.2 * kl["ggml"] + 1e-5, kl
