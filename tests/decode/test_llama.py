"""`entmtp.Llama` with drafting does what plain decoding does, argument by argument."""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from llama_cpp import LlamaGrammar, LogitsProcessorList, StoppingCriteriaList

from entmtp import Cancelled, EntmtpError, Llama
from helpers.settings import F32

PROMPT = "Question: Tom has 12 boxes with 8 apples in each box. How many apples does he have?\nAnswer:"

STATIC: dict[str, Any] = {"trees": "generic-hydra:n8", "policy": "static"}


@pytest.fixture
def pair(load: Callable[..., Llama]) -> tuple[Llama, Llama]:
    """Plain decoding of llama_cpp's own kind, and drafting that always drafts."""
    plain, draft = load(), load(heads="hydra", **STATIC)
    for llm in (plain, draft):
        llm.reset()
    draft.reset_draft_stats()
    return plain, draft


def strip(answer: Any) -> Any:
    """Without what differs from call to call: ids, times, model paths. Log-probabilities are
    compared to 1e-3: passes of different sizes differ in the sixth digit."""
    if isinstance(answer, dict):
        return {k: strip(v) for k, v in answer.items() if k not in ("id", "created", "model")}
    if isinstance(answer, list):
        return [strip(v) for v in answer]
    return Close(float(answer)) if isinstance(answer, float | np.floating) else answer


class Close:
    """A number that equals every number within 1e-3."""

    def __init__(self, value: float):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Close) and abs(self.value - other.value) <= 1e-3

    def __repr__(self) -> str:
        return f"~{self.value}"


class Twice:
    """A logits processor and stopping criterion that records what it is shown."""

    def __init__(self, stop_at: int | None = None):
        self.seen: list[list[int]] = []
        self.stop_at = stop_at

    def process(self, ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        self.seen.append(ids.tolist())
        scores = scores.copy()
        scores[int(ids[-1])] -= 2.0  # depends on the history: a wrong history gives other tokens
        return scores

    def stop(self, ids: np.ndarray, logits: np.ndarray) -> bool:
        self.seen.append(ids.tolist())
        return self.stop_at is not None and len(ids) >= self.stop_at


CALLS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "max_tokens": 64},
    "sampled": {"temperature": 0.8, "seed": 7, "max_tokens": 64},
    "top-k, top-p, min-p, typical": {
        "top_k": 20, "top_p": 0.8, "min_p": 0.02, "typical_p": 0.9, "seed": 3, "max_tokens": 64,
    },
    "one token": {"temperature": 0.0, "max_tokens": 1},
    "no limit": {"temperature": 0.0, "max_tokens": None},
    "stop": {"temperature": 0.0, "stop": ["=", "\n"], "max_tokens": 64},
    "stop inside a token": {"temperature": 0.8, "seed": 5, "stop": ["pl"], "max_tokens": 64},
    "echo": {"temperature": 0.0, "echo": True, "max_tokens": 24},
    "penalties": {
        "temperature": 0.8, "seed": 2, "max_tokens": 64,
        "repeat_penalty": 1.2, "frequency_penalty": 0.3, "presence_penalty": 0.2,
    },
    "mirostat": {"mirostat_mode": 1, "seed": 4, "max_tokens": 64},
    "mirostat 2": {"mirostat_mode": 2, "seed": 4, "max_tokens": 64},
    "logit bias": {"temperature": 0.0, "logit_bias": {"13": -100.0, "200": 1.5}, "max_tokens": 48},
    "hot": {"temperature": 2.0, "seed": 1, "max_tokens": 64},
}  # fmt: skip


@pytest.mark.parametrize("call", CALLS, ids=str)
def test_completion(call: str, pair: tuple[Llama, Llama]) -> None:
    answers = [strip(llm.create_completion(PROMPT, **CALLS[call])) for llm in pair]
    assert answers[0] == answers[1]
    if CALLS[call].get("max_tokens") != 1:
        assert pair[1].draft_stats.n_drafted > 0


