"""Heads with a draft vocabulary and the base's projection change the number of passes, never the tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from entmtp import Bank, Llama
from entmtp.bank.tree import PLAIN, Tree
from entmtp.convert import convert
from entmtp.models.assets import assets
from entmtp.models.checkpoint import open_checkpoint
from entmtp.native import kernels
from helpers.checkpoints import write_checkpoint
from helpers.heads_reference import State
from helpers.settings import F32, prompts

ONE_THREAD: dict[str, Any] = {**F32, "n_threads": 1, "n_threads_batch": 1}
BUSHY = Tree.from_paths("bushy", [[0], [1], [2], [0, 0], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0]])


@pytest.fixture(scope="module")
def vocab(load: Callable[..., Llama]) -> list[int]:
    """The 512 most frequent tokens of the prompts."""
    llm = load()
    tokens = [t for text in prompts() for t in llm.tokenize(text.encode(), add_bos=False)]
    return np.argsort(-np.bincount(tokens, minlength=llm.n_vocab()), kind="stable")[:512].tolist()


def answers(llm: Llama, n: int = 40) -> list[list[int]]:
    """Greedy and sampled, with seeds."""
    out = []
    for i, text in enumerate(prompts()[::30]):
        llm.reset()
        llm.set_seed(i)
        tokens: list[int] = []
        for token in llm.generate(llm.tokenize(text.encode(), special=True), temp=0.9 * (i % 2)):
            tokens.append(token)
            if len(tokens) == n or token == llm.token_eos():
                break
        out.append(tokens)
    return out


@pytest.mark.parametrize("base", ["f32", "q8_0"])
@pytest.mark.parametrize("arch", ["medusa", "hydra"])
def test_tokens_are_those_of_plain_decoding(
    arch: str,
    base: str,
    vocab: list[int],
    load: Callable[..., Llama],
    models: dict[str, Path],
    tmp_path: Path,
) -> None:
    plain = load(base, n_threads=1, n_threads_batch=1)
    if base == "q8_0" and kernels.current() == "off":
        pytest.skip(
            "the kernels of this processor are ggml's, which round passes of several tokens differently"
        )
    expected = answers(plain)
    accepted = {}
    for ids, shared in ((vocab, False), (None, True), (vocab, True)):
        heads = tmp_path / "heads.gguf"
        convert(
            assets() / arch, models[base], heads, "q4_k", progress=False, draft_vocab=ids, share_lm_head=shared
        )  # fmt: skip
        settings: dict[str, Any] = {**ONE_THREAD, "trees": Bank("bushy", (PLAIN, BUSHY)), "policy": "static"}
        with closing(Llama(models[base], draft="entmtp", heads=heads, **settings)) as llm:
            assert answers(llm) == expected
            accepted[ids is not None, shared] = llm.draft_stats.n_accepted
            if not shared:  # grown from probabilities
                bank = Bank.load(f"generic-{arch}").pruned(4)
                llm.set_trees(replace(bank, name="grown"), policy="confidence")
                assert answers(llm) == expected
    assert min(accepted.values()) > 5 and accepted[True, False] > 30


def test_a_projection_is_held_once(models: dict[str, Path], tmp_path: Path) -> None:
    """What sharing leaves out of the file is not in memory either. The demo's projection is its embeddings."""
    size = {}
    for shared in (False, True):
        heads = tmp_path / "heads.gguf"
        convert(assets() / "medusa", models["q8_0"], heads, "q8_0", progress=False, share_lm_head=shared)
        with closing(Llama(models["q8_0"], draft="entmtp", heads=heads, **F32)) as llm:
            assert llm._heads is not None
            size[shared] = llm._heads.info.n_bytes
    projection = 4096 * 256 * 34 // 32
    assert size[False] - size[True] == pytest.approx(4 * projection, rel=0.01)


def test_a_head_trained_to_share_is_as_good(models: dict[str, Path], tmp_path: Path) -> None:
    """The same weights, stored in the file or taken from the base, give the same guesses."""
    tensors = {t.name: t for t in GGUFReader(models["f32"]).tensors}
    projection = np.array(tensors["token_embd.weight"].data, np.float32)
    opened = open_checkpoint(str(assets() / "medusa"), progress=False)
    state: State = {
        name: np.concatenate([c.ravel() for c in t.chunks()]).reshape(t.shape).astype(np.float32)
        for name, t in opened.tensors.items()
    }
    state |= {f"{i}.1.weight": projection for i in range(4)}
    folder = write_checkpoint(tmp_path / "tied", state, opened.config)
    drafted = {}
    for shared in (False, True):
        heads = tmp_path / f"heads{shared}.gguf"
        done = convert(folder, models["f32"], heads, "f32", progress=False, share_lm_head=shared)
        assert done.notes == ()
        settings: dict[str, Any] = {**ONE_THREAD, "trees": Bank("bushy", (PLAIN, BUSHY)), "policy": "static"}
        with closing(Llama(models["f32"], draft="entmtp", heads=heads, **settings)) as llm:
            answers(llm, 24)
            drafted[shared] = llm.draft_stats.steps["n_accepted"].tolist()
    assert drafted[True] == drafted[False]
