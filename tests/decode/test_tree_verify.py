"""A token tree decoded in one batch gives what llama.cpp gives for each of its paths alone.

The reference is always plain decoding by the same library: tokens of one path, no parents.
"""

from __future__ import annotations

import contextlib
import ctypes
import tempfile
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import entmtp
from entmtp.models.gguf_expand import expand
from helpers.llama_tree import (
    F16,
    F32,
    Q8_0,
    Cells,
    Context,
    Model,
    Tree,
    batch_set_parent,
    make_tree,
    memory_tree_commit,
    model_get_tensor,
    plain_path,
    plain_rows,
    set_embeddings_out,
)
from helpers.llama_tree import C as llama
from helpers.models import N_VOCAB, SPECS, model_path

# Differences come from sums in another order: other positions of the cells, other batch sizes (see plain_path).
ATOL = 1e-4  # measured: 9e-6

# Where ggml rounds to f16 on the way, values that differ by 1e-6 round apart now and then, in plain decoding as in a
# tree: an f16 cache, gemma's GELU (a table of f16), flash attention (casts an f32 cache, adds up V in f16).
ATOL_F16 = 5e-2  # measured: 1.6e-2
ATOL_QUANTISED = 0.5  # activations before q8_0 weights, steps of 1/127; measured: 0.11 of logits up to 14


def tolerance(name: str, flash: bool, kv: int = F32, n_nodes: int = 0) -> float:
    """Largest difference between the logits of a tree and those of plain decoding. They have a deviation of 2."""
    if name == "demo-q8_0":
        return ATOL_QUANTISED
    window = name in SPECS and SPECS[name].window > 0
    # ggml's flash attention skips hidden cells: the sums are the same to the bit, for any type (measured: 0), unless
    # cells lie elsewhere (a window's are used again) or its kernel for 64 rows and more adds up tile by tile
    if flash:
        return ATOL if 0 < n_nodes < 64 and not window else ATOL_F16
    return ATOL if kv == F32 and not name.startswith("gemma") else ATOL_F16


DEMO = Path(entmtp.__file__).parent / "assets" / "demo-base-q8_0.gguf"


# trees


def random_tree(rng: np.random.Generator, max_nodes: int, max_depth: int = 8) -> Tree:
    n = int(rng.integers(2, max_nodes + 1))
    return make_tree(rng.integers(0, 1 << 16, n).tolist(), rng.integers(0, N_VOCAB, n).tolist(), max_depth)


