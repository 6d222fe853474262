"""The native heads against an independent forward pass in numpy, from checkpoint to logits, and end to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, quants

from entmtp import Bank, EntmtpError, Llama
from entmtp.bank.calibration import N_ACCEPT, N_AHEAD, N_BEST, Calibration
from entmtp.bank.costs import relative
from entmtp.bank.tree import PLAIN, Tree
from entmtp.convert import convert
from entmtp.models.assets import assets
from entmtp.models.checkpoint import open_checkpoint
from entmtp.native import kernels
from entmtp.native.heads import Heads
from helpers.checkpoints import (
    N_EMBD,
    N_HEAD,
    N_HEAD_KV,
    N_VOCAB,
    hydra_config,
    hydra_state,
    medusa_config,
    medusa_state,
    tiny_base,
    write_checkpoint,
)
from helpers.heads_reference import cheap_state, hydra_logits, medusa_logits, prefix_forward
from helpers.models import ON_GPU

N_HEADS = 3
N_LAYERS = (1, 2)
TOP_K = 10

# f32 weights and cache: the only differences left between batch sizes are orders of summation
F32 = {
    "n_ctx": 256,
    "n_threads": 1,
    "n_threads_batch": 1,
    "type_k": 0,
    "type_v": 0,
    "verbose": False,
    **ON_GPU,
}

State = dict[str, np.ndarray]
Config = dict[str, Any]


def random_checkpoint(kind: str, n_layers: int = 1, seed: int = 0) -> tuple[State, Config]:
    """Random heads in the published layout of a kind: medusa, hydra, hydra-ungrounded, hydra++."""
    if kind == "medusa":
        return medusa_state(N_HEADS, n_layers, seed=seed), medusa_config(N_HEADS, n_layers)
    grounded, prefix = kind != "hydra-ungrounded", kind == "hydra++"
    state = hydra_state(N_HEADS, n_layers, grounded, prefix, seed=seed)
    return state, hydra_config(N_HEADS, n_layers, grounded, prefix)


KINDS = ("medusa", "hydra", "hydra-ungrounded", "hydra++")


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_base(tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(scope="module")
def base(base_path: Path) -> Iterator[Llama]:
    with closing(Llama(base_path, **F32)) as llm:
        yield llm


@pytest.fixture
def convert_f32(tmp_path: Path, base_path: Path) -> Callable[..., Path]:
    """convert_f32(state, config): a heads file in f32."""

    def make(state: State, config: Config) -> Path:
        folder = write_checkpoint(tmp_path / "checkpoint", state, config)
        out = tmp_path / "heads.gguf"
        return convert(folder, base_path, out, outtype="f32", progress=False).outfile

    return make


def embeddings(model: Path) -> np.ndarray:
    """Token embeddings [n_vocab, n_embd] of an f32 base model."""
    tensor = next(t for t in GGUFReader(model).tensors if t.name == "token_embd.weight")
    return np.array(tensor.data, np.float32)


def reference(state: State, config: Config, head: int, h: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Logits of one head; path [head + 1, n_embd] are the embeddings of the tokens after the hidden state's."""
    if "medusa_num_heads" in config:
        return medusa_logits(state, config, h)[head]
    return hydra_logits(state, config, head, h, path)


def same_logits(got: np.ndarray, expected: np.ndarray, tolerance: float = 1e-4) -> None:
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() < tolerance
    top = np.argsort(-expected, kind="stable")[: TOP_K + 1]
    gaps = -np.diff(expected[top])
    clear = np.flatnonzero(gaps < 2 * tolerance)  # ranks beyond a near tie are not compared
    k = min(TOP_K, int(clear[0]) if len(clear) else TOP_K)
    assert list(np.argsort(-got, kind="stable")[:k]) == list(top[:k])


