"""The server over a real socket, asked with the openai client; every text against plain llama-cpp-python's."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import llama_cpp
import openai
import pytest

from helpers.serving import KEY, Server
from helpers.settings import prompts

N_CTX = 2048
N_THREADS = 1  # two processes share the cores, and threads that wait for each other would spin
LONG = 1900  # tokens; an answer that is still being written when the test has done its part
SAMPLING = {"top_k": 40, "min_p": 0.05, "repeat_penalty": 1.1}  # as the server's own defaults
GREEDY = {"temperature": 0.0}
DRAWN = {"temperature": 0.8, "top_p": 0.95, "seed": 7}


@pytest.fixture(scope="module")
def server(models: dict[str, Path]) -> Iterator[Server]:
    """The f32 demo model, guessing a tree of 8 tokens at every step."""
    with Server(
        "--model", models["f32"], "--heads", models["hydra"], "--draft", "static", "--trees", "generic-hydra:n8",
        "--model-alias", "demo", "--ctx", N_CTX, "--threads", N_THREADS, "--n-threads-batch", N_THREADS,
        "--type-k", 0, "--type-v", 0,
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> Iterator[llama_cpp.Llama]:
    """llama-cpp-python's own class on the same file."""
    llm = llama_cpp.Llama(
        str(models["f32"]), n_ctx=N_CTX, n_threads=N_THREADS, n_threads_batch=N_THREADS, type_k=0, type_v=0,
        logits_all=True, verbose=False,
    )  # fmt: skip
    yield llm
    llm.close()


def complete(client: openai.OpenAI, prompt: str, stream: bool = False, **settings: Any) -> str:
    asked = {"model": "demo", "prompt": prompt, "max_tokens": 48, **settings}
    if stream:
        return "".join(c.choices[0].text for c in client.completions.create(stream=True, **asked))
    return client.completions.create(**asked).choices[0].text


def chat(client: openai.OpenAI, text: str, stream: bool = False, **settings: Any) -> str:
    asked = {
        "model": "demo",
        "messages": [{"role": "user", "content": text}],
        "max_completion_tokens": 48,
        **settings,
    }
    if stream:
        chunks = client.chat.completions.create(stream=True, **asked)
        return "".join(c.choices[0].delta.content or "" for c in chunks)
    return client.chat.completions.create(**asked).choices[0].message.content or ""


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
@pytest.mark.parametrize("prompt", prompts()[::30])
def test_completion_is_plain_decodings(
    client: openai.OpenAI, plain: llama_cpp.Llama, prompt: str, settings: dict[str, Any]
) -> None:
    expected = plain(prompt, max_tokens=48, **settings, **SAMPLING)["choices"][0]["text"]
    assert complete(client, prompt, **settings) == expected
    assert complete(client, prompt, stream=True, **settings) == expected