@st.composite
def trees(draw: st.DrawFn, max_nodes: int = 64) -> Tree:
    # half of the trees are large: wide and deep at once
    n = draw(st.integers(2, max_nodes) | st.integers(max_nodes // 2, max_nodes))
    choices = draw(st.lists(st.integers(0, 1 << 16), min_size=n, max_size=n))
    tokens = draw(st.lists(st.integers(0, N_VOCAB - 1), min_size=n, max_size=n))
    tree = make_tree(choices, tokens, draw(st.integers(2, 8)), draw(st.booleans()))
    assume(any(p >= 0 for p in tree.parents))  # without a parent it is no tree but a plain batch
    return tree


@st.composite
def prefixes(draw: st.DrawFn, max_len: int = 900) -> list[int]:
    n = draw(st.integers(1, max_len) | st.integers(1, 40))
    return np.random.default_rng(draw(st.integers(0, 1 << 16))).integers(0, N_VOCAB, n).tolist()


# models and contexts

MODELS = ["llama", "qwen3", "gemma3", "olmo2", "olmo2-narrow", "qwen3moe"]

_models: dict[str, Model] = {}


def load(name: str) -> Model:
    if name not in _models:
        path = DEMO if name == "demo-q8_0" else model_path(name) if name in SPECS else None
        with tempfile.TemporaryDirectory() as folder:
            _models[name] = Model(path or expand(DEMO, Path(folder) / "f32.gguf"))
    return _models[name]


@contextlib.contextmanager
def contexts(name: str, n: int = 2, **kwargs: int | bool) -> Iterator[list[Context]]:
    made = [Context(load(name), **kwargs) for _ in range(n)]
    try:
        yield made
    finally:
        for c in made:
            c.close()


@pytest.fixture
def two() -> Iterator[list[Context]]:
    """Two contexts of the plain model with the same prompt decoded: one for trees, one for the reference."""
    with contexts("llama") as made:
        for c in made:
            c.decode(PROMPT)
        yield made


PROMPT = np.random.default_rng(5).integers(0, N_VOCAB, 50).tolist()
START = len(PROMPT)
TREE = Tree([-1, 0, 0, 0, 1, 1, 2, 4], [10, 11, 12, 13, 14, 15, 16, 17])
LOOK = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def assert_same_cells(a: list[Cells], b: list[Cells], atol: float = ATOL) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert x.pos.tolist() == y.pos.tolist()
        for kx, ky in zip(x.k + x.v, y.k + y.v, strict=True):
            np.testing.assert_allclose(kx, ky, atol=atol, rtol=0)


# logits and hidden states


def check_every_node(name: str, flash: bool, kv: int, n_examples: int, max_prefix: int = 900) -> None:
    worst = 0.0
    with contexts(name, flash=flash, kv=kv) as (tree_ctx, plain_ctx):

        @settings(LOOK, max_examples=n_examples)
        @given(prefix=prefixes(max_prefix), tree=trees())
        def check(prefix: list[int], tree: Tree) -> None:
            nonlocal worst
            for c in (tree_ctx, plain_ctx):
                c.clear()
                c.decode(prefix, outputs=[len(prefix) - 1])
            got = tree_ctx.decode(tree.tokens, tree.parents)
            want = plain_rows(plain_ctx, tree)
            worst = max(worst, np.abs(got - want).max())
            np.testing.assert_allclose(got, want, atol=tolerance(name, flash, kv, len(tree)), rtol=0)

        check()
    print(f"{name}, flash={flash}, kv={kv}: largest difference {worst:.1e}")  # pytest -s shows it


@pytest.mark.parametrize("flash", [False, True], ids=["eager", "flash"])
@pytest.mark.parametrize("name", MODELS)
def test_every_node_equals_its_path(name: str, flash: bool) -> None:
    check_every_node(name, flash, F32, n_examples=10)


# no experts here: a rounding can send a token to another expert, with no bound on the difference
@pytest.mark.parametrize("name", ["llama", "qwen3", "olmo2"])
@pytest.mark.parametrize(
    ("kv", "flash"), [(F16, False), (F16, True), (Q8_0, True)], ids=["f16", "f16-flash", "q8-flash"]
)
def test_every_node_equals_its_path_small_kv(name: str, kv: int, flash: bool) -> None:
    """llama.cpp takes a quantised V with flash attention only."""
    check_every_node(name, flash, kv, n_examples=10)


@pytest.mark.skipif(not DEMO.exists(), reason="the demo model is not in this checkout")
@pytest.mark.parametrize("flash", [False, True], ids=["eager", "flash"])
@pytest.mark.parametrize("name", ["demo-f32", "demo-q8_0"])
def test_every_node_equals_its_path_demo(name: str, flash: bool) -> None:
    check_every_node(name, flash, F32, n_examples=3, max_prefix=400)


def test_paths_alone(two: list[Context]) -> None:
    """The reference without its trick: each path is decoded alone, then token by token."""
    tree_ctx, plain_ctx = two
    got = tree_ctx.decode(TREE.tokens, TREE.parents)
    for path in TREE.leaf_paths():
        tokens = [TREE.tokens[i] for i in path]
        np.testing.assert_allclose(got[path], plain_ctx.decode(tokens), atol=ATOL, rtol=0)
        plain_ctx.rm(START)
        np.testing.assert_allclose(
            got[path], np.concatenate([plain_ctx.decode([t]) for t in tokens]), atol=ATOL, rtol=0
        )
        plain_ctx.rm(START)


@pytest.mark.parametrize("unified", [True, False])
def test_tree_of_one_sequence_among_others(unified: bool) -> None:
    with contexts("llama", n_seq=3, unified=unified, n_ctx=3 * 256) as (tree_ctx, plain_ctx):
        for c in (tree_ctx, plain_ctx):
            c.decode(PROMPT[:30], seq=0)
            c.decode(PROMPT[:20], seq=1)
        others = tree_ctx.state(0)
        got = tree_ctx.decode(TREE.tokens, TREE.parents, seq=1)
        for path in TREE.leaf_paths():
            want = plain_ctx.decode([TREE.tokens[i] for i in path], seq=1)
            np.testing.assert_allclose(got[path], want, atol=ATOL, rtol=0)
            plain_ctx.rm(20, seq=1)
        assert not tree_ctx.commit([0, 1], seq=0)
        assert tree_ctx.commit([0, 1], seq=1)
        plain_ctx.decode([10, 11], seq=1)
        assert tree_ctx.state(0) == others
        assert_same_cells(tree_ctx.cells(1), plain_ctx.cells(1))


def head_rows(name: str) -> np.ndarray:
    """output.weight as the file holds it: [n_vocab, n_embd]."""
    tensors = {t.name: t for t in gguf.GGUFReader(model_path(name)).tensors}
    return np.array(tensors["output.weight"].data)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "qwen3moe", "mamba"])
