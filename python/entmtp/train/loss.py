"""Cross-entropy of a head against the base model's distribution, without the logits ever standing in memory.

The teacher gives k tokens with their probabilities p and the mass r of all others. The head's distribution q falls into
the same k + 1 parts:

    loss = - sum_k p_k ln q_k - r ln(1 - sum_k q_k)

Projection to the vocabulary, loss and gradient go over the rows in pieces, so a head of any vocabulary costs
`PIECE_BYTES`.
"""

from __future__ import annotations

from typing import Any

import torch

PIECE_BYTES = 1 << 23
TINY = 1e-30
NEVER = -1e30  # a logit


def piece_rows(n_vocab: int) -> int:
    """Rows that are projected at a time."""
    return max(32, PIECE_BYTES // (4 * n_vocab))


class _ProjectedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        ids: torch.Tensor,
        p: torch.Tensor,
        dtype: torch.dtype,
        count: int,
    ) -> torch.Tensor:
        n = len(x)
        w = weight.to(dtype)
        dx = torch.empty_like(x)
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        db = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        loss = x.new_zeros(())
        # the pieces share their memory: it would be taken and given back a hundred times a step, and fray
        n_rows, width = min(n, piece_rows(len(weight))), len(weight)
        # one column more than there are rows of `weight`: there stands whatever is none of them
        logits, product = x.new_empty(n_rows, width + 1), w.new_empty(n_rows, width)
        ids = torch.where(ids < 0, width, ids)
        for begin in range(0, n, n_rows):
            part = slice(begin, min(begin + n_rows, n))
            size = part.stop - begin
            xs, at = x[part].to(dtype), ids[part]
            ps, r = p[part, :-1], p[part, -1:]
            z = logits[:size]
            z[:, :width] = torch.mm(xs, w.T, out=product[:size])
            if bias is not None:
                z[:, :width] += bias
            z[:, width] = NEVER
            zk = z.gather(1, at)
            top = z.amax(1, keepdim=True)
            e = z.sub_(top).exp_()
            ek = e.gather(1, at)
            rest = e.scatter_(1, at, 0.0).sum(1, keepdim=True).clamp_min_(TINY)
            total = rest + ek.sum(1, keepdim=True)
            mass = ps.sum(1, keepdim=True) + r
            loss += (
                mass * (top + total.log()) - (ps * zk).sum(1, keepdim=True) - r * (top + rest.log())
            ).sum()
            # d loss / d z: q mass - p for the k tokens, q (mass - r / (1 - sum_k q_k)) for the others
            e *= mass / total - r / rest
            e.scatter_(1, at, ek * (mass / total) - ps)
            e = e[:, :width].mul_(1 / count)
            g = product[:size].copy_(e)
            dx[part] = (g @ w).to(dx.dtype)
            if dw is not None:
                dw += g.T @ xs  # summed in full precision over the pieces
            if db is not None:
                db += e.sum(0)
        ctx.save_for_backward(dx, dw, db)
        return loss / count

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (grad,) = grads
        dx, dw, db = (None if d is None else d * grad for d in ctx.saved_tensors)
        return dx, dw, db, None, None, None, None


def loss_of(z: torch.Tensor, ids: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """The same of logits that are there, without a gradient: nats, [n].

    Args:
        z: [n, n_vocab]
        ids, p: as `projected_loss`.
    """
    width = z.shape[1]
    zk = z.gather(1, ids.clamp_min(0))
    top = z.amax(1, keepdim=True)
    e = torch.cat([(z - top).exp_(), torch.zeros_like(top)], 1)  # whatever is no row stands in a last column
    total = e.sum(1)
    rest = e.scatter_(1, torch.where(ids < 0, width, ids), 0.0).sum(1).clamp_min_(TINY)
    mass, r, top = p.sum(1), p[:, -1], top[:, 0]
    return mass * (top + total.log()) - (p[:, :-1] * zk).sum(1) - r * (top + rest.log())


def projected_loss(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    ids: torch.Tensor,
    p: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    count: int | None = None,
) -> torch.Tensor:
    """Loss, nats per row, of the logits `x weight^T + bias`.

    Args:
        x: [n, n_embd]
        weight: [n_vocab, n_embd]
        bias: [n_vocab], or None.
        ids: the teacher's k tokens, as rows of `weight`, int64 [n, k]; -1 for none, with a probability of 0.
        p: their probabilities and the rest's, [n, k + 1]; their sum may be below 1, if the vocabulary was cut.
        dtype: in which products are computed.
        count: rows to average over, if some only fill up (with p = 0).
    """
    return _ProjectedLoss.apply(x, weight, bias, ids, p, dtype, count or len(x))
