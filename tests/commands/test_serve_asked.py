"""What OpenAI's clients send today, each with the answer it should have; and bad requests, each with a sentence."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from helpers.serving import Server
from helpers.typed import DEMO

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
SETTINGS: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0}


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "parallel"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(
        "--model", DEMO, "--ctx", 512, "--threads", 1, "--parallel", request.param, "--chat_format", "chatml",
        "--max-waiting", 3, "--max-body", 100_000,
    ) as running:  # fmt: skip
        yield running


def ask(server: Server, path: str, **body: Any) -> Any:
    with server.http() as http:
        answer = http.post(path, json={**SETTINGS, **body})
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(server: Server, path: str, status: int = 400, **body: Any) -> dict[str, Any]:
    with server.http() as http:
        answer = http.post(path, json=body)
    assert answer.status_code == status, answer.text
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def said(answer: Any) -> list[str]:
    return [c["message"]["content"] if "message" in c else c["text"] for c in answer["choices"]]


def test_the_model_has_a_name(server: Server) -> None:
    models = server.client().models.list().data
    assert [m.id for m in models] == [DEMO.stem]
    assert ask(server, TEXT, prompt="The sea")["model"] == DEMO.stem


def test_what_the_server_says_of_itself(server: Server) -> None:
    assert server.client().models.retrieve(DEMO.stem).id == DEMO.stem
    with pytest.raises(openai.NotFoundError) as raised:
        server.client().models.retrieve("another")
    assert raised.value.param == "model"
    with server.http() as http:
        tokens = http.post("/tokenize", json={"input": "The sea"}).json()["tokens"]
        assert tokens == http.post("/extras/tokenize", json={"input": "The sea"}).json()["tokens"]
        assert "The sea" in http.post("/detokenize", json={"tokens": tokens}).json()["text"]
        # a model that writes keeps nobody from asking
        body = {
            "prompt": "The sea",
            "n": 16,
            "temperature": 1.5,
            "max_tokens": 400,
            "stream": True,
        }  # takes a while
        with http.stream("POST", TEXT, json=body) as stream:
            lines = stream.iter_lines()  # held: dropped, it would close the stream
            next(lines)
            assert server.until(lambda m: m["entmtp_requests_running"] == 1)
            assert http.get("/health").json() == {"status": "ok"}
            assert http.get("/v1/models").status_code == 200


def test_roles_and_parts(server: Server) -> None:
    plain = [{"role": "system", "content": "Be brief.\nAlways."}, {"role": "user", "content": "The sea"}]
    parts = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Always."}],
        },
        {"role": "user", "content": [{"type": "text", "text": "The sea"}]},
    ]
    assert said(ask(server, CHAT, messages=parts)) == said(ask(server, CHAT, messages=plain))
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    error = refused(server, CHAT, messages=image)
    assert "'image_url'" in error["message"] and error["param"] == "messages"


def test_several_choices(server: Server) -> None:
    single = [said(ask(server, TEXT, prompt="The", temperature=1.5, seed=5 + i))[0] for i in range(3)]
    answer = ask(server, TEXT, prompt="The", temperature=1.5, seed=5, n=3)
    assert said(answer) == single and len(set(single)) > 1
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    texts = ["", "", ""]
    for chunk in server.client().completions.create(
        model="x", prompt="The", n=3, seed=5, stream=True, temperature=1.5, max_tokens=12
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == single
    messages = [{"role": "user", "content": "The sea"}]
    assert len(said(ask(server, CHAT, messages=messages, n=2, temperature=1.0))) == 2


def test_several_prompts(server: Server) -> None:
    prompts = ["The sea", "Once upon", "5 + 6"]
    single = [said(ask(server, TEXT, prompt=p))[0] for p in prompts]
    answer = ask(server, TEXT, prompt=prompts)
    assert said(answer) == single and [c["index"] for c in answer["choices"]] == [0, 1, 2]
    with server.http() as http:
        tokens = [http.post("/extras/tokenize", json={"input": p}).json()["tokens"] for p in prompts]
    assert said(ask(server, TEXT, prompt=tokens, n=2))[::2] == single
    assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))


def test_usage_of_a_stream(server: Server) -> None:
    messages: Any = [{"role": "user", "content": "The sea"}]
    whole = ask(server, CHAT, messages=messages)["usage"]
    for n in (1, 2):
        *chunks, last = server.client().chat.completions.create(
            model="x", messages=messages, n=n, stream=True, stream_options={"include_usage": True}, **SETTINGS
        )
        assert last.choices == [] and last.usage is not None
        assert last.usage.prompt_tokens == whole["prompt_tokens"]
        assert last.usage.completion_tokens == n * whole["completion_tokens"]
        assert all(c.usage is None for c in chunks)


def test_a_schema_in_openais_form(server: Server) -> None:
    form: dict[str, Any] = {
        "type": "json_schema",
        "json_schema": {"name": "x", "schema": {"type": "boolean"}},
    }
    messages = [{"role": "user", "content": "Yes?"}]
    assert said(ask(server, CHAT, messages=messages, response_format=form))[0].strip() in ("true", "false")
    error = refused(server, CHAT, messages=messages, response_format={"type": "json_schema"})
    assert error["param"] == "response_format"


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", -3), ("top_p", 7), ("min_p", -0.1), ("n", 0), ("n", 1000), ("n", "two"),
     ("n", True), ("seed", "a"), ("seed", 1.5), ("prompt", [-1, 5]), ("prompt", [True]), ("prompt", ["x"] * 200),
     ("max_tokens", -5), ("logit_bias", {"5": 101}), ("modalities", ["audio"]), ("prompt", [["x"]])],
)  # fmt: skip
def test_values_that_cannot_be(server: Server, name: str, value: Any) -> None:
    error = refused(server, TEXT, **{"prompt": "x", name: value})
    assert error["param"] == name and name in error["message"]


def test_a_bias_beside_a_least_length(server: Server) -> None:
    """llama-cpp-python forgets both where there are both."""
    with server.http() as http:
        token = http.post("/tokenize", json={"input": " sea"}).json()["tokens"][-1]
    biased = {"prompt": "The", "logit_bias": {str(token): 100}, "repeat_penalty": 1.0}
    plain = said(ask(server, TEXT, prompt="The", repeat_penalty=1.0))
    assert said(ask(server, TEXT, min_tokens=3, **biased)) == said(ask(server, TEXT, **biased)) != plain


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 3}, 3), ({"logprobs": False}, 0), ({}, 0)],
)
@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_a_chat(server: Server, asked: dict[str, Any], wanted: int, stream: bool) -> None:
    """As many beside each token as are asked for; none where nothing is said of them."""
    messages = [{"role": "user", "content": "The sea"}]
    # the toy would end at once, with a text that the template stops at
    tag = server.post("/tokenize", input="x<|im_end|>").json()["tokens"]
    asked = {**asked, "logit_bias": {str(token): -100 for token in tag}}
    if stream:
        chunks = server.client().chat.completions.create(
            model="x", messages=messages, stream=True, **asked, **SETTINGS
        )  # type: ignore[call-overload]
        told = [t for c in chunks for t in (c.choices[0].logprobs.content if c.choices[0].logprobs else [])]
    else:
        choice = ask(server, CHAT, messages=messages, **asked)["choices"][0]
        told = [
            openai.types.chat.ChatCompletionTokenLogprob(**t)
            for t in (choice["logprobs"] or {"content": []})["content"]
        ]
    assert bool(told) == bool(asked.get("logprobs")) and all(len(t.top_logprobs) == wanted for t in told)
    assert all(t.logprob <= 0 for t in told)


def test_one_of_several_functions_has_to_be_called(server: Server) -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {
            "type": "object", "properties": {"n": {"enum": values}}, "required": ["n"]}}}
        for name, values in (("count", [1, 2]), ("weigh", [3, 4]))
    ]  # fmt: skip
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "The sea"}],
        "tools": tools,
        "max_tokens": 64,
    }
    choice = ask(server, CHAT, tool_choice="required", **asked)["choices"][0]
    [call] = choice["message"]["tool_calls"]
    values = {"count": [1, 2], "weigh": [3, 4]}[call["function"]["name"]]
    assert json.loads(call["function"]["arguments"])["n"] in values
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    # cut off, it is no call
    cut = ask(server, CHAT, tool_choice="required", **{**asked, "max_tokens": 3})["choices"][0]
    assert cut["finish_reason"] == "length" and "tool_calls" not in cut["message"]
    forced = {"type": "function", "function": {"name": "count"}}
    cut = ask(server, CHAT, tool_choice=forced, **{**asked, "max_tokens": 1})["choices"][0]
    assert cut["finish_reason"] == "length"
    for wrong in ([], [{"type": "function"}], "count"):
        error = refused(server, CHAT, **{**asked, "tools": wrong, "tool_choice": "required"})
        assert error["param"] in ("tools", "tool_choice")


def test_messages_as_they_were_answered(server: Server) -> None:
    """Clients send back what they had as an answer, with all its fields."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "The sea", "name": None},
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "audio": None,
            "function_call": None,
            "tool_calls": [call],
        },
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "calm"}]},
        {"role": "assistant", "content": "It is calm.", "annotations": [], "tool_calls": None},
        {"role": "user", "content": "And now?"},
    ]
    assert said(ask(server, CHAT, messages=messages))