def test_hidden_states_of_output_rows(name: str) -> None:
    head = head_rows(name)
    with contexts(name) as (a, b):
        for c in (a, b):
            set_embeddings_out(c.ptr, True)
            logits = c.decode(PROMPT, outputs=[20, len(PROMPT) - 1])
            # were every token an output, the first two rows would be those of tokens 0 and 1
            for row, i in enumerate([20, len(PROMPT) - 1]):
                np.testing.assert_allclose(head @ c.hidden(i), logits[row], atol=ATOL, rtol=0)
        if name != "mamba":
            logits = a.decode(TREE.tokens, TREE.parents)
            hidden = np.stack([a.hidden(i) for i in range(len(TREE))])
            np.testing.assert_allclose(
                hidden, plain_rows(b, TREE, hidden=True), atol=tolerance(name, False), rtol=0
            )
            np.testing.assert_allclose(hidden @ head.T, logits, atol=ATOL, rtol=0)


def test_outputs_of_some_nodes(two: list[Context]) -> None:
    tree_ctx, plain_ctx = two
    some = [1, 4, 7]
    got = tree_ctx.decode(TREE.tokens, TREE.parents, outputs=some)
    np.testing.assert_allclose(got, plain_rows(plain_ctx, TREE)[some], atol=ATOL, rtol=0)


# commit


@pytest.mark.parametrize("flash", [False, True], ids=["eager", "flash"])
@pytest.mark.parametrize("name", MODELS)
def test_decoding_continues_after_commit(name: str, flash: bool) -> None:
    """The reference decodes the committed paths only; later plain and tree steps give the same."""
    rng = np.random.default_rng(7)
    atol = tolerance(name, flash)
    with contexts(name, flash=flash) as (tree_ctx, plain_ctx):
        for c in (tree_ctx, plain_ctx):
            c.decode(PROMPT)
        for _ in range(8):
            tree = random_tree(rng, 40)
            got = tree_ctx.decode(tree.tokens, tree.parents)
            np.testing.assert_allclose(got, plain_rows(plain_ctx, tree), atol=atol, rtol=0)
            path = tree.path(int(rng.integers(len(tree))))
            assert tree_ctx.commit(path)
            plain_path(plain_ctx, tree, path)
            for n in (1, 3):
                tokens = rng.integers(0, N_VOCAB, n).tolist()
                np.testing.assert_allclose(
                    tree_ctx.decode(tokens), plain_ctx.decode(tokens), atol=atol, rtol=0
                )


