"""The training loop: batches from the cache, losses, steps, checkpoints from which a killed run goes on."""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..common.atomic import atomic_path
from ..common.errors import ModelError
from .evaluation import Acceptance, HeldOut, Teacher, acceptance, held_out
from .heads import Shape, State, before_projection, initial, prefix_layer
from .loss import piece_rows, projected_loss
from .options import Settings
from .states import States, Texts

BETAS = (0.9, 0.95)
# seconds of training that are lost at most when the process is killed; where saving is slow, ten times what it takes
SAVE_WITHIN = 20.0
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch calls them


@dataclass
class Report:
    """State of a run, for whoever shows it."""

    step: int
    loss: float
    losses: tuple[float, ...]  # of each head
    n_tokens: int  # of this step
    acceptance: Acceptance | None  # when it was measured


class Measured(NamedTuple):
    """A measurement on the way.

    Attributes:
        loss: mean of the steps since the one before, weighted as it is trained.
        held_out: the same on held-out text.
        chain, tree: tokens per step there.
    """

    step: int
    loss: float
    held_out: float
    chain: float
    tree: float


@dataclass(frozen=True)
class Batch:
    """Whole sequences, padded at their end."""

    hidden: torch.Tensor  # [n_seqs, n, n_embd]
    tokens: torch.Tensor  # [n_seqs, n]
    lengths: torch.Tensor  # [n_seqs]
    ids: torch.Tensor  # [n_seqs, n, k]
    p: torch.Tensor  # [n_seqs, n, k + 1]


def filled(index: torch.Tensor, multiple: int) -> torch.Tensor:
    """Filled up with its first entries: for products of ever other sizes, oneDNN compiles and keeps ever more code."""
    return torch.cat([index, index[:1].expand(-len(index) % multiple)])


