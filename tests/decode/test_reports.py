"""What users of other engines reported of speculative decoding, tried here: docs/guarantees.md lists them.

Each test asks for what plain decoding gives; llama-cpp-python's own answers where it has any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from llama_cpp import LlamaGrammar

from entmtp import Llama
from helpers.settings import F32, prompts

LIST = r'root ::= "[" item ("," item)* "]"' + "\n" + r'item ::= "\"" [a-z]+ "\""'


@pytest.fixture(scope="module")
def pair(models: dict[str, Path]) -> Iterator[tuple[Llama, Llama]]:
    """The demo, plain and drafting with all there is."""
    with (
        closing(Llama(models["f32"], **F32)) as plain,
        closing(Llama(models["f32"], draft="entmtp", heads=models["hydra"], **F32)) as drafting,
    ):
        yield plain, drafting


def both(pair: tuple[Llama, Llama], prompt: Any, **settings: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same request to both; the drafting one must have drafted something that was right."""
    plain, drafting = pair
    drafting.reset_draft_stats()
    answers = [llm.create_completion(prompt, **{"seed": 3, **settings}) for llm in (plain, drafting)]
    return answers[0], answers[1]


def test_logprobs_are_those_of_the_distribution(models: dict[str, Path]) -> None:
    """ggml-org/llama.cpp#27972: every drafted token came with a probability of 1."""
    found = []
    for more in ({}, {"draft": "entmtp", "heads": models["hydra"]}):
        with closing(Llama(models["f32"], logits_all=True, **F32, **more)) as llm:
            answer = llm.create_completion(
                prompts("gsm8k")[0], max_tokens=40, temperature=0.8, logprobs=3, seed=5
            )
            found.append(answer["choices"][0]["logprobs"])
            accepted = llm.draft_stats.n_accepted
    assert accepted > 0
    assert found[0]["tokens"] == found[1]["tokens"]
    assert found[1]["token_logprobs"] == pytest.approx(found[0]["token_logprobs"], abs=1e-5)
    assert min(found[1]["token_logprobs"]) < -0.1
    assert found[0]["top_logprobs"][5].keys() == found[1]["top_logprobs"][5].keys()


def ends_in_a_draft(llm: Llama) -> tuple[list[int], dict[int, float]]:
    """A prompt after which the text's own drafts run over an end of text, and a bias that makes the model take it."""
    words = llm.tokenize(b" the cat sat on the mat and", add_bos=False)
    after = llm.tokenize(b" then it slept for a long time", add_bos=False)
    return [llm.token_bos(), *[*words, llm.token_eos(), *after] * 4, *words], {llm.token_eos(): 50.0}


def test_nothing_comes_after_the_end_of_text(pair: tuple[Llama, Llama]) -> None:
    """LostRuins/koboldcpp#1276: what was drafted after an end of text came out; sgl-project/sglang#39826: it was
    counted in the usage."""
    prompt, bias = ends_in_a_draft(pair[0])
    few = {str(k): v for k, v in bias.items()}
    plain, drafting = both(pair, prompt, max_tokens=20, temperature=0.0, logit_bias=few)
    assert plain["choices"] == drafting["choices"] and plain["usage"] == drafting["usage"]
    assert drafting["choices"][0]["finish_reason"] == "stop"
    assert drafting["usage"]["completion_tokens"] < 20


def test_nothing_comes_after_a_stop_string(pair: tuple[Llama, Llama]) -> None:
    """vllm-project/vllm#47616: tokens and their probabilities stayed behind a stop string that ended in a draft."""
    text = "one two three four. " * 6
    for stop in ("three", "four. one", " t"):
        plain, drafting = both(pair, text, max_tokens=40, temperature=0.0, stop=[stop])
        assert plain["choices"] == drafting["choices"] and plain["usage"] == drafting["usage"]
        assert stop not in drafting["choices"][0]["text"]


