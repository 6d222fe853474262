"""Memories that are states, all of it or in part. llama.cpp keeps the states after the last few tokens of a pass, for
drafts that are refused: it ends the process where a pass has no room for them, and goes back to older ones where the
last pass had fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from test_draft_model import GREEDY, PROMPTS, answer, loaded
from test_failed_passes import Stop, first

from entmtp import EntmtpError, Llama
from helpers.forced import draft_a_lot
from helpers.hybrids import hybrid_path
from helpers.models import model_path

pytestmark = pytest.mark.filterwarnings("ignore:the memory of this model cannot hold a token tree")


@pytest.mark.parametrize("name", ["qwen35", "lfm2", "nemotron_h"])
@pytest.mark.parametrize("settings", [{"n_ubatch": 3}, {"n_ubatch": 4}, {"n_ubatch": 5}, {"n_batch": 6}])
def test_passes_of_few_tokens(name: str, settings: dict[str, Any]) -> None:
    path = hybrid_path(name)
    with loaded(path) as plain, loaded(path, draft="entmtp", **settings) as llm:
        assert llm.decoder.can_chain()
        draft_a_lot(llm)
        for prompt in PROMPTS:
            assert answer(llm, prompt, **GREEDY) == answer(plain, prompt, **GREEDY)
        assert llm.draft_stats.n_drafted > 50


@pytest.mark.parametrize("settings", [{"n_ubatch": 1}, {"n_ubatch": 2}, {"n_batch": 2}])
def test_passes_without_room_for_a_draft(settings: dict[str, Any]) -> None:
    path = hybrid_path("lfm2")
    with (
        pytest.warns(RuntimeWarning, match=r"passes of [12] tokens .*no room for drafts"),
        loaded(path, draft="entmtp", **settings) as llm,
        loaded(path) as plain,
    ):
        assert answer(llm, PROMPTS[0], **GREEDY) == answer(plain, PROMPTS[0], **GREEDY)


def test_more_states_than_a_pass_has_tokens_are_refused() -> None:
    class Careless(Llama):
        def prepare_context(self, params: Any) -> None:
            params.n_rs_seq = 4

    with pytest.raises(EntmtpError, match=r"a pass of 5 tokens \(n_ubatch\) cannot keep states.*n_rs_seq"):
        Careless(hybrid_path("lfm2"), draft="entmtp", n_ctx=256, n_ubatch=5, verbose=False)


@pytest.mark.parametrize("name", ["lfm2", "mamba", "qwen35"])
def test_states_cannot_draft_for_another_model(name: str) -> None:
    """What is refused of a draft could not be taken back; they said so at the first refusal, and llama.cpp loudly."""
    with pytest.raises(
        EntmtpError, match=r"draft model: its memory holds states .* use a model of attention alone"
    ):
        Llama(model_path("llama"), draft="entmtp", draft_model=memory_path(name), n_ctx=256, verbose=False)


def memory_path(name: str) -> Any:
    return model_path(name) if name == "mamba" else hybrid_path(name)


NAMES = ["qwen35", "lfm2", "nemotron_h", "rwkv6", "mamba"]
KINDS = ["plain", "steady", "drafting"]  # not drafting, drafting now and then, and always


@contextmanager
def make(name: str, kind: str) -> Iterator[Llama]:
    with loaded(memory_path(name), **({} if kind == "plain" else {"draft": "entmtp"})) as llm:
        if kind == "drafting" and llm.decoder.can_chain():
            draft_a_lot(llm)
        yield llm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_texts_that_go_back_by_a_few_tokens(name: str, kind: str) -> None:
    """By as many as the last pass kept states for, by more, and twice in a row."""
    with make(name, kind) as llm, loaded(memory_path(name)) as fresh:
        text = answer(llm, PROMPTS[2], 12, **GREEDY)
        for back in (2, 1, 4, 3, 5, 2, 2, 9):
            kept = llm.input_ids[: llm.n_tokens].tolist()[:-back]
            for prompt in (kept, [*kept, 7], [*kept, 7, 8, 9, 10, 11, 12]):
                fresh.reset()
                expected = answer(fresh, prompt, 9, **GREEDY)
                assert answer(llm, prompt, 9, **GREEDY) == expected, (
                    f"{back} back, {len(prompt) - len(kept)} more"
                )
        fresh.reset()
        assert answer(llm, PROMPTS[2], 12, **GREEDY) == text == answer(fresh, PROMPTS[2], 12, **GREEDY)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_stopped_in_the_middle_of_a_pass(name: str, kind: str) -> None:
    """Some layers have the states of one text then, some of another."""
    with make(name, kind) as llm:
        prompt = PROMPTS[2]
        expected = first(llm, prompt, 9)
        stop = Stop(llm)
        llm.reset()
        stop.arm(-1)
        assert first(llm, prompt, 9) == expected
        total, n_cut = stop.n_calls, 0
        for at in range(3, total, max(total // 40, 1)):
            for go_on in (prompt, [*prompt, *expected[:4]]):
                llm.reset()
                stop.arm(at)
                cut = first(llm, prompt, 9)
                assert cut == expected[: len(cut)]
                n_cut += len(cut) < 9
                stop.arm(-1)
                assert first(llm, go_on, 5) == expected[len(go_on) - len(prompt) :][:5], (
                    f"stopped at {at} of {total}"
                )
        assert n_cut > 20


@pytest.mark.parametrize("name", ["qwen35", "lfm2", "nemotron_h"])
def test_states_that_are_loaded_cannot_be_cut_back(name: str) -> None:
    """They come without those before them."""
    with make(name, "drafting") as llm, loaded(hybrid_path(name)) as fresh:
        answer(llm, PROMPTS[0], 12, **GREEDY)
        state, text = llm.save_state(), llm.input_ids[: llm.n_tokens].tolist()
        for prompt in (text[:-1], text[:-3], [*text, 7], text):
            llm.load_state(state)
            fresh.reset()
            assert answer(llm, prompt, 9, **GREEDY) == answer(fresh, prompt, 9, **GREEDY)
