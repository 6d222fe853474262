"""What `entmtp.upstream` needs of llama-cpp-python is there; what a newer version took away is named."""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path

import llama_cpp
import pytest

from entmtp import Llama, drafting, upstream
from entmtp.common.errors import NO_CONTEXT
from entmtp.native import log
from entmtp.options.model import explained
from helpers.hybrids import hybrid_path
from helpers.settings import F32

ROOT = Path(__file__).resolve().parents[2]


def test_it_was_read_in_the_version_that_is_pinned() -> None:
    pinned = re.search(r'"llama-cpp-python==([^"]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert pinned and f"Read in version {pinned[1]}" in (upstream.__doc__ or "")
    assert version("llama-cpp-python") == pinned[1]


def test_all_that_is_needed_is_there(models: dict[str, Path]) -> None:
    stock = llama_cpp.Llama(str(models["q8_0"]), n_ctx=64, verbose=False)
    missing = {name: why for name, why in upstream.NEEDS.items() if not hasattr(stock, name)}
    assert not missing, f"llama-cpp-python {version('llama-cpp-python')} lacks what ours builds on: {missing}"
    assert hasattr(stock._ctx, "get_logits")
    assert hasattr(stock._init_sampler(temp=0.0), "sampler")
    stock.close()
    assert "self.model_params = " in inspect.getsource(
        llama_cpp.Llama.__init__
    )  # once, before it loads the model
    # `generate` asks the flag, and these set it
    for name in ("generate", "reset", "eval", "load_state", "__init__"):
        assert "_requires_eval" in inspect.getsource(getattr(llama_cpp.Llama, name)), name
    parameters = list(inspect.signature(llama_cpp.Llama.generate).parameters)
    assert parameters[1] == "tokens" and parameters[8] == "reset"


def test_nothing_else_reaches_into_it() -> None:
    """Private members of llama_cpp.Llama are used in upstream.py alone."""
    own = inspect.getsource(llama_cpp.Llama)
    private = {name for name in re.findall(r"self\.(_[a-z]\w*)", own)}
    assert {"_ctx", "_model", "_logits_all"} <= private
    shared = {"_stack"}  # a name of our own, too
    found = []
    for path in (ROOT / "python" / "entmtp").rglob("*.py"):
        if path.name == "upstream.py":
            continue
        for i, line in enumerate(path.read_text("utf-8").splitlines(), 1):
            found += [
                f"{path.name}:{i}: {name}"
                for name in re.findall(r"(?:llm|llama|super\(\)|self\._llm)\.(_[a-z]\w*)", line)
                if name in private - shared
            ]
    llama = (ROOT / "python" / "entmtp" / "llama.py").read_text("utf-8")
    found += [name for name in re.findall(r"self\.(_[a-z]\w*)", llama) if name in private - shared]
    assert found == []


def open_chains() -> int:
    kind = llama_cpp._internals.LlamaSampler
    return sum(isinstance(o, kind) and o.sampler is not None for o in gc.get_objects())


def test_sampler_chains_are_freed_with_their_use(load: Callable[..., Llama]) -> None:
    """They refer to themselves; the garbage collector, which knows nothing of what they hold, lets them pile up."""
    for llm in (load(), load(heads="hydra")):
        gc.collect()
        gc.disable()
        try:
            before = open_chains()
            for temperature in (0.0, 0.8):
                llm("Once upon a time", max_tokens=4, temperature=temperature)
                next(stream := llm("Once upon", max_tokens=9, temperature=temperature, stream=True))
                stream.close()
                llm.sample(temp=temperature)
            assert open_chains() == before
        finally:
            gc.enable()


def test_a_state_has_no_logits_that_nobody_kept(models: dict[str, Path], load: Callable[..., Llama]) -> None:
    llm = load("q8_0", n_ctx=128)
    tokens = llm.tokenize(b"Tom has 3 boxes of 4 apples. Then")
    llm.eval(tokens)
    own = llm.save_state()
    assert own.scores.size == llm.n_vocab() == llm.scores.size
    stock = llama_cpp.Llama(str(models["q8_0"]), **F32 | {"n_ctx": 128})
    stock.eval(tokens)
    other = stock.save_state()
    stock.close()
    assert len(other.scores) == len(tokens)
    texts: list[list[int]] = []
    for state in (own, other):
        llm.reset()
        llm.load_state(state)
        texts.append([])
        for _ in range(8):
            llm.eval(texts[-1][-1:] or tokens[:1])
            texts[-1].append(llm.sample(temp=0.0))
        assert llm.n_tokens == len(tokens) + 8
    assert texts[0] == texts[1]


def test_warnings_and_errors_are_told_apart(load: Callable[..., Llama]) -> None:
    """llama-cpp-python's table of ggml's levels is of an older ggml; ours is that of the header that was built."""
    header = next(Path(upstream.llama_cpp.__file__).parent.rglob("ggml.h"), None)
    levels = {"DEBUG": 1, "INFO": 2, "WARN": 3, "ERROR": 4, "CONT": 5}
    if header is not None:
        text = header.read_text("utf-8")
        levels = {k: int(v) for k, v in re.findall(r"GGML_LOG_LEVEL_(\w+)\s*=\s*(\d)", text)}
    import logging

    assert log.LEVELS[levels["WARN"]] == logging.WARNING and log.LEVELS[levels["ERROR"]] == logging.ERROR
    assert levels["CONT"] == log.CONTINUED


def test_what_the_text_is_to_plain_decodings() -> None:
    assert drafting.how_lossless(on_cpu=True, accept="lossless") == "exact"
    assert drafting.how_lossless(on_cpu=False, accept="lossless") == "rounding"
    assert drafting.how_lossless(on_cpu=True, accept="typical") == "lossy"


def test_types_of_the_cache_by_name(models: dict[str, Path]) -> None:
    """As llama.cpp's commands name them; llama-cpp-python wants numbers, and flash attention for quantised values."""
    file, texts = models["q8_0"], {}
    for given in ({"type_k": "q8_0", "type_v": "Q8_0"}, {"type_k": 8, "type_v": 8, "flash_attn": True}):
        with closing(Llama(file, n_ctx=64, n_threads=1, verbose=False, **given)) as llm:  # type: ignore[arg-type]
            assert (llm.context_params.type_k, llm.context_params.type_v) == (8, 8)
            texts[str(given)] = llm("One two", max_tokens=12, temperature=0.0)["choices"][0]["text"]
    assert len(set(texts.values())) == 1
    with closing(Llama(file, n_ctx=64, n_threads=1, verbose=False, type_k="bf16")) as llm:
        assert llm.context_params.type_k == 30
    with pytest.raises(ValueError, match="type_k is 'q9', it must be a type that a cache can have"):
        Llama(file, n_ctx=64, verbose=False, type_k="q9")
    with pytest.raises(ValueError, match="quantised values in the cache need flash attention"):
        Llama(file, n_ctx=64, verbose=False, type_v="q4_0", flash_attn=False)


def test_why_there_is_no_context() -> None:
    """llama.cpp's reason is in the error, not on stderr alone."""
    llama_cpp.llama_log_set(log.log, None)  # other tests have messages of their own go nowhere
    with pytest.raises(
        ValueError, match="cannot make a context: V cache type q8_0 with block size 32 does not divide"
    ):
        Llama(hybrid_path("lfm2"), n_ctx=64, verbose=False, type_v="q8_0")
    error = ValueError(f"{NO_CONTEXT}: no room")
    assert str(explained(error, Path("m.gguf"), 64, "q8_0")) == (
        "m.gguf: no context of 64 tokens (no room); choose a smaller --ctx, or leave --cache-type out"
    )