class Trainer:
    """Heads in training.

    Args:
        settings: with `bf16` decided.
        folder: where checkpoints are kept.
        digest: of all that a checkpoint depends on.
    """

    def __init__(
        self,
        shape: Shape,
        settings: Settings,
        n_steps: int,
        teacher: Teacher,
        texts: Texts,
        states: States,
        folder: Path,
        digest: str,
    ):
        self.shape, self.settings, self.n_steps, self.teacher = shape, settings, n_steps, teacher
        self.texts, self.states = texts, states
        self.folder, self.digest = folder, digest
        self.path = folder / "checkpoint.safetensors"
        self.state = self.begin()
        for tensor in self.state.values():
            tensor.requires_grad_(True)
        matrices = [t for t in self.state.values() if t.dim() > 1]
        vectors = [t for t in self.state.values() if t.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": settings.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.lr, betas=BETAS, fused=True)
        self.step = self.began = 0  # where the run is, and where it went on
        self.history: list[Measured] = []
        self._losses: list[float] = []  # since the last measurement
        # when the last checkpoint was there, and what writing it took
        self.saved, self.saving = time.monotonic(), 0.0
        self.dtype = torch.bfloat16 if settings.bf16 else torch.float32

    def begin(self) -> State:
        """The state before the first step."""
        scale = float(np.sqrt(np.mean(self.states.hidden[:4096].astype(np.float64) ** 2)))
        return initial(self.shape, self.teacher.output, scale, self.settings.seed)

    #
    # batches
    #

    def sequences(self) -> Iterator[npt.NDArray[np.int64]]:
        """The sequences of each step. Which they are follows from the seed, so a resumed run sees the same."""
        train = np.flatnonzero(~self.texts.held_out & (self.texts.lengths > 2))
        epoch = 0
        chosen: list[int] = []
        count = 0
        while True:
            for i in np.random.default_rng([self.settings.seed, 2, epoch]).permutation(train):
                chosen.append(int(i))
                count += int(self.texts.lengths[i])
                if count >= self.settings.batch_tokens:
                    yield np.array(chosen)
                    chosen, count = [], 0
            epoch += 1

    def batch(self, seqs: npt.NDArray[np.int64]) -> Batch:
        starts, lengths = self.texts.starts[seqs], self.texts.lengths[seqs]
        n = -(-int(lengths.max()) // 128) * 128  # few different sizes, see `filled`
        lengths = np.concatenate([lengths, np.zeros(-len(seqs) % 4, dtype=lengths.dtype)])

        def padded(array: npt.NDArray[np.generic], dtype: npt.DTypeLike) -> torch.Tensor:
            out = np.zeros((len(lengths), n, *array.shape[1:]), dtype=dtype)
            for row, (start, length) in enumerate(zip(starts, lengths, strict=False)):
                out[row, :length] = array[start : start + length]
            return torch.from_numpy(out)

        return Batch(
            padded(self.states.hidden, np.float32),
            padded(self.texts.tokens, np.int64),
            torch.from_numpy(lengths.astype(np.int64)),
            padded(self.states.ids, np.int64),
            padded(self.states.p, np.float32),
        )

    #
    # one step
    #

    def gradients(self, batch: Batch) -> tuple[float, ...]:
        """Loss of each head; its weighted sum's gradient is left in the state's tensors."""
        s, shape = self.settings, self.shape
        n = batch.tokens.shape[1]
        place = torch.arange(n)
        hidden = self.noisy(batch.hidden, batch)
        seen = hidden
        with torch.autocast("cpu", torch.bfloat16, enabled=bool(s.bf16)):
            if shape.prefix:
                seen = prefix_layer(shape, self.state, hidden)
        # heads one after the other: their gradients meet in `leaf`, so only one head's work is in memory
        leaf = seen.detach().float().requires_grad_(shape.prefix)
        losses = []
        for i in range(shape.n_heads):
            at, t = torch.nonzero(place[None, :] + i + 1 < batch.lengths[:, None], as_tuple=True)
            if not (count := len(at)):
                losses.append(0.0)
                continue
            at, t = (filled(index, piece_rows(len(self.teacher.output))) for index in (at, t))
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(s.bf16)):
                x = leaf[at, t]
                if shape.grounded:
                    path = (self.teacher.embedding[batch.tokens[at, t + 1 + j]] for j in range(i + 1))
                    x = torch.cat([x, *path], 1)
                x = before_projection(shape, self.state, i, x)
            weight, bias = self.teacher.projection(shape, self.state, i)
            ids, p = self.targets(batch, at, t + 1 + i)
            p[count:] = 0.0
            loss = projected_loss(x.float(), weight, bias, ids, p, self.dtype, count)
            (loss * s.head_decay**i).backward()
            losses.append(float(loss.detach()))
        if leaf.grad is not None:
            seen.backward(leaf.grad.to(seen.dtype))
        return tuple(losses)

    def noisy(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """NEFTune, arXiv 2310.05914, on hidden states as in Hydra's appendix."""
        s = self.settings
        if s.noise <= 0:
            return hidden
        g = torch.Generator().manual_seed(s.seed * 1_000_003 + self.step)
        size = s.noise / math.sqrt(float(batch.lengths.float().mean()) * self.shape.n_embd)
        return hidden + (torch.rand(hidden.shape, generator=g) * 2 - 1) * size

    def targets(self, batch: Batch, at: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What heads shall say of the token after position t: the base model's distribution, or the text's token."""
        if self.settings.loss == "teacher":
            return self.teacher.rows(batch.ids[at, t], batch.p[at, t])
        last = (t + 1 >= batch.lengths[at])[:, None]
        token = batch.tokens[at, (t + 1).clamp_max(batch.tokens.shape[1] - 1)]
        if self.teacher.draft_index is not None:
            token = self.teacher.draft_index[token]
        last |= (token < 0)[:, None]  # not in the draft vocabulary: nothing to learn
        p = torch.cat([(~last).float(), torch.zeros_like(last, dtype=torch.float32)], 1)
        return token.clamp_min(0)[:, None], p

    def update(self) -> None:
        """One step of AdamW (arXiv 1711.05101), the gradient's norm clipped."""
        if self.settings.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.state.values(), self.settings.clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(self.step, self.n_steps)
        self.optimizer.step()
        self.optimizer.zero_grad()

    #
    # the whole run
    #

    def run(self, show: Callable[[Report], None]) -> Acceptance:
        """Train to the last step; returns the final acceptance.

        Raises:
            ModelError: the loss is no number any more; the checkpoint holds what was before.
            KeyboardInterrupt: after the state was saved.
            OSError: the disk is full; the last checkpoint is whole.
        """
        s = self.settings
        order = self.sequences()
        for _ in range(self.step):
            next(order)
        last: Acceptance | None = None
        try:
            while self.step < self.n_steps:
                batch = self.batch(next(order))
                losses = self.gradients(batch)
                total = sum(x * s.head_decay**i for i, x in enumerate(losses))
                if not math.isfinite(total):
                    raise ModelError(
                        f"the loss is {total} at step {self.step}; the checkpoint of an earlier step is kept in "
                        f"{self.folder}: train with a lower --lr (it was {s.lr:g})"
                    )
                self.update()
                self.step += 1
                last = None
                self._losses.append(total)
                every = s.eval_every or max(1, self.n_steps // 10)
                if self.step % every == 0 or self.step == self.n_steps:
                    last = self.evaluate()
                    self.note(last)
                due = time.monotonic() > self.saved + max(SAVE_WITHIN, 10 * self.saving)
                if due or self.step % s.save_every == 0 or self.step == self.n_steps:
                    self.save()
                show(Report(self.step, total, losses, int(batch.lengths.sum()), last))
        except KeyboardInterrupt:
            self.save()
            raise
        return last or self.evaluate()

    def note(self, found: Acceptance) -> None:
        """Add to the history."""
        weighted = sum(x * self.settings.head_decay**i for i, x in enumerate(found.losses or (math.nan,)))
        mean = float(np.mean(self._losses))
        self.history.append(Measured(self.step, mean, weighted, found.chain, found.tree))
        self._losses = []

    def judge(self, state: State | None = None) -> HeldOut:
        """What `state`, or the present one, says of the held-out texts."""
        return held_out(self.shape, state or self.detached(), self.teacher, self.texts, self.states)

    def evaluate(self, state: State | None = None) -> Acceptance:
        """Tokens per step on the held-out texts, of `state` or the present one."""
        return acceptance(self.judge(state))

    def detached(self) -> State:
        return {k: v.detach() for k, v in self.state.items()}

    #
    # checkpoints: safetensors, no pickle
    #

    def save(self) -> None:
        tensors = {f"state/{name}": t.detach() for name, t in self.state.items()}
        for name, t in self.state.items():
            if moments := self.optimizer.state.get(t):
                tensors |= {f"{m}/{name}": moments[m] for m in MOMENTS}
        run = {"step": self.step, "digest": self.digest, "history": self.history, "losses": self._losses}
        about = {"run": json.dumps(run)}
        begun = time.monotonic()
        with atomic_path(self.path) as temporary:
            try:
                save_file(tensors, temporary, about)
            except SafetensorError as e:  # how it reports a full disk
                raise OSError(errno.EIO, str(e), str(self.path)) from e
        self.saved = time.monotonic()
        self.saving = self.saved - begun

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one.

        Raises:
            ModelError: it is damaged, or of another run.
        """
        if not self.path.exists():
            return
        try:
            with safe_open(self.path, "pt") as file:
                about = json.loads((file.metadata() or {}).get("run", "{}"))
                if about.get("digest") != self.digest:
                    raise ModelError(
                        f"{self.path}: this is the checkpoint of another training; give another --work"
                    )
                step = int(about["step"])
                with torch.no_grad():
                    for name, t in self.state.items():
                        t.copy_(file.get_tensor(f"state/{name}"))
                        if step:
                            moments = {m: file.get_tensor(f"{m}/{name}") for m in MOMENTS}
                            self.optimizer.state[t] = {"step": torch.tensor(float(step)), **moments}
                self.step = self.began = step
                self.history = [Measured(*row) for row in about["history"]]
                self._losses = about["losses"]
        except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as e:
            if isinstance(e, ModelError):
                raise
            raise ModelError(
                f"{self.path}: the checkpoint is damaged ({e}); start again without --resume"
            ) from e
