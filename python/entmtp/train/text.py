"""Training text: what the user gives, and what the base model itself writes.

Heads guess what the base model will say, so the best text is its own: it continues the user's prompts and the
beginnings of the user's documents, or, without any data, beginnings that it makes up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..common.errors import ModelError
from ..convert.draft_vocab import OPENINGS
from .base import Base

MAKE_UP = 24  # tokens: so much of a text that begins with a word or two is drawn at temperature 1
MADE_UP = 8  # tokens: a beginning shorter than this says little
LOOP = 48  # tokens; text that only repeats itself for so long is cut there
LONGEST_PERIOD = 16


@dataclass(frozen=True)
class Job:
    """One sequence to come: `tokens` are given, and the model goes on from there if `temp` is not None."""

    tokens: tuple[int, ...]
    temp: float | None
    held_out: bool


@dataclass(frozen=True)
class Texts:
    """Sequences one after the other.

    Attributes:
        tokens: i4 [n]
        lengths: tokens of each sequence, [n_seqs].
        given: how many of them the model did not write, [n_seqs].
        held_out: not trained on, [n_seqs].
    """

    tokens: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int64]
    given: npt.NDArray[np.int64]
    held_out: npt.NDArray[np.bool_]

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.lengths)])

    def __getitem__(self, i: int) -> npt.NDArray[np.int32]:
        start = int(self.starts[i])
        return self.tokens[start : start + int(self.lengths[i])]


#
# what the user gives
#


@dataclass(frozen=True)
class Data:
    """The user's data: documents to read, prompts to continue."""

    documents: tuple[str, ...]
    prompts: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.documents)} documents"] * bool(self.documents)
        parts += [f"{len(self.prompts)} prompts"] * bool(self.prompts)
        return " and ".join(parts) or "nothing"


def read_data(paths: Sequence[str]) -> Data:
    """Read files and folders: JSON lines with a field `text` (a document), `prompt` or `turns` (a prompt), or
    plain text. Of a folder, all files that are UTF-8 text are read.

    Raises:
        ModelError: a file that cannot be read, or no text in all of them.
    """
    documents: list[str] = []
    prompts: list[str] = []
    for name in paths:
        path = Path(name).expanduser()
        if not path.exists():
            raise ModelError(f"--data {name}: there is no such file or folder")
        if path.is_dir():
            for inner in sorted(p for p in path.rglob("*") if p.is_file()):
                documents += [text for text in [_utf8(inner)] if text]
        elif path.suffix == ".jsonl":
            _read_lines(path, documents, prompts)
        else:
            text = _utf8(path)
            if text is None:
                raise ModelError(f"--data {name}: this is no UTF-8 text; give text files, or .jsonl")
            documents.append(text)
    data = Data(tuple(t for t in documents if t.strip()), tuple(t for t in prompts if t.strip()))
    if paths and not data.documents and not data.prompts:
        raise ModelError(
            f"--data {' '.join(paths)}: there is no text in it; leave --data out to train without any"
        )
    return data