@pytest.mark.parametrize("settings", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_chat_is_plain_decodings(
    client: openai.OpenAI, plain: llama_cpp.Llama, settings: dict[str, Any]
) -> None:
    messages = [{"role": "user", "content": "How many apples are left?"}]
    expected = plain.create_chat_completion(messages, max_tokens=48, **settings, **SAMPLING)
    text = expected["choices"][0]["message"]["content"]
    assert len(text) > 20
    assert chat(client, "How many apples are left?", **settings) == text
    assert chat(client, "How many apples are left?", stream=True, **settings) == text


def test_stop(client: openai.OpenAI, plain: llama_cpp.Llama) -> None:
    prompt = prompts("gsm8k")[0]
    whole = complete(client, prompt, max_tokens=64, **GREEDY)
    word = whole.split()[6]
    expected = plain(prompt, max_tokens=64, stop=[word], **GREEDY, **SAMPLING)["choices"][0]["text"]
    assert expected == whole[: whole.index(word)]
    assert complete(client, prompt, max_tokens=64, stop=[word], **GREEDY) == expected
    assert complete(client, prompt, max_tokens=64, stop=[word], stream=True, **GREEDY) == expected


def test_logprobs(client: openai.OpenAI, plain: llama_cpp.Llama) -> None:
    prompt = prompts("humaneval")[0]
    asked = {"max_tokens": 24, "logprobs": 3, **GREEDY}
    expected = plain(prompt, **asked, **SAMPLING)["choices"][0]["logprobs"]
    found = client.completions.create(model="demo", prompt=prompt, **asked).choices[0].logprobs
    assert found.tokens == expected["tokens"]
    assert found.token_logprobs == pytest.approx(expected["token_logprobs"], abs=1e-3)
    for a, b in zip(found.top_logprobs, expected["top_logprobs"], strict=True):
        assert a == pytest.approx(b, abs=1e-3)

    streamed = [
        (c.choices[0].logprobs.tokens[0], c.choices[0].logprobs.token_logprobs[0])
        for c in client.completions.create(model="demo", prompt=prompt, stream=True, **asked)
        if c.choices[0].logprobs
    ]
    assert [t for t, _ in streamed] == expected["tokens"]
    assert [p for _, p in streamed] == pytest.approx(expected["token_logprobs"], abs=1e-3)


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=8, logprobs=True, top_logprobs=2,
        **GREEDY,
    )  # fmt: skip
    rows = answer.choices[0].logprobs.content
    assert "".join(row.token for row in rows) == answer.choices[0].message.content
    assert all(row.logprob <= 0 and len(row.top_logprobs) >= 2 for row in rows)


SCHEMA = {
    "type": "object",
    "properties": {"left": {"type": "boolean"}, "fruit": {"enum": ["apple", "pear"]}},
    "required": ["left", "fruit"],
}


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_schema", "json_schema": {"name": "fruit", "schema": SCHEMA}},
        {"type": "json_object", "schema": SCHEMA},
    ],
    ids=["openai", "llama-cpp-python"],
)
def test_json_schema(client: openai.OpenAI, plain: llama_cpp.Llama, form: dict[str, Any]) -> None:
    messages = [{"role": "user", "content": "What is left?"}]
    expected = plain.create_chat_completion(
        messages,
        response_format={"type": "json_object", "schema": SCHEMA},
        max_tokens=48,
        **GREEDY,
        **SAMPLING,
    )["choices"][0]["message"]["content"]
    text = chat(client, "What is left?", response_format=form, **GREEDY)
    assert text == expected
    assert json.loads(text).keys() == {"left", "fruit"}
    assert chat(client, "What is left?", stream=True, response_format=form, **GREEDY) == text


def test_grammar(client: openai.OpenAI) -> None:
    text = complete(client, "The answer is", extra_body={"grammar": 'root ::= " yes" | " no"'}, **GREEDY)
    assert text in (" yes", " no")


def test_tokens_and_models(server: Server, client: openai.OpenAI, plain: llama_cpp.Llama) -> None:
    assert [m.id for m in client.models.list()] == ["demo"]
    tokens = plain.tokenize(b"two words", special=True)
    with server.http() as http:
        assert http.post("/extras/tokenize", json={"input": "two words"}).json() == {"tokens": tokens}
        assert http.post("/extras/tokenize/count", json={"input": "two words"}).json() == {
            "count": len(tokens)
        }
        back = http.post("/extras/detokenize", json={"tokens": tokens}).json()["text"]
    assert back == plain.detokenize(tokens).decode()


