"""Loops of one's own over llama-cpp-python's calls, and arguments that its programs have: as there, drafting or not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf import GGUFWriter

from entmtp import Llama
from entmtp.native.rpc import local_gpus
from helpers.models import write_encoder
from helpers.rewritten import rewritten
from helpers.typed import DEMO

SETTINGS: dict[str, Any] = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
STORY = "The sea was calm and the"


@pytest.fixture(scope="module", params=[None, "entmtp"], ids=["plain", "drafting"])
def llm(request: pytest.FixtureRequest) -> Iterator[Llama]:
    more = {"draft": "entmtp", "calibrate": False} if request.param else {}
    made = Llama(DEMO, logits_all=True, **SETTINGS, **more)
    yield made
    made.close()


def loop(llm: Llama, n: int = 8, **how: Any) -> list[int]:
    llm.reset()
    llm.eval(llm.tokenize(STORY.encode()))
    drawn: list[int] = []
    for _ in range(n):
        drawn.append(llm.sample(**{"temp": 0.0, **how}))
        llm.eval(drawn[-1:])
    return drawn


def test_tokens_after_earlier_ones(llm: Llama) -> None:
    """Whatever the last pass held; and the next token is what it would have been."""
    wanted = loop(llm, 24)
    llm.reset()
    llm.eval(llm.tokenize(STORY.encode()))
    begin, drawn = llm.n_tokens, []
    for _ in range(24):
        drawn.append(llm.sample(temp=0.0))
        llm.eval(drawn[-1:])
        for idx in range(begin - 1, llm.n_tokens, 3):
            assert llm.sample(temp=0.0, idx=idx) == int(np.argmax(llm.scores[idx]))
            if idx < llm.n_tokens - 1:
                assert llm.sample(temp=0.0, idx=idx) == drawn[idx - begin + 1]
    assert drawn == wanted
    for idx in (-1, llm.n_tokens):
        with pytest.raises(ValueError, match=f"idx is {idx}, it must lie"):
            llm.sample(idx=idx)


@pytest.mark.parametrize("way", ["reset", "load_state"])
def test_a_generation_that_is_over_leaves_no_sampler(llm: Llama, way: str) -> None:
    wanted = loop(llm)
    llm.create_completion("Once", max_tokens=2)
    other = llm.save_state()
    digits = llama_cpp.LlamaGrammar.from_string("root ::= [0-9]+", verbose=False)
    stream = llm.create_completion(STORY, max_tokens=30, grammar=digits, seed=1, stream=True)
    next(stream)
    llm.reset() if way == "reset" else llm.load_state(other)
    stream.close()
    assert loop(llm) == wanted


def test_processors(llm: Llama) -> None:
    """One that answers as for a batch of one is heeded; one that is in no list is no list."""

    def odd(tokens: Any, logits: Any) -> Any:
        return np.where(np.arange(len(logits)) % 2, logits, -np.inf)

    def asked(processor: Any) -> Any:
        return llm.create_completion(STORY, max_tokens=12, temperature=0, logits_processor=processor)[
            "choices"
        ]

    wanted = asked([odd])
    assert wanted != asked(None)
    assert asked([lambda *given: odd(*given)[None]]) == wanted
    for n in (7, llm.n_vocab() * 2):
        with pytest.raises(ValueError, match="logits_processor: gave"):
            asked([lambda *_, n=n: np.zeros(n)])
    with pytest.raises(ValueError, match="must be a list of functions"):
        asked(odd)


@pytest.mark.skipif(bool(local_gpus()), reason="there is a GPU: layers go there")
def test_layers_for_a_gpu_that_is_not_there() -> None:
    """Many programs say n_gpu_layers=-1 wherever they run."""
    with_none = Llama(DEMO, draft="entmtp", calibrate=False, n_ctx=256, verbose=False)
    asked = Llama(DEMO, draft="entmtp", calibrate=False, n_ctx=256, verbose=False, n_gpu_layers=-1)
    try:
        assert asked.lossless == with_none.lossless
        assert asked.n_threads == with_none.n_threads and asked.n_threads_batch == with_none.n_threads_batch
        assert asked.__getstate__()["n_gpu_layers"] == -1  # a copy elsewhere may find one
        with pytest.raises(TypeError):
            Llama(DEMO, n_gpu_layers="many", **SETTINGS)  # type: ignore[arg-type]
    finally:
        with_none.close()
        asked.close()


@pytest.mark.parametrize("content", [{}, {"content": None}], ids=["left out", "None"])
def test_no_content_beside_calls(content: dict[str, Any], tmp_path: Path) -> None:
    """A template that knows of calls looks for None (DeepSeek's), one that does not would print it (Llama 3's)."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked: list[Any] = [
        {"role": "user", "content": "Go."},
        {"role": "assistant", **content, "tool_calls": [call]},
    ]
    for template, said in {
        "{% for m in messages %}{{ m['content'] | trim }}{% endfor %}": "Go.",
        "{% for m in messages %}{% if m['content'] is none %}{{ m.tool_calls[0].function.name }}{% else %}"
        "{{ m['content'] }}{% endif %}{% endfor %}": "Go.f",
    }.items():
        path = rewritten(
            DEMO,
            tmp_path / "model.gguf",
            ("tokenizer.chat",),
            partial(GGUFWriter.add_chat_template, value=template),
        )
        with closing(Llama(path, **SETTINGS)) as llm:
            answer: Any = llm.create_chat_completion(asked, max_tokens=1)
            assert answer["usage"]["prompt_tokens"] == len(llm.tokenize(said.encode(), add_bos=False))