def _utf8(path: Path) -> str | None:
    """A file's text; None if it holds something else."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else text


def _read_lines(path: Path, documents: list[str], prompts: list[str]) -> None:
    text = _utf8(path)
    if text is None:
        raise ModelError(f"--data {path}: this is no UTF-8 text")
    for i, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            if "text" in item:
                documents.append(item["text"] + "")
            else:
                prompts.append((item["prompt"] if "prompt" in item else item["turns"][0]) + "")
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as e:
            raise ModelError(
                f"--data {path}, line {i}: expected a JSON object with a text field text, or prompt"
            ) from e


#
# which sequences there will be
#


def plan_jobs(
    data: Data,
    base: Base,
    n_tokens: int,
    n_held_out: int,
    temps: Sequence[float],
    own: float,
    seed: int,
) -> Iterator[Job]:
    """Sequences to train on, without end: held-out ones first, then as the data lasts, over and over.

    Documents are cut into pieces of the sequence length. Of `own` of them only the beginning is kept, and the model
    writes the rest, as it does with every prompt. Without data, its texts go on from a word or two, or from nothing.
    Held-out sequences are the model's own continuations, since that is what heads must foresee, of data that is not
    trained on.
    """
    rng = np.random.default_rng([seed, 1])
    length = base.seq_len
    pieces: list[npt.NDArray[np.int32]] = []
    for text in rng.permutation(np.array(data.documents, dtype=object)):
        tokens = np.array(base.tokenize(text), dtype=np.int32)
        room = length - len(base.bos)
        pieces += [tokens[i : i + room] for i in range(0, len(tokens), room) if len(tokens) - i >= 16]
        if len(pieces) * length > 4 * n_tokens:  # more than enough
            break
    beginnings = [np.array(base.tokenize(text)[: length // 2], dtype=np.int32) for text in data.prompts]
    order = [*((p, True) for p in pieces), *((p, False) for p in beginnings)]
    rng.shuffle(order)
    if 0 < len(order) < 4:
        raise ModelError(
            f"--data: {data} are too few to hold some out; give more text, or leave --data out to train without any"
        )
    # a quarter of small data at most
    kept = order[: min(n_held_out, len(order) // 4)]
    rest = order[len(kept) :]

    def begin(piece: npt.NDArray[np.int32], document: bool) -> tuple[int, ...]:
        if document:
            piece = piece[: int(rng.integers(16, max(17, min(128, len(piece) // 2 + 1))))]
        return (*base.bos, *piece.tolist())

    openings = [base.tokenize(text) for text in OPENINGS]

    def made_up() -> tuple[int, ...]:
        opening = openings[int(rng.integers(len(openings)))]
        return (*base.bos, *opening) or (int(rng.integers(base.n_vocab)),)

    for i in range(n_held_out):
        given = begin(*kept[i % len(kept)]) if kept else made_up()
        yield Job(given, float(temps[i % len(temps)]), True)
    i = 0
    while True:
        temp = float(temps[i % len(temps)])
        if not rest:
            yield Job(made_up(), temp, False)
        else:
            piece, document = rest[i % len(rest)]
            if document and rng.random() >= own:
                yield Job((*base.bos, *piece.tolist()), None, False)
            else:
                yield Job(begin(piece, document), temp, False)
        i += 1


#
# what the base model writes
#


@dataclass
class _Slot:
    """A sequence that is being written."""

    job: Job
    index: int
    tokens: list[int]
    n_seen: int = 0  # tokens the model was given


def write(
    base: Base,
    jobs: Iterator[Job],
    first: int,
    seed: int,
) -> Iterator[tuple[int, Job, list[int]]]:
    """Let the model write sequences side by side: (index, job, tokens) of each as it is finished.

    A sequence ends with the model's end of text, at `base.seq_len` tokens, or where it only repeats itself.

    Args:
        first: index of the first job. What is drawn depends on `seed` and a job's index, not on the others.
    """
    free = list(range(base.n_seqs))
    for seq in free:
        base.forget(seq)
    slots: dict[int, _Slot] = {}
    counter = first
    waiting = True
    while waiting or slots:
        while waiting and free:
            job = next(jobs, None)
            if job is None:
                waiting = False
                break
            if job.temp is None:
                yield counter, job, list(job.tokens)
            else:
                slots[free.pop()] = _Slot(job, counter, list(job.tokens[: base.seq_len - 1]))
            counter += 1
        if not slots:
            continue
        seqs = list(slots)
        now = [slots[s] for s in seqs]
        logits = base.eval([s.tokens[s.n_seen] for s in now], [s.n_seen for s in now], seqs)
        grow = []
        for row, (seq, slot) in enumerate(zip(seqs, now, strict=True)):
            slot.n_seen += 1
            if slot.n_seen == len(slot.tokens):
                grow.append((row, seq, slot))
        if not grow:
            continue
        drawn = _draw(logits[[row for row, _, _ in grow]], [s for _, _, s in grow], seed)
        for (_, seq, slot), token in zip(grow, drawn, strict=True):
            slot.tokens.append(int(token))
            if token in base.eog or len(slot.tokens) >= base.seq_len or _loops(slot.tokens):
                yield slot.index, slot.job, slot.tokens
                base.forget(seq)
                del slots[seq]
                free.append(seq)


def _draw(logits: npt.NDArray[np.float32], slots: Sequence[_Slot], seed: int) -> npt.NDArray[np.int64]:
    """One token per row: the most probable at temperature 0, else a draw. Beginnings are made up at 1."""
    temps = np.array(
        [1.0 if len(s.job.tokens) < MADE_UP and len(s.tokens) < MAKE_UP else s.job.temp for s in slots],
        dtype=np.float32,
    )
    out = logits.argmax(axis=1)
    rows = np.flatnonzero(temps > 0)
    if len(rows):
        z = logits[rows] / temps[rows, None]
        z -= z.max(axis=1, keepdims=True)
        np.exp(z, out=z)
        total = np.cumsum(z, axis=1)
        for row, sums in zip(rows, total, strict=True):
            slot = slots[int(row)]
            at = _uniform(seed, slot.index, len(slot.tokens)) * sums[-1]
            out[row] = min(int(np.searchsorted(sums, at, side="right")), len(sums) - 1)
    return out


def _uniform(seed: int, index: int, position: int) -> float:
    """In [0, 1), the same for the same arguments: a text does not depend on what is written beside it."""
    digest = hashlib.blake2b(f"{seed} {index} {position}".encode(), digest_size=7).digest()
    return int.from_bytes(digest, "little") / 2.0**56


def _loops(tokens: Sequence[int]) -> bool:
    """The last LOOP tokens are one short text over and over."""
    if len(tokens) < LOOP or len(tokens) % 8:
        return False
    tail = tokens[-LOOP:]
    return any(tail[p:] == tail[:-p] for p in range(1, LONGEST_PERIOD + 1))


def gather(
    base: Base,
    jobs: Iterator[Job],
    n_tokens: int,
    folder: Path,
    seed: int,
    advance: Callable[[int], None],
) -> Texts:
    """Sequences of at least `n_tokens` tokens in all, kept in `folder` as they come, so that an interrupted run goes
    on.

    Of equal sequences one is kept.

    Args:
        advance: called with the number of tokens so far.
    """
    shards = sorted(folder.glob("text-*.npz"))
    done: list[Texts] = []
    first = 0
    for path in shards:
        with np.load(path, allow_pickle=False) as a:
            done.append(Texts(a["tokens"], a["lengths"], a["given"], a["held_out"]))
            first = int(a["next"])
    known = {t[i].tobytes() for t in done for i in range(len(t.lengths))}
    count = sum(len(t.tokens) for t in done)
    advance(count)
    for _ in range(first):  # what was written before
        next(jobs)

    pending: dict[int, tuple[Job, list[int]]] = {}
    upcoming = first
    shard: list[tuple[Job, list[int]]] = []

    def save() -> None:
        nonlocal shard
        if not shard:
            return
        texts = Texts(
            np.concatenate([np.array(t, dtype=np.int32) for _, t in shard]),
            np.array([len(t) for _, t in shard], dtype=np.int64),
            np.array([len(t) if j.temp is None else len(j.tokens) for j, t in shard], dtype=np.int64),
            np.array([j.held_out for j, _ in shard], dtype=bool),
        )
        from ..common.atomic import atomic_path

        with atomic_path(folder / f"text-{len(done):05}.npz") as temporary, open(temporary, "wb") as file:
            np.savez(file, **texts.__dict__, next=np.array(upcoming))
        done.append(texts)
        shard = []

    if count < n_tokens:
        for index, job, tokens in write(base, jobs, first, seed):
            pending[index] = (job, tokens)
            while upcoming in pending:  # in the order of the jobs
                job, tokens = pending.pop(upcoming)
                upcoming += 1
                key = np.array(tokens, dtype=np.int32).tobytes()
                if key not in known and len(tokens) >= 8:
                    known.add(key)
                    shard.append((job, tokens))
                    count += len(tokens)
            advance(min(count, n_tokens))
            if len(shard) >= 256:
                save()
            if count >= n_tokens:
                break
            if upcoming - first > 64 and upcoming > 16 * len(known):
                raise ModelError(
                    "the base model writes the same text over and over; give --data, or higher --temps"
                )
        save()
    return Texts(
        np.concatenate([t.tokens for t in done]),
        np.concatenate([t.lengths for t in done]),
        np.concatenate([t.given for t in done]),
        np.concatenate([t.held_out for t in done]),
    )