def test_api_key(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError) as error:
        complete(server.client("sk-wrong"), "Hello")
    assert error.value.status_code == 401
    for key in ("Bearer sk-wrong", None):
        answer = httpx.get(f"{server.url}/metrics", headers={"Authorization": key} if key else {})
        assert answer.status_code == 401
    assert httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_clients_mistakes(server: Server, client: openai.OpenAI) -> None:
    too_long = "word " * (N_CTX + 10)
    with pytest.raises(openai.BadRequestError, match="maximum context length is 2048"):
        complete(client, too_long)
    with pytest.raises(openai.APIError, match="maximum context length is 2048"):
        complete(client, too_long, stream=True)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        complete(client, "Hello", extra_body={"temperature": "warm"})
    with pytest.raises(openai.BadRequestError, match="grammar"):
        complete(client, "Hello", extra_body={"grammar": "root ::= ("})
    with server.http() as http:
        answer = http.post("/v1/completions", content="{", headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "not JSON" in answer.json()["error"]["message"]
    assert complete(client, "Hello", **GREEDY)  # and it goes on


def test_metrics_count(server: Server, client: openai.OpenAI) -> None:
    before = server.metrics()
    answer = client.completions.create(model="demo", prompt=prompts("humaneval")[1], max_tokens=60, **GREEDY)
    counted = 'entmtp_requests_total{path="/v1/completions",status="200"}'
    deadline = time.monotonic() + 30
    while (after := server.metrics())[counted] == before[counted] and time.monotonic() < deadline:
        time.sleep(0.02)  # a request is counted when it has ended, a moment after its answer has arrived

    def more(name: str) -> float:
        return after[name] - before[name]

    model, path = '{model="demo"}', '{path="/v1/completions"}'
    assert answer.usage is not None
    assert more(counted) == 1
    assert more(f"entmtp_prompt_tokens_total{model}") == answer.usage.prompt_tokens
    n_drawn = answer.usage.completion_tokens + (answer.choices[0].finish_reason == "stop")
    assert more(f"entmtp_generated_tokens_total{model}") == n_drawn
    steps = more(f"entmtp_steps_total{model}")
    accepted = more(f"entmtp_accepted_tokens_total{model}")
    assert 0 < accepted < more(f"entmtp_drafted_tokens_total{model}")
    # the first token comes from the prompt's pass; the last step may have been left in the middle
    assert n_drawn - 1 - 8 <= steps + accepted <= n_drawn
    assert more('entmtp_tree_steps_total{model="demo",tree="n8"}') == steps
    assert more(f"entmtp_entropy_nats_count{model}") == steps
    assert more('entmtp_entropy_nats_bucket{le="+Inf",model="demo"}') == steps
    assert more(f"entmtp_entropy_nats_sum{model}") > 0
    assert more('entmtp_step_seconds_total{model="demo",part="verify"}') > 0
    for name in ("request", "queue", "time_to_first_token"):
        assert more(f"entmtp_{name}_seconds_count{path}") == 1
    assert (
        0 < more(f"entmtp_time_to_first_token_seconds_sum{path}") < more(f"entmtp_request_seconds_sum{path}")
    )


def test_metrics_do_not_grow(server: Server) -> None:
    with server.http() as http:
        assert http.post("/made-up-0", json={}).status_code == 404
        names = server.metrics().keys()
        for i in range(1, 20):
            http.post(f"/made-up-{i}", json={})
    assert server.metrics().keys() == names


def left(metrics: dict[str, float]) -> float:
    return metrics['entmtp_requests_total{path="/v1/completions",status="499"}']


@pytest.fixture
def long_answer(server: Server) -> Callable[..., Any]:
    """A streamed answer that has begun and goes on for a long time; close it to leave."""

    def begin(prompt: str = "It was a cold night, and") -> openai.Stream[Any]:
        stream = server.client().completions.create(
            model="demo", prompt=prompt, max_tokens=LONG, stream=True, temperature=1.5, seed=1,
            logit_bias={str(2): -100}, extra_body={"min_tokens": LONG},
        )  # fmt: skip
        next(stream)
        return stream

    return begin


def test_client_leaves_a_stream(
    server: Server, long_answer: Callable[..., Any], plain: llama_cpp.Llama
) -> None:
    before = server.metrics()
    stream = long_answer()
    next(stream)
    stream.close()
    after = server.until(lambda m: left(m) == left(before) + 1)
    tokens = 'entmtp_generated_tokens_total{model="demo"}'
    assert 2 <= after[tokens] - before[tokens] < LONG
    assert after["entmtp_requests_running"] == 0
    later = server.metrics()
    assert later['entmtp_steps_total{model="demo"}'] == after['entmtp_steps_total{model="demo"}']
    expected = plain("It was a cold night, and the", max_tokens=32, **GREEDY, **SAMPLING)
    text = complete(server.client(), "It was a cold night, and the", max_tokens=32, **GREEDY)
    assert text == expected["choices"][0]["text"]


def test_client_leaves_before_the_answer(server: Server, plain: llama_cpp.Llama) -> None:
    before = server.metrics()
    body = {"prompt": "It was", "max_tokens": LONG, "min_tokens": LONG, "temperature": 1.5}
    with pytest.raises(httpx.ReadTimeout), server.http() as http:
        http.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=0.5))
    after = server.until(lambda m: left(m) == left(before) + 1)
    tokens = 'entmtp_generated_tokens_total{model="demo"}'
    assert after[tokens] - before[tokens] < LONG
    expected = plain("It was a", max_tokens=32, **GREEDY, **SAMPLING)["choices"][0]["text"]
    assert complete(server.client(), "It was a", max_tokens=32, **GREEDY) == expected