def test_accepted_tokens_are_those_that_came(pair: tuple[Llama, Llama]) -> None:
    """vllm-project/vllm#56101: accepted drafts behind an end of text counted as tokens of the step."""
    _, llm = pair
    prompt, bias = ends_in_a_draft(llm)
    llm.reset()
    llm.reset_draft_stats()
    taken = []
    for token in llm.generate(prompt, temp=0.0):
        taken.append(token)
        if len(taken) == 30:
            break
    stats = llm.draft_stats
    # the first token comes from the prompt's pass, and the last one is not evaluated
    assert stats.n_steps + stats.n_accepted == len(taken) - 1
    llm.reset_draft_stats()
    llm.create_completion(
        prompt, max_tokens=30, temperature=0.0, logit_bias={str(k): v for k, v in bias.items()}
    )
    assert llm.draft_stats.n_steps + llm.draft_stats.n_accepted <= 1


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_grammars_hold_in_drafts(pair: tuple[Llama, Llama], temperature: float) -> None:
    """vllm-project/vllm#9423, #36138: drafts were not checked against the grammar, or the engine crashed."""
    grammar = LlamaGrammar.from_string(LIST, verbose=False)
    asked = 'Words: ["red","green","blue"] ["red","green","blue"] '
    plain, drafting = both(pair, asked, max_tokens=48, temperature=temperature, grammar=grammar)
    assert plain["choices"] == drafting["choices"]
    assert drafting["choices"][0]["text"].startswith('["')


def test_states_are_loaded_again_and_again(pair: tuple[Llama, Llama]) -> None:
    """abetlen/llama-cpp-python#997: an assertion failed when states were loaded in turn, and evaluated after."""
    found: list[list[list[int]]] = []
    for llm in pair:
        states = []
        for text in prompts("literature")[:2]:
            llm.reset()
            llm.eval(llm.tokenize(text.encode()))
            states.append(llm.save_state())
        answers = []
        for state in (states[0], states[1], states[0], states[0]):
            llm.load_state(state)
            llm.eval(llm.tokenize(b" and then", add_bos=False))
            answer = []
            for _ in range(24):
                answer.append(llm.sample(temp=0.0))
                llm.eval(answer[-1:])
            answers.append(answer)
        found.append(answers)
    assert found[0] == found[1]
    assert found[1][0] == found[1][2] == found[1][3] != found[1][1]


def test_a_seed_gives_the_same_text_the_first_time_and_the_second(models: dict[str, Path]) -> None:
    """oobabooga/textgen#6977, ggml-org/llama.cpp#19981: the first text of a seed was another one than the second, for
    which the prompt was in the cache."""
    with closing(Llama(models["q8_0"], draft="entmtp", n_ctx=512, verbose=False)) as llm:
        texts = [
            llm.create_completion(prompts("literature")[0], max_tokens=48, temperature=1.0, seed=11)[
                "choices"
            ]
            for _ in range(3)
        ]
    assert texts[0] == texts[1] == texts[2]


def test_without_a_seed_texts_differ(models: dict[str, Path]) -> None:
    """abetlen/llama-cpp-python#1809: without a seed every new process drew the same texts."""
    texts = []
    for _ in range(2):
        with closing(Llama(models["q8_0"], draft="entmtp", n_ctx=512, verbose=False, seed=-1)) as llm:
            texts.append(
                llm.create_completion("Once upon", max_tokens=48, temperature=1.5)["choices"][0]["text"]
            )
    assert texts[0] != texts[1]


def test_a_finished_generation_leaves_no_settings_behind(pair: tuple[Llama, Llama]) -> None:
    """Found beside these: `sample` after a generation drew with the biases and the grammar of that one."""
    llm = pair[1]
    wanted = llm.tokenize(b" Zebra", add_bos=False)[0]
    llm.create_completion("Once", max_tokens=3, logit_bias={str(wanted): 100.0})
    llm.reset()
    llm.eval(llm.tokenize(b"Once upon a time there was a"))
    assert llm.sample(temp=0.0) == int(llm.decoder.logits(llm.n_vocab()).argmax()) != wanted


def test_drafts_to_the_end_of_the_context(models: dict[str, Path]) -> None:
    """oobabooga/textgen#6669: prompt lookup raised in long answers, where drafts met the context's end."""
    settings = F32 | {"n_ctx": 256}
    text = "tick tock " * 20
    found = []
    for more in ({}, {"draft": "entmtp"}):
        with closing(Llama(models["f32"], **settings, **more)) as llm:
            found.append(llm.create_completion(text, max_tokens=None, temperature=0.0))
    assert found[0]["choices"] == found[1]["choices"] and found[0]["usage"] == found[1]["usage"]
    assert found[1]["usage"]["total_tokens"] == 256
    assert found[1]["choices"][0]["finish_reason"] == "length"
