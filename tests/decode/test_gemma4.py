"""Gemma 4: its shapes are exact, and its assistant says what it was trained to say, and changes no token."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entmtp import EntmtpError, Llama
from helpers import gemma4
from helpers.forced import draft_a_lot
from helpers.gemma4 import ASSISTANT, Reference, Shape, write
from helpers.models import model_path

SETTINGS: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "verbose": False}
PROMPTS = [list(range(20, 60)), [*range(20, 50), 7, 8, 9], [5, 6, 7] * 9]
SHAPES = {"dense": gemma4.TARGET, "shared": gemma4.SHARED, "experts": gemma4.EXPERTS}
NEAR = 0.05  # of a logit's spread: GELU comes from a table of f16, keys and values are f16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models in folders of their own, the assistant beside none of them."""
    at = tmp_path_factory.mktemp("gemma4")
    for name, shape in SHAPES.items():
        (at / name).mkdir()
        write(at / name / "model.gguf", shape)
    write(at / "assistant.gguf", ASSISTANT)
    return at


def load(path: Path, **more: Any) -> Any:
    return closing(Llama(path, **{**SETTINGS, **more}))


def answer(llm: Llama, prompt: list[int], n: int = 60, **sampling: Any) -> list[int]:
    llm.set_seed(3)
    walk = llm.generate(prompt, **sampling)
    tokens = [next(walk) for _ in range(n)]
    walk.close()
    return tokens


def test_the_reference_is_the_model(folder: Path) -> None:
    text = np.random.default_rng(0).integers(0, 250, 60).tolist()
    with load(folder / "dense" / "model.gguf") as llm:
        llm.eval(text)
        found = llm.decoder.logits(llm.n_vocab()).copy()
    reference = Reference(folder / "dense" / "model.gguf", folder / "assistant.gguf", text)
    logits = reference.h[-1] @ reference.t["token_embd.weight"].T
    assert np.abs(found - logits).max() < NEAR * logits.std()


@pytest.mark.parametrize(("assistant", "draft_vocab"), [(False, "auto"), (True, "auto"), (True, 64)])
@pytest.mark.parametrize("name", SHAPES)
def test_drafts_change_no_token(folder: Path, name: str, assistant: bool, draft_vocab: Any) -> None:
    """Windows, layers that share keys and values, embeddings of every layer, experts with scales."""
    path = folder / name / "model.gguf"
    more = {"draft_model": folder / "assistant.gguf", "draft_vocab": draft_vocab} if assistant else {}
    with load(path) as plain, load(path, draft="entmtp", **more) as llm:
        assert llm.lossless == "exact"
        assert llm.draft_vocab == (0 if not assistant else llm.n_vocab() if draft_vocab == "auto" else 64)
        assert ("model" in llm.drafters) == assistant
        draft_a_lot(llm)
        for sampling in ({"temp": 0.0}, {"temp": 0.9, "top_k": 40}):
            for prompt in PROMPTS:
                assert answer(llm, prompt, **sampling) == answer(plain, prompt, **sampling)
        assert llm.draft_stats.n_drafted > 1000
        assert llm.draft_model_broken == ""


@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(512, 512), (128, 32)])
def test_the_assistant_is_asked_what_it_is_trained_for(folder: Path, n_batch: int, n_ubatch: int) -> None:
    """The guesses of every step, and those after a first guess, are the reference's: after a prompt in several passes,
    after accepted drafts, and after the text was cut back."""
    path, beside = folder / "dense" / "model.gguf", folder / "assistant.gguf"
    rng = np.random.default_rng(1)
    text: list[int] = []
    n_asked = [0, 0]
    with load(
        path, draft="entmtp", drafters=["model"], draft_model=beside, n_batch=n_batch, n_ubatch=n_ubatch
    ) as llm:
        draft_a_lot(llm)
        for kept, prompt in ((0, list(range(20, 90)) * 5), (300, [5, 6, 7])):
            text = text[:kept] + prompt
            llm.n_tokens = kept  # the rest is forgotten
            llm.eval(prompt)
            asked: dict[tuple[int, tuple[int, ...]], set[int]] = {}
            root, path_of = len(text) - 1, ()
            for _ in range(60):
                tokens = range(llm.n_vocab())
                guesses = {t for t in tokens if llm.decoder.is_drafted(t)}
                if guesses and (path_of or root > kept):
                    asked[root, path_of] = guesses
                token = int(rng.choice(sorted(guesses) if guesses and rng.random() < 0.7 else tokens))
                llm.eval([token])
                text.append(token)
                root, path_of = (root, (*path_of, token)) if token in guesses else (len(text) - 1, ())
            reference = Reference(path, beside, text)
            for (i, after), guessed in asked.items():
                logits = reference.logits(i, after)
                eighth = np.sort(logits)[-8]
                assert len(guessed) == 8
                assert logits[sorted(guessed)].min() > eighth - NEAR * logits.std(), (i, after)
                n_asked[bool(after)] += 1
    assert n_asked[0] > 40
    assert n_asked[1] > 5


def test_an_assistant_beside_a_model_is_found(folder: Path, tmp_path: Path) -> None:
    path = shutil.copy(folder / "dense" / "model.gguf", tmp_path / "model.gguf")
    beside = shutil.copy(folder / "assistant.gguf", tmp_path / "assistant.gguf")
    write(tmp_path / "other.gguf", replace(ASSISTANT, n_out=96))
    with load(path, draft="entmtp") as llm:
        assert llm.drafters == ("text", "recycling", "model")
        assert llm.draft_model_path == str(beside)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (replace(ASSISTANT, n_out=96), "it takes states of 96 numbers, the model's have 64"),
        (
            replace(ASSISTANT, n_head_kv=(1, 1)),
            "its layer 0 is for 1 heads of 32 keys, the model has 2 of 32",
        ),
        (
            replace(ASSISTANT, head_dim=(32, 32)),
            "its layer 2 is for 1 heads of 32 keys, the model has 1 of 64",
        ),
        (replace(ASSISTANT, n_head=3), "its layer 0 has 3 heads for 2 of keys"),
    ],
)
def test_an_assistant_of_another_model_is_refused(
    folder: Path, tmp_path: Path, shape: Shape, message: str
) -> None:
    other = write(tmp_path / "other.gguf", shape)
    with pytest.raises(EntmtpError, match=message):
        Llama(folder / "dense" / "model.gguf", draft="entmtp", draft_model=other, **SETTINGS)


def test_an_assistant_is_for_gemma4(folder: Path) -> None:
    with pytest.raises(EntmtpError, match="an assistant is for gemma4, and this is llama"):
        Llama(model_path("llama"), draft="entmtp", draft_model=folder / "assistant.gguf", **SETTINGS)
