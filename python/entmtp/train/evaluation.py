"""How good heads are: tokens per step on held-out rollouts of the base model, by replay.

Under lossless acceptance a tree accepts the longest prefix of the real tokens whose ranks it holds, so the ranks that
the heads give to what the base model really wrote say what any tree would have accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..bank.traces import MAX_RANK
from ..measure import search
from .heads import Shape, State, before_projection, prefix_layer
from .loss import loss_of, piece_rows
from .states import States, Texts

TREE_NODES = 16


@dataclass(frozen=True)
class Acceptance:
    """Tokens per step: of a chain of the heads' best guesses, and of the best tree of TREE_NODES nodes."""

    chain: float
    tree: float
    by_depth: tuple[float, ...]  # share of steps in which the chain was right at least so deep
    losses: tuple[float, ...] = ()  # of each head, nats per token

    def __str__(self) -> str:
        return f"{self.chain:.3f} in a chain, {self.tree:.3f} in a tree of {TREE_NODES}"


class Teacher:
    """What all heads share: embeddings, projection, draft vocabulary.

    Args:
        embedding: token embeddings of the base model, [n_vocab, n_embd].
        output: its projection, the rows that heads can propose, [n_draft, n_embd].
        draft_vocab: the base tokens of these rows, None for all in order.
    """

    def __init__(
        self, embedding: torch.Tensor, output: torch.Tensor, draft_vocab: npt.NDArray[np.int64] | None
    ):
        self.embedding, self.output = embedding, output
        self.draft_index: torch.Tensor | None = None  # base token: row of `output`, -1 for none
        if draft_vocab is not None:
            self.draft_index = torch.full((len(embedding),), -1)
            self.draft_index[torch.from_numpy(draft_vocab)] = torch.arange(len(draft_vocab))

    def projection(self, shape: Shape, state: State, head: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weight and bias of a head's projection to the vocabulary."""
        if shape.lm_head == "base":
            return self.output, None
        return state[shape.weight(head)], state.get(f"{shape.output(head)}.bias")

    def rows(self, ids: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens as rows of `output`, -1 those that heads cannot propose, whose probability is 0 then.

        Args:
            ids: base tokens, [n, k].
            p: their probabilities and the rest's, [n, k + 1].
        """
        if self.draft_index is None:
            return ids, p
        rows = self.draft_index[ids]
        known = torch.cat([rows >= 0, torch.ones_like(p[:, -1:], dtype=torch.bool)], 1)
        return rows, p * known


@torch.no_grad()
def judge(
    shape: Shape,
    state: State,
    teacher: Teacher,
    hidden: torch.Tensor,
    tokens: torch.Tensor,
    given: int,
    ids: torch.Tensor | None = None,
    p: torch.Tensor | None = None,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Ranks that the heads give to a text's real tokens, as `Traces.ranks` has them: [n, n_heads]; and with the base
    model's distributions the sum of each head's loss, nats [n_heads].

    Args:
        hidden: of the whole text, [n_tokens, n_embd].
        given: tokens at the beginning that the base model did not write; n = n_tokens - given.
        ids, p: of the whole text, [n_tokens, k] and [n_tokens, k + 1].
    """
    n = len(tokens) - given
    if shape.prefix:
        hidden = prefix_layer(shape, state, hidden[None])[0]
    ranks = np.full((n, shape.n_heads), -1, dtype=np.int32)
    losses = np.zeros(shape.n_heads)
    for i in range(min(shape.n_heads, n - 1)):
        roots = torch.arange(given, len(tokens) - 1 - i)  # root, then i + 1 tokens
        x = hidden[roots - 1]
        if shape.grounded:
            x = torch.cat([x, *(teacher.embedding[tokens[roots + j]] for j in range(i + 1))], 1)
        x = before_projection(shape, state, i, x)
        weight, bias = teacher.projection(shape, state, i)
        target = tokens[roots + i + 1]
        if teacher.draft_index is not None:
            target = teacher.draft_index[target]
        for rows in torch.arange(len(x)).split(piece_rows(len(weight))):
            z = x[rows] @ weight.T
            if bias is not None:
                z += bias
            t = target[rows]
            own = z.gather(1, t.clamp_min(0)[:, None])
            rank = (z > own).sum(1).clamp_max(MAX_RANK)
            ranks[rows.numpy(), i] = torch.where(t < 0, MAX_RANK, rank).numpy()
            if ids is not None and p is not None:
                at = roots[rows] + i  # whose next token this head guesses
                losses[i] += float(loss_of(z, *teacher.rows(ids[at], p[at])).sum())
    return ranks, losses


@dataclass(frozen=True)
class HeldOut:
    """What heads say of the held-out texts that are long enough.

    Attributes:
        ranks: of each text, [n, n_heads].
        temps: that it was written at.
        losses: of each head, nats per token.
    """

    ranks: list[npt.NDArray[np.int32]]
    temps: list[float]
    losses: tuple[float, ...]


def held_out(shape: Shape, state: State, teacher: Teacher, texts: Texts, states: States) -> HeldOut:
    """Judge heads by the held-out texts."""
    starts = texts.starts
    found = HeldOut([], [], ())
    losses, counts = np.zeros(shape.n_heads), np.zeros(shape.n_heads)
    for i in map(int, np.flatnonzero(texts.held_out)):
        given, n = int(texts.given[i]), int(texts.lengths[i])
        if n - given <= shape.n_heads + 1:
            continue
        part = slice(int(starts[i]), int(starts[i + 1]))
        hidden = torch.from_numpy(states.hidden[part].astype(np.float32))
        tokens = torch.from_numpy(texts[i].astype(np.int64))
        ids, p = torch.from_numpy(states.ids[part].astype(np.int64)), torch.from_numpy(states.p[part].copy())
        ranks, sums = judge(shape, state, teacher, hidden, tokens, given, ids, p)
        found.ranks.append(ranks)
        found.temps.append(float(texts.temps[i]))
        losses += sums
        counts += (ranks >= 0).sum(0)
    return HeldOut(found.ranks, found.temps, tuple((losses / np.maximum(counts, 1)).tolist()))


def acceptance(found: HeldOut) -> Acceptance:
    """Tokens per step; the tree is grown from half of the texts and judged on the others. Steps near the end of a text,
    where not all is known, do not count."""
    if len(found.ranks) < 2:
        return Acceptance(float("nan"), float("nan"), (), found.losses)
    whole = [r[(r >= 0).all(axis=1)] for r in found.ranks]
    hits = np.logical_and.accumulate(np.concatenate(whole) == 0, axis=1).mean(axis=0)
    order = np.random.default_rng(0).permutation(len(whole))  # texts of several temperatures stand in turn
    half = len(whole) // 2
    fitted, rest = ([whole[i] for i in part] for part in (order[:half], order[half:]))
    seen = search.node_probabilities(np.concatenate(fitted))
    tree = search.grow(seen, TREE_NODES)
    judged = search.node_probabilities(np.concatenate(rest), max_rank=TREE_NODES)
    return Acceptance(
        1.0 + float(hits.sum()),
        1.0 + search.expected(tree, judged),
        tuple(round(float(x), 4) for x in hits),
        found.losses,
    )
