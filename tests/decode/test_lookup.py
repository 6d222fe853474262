"""Drafts from the user's own texts: read once, kept as tokens, and never part of what is written."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entmtp import Engine, Llama
from entmtp.common.errors import EntmtpError, ModelError
from entmtp.models import corpus
from entmtp.models.corpus import corpus_tokens, find_texts
from entmtp.native.corpus import Corpus
from helpers.policies import PAYING_NODES
from helpers.settings import F32, prompts


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ENTMTP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lookup"


def drafting(model: Path, **more: Any) -> Llama:
    llm = Llama(model, draft="entmtp", drafters="text", adapt=False, **F32, **more)
    assert llm.bank is not None
    llm.set_trees(replace(llm.bank, costs=PAYING_NODES), policy="auto")
    return llm


def answer(llm: Llama, prompt: list[int], n: int, **sampling: Any) -> list[int]:
    llm.set_seed(3)
    return list(islice(llm.generate(prompt, **sampling), n))


def test_what_the_texts_hold_is_drafted(models: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    """A text that is known beforehand takes a fraction of the passes, and is plain decoding's, drawn or not."""
    plain = Llama(models["q8_0"], **F32)
    prompt = plain.tokenize(prompts("humaneval")[3].encode(), special=True)
    expected = answer(plain, prompt, 120, temp=0.0)
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "other.txt").write_text("Nothing of use is in here.\n")
    (folder / "known.txt").write_bytes(plain.detokenize([*prompt, *expected]))

    steps = {}
    for lookup in (None, str(folder)):
        llm = drafting(models["q8_0"], lookup=lookup)
        assert (llm.n_lookup > 100) == (lookup is not None)
        llm.reset_draft_stats()
        assert answer(llm, prompt, 120, temp=0.0) == expected
        steps[lookup] = llm.draft_stats.n_steps
        drawn = {"temp": 0.9, "top_k": 40}
        assert answer(llm, prompt, 60, **drawn) == answer(plain, prompt, 60, **drawn)
        llm.close()
    assert steps[str(folder)] < 0.6 * steps[None]
    plain.close()


def test_several_texts_share_the_corpus(models: dict[str, Path], cache: Path, tmp_path: Path) -> None:
    plain = Llama(models["q8_0"], **F32)
    prompt = plain.tokenize(prompts("humaneval")[3].encode(), special=True)
    expected = answer(plain, prompt, 60, temp=0.0)
    (tmp_path / "known.txt").write_bytes(plain.detokenize([*prompt, *expected]))
    settings = {k: v for k, v in F32.items() if k != "n_ctx"}
    engine = Engine(
        models["q8_0"],
        slots=2,
        n_ctx=512,
        lookup=tmp_path / "known.txt",
        drafters="text",
        adapt=False,
        **settings,
    )
    for slot in engine.slots:
        slot.decoder.set_bank(replace(slot.bank, costs=PAYING_NODES), "auto", drafters=("text",), adapt=False)
        slot.decoder.set_corpus(engine.host._corpus)
        slot.reset_draft_stats()
        assert answer(slot, prompt, 60, temp=0.0) == expected
        assert slot.draft_stats.n_accepted > 20
    engine.close()
    plain.close()


def test_tokens_are_kept_and_read_anew_where_a_file_has_changed(cache: Path, tmp_path: Path) -> None:
    calls: list[bytes] = []

    def tokenize(text: bytes) -> list[int]:
        calls.append(text)
        return list(text)

    file = tmp_path / "a.txt"
    file.write_text("abc")
    expected = np.array([97, 98, 99, -1])
    for _ in range(2):
        assert (corpus_tokens([file], tokenize, 1, 256) == expected).all()
    assert len(calls) == 1
    (kept,) = cache.glob("*.npy")

    for damage in (b"", kept.read_bytes()[:-4], b"\x93NUMPY junk", kept.read_bytes().replace(b"<i4", b"<f4")):
        kept.write_bytes(damage)
        assert (corpus_tokens([file], tokenize, 1, 256) == expected).all()
    assert len(calls) == 5
    assert (
        corpus_tokens([file], tokenize, 1, 98) == expected
    ).all()  # another vocabulary's tokens are of no use
    assert len(calls) == 6

    file.write_text("abd")
    os.utime(file, ns=(1, 1))
    assert corpus_tokens([file], tokenize, 1, 256).tolist() == [97, 98, 100, -1]
    corpus_tokens([file], tokenize, 2, 256)  # another vocabulary
    assert len(calls) == 8


def test_the_cache_does_not_grow(cache: Path, tmp_path: Path) -> None:
    for i in range(corpus.KEPT + 4):
        (tmp_path / f"{i}.txt").write_text(str(i))
        corpus_tokens([tmp_path / f"{i}.txt"], list, 1, 256)
    assert len(list(cache.iterdir())) == corpus.KEPT


def test_a_cache_that_cannot_be_written_is_no_error(cache: Path, tmp_path: Path) -> None:
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file where the cache would be")
    (tmp_path / "a.txt").write_text("abc")
    assert len(corpus_tokens([tmp_path / "a.txt"], list, 1, 256)) == 4


def test_folders(tmp_path: Path) -> None:
    """Text below a folder, but what is hidden, no text, or a link to elsewhere."""
    for name in ("b.py", "sub/a.md", ".hidden", ".git/config", "node_modules/x.js", "sub/.secret/key"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text("text")
    (tmp_path / "image.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "link.txt").symlink_to("/etc/passwd")
    assert find_texts([tmp_path, tmp_path / "b.py"]) == [tmp_path / "b.py", tmp_path / "sub" / "a.md"]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("missing", "there is no file or folder"),
        ("image.png", "is no text; name files of text"),
        ("empty", "there is no text in"),
        ("large.txt", "are more than the 34 MB that can be drafted from"),
    ],
)
def test_what_cannot_be_read(
    name: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "image.png").write_bytes(b"\0")
    (tmp_path / "empty").mkdir()
    with (tmp_path / "large.txt").open("wb") as f:
        f.write(b"x" * corpus.BEGIN)
        f.truncate(corpus.MOST + 1)
    with pytest.raises(ModelError, match=sentence):
        find_texts([tmp_path / name])


def test_nobody_would_draft_from_it(load: Callable[..., Llama], models: dict[str, Path]) -> None:
    for more in ({"drafters": "recycling"}, {"policy": "static", "trees": "generic-hydra:n4"}):
        with pytest.raises(ValueError, match="lookup names texts to draft from, which the drafter"):
            Llama(models["f32"], draft="entmtp", heads=models["hydra"], lookup=__file__, **more)


def test_tokens_of_another_model(models: dict[str, Path], cache: Path) -> None:
    """They are refused as texts to draft from, and never drafted from the text that a state is said to be of."""
    llm, plain = drafting(models["q8_0"]), Llama(models["q8_0"], **F32)
    with (
        closing(Corpus(np.array([5, 99_999, 6], np.int32))) as other,
        pytest.raises(EntmtpError, match="token 99999 of the corpus is not in the vocabulary"),
    ):
        llm.decoder.set_corpus(other)
    prompt = [10, 20, 30] * 6 + [10]
    expected = answer(plain, [*prompt, 20], 12, temp=0.0)
    for strange in (99_999, -7):
        llm.reset()
        llm.eval(prompt)
        llm.decoder.set_text([10, 20, strange] * 6 + [10])  # after 10 and 20 there came another model's
        assert answer(llm, [*prompt, 20], 12, temp=0.0) == expected
    llm.close()
    plain.close()