@pytest.mark.parametrize("flash", [False, True], ids=["eager", "flash"])
@pytest.mark.parametrize(("name", "swa_full"), [("llama", False), ("olmo2", False), ("olmo2", True)])
def test_many_rounds_leave_the_cells_of_plain_decoding(name: str, swa_full: bool, flash: bool) -> None:
    """1,000 rounds of tree, commit (all of a path, some or nothing) and now and then a rollback."""
    rng = np.random.default_rng(11)
    n_ctx, max_nodes, window = 512, 16, SPECS[name].window
    atol = tolerance(name, flash)
    n_rounds = n_tokens = n_rollbacks = 0
    with contexts(name, n_ctx=n_ctx, n_ubatch=32, flash=flash, swa_full=swa_full) as (tree_ctx, plain_ctx):
        for c in (tree_ctx, plain_ctx):
            c.decode(PROMPT)
        while n_rounds < 1000:
            n_rounds += 1
            tree = random_tree(rng, max_nodes, max_depth=6)
            tree_ctx.decode(tree.tokens, tree.parents, outputs=[0])
            path = tree.path(int(rng.integers(len(tree))))
            path = path[: int(rng.integers(len(path) + 1))]
            assert tree_ctx.commit(path)
            if path:
                plain_path(plain_ctx, tree, path)
                n_tokens += len(path)

            end = plain_ctx.pos_max() + 1
            if end > n_ctx - max_nodes or rng.random() < 0.05:
                # a sliding window that was overwritten cannot be rolled back: llama.cpp's rule, in both caches
                first = max(c.pos_min() for c in (tree_ctx, plain_ctx))
                keep = (
                    int(rng.integers(max(1, first + window if window else 1), end))
                    if first + window < end
                    else 0
                )
                for c in (tree_ctx, plain_ctx):
                    c.rm(keep)
                    if keep == 0:
                        c.decode(PROMPT, outputs=[0])
                n_rollbacks += 1

            assert tree_ctx.pos_max() == plain_ctx.pos_max()
            if not window:  # how far a window's cells outlive it depends on which cells were free
                assert tree_ctx.pos_min() == plain_ctx.pos_min() == 0
            if n_rounds % 5 == 0 or n_rounds > 950:
                assert_same_cells(tree_ctx.cells(), plain_ctx.cells(), atol)

        # no cell was lost on the way: the cache still takes n_ctx tokens, and not one more
        rest = n_ctx - tree_ctx.pos_max() - 1
        assert tree_ctx.process([0] * rest, [n_ctx - rest + i for i in range(rest)]) == 0
        assert tree_ctx.process([1], [n_ctx]) == 1
    assert n_tokens > 1000 and n_rollbacks > 20


# nothing changes without a tree


@pytest.mark.parametrize("flash", [False, True], ids=["eager", "flash"])
@pytest.mark.parametrize("name", ["llama", "olmo2-narrow"])
def test_chain_with_parents_is_bit_identical(name: str, flash: bool) -> None:
    chain = list(range(30, 38))
    with contexts(name, flash=flash) as (a, b):
        for c in (a, b):
            c.decode(PROMPT)
        got = a.decode(chain, [i - 1 for i in range(8)])
        assert np.array_equal(got, b.decode(chain))
        assert a.state() == b.state()


def test_plain_batches_after_a_tree_are_bit_identical(two: list[Context]) -> None:
    a, b = two
    a.decode(TREE.tokens, TREE.parents)
    assert a.commit([])
    assert a.state() == b.state()
    for tokens in ([3], [4, 5, 6], [7] * 70):
        assert np.array_equal(a.decode(tokens), b.decode(tokens))
    assert a.state() == b.state()


# refusals


def assert_still_right(ctx: Context, other: Context, state: bytes) -> None:
    """A refused call changed nothing, and the next good one gives what it should."""
    assert ctx.state() == state
    got = ctx.decode(TREE.tokens, TREE.parents)
    np.testing.assert_allclose(got, plain_rows(other, TREE), atol=ATOL, rtol=0)


@pytest.mark.parametrize(
    ("idx", "parent"), [(0, 0), (1, 1), (1, 2), (1, -1), (0, -1), (-1, 0), (3, 0), (3, 2), (1, 99)]
)
def test_set_parent_refuses(two: list[Context], idx: int, parent: int) -> None:
    ctx, plain = two
    llama.llama_batch_ext_clear(ctx.batch)
    for i in range(3):
        llama.llama_batch_ext_add_token(ctx.batch, 0, i)
        llama.llama_batch_ext_set_pos(ctx.batch, i, (ctypes.c_int32 * 1)(len(PROMPT) + i))
        llama.llama_batch_ext_set_output_logits(ctx.batch, i, True)
    assert not batch_set_parent(ctx.batch, idx, parent)
    # the batch is as before: plain
    assert llama.llama_process(ctx.ptr, llama.LLAMA_PROCESS_TYPE_DECODE, ctx.batch) == 0
    assert np.array_equal(ctx.logits(3), plain.decode([0, 1, 2]))


