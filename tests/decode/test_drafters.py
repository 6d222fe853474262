"""Drafts from the text, from rows seen before and from heads, alone and together: the text is plain decoding's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import entmtp
from entmtp.bank.costs import relative
from entmtp.native.abi import SOURCES
from helpers.policies import PAYING_NODES
from helpers.settings import prompts

WHO = ["text", "recycling", "text,recycling", "heads", "text,heads", "auto"]
SAMPLING: list[dict[str, Any]] = [
    {"temp": 0.0},
    {"temp": 0.9, "top_k": 40, "top_p": 0.9},
    {"temp": 0.7, "repeat_penalty": 1.3, "frequency_penalty": 0.2},
    {"temp": 0.0, "presence_penalty": 0.5},
]

# as of a small model on a GPU: eight nodes cost hardly more than two, sixteen far more
ON_DEVICE = replace(
    relative({1: 1.0, 2: 1.13, 4: 1.22, 8: 1.4, 16: 3.05, 64: 4.0}, chain=[0.0, 0.1, 0.13, 0.16, 0.19]),
    build=6e3,
)

Load = Callable[..., entmtp.Llama]


def answer(
    llm: Any, tokens: list[int], n: int, seed: int = 7, reset: bool = True, **sampling: Any
) -> list[int]:
    llm.set_seed(seed)
    found: list[int] = []
    for token in llm.generate(tokens, reset=reset, **sampling):
        found.append(token)
        if len(found) == n:
            break
    return found


def without_heads(load: Load, base: str = "q8_0", **more: Any) -> entmtp.Llama:
    """A model that has no heads beside it: tests give it none."""
    # by costs that stay: how fast this machine is must not decide whether anything is drafted
    return load(base, None, draft="entmtp", drafters="text,recycling", adapt=False, **more)


@pytest.mark.parametrize("who", ["text", "text,heads"])
@pytest.mark.parametrize("sampling", SAMPLING[:2])
def test_passes_are_filled_up_on_a_device(load: Load, who: str, sampling: dict[str, Any]) -> None:
    """Where a new size needs a graph, passes have sizes of powers of two: what fills them is no part of the text."""
    plain = load("f32")
    llm = load("f32", "hydra" if "heads" in who else None, draft="entmtp", drafters=who, adapt=False)
    assert llm.bank is not None
    llm.set_trees(replace(llm.bank, costs=ON_DEVICE), policy="auto")
    n_filled = 0
    for text in prompts("humaneval")[::14]:
        tokens = plain.tokenize(text.encode(), special=True)[:200]
        assert answer(llm, tokens[:-1], 1) == answer(plain, tokens[:-1], 1)
        llm.reset_draft_stats()
        assert answer(llm, tokens, 80, **sampling) == answer(plain, tokens, 80, **sampling)
        stats = llm.draft_stats
        nodes = stats.steps["n_nodes"].astype(int)
        sizes = 2 ** np.ceil(np.log2(nodes)).astype(int)
        n_filled += int((sizes > nodes).sum())
        assert stats.traffic.n_outputs == sizes.sum() + stats.traffic.n_passes - len(nodes)
    assert n_filled > 3


@pytest.mark.parametrize("who", WHO)
@pytest.mark.parametrize("base", ["f32", "q8_0"])
def test_equal_tokens(load: Load, who: str, base: str) -> None:
    plain = load(base)
    heads = "hydra" if "heads" in who or who == "auto" else None
    llm = load(base, heads, draft="entmtp", drafters=who, adapt=False)
    assert llm.bank is not None
    llm.set_trees(replace(llm.bank, costs=PAYING_NODES), policy="auto")
    n_accepted = 0
    for i, text in enumerate(prompts("gsm8k", "humaneval", "literature")[::14]):
        tokens = plain.tokenize(text.encode(), special=True)[:200]
        sampling = SAMPLING[i % len(SAMPLING)]
        llm.reset_draft_stats()
        assert answer(llm, tokens, 80, **sampling) == answer(plain, tokens, 80, **sampling), (who, i)
        stats = llm.draft_stats
        n_accepted += stats.n_accepted
        by = stats.accepted_by
        assert sum(by.values()) == stats.n_accepted
        asked = set(SOURCES) if who == "auto" else set(who.split(","))
        assert {name for name, n in by.items() if n} <= asked
    assert n_accepted > 20  # it did draft


def test_a_grammar_and_stop_strings(load: Load) -> None:
    plain, llm = load("q8_0"), without_heads(load)
    grammar = llama_cpp.LlamaGrammar.from_string('root ::= ("ab " | "ba ")*', verbose=False)
    for settings_ in ({"grammar": grammar}, {"stop": ["12", "\n\n"]}, {"logit_bias": {5: 4.0}}):
        texts = [
            m("Question: Tom has 12 boxes.\nAnswer:", max_tokens=60, temperature=0.8, seed=3, **settings_)[
                "choices"
            ][0]
            for m in (plain, llm)
        ]
        assert texts[0]["text"] == texts[1]["text"] and texts[0]["finish_reason"] == texts[1]["finish_reason"]


def test_a_model_without_heads_never_fails_for_lack_of_them(models: dict[str, Path], tmp_path: Path) -> None:
    model = tmp_path / "lonely.gguf"
    model.write_bytes(models["q8_0"].read_bytes())
    llm = entmtp.Llama(model, draft="entmtp", n_ctx=512, n_threads=1, verbose=False)
    assert (
        llm.bank is not None and llm.bank.costs is not None and llm.bank.costs.key is not None
    )  # measured here
    llm.close()
    llm = entmtp.Llama(
        model, draft="entmtp", n_ctx=512, n_threads=1, calibrate=False, adapt=False, verbose=False
    )
    assert llm.policy == "auto" and llm.drafters == ("text", "recycling") and llm.heads_path is None
    out = llm(
        "Question: Tom has 12 boxes with 8 apples in each box.\nAnswer:", max_tokens=80, temperature=0.0
    )
    assert out["usage"]["completion_tokens"] > 20
    assert llm.draft_stats.n_accepted > 0
    with pytest.raises(ValueError, match='policy "entropy" needs draft heads'):
        llm.set_trees(policy="entropy")
    with pytest.raises(ValueError, match="there are none; give heads=PATH"):
        llm.set_trees(policy="auto", drafters="heads")
    assert llm.policy == "auto"  # all stayed as it was
    # a fixed tree is filled from rows seen before: Token Recycling's
    llm.set_trees("mc_sim_7b_63", policy="static")
    llm.reset_draft_stats()
    again = llm(
        "Question: Tom has 12 boxes with 8 apples in each box.\nAnswer:", max_tokens=80, temperature=0.0
    )
    assert again["choices"][0]["text"] == out["choices"][0]["text"]
    stats = llm.draft_stats
    assert stats.n_drafted == 63 * stats.n_steps and stats.accepted_by["recycling"] == stats.n_accepted > 0
    llm.set_trees(policy="off")
    llm.close()
    with pytest.raises(ValueError, match="drafters is 'ghost', must be one of"):
        entmtp.Llama(model, draft="entmtp", drafters="ghost", verbose=False)
    with pytest.raises(ValueError, match='policy "confidence" needs draft heads'):
        entmtp.Llama(model, draft="entmtp", policy="confidence", verbose=False)


def test_a_memory_that_holds_no_trees(tmp_path: Path) -> None:
    from helpers.models import model_path

    with pytest.warns(RuntimeWarning, match="cannot hold a token tree: decoding plainly"):
        llm = entmtp.Llama(model_path("mamba"), draft="entmtp", n_ctx=256, verbose=False)
    assert llm.bank is None and llm.drafters == ()
    assert len(answer(llm, [1, 2, 3], 5, temp=0.0)) == 5
    llm.close()


def test_who_guessed_a_token(load: Load) -> None:
    llm = load("q8_0", "hydra", draft="entmtp", drafters="auto", adapt=False)
    assert llm.bank is not None
    llm.set_trees(replace(llm.bank, costs=PAYING_NODES), policy="auto")
    told: list[int] = []
    llm.on_token = lambda token, drafters: told.append(drafters)
    tokens = llm.tokenize(prompts("gsm8k")[0].encode())
    llm.reset_draft_stats()
    answer(llm, tokens, 120, temp=0.0)
    llm.on_token = None
    by = llm.draft_stats.accepted_by
    # a draft that was right is told of when it is drawn, the step counts it when it is taken: the last may be open
    first = [next((name for name, bit in SOURCES.items() if d & bit), "") for d in told]
    for name in SOURCES:
        assert 0 <= first.count(name) - by[name] <= 1
    assert sum(by.values()) > 10


def test_text_of_a_loaded_state_is_drafted_from(load: Load) -> None:
    llm = without_heads(load)
    line = llm.tokenize(b"The seven wizards of Oz met at the old mill. ")
    llm.reset()
    llm.eval(line * 4)
    state = llm.save_state()
    expected = answer(llm, line * 4, 40, temp=0.0)
    llm.reset()
    llm.eval(line[:3])
    llm.load_state(state)
    llm.reset_draft_stats()
    assert answer(llm, line * 4, 40, temp=0.0) == expected
    assert llm.draft_stats.accepted_by["text"] > 0


def test_forgetting_other_texts(load: Load) -> None:
    llm = without_heads(load)
    llm.set_trees("mc_sim_7b_63", policy="static")  # without heads: filled from rows that were seen
    tokens = llm.tokenize(prompts("literature")[0].encode())[:40]
    answer(llm, tokens, 60, temp=0.0)
    n_accepted = []
    for forget in (False, True):
        llm.reset()
        if forget:
            llm.decoder.forget()
        llm.reset_draft_stats()
        answer(llm, tokens, 12, temp=0.0)
        n_accepted.append(llm.draft_stats.n_accepted)
    assert n_accepted[0] > n_accepted[1], "what was recycled came from the answer before"
    llm.set_trees(entmtp.Bank.without_heads(), policy="auto")


ACTIONS = st.lists(
    st.sampled_from(["go on", "stop early", "cut back", "reset", "state", "other", "plain steps", "policy"]),
    min_size=3, max_size=8,
)  # fmt: skip


@settings(max_examples=12)
@given(actions=ACTIONS, who=st.sampled_from(WHO), seed=st.integers(0, 99))
def test_any_order_of_calls(load: Load, actions: list[str], who: str, seed: int) -> None:
    """What a twin that decodes plainly says after the same calls."""
    heads = "hydra" if "heads" in who or who == "auto" else None
    twins = (load("q8_0"), load("q8_0", heads, draft="entmtp", drafters=who))
    texts = [twins[0].tokenize(t.encode(), special=True)[:120] for t in prompts("gsm8k", "literature")[::9]]
    for m in twins:
        m.reset()
    now = texts[seed % len(texts)]
    states: list[Any] = [None, None]
    for i, action in enumerate(actions):
        temp = [0.0, 0.8][(seed + i) % 2]
        if action == "other":
            now = texts[(seed + i) % len(texts)]
        if action == "cut back":
            now = now[: max(4, len(now) - 17)]
        if action == "reset":
            for m in twins:
                m.reset()
        if action == "policy":
            twins[1].set_trees(policy="off" if twins[1].policy == "auto" else "auto")
        if action == "state":
            for k, m in enumerate(twins):
                m.eval(now[:20] if m.n_tokens == 0 else [])
                if states[k] is None:
                    states[k] = m.save_state()
                else:
                    m.load_state(states[k])
            assert twins[0].n_tokens == twins[1].n_tokens
            continue
        if action == "plain steps":
            for m in twins:
                m.reset()
                m.eval(now)
                for token in now[:5]:
                    m.eval([token])
            assert twins[0].sample(temp=0.0) == twins[1].sample(temp=0.0)
            continue
        n = 3 if action == "stop early" else 24
        said = [answer(m, now, n, seed=seed + i, temp=temp) for m in twins]
        assert said[0] == said[1], (who, actions[: i + 1])
        now = [*now, *said[0]][:400]
    if twins[1].policy == "off":
        twins[1].set_trees(policy="auto")