@pytest.mark.parametrize("call", ["greedy", "sampled", "stop", "stop inside a token", "one token"])
def test_streaming(call: str, pair: tuple[Llama, Llama]) -> None:
    chunks = [[strip(c) for c in llm.create_completion(PROMPT, stream=True, **CALLS[call])] for llm in pair]
    assert chunks[0] == chunks[1]
    whole = pair[0].create_completion(PROMPT, **CALLS[call])["choices"][0]["text"]
    assert "".join(c["choices"][0]["text"] for c in chunks[0]) == whole


def test_plain_loop_equals_llama_cpp_python(models: dict[str, Path], load: Callable[..., Llama]) -> None:
    stock = llama_cpp.Llama(str(models["f32"]), **F32)
    ours = load()
    for call in CALLS.values():
        assert strip(stock.create_completion(PROMPT, **call)) == strip(ours.create_completion(PROMPT, **call))
    stock.close()


def test_logprobs(load: Callable[..., Llama]) -> None:
    for stream in (False, True):
        results = []
        for llm in (load(logits_all=True), load(heads="hydra", logits_all=True, **STATIC)):
            llm.reset()
            out = llm.create_completion(PROMPT, temperature=0.0, max_tokens=24, logprobs=3, stream=stream)
            results.append([strip(c) for c in out] if stream else strip(out))
        assert results[0] == results[1]


def test_chat_and_json(pair: tuple[Llama, Llama]) -> None:
    messages = [{"role": "user", "content": "Sam has 5 pens and loses 2. How many pens has he?"}]
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    for extra in (
        {"temperature": 0.0},
        {"temperature": 0.8, "seed": 9},
        {"response_format": {"type": "json_object", "schema": schema}, "seed": 1},
    ):
        answers = [strip(llm.create_chat_completion(messages, max_tokens=48, **extra)) for llm in pair]
        assert answers[0] == answers[1]
        chunks = [
            [strip(c) for c in llm.create_chat_completion(messages, max_tokens=48, stream=True, **extra)]
            for llm in pair
        ]
        assert chunks[0] == chunks[1]


def test_processors_and_criteria_see_the_same_history(pair: tuple[Llama, Llama]) -> None:
    start = len(pair[0].tokenize(PROMPT.encode(), special=True)) + 1
    seen = []
    for llm in pair:
        processor, criterion = Twice(), Twice(stop_at=start + 40)
        text = llm.create_completion(
            PROMPT, temperature=0.7, seed=11, max_tokens=200,
            logits_processor=LogitsProcessorList([processor.process]),
            stopping_criteria=StoppingCriteriaList([criterion.stop]),
        )["choices"][0]["text"]  # fmt: skip
        seen.append((text, processor.seen, criterion.seen))
    assert seen[0] == seen[1]
    assert len(seen[0][1]) > 30


def test_tokens_sent_into_the_generator(load: Callable[..., Llama]) -> None:
    """Sent tokens are proposals to llama_cpp: they are sampled against, and cut off where they differ."""
    answers = []
    for llm in (load(logits_all=True), load(heads="hydra", logits_all=True, **STATIC)):
        llm.reset()
        extra = llm.tokenize(b" Then", add_bos=False)
        out, walk = [], llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)
        token = next(walk)
        for i in range(40):
            out.append(token)
            token = walk.send(extra) if i % 7 == 3 else next(walk)
        walk.close()
        answers.append((out, llm.n_tokens, llm._input_ids.tolist()))
    assert answers[0] == answers[1]


def test_sent_tokens_need_all_logits(pair: tuple[Llama, Llama]) -> None:
    for llm in pair:
        walk = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)
        next(walk)
        with pytest.raises(ValueError, match="logits_all"):
            walk.send([5, 6])


def test_prefix_reuse_between_calls(pair: tuple[Llama, Llama]) -> None:
    texts = [PROMPT, PROMPT + " He has", PROMPT, PROMPT[:60], PROMPT + " He has 96", "def f(x):", "def f(x):"]
    answers = []
    for llm in pair:
        answers.append(
            [
                strip(llm.create_completion(t, temperature=0.8, seed=i, max_tokens=20))
                for i, t in enumerate(texts)
            ]
        )
        answers[-1].append(llm.n_tokens)
    assert answers[0] == answers[1]


