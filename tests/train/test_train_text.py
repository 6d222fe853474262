"""What the trainer reads and writes against references: teacher, text, data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the train extra)")
torch.set_num_threads(1)  # xdist workers share the cores

from entmtp.common.errors import ModelError  # noqa: E402
from entmtp.train import writing  # noqa: E402
from entmtp.train.base import Base, read_matrices  # noqa: E402
from entmtp.train.data import Data, read_data  # noqa: E402
from entmtp.train.jobs import Job, plan_jobs  # noqa: E402
from entmtp.train.rows import rows_of  # noqa: E402
from helpers.training import SEQ_LEN, opened, stored  # noqa: E402

pytestmark = pytest.mark.torch


#
# teacher
#


def test_teacher_against_the_model(base: Base, tmp_path: Path) -> None:
    """Hidden states and distributions are those of plain decoding with the same file: of documents, which are read, and
    of what is written side by side."""
    rng = np.random.default_rng(0)
    given = [tuple(map(int, rng.integers(0, base.n_vocab, n))) for n in (SEQ_LEN, 20, 8, 33, 9, 12)]
    temps = (None, None, None, None, 0.0, 1.0)
    jobs = [Job(tokens, temp, False) for tokens, temp in zip(given, temps, strict=True)]
    texts, states = stored(tmp_path, base, iter(jobs), 10000, 4)
    assert texts.lengths[:4].tolist() == texts.given[:4].tolist() == [SEQ_LEN, 20, 8, 33]
    assert len(texts.lengths) == 6 and all(texts.lengths[4:] > texts.given[4:])
    _, output = read_matrices(Path(base.llm.model_path))
    with opened(
        base.llm.model_path, n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, logits_all=True
    ) as llm:
        for start, length in zip(texts.starts, texts.lengths, strict=False):
            part = slice(int(start), int(start + length))
            llm.reset()
            llm.eval(texts.tokens[part].tolist())
            logits = llm.scores[:length].astype(np.float64)
            p = np.exp(logits - logits.max(1, keepdims=True))
            p /= p.sum(1, keepdims=True)
            order = np.argsort(-p, axis=1)[:, :4]
            assert np.array_equal(np.take_along_axis(p, states.ids[part], 1), np.take_along_axis(p, order, 1))
            np.testing.assert_allclose(states.p[part, :4], np.take_along_axis(p, order, 1), rtol=2e-3)
            rest = p.sum(1) - np.take_along_axis(p, order, 1).sum(1)
            np.testing.assert_allclose(states.p[part, 4], rest, rtol=2e-3)
            # the hidden state is the input of the LM head
            np.testing.assert_allclose(states.hidden[part].astype(np.float32) @ output.T, logits, atol=0.05)


@pytest.mark.parametrize("n_vocab", [5, 64, 320, 1000, 49152])
def test_most_probable_tokens(n_vocab: int) -> None:
    """The blocks that are looked through hold all of them, also where logits are equal."""
    rng = np.random.default_rng(n_vocab)
    logits = rng.normal(0, 3, (11, n_vocab)).astype(np.float32)
    logits[3] = np.round(logits[3])
    logits[4, :] = 1.5
    k = min(8, n_vocab)
    rows = rows_of(np.zeros((11, 4), np.float32), logits.copy(), k)
    z = logits.astype(np.float64)
    p = np.exp(z - z.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    for row in range(11):
        order = np.argsort(-logits[row], kind="stable")[:k]
        assert np.array_equal(logits[row, rows.ids[row]], logits[row, order])
        assert len(set(rows.ids[row])) == k
        np.testing.assert_allclose(rows.p[row, :k], p[row, rows.ids[row]], rtol=1e-4)
        np.testing.assert_allclose(rows.p[row, k], 1 - p[row, rows.ids[row]].sum(), atol=1e-4)


def test_rows_behind_the_last_shard_are_written_over(base: Base, tmp_path: Path) -> None:
    """A killed run leaves rows that no shard tells of; the run after it ends with the same text and states."""

    def jobs() -> Iterator[Job]:
        return plan_jobs(Data((), ()), base, 2000, 2, (0.0, 1.0), 0.5, 0.0, 3, False)

    texts, states = stored(tmp_path, base, jobs(), 2000)
    whole = {name: np.array(getattr(states, name)) for name in ("hidden", "ids", "p")}
    for path in tmp_path.glob("text-*.npz"):
        path.unlink()
    with open(tmp_path / "states.hidden", "r+b") as file:
        file.write(b"\x55" * 4096)
    again, states = stored(tmp_path, base, jobs(), 2000)
    assert np.array_equal(again.tokens, texts.tokens)
    assert all(np.array_equal(getattr(states, name), whole[name]) for name in whole)


#
# text
#


def test_written_text_is_the_models_own(base: Base) -> None:
    """Side by side and at temperature 0: what plain greedy decoding writes."""
    rng = np.random.default_rng(2)
    jobs = [Job(tuple(map(int, rng.integers(0, 256, 8 + i))), 0.0, False) for i in range(6)]
    with opened(base.llm.model_path, n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False) as llm:
        seen = 0
        for index, job, tokens, n_given, rows in writing.write(base, iter(jobs), 0, 0, 4):
            assert n_given == len(job.tokens) and len(rows.ids) == len(tokens)
            plain = list(job.tokens)
            for token in llm.generate(job.tokens, temp=0.0):
                plain.append(token)
                if len(plain) >= len(tokens):
                    break
            assert job is jobs[index]
            assert tokens == plain
            seen += 1
    assert seen == len(jobs)


def test_written_text_does_not_depend_on_its_neighbours(base: Base) -> None:
    jobs = [Job((5, i + 1), 1.0, False) for i in range(12)]
    together = {w.number: w.tokens for w in writing.write(base, iter(jobs), 0, 7, 4)}
    late = {w.number: w.tokens for w in writing.write(base, iter(jobs[8:]), 8, 7, 4)}
    assert late == {i: together[i] for i in range(8, 12)}
    other = {w.number: w.tokens for w in writing.write(base, iter(jobs), 0, 8, 4)}
    assert other != together


@pytest.mark.parametrize("top", [[0], [0, 1], [0, 1, 2, 3]])
def test_draws_follow_the_distribution(top: list[int]) -> None:
    """However many of the tokens are laid out first."""
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], dtype=np.float32))
    counts = np.zeros(4)
    for i in range(4000):
        u = writing.uniform(0, i, 2)
        counts[writing.draw(logits, np.array(top, np.int32), 1.0, u)] += 1
    np.testing.assert_allclose(counts / 4000, [0.5, 0.25, 0.125, 0.125], atol=0.03)
    assert writing.draw(logits, np.array(top, np.int32), 0.0, 0.99) == 0


def test_a_model_asks_itself(base: Base) -> None:
    """The question ends at an end of text or when it is long, then comes what stands between it and the answer."""
    closing = (7, 8, 9)
    for w in writing.write(base, iter([Job((5, 6), 0.8, False, closing)] * 6), 0, 1, 4):
        if w.n_given == len(w.tokens) == SEQ_LEN:  # no room for an answer
            continue
        at = w.n_given - len(closing)
        assert tuple(w.tokens[at : w.n_given]) == closing
        assert not base.eog & set(w.tokens[2:at])


def test_loops_are_found() -> None:
    assert writing.loops([1, 2, 3] * 16)
    assert writing.loops([9, 8, *([7] * 54)])
    assert not writing.loops(list(range(48)))
    assert not writing.loops([1, 2, 3] * 15)  # too short to say


def test_gather_goes_on_and_drops_copies(base: Base, tmp_path: Path) -> None:
    data = Data(tuple(f"the text number {i} " * 6 for i in range(8)), ())

    def jobs() -> Iterator[Job]:
        return plan_jobs(data, base, 2000, 2, (0.0, 1.0), 0.5, 0.0, 3, False)

    whole, _ = stored(tmp_path, base, jobs(), 2000)
    again, _ = stored(tmp_path, base, jobs(), 2000)
    assert np.array_equal(whole.tokens, again.tokens)
    more, _ = stored(tmp_path, base, jobs(), 3000)
    assert np.array_equal(more.tokens[: len(whole.tokens)], whole.tokens)
    assert len(more.tokens) >= 3000
    copies = [more[i].tobytes() for i in range(len(more.lengths))]
    assert len(set(copies)) == len(copies)
    assert more.held_out.sum() == 2
    # held-out documents are not trained on
    held = {base.llm.detokenize(more[i][: more.given[i]].tolist()) for i in np.flatnonzero(more.held_out)}
    rest = {base.llm.detokenize(more[i].tolist()) for i in np.flatnonzero(~more.held_out)}
    assert not any(text.startswith(h) for h in held for text in rest)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", b"", "there is no text in it"),
        ("a.txt", b"\xff\xfe\x00", "no UTF-8 text"),
        ("a.jsonl", b'{"prompt": 3}', "line 1: expected a JSON object with text"),
        ("a.jsonl", b'{"text": "fine"}\n[1]', "line 2"),
        ("a.jsonl", b"{", "line 1"),
        ("a.jsonl", b'{"turns": []}', "line 1"),
    ],
)
def test_bad_data(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelError, match=said):
        read_data([str(tmp_path / name)])


def test_a_folder_of_data(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.md").write_text("one")
    (tmp_path / "inner" / "b.py").write_text("two")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\xff")
    (tmp_path / "p.jsonl").write_text('{"prompt": "three"}\n\n{"turns": ["four", "x"]}\n{"text": "five"}\n')
    data = read_data([str(tmp_path / "inner"), str(tmp_path / "p.jsonl")])
    assert data.documents == ("two", "five") and [q.turns for q in data.prompts] == [
        ("three",),
        ("four", "x"),
    ]
    assert set(read_data([str(tmp_path)]).documents) >= {"one", "two"}
    with pytest.raises(ModelError, match="no such file or folder"):
        read_data([str(tmp_path / "missing")])
