"""`entmtp train --arch eagle3`: a layer that computes what its definition says, and drafts as it was trained."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (the train extra)")
torch.set_num_threads(1)  # xdist workers share the cores

import entmtp  # noqa: E402
from entmtp.bank.bank import Bank  # noqa: E402
from entmtp.bank.tree import PLAIN, Tree  # noqa: E402
from entmtp.common.errors import ModelError  # noqa: E402
from entmtp.models.base import read_base  # noqa: E402
from entmtp.train.base import Base, read_matrices  # noqa: E402
from entmtp.train.cli import main  # noqa: E402
from entmtp.train.eagle3 import before_projection, initial, layer_for, read_last, scale_of, unroll  # noqa: E402
from entmtp.train.eagle3_loop import LayerTrainer  # noqa: E402
from helpers.eagle3 import INPUTS, foresee, layer_inputs, write_eagle3  # noqa: E402
from helpers.models import EXPERTS, model_path, write_model  # noqa: E402

pytestmark = pytest.mark.torch

TEXTS = [[5, 6, 7, 8, 9, 30, 31], list(range(40, 60)), [7] * 5]
TINY = ("--tokens", "3000", "--seq-len", "64", "--held-out", "6", "--batch-tokens", "300", "--heads", "3")


def arguments(model: Path, outfile: Path, *more: str) -> list[str]:
    return ["--model", str(model), "-o", str(outfile), "--arch", "eagle3", "--threads", "1", *TINY, *more]


def test_inputs_of_layers_side_by_side(tiny: Path) -> None:
    """Of several sequences in passes of mixed lengths, in the order of the tokens: those that numpy computes."""
    with closing(Base(tiny, 64, n_threads=1, layers=(0, 1))) as base:
        found: list[list[Any]] = [[] for _ in TEXTS]
        for i, text in enumerate(TEXTS):
            base.eval(text[:3], range(3), [i] * 3)
            found[i].extend(base.hidden(3))
        for at in range(3, 20):
            seqs = [i for i, text in enumerate(TEXTS) if at < len(text)]
            base.eval([TEXTS[i][at] for i in seqs], [at] * len(seqs), seqs)
            for i, row in zip(seqs, base.hidden(len(seqs)), strict=True):
                found[i].append(row)
    for text, rows in zip(TEXTS, found, strict=True):
        expected = np.concatenate(layer_inputs(tiny, text), -1)
        np.testing.assert_allclose(np.array(rows), expected, atol=2e-3 * np.abs(expected).max())


def test_one_step_is_the_layer_of_the_definition(tiny: Path, tmp_path: Path) -> None:
    _, weights = write_eagle3(tiny, tmp_path / "layer.gguf")
    layer = layer_for(read_base(tiny), 1)
    text = list(range(20, 60))
    state = {name: torch.from_numpy(values) for name, values in weights.items()}
    features = np.concatenate([layer_inputs(tiny, text)[i] for i in INPUTS], -1)
    embedded = torch.from_numpy(read_matrices(tiny)[0][text])
    (x,) = unroll(layer, state, embedded[None], torch.from_numpy(features).float()[None], 1)
    logits = before_projection(layer, state, x[0]) @ state["output"].T
    best = foresee(tiny, weights, text)[1:]
    first = 320 - logits.shape[1]  # token that can be proposed
    assert np.array_equal(logits.argmax(-1).numpy() + first, best[:, 0])


def test_steps_are_what_drafting_after_every_token_would_give(tiny: Path) -> None:
    """All steps of all tokens at once, against one token after the other: features up to it, then its own results."""
    layer = layer_for(read_base(tiny), 3)
    g = torch.Generator().manual_seed(1)
    state = {name: 0.3 * torch.randn(size, generator=g) for name, size in layer.shapes(20).items()}
    embedded, features = torch.randn(12, 64, generator=g), torch.randn(12, 192, generator=g)
    steps = list(unroll(layer, state, embedded[None], features[None], 3))
    for t in range(9):
        x = features[: t + 1] @ state["fc"].T
        for step in range(3):
            # a layer over rows 0 .. t + step, of which the last ones are its own results
            rows = x[None]
            again = {**state, "fc": torch.eye(64)}
            padded = torch.cat([rows, torch.zeros(1, 1, 64)], 1)
            (y,) = unroll(layer, again, embedded[None, : t + step + 2], padded, 1)
            assert torch.allclose(y[0, -1], steps[step][0, t], atol=1e-4)
            x = torch.cat([x, y[0, -1:]])


def test_it_begins_as_the_last_layer(tiny: Path) -> None:
    """What it says at first of token t + 2 is what the model says of token t + 1, whose last layer it is."""
    layer = layer_for(read_base(tiny), 1)
    embedding, output = map(torch.from_numpy, read_matrices(tiny))
    text = list(range(20, 60))
    with closing(Base(tiny, 64, n_threads=1, layers=layer.inputs)) as base:
        logits = torch.from_numpy(base.eval(text, range(40), [0] * 40).copy())
        features = base.hidden(40)
    scale = scale_of(features)
    state = initial(layer, read_last(tiny, layer), output, features, scale, 0)
    for name in ("attn_q", "attn_k", "attn_v"):
        state[name][:, :64] = 0.0  # the noise
    (x,) = unroll(layer, state, embedding[text][None], torch.from_numpy(features)[None] / scale, 1)
    ours = before_projection(layer, state, x[0]) @ output.T
    near = torch.nn.functional.cosine_similarity(ours, logits[:-1])
    assert near.min() > 0.97, near


class Layer:
    """A layer file in PyTorch, with what it goes on from."""

    def __init__(self, base: Path, path: Path) -> None:
        self.layer = layer_for(read_base(base), 1)
        reader = gguf.GGUFReader(path)
        assert tuple(reader.fields["eagle3.target_layers"].contents()) == self.layer.inputs
        found = {
            t.name.removeprefix("blk.0.").removesuffix(".weight"): torch.tensor(
                gguf.quants.dequantize(t.data, t.tensor_type) if t.name != "d2t" else np.array(t.data)
            )
            for t in reader.tensors
        }
        self.d2t = found.pop("d2t", None)
        self.state = found
        self.embedding = torch.from_numpy(read_matrices(base)[0])
        self.base = Base(base, 256, n_threads=1, layers=self.layer.inputs)

    def chain(self, text: list[int], n: int) -> list[int]:
        """Its best guesses in a row after a text."""
        self.base.forget(0)
        self.base.eval(text[:-1], range(len(text) - 1), [0] * (len(text) - 1))
        features = torch.from_numpy(self.base.hidden(len(text) - 1))
        guesses: list[int] = []
        for i in range(n):
            embedded = self.embedding[text + guesses]
            padded = torch.cat([features, torch.zeros(1 + i, features.shape[1])])
            *_, x = unroll(self.layer, self.state, embedded[None], padded[None], i + 1)
            best = int(
                (before_projection(self.layer, self.state, x[0, -1]) @ self.state["output"].T).argmax()
            )
            guesses.append(best if self.d2t is None else int(self.d2t[best]))
        return guesses


@pytest.mark.parametrize("draft_vocab", [(), ("--draft-vocab", "100")])
def test_trained_layer_drafts_as_it_was_trained(
    tiny: Path, tmp_path: Path, draft_vocab: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    """A short training: the file loads, its chains are PyTorch's, and the text stays the model's."""
    outfile = tmp_path / "layer.gguf"
    assert main(arguments(tiny, outfile, "--outtype", "f32", "--epochs", "2", *draft_vocab)) == 0
    assert "tokens per step" in capsys.readouterr().err
    fields = gguf.GGUFReader(outfile).fields
    assert fields["general.architecture"].contents() == fields["entmtp.train.arch"].contents() == "eagle3"
    assert not (tmp_path / "layer.gguf.train").exists()

    settings: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
    chain = Tree.from_paths("chain", [[0], [0, 0], [0, 0, 0]])
    drafting = {
        "draft": "entmtp",
        "draft_model": outfile,
        "policy": "static",
        "trees": Bank("chain", (PLAIN, chain)),
    }
    reference = Layer(tiny, outfile)
    n_compared = 0
    with (
        closing(entmtp.Llama(tiny, **settings)) as plain,
        closing(entmtp.Llama(tiny, **settings, **drafting)) as llm,
    ):
        texts: list[list[int]] = []
        for m in (plain, llm):
            walk = m.generate([5, 6, 7], temp=0.0)
            text = [5, 6, 7]
            for _ in range(60):
                text.append(next(walk))
                if m is llm and len(nodes := llm.decoder.walk().nodes) == 4:
                    root = llm.decoder.walk().n_past
                    if root == len(text) - 2:  # a step just now
                        assert nodes["token"][1:].tolist() == reference.chain(text[:-1], 3), root
                        n_compared += 1
            walk.close()
            texts.append(text)
    reference.base.close()
    assert texts[0] == texts[1]
    assert n_compared > 10


def test_training_helps(models: dict[str, Path], tmp_path: Path) -> None:
    """A few steps on the demo model lift held-out tokens per step well above one; drafts are right as often then."""
    outfile = tmp_path / "layer.gguf"
    argv = [
        "--model", str(models["q8_0"]), "-o", str(outfile), "--arch", "eagle3", "--threads", "1", "--tokens", "16k",
        "--held-out", "12", "--seq-len", "128", "--batch-tokens", "512", "--epochs", "2", "--heads", "2",
    ]  # fmt: skip
    assert main(argv) == 0
    found = gguf.GGUFReader(outfile)
    assert float(found.fields["entmtp.train.chain"].contents()) > 1.2
    assert {t.name: t.tensor_type.name for t in found.tensors}["fc.weight"] == "Q8_0"


def test_resumed_training_ends_with_the_same_layer(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, resumed = tmp_path / "whole.gguf", tmp_path / "resumed.gguf"
    assert main(arguments(tiny, whole, "--epochs", "1")) == 0
    update = LayerTrainer.update

    def stop(self: LayerTrainer) -> None:
        if self.step == 6:
            raise KeyboardInterrupt
        update(self)

    with monkeypatch.context() as m:
        m.setattr(LayerTrainer, "update", stop)
        assert main(arguments(tiny, resumed, "--epochs", "1")) == 130
    assert main(arguments(tiny, resumed, "--epochs", "1")) == 1
    assert "go on with --resume" in capsys.readouterr().err
    assert not resumed.exists()
    assert main(arguments(tiny, resumed, "--epochs", "1", "--resume")) == 0
    assert "(after 6)" in capsys.readouterr().err
    ours, theirs = ({t.name: np.array(t.data) for t in gguf.GGUFReader(p).tensors} for p in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("model", "more", "message"),
    [
        ("llama", ["--layers", "2"], "--layers is not for an EAGLE-3 layer; leave it out"),
        ("llama", ["--share-lm-head"], "--lm-head base is not for an EAGLE-3 layer; leave it out"),
        ("llama", ["--torch-dir", "folder"], "--torch-dir is not for an EAGLE-3 layer; leave it out"),
        (
            "qwen3",
            [],
            "an EAGLE-3 layer is trained for the architecture llama, and this is qwen3; train --arch",
        ),
    ],
)
def test_what_cannot_be_trained_is_said_at_once(
    tmp_path: Path, model: str, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(model_path(model), tmp_path / "layer.gguf", *more)) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_mixture_of_experts_has_no_layer_to_begin_as(tmp_path: Path) -> None:
    path = write_model(tmp_path / "experts.gguf", EXPERTS["mixtral"])
    with pytest.raises(ModelError, match=r"no tensor blk.1.ffn_gate.weight as dense layers have it"):
        layer_for(read_base(path), 1)