def test_low_level_eval_and_sample_after_a_generation(pair: tuple[Llama, Llama]) -> None:
    """What is left behind after an abandoned generation is what plain decoding leaves."""
    for n in range(1, 12):
        after = []
        for llm in pair:
            llm.reset()
            walk = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)
            tokens = [next(walk) for _ in range(n)]
            walk.close()
            state = (tokens, llm.n_tokens, llm._input_ids.tolist())
            last = llama_cpp.llama_memory_seq_pos_max(llama_cpp.llama_get_memory(llm.ctx), 0)
            llm.eval([tokens[-1]])
            after.append((state, last, llm.sample(temp=0.0)))
        assert after[0] == after[1]


def test_save_and_load_state(pair: tuple[Llama, Llama]) -> None:
    answers = []
    for llm in pair:
        walk = llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0)
        head = [next(walk) for _ in range(9)]
        state = llm.save_state()  # in the middle of a tree
        rest = [next(walk) for _ in range(9)]
        walk.close()
        llm.create_completion("Something else entirely", max_tokens=8)
        llm.load_state(state)
        assert state.n_tokens == llm.n_tokens
        context = [*state.input_ids[: state.n_tokens].tolist(), head[-1]]
        walk = llm.generate(context, temp=0.0)
        assert [next(walk) for _ in range(9)] == rest
        walk.close()
        answers.append((head, rest, state.n_tokens))
    assert answers[0] == answers[1]


def test_ram_cache(load: Callable[..., Llama]) -> None:
    results = []
    for llm in (load(), load(heads="hydra", **STATIC)):
        llm.reset()
        llm.set_cache(llama_cpp.LlamaRAMCache())
        results.append(
            [
                strip(llm.create_completion(t, temperature=0.0, max_tokens=16))
                for t in (PROMPT, "import", PROMPT)
            ]
        )
        llm.set_cache(None)
    assert results[0] == results[1]


@pytest.mark.parametrize("policy", ["static", "entropy"])
def test_context_end(policy: str, load: Callable[..., Llama]) -> None:
    """Down to the last free cell of the context, then the same kind of error."""
    results = []
    for heads in (None, "hydra"):
        extra = {"trees": "generic-hydra:n8", "policy": policy} if heads and policy == "static" else {}
        llm = load(heads=heads, n_ctx=256, **extra)
        llm.reset()
        out = llm.create_completion(PROMPT, temperature=0.0, max_tokens=None)
        tokens: list[int] = []
        with pytest.raises(RuntimeError, match="context is full"):
            for token in llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0):
                tokens.append(token)
        results.append((strip(out), tokens, llm.n_tokens))
        assert llm.create_completion("def", max_tokens=4, temperature=0.0)["choices"]
    assert results[0] == results[1]
    assert results[0][2] == 256


def test_cancel_from_another_thread(pair: tuple[Llama, Llama]) -> None:
    for llm in pair:
        prompt = llm.tokenize(PROMPT.encode())
        expected = list(islice(llm.generate(prompt, temp=0.0), 400))
        llm.reset()
        tokens: list[int] = []
        canceller = threading.Thread(target=llm.cancel)  # in a pass, or between two
        for token in llm.generate(prompt, temp=0.0):
            tokens.append(token)
            if len(tokens) == 8:
                canceller.start()
            if len(tokens) == 399:  # however slow that thread is: one pass more at most
                canceller.join()
            assert len(tokens) < 400, "nobody cancelled"
        canceller.join()
        assert len(tokens) >= 8 and tokens == expected[: len(tokens)]
        # the next call is right
        assert list(islice(llm.generate(prompt, temp=0.0), 40)) == expected[:40]


def test_cancel_between_two_tokens(pair: tuple[Llama, Llama]) -> None:
    """It ends the generation there, even where the next tokens are accepted drafts that need no pass."""
    for llm in pair:
        for n in range(1, 9):
            tokens = []
            for token in llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0):
                tokens.append(token)
                if len(tokens) == n:
                    llm.cancel()
                assert len(tokens) <= n
            assert len(tokens) == n


