"""Models that draft, smaller ones and a model's own prediction layers: the same text, whatever they say."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from entmtp import Bank, Engine, EntmtpError, Llama
from entmtp.bank import PLAIN, Tree
from entmtp.doctor import probes
from entmtp.models.nextn import prediction_layers
from entmtp.options.demo import demo_files
from helpers.eagle3 import DRAFT_VOCAB, Weights, foresee, write_eagle3
from helpers.forced import draft_a_lot
from helpers.hybrids import hybrid_path
from helpers.models import EXPERTS, LATENT_NEXTN, SPECS, model_path, write_model
from helpers.nextn import predict, random_layer, shapes_of, with_nextn
from helpers.typed import write_typed

SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
PROMPTS = [list(range(20, 60)), [*range(20, 50), 7, 8, 9], [5, 6, 7] * 9]
GREEDY = {"temp": 0.0}
DRAWN = {"temp": 0.9, "top_k": 40}


@contextmanager
def loaded(path: Path, **more: Any) -> Iterator[Llama]:
    llm = Llama(path, **{**SETTINGS, **more})
    try:
        yield llm
    finally:
        llm.close()


@pytest.fixture(scope="module")
def nextn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama under an architecture with prediction layers, and one such layer."""
    return with_nextn(model_path("llama"), tmp_path_factory.mktemp("nextn") / "nextn.gguf")


def answer(llm: Any, prompt: list[int], n: int = 80, seed: int = 3, **sampling: Any) -> list[int]:
    llm.set_seed(seed)
    walk = llm.generate(prompt, **sampling)
    tokens = [next(walk) for _ in range(n)]
    walk.close()
    return tokens


def check_equal(plain: Any, llm: Llama, n: int = 80) -> None:
    """Answers one after the other, which share beginnings, and go on from states."""
    for sampling in (GREEDY, DRAWN):
        for prompt in PROMPTS:
            assert answer(llm, prompt, n, **sampling) == answer(plain, prompt, n, **sampling)
    states = [m.save_state() for m in (plain, llm)]
    text = llm.input_ids[: llm.n_tokens].tolist()
    for m in (plain, llm):
        answer(m, PROMPTS[2], 5, **GREEDY)
    for m, state in zip((plain, llm), states, strict=True):
        m.load_state(state)
    assert answer(llm, text, 30, **GREEDY) == answer(plain, text, 30, **GREEDY)


def test_the_other_name_changes_no_logit(nextn: Path) -> None:
    """The relabelled model is the one that it was made from: what is tested here is a real model's prediction layer."""
    with loaded(model_path("llama")) as base, loaded(nextn) as other:
        rows = []
        for m in (base, other):
            m.eval(PROMPTS[0])
            rows.append(m.decoder.logits(m.n_vocab()).copy())
        assert np.abs(rows[0] - rows[1]).max() < 1e-3 * np.abs(rows[0]).max()


@pytest.mark.parametrize("drafters", [["model"], ["text", "model"], ["text", "recycling", "model"]])
def test_prediction_layers_change_no_token(nextn: Path, drafters: list[str]) -> None:
    with (
        loaded(nextn) as plain,
        loaded(nextn, draft="entmtp", drafters=drafters) as llm,
    ):
        assert llm.drafters == tuple(drafters)
        check_equal(plain, draft_a_lot(llm))
        assert llm.draft_stats.n_drafted > 200
        assert llm.draft_model_broken == ""


@pytest.fixture(scope="module")
def eagle3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Weights]:
    """An EAGLE-3 layer with random weights for the random Llama."""
    return write_eagle3(model_path("llama"), tmp_path_factory.mktemp("eagle3") / "eagle3.gguf")


class Vocabulary:
    """What a draft vocabulary of n tokens should hold: the first ones, and those that came last in the other half."""

    def __init__(self, n: int):
        self.rows, self.n, self.next = list(range(n)), n, n // 2

    def meet(self, token: int) -> None:
        if token not in self.rows:
            self.rows[self.next] = token
            self.next = self.next + 1 if self.next + 1 < self.n else self.n // 2


