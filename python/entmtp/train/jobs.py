"""Which sequences there will be: documents to read, prompts to answer, and beginnings that are made up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..common.errors import ModelError
from ..convert.draft_vocab import OPENINGS
from ..models.templates import frame, has_template, question_tokens
from .base import Base
from .data import Data

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """One sequence to come: `tokens` are given, and the model goes on from there if `temp` is not None.

    Attributes:
        closing: of a conversation whose question the model writes, too: what stands between that and the answer.
    """

    tokens: Tokens
    temp: float | None
    held_out: bool
    closing: Tokens = ()


def plan_jobs(
    data: Data, base: Base, n_tokens: int, n_held_out: int, temps: Sequence[float], own: float,
    made_up: float, seed: int, raw: bool,
) -> Iterator[Job]:  # fmt: skip
    """Sequences to train on, without end: held-out ones first, then as the data lasts, over and over.

    Documents are cut into pieces of the sequence length. Of `own` of them only the beginning is kept, and the model
    writes the rest, as it does with every prompt, which the model's chat template puts to it unless `raw`. Without
    data, and for a share of `made_up` with it, a model with a chat template asks itself (Magpie, arXiv 2406.08464);
    another goes on from a word or two, or from nothing. Held-out sequences are the model's own continuations, since
    that is what heads must foresee, of data that is not trained on.
    """
    rng = np.random.default_rng([seed, 1])
    order = _order(data, base, n_tokens, rng, raw)
    if 0 < len(order) < 4:
        raise ModelError(
            f"--data: {data} are too few to hold some out; give more text, or leave --data out to train without any"
        )
    # a quarter of small data at most
    kept = order[: min(n_held_out, len(order) // 4)]
    rest = order[len(kept) :]

    def begin(piece: npt.NDArray[np.int32], document: bool) -> Tokens:
        if not document:
            return tuple(piece.tolist())
        piece = piece[: int(rng.integers(16, max(17, min(128, len(piece) // 2 + 1))))]
        return (*base.bos, *piece.tolist())

    invent = _inventor(base, rng, raw)
    for i in range(n_held_out):
        temp = float(temps[i % len(temps)])
        if not kept or (made_up and rng.random() < made_up):
            yield invent(temp, True)
        else:
            yield Job(begin(*kept[i % len(kept)]), temp, True)
    i = 0
    while True:
        temp = float(temps[i % len(temps)])
        if not rest or (made_up and rng.random() < made_up):
            yield invent(temp, False)
        else:
            piece, document = rest[i % len(rest)]
            if document and rng.random() >= own:
                yield Job((*base.bos, *piece.tolist()), None, False)
            else:
                yield Job(begin(piece, document), temp, False)
        i += 1


def _order(
    data: Data, base: Base, n_tokens: int, rng: np.random.Generator, raw: bool
) -> list[tuple[npt.NDArray[np.int32], bool]]:
    """Tokens of pieces of documents (True) and of prompts (False), shuffled."""
    length = base.seq_len
    pieces: list[npt.NDArray[np.int32]] = []
    for text in rng.permutation(np.array(data.documents, dtype=object)):
        tokens = np.array(base.tokenize(text), dtype=np.int32)
        room = length - len(base.bos)
        pieces += [tokens[i : i + room] for i in range(0, len(tokens), room) if len(tokens) - i >= 16]
        if len(pieces) * length > 4 * n_tokens:  # more than enough
            break
    prompts = [np.array(question_tokens(base.llm, q, raw), dtype=np.int32) for q in data.prompts]
    # half of a sequence is the answer's; a chat prompt cannot be cut, and so is left out
    fit = [p[: length // 2] for p in prompts if raw or not has_template(base.llm) or len(p) <= length // 2]
    if prompts and not fit:
        raise ModelError(
            f"--data: every prompt is longer than half of --seq-len {length}; give shorter ones, or a larger --seq-len"
        )
    order = [*((p, True) for p in pieces), *((p, False) for p in fit)]
    rng.shuffle(order)
    return order


def _inventor(base: Base, rng: np.random.Generator, raw: bool) -> Callable[[float, bool], Job]:
    """What makes a job without any data: a conversation that the model begins itself, or text from an opening on."""
    if has_template(base.llm) and not raw:
        opening, closing = map(tuple, frame(base.llm))
        return lambda temp, held_out: Job(opening, temp, held_out, closing)
    openings = [base.tokenize(text) for text in OPENINGS]

    def job(temp: float, held_out: bool) -> Job:
        words = openings[int(rng.integers(len(openings)))]
        return Job((*base.bos, *words) or (int(rng.integers(base.n_vocab)),), temp, held_out)

    return job
