"""What a server writes: each of several answers is what it would be alone, echoes, stop strings, templates of models;
and what its edges say to pages, to queues and to bodies that are none."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest

from entmtp import Llama
from helpers.rewritten import rewritten
from helpers.serving import Server, one_sentence, run
from helpers.typed import DEMO

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = {"role": "user", "content": "weather?"}

# as GLM-4.5's template walks over the arguments of a call, by a name of its own for them
WALKS = """{%- for m in messages %}{{ m.role }}: {{ m.content }}
{%- for call in m.tool_calls or [] %}{% set _args = call.function.arguments %}
{% for k, v in _args.items() %}<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value>{% endfor %}{% endfor %}
{%- for tool in tools or [] %}{{ tool.function.parameters.properties.items() | list }}{% endfor %}
{%- endfor %}"""


@pytest.fixture(scope="module", params=[1, 2], ids=["one", "parallel"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with Server(
        "--model", DEMO, "--ctx", 512, "--threads", 1, "--parallel", request.param, "--chat_format", "chatml",
        "--max-waiting", 0, "--cors", "https://a.page", "--max-body", 100_000,
    ) as running:  # fmt: skip
        yield running


def ask(server: Server, path: str, **body: Any) -> Any:
    return server.post(path, **{"max_tokens": 12, "temperature": 0.0, **body}).json()


def status_of(server: Server, path: str, **body: Any) -> tuple[int, str]:
    with server.http() as http:
        answer = http.post(path, json={"max_tokens": 3, **body})
    return answer.status_code, answer.text


def events(server: Server, path: str, **body: Any) -> list[dict[str, Any]]:
    lines = server.post(path, **{"max_tokens": 12, "temperature": 0.0, "stream": True, **body}).text
    return [json.loads(line[6:]) for line in lines.splitlines() if line.startswith("data: {")]


def test_least_tokens_are_counted_for_each_answer(server: Server) -> None:
    end = server.post("/tokenize", input="<|endoftext|>").json()["tokens"][-1]
    asked = {"min_tokens": 5, "logit_bias": {str(end): 100.0}, "max_tokens": 40, "logprobs": 0}
    long = "The sea was calm, and the night was long. " * 3
    for prompts in ([long, "Hi"], ["Hi", long], ["Hi", "Hi"]):
        answer = ask(server, TEXT, prompt=prompts, **asked)
        assert [len(c["logprobs"]["tokens"]) for c in answer["choices"]] == [5, 5]
        assert {c["finish_reason"] for c in answer["choices"]} == {"stop"}


def test_an_echo_of_tokens_and_in_a_stream(server: Server) -> None:
    tokens = server.post("/tokenize", input="The sea was").json()["tokens"]
    for prompt in ("The sea was", tokens):
        whole = ask(server, TEXT, prompt=prompt, echo=True)["choices"][0]["text"]
        alone = ask(server, TEXT, prompt=prompt)["choices"][0]["text"]
        pieces = events(server, TEXT, prompt=prompt, echo=True)
        assert whole == "The sea was" + alone == "".join(c["choices"][0]["text"] for c in pieces)


def test_empty_stops_are_none(server: Server) -> None:
    wanted = ask(server, TEXT, prompt="The sea was")["choices"]
    for stop in ("", [""]):
        assert ask(server, TEXT, prompt="The sea was", stop=stop)["choices"] == wanted


def test_limits_by_either_name(server: Server) -> None:
    for limits in ({"max_tokens": None}, {}):
        with server.http() as http:
            asked = {"prompt": "The sea was", "temperature": 0.0, "max_completion_tokens": 3, **limits}
            assert http.post(TEXT, json=asked).json()["usage"]["completion_tokens"] == 3


def test_what_openai_lets_clients_leave_out_of_tools(server: Server) -> None:
    for function in ({"name": "now"}, {"name": "now", "description": None, "parameters": None}):
        ask(server, CHAT, messages=[USER], tools=[{"type": "function", "function": function}])
    refusal = {"role": "assistant", "content": [{"type": "refusal", "refusal": "I cannot."}]}
    ask(server, CHAT, messages=[USER, refusal, USER])


def test_chunks_of_a_request_have_one_id(server: Server) -> None:
    for many in ({"n": 2}, {"prompt": ["The sea", "Hi"]}):
        chunks = events(
            server, TEXT, **{"prompt": "The sea", "stream_options": {"include_usage": True}, **many}
        )
        assert len({(c["id"], c["created"]) for c in chunks}) == 1 and len(chunks) > 4


def test_nobody_may_wait_and_who_need_not_is_served(server: Server) -> None:
    for _ in range(3):
        ask(server, TEXT, prompt="The sea", max_tokens=1)


def test_pages_see_refusals(server: Server) -> None:
    with server.http() as http:
        for headers, body, status in (
            ({"authorization": "Bearer wrong"}, b"{}", 401),
            ({}, b"x" * 200_000, 413),
            ({}, b"{}", 400),
        ):
            answer = http.post(CHAT, content=body, headers={"origin": "https://a.page", **headers})
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://a.page"
        checked = http.options(
            CHAT, headers={"origin": "https://a.page", "access-control-request-method": "POST"}
        )
        assert checked.status_code == 200


@pytest.mark.parametrize(
    "body", ['{"model": "\\ud83d"}'.encode("utf-16"), b'{"model": "\xed\xa0\x80"}', b"\xff\xfe{"]
)
def test_bodies_that_are_no_utf_8(server: Server, body: bytes) -> None:
    for path in (TEXT, "/api/show", "/api/generate"):
        with server.http() as http:
            answer = http.post(path, content=body)
        assert answer.status_code == 400 and "not JSON" in answer.text


def test_penalties_that_no_float_holds(server: Server) -> None:
    for value in (0, 1e39):
        status, text = status_of(server, TEXT, prompt="Hi", repeat_penalty=value)
        assert status == 400 and "repeat_penalty" in text


def test_states_are_not_kept_of_several_texts() -> None:
    said = one_sentence(run("--model", DEMO, "--cache", "true", "--parallel", 2, "--port", 0))
    assert "parallel answers cannot be combined with cache" in said


@pytest.fixture(scope="module")
def walking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The toy with a chat template that takes the arguments of calls for objects."""
    folder = tmp_path_factory.mktemp("walking")
    template, model = folder / "walks.jinja", folder / "walks.gguf"
    template.write_text(WALKS, "utf-8")
    command = ["gguf.scripts.gguf_new_metadata", "--chat-template-file", template, "--force", DEMO, model]
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, capture_output=True)
    with Server("--model", model, "--ctx", 1024, "--threads", 1) as running:
        yield running