@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(512, 512), (16, 16), (128, 32)])
@pytest.mark.parametrize(("kind", "draft_vocab"), [("nextn", "all"), ("eagle3", "all"), ("nextn", 64)])
def test_layers_are_asked_what_they_are_trained_for(
    nextn: Path, eagle3: tuple[Path, Weights], kind: str, draft_vocab: Any, n_batch: int, n_ubatch: int
) -> None:
    """The guesses of every step are those of a reference in numpy, from the model's own hidden states: also after a
    prompt in several passes, after accepted drafts, and after the text was cut back."""
    base = model_path("llama")
    layer = random_layer(shapes_of(base))
    path, more = (nextn, {}) if kind == "nextn" else (base, {"draft_model": eagle3[0]})
    rng = np.random.default_rng(1)
    text: list[int] = []
    n_steps = n_accepted = 0
    more |= {"n_batch": n_batch, "n_ubatch": n_ubatch, "draft_vocab": draft_vocab}
    with loaded(path, draft="entmtp", drafters=["model"], **more) as llm:
        draft_a_lot(llm)
        for kept, prompt in ((0, list(range(20, 90)) * 5), (300, [5, 6, 7])):
            text = text[:kept] + prompt
            llm.n_tokens = kept  # the rest is forgotten
            llm.decoder.forget()
            llm.eval(prompt)
            asked = {}
            for _ in range(60):
                tokens = range(llm.n_vocab())
                guesses = [t for t in tokens if llm.decoder.is_drafted(t)]
                token = int(rng.choice(guesses if guesses and rng.random() < 0.5 else tokens))
                n_accepted += token in guesses
                llm.eval([token])
                text.append(token)
                if token not in guesses:
                    asked[len(text) - 1] = {t for t in tokens if llm.decoder.is_drafted(t)}
            foreseen = predict(base, layer, text) if kind == "nextn" else foresee(base, eagle3[1], text)
            vocabulary = Vocabulary(llm.n_vocab() if draft_vocab == "all" else draft_vocab)
            for i, token in enumerate(text):
                vocabulary.meet(token)
                if i in asked:
                    best = [t for t in foreseen[i].tolist() if kind == "eagle3" or t in vocabulary.rows]
                    assert asked[i] == set(best[:8]), i
            n_steps += len(asked)
    assert n_steps > 40
    assert n_accepted > 20


@pytest.mark.parametrize("draft_vocab", [16, 100])
def test_a_draft_vocabulary_changes_no_token(nextn: Path, tmp_path: Path, draft_vocab: int) -> None:
    other = write_model(tmp_path / "other.gguf", SPECS["qwen3"], seed=5)
    latent = write_model(tmp_path / "latent.gguf", LATENT_NEXTN)
    for path, more in ((nextn, {}), (latent, {}), (model_path("llama"), {"draft_model": other})):
        with (
            loaded(path) as plain,
            loaded(path, draft="entmtp", drafters=["model"], draft_vocab=draft_vocab, **more) as llm,
        ):
            assert llm.draft_vocab == draft_vocab
            check_equal(plain, draft_a_lot(llm))
            assert llm.draft_stats.n_drafted > 200


@pytest.mark.parametrize(
    ("kind", "kernels"),
    [("F16", "auto"), ("Q4_0", "auto"), ("Q4_0", "off"), ("Q4_K", "auto"), ("IQ3_S", "auto")],
)
def test_a_draft_vocabulary_of_quantised_weights(kind: str, kernels: str, tmp_path: Path) -> None:
    """Rows of what our kernels packed or left (IQ3_S), and of what ggml has. The drafter is the model itself: it is
    right wherever the next token is in its vocabulary."""
    path = write_typed(tmp_path / "model.gguf", kind)
    with (
        loaded(path, kernels=kernels) as plain,
        loaded(
            path, kernels=kernels, draft="entmtp", draft_model=path, drafters=["model"], draft_vocab=1024
        ) as llm,
    ):
        draft_a_lot(llm, bias=None)
        # what ggml repacked has an order that only it knows
        assert llm.draft_vocab == 1024 or (kernels == "off" and llm.draft_vocab == llm.n_vocab())
        for prompt in PROMPTS:
            tokens = answer(llm, prompt, **GREEDY)
            if kernels == "auto":
                assert tokens == answer(plain, prompt, **GREEDY)
        assert llm.draft_stats.tokens_per_step > 2.5


