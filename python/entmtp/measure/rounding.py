"""Where texts are not plain decoding's bit for bit (on a GPU): whether two answers part at a tie.

Passes of several tokens round otherwise than passes of one. How much, the model itself says: the same text is evaluated
token by token and a few tokens at a time, by plain decoding alone, and what the logits then differ by is rounding. Two
greedy answers that part where the better token leads by less than that differ by nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .subject import Subject

PASS = 4  # tokens at a time
LIKELY = 16  # tokens whose logits are compared


class Parting(NamedTuple):
    """Where two greedy answers part.

    Attributes:
        at: token of the answer.
        gap: between the logits of the two tokens, in plain decoding.
        noise: largest difference between passes of one token and of several in the logits of the most probable tokens,
            less what all of them have in common.
    """

    at: int
    gap: float
    noise: float

    @property
    def is_tie(self) -> bool:
        """Rounding explains it: each of the two logits may be off by the noise."""
        return self.gap <= 2 * self.noise


def logits_after(
    llm: Subject, prompt: Sequence[int], answer: Sequence[int], size: int
) -> npt.NDArray[np.float32]:
    """Logits [n_vocab] after a prompt and an answer. `llm` drafts nothing.

    Args:
        size: the answer's tokens are evaluated so many at a time, and the prompt's last ones that fill up the first
            pass among them; 1: as plain decoding does.
    """
    text = [*prompt, *answer]
    begin = max(len(prompt) - (-len(answer) % size), 0)
    llm.reset()
    llm.eval(text[:begin])
    for i in range(begin, len(text), size):
        llm.decoder.eval(text[i : i + size], i, all_outputs=size > 1)
    return llm.decoder.logits(llm.n_vocab()).copy()


def parting(
    llm: Subject, prompt: Sequence[int], plain: Sequence[int], other: Sequence[int]
) -> Parting | None:
    """Where another greedy answer leaves plain decoding's; None: nowhere, or one merely ends before the other."""
    at = next((i for i, (a, b) in enumerate(zip(plain, other, strict=False)) if a != b), None)
    if at is None:
        return None
    one, several = (logits_after(llm, prompt, plain[:at], size) for size in (1, PASS))
    llm.reset()
    error = (several - one)[np.argsort(one)[-LIKELY:]]
    gap = abs(float(one[plain[at]]) - float(one[other[at]]))
    return Parting(at, gap, float(np.abs(error - error.mean()).max()))
