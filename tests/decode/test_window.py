"""Sliding windows whose cache forgets (swa_full=False): a text is gone on with only where that is still possible."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from test_architectures import BUSHY, SETTINGS, heads_for

from entmtp import Engine, EntmtpError, Llama, kernels
from helpers.models import N_VOCAB, SPECS, model_path

SMALL: dict[str, Any] = SETTINGS | {"n_ctx": 1536, "n_batch": 64, "n_ubatch": 64, "swa_full": False}
WINDOW = SPECS["olmo2"].window
TEXT = np.random.default_rng(3).integers(0, 256, 1400).tolist()


@pytest.fixture(scope="module")
def heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return heads_for(model_path("olmo2"), SPECS["olmo2"].n_embd, tmp_path_factory.mktemp("heads"))


def make(heads: Path | None, **more: Any) -> Llama:
    draft: dict[str, Any] = (
        {"draft": "entmtp", "heads": heads, "trees": BUSHY, "policy": "static"} if heads else {}
    )
    return Llama(model_path("olmo2"), **{**SMALL, **draft, **more})


def answer(llm: Llama, prompt: list[int], n: int = 24) -> list[int]:
    return list(islice(llm.generate(prompt, temp=0.0), n))


def prompts() -> list[list[int]]:
    """Each begins as the one before, then goes another way: soon, late, within the window, at its very edge."""
    found = [TEXT[:1100]]
    for keep in (700, 20, 1090, 1100 - WINDOW, 1100 - WINDOW + 1, 1, WINDOW, WINDOW + 1):
        found += [[*TEXT[:keep], 5, 6, 7 + keep % 200], TEXT[:1100]]
    return found


@pytest.mark.parametrize("drafting", [False, True], ids=["plain", "drafting"])
def test_cut_back_and_gone_on_with(drafting: bool, heads: Path) -> None:
    llm = make(heads if drafting else None)
    fresh = make(None)
    full = make(None, swa_full=True)
    for i, prompt in enumerate(prompts()):
        fresh.reset()
        expected = answer(fresh, prompt)
        assert answer(llm, prompt) == expected, f"prompt {i}"
        assert answer(full, prompt) == expected  # the memory that forgets nothing agrees
    for m in (llm, fresh, full):
        m.close()


def test_what_is_in_the_window_is_reused() -> None:
    """Not everything is evaluated anew, which would be right, too, and slow."""
    llm = make(None)
    answer(llm, TEXT[:1100])
    before = llm.decoder.traffic.n_passes
    answer(llm, [*TEXT[:1100], 9], 1)
    assert llm.decoder.traffic.n_passes - before <= 2
    llm.close()


def test_the_decoder_refuses_what_it_cannot_do() -> None:
    llm = make(None)
    llm.eval(TEXT[:1100])
    dec = llm.decoder
    assert dec.can_continue(1100) and dec.can_continue(1099) and dec.can_continue(0)
    assert not dec.can_continue(700)
    # to the token: what the first one attends to must be there
    first = llama_cpp.llama_memory_seq_pos_min(llama_cpp.llama_get_memory(llm.ctx), 0)
    assert dec.can_continue(first + WINDOW - 1) and not dec.can_continue(first + WINDOW - 2)
    with pytest.raises(EntmtpError, match=f"keeps a window of {WINDOW} tokens.*swa_full=True"):
        dec.eval([1, 2], 700)
    llm.n_tokens = 700  # as llama-cpp-python does it in places
    with pytest.raises(EntmtpError, match="has left it"):
        llm.eval([1, 2])
    assert len(answer(llm, TEXT[:50])) == 24  # and the object is as good as new
    llm.close()


@pytest.mark.parametrize("drafting", [False, True], ids=["plain", "drafting"])
def test_saved_states_go_on(drafting: bool, heads: Path) -> None:
    llm, fresh = make(heads if drafting else None), make(None)
    answer(llm, TEXT[:900], 3)
    state = llm.save_state()
    other = [t % N_VOCAB for t in TEXT[:400]][::-1]
    answer(llm, other)
    llm.load_state(state)
    for prompt in (TEXT[:900], [*TEXT[:890], 3], [*TEXT[:300], 4], TEXT[:903]):
        fresh.reset()
        assert answer(llm, prompt) == answer(fresh, prompt)
    llm.close()
    fresh.close()


@pytest.mark.parametrize("swa_full", [False, True], ids=["forgets", "full"])
@pytest.mark.parametrize("drafting", [False, True], ids=["plain", "drafting"])
def test_begun_from_another_text_in_company(drafting: bool, swa_full: bool, heads: Path) -> None:
    """What the other's window has left behind is evaluated, not missed."""
    settings: dict[str, Any] = SMALL | {"swa_full": swa_full}
    settings |= {"heads": heads, "trees": BUSHY, "policy": "static"} if drafting else {}
    fresh = make(None, swa_full=True)
    expected_alone = answer(fresh, TEXT[:1103])
    for keep in (1100, 1090, 1100 - WINDOW, 1000, 700, 100):
        prompt = [*TEXT[:keep], 5, 6, 7]
        fresh.reset()
        expected = answer(fresh, prompt)
        with (
            Engine(model_path("olmo2"), slots=2, **settings | {"draft": "entmtp" if drafting else None}) as engine,
            engine.slot() as one, engine.slot() as other,
        ):  # fmt: skip
            answer(one, TEXT[:1100], 3)
            before = engine.passes.tokens
            assert answer(other, prompt, 24) == expected, f"after {keep} tokens"
            if swa_full and keep >= 700:  # and what is there is not evaluated again
                assert engine.passes.tokens - before < keep
            assert answer(one, TEXT[:1103], 24) == expected_alone
    fresh.close()


def bits(llm: Llama, prompt: list[int], n: int) -> tuple[list[int], np.ndarray]:
    """Tokens, and the logits that each was drawn from."""
    tokens, rows = [], []
    for token in islice(llm.generate(prompt, temp=0.0), n):
        rows.append(llm.decoder.logits(N_VOCAB).copy())
        tokens.append(token)
    return tokens, np.array(rows).view(np.int32)


@pytest.mark.skipif(not kernels.available(), reason="bits are equal with the CPU kernels only")
@pytest.mark.parametrize("flash_attn", [False, True], ids=["eager", "flash"])
def test_where_cells_lie_leaves_no_trace(flash_attn: bool, heads: Path) -> None:
    """The window comes round, and trees leave holes in it: sums follow positions all the same."""
    settings: dict[str, Any] = {"flash_attn": flash_attn, "kernels": "auto"}
    prompt = TEXT[: WINDOW + 70]
    want = None
    for model in (
        make(None, swa_full=True, **settings), make(None, **settings), make(heads, **settings),
        make(None, draft="entmtp", calibrate=False, adapt=False, **settings),
    ):  # fmt: skip
        got = bits(model, prompt, 400)
        if model.bank is not None:
            assert model.draft_stats.n_drafted > 20  # trees were there
        model.close()
        want = want or got
        assert got[0] == want[0]
        np.testing.assert_array_equal(got[1], want[1])