def test_where_all_tokens_can_be_proposed(eagle3: tuple[Path, Weights], tmp_path: Path) -> None:
    """A layer with a draft vocabulary of its own keeps that; small vocabularies are taken whole, and so are those of
    models whose graph in llama.cpp multiplies with the projection by itself (DeepSeek)."""
    path = model_path("llama")
    other = write_model(tmp_path / "other.gguf", EXPERTS["deepseek2"])
    with loaded(path) as plain, loaded(path, draft="entmtp", draft_model=other, draft_vocab=16) as llm:
        assert llm.draft_vocab == llm.n_vocab()
        draft_a_lot(llm)
        assert answer(llm, PROMPTS[0], **GREEDY) == answer(plain, PROMPTS[0], **GREEDY)
        assert llm.draft_stats.n_drafted > 20
    with loaded(path, draft="entmtp", draft_model=eagle3[0], draft_vocab=16) as llm:
        assert llm.draft_vocab == DRAFT_VOCAB
    with loaded(path, draft="entmtp", draft_model=path) as llm:
        assert llm.draft_vocab == llm.n_vocab()
    with loaded(path, draft="entmtp") as llm:
        assert llm.draft_vocab == 0


def test_a_small_model_that_is_the_model_itself_is_always_right() -> None:
    """Greedily its best guess is always accepted: it is in step with the text after every kind of step."""
    path = demo_files()[0]
    with (
        loaded(path) as plain,
        loaded(path, draft="entmtp", draft_model=path, drafters=["model"]) as llm,
    ):
        draft_a_lot(llm, bias=None)
        for prompt in PROMPTS:
            assert answer(llm, prompt, **GREEDY) == answer(plain, prompt, **GREEDY)
        stats = llm.draft_stats
        assert stats.accepted_by["model"] == stats.n_accepted
        assert stats.tokens_per_step > 4


@pytest.mark.parametrize("length", [1, 3])
def test_chains_of_a_fixed_length(nextn: Path, length: int) -> None:
    """What llama.cpp does with such a model: always so many tokens, whatever they cost."""
    chain = Tree.from_paths("chain", [[0] * (d + 1) for d in range(length)])
    bank = Bank("chain", (PLAIN, chain))
    path = demo_files()[0]
    for base, more in ((nextn, {}), (path, {"draft_model": path})):
        with loaded(base) as plain, loaded(base, draft="entmtp", trees=bank, policy="static", **more) as llm:
            for sampling in (GREEDY, DRAWN):
                assert answer(llm, PROMPTS[0], **sampling) == answer(plain, PROMPTS[0], **sampling)
            stats = llm.draft_stats
            assert stats.trees_used["chain"] >= stats.n_steps - 2
            assert stats.accepted_by["model"] == stats.n_accepted
            if more:  # greedily always right
                llm.reset_draft_stats()
                answer(llm, PROMPTS[1], 60, **GREEDY)
                assert llm.draft_stats.tokens_per_step > 0.9 * (1 + length)


@pytest.mark.parametrize("drafters", [["model"], ["text", "recycling", "model"]])
def test_an_eagle3_layer_changes_no_token(eagle3: tuple[Path, Weights], drafters: list[str]) -> None:
    path = model_path("llama")
    with (
        loaded(path) as plain,
        loaded(path, draft="entmtp", draft_model=eagle3[0], drafters=drafters) as llm,
    ):
        check_equal(plain, draft_a_lot(llm))
        assert llm.draft_stats.n_drafted > 200
        assert llm.draft_model_broken == ""


