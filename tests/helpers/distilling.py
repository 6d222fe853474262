"""Training by the text and the most probable tokens that `entmtp train --keep-work` kept of a model."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from entmtp.train.states import Layout, States, Store
from entmtp.train.text import SHORTEST


@dataclass
class Batch:
    """Texts of about one length, filled up with zeros: [texts, n], and of the model at each token, k kept."""

    tokens: torch.Tensor
    hidden: torch.Tensor  # [texts, n, n_embd]
    ids: npt.NDArray[np.int64]  # [texts, n, k] most probable next tokens, the best first
    p: npt.NDArray[np.float32]  # [texts, n, k]; zeros where there is no answer of the model


class Teacher:
    """What a model wrote.

    Attributes:
        batches: texts to learn from, by number.
        held: texts to judge by.
        counts: [n_vocab] how often each token came.
    """

    def __init__(self, work: Path, n_embd: int, n_vocab: int, batch_tokens: int):
        n_rows = (work / "states.hidden").stat().st_size // 2 // n_embd
        self.k = (work / "states.ids").stat().st_size // 4 // n_rows
        self.texts, self.states = Store(work, Layout(n_rows, n_embd, self.k)).opened()
        self.counts = np.bincount(self.texts.tokens, minlength=n_vocab)
        lengths, held_out = self.texts.lengths, self.texts.held_out
        order = [int(i) for i in np.argsort(-lengths, kind="stable") if lengths[i] >= SHORTEST]
        self.held = [i for i in order if held_out[i]]
        self.batches: list[list[int]] = [[]]
        for i in order:
            if held_out[i]:
                continue
            last = self.batches[-1]
            if last and (len(last) + 1) * int(lengths[last[0]]) > batch_tokens:
                self.batches.append([])
            self.batches[-1].append(i)

    def read(self, texts: list[int]) -> Batch:
        n = max(int(self.texts.lengths[i]) for i in texts)
        states: States = self.states
        tokens = np.zeros((len(texts), n), np.int64)
        hidden = np.zeros((len(texts), n, states.hidden.shape[1]), np.float32)
        ids = np.zeros((len(texts), n, self.k), np.int64)
        p = np.zeros((len(texts), n, self.k), np.float32)
        for row, i in enumerate(texts):
            at = slice(int(self.texts.starts[i]), int(self.texts.starts[i]) + int(self.texts.lengths[i]))
            m = at.stop - at.start
            tokens[row, :m], hidden[row, :m] = self.texts.tokens[at], states.hidden[at]
            ids[row, :m], p[row, :m] = states.ids[at], states.p[at][:, : self.k]
            p[row, : max(0, int(self.texts.given[i]) - 1)] = 0.0  # what the model did not write
        return Batch(torch.tensor(tokens), torch.tensor(hidden), ids, p)


def judged(
    logits: torch.Tensor, chosen: npt.NDArray[np.int64], place: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int64], p: npt.NDArray[np.float32],
) -> tuple[torch.Tensor, float]:  # fmt: skip
    """Cross-entropy to the kept probabilities, and the share of best guesses that are the model's best token.

    Args:
        logits: [..., len(chosen)], of the tokens `chosen`; place: [n_vocab] where a token is among them, or -1.
        ids, p: [..., k] of the model.
    """
    where = torch.tensor(place[ids])
    share = torch.tensor(p) * (where >= 0)
    loss = -(F.log_softmax(logits, -1).gather(-1, where.clamp(min=0)) * share).sum()
    real = torch.tensor(p.sum(-1) > 0)
    best = torch.tensor(chosen)[logits.argmax(-1)] == torch.tensor(ids[..., 0])
    return loss / share.sum().clamp(min=1e-6), float((best & real).sum() / real.sum())


def parser_of(doc: str | None, epochs: int, lr: float) -> argparse.ArgumentParser:
    """The options that all such trainings have."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    parser.add_argument("base", type=Path)
    parser.add_argument("work", type=Path, help="folder of text and states")
    parser.add_argument("outfile", type=Path)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=lr)
    parser.add_argument("--type", default="Q8_0", help="of the matrices (default: Q8_0)")
    parser.add_argument("--minutes", type=float, default=60.0, help="that it may take at most")
    return parser


def fit(
    module: torch.nn.Module, teacher: Teacher,
    losses: Callable[[list[int]], tuple[torch.Tensor, list[float]]], args: argparse.Namespace,
) -> None:  # fmt: skip
    """Train by AdamW with a warm start and a cosine, for epochs or minutes, whichever are over first.

    Args:
        losses: of some texts: what to lower, and shares of right guesses to show.
    """
    rng = np.random.default_rng(0)
    optimizer = torch.optim.AdamW(module.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01)
    n_steps, began, step = args.epochs * len(teacher.batches), time.monotonic(), 0
    for _ in range(args.epochs):
        for at in rng.permutation(len(teacher.batches)):
            done = max(step / n_steps, (time.monotonic() - began) / 60 / args.minutes)
            if done >= 1:
                break
            warm = min(1.0, (step + 1) / 20)
            for group in optimizer.param_groups:
                group["lr"] = args.lr * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))
            loss, right = losses(teacher.batches[at])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            step += 1
            if step % 10 == 0 or step == n_steps:
                shares = " ".join(f"{x:.3f}" for x in right)
                seconds = time.monotonic() - began
                print(
                    f"step {step}/{n_steps} {seconds:.0f} s loss {loss.item():.3f} right {shares}", flush=True
                )
    with torch.no_grad():
        rights = [losses([i])[1] for i in teacher.held]
    print("held out, right:", " ".join(f"{x:.3f}" for x in np.mean(rights, 0)))


def rope(x: torch.Tensor, base: float) -> torch.Tensor:
    """[batch, heads, n, head_dim], neighbouring dimensions paired."""
    n, half = x.shape[2], x.shape[3] // 2
    angle = torch.arange(n)[:, None] * base ** (-torch.arange(half) / half)
    even, odd = x[..., 0::2], x[..., 1::2]
    turned = even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()
    return torch.stack(turned, -1).flatten(-2)
