"""What a stream tells of its tokens on request, asked over HTTP: against plain decoding, and against itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from entmtp import Llama
from entmtp.measure.speed import ENOUGH
from helpers.serving import Server
from helpers.typed import DEMO

N_CTX = 512
ASK = {
    "messages": [{"role": "user", "content": "How many apples are left?"}],
    "max_tokens": 48,
    "temperature": 0.0,
}
WHO = {"text", "recycling", "heads", "model"}


@pytest.fixture(scope="module")
def alone(models: dict[str, Path]) -> Iterator[Server]:
    with Server(
        "--model",
        DEMO,
        "--heads",
        models["hydra"],
        "--ctx",
        N_CTX,
        "--threads",
        1,
        "--no-calibrate",
        key=None,
    ) as server:
        yield server


@pytest.fixture(scope="module")
def shared(models: dict[str, Path]) -> Iterator[Server]:
    with Server(
        "--model", DEMO, "--heads", models["hydra"], "--ctx", N_CTX, "--threads", 1, "--parallel", 3, "--no-calibrate",
        key=None
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(params=["alone", "shared"])
def server(request: pytest.FixtureRequest) -> Server:
    found: Server = request.getfixturevalue(request.param)
    return found


def events(server: Server, path: str = "/v1/chat/completions", **asked: Any) -> list[dict[str, Any]]:
    with server.http() as http, http.stream("POST", path, json={**asked, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        lines = [line for line in response.iter_lines() if line.startswith(("data: {", "{"))]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


class Told:
    """All that a stream told."""

    def __init__(self, chunks: list[dict[str, Any]]):
        choices = [chunk["choices"][0] for chunk in chunks]
        self.text = "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)
        self.tokens = [t for chunk in chunks for t in chunk["entmtp"]["tokens"]]
        self.steps = {s["step"]: s for chunk in chunks for s in chunk["entmtp"]["steps"]}
        self.speed = chunks[-1]["entmtp"]["speed"]


def details(server: Server, **asked: Any) -> Told:
    return Told(events(server, **{**ASK, **asked}, entmtp=True))


def check(told: Told) -> None:
    """The tokens are the text, and each goes on where the one before stands in its tree."""
    assert "".join(t["text"] for t in told.tokens) == told.text
    step, at = 0, 0
    for i, token in enumerate(told.tokens):
        if token["step"] is None:
            assert i == 0 and token["node"] is None and token["source"] == []
            continue
        if token["step"] != step:  # a step begins with the token before as its root
            assert token["step"] == step + 1
            step, at = token["step"], 0
            tree = told.steps[step]
            before = told.tokens[i - 1]
            if before["text"] and before["text"].isascii():
                assert tree["texts"][0] == before["text"]
            assert tree["parents"][0] == -1 and tree["sources"][0] == []
            assert all(0 <= parent < k for k, parent in enumerate(tree["parents"]) if k)
            assert all(who and set(who) <= WHO for who in tree["sources"][1:])
            assert len(tree["texts"]) == len(tree["parents"]) == len(tree["sources"])
        assert at is not None  # a token that left the tree ends the step
        node = token["node"]
        if node is None:
            assert token["source"] == []
        else:
            assert told.steps[step]["parents"][node] == at
            assert token["source"] == told.steps[step]["sources"][node]
            assert told.steps[step]["texts"][node] == (token["text"] or token.get("piece"))
        at = node
    assert sorted(told.steps) == list(range(1, step + 1))


def test_details_are_of_the_text(server: Server) -> None:
    told = details(server)
    check(told)
    assert len(told.text) > 20
    with server.http() as http:
        whole = http.post("/v1/chat/completions", json=ASK).json()
    assert told.text == whole["choices"][0]["message"]["content"]
    n_tokens = whole["usage"]["completion_tokens"]
    assert len(told.tokens) == told.speed["tokens"] == n_tokens + ("piece" in told.tokens[-1])
    # of the last token it is known that it was guessed, but it is not evaluated any more
    right = sum(t["node"] is not None for t in told.tokens)
    assert right - told.speed["accepted"] in (0, 1) and right > 0
    assert told.speed["passes"] == len(told.steps)
    assert told.speed["drafted"] == sum(len(s["parents"]) - 1 for s in told.steps.values())
    assert told.speed["alone"]
    # known once there were passes over one token: on a busy machine an answer may have none
    n_single = sum(len(s["parents"]) == 1 for s in told.steps.values())
    known = told.speed["plain_pass_from"]
    assert known in ("this answer", "answers before", "calibration", None)
    assert n_single >= ENOUGH - 1 if known == "this answer" else n_single <= ENOUGH
    for name in ("plain_pass_us", "against_plain"):
        assert told.speed[name] is None if known is None else told.speed[name] > 0


def test_entropy_is_the_models(alone: Server) -> None:
    """Against logits of plain decoding."""
    prompt = "Once upon a time"
    sampling = {"top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.1, "temp": 0.0}
    told = Told(events(alone, "/v1/completions", prompt=prompt, max_tokens=40, temperature=0, entmtp=True))
    check(told)
    llm = Llama(DEMO, n_ctx=N_CTX, n_threads=1, n_threads_batch=1, verbose=False)
    tokens = llm.generate(llm.tokenize(prompt.encode()), **sampling)
    for token, seen in zip(tokens, told.tokens, strict=False):
        row = llm.decoder.logits(llm.vocab_size).astype(np.float64)
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        assert seen["entropy"] == pytest.approx(-(p * np.log(p)).sum(), abs=2e-3)
        assert seen["p"] == pytest.approx(p[token], abs=1e-3)
    tokens.close()
    llm.close()
    entropies = [t["entropy"] for t in told.tokens]
    assert told.tokens[0]["running"] == entropies[0]
    assert all(min(entropies) <= t["running"] <= max(entropies) for t in told.tokens)


def test_characters_of_several_tokens(server: Server) -> None:
    """A character belongs to the token that begins it; what stop sequences hold back or cut has its place, too."""
    wanted = "é€ 😀🚀 ü."
    told = details(server, grammar=f'root ::= "{wanted}"')
    check(told)
    assert told.text == wanted
    assert len(told.tokens) > len(wanted) and any(t["text"] == "" for t in told.tokens)
    assert not any(t["text"] and t["text"] not in wanted for t in told.tokens)
    for stop in ("🚀", "😀", " "):
        cut = details(server, grammar=f'root ::= "{wanted}"', stop=stop)
        check(cut)
        assert cut.text == wanted[: wanted.index(stop)]
    short = details(server, grammar=f'root ::= "{wanted}"', max_tokens=3)  # within a character
    check(short)
    assert wanted.startswith(short.text) and 3 <= len(short.tokens) < len(told.tokens)


def test_answers_in_company(shared: Server) -> None:
    asked = [{"messages": [{"role": "user", "content": f"{i} and {i + 1} apples"}]} for i in range(9)]
    with ThreadPoolExecutor(3) as clients:
        answers = list(clients.map(lambda a: details(shared, **a), asked))
    for told in answers:
        check(told)
    assert [details(shared, **a).text for a in asked] == [told.text for told in answers]
    for told in answers:
        if not told.speed["alone"]:  # what others shared is compared with nothing
            assert told.speed["against_plain"] is told.speed["plain_pass_us"] is None
    assert not all(told.speed["alone"] for told in answers)


def test_choices_and_usage(alone: Server) -> None:
    chunks = events(alone, **ASK, n=2, entmtp=True, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and "entmtp" not in chunks[-1]
    for index in range(2):
        check(Told([c for c in chunks[:-1] if c["choices"][0]["index"] == index]))


def test_who_does_not_ask_sees_nothing(server: Server) -> None:
    for chunk in events(server, **ASK):
        assert set(chunk) == {"id", "model", "created", "object", "choices"}
    others = {
        "/v1/responses": {"input": "Hello", "max_output_tokens": 8},
        "/v1/messages": {"messages": ASK["messages"], "max_tokens": 8},
        "/api/chat": {"messages": ASK["messages"], "options": {"num_predict": 8}},
    }
    for path, asked in others.items():
        assert "entmtp" not in json.dumps(events(server, path, **asked, entmtp=True))


def test_details_want_a_stream(alone: Server) -> None:
    with alone.http() as http:
        answer = http.post("/v1/chat/completions", json={**ASK, "entmtp": True})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "entmtp" and "stream" in answer.json()["error"]["message"]