def test_an_eagle3_layer_beside_a_model_is_found(eagle3: tuple[Path, Weights], tmp_path: Path) -> None:
    path = shutil.copy(model_path("llama"), tmp_path / "model.gguf")
    beside = shutil.copy(eagle3[0], tmp_path / "layer.gguf")
    write_eagle3(model_path("llama"), tmp_path / "other.gguf", width=128)  # of wider states
    with loaded(path, draft="entmtp") as llm:
        assert llm.drafters == ("text", "recycling", "model")
        assert llm.draft_model_path == str(beside)
    with loaded(path, draft="entmtp", drafters=["text"]) as llm:
        assert llm.draft_model_path is None
    edited(eagle3[0], beside, leave_out="fc.weight")
    with pytest.warns(RuntimeWarning, match="layer.gguf cannot draft"), loaded(path, draft="entmtp") as llm:
        assert llm.drafters == ("text", "recycling")


def test_an_eagle3_layer_of_a_model_that_gives_no_inputs(eagle3: tuple[Path, Weights]) -> None:
    with pytest.raises(EntmtpError, match=r"EAGLE-3 .* llama.cpp's graph of olmo2 does not let it"):
        Llama(model_path("olmo2"), draft="entmtp", draft_model=eagle3[0], **SETTINGS)


def test_another_model_changes_no_token(tmp_path: Path) -> None:
    other = write_model(tmp_path / "other.gguf", SPECS["qwen3"], seed=5)
    path = model_path("llama")
    with loaded(path) as plain, loaded(path, draft="entmtp", draft_model=other) as llm:
        assert "model" in llm.drafters
        check_equal(plain, draft_a_lot(llm))
        assert llm.draft_stats.n_drafted > 200


def test_prediction_layers_over_latent_attention(tmp_path: Path) -> None:
    path = write_model(tmp_path / "latent.gguf", LATENT_NEXTN)
    with loaded(path) as plain, loaded(path, draft="entmtp") as llm:
        assert "model" in llm.drafters
        check_equal(plain, draft_a_lot(llm))
        assert llm.draft_stats.n_drafted > 200
        assert llm.draft_model_broken == ""


@pytest.mark.parametrize("name", ["qwen35", "lfm2", "nemotron_h"])
def test_hybrid_memories_go_back(name: str) -> None:
    """Chains of drafts, with states to go back to; Qwen3.5's shape with its prediction layer."""
    path = hybrid_path(name)
    with loaded(path) as plain, loaded(path, draft="entmtp") as llm:
        assert not llm.decoder.can_tree()
        assert llm.decoder.can_chain()
        assert ("model" in llm.drafters) == (name == "qwen35")
        assert llm.lossless == "exact"
        draft_a_lot(llm)
        for sampling in (GREEDY, DRAWN):
            for prompt in PROMPTS:
                assert answer(llm, prompt, **sampling) == answer(plain, prompt, **sampling)
        assert llm.draft_stats.n_drafted > 100


def test_doctor_tells_what_going_back_costs() -> None:
    """Three layers of qwen35's shape have each a state of 32 x 128 and 3 x 256 numbers of a convolution."""
    with loaded(hybrid_path("qwen35"), draft="entmtp") as llm:
        found = probes.chain(llm)
    assert found is not None and found["tokens"] == 4
    assert found["bytes"] == pytest.approx(4 * 3 * (32 * 128 + 3 * 256) * 4, rel=0.05)
    with loaded(model_path("llama"), draft="entmtp") as llm:
        assert probes.chain(llm) is None  # it has trees


