"""With the CPU kernels a token's logits do not depend on its pass: the same bits alone, among many and in a tree."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest

from entmtp import Llama
from entmtp.measure.methods import CONFIDENCE, ENTMTP, ENTROPY, generic, published
from entmtp.models.assets import assets
from entmtp.models.gguf_expand import expand
from entmtp.native import kernels
from helpers.models import Spec, write_model
from helpers.policies import apply
from helpers.settings import prompts

DEMO = assets() / "demo-base-q8_0.gguf"
SIZES = (2, 3, 5, 8, 13, 17, 64)
TYPES = ("f32", "f16", "q8_0", "q4_0", "q4_k", "q6_k")

needs_kernels = pytest.mark.skipif(
    kernels.available() == ["portable"], reason="this processor has no kernels but the portable ones"
)


@pytest.fixture(scope="session")
def typed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The demo base in a type of weights."""
    folder = tmp_path_factory.mktemp("types")

    def make(dtype: str) -> Path:
        path = folder / f"{dtype}.gguf"
        if not path.exists():
            if dtype.endswith("_k"):
                expand(DEMO, folder / "source.gguf", "f32")
                params = llama_cpp.llama_model_quantize_default_params()
                params.ftype = {
                    "q4_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
                    "q6_k": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
                }[dtype]
                source = str(folder / "source.gguf").encode()
                assert llama_cpp.llama_model_quantize(source, str(path).encode(), ctypes.byref(params)) == 0
            else:
                expand(DEMO, path, dtype)
        return path

    return make


def rows(llm: Llama, n: int) -> np.ndarray:
    """Logits of the n tokens decoded last. [n, n_vocab]"""
    return np.stack(
        [
            np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(llm.ctx, i), (llm.n_vocab(),)).copy()
            for i in range(n)
        ]
    )


def decode(llm: Llama, tokens: list[int], n_past: int) -> np.ndarray:
    llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(llm.ctx), 0, n_past, -1)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, n_past + i, 1, 1
        batch.seq_id[i][0] = 0
    assert llama_cpp.llama_decode(llm.ctx, batch) == 0
    result = rows(llm, len(tokens))
    llama_cpp.llama_batch_free(batch)
    return result


def assert_passes_leave_no_trace(llm: Llama, prompt: list[int], tokens: list[int], what: str = "") -> None:
    """Logits after each of 64 tokens that follow a prompt of 90: alone, and in passes of any size."""
    missed = kernels.missed()
    decode(llm, prompt, 0)
    alone = np.concatenate([decode(llm, [token], 90 + i) for i, token in enumerate(tokens)])
    assert np.isfinite(alone).all() and alone.std() > 0.1
    for n in (2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 31, 32, 33, 64):
        together = decode(llm, tokens[:n], 90)
        np.testing.assert_array_equal(together.view(np.int32), alone[:n].view(np.int32), f"{what} {n} tokens")
    assert kernels.missed() == missed, "ggml computed some of the products in its own way"


@needs_kernels
@pytest.mark.parametrize(
    ("dtype", "n_threads"), [*((dtype, 1) for dtype in TYPES), ("q4_k", 2), ("q8_0", 2), ("q4_0", 4)]
)
@pytest.mark.parametrize("flash_attn", [False, True], ids=["eager", "flash"])
def test_pass_size_leaves_no_trace(
    dtype: str, flash_attn: bool, n_threads: int, typed: Callable[[str], Path]
) -> None:
    llm = Llama(
        typed(dtype), n_ctx=512, n_threads=n_threads, n_threads_batch=n_threads, flash_attn=flash_attn,
        verbose=False, kernels="auto",
    )  # fmt: skip
    text = llm.tokenize("".join(prompts()[:3]).encode(), special=True)
    prompt, tokens = text[:90], text[90:154]
    assert len(tokens) == 64

    missed = kernels.missed()
    decode(llm, prompt, 0)
    alone = np.concatenate([decode(llm, [token], 90 + i) for i, token in enumerate(tokens)])
    assert kernels.missed() == missed, "ggml computed some of the products"
    for n in SIZES:
        for start in range(0, 64 - n + 1, 31):
            if start:
                decode(llm, tokens[:start], 90)
            together = decode(llm, tokens[start : start + n], 90 + start)
            np.testing.assert_array_equal(
                together.view(np.int32), alone[start : start + n].view(np.int32), f"{n} tokens"
            )
    llm.close()


@needs_kernels
@pytest.mark.parametrize("type_k", ["Q8_0", "Q4_0", "BF16"])
def test_keys_of_other_types_leave_no_trace(type_k: str, typed: Callable[[str], Path]) -> None:
    """A cache of quantised keys without flash attention, whose scores are products of ggml's types."""
    kind = int(gguf.GGMLQuantizationType[type_k])
    settings = {"n_ctx": 256, "n_threads": 2, "n_threads_batch": 2, "flash_attn": False, "verbose": False}
    llm = Llama(typed("q8_0"), type_k=kind, kernels="auto", **settings)
    text = llm.tokenize("".join(prompts()[:3]).encode(), special=True)
    assert_passes_leave_no_trace(llm, text[:90], text[90:154], type_k)
    llm.close()


@needs_kernels
@pytest.mark.parametrize("n_threads", [1, 2])
def test_threads_leave_no_trace(n_threads: int, typed: Callable[[str], Path]) -> None:
    """One number of threads as another, and every instruction set as the portable one."""
    results = []
    for name in kernels.available():
        llm = Llama(typed("q4_k"), n_ctx=256, n_threads=n_threads, verbose=False, kernels=name)
        results.append(decode(llm, llm.tokenize(prompts()[0].encode(), special=True)[:40], 0))
        llm.close()
    llm = Llama(typed("q4_k"), n_ctx=256, n_threads=3, verbose=False)
    results.append(decode(llm, llm.tokenize(prompts()[0].encode(), special=True)[:40], 0))
    llm.close()
    for result in results[1:]:
        np.testing.assert_array_equal(result.view(np.int32), results[0].view(np.int32))