@pytest.mark.parametrize("n_layers", N_LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits(
    kind: str, n_layers: int, base: Llama, base_path: Path, convert_f32: Callable[..., Path]
) -> None:
    state, config = random_checkpoint(kind, n_layers)
    embd = embeddings(base_path)
    rng = np.random.default_rng(1)

    with closing(Heads(convert_f32(state, config), base.model, 1)) as heads:
        info = heads.info
        assert heads.arch == ("medusa" if kind == "medusa" else "hydra")
        assert (info.n_heads, info.n_blocks, info.n_embd, info.n_vocab) == (
            N_HEADS, n_layers, N_EMBD, N_VOCAB,
        )  # fmt: skip
        assert bool(info.grounded) == (kind in ("hydra", "hydra++"))
        assert bool(info.prefix) == (kind == "hydra++")

        for _ in range(20):
            h = rng.standard_normal(N_EMBD).astype(np.float32)
            path = [int(t) for t in rng.integers(0, N_VOCAB, N_HEADS)]
            for i in range(N_HEADS):
                same_logits(
                    heads.logits(i, h, path[: i + 1]), reference(state, config, i, h, embd[path[: i + 1]])
                )


def test_blocks_of_their_own(base: Llama, convert_f32: Callable[..., Path]) -> None:
    """Layers whose weights differ are all stored, and all used."""
    state, config = medusa_state(N_HEADS, 3, shared=False), medusa_config(N_HEADS, 3)
    h = np.random.default_rng(2).standard_normal(N_EMBD).astype(np.float32)
    with closing(Heads(convert_f32(state, config), base.model, 1)) as heads:
        for i, expected in enumerate(medusa_logits(state, config, h)):
            same_logits(heads.logits(i, h, [0] * (i + 1)), expected)


IDS = [47, 3, 20, 0, 17, 5, 8, 30, 1, 2, 9, 10, 40, 41, 42, 43, 44, 11, 29]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kernel_set", ["auto", "off"])
@pytest.mark.parametrize("kind", ["medusa", "hydra", "hydra++"])
def test_cheap_logits(kind: str, kernel_set: str, shared: bool, tmp_path: Path, base_path: Path) -> None:
    """With a draft vocabulary and with the base's projection, as the reference with the rows taken out."""
    state, config = random_checkpoint(kind)
    folder = write_checkpoint(tmp_path / "checkpoint", state, config)
    own = {t.name: np.array(t.data, np.float32) for t in GGUFReader(base_path).tensors}["output.weight"]
    embd, rng = embeddings(base_path), np.random.default_rng(6)
    with closing(Llama(base_path, kernels=kernel_set, **F32)) as llm:
        for ids in (None, IDS):
            out = tmp_path / "heads.gguf"
            convert(folder, base_path, out, "f32", progress=False, draft_vocab=ids, share_lm_head=shared)
            cheap = cheap_state(state, own if shared else None, None if ids is None else sorted(ids))
            with closing(Heads(out, llm.model, 1)) as heads:
                assert heads.info.n_vocab_draft == len(ids or range(N_VOCAB))
                h = rng.standard_normal(N_EMBD).astype(np.float32)
                path = [int(t) for t in rng.integers(0, N_VOCAB, N_HEADS)]
                for i in range(N_HEADS):
                    expected = reference(cheap, config, i, h, embd[path[: i + 1]])
                    same_logits(heads.logits(i, h, path[: i + 1]), expected)
                    # guesses are tokens of the base
                    guesses = heads.expand(i, h, [path[: i + 1]], 5)[0][0]
                    best = np.argsort(-expected, kind="stable")[:5]
                    assert guesses.tolist() == (best if ids is None else np.sort(ids)[best]).tolist()


@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0", "Q5_0", "Q4_K", "Q6_K"])
@pytest.mark.parametrize("kernel_set", ["auto", "off"])
def test_sharing_a_quantised_projection(type: str, kernel_set: str, tmp_path: Path) -> None:
    """Against the base's dequantised weights; products of quantised weights round their activations, too."""
    n_embd = 256 if type.endswith("_K") else 64
    path = tiny_base(tmp_path / "f32.gguf", n_embd=n_embd)
    tensors = {t.name: np.array(t.data) for t in GGUFReader(path).tensors}
    path = tiny_base(tmp_path / "base.gguf", n_embd=n_embd, output=GGMLQuantizationType[type])
    stored = next(t for t in GGUFReader(path).tensors if t.name == "output.weight")
    projection = quants.dequantize(stored.data, stored.tensor_type)
    off = np.linalg.norm(projection - tensors["output.weight"]) / np.linalg.norm(projection)
    assert off < 0.15

    state, config = medusa_state(1, n_embd=n_embd), medusa_config(1)
    folder = write_checkpoint(tmp_path / "checkpoint", state, config)
    h = np.random.default_rng(7).standard_normal(n_embd).astype(np.float32)
    size = {}
    with closing(Llama(path, kernels=kernel_set, **F32)) as llm:
        for ids in (None, IDS):
            out = tmp_path / "heads.gguf"
            convert(folder, path, out, "f32", progress=False, draft_vocab=ids, share_lm_head=True)
            cheap = cheap_state(state, projection, None if ids is None else sorted(ids))
            with closing(Heads(out, llm.model, 1)) as heads:
                expected = medusa_logits(cheap, config, h)[0]
                assert np.abs(heads.logits(0, h, [0]) - expected).max() < 0.02 * np.abs(expected).max()
                size[ids is None] = heads.info.n_bytes
    # the base's projection is held once, by the base
    assert size[True] < 4 * n_embd * (n_embd + 2) + 4096


def test_models_keep_their_kernels(base: Llama, base_path: Path) -> None:
    """A model that is loaded without them changes nothing for those that have them."""
    expected = greedy(base, [1, 5, 9], 10)
    with closing(Llama(base_path, kernels="off", **F32)) as other:
        other.eval([1, 2])
        assert greedy(base, [1, 5, 9], 10) == expected
    kernels.use()


@pytest.mark.parametrize("chunk", [1, 2, 5, 16, 63, 64, 65, 100, 200])
def test_prefix_layer_in_chunks(chunk: int, base: Llama, convert_f32: Callable[..., Path]) -> None:
    """The cache gives what one causal forward pass over everything gives, whatever the chunks."""
    state, config = random_checkpoint("hydra++")
    n = 200
    hidden = np.random.default_rng(3).standard_normal((n, N_EMBD)).astype(np.float32)
    expected = prefix_forward(state, hidden, np.arange(n), N_HEAD, N_HEAD_KV)

    with closing(Heads(convert_f32(state, config), base.model, 1)) as heads:
        for first in range(0, n, chunk):
            last = min(first + chunk, n)
            out = heads.prefix(hidden[first:last], first)
            assert np.abs(out - expected[last - 1]).max() < 1e-4


def test_prefix_layer_after_going_back(base: Llama, convert_f32: Callable[..., Path]) -> None:
    """Positions that were cut off leave nothing behind."""
    state, config = random_checkpoint("hydra++")
    rng = np.random.default_rng(4)
    hidden = rng.standard_normal((100, N_EMBD)).astype(np.float32)

    with closing(Heads(convert_f32(state, config), base.model, 1)) as heads:
        heads.prefix(hidden, 0)
        for _ in range(20):
            keep, n = int(rng.integers(0, len(hidden))), int(rng.integers(1, 40))
            new = rng.standard_normal((n, N_EMBD)).astype(np.float32)
            hidden = np.concatenate([hidden[:keep], new])
            expected = prefix_forward(state, hidden, np.arange(len(hidden)), N_HEAD, N_HEAD_KV)[-1]
            assert np.abs(heads.prefix(new, keep) - expected).max() < 1e-4


@pytest.mark.parametrize("n_plain", [7, 30, 90])
def test_prefix_layer_waits_while_nothing_is_drafted(
    n_plain: int, base_path: Path, convert_f32: Callable[..., Path]
) -> None:
    """It does not run then, and afterwards drafts are those of a decoder that drafted all the time."""
    state, config = random_checkpoint("hydra++")
    tree = Tree.from_paths(
        "wide", [[i] for i in range(12)] + [[0, i] for i in range(6)]
    )  # of 48 tokens: often right
    bank = Bank("wide", (PLAIN, tree))
    heads, n_tokens = convert_f32(state, config), n_plain + 80

    def accepted(n_off: int) -> tuple[list[int], list[int], int]:
        """Tokens, tokens per step, and graphs of the heads built in the first `n_off` tokens, drafting off."""
        settings = {**F32, "draft": "entmtp", "heads": heads, "trees": bank, "calibrate": False}
        with closing(Llama(base_path, policy="off" if n_off else "static", **settings)) as llm:
            tokens: list[int] = []
            built = llm.draft_stats.traffic.n_draft_graphs  # one per tree
            n_graphs = 0
            llm.set_seed(3)
            for token in llm.generate([1, 5, 9], temp=1.0, top_k=0, top_p=1.0, min_p=0.0):
                tokens.append(token)
                if len(tokens) == n_off:
                    n_graphs = llm.draft_stats.traffic.n_draft_graphs - built
                    llm.set_trees(bank, policy="static", tree="wide")
                if len(tokens) == n_tokens:
                    break
            return tokens, (llm.draft_stats.steps["n_accepted"] + 1).tolist(), n_graphs

    tokens, always, _ = accepted(0)
    roots = 1 + np.concatenate([[0], np.cumsum(always)])  # tokens there were when each of its steps began
    k = int(np.argmax(roots >= n_plain))
    others, later, n_graphs = accepted(int(roots[k]))
    assert others == tokens
    assert n_graphs == 0 or n_plain > 60  # so many hidden states can wait
    assert max(later) > 1
    assert later[:-1] == always[k : k + len(later) - 1]  # the last step is cut off


def test_prefix_layer_feeds_the_heads(base: Llama, base_path: Path, convert_f32: Callable[..., Path]) -> None:
    state, config = random_checkpoint("hydra++", n_layers=2)
    embd = embeddings(base_path)
    hidden = np.random.default_rng(5).standard_normal((12, N_EMBD)).astype(np.float32)
    with closing(Heads(convert_f32(state, config), base.model, 1)) as heads:
        h = prefix_forward(state, hidden, np.arange(12), N_HEAD, N_HEAD_KV)[-1]
        for i, path in enumerate(([7], [7, 9], [7, 9, 3])):
            same_logits(
                heads.logits(i, heads.prefix(hidden, 0), path), reference(state, config, i, h, embd[path])
            )


def test_errors(base: Llama, tmp_path: Path, convert_f32: Callable[..., Path]) -> None:
    state, config = random_checkpoint("medusa")
    with closing(Heads(convert_f32(state, config), base.model, 1)) as heads:
        with pytest.raises(EntmtpError, match="no head 3"):
            heads.logits(3, np.zeros(N_EMBD, np.float32), [0] * 4)
        with pytest.raises(EntmtpError, match="no prefix layer"):
            heads.prefix(np.zeros((1, N_EMBD), np.float32), 0)
    with pytest.raises(EntmtpError, match="cannot open"):
        Heads(tmp_path / "missing.gguf", base.model, 1)


# end to end

CHAIN = Tree.from_paths("chain", [[0], [0, 0], [0, 0, 0]])
BUSHY = Tree.from_paths(
    "bushy", [[0], [1], [2], [3], [5], [0, 0], [0, 1], [1, 0], [2, 2], [0, 0, 0], [1, 0, 1]]
)
WIDE = Tree.from_paths("wide", [[r] for r in range(N_VOCAB)])


def make_bank() -> Bank:
    """A bank that likes each of its trees somewhere, whatever it costs."""
    trees = (PLAIN, CHAIN, BUSHY, WIDE)
    return Bank(
        name="test",
        trees=trees,
        ema_window=4.0,
        bin_edges=(3.3, 3.4, 3.5),
        acceptance=tuple(
            tuple(tuple(1.0 if t is liked else 0.1 for _ in t.paths) for t in trees)
            for liked in (CHAIN, BUSHY, WIDE, CHAIN)
        ),
        costs=relative({1: 1.0, 64: 1.1}, [0.0, 0.01, 0.01, 0.01, 0.01]),
    )


def eager(n_heads: int) -> Calibration:
    """A calibration that expects more of the heads than they say themselves."""
    accept = np.zeros((n_heads, N_ACCEPT))
    accept[:, :3] = [6.0, 1.0, -1.0]  # logit p, and more
    scenarios = np.full((n_heads, 1, 1, n_heads, N_BEST), 0.9)
    return Calibration(accept, np.zeros((n_heads, N_AHEAD)), np.zeros((n_heads, 0)), scenarios, 0.5, 39.0)


def greedy(llm: Llama, prompt: list[int], n: int) -> list[int]:
    """n tokens from a fresh start; the end token does not end it."""
    llm.reset()
    tokens: list[int] = []
    for token in llm.generate(prompt, temp=0.0):
        tokens.append(token)
        if len(tokens) == n:
            break
    return tokens


PROMPTS = ([1, 5, 9, 30], [1, 40, 41, 42, 7, 7, 7], [1])


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_those_of_plain_decoding(
    kind: str, base: Llama, base_path: Path, convert_f32: Callable[..., Path]
) -> None:
    bank, n = make_bank(), 150
    expected = [greedy(base, prompt, n) for prompt in PROMPTS]
    path = convert_f32(*random_checkpoint(kind))
    # not adapting: it would find out what trees really cost on so small a model
    with closing(Llama(base_path, draft="entmtp", heads=path, trees=bank, adapt=False, **F32)) as llm:
        assert [greedy(llm, prompt, n) for prompt in PROMPTS] == expected
        assert len(set(llm.draft_stats.steps["tree"])) > 1

        # trees grown from the heads' probabilities, as many different ones as there are steps
        n_heads = llm._heads.n_heads  # type: ignore[union-attr]
        llm.set_trees(replace(bank, calibration=eager(n_heads)), policy="confidence")
        llm.reset_draft_stats()
        assert [greedy(llm, prompt, n) for prompt in PROMPTS] == expected
        assert llm.draft_stats.trees_used["grown"] > 50 and llm.draft_stats.n_drafted > 100

        for i, tree in enumerate(bank.trees):
            llm.set_trees(Bank(name=tree.name, trees=(PLAIN, tree) if i else (PLAIN, CHAIN)), policy="static")
            llm.reset_draft_stats()
            assert [greedy(llm, prompt, n) for prompt in PROMPTS] == expected
            assert len(set(llm.draft_stats.steps["tree"])) == 1
        # the last tree holds every token as the first guess
        assert llm.draft_stats.tokens_per_step > 1.9


# the demo checkpoints


def read_state(folder: Path) -> tuple[State, Config]:
    """A checkpoint as numpy arrays."""
    checkpoint = open_checkpoint(str(folder), progress=False)
    state = {
        name: np.concatenate([np.ravel(c) for c in t.chunks()]).reshape(t.shape).astype(np.float32)
        for name, t in checkpoint.tensors.items()
    }
    return state, checkpoint.config


@pytest.mark.parametrize("kind", ["medusa", "hydra"])
def test_demo_heads(kind: str, models: dict[str, Path]) -> None:
    """Trained heads on the hidden states of a real text, and the same text with and without drafting."""
    model, path = models["f32"], models[kind]
    state, config = read_state(assets() / kind)
    embd = embeddings(model)

    with (
        closing(Llama(model, **F32)) as plain,
        closing(
            Llama(
                model, draft="entmtp", heads=path, trees=Bank("chain", (PLAIN, CHAIN)), policy="static", **F32
            )
        ) as llm,
    ):
        prompt = llm.tokenize(b"def read_lines(path):\n", special=True)
        tokens = greedy(llm, prompt, 100)
        assert tokens == greedy(plain, prompt, 100)
        assert llm.draft_stats.tokens_per_step > 1.3

        assert llm._heads is not None and llm._decoder is not None
        llm.reset()
        llm.eval(prompt)
        for t in range(20):
            h = llm._decoder.hidden()
            assert h is not None
            h = h.copy()
            for i in range(llm._heads.n_heads):
                guess = tokens[t : t + i + 1]
                same_logits(
                    llm._heads.logits(i, h, guess),
                    reference(state, config, i, h, embd[guess]),
                    tolerance=2e-4,
                )
            llm.eval([tokens[t]])