@pytest.mark.parametrize("name", ["qwen35", "lfm2", "nemotron_h"])
@pytest.mark.parametrize("n", [2, 5])
def test_passes_of_hybrid_models_give_the_bits_of_passes_over_one_token(name: str, n: int) -> None:
    rng = np.random.default_rng(n)
    prompt, tokens = (rng.integers(0, 250, size).tolist() for size in (37, n))
    rows = []
    with loaded(hybrid_path(name), draft="entmtp") as llm:
        llm.set_trees(policy="off")
        for _ in range(2):
            llm.reset()
            llm.eval(prompt)
            for token in tokens:
                llm.eval([token])
                rows.append(llm.decoder.logits(llm.n_vocab()).copy())
        llm.reset()
        llm.eval(prompt)
        llm.decoder.eval(tokens, len(prompt), all_outputs=True)
        together = llm.rows(n).copy()
    for i in range(n):
        assert np.array_equal(rows[i], rows[n + i])
        assert np.array_equal(rows[i], together[i])


@pytest.mark.parametrize("path", [model_path("mamba"), hybrid_path("rwkv6")], ids=["mamba", "rwkv6"])
def test_a_memory_that_cannot_go_back_decodes_plainly(path: Path) -> None:
    """And our kernels compute what ggml's do."""
    with pytest.warns(RuntimeWarning, match="cannot hold a token tree"):
        llm = Llama(path, draft="entmtp", **SETTINGS)
    with closing(llm), loaded(path) as plain, loaded(path, kernels="off") as ggml:
        assert answer(llm, PROMPTS[0], **GREEDY) == answer(plain, PROMPTS[0], **GREEDY)
        rows = []
        for m in (plain, ggml):
            m.reset()
            m.eval(PROMPTS[0])
            rows.append(m.decoder.logits(m.n_vocab()).copy())
        assert np.abs(rows[0] - rows[1]).max() < 1e-4 * rows[1].std()


def test_an_engine_drafts_without_it(nextn: Path) -> None:
    """It follows one text; several are drafted for by the others."""
    with Engine(nextn, slots=2, n_ctx=256, n_threads=1, verbose=False) as engine:
        assert "model" not in engine.host.drafters
    with pytest.raises(ValueError, match="draft_model is not for an engine: it follows one text"):
        Engine(nextn, slots=2, draft_model=nextn, verbose=False)


#
# files that are not what they should be
#


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(model_path("llama"))
    at = bytes(reader.fields["tokenizer.ggml.tokens"].parts[-1]).decode()
    other = tmp_path / "other.gguf"
    data = Path(model_path("llama")).read_bytes()
    assert data.count(at.encode()) >= 1
    other.write_bytes(data.replace(at.encode(), at[::-1].encode(), 1))
    with pytest.raises(EntmtpError, match=r"token 319 is .* a drafter needs the same vocabulary"):
        Llama(model_path("llama"), draft="entmtp", draft_model=other, **SETTINGS)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"draft": "entmtp", "draft_model": "/nowhere/small.gguf"}, "small.gguf"),
        ({"draft_model": "small.gguf"}, "pass draft="),
        ({"draft": "entmtp", "drafters": ["model"]}, "no layers for multi-token prediction"),
        ({"draft": "entmtp", "draft_model": "small.gguf", "policy": "off"}, "under the policies"),
        (
            {"draft": "entmtp", "draft_vocab": 8},
            'draft_vocab is 8, must be "auto" or "all" or a number of tokens, 16 or',
        ),
        ({"draft": "entmtp", "draft_vocab": "some"}, "draft_vocab is 'some'"),
        ({"draft": "entmtp", "draft_vocab": True}, "draft_vocab is True"),
    ],
)
def test_arguments_that_cannot_work(argument: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, EntmtpError), match=message):
        Llama(model_path("llama"), **argument, **SETTINGS)