def test_client_leaves_the_queue(server: Server, long_answer: Callable[..., Any]) -> None:
    before = server.metrics()
    running = long_answer()
    with server.http() as http, pytest.raises(httpx.ReadTimeout):
        http.post("/v1/completions", json={"prompt": "Hello"}, timeout=httpx.Timeout(60, read=0.3))
    after = server.until(lambda m: left(m) == left(before) + 1)
    assert (after["entmtp_requests_waiting"], after["entmtp_requests_running"]) == (0, 1)
    running.close()
    server.until(lambda m: m["entmtp_requests_running"] == 0)


def test_answers_come_in_order(
    server: Server, long_answer: Callable[..., Any], plain: llama_cpp.Llama
) -> None:
    texts = prompts("literature")[:5]
    expected = [plain(t, max_tokens=24, **DRAWN, **SAMPLING)["choices"][0]["text"] for t in texts]
    running = long_answer()
    done: list[int] = []
    lock = threading.Lock()

    def ask(i: int) -> str:
        text = complete(server.client(), texts[i], max_tokens=24, stream=bool(i % 2), **DRAWN)
        with lock:
            done.append(i)
        return text

    with ThreadPoolExecutor(len(texts)) as pool:
        answers = []
        for i in range(len(texts)):
            answers.append(pool.submit(ask, i))
            server.until(lambda m, n=i + 1: m["entmtp_requests_waiting"] == n)
        running.close()
        assert [a.result() for a in answers] == expected
    assert done == sorted(done)


def test_several_clients_at_once(server: Server, plain: llama_cpp.Llama) -> None:
    texts = prompts()[::6]
    expected = [plain(t, max_tokens=24, **DRAWN, **SAMPLING)["choices"][0]["text"] for t in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        answers = pool.map(
            lambda i: complete(server.client(), texts[i], max_tokens=24, stream=bool(i % 2), **DRAWN),
            range(len(texts)),
        )
        assert list(answers) == expected


@pytest.mark.skipif(os.name != "posix", reason="Windows ends a process without asking it")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signals_end_it(number: int, code: int, models: dict[str, Path]) -> None:
    with Server(
        "--model", models["q8_0"], "--draft", "off", "--ctx", N_CTX, "--model-alias", "demo"
    ) as server:
        asked = {"model": "demo", "prompt": "It was", "max_tokens": LONG, "temperature": 1.5}
        more = {"extra_body": {"min_tokens": LONG}}
        stream = server.client().completions.create(stream=True, **asked, **more)
        next(stream)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(server.client().completions.create, **asked, **more)
            server.until(lambda m: m["entmtp_requests_waiting"] == 1)
            found, stderr = server.stop(number)
            assert found == code
            assert "Traceback" not in stderr
            assert "ERROR" not in stderr
            with pytest.raises(openai.APIError, match="shutting down"):
                list(stream)
            with pytest.raises(openai.APIStatusError) as error:
                waiting.result()
            assert error.value.status_code == 503
