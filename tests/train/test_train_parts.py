"""Pieces of the trainer against references: losses and gradients, heads, teacher, ranks, text."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the train extra)")
torch.set_num_threads(1)  # xdist workers share the cores

import entmtp  # noqa: E402
from entmtp.bank.traces import MAX_RANK  # noqa: E402
from entmtp.common.errors import ModelError  # noqa: E402
from entmtp.measure.rollouts import rollout  # noqa: E402
from entmtp.measure.search import expected, node_probabilities  # noqa: E402
from entmtp.native.heads import Heads  # noqa: E402
from entmtp.train import heads as train_heads  # noqa: E402
from entmtp.train import loss as train_loss  # noqa: E402
from entmtp.train import writing  # noqa: E402
from entmtp.train.base import Base, read_matrices  # noqa: E402
from entmtp.train.data import Data, read_data  # noqa: E402
from entmtp.train.evaluation import Teacher, acceptance, ranks_of  # noqa: E402
from entmtp.train.export import export, rounded  # noqa: E402
from entmtp.train.heads import Shape, before_projection, initial, prefix_layer  # noqa: E402
from entmtp.train.jobs import Job, plan_jobs  # noqa: E402
from entmtp.train.loop import Trainer  # noqa: E402
from entmtp.train.options import Settings  # noqa: E402
from entmtp.train.rows import rows_of  # noqa: E402
from entmtp.train.states import Layout, States, Store, Texts  # noqa: E402
from entmtp.train.text import gather  # noqa: E402
from helpers.heads_reference import hydra_logits, medusa_logits, prefix_forward  # noqa: E402
from helpers.models import model_path  # noqa: E402

pytestmark = pytest.mark.torch

SEQ_LEN = 64
ARCHS = ("medusa", "hydra", "hydra++")


@pytest.fixture(scope="module")
def tiny() -> Path:
    """A llama of 64 dimensions and 320 tokens with random weights."""
    return model_path("llama")


@pytest.fixture(scope="module")
def base(tiny: Path) -> Iterator[Base]:
    base = Base(tiny, SEQ_LEN, n_threads=1)
    yield base
    base.close()


def opened(*args: Any, **settings: Any) -> Any:
    """A model, closed at the end of a block."""
    return contextlib.closing(entmtp.Llama(*args, **settings))


def shape_of(arch: str, share: bool = False, n_layers: int = 2, n_embd: int = 64) -> Shape:
    return Shape(
        arch, 3, n_layers, n_embd, share, n_head=4, n_head_kv=2, n_ff=96, rms_eps=1e-5, rope_base=10000.0
    )


def shaken(shape: Shape, output: Any, seed: int = 3) -> train_heads.State:
    """Heads that have left their beginning: noise on everything."""
    g = torch.Generator().manual_seed(seed)
    state = initial(shape, output, 1.0, 0)
    return {k: t + 0.1 * torch.randn(t.shape, generator=g) for k, t in state.items()}


#
# loss
#


def plain_loss(x: Any, weight: Any, bias: Any, ids: Any, p: Any) -> Any:
    """The formula of `train_loss`, written out with autograd."""
    q = torch.softmax(x @ weight.T + (0 if bias is None else bias), 1)
    known = q.gather(1, ids)
    others = torch.ones_like(q).scatter(1, ids, 0.0)
    rest = (q * others).sum(1)
    return -((p[:, :-1] * known.log()).sum(1) + p[:, -1] * rest.log()).mean()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mass", [1.0, 0.6])
def test_loss_and_gradient(monkeypatch: pytest.MonkeyPatch, with_bias: bool, mass: float) -> None:
    """Against plain PyTorch in float64, over several pieces; a cut vocabulary has less than all of the mass."""
    monkeypatch.setattr(train_loss, "PIECE_BYTES", 4 * 50 * 32)  # 32 rows at a time
    g = torch.Generator().manual_seed(1)
    n, d, v, k = 77, 12, 50, 5
    x, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, d), (v, d), (v,)))
    ids = torch.stack([torch.randperm(v, generator=g)[:k] for _ in range(n)])
    p = torch.rand(n, k + 1, generator=g, dtype=torch.float64)
    p *= mass / p.sum(1, keepdim=True)
    parts = [x, weight, bias if with_bias else None]
    for t in parts:
        if t is not None:
            t.requires_grad_(True)
    expected_loss = plain_loss(*parts, ids, p)
    expected_loss.backward()
    grads = [None if t is None else t.grad for t in parts]

    ours = [None if t is None else t.detach().float().requires_grad_(True) for t in parts]
    loss = train_loss.projected_loss(*ours, ids, p.float())
    (3 * loss).backward()  # gradients of what comes after are passed on
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-5)
    for mine, theirs in zip(ours, grads, strict=True):
        if theirs is not None:
            torch.testing.assert_close(mine.grad.double(), 3 * theirs, rtol=1e-4, atol=1e-7)


def test_loss_where_nothing_is_left_to_the_rest() -> None:
    """k is the whole vocabulary: cross-entropy, and no NaN from the logarithm of nothing."""
    g = torch.Generator().manual_seed(2)
    x, weight = torch.randn(9, 4, generator=g, requires_grad=True), torch.randn(6, 4, generator=g)
    p = torch.softmax(torch.randn(9, 6, generator=g), 1)
    ids = torch.arange(6).repeat(9, 1)
    loss = train_loss.projected_loss(x, weight, None, ids, torch.cat([p, torch.zeros(9, 1)], 1))
    loss.backward()
    assert loss.item() == pytest.approx(torch.nn.functional.cross_entropy(x @ weight.T, p).item(), rel=1e-6)
    assert torch.isfinite(x.grad).all()


def test_half_precision_products_are_close() -> None:
    g = torch.Generator().manual_seed(4)
    x, weight = torch.randn(64, 32, generator=g), torch.randn(100, 32, generator=g)
    ids = torch.stack([torch.randperm(100, generator=g)[:8] for _ in range(64)])
    p = torch.softmax(torch.randn(64, 9, generator=g), 1)
    exact = train_loss.projected_loss(x, weight, None, ids, p)
    half = train_loss.projected_loss(x, weight, None, ids, p, torch.bfloat16)
    assert half.item() == pytest.approx(exact.item(), rel=0.02)


#
# heads
#


@pytest.mark.parametrize("arch", ARCHS)
def test_heads_against_numpy(arch: str) -> None:
    """The forward pass that is trained is the one of the published layout."""
    shape = shape_of(arch)
    g = torch.Generator().manual_seed(5)
    output = torch.randn(40, 64, generator=g)
    state = shaken(shape, output)
    arrays = {k: t.numpy() for k, t in state.items()}
    hidden = torch.randn(10, 64, generator=g)
    path = torch.randn(10, shape.n_heads, 64, generator=g)
    config = json.loads(json.dumps(shape.config("x")))
    seen, reference = hidden, hidden.numpy()
    if shape.prefix:
        seen = prefix_layer(shape, state, hidden[None])[0]
        reference = prefix_forward(arrays, hidden.numpy(), np.arange(10), 4, 2)
        np.testing.assert_allclose(seen.numpy(), reference, atol=1e-5)
    for i in range(shape.n_heads):
        x = seen
        if shape.grounded:
            x = torch.cat([seen, path[:, : i + 1].reshape(10, -1)], 1)
        x = before_projection(shape, state, i, x)
        logits = x @ state[f"{shape.output(i)}.weight"].T + state.get(f"{shape.output(i)}.bias", 0)
        if arch == "medusa":
            wanted = medusa_logits(arrays, config, reference)[i]
        else:
            wanted = hydra_logits(arrays, config, i, reference, path[:, : i + 1].numpy())
        np.testing.assert_allclose(logits.numpy(), wanted, atol=1e-4)


@pytest.mark.parametrize("arch", ARCHS)
def test_heads_begin_as_the_base(arch: str) -> None:
    """Before training, heads say nearly what the LM head says of the hidden state."""
    shape = shape_of(arch)
    g = torch.Generator().manual_seed(6)
    hidden = torch.nn.functional.normalize(torch.randn(7, 64, generator=g)) * 8.0  # root mean square 1
    state = initial(shape, torch.randn(40, 64, generator=g), 1.0, 0)
    seen = prefix_layer(shape, state, hidden[None])[0] if shape.prefix else hidden
    x = torch.cat([seen, torch.zeros(7, 64)], 1) if shape.grounded else seen
    torch.testing.assert_close(before_projection(shape, state, 0, x), hidden, atol=1e-3, rtol=1e-3)


#
# teacher
#


def stored(folder: Path, base: Base, jobs: Iterator[Job], n_tokens: int, k: int = 8) -> tuple[Texts, States]:
    """Texts and states of so many tokens."""
    with contextlib.closing(Store(folder, Layout(n_tokens + SEQ_LEN, base.n_embd, k))) as store:
        gather(base, jobs, n_tokens, store, 3, lambda n: None)
        return store.opened()


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


#
# training and what comes of it
#


@pytest.fixture(scope="module")
def prepared(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Teacher]:
    """Texts, states and teacher of the tiny model."""
    folder = tmp_path_factory.mktemp("work")
    jobs = plan_jobs(Data((), ()), base, 4000, 6, (0.0, 1.0), 0.5, 0.0, 0, False)
    texts, states = stored(folder, base, jobs, 4000)
    embedding, output = map(torch.from_numpy, read_matrices(Path(base.llm.model_path)))
    return texts, states, Teacher(embedding, output, None)


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_of_a_step(prepared: Any, tmp_path: Path, arch: str) -> None:
    """Heads one after the other give the gradient of the weighted sum, written out for single tokens."""
    texts, states, teacher = prepared
    shape = shape_of(arch, n_layers=1)
    trainer = Trainer(shape, Settings(batch_tokens=150), 1, teacher, texts, states, tmp_path, "d")
    state = shaken(shape, teacher.output)
    with torch.no_grad():
        for name, t in trainer.state.items():
            t.copy_(state[name])
    seqs = next(trainer.sequences())
    losses = trainer.gradients(trainer.batch(seqs))

    plain = {k: t.detach().clone().requires_grad_(True) for k, t in trainer.state.items()}
    sums, counts = [0.0] * 3, [0] * 3
    for seq in seqs:
        start, n = int(texts.starts[seq]), int(texts.lengths[seq])
        hidden = torch.from_numpy(states.hidden[start : start + n].astype(np.float32))
        tokens = torch.from_numpy(texts[int(seq)].astype(np.int64))
        seen = prefix_layer(shape, plain, hidden[None])[0] if shape.prefix else hidden
        for i in range(3):
            for t in range(n - 1 - i):
                x = seen[t]
                if shape.grounded:
                    x = torch.cat([x, *teacher.embedding[tokens[t + 1 : t + 2 + i]]])
                x = before_projection(shape, plain, i, x[None])
                weight, bias = teacher.projection(shape, plain, i)
                row = start + t + 1 + i
                ids = torch.from_numpy(states.ids[row : row + 1].astype(np.int64))
                p = torch.from_numpy(np.array(states.p[row : row + 1]))
                sums[i] = sums[i] + plain_loss(x, weight, bias, ids, p)
                counts[i] += 1
    means = [s / c for s, c in zip(sums, counts, strict=True)]
    sum(m * 0.8**i for i, m in enumerate(means)).backward()  # type: ignore[union-attr]
    np.testing.assert_allclose(losses, [m.item() for m in means], rtol=1e-4)
    for name, t in trainer.state.items():
        torch.testing.assert_close(t.grad, plain[name].grad, rtol=2e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("arch", ARCHS)
def test_exported_heads_are_the_trained_ones(
    base: Base, prepared: Any, tmp_path: Path, arch: str, share: bool
) -> None:
    """GGUF, read by the library: the same logits as in training, and so the same acceptance."""
    texts, states, teacher = prepared
    shape = shape_of(arch, share)
    state = rounded(shaken(shape, teacher.output))
    model = Path(base.llm.model_path)
    folder, outfile = tmp_path / "heads", tmp_path / "heads.gguf"
    export(folder, outfile, shape, state, model, "tiny", teacher.output, None, "f32", {"steps": 3})
    plain = {k: t.float() for k, t in state.items()}
    index = int(np.flatnonzero(texts.held_out)[0])
    start, n = int(texts.starts[index]), int(texts.lengths[index])
    hidden = torch.from_numpy(states.hidden[start : start + n].astype(np.float32))
    tokens = texts[index]
    native = Heads(outfile, base.llm.model, 1)
    try:
        assert bool(native.info.prefix) == shape.prefix
        seen = prefix_layer(shape, plain, hidden[None])[0] if shape.prefix else hidden
        for t in range(n - 4):
            h = native.prefix(hidden[t : t + 1].numpy(), t) if shape.prefix else hidden[t].numpy()
            if shape.prefix:
                np.testing.assert_allclose(h, seen[t].numpy(), atol=1e-4)
            for i in range(3):
                x = seen[t]
                if shape.grounded:
                    x = torch.cat([x, *teacher.embedding[tokens[t + 1 : t + 2 + i].astype(np.int64)]])
                x = before_projection(shape, plain, i, x[None])
                weight, bias = teacher.projection(shape, plain, i)
                logits = (x @ weight.T + (0 if bias is None else bias))[0]
                np.testing.assert_allclose(
                    native.logits(i, h, tokens[t + 1 : t + 2 + i].tolist()), logits.numpy(), atol=2e-3
                )
    finally:
        native.close()


@pytest.mark.parametrize("arch", ARCHS)
def test_acceptance_against_traces(load: Any, models: dict[str, Path], tmp_path: Path, arch: str) -> None:
    """Ranks in training are those that measure/rollouts.py records with the library, on the demo model's own text."""
    with opened(
        models["f32"], n_ctx=256, type_k=0, type_v=0, n_threads=1, n_threads_batch=1, verbose=False
    ) as llm:
        embedding, output = map(torch.from_numpy, read_matrices(models["f32"]))
        shape = Shape(arch, 3, 1, 256, False, 4, 2, 768, 1e-5, 10000.0)
        g = torch.Generator().manual_seed(8)
        state = initial(shape, output, 1.0, 0)
        state = rounded({k: t + 0.01 * torch.randn(t.shape, generator=g) for k, t in state.items()})
        export(
            tmp_path / "h", tmp_path / "h.gguf", shape, state, models["f32"], "demo", output, None, "f32", {}
        )
        prompt = llm.tokenize(b"Question: There are 3 cars in the parking lot")
    settings = {
        "n_ctx": 256,
        "type_k": 0,
        "type_v": 0,
        "n_threads": 1,
        "n_threads_batch": 1,
        "verbose": False,
    }
    with opened(
        models["f32"], draft="entmtp", heads=tmp_path / "h.gguf", policy="off", calibrate=False, **settings
    ) as llm:
        trace = rollout(llm, prompt, 40, temp=0.0)
        written = [int(t) for t in llm.input_ids[: llm.n_tokens]]
    base = Base(models["f32"], 256, 1)
    try:
        tokens = np.array(written, dtype=np.int32)
        base.eval(tokens.tolist(), range(len(tokens)), [0] * len(tokens))
        hidden = torch.from_numpy(base.hidden(len(tokens)).copy())
    finally:
        base.close()
    plain = {k: t.float() for k, t in state.items()}
    ranks = ranks_of(
        shape, plain, Teacher(embedding, output, None), hidden, torch.from_numpy(tokens).long(), len(prompt)
    )
    n = min(len(ranks), len(trace.ranks)) - 3
    assert n > 20
    same = (ranks[:n] == trace.ranks[:n]).mean()
    assert same > 0.95, same  # the cache is f32 here and f16 in training: near ties fall either way
    assert np.abs(np.minimum(ranks[:n], 8) - np.minimum(trace.ranks[:n], 8)).max() <= 2


def test_acceptance_of_known_ranks() -> None:
    one = np.array([[0, 0], [0, 5], [3, 0], [0, 0], [0, -1], [-1, -1]], dtype=np.int32)
    found = acceptance([one, one])
    assert found.by_depth == (0.75, 0.5)
    assert found.chain == pytest.approx(2.25)
    # every path that came true is in a tree of 16 nodes: all of them are accepted, as far as they are whole
    probabilities = node_probabilities(one[:4], max_rank=MAX_RANK)
    assert found.tree == pytest.approx(1 + expected(probabilities, probabilities))