def edited(
    source: Path, path: Path, leave_out: str = "", nan: str = "", tensor: str = "",
    as_: Callable[[np.ndarray], np.ndarray | None] = lambda x: x,
) -> Path:  # fmt: skip
    """A copy of a model without a tensor, with a tensor of what are no numbers, or with one as it is made."""
    reader = gguf.GGUFReader(source)
    w = gguf.GGUFWriter(path, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        array = field.types[0] == gguf.GGUFValueType.ARRAY
        w.add_key_value(name, field.contents(), field.types[0], field.types[-1] if array else None)
    for t in reader.tensors:
        if leave_out and leave_out in t.name:
            continue
        if t.name == tensor:
            if (data := as_(t.data)) is not None:
                w.add_tensor(t.name, data)
            continue
        data = np.full_like(t.data, np.nan) if nan and nan in t.name else t.data
        w.add_tensor(t.name, data, raw_dtype=t.tensor_type)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


@pytest.mark.parametrize("tensor", ["nextn.enorm", "blk.2.ffn_gate_inp", "blk.2.attn_norm"])
def test_a_layer_that_lacks_a_tensor_is_named(nextn: Path, tmp_path: Path, tensor: str) -> None:
    """llama.cpp loads no such file, whether the layer is used or not; and it would end the process if it did."""
    path = edited(nextn, tmp_path / "damaged.gguf", leave_out=tensor)
    with (
        pytest.warns(RuntimeWarning, match="do not draft: the file lacks the tensor"),
        pytest.raises(
            ValueError, match=f"damaged.gguf: the file lacks the tensor blk.2.*{tensor.split('.')[-1]}"
        ),
    ):
        Llama(path, draft="entmtp", **SETTINGS)


def test_a_file_without_its_layers_says_nothing(nextn: Path, tmp_path: Path) -> None:
    """Many files name prediction layers and were made without them."""
    path = edited(nextn, tmp_path / "without.gguf", leave_out="blk.2.")
    assert prediction_layers(path) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with loaded(path, draft="entmtp") as llm:
            assert llm.drafters == ("text", "recycling")


def test_a_layer_of_what_are_no_numbers_stops_drafting(nextn: Path, tmp_path: Path) -> None:
    path = edited(nextn, tmp_path / "nan.gguf", nan="nextn.eh_proj")
    with loaded(path, draft="entmtp") as llm, loaded(nextn) as plain:
        draft_a_lot(llm)
        with pytest.warns(RuntimeWarning, match="does not draft any more: its predictions are not numbers"):
            tokens = answer(llm, PROMPTS[0], **GREEDY)
        assert tokens == answer(plain, PROMPTS[0], **GREEDY)
        assert "not numbers" in llm.draft_model_broken
        assert llm.draft_stats.accepted_by["model"] == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"tensor": "d2t", "as_": lambda x: x.astype(np.int32)}, r"d2t\) is I32 \[\d+\], not I64"),
        ({"tensor": "d2t", "as_": lambda x: x[:-1]}, r"is I64 \[\d+\], not I64"),
        ({"tensor": "output.weight", "as_": lambda x: None}, r"not I64 \[\]"),
        (
            {"tensor": "d2t", "as_": lambda x: x + 5},
            "its draft vocabulary names token 320, and there are 320",
        ),
        ({"tensor": "d2t", "as_": lambda x: x - (1 << 40)}, "its draft vocabulary names token -10995"),
    ],
)
def test_an_eagle3_layer_with_a_damaged_draft_vocabulary(
    eagle3: tuple[Path, Weights], tmp_path: Path, damage: dict[str, Any], message: str
) -> None:
    """llama.cpp would end the process."""
    path = edited(eagle3[0], tmp_path / "damaged.gguf", **damage)
    with pytest.raises(EntmtpError, match=message):
        Llama(model_path("llama"), draft="entmtp", draft_model=path, **SETTINGS)


def test_what_a_file_says_of_its_layers(nextn: Path, tmp_path: Path) -> None:
    found = prediction_layers(nextn)
    assert found is not None
    assert (found.n_layers, found.problem) == (1, "")
    assert prediction_layers(model_path("llama")) is None
    short = tmp_path / "short.gguf"
    shutil.copy(nextn, short)
    with open(short, "r+b") as file:
        file.truncate(1000)
    assert prediction_layers(short) is None