METHODS = [ENTMTP, ENTROPY, CONFIDENCE, *generic("hydra")[1:], *published()]


@needs_kernels
@pytest.mark.parametrize("flash_attn", [False, True], ids=["eager", "flash"])
@pytest.mark.parametrize("dtype", ["f16", "q8_0", "q4_0", "q4_k"])
def test_drafting_is_bitwise_lossless(
    dtype: str, flash_attn: bool, typed: Callable[[str], Path], models: dict[str, Path]
) -> None:
    """Tokens, and the logits that each was drawn from: plain decoding and every method, on quantised models too."""
    settings = {"n_ctx": 512, "n_threads": 1, "verbose": False, "flash_attn": flash_attn, "kernels": "auto"}
    plain = Llama(typed(dtype), **settings)
    llm = Llama(typed(dtype), draft="entmtp", heads=models["hydra"], calibrate=False, adapt=False, **settings)

    def answer(model: Llama, prompt: list[int], n: int, temp: float) -> tuple[list[int], np.ndarray]:
        model.reset()
        model.set_seed(7)
        tokens, logits = [], []
        for token in model.generate(prompt, temp=temp):
            assert model._decoder is not None
            tokens.append(token)
            if len(tokens) == n:
                break
            logits.append(model._decoder.logits(model.n_vocab()).copy())
        return tokens, np.stack(logits)

    accepted = dict.fromkeys((method.label for method in METHODS), 0)
    for text, temp in ((prompts()[50], 0.8), (prompts()[90], 0.0)):
        prompt = plain.tokenize(text.encode(), special=True)
        tokens, logits = answer(plain, prompt, 80, temp)
        for method in METHODS:
            apply(method, llm)
            llm.reset_draft_stats()
            tokens_, logits_ = answer(llm, prompt, 80, temp)
            assert tokens_ == tokens, method.label
            np.testing.assert_array_equal(logits_.view(np.int32), logits.view(np.int32), method.label)
            accepted[method.label] += llm.draft_stats.n_accepted
    assert min(accepted.values()) > 20, f"hardly anything was drafted: {accepted}"
    plain.close()
    llm.close()


def test_switch(typed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernels.current()
    try:
        assert kernels.available()[-1] == "portable"
        with pytest.raises(ValueError, match=r"no kernels named mmx; it has .*portable"):
            Llama(typed("f16"), kernels="mmx", verbose=False)
        monkeypatch.setenv("ENTMTP_KERNELS", "off")
        kernels.use()
        assert kernels.current() == "off"
        monkeypatch.setenv("ENTMTP_KERNELS", "portable")
        kernels.use()
        assert kernels.current() == "portable"
        with kernels.using("off"):
            assert kernels.current() == "off"
        assert kernels.current() == "portable"
    finally:
        kernels.use(before)


@needs_kernels
@pytest.mark.parametrize("dtype", TYPES)
def test_perplexity(dtype: str, typed: Callable[[str], Path], tmp_path: Path) -> None:
    """Perplexity of held-out text: that of the same weights without quantised activations, computed by ggml in f32.

    8-bit activations move it by up to 0.45 % here, in either direction, with ggml's kernels as with these.
    """
    exact = tmp_path / "exact.gguf"
    expand(typed(dtype), exact, "f32")
    losses = []
    for path, name in ((exact, "off"), (typed(dtype), "auto")):
        llm = Llama(path, n_ctx=1024, n_batch=1024, n_threads=2, verbose=False, kernels=name)
        tokens = llm.tokenize("\n".join(prompts()[5:25]).encode(), special=True)[:900]
        logits = decode(llm, tokens, 0).astype(np.float64)[:-1]
        logits -= logits.max(axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        losses.append(-log_p[np.arange(len(tokens) - 1), tokens[1:]].mean())
        llm.close()
    tolerance = 1e-4 if dtype in ("f32", "f16") else 6e-3
    assert np.exp(losses[1]) == pytest.approx(np.exp(losses[0]), rel=tolerance)


@needs_kernels
@pytest.mark.parametrize("dim", [10, 100, 120])
def test_heads_of_any_width(dim: int, tmp_path: Path) -> None:
    """With flash attention, too, where ggml's own splits a long cache: alone, together, whatever the threads."""
    path = write_model(
        tmp_path / "m.gguf", Spec("llama", head_dim=dim, n_embd=100, n_head=4, n_head_kv=2, n_ff=128)
    )
    before, seen = kernels.missed(), []
    for n_threads, at_once in ((1, 1), (2, 8), (2, 90)):
        llm = Llama(
            path, n_ctx=1024, flash_attn=True, logits_all=True, n_threads=n_threads, n_threads_batch=n_threads,
            verbose=False,
        )  # fmt: skip
        text = np.random.default_rng(dim).integers(0, llm.n_vocab(), 690).tolist()
        llm.eval(text[:600])
        for i in range(600, 690, at_once):
            llm.eval(text[i : i + at_once])
        seen.append(llm.scores[600:690].copy())
        llm.close()
    assert np.isfinite(seen[0]).all() and len(np.unique(seen[0])) > 1000
    for other in seen[1:]:
        np.testing.assert_array_equal(other, seen[0])
    assert kernels.missed() == before
