"""`entmtp serve --parallel`: several clients at a time, each with the answer that is its own."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from entmtp import Llama, kernels
from helpers.serving import Server, one_sentence, run
from helpers.typed import DEMO

PROMPTS = ["Once upon a time", "def add(a, b):", "The sea was calm and", "5 + 6 ="]
N_CTX = 512


@pytest.fixture(scope="module")
def server(models: dict[str, Path]) -> Iterator[Server]:
    with Server(
        "--model", DEMO, "--heads", models["hydra"], "--model-alias", "demo", "--ctx", N_CTX, "--threads", 1,
        "--n-threads-batch", 1, "--parallel", 3, "--stall", 0.05,
    ) as running:  # fmt: skip
        yield running


@pytest.fixture(scope="module")
def alone() -> Iterator[Llama]:
    llm = Llama(DEMO, n_ctx=N_CTX, n_threads=1, n_threads_batch=1, flash_attn=True, verbose=False)
    yield llm
    llm.close()


def text_alone(llm: Llama, prompt: str, settings: dict[str, Any]) -> str:
    llm.reset()
    # what the server takes where a request is silent
    answer = llm.create_completion(prompt, repeat_penalty=1.1, min_p=0.05, top_k=40, **settings)
    return str(answer["choices"][0]["text"])


@pytest.mark.skipif(not kernels.available(), reason="bits are equal with the CPU kernels only")
def test_answers_are_what_they_are_alone(server: Server, alone: Llama) -> None:
    draw = random.Random(2)
    asked = [
        (
            draw.choice(PROMPTS) * draw.choice((1, 8)),
            {"max_tokens": draw.randint(1, 50), "temperature": draw.choice((0.0, 1.0)), "seed": i},
        )
        for i in range(30)
    ]

    def ask(i: int) -> str:
        prompt, settings = asked[i]
        create = server.client().completions.create
        if i % 2:
            return create(model="demo", prompt=prompt, **settings).choices[0].text
        return "".join(
            c.choices[0].text for c in create(model="demo", prompt=prompt, stream=True, **settings)
        )

    before = server.metrics()
    with ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(ask, range(len(asked))))
    for (prompt, settings), answer in zip(asked, answers, strict=True):
        assert answer == text_alone(alone, prompt, settings), (prompt, settings)
    served = 'entmtp_requests_total{path="/v1/completions",status="200"}'
    server.until(lambda m: m[served] - before[served] == len(asked))
    assert server.metrics()["entmtp_requests_running"] == 0


def test_clients_that_leave_do_not_stop_others(server: Server, alone: Llama) -> None:
    settings = {"max_tokens": 60, "temperature": 0.0, "seed": 1}
    body = {"prompt": PROMPTS[0], "stream": True, **settings, "max_tokens": 400}

    def leave(_: int) -> None:
        with server.http() as http, http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())

    def stay(i: int) -> str:
        return (
            server.client()
            .completions.create(model="demo", prompt=PROMPTS[i % 4], **settings)
            .choices[0]
            .text
        )

    with ThreadPoolExecutor(8) as clients:
        leaving = [clients.submit(leave, i) for i in range(12)]
        staying = [clients.submit(stay, i) for i in range(12)]
        for one in leaving:
            one.result()
        for i, one in enumerate(staying):
            assert one.result() == text_alone(alone, PROMPTS[i % 4], settings)
    # the request that was left, once more and to its end
    again = server.client().completions.create(model="demo", prompt=PROMPTS[0], **settings)
    assert again.choices[0].text == text_alone(alone, PROMPTS[0], settings)
    server.until(lambda m: m["entmtp_requests_running"] == 0 and m["entmtp_requests_waiting"] == 0)


def test_what_is_not_of_a_slot(server: Server) -> None:
    with server.http() as http:
        assert [m["id"] for m in http.get("/v1/models").json()["data"]] == ["demo"]
        tokens = http.post("/extras/tokenize", json={"input": "The sea"}).json()["tokens"]
        assert http.post("/extras/detokenize", json={"tokens": tokens}).json()["text"].strip() == "The sea"
        long = http.post("/v1/completions", json={"prompt": "word " * N_CTX})
        assert long.status_code == 400 and "512" in json.dumps(long.json())


def test_settings_that_cannot_work() -> None:
    said = one_sentence(run("--model", DEMO, "--parallel", 2, "--embedding", "true"))
    assert "parallel answers cannot be combined with embedding" in said
    assert "stall" in one_sentence(run("--model", DEMO, "--parallel", 2, "--stall", "0"))


@pytest.mark.parametrize("parallel", [1, 2])
def test_quantised_keys_and_values(parallel: int) -> None:
    """`--cache-type` as in the other commands, and with it flash attention."""
    types = {"type_k": "q8_0", "type_v": "q8_0"}
    with closing(Llama(DEMO, n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False, **types)) as llm:  # type: ignore[arg-type]
        expected = text_alone(llm, PROMPTS[0], {"max_tokens": 20, "temperature": 0.0})
    with Server(
        "--model", DEMO, "--ctx", 128, "--threads", 1, "--parallel", parallel, "--cache-type", "q8_0"
    ) as server:
        create = server.client().completions.create
        answer = create(model="x", prompt=PROMPTS[0], max_tokens=20, temperature=0.0)
    assert answer.choices[0].text == expected