def test_cancelled_eval_raises(load: Callable[..., Llama]) -> None:
    llm = load(heads="hydra", **STATIC)
    llm.reset()
    llm.cancel()
    with pytest.raises(Cancelled):
        llm.eval([1, 2, 3])
    llm.eval([1, 2, 3])
    assert llm.n_tokens == 3


def test_typical_acceptance(load: Callable[..., Llama]) -> None:
    llm = load(heads="hydra", accept="typical", **STATIC)
    plain = load()
    # greedy stays greedy
    a, b = (
        m.create_completion(PROMPT, temperature=0.0, max_tokens=48)["choices"][0]["text"]
        for m in (plain, llm)
    )
    assert a == b
    llm.reset_draft_stats()
    llm.create_completion(PROMPT, temperature=1.0, max_tokens=200)
    lossy = llm.draft_stats.tokens_per_step
    llm.reset_draft_stats()
    with pytest.warns(RuntimeWarning, match="repeat_penalty"):
        llm.create_completion(PROMPT, temperature=1.0, seed=1, repeat_penalty=1.1, max_tokens=32)
    assert lossy > 1.2


def test_statistics_add_up(pair: tuple[Llama, Llama]) -> None:
    llm = pair[1]
    tokens = list(islice(llm.generate(llm.tokenize(PROMPT.encode()), temp=0.0), 100))
    stats = llm.draft_stats
    # every token but the last was evaluated, in as many passes as there are steps
    assert stats.n_steps + stats.n_accepted == llm.n_tokens - len(llm.tokenize(PROMPT.encode()))
    assert len(tokens) == 100
    assert stats.tokens_per_step == pytest.approx(1 + stats.n_accepted / stats.n_steps)
    assert stats.trees_used == {"n8": stats.n_steps}
    assert (stats.steps["entropy"] > 0).all()
    assert set(stats.time_split) == {"draft", "verify", "sample", "host"}


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"draft": "eagle", "heads": "x"}, "draft"),
        ({"draft": "entmtp", "policy": "entropy"}, "needs draft heads"),
        ({"draft": "entmtp", "drafters": "heads"}, "there are none"),
        ({"draft": "entmtp", "drafters": []}, "at least one"),
        ({"draft": "entmtp", "heads": "no-such-file.gguf"}, "no file"),
        ({"heads": "x.gguf"}, "draft is None"),
        ({"policy": "best"}, "policy"),
        ({"score": "luck"}, "score"),
        ({"accept": "maybe"}, "accept"),
        ({"draft": "entmtp", "heads": "HYDRA", "embedding": True}, "embedding"),
        ({"draft": "entmtp", "heads": "HYDRA", "vocab_only": True}, "vocab_only"),
        ({"draft": "entmtp", "heads": "HYDRA", "trees": "no-such-bank"}, "no tree bank"),
        (
            {"draft": "entmtp", "heads": "HYDRA", "trees": "generic-hydra:n3", "policy": "static"},
            "no tree n3",
        ),
        ({"draft": "entmtp", "heads": "HYDRA", "policy": "static"}, "needs one tree"),
        ({"draft": "entmtp", "heads": "HYDRA", "trees": "mc_sim_7b_63"}, "no calibration"),
        (
            {"draft": "entmtp", "heads": "HYDRA", "trees": "mc_sim_7b_63", "policy": "auto"},
            "no costs",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], match: str, models: dict[str, Path]) -> None:
    arguments = {k: str(models["hydra"]) if v == "HYDRA" else v for k, v in arguments.items()}
    with pytest.raises(ValueError, match=match):
        Llama(models["q8_0"], **{**F32, **arguments})  # no heads lie beside this one


def test_heads_that_are_no_heads(models: dict[str, Path]) -> None:
    with pytest.raises(EntmtpError, match="not draft heads"):
        Llama(models["f32"], draft="entmtp", heads=models["q8_0"], **F32)


def test_grammar_object_is_reusable(pair: tuple[Llama, Llama]) -> None:
    grammar = LlamaGrammar.from_string('root ::= "yes" | "no"', verbose=False)
    for llm in pair:
        for _ in range(2):
            assert llm.create_completion("Is it?", grammar=grammar, max_tokens=8)["choices"][0]["text"] in (
                "yes",
                "no",
            )