def test_texts_that_are_seen_at_once(tmp_path: Path) -> None:
    """Where tokens see later ones, or are pooled, llama.cpp ended the process over a text beyond n_ubatch."""
    encoder = write_encoder(tmp_path / "encoder.gguf")
    sizes: dict[str, Any] = {"n_ctx": 128, "n_batch": 128, "verbose": False}
    with (
        closing(Llama(encoder, n_ubatch=32, embedding=True, **sizes)) as small,
        closing(Llama(encoder, n_ubatch=128, embedding=True, **sizes)) as large,
    ):
        assert small.embed("a" * 100) == large.embed("a" * 100)
    means: list[Any] = []
    for n_ubatch in (8, 128):
        with closing(Llama(DEMO, embedding=True, pooling_type=1, n_ubatch=n_ubatch, **sizes)) as pooled:
            means.append(pooled.embed(["The sea", "a calm " * 30]))
    assert means[0] == means[1]
    both = {"n_ctx": 256, "n_ubatch": 16, "attention_type": 1, "verbose": False}
    with closing(Llama(DEMO, **both)) as llm:
        llm.eval([5] * 100)
        assert 0 <= llm.sample(temp=0.0) < llm.n_vocab()
    with pytest.raises(ValueError, match="attention_type"):
        Llama(DEMO, draft="entmtp", **both)


def test_a_file_with_a_text_that_is_none(tmp_path: Path) -> None:
    def spoil(writer: GGUFWriter) -> None:
        writer.add_key_value("general.description", "spoiled!", gguf.GGUFValueType.STRING)

    path = rewritten(DEMO, tmp_path / "model.gguf", ("general.description",), spoil)
    data = path.read_bytes()
    assert data.count(b"spoiled!") == 1
    path.write_bytes(data.replace(b"spoiled!", b"\xff\xfe" * 4))
    with closing(Llama(path, **SETTINGS)) as llm:
        assert llm.create_completion(STORY, max_tokens=4)["choices"][0]["text"]  # type: ignore[index]


def test_kernels_that_another_model_switched_off() -> None:
    with closing(Llama(DEMO, draft="entmtp", calibrate=False, **SETTINGS)) as llm:
        before = llm.lossless
        Llama(DEMO, kernels="off", **SETTINGS).close()
        assert llm.lossless == "rounding" == llm.draft_stats.lossless
        Llama(DEMO, **SETTINGS).close()
        assert llm.lossless == before