def _turns(arguments: str) -> list[dict[str, Any]]:
    call = {"id": "a", "type": "function", "function": {"name": "w", "arguments": arguments}}
    return [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "rain"},
    ]


def test_a_template_that_walks_over_arguments(walking: Server) -> None:
    ask(walking, CHAT, messages=_turns('{"city": "Paris"}'))
    result = [{"type": "tool_result", "tool_use_id": "a", "content": "rain"}]
    used = [{"type": "tool_use", "id": "a", "name": "w", "input": {"city": "Paris"}}]
    messages = [USER, {"role": "assistant", "content": used}, {"role": "user", "content": result}]
    ask(walking, "/v1/messages", messages=messages)


def test_what_a_template_cannot_write_is_the_clients(walking: Server) -> None:
    for messages in (_turns("null"), _turns("[1]"), _turns("no JSON")):
        status, text = status_of(walking, CHAT, messages=messages)
        assert status == 400 and "chat template cannot write" in text
    tool = {"type": "function", "function": {"name": "w", "parameters": {"type": "object"}}}
    status, text = status_of(walking, CHAT, messages=[USER], tools=[tool])
    assert status == 400 and "chat template cannot write" in text
    ask(walking, CHAT, messages=[USER])
    _, log = walking.stop(15)
    assert "Traceback" not in log


def test_embeddings_that_cannot_be(models: dict[str, Path]) -> None:
    with Server("--model", DEMO, "--ctx", 128, "--threads", 1, "--embedding", "true") as server:
        for given, said in (
            ([], "input is empty"),
            ("word " * 700, "it may have"),
            ("Hi", "names no pooling"),
        ):
            status, text = status_of(server, "/v1/embeddings", input=given)
            assert status == 400 and said in text


