"""Token trees of several sequences in one batch: each is decoded and kept as it would be alone."""

from __future__ import annotations

import numpy as np
import pytest
from test_tree_verify import ATOL, PROMPT, START, assert_still_right, contexts, random_tree, tolerance

from helpers.llama_tree import Tree
from helpers.models import N_VOCAB


@pytest.mark.parametrize(
    ("unified", "seq", "parents"),
    [
        (True, [0, 1], [-1, 0]),  # a child of another sequence
        (True, [0, 0, 1], [-1, 0, 1]),
        (False, [0, 0, 1], [-1, 0, -1]),  # caches of their own take equal parts of a batch
        (False, [1, 0, 0], [-1, -1, 1]),
    ],
)
def test_trees_that_cannot_share_a_batch_are_refused(
    unified: bool, seq: list[int], parents: list[int]
) -> None:
    with contexts("llama", n_seq=2, unified=unified, n_ctx=512) as (ctx, plain):
        for c in (ctx, plain):
            c.decode(PROMPT, seq=0)
            c.decode(PROMPT, seq=1)
        state = ctx.state()
        pos = [START]
        for p in parents[1:]:
            pos.append(START if p < 0 else pos[p] + 1)
        assert ctx.process([5] * len(seq), pos, parents, seq=seq) == -1
        assert_still_right(ctx, plain, state)


@pytest.mark.parametrize("flash", [False, True], ids=["eager", "flash"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_trees_of_several_sequences_share_a_batch(name: str, flash: bool) -> None:
    """Each sequence reads what it would read alone, and keeps what it would keep; a chain needs no commit."""
    rng = np.random.default_rng(11)
    n_seq = 3
    with (
        contexts(name, 1, n_seq=n_seq, flash=flash, n_ctx=768) as (ctx,),
        contexts(name, n_seq, flash=flash) as alone,
    ):
        for s, single in enumerate(alone):
            prompt = rng.integers(0, N_VOCAB, 20 + 7 * s).tolist()
            single.decode(prompt)
            ctx.decode(prompt, seq=s)
        for _ in range(8):
            trees = [random_tree(rng, 12) for _ in range(n_seq)]
            trees[1] = Tree([-1, 0, 1], rng.integers(0, N_VOCAB, 3).tolist())
            # the tokens of all trees, in turn
            nodes = sorted(
                ((s, i) for s, tree in enumerate(trees) for i in range(len(tree))), key=lambda n: (n[1], n[0])
            )
            index = {node: at for at, node in enumerate(nodes)}
            starts = [ctx.pos_max(s) + 1 for s in range(n_seq)]
            status = ctx.process(
                [trees[s].tokens[i] for s, i in nodes],
                [starts[s] + len(trees[s].path(i)) - 1 for s, i in nodes],
                [index[s, p] if (p := trees[s].parents[i]) >= 0 else -1 for s, i in nodes],
                seq=[s for s, _ in nodes],
            )
            assert status == 0
            rows = ctx.logits(len(nodes))
            for s in rng.permutation(n_seq).tolist():
                tree, single = trees[s], alone[s]
                want = single.decode(tree.tokens, tree.parents)
                got = rows[[index[s, i] for i in range(len(tree))]]
                np.testing.assert_allclose(got, want, atol=max(ATOL, tolerance(name, flash)), rtol=0)
                paths = tree.leaf_paths()
                path = paths[rng.integers(len(paths))] if s != 1 else [0, 1, 2]
                path = path[: rng.integers(1, len(path) + 1)] if s != 1 else path
                assert single.commit(path)
                assert s == 1 or ctx.commit([index[s, i] for i in path], seq=s)
                assert s == 1 or not ctx.commit([index[s, i] for i in path], seq=s)  # once
                assert ctx.pos_max(s) == single.pos_max()
                assert len(ctx.cells(s)[0].pos) == len(single.cells()[0].pos)
            assert not ctx.commit([0], seq=n_seq - 1)