@pytest.mark.parametrize(
    ("pos", "parents"),
    [
        ([START, START], [-1, 0]),  # not after the parent
        ([START, START + 2], [-1, 0]),
        ([START, START + 1, START + 2], [-1, 0, 0]),  # consecutive, yet not after the parent
        ([START - 1, START], [-1, 0]),  # the cache holds this position
        ([START + 1, START + 2], [-1, 0]),  # a gap after the cache
        ([START, START + 1, START + 2, START + 1], [-1, 0, 1, 0]),  # positions decrease
    ],
)
def test_wrong_positions_are_refused(two: list[Context], pos: list[int], parents: list[int]) -> None:
    ctx, plain = two
    state = ctx.state()
    assert ctx.process([5] * len(pos), pos, parents) == -1
    assert_still_right(ctx, plain, state)


def test_tree_larger_than_the_ubatch_is_refused(two: list[Context]) -> None:
    ctx, plain = two
    state = ctx.state()
    n = 65
    assert ctx.process([5] * n, [START] + [START + 1] * (n - 1), [-1] + [0] * (n - 1)) == -1
    assert_still_right(ctx, plain, state)


def test_non_causal_context_is_refused(two: list[Context]) -> None:
    ctx, plain = two
    state = ctx.state()
    llama.llama_set_causal_attn(ctx.ptr, False)
    assert ctx.process([5, 6], [START, START + 1], [-1, 0]) == -1
    llama.llama_set_causal_attn(ctx.ptr, True)
    assert_still_right(ctx, plain, state)


def test_tree_that_finds_no_room(two: list[Context]) -> None:
    """As for any batch: llama_process returns 1, and the cache is as before."""
    with contexts("llama", n_ctx=256) as (ctx, plain):
        for c in (ctx, plain):
            c.decode(PROMPT[:25] * 10)
        state = ctx.state()
        assert ctx.process([5] * 7, [250] + [251] * 6, [-1] + [0] * 6) == 1
        assert ctx.state() == state
        got = ctx.decode([5] * 6, [-1] + [0] * 5)
        np.testing.assert_allclose(got[:2], plain.decode([5, 5]), atol=ATOL, rtol=0)


def commit(ctx: Context, path: list[int], n: int | None = None, seq: int = 0) -> bool:
    return memory_tree_commit(
        ctx.mem, seq, (ctypes.c_int32 * len(path))(*path), len(path) if n is None else n
    )


def test_commit_refuses_what_is_no_path(two: list[Context]) -> None:
    ctx, plain = two
    assert not commit(ctx, [])  # no tree yet
    ctx.decode(TREE.tokens, TREE.parents)
    state = ctx.state()
    for path in ([1], [0, 4], [0, 0], [0, 1, 2], [1, 4], [-1], [0, -1], [8], [0, 1, 8], [0, 1, 4, 7, 7]):
        assert not commit(ctx, path), path
    assert not commit(ctx, [0], n=-1)
    for seq in (-1, 1, 1 << 20):
        assert not commit(ctx, [0], seq=seq), seq
    assert ctx.state() == state
    # a refused batch is no decoded batch: the tree before it can still be committed
    assert ctx.process([5, 6], [START, START], [-1, 0]) == -1
    assert commit(ctx, [0, 1, 4])
    plain.decode([10, 11, 14])
    assert_same_cells(ctx.cells(), plain.cells())

    state = ctx.state()
    assert not commit(ctx, [0])  # twice
    assert not commit(ctx, [])
    assert ctx.state() == state
    ctx.decode(TREE.tokens, TREE.parents)
    ctx.rm(START + 3)
    ctx.decode([1])
    state = ctx.state()
    assert not commit(ctx, [0])  # after a plain batch
    assert not commit(ctx, [])
    assert ctx.state() == state


def test_recurrent_memory_refuses_a_tree() -> None:
    with contexts("mamba") as (ctx, plain):
        for c in (ctx, plain):
            c.decode(PROMPT)
        llama.llama_batch_ext_clear(ctx.batch)
        for i in range(2):
            llama.llama_batch_ext_add_token(ctx.batch, 0, i)
            llama.llama_batch_ext_set_pos(ctx.batch, i, (ctypes.c_int32 * 1)(START + i))
        assert not batch_set_parent(ctx.batch, 1, 0)
        assert not commit(ctx, [0])
        assert not commit(ctx, [])
        assert np.array_equal(ctx.decode([1, 2]), plain.decode([1, 2]))


def test_model_tensor() -> None:
    model = load("llama")
    assert model_get_tensor(model.ptr, b"token_embd.weight")
    assert not model_get_tensor(model.ptr, b"token_embd")