def test_embeddings(models: dict[str, Path]) -> None:
    """Of length 1, as floats or as bytes, and shorter where that is asked for; those of llama-cpp-python."""
    given = ["The sea was calm.", "Hi"]
    plain = llama_cpp.Llama(
        str(models["f32"]), embedding=True, pooling_type=1, n_ctx=128, n_threads=1, verbose=False
    )
    want = np.array([plain.embed(text) for text in given])
    with Server(
        "--model", models["f32"], "--ctx", 128, "--threads", 1, "--embedding", "true",
        "--kv-overrides", "llama.pooling_type=int:1",
    ) as server:  # fmt: skip

        def vectors(**body: Any) -> Any:
            return [one["embedding"] for one in ask(server, "/v1/embeddings", input=given, **body)["data"]]

        found = np.array(vectors())
        assert found.shape == want.shape and np.allclose(np.linalg.norm(found, axis=1), 1)
        assert np.allclose(found, want / np.linalg.norm(want, axis=1, keepdims=True), atol=2e-4)
        assert vectors(encoding_format="float") == vectors()
        in_bytes = [base64.b64decode(x) for x in vectors(encoding_format="base64")]
        assert np.allclose([np.frombuffer(x, "<f4") for x in in_bytes], found, atol=1e-7)
        short = np.array(vectors(dimensions=16))
        assert short.shape == (2, 16) and np.allclose(np.linalg.norm(short, axis=1), 1)
        assert np.allclose(np.array(ask(server, "/api/embed", input=given)["embeddings"]), found, atol=1e-7)
        many = [f"text {i} " * (1 + i % 7) for i in range(60)]  # several batches
        told = ask(server, "/v1/embeddings", input=many)
        assert [one["index"] for one in told["data"]] == list(range(60))
        assert told["usage"]["prompt_tokens"] == sum(len(plain.tokenize(text.encode())) for text in many)
        alone = np.array(
            [ask(server, "/v1/embeddings", input=many[i])["data"][0]["embedding"] for i in (0, 31, 59)]
        )
        assert np.allclose(np.array([told["data"][i]["embedding"] for i in (0, 31, 59)]), alone, atol=1e-5)
        for texts in ("", ["", "a"]):
            status, text = status_of(server, "/v1/embeddings", input=texts)
            assert status == 200 or (status == 400 and "a text is empty" in text)
        status, text = status_of(server, "/v1/embeddings", input=["a"] * 2049)
        assert status == 400 and "there may be 2048" in text
        for body in ({"dimensions": 10_000}, {"dimensions": 0}, {"encoding_format": "hex"}):
            status, text = status_of(server, "/v1/embeddings", input="Hi", **body)
            assert status == 400 and next(iter(body)) in text


def test_a_model_that_ranks_has_no_embeddings() -> None:
    """llama-cpp-python reads a vector where there is one number: what lies behind it in memory is of others."""
    with Server(
        "--model", DEMO, "--ctx", 128, "--threads", 1, "--embedding", "true",
        "--kv-overrides", "llama.pooling_type=int:4",
    ) as server:  # fmt: skip
        status, text = status_of(server, "/v1/embeddings", input="Hi")
        assert status == 400 and "ranks pairs of texts" in text
    llm = Llama(DEMO, embedding=True, pooling_type=4, n_ctx=128, n_threads=1, verbose=False)
    for given, said in (
        ("Hi", "ranks pairs"),
        ([], "empty"),
        (5, "a text, or a list"),
        ([1, 2], "a text, or a list"),
    ):
        with pytest.raises(ValueError, match=said):
            llm.embed(given)


THINKS = """{% for m in messages %}{{ m.content }}{% endfor %}
{%- if enable_thinking is defined and not enable_thinking %} without{% endif %}
{%- if reasoning_effort is defined %} effort {{ reasoning_effort }}{% endif %}
{%- if mood is defined %} mood {{ mood }}{% endif %}"""


def test_names_for_the_template(tmp_path: Path) -> None:
    model = rewritten(DEMO, tmp_path / "thinks.gguf", (), lambda w: w.add_chat_template(THINKS))
    with Server("--model", model, "--ctx", 256, "--threads", 1) as server:

        def length(path: str = CHAT, **body: Any) -> int:
            answer = ask(server, path, messages=[USER], stream=False, **body)
            return int(answer["usage"]["prompt_tokens"] if "usage" in answer else answer["prompt_eval_count"])

        plain, without = length(), length(chat_template_kwargs={"enable_thinking": False})
        assert length(reasoning_effort="none") > without > plain
        assert length(chat_template_kwargs={"mood": "merry"}) > plain == length(chat_template_kwargs={})
        assert length(reasoning_effort="high") > plain
        assert (
            length("/api/chat", think=False)
            > length("/api/chat")
            == plain
            < length("/api/chat", think="high")
        )
        for name in ("messages", "bos_token", "a b"):
            status, text = status_of(server, CHAT, messages=[USER], chat_template_kwargs={name: 1})
            assert status == 400 and "no name that templates can be given" in text
        assert length() == plain
    llm = Llama(model, n_ctx=256, n_threads=1, verbose=False)
    counts = [
        llm.create_chat_completion([USER], max_tokens=1, **more)["usage"]["prompt_tokens"]
        for more in ({}, {"chat_template_kwargs": {"enable_thinking": False}}, {})
    ]
    assert counts[0] == counts[2] < counts[1]
    llm.close()


def test_a_template_that_fails_is_a_mistake_wherever_it_is_asked(tmp_path: Path) -> None:
    model = rewritten(DEMO, tmp_path / "fails.gguf", (), lambda w: w.add_chat_template("{{ [][5].x }}"))
    with Server("--model", model, "--ctx", 128, "--threads", 1) as server:
        for path in ("/v1/messages", "/v1/messages/count_tokens", CHAT):
            status, text = status_of(server, path, messages=[USER], max_tokens=1, model="m")
            assert status == 400 and "chat template cannot write" in text
        _, log = server.stop(15)
    assert log == ""
