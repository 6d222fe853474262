"""Memories that are states in part (hybrid models), in passes of few tokens: llama.cpp keeps a state to go back to for
every token that may be refused, and ends the process where a pass has no room for them.
"""

from __future__ import annotations

from typing import Any

import pytest
from test_draft_model import GREEDY, PROMPTS, answer, loaded

from entmtp import EntmtpError, Llama
from helpers.forced import draft_a_lot
from helpers.hybrids import hybrid_path


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
