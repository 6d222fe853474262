"""The texts of rank traces: with them the auto policy, which drafts from the text itself, can be replayed, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

N_BEST = 8  # most probable tokens that are kept of a distribution: what is recycled


@dataclass(frozen=True)
class Texts:
    """Prompts and what was generated after them, n tokens in all. Row i is of the distribution token i was drawn from.

    Attributes:
        n_prompt: tokens of each prompt, [n_texts].
        temp: temperature that each text was drawn at, [n_texts].
        tokens: text after text: the prompt, then the generated tokens.
        best: most probable tokens, the best first; -1: no more are known. i4 [n, N_BEST]
        log_p: their ln p. f4 [n, N_BEST]
        states: hidden states, with a prefix layer its outputs; n_embd is 0 without heads. f4 [n, n_embd]
    """

    n_prompt: npt.NDArray[np.int32]
    temp: npt.NDArray[np.float32]
    tokens: npt.NDArray[np.int32]
    best: npt.NDArray[np.int32]
    log_p: npt.NDArray[np.float32]
    states: npt.NDArray[np.float32]

    def pick(self, n_tokens: npt.NDArray[np.int32], texts: Sequence[int]) -> Texts:
        """Some of the texts; `n_tokens` is how many were generated in each of all."""
        rows = _rows(n_tokens, texts)
        return replace(
            self,
            n_prompt=self.n_prompt[list(texts)],
            temp=self.temp[list(texts)],
            tokens=self.tokens[_rows(self.n_prompt + n_tokens, texts)],
            best=self.best[rows],
            log_p=self.log_p[rows],
            states=self.states[rows],
        )

    def fit(self, n_tokens: npt.NDArray[np.int32]) -> bool:
        """Whether all parts fit together, and to so many generated tokens."""
        n = int(n_tokens.sum())
        return bool(
            self.n_prompt.shape == self.temp.shape == n_tokens.shape
            and (self.n_prompt >= 1).all()
            and self.tokens.shape == (int(self.n_prompt.sum()) + n,)
            and (self.tokens >= 0).all()
            and self.best.shape == (n, N_BEST)
            and (self.best >= -1).all()
            and self.log_p.shape == (n, N_BEST)
            and self.states.ndim == 2
            and len(self.states) == n
            and np.isfinite(self.temp).all()
            and np.isfinite(self.log_p).all()
            and np.isfinite(self.states).all()
        )


def _rows(lengths: npt.NDArray[np.int32], parts: Sequence[int]) -> npt.NDArray[np.int64]:
    """Indices of some parts of what lies one part after the other."""
    ends = np.cumsum(lengths, dtype=np.int64)
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(ends[i] - lengths[i], ends[i]) for i in parts)])


def join(texts: Sequence[Texts]) -> Texts:
    """Several as one."""
    return Texts(
        np.concatenate([t.n_prompt for t in texts]),
        np.concatenate([t.temp for t in texts]),
        np.concatenate([t.tokens for t in texts]),
        np.concatenate([t.best for t in texts]),
        np.concatenate([t.log_p for t in texts]),
        np.concatenate([t.states for t in texts]),
    )
