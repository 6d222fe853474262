"""The training loop of an EAGLE-3 layer: several guesses in a row from the layer's own results, as it will be asked."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..bank.traces import MAX_RANK
from .eagle3 import AT_ONCE, Layer, before_projection, initial, read_last, scale_of, unroll
from .evaluation import HeldOut, Teacher
from .heads import Shape, State
from .loop import Batch, Trainer, filled
from .loss import piece_rows, projected_loss
from .options import Options

SAMPLE = 8192  # tokens that scales are taken from


class LayerTrainer(Trainer):
    """As `Trainer`, of a layer that begins as the base model's last one (`read_last`)."""

    shape: Any  # a Layer

    def __init__(self, last: State, *args: Any):
        self.last = last
        super().__init__(*args)

    def begin(self) -> State:
        features = self.states.hidden[:: max(1, len(self.states.hidden) // SAMPLE)]
        self.scale = scale_of(features)
        return initial(self.shape, self.last, self.teacher.output, features, self.scale, self.settings.seed)

    def gradients(self, batch: Batch) -> tuple[float, ...]:
        """Loss of each step ahead; their weighted sum's gradient is left in the state's tensors."""
        s, layer = self.settings, self.shape
        order = batch.lengths.argsort()
        # of step i, tokens whose next one is guessed
        counts = [int((batch.lengths - 1 - i).clamp_min(0).sum()) for i in range(layer.n_ahead)]
        losses = [0.0] * layer.n_ahead
        multiple = min(512, piece_rows(len(self.teacher.output)))
        for seqs in order.split(AT_ONCE):
            longest = int(batch.lengths[seqs].max())
            if longest < 2:
                continue
            n = -(-longest // 128) * 128  # few different sizes, see `filled`
            features = self.noisy(batch.hidden[seqs, :n] / self.scale, batch)
            total = features.new_zeros(())
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(s.bf16)):
                embedded = self.teacher.embedding[batch.tokens[seqs, :n]]
                for i, x in enumerate(unroll(layer, self.state, embedded, features, layer.n_ahead)):
                    real = torch.arange(x.shape[1])[None, :] + i + 1 < batch.lengths[seqs][:, None]
                    at, t = torch.nonzero(real, as_tuple=True)
                    if not (count := len(at)):
                        continue
                    at, t = (filled(index, multiple) for index in (at, t))
                    y = before_projection(layer, self.state, x[at, t]).float()
                    ids, p = self.targets(batch, seqs[at], t + 1 + i)
                    p[count:] = 0.0
                    loss = projected_loss(y, self.state["output"], None, ids, p, self.dtype, counts[i])
                    losses[i] += float(loss.detach())
                    total = total + loss * s.head_decay**i
            total.backward()
        return tuple(losses)

    def judge(self, state: State | None = None) -> HeldOut:
        """As of heads, without a loss."""
        state = state or self.detached()
        found = HeldOut([], [], ())
        for i in map(int, np.flatnonzero(self.texts.held_out)):
            given, start, n = int(self.texts.given[i]), int(self.texts.starts[i]), int(self.texts.lengths[i])
            if given < 1 or n - given <= self.shape.n_ahead + 1:
                continue
            features = torch.from_numpy(self.states.hidden[start : start + n].astype(np.float32)) / self.scale
            tokens = torch.from_numpy(self.texts[i].astype(np.int64))
            found.ranks.append(ranks_of(self.shape, state, self.teacher, features, tokens, given))
            found.temps.append(float(self.texts.temps[i]))
        return found


def new_trainer(shape: Shape | Layer, options: Options, *more: Any) -> Trainer:
    """Of heads or of a layer; further arguments as `Trainer` has them."""
    if isinstance(shape, Layer):
        return LayerTrainer(read_last(options.model, shape), shape, options, *more)
    return Trainer(shape, options, *more)


@torch.no_grad()
def ranks_of(
    layer: Layer, state: State, teacher: Teacher, features: torch.Tensor, tokens: torch.Tensor, given: int
) -> npt.NDArray[np.int32]:
    """Ranks that the layer gives to a text's real tokens, as `Traces.ranks` has them: [n, n_ahead].

    Args:
        features: in units of `scale_of`, of the whole text, [n_tokens, 3 n_embd].
        given: tokens at the beginning that the base model did not write, at least one; n = n_tokens - given.
    """
    ranks = np.full((len(tokens) - given, layer.n_ahead), -1, dtype=np.int32)
    steps = unroll(layer, state, teacher.embedding[tokens][None], features[None], layer.n_ahead)
    for i, x in enumerate(steps):
        y = before_projection(layer, state, x[0, given - 1 : len(tokens) - 2 - i])
        target = tokens[given + 1 + i :]
        if teacher.draft_index is not None:
            target = teacher.draft_index[target]
        for rows in torch.arange(len(y)).split(1024):
            z = y[rows] @ state["output"].T
            own = z.gather(1, target[rows].clamp_min(0)[:, None])
            rank = (z > own).sum(1).clamp_max(MAX_RANK)
            ranks[rows.numpy(), i] = torch.where(target[rows] < 0, MAX_RANK, rank).numpy()
    return ranks