def test_null_is_as_if_left_out(server: Server) -> None:
    settings = {"stop": None, "top_p": None, "stream": None, "repeat_penalty": None, "seed": None}
    assert said(ask(server, TEXT, prompt="The sea", **settings)) == said(ask(server, TEXT, prompt="The sea"))


def test_embeddings_of_a_model_for_text(server: Server) -> None:
    assert "embedding" in refused(server, "/v1/embeddings", input="x", model="x")["message"]


def test_bodies_that_are_none(server: Server) -> None:
    with server.http() as http:
        large = http.post(TEXT, content=b"x" * 100_001)
        assert large.status_code == 413 and "max_body" in large.json()["error"]["message"]
        deep = http.post(TEXT, content=b"[" * 90_000, headers={"content-type": "application/json"})
        assert deep.status_code == 400
        for body in (b"\xff\xfe", b"[1, 2]", b'"text"', b"{", b"null"):
            answer = http.post(TEXT, content=body, headers={"content-type": "application/json"})
            assert answer.status_code == 400, (body, answer.text)
            assert answer.json()["error"]["message"]
    assert ask(server, TEXT, prompt="The sea")


def test_a_queue_that_is_full(server: Server) -> None:
    """Three may wait (--max-waiting); who comes then is told when to come again, and those who wait are answered."""
    statuses: list[int] = []

    def one() -> None:
        with server.http() as http:
            answer = http.post(TEXT, json={"prompt": "The sea", "max_tokens": 400, "ignore_eos": True})
            statuses.append(answer.status_code)
            assert answer.status_code != 429 or answer.headers["retry-after"] == "1"

    clients = [threading.Thread(target=one) for _ in range(24)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert set(statuses) == {200, 429} and statuses.count(200) >= 4


def test_keys(server: Server) -> None:
    client = server.client(key="wrong")
    with pytest.raises(openai.AuthenticationError):
        client.models.list()
    with pytest.raises(openai.AuthenticationError, match="Invalid API key"):
        client.completions.create(model="x", prompt="x")
    # before the body is read, or looked at
    with httpx.Client(base_url=server.url) as http:
        assert http.post(TEXT, content=b"x" * 200_000).status_code == 401


def test_the_largest_seed(server: Server) -> None:
    assert len(said(ask(server, TEXT, prompt="The", n=2, seed=(1 << 32) - 1, temperature=1.0))) == 2


def test_pages_of_others_may_not_ask(server: Server, models: dict[str, Path]) -> None:
    with server.http() as http:
        answer = http.get("/v1/models", headers={"origin": "http://evil.example"})
        assert "access-control-allow-origin" not in answer.headers
    with (
        Server("--model", DEMO, "--ctx", 128, "--cors", "http://a.example,http://b.example") as open_to_two,
        open_to_two.http() as http,
    ):
        for origin, allowed in (("http://b.example", True), ("http://c.example", False)):
            answer = http.get("/v1/models", headers={"origin": origin})
            assert (answer.headers.get("access-control-allow-origin") == origin) == allowed
