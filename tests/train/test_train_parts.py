"""Pieces of the trainer against references: losses and gradients, heads, ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the train extra)")
torch.set_num_threads(1)  # xdist workers share the cores

from entmtp.bank.traces import MAX_RANK  # noqa: E402
from entmtp.measure.rollouts import rollout  # noqa: E402
from entmtp.measure.search import expected, node_probabilities  # noqa: E402
from entmtp.native.heads import Heads  # noqa: E402
from entmtp.train import heads as train_heads  # noqa: E402
from entmtp.train import loss as train_loss  # noqa: E402
from entmtp.train.base import Base, read_matrices  # noqa: E402
from entmtp.train.data import Data  # noqa: E402
from entmtp.train.evaluation import HeldOut, Teacher, acceptance, held_out, judge  # noqa: E402
from entmtp.train.export import export, rounded  # noqa: E402
from entmtp.train.heads import Shape, before_projection, initial, prefix_layer  # noqa: E402
from entmtp.train.jobs import plan_jobs  # noqa: E402
from entmtp.train.loop import Trainer  # noqa: E402
from entmtp.train.options import Settings  # noqa: E402
from helpers.heads_reference import hydra_logits, medusa_logits, prefix_forward  # noqa: E402
from helpers.training import opened, stored  # noqa: E402

pytestmark = pytest.mark.torch

ARCHS = ("medusa", "hydra", "hydra++")


def shape_of(arch: str, lm_head: str = "own", n_layers: int = 2, n_embd: int = 64) -> Shape:
    return Shape(
        arch, 3, n_layers, n_embd, lm_head, n_head=4, n_head_kv=2, n_ff=96, rms_eps=1e-5, rope_base=10000.0
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
    total = 0.0
    for row in range(len(x)):
        known = ids[row] >= 0
        others = [t for t in range(len(weight)) if t not in ids[row].tolist()]
        total = total - (p[row, :-1][known] * q[row, ids[row][known]].log()).sum()
        total = total - p[row, -1] * q[row, others].sum().log()
    return total / len(x)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("mass", [1.0, 0.6])
@pytest.mark.parametrize("unknown", [0.0, 0.4, 1.0])
def test_loss_and_gradient(
    monkeypatch: pytest.MonkeyPatch, with_bias: bool, mass: float, unknown: float
) -> None:
    """Against plain PyTorch in float64, over several pieces; a cut vocabulary has less than all of the mass."""
    monkeypatch.setattr(train_loss, "PIECE_BYTES", 4 * 50 * 32)  # 32 rows at a time
    g = torch.Generator().manual_seed(1)
    n, d, v, k = 77, 12, 50, 5
    x, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((n, d), (v, d), (v,)))
    ids = torch.stack([torch.randperm(v, generator=g)[:k] for _ in range(n)])
    p = torch.rand(n, k + 1, generator=g, dtype=torch.float64)
    p *= mass / p.sum(1, keepdim=True)
    cut = torch.rand(n, k, generator=g) < unknown  # tokens that heads cannot propose
    ids[cut] = -1
    p[:, :-1][cut] = 0.0
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


@pytest.mark.parametrize("unknown", [0.0, 0.4, 1.0])
def test_loss_of_logits(unknown: float) -> None:
    """Of each row what `projected_loss` gives of it."""
    g = torch.Generator().manual_seed(5)
    n, d, v, k = 21, 12, 50, 5
    x, weight = torch.randn(n, d, generator=g), torch.randn(v, d, generator=g)
    ids = torch.stack([torch.randperm(v, generator=g)[:k] for _ in range(n)])
    p = torch.softmax(torch.randn(n, k + 1, generator=g), 1)
    cut = torch.rand(n, k, generator=g) < unknown
    ids[cut], p[:, :-1][cut] = -1, 0.0
    rows = [
        train_loss.projected_loss(x[i : i + 1], weight, None, ids[i : i + 1], p[i : i + 1]) for i in range(n)
    ]
    torch.testing.assert_close(
        train_loss.loss_of(x @ weight.T, ids, p), torch.stack(rows), rtol=1e-5, atol=1e-6
    )


def test_held_out_loss(prepared: Any) -> None:
    """Of every head the mean over the tokens that the model wrote, by the formula written out."""
    texts, states, teacher = prepared
    shape = shape_of("hydra")
    state = shaken(shape, teacher.output)
    found = held_out(shape, state, teacher, texts, states)
    assert found.temps == [float(t) for t in texts.temps[texts.held_out]]
    sums, counts = np.zeros(3), np.zeros(3)
    for i in map(int, np.flatnonzero(texts.held_out)):
        start, n, given = int(texts.starts[i]), int(texts.lengths[i]), int(texts.given[i])
        tokens = torch.from_numpy(texts[i].astype(np.int64))
        for head in range(3):
            for root in range(given, n - 1 - head):
                hidden = torch.from_numpy(states.hidden[start + root - 1].astype(np.float32))
                x = torch.cat([hidden, *teacher.embedding[tokens[root : root + head + 1]]])
                x = before_projection(shape, state, head, x[None])
                row = slice(start + root + head, start + root + head + 1)
                ids, p = (
                    torch.from_numpy(states.ids[row].astype(np.int64)),
                    torch.from_numpy(states.p[row].copy()),
                )
                weight, bias = teacher.projection(shape, state, head)
                sums[head] += float(plain_loss(x, weight, bias, ids, p))
                counts[head] += 1
    np.testing.assert_allclose(found.losses, sums / counts, rtol=1e-4)


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


@pytest.mark.parametrize("lm_head", ["own", "shared", "base"])
@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_of_a_step(prepared: Any, tmp_path: Path, arch: str, lm_head: str) -> None:
    """Heads one after the other give the gradient of the weighted sum, written out for single tokens."""
    texts, states, teacher = prepared
    shape = shape_of(arch, lm_head, n_layers=1)
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


@pytest.mark.parametrize("lm_head", ["own", "shared", "base"])
@pytest.mark.parametrize("arch", ARCHS)
def test_exported_heads_are_the_trained_ones(
    base: Base, prepared: Any, tmp_path: Path, arch: str, lm_head: str
) -> None:
    """GGUF, read by the library: the same logits as in training, and so the same acceptance."""
    texts, states, teacher = prepared
    shape = shape_of(arch, lm_head)
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
        shape = Shape(arch, 3, 1, 256, "own", 4, 2, 768, 1e-5, 10000.0)
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
    ranks, _ = judge(
        shape, plain, Teacher(embedding, output, None), hidden, torch.from_numpy(tokens).long(), len(prompt)
    )
    n = min(len(ranks), len(trace.ranks)) - 3
    assert n > 20
    same = (ranks[:n] == trace.ranks[:n]).mean()
    assert same > 0.95, same  # the cache is f32 here and f16 in training: near ties fall either way
    assert np.abs(np.minimum(ranks[:n], 8) - np.minimum(trace.ranks[:n], 8)).max() <= 2


def test_acceptance_of_known_ranks() -> None:
    one = np.array([[0, 0], [0, 5], [3, 0], [0, 0], [0, -1], [-1, -1]], dtype=np.int32)
    found = acceptance(HeldOut([one, one], [0.0, 0.0], (1.0, 2.0)))
    assert found.losses == (1.0, 2.0)
    assert found.by_depth == (0.75, 0.5)
    assert found.chain == pytest.approx(2.25)
    # every path that came true is in a tree of 16 nodes: all of them are accepted, as far as they are whole
    probabilities = node_probabilities(one[:4], max_rank=MAX_RANK)
    assert found.tree == pytest.approx(1 + expected(probabilities, probabilities))
