"""Requests that ask for more than they say, pages of others, and the ways that a server is called."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from entmtp.common.errors import EntmtpError
from entmtp.serve.model import _name
from entmtp.serve.settings import ModelSettings
from helpers.serving import Server, one_sentence, run
from helpers.typed import DEMO

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server(
        "--model", DEMO, "--ctx", 512, "--threads", 1, "--chat_format", "chatml", key=None
    ) as running:
        yield running


def refused(server: Server, path: str, body: Any, within: float = 20.0, **headers: str) -> str:
    """The 400 that comes in time, as it does for nobody else while it is looked at."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    begun = time.monotonic()
    with server.http() as http:
        answer = http.post(path, content=data, headers=headers)
    assert answer.status_code == 400, answer.text[:300]
    assert time.monotonic() - begun < within
    return answer.text


def doubling(n: int) -> dict[str, Any]:
    """Each level has the next one twice: 2^n steps of the converter."""
    levels = {
        f"a{i}": {"properties": {"p": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2}}} for i in range(n)
    }
    return {"$defs": {**levels, f"a{n}": {"properties": {}}}, "allOf": [{"$ref": "#/$defs/a0"}]}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (doubling(40), "levels deep"),
        ({"allOf": [{"$ref": "#/$defs/b"}], "$defs": {"b": {"properties": {"p": {"$ref": "#/x"}}}}}, "leads nowhere"),
        ({"$ref": "#/x", "x": {"type": "array", "items": {}, "minItems": 4_000_000}}, "minItems"),
        ({"$ref": "#/x", "x": {"type": "integer", "minimum": 5}}, "the keyword minimum"),
        ({"$ref": "https://example.org/schema"}, "part of this schema"),
        ({"allOf": [{"$ref": "#"}]}, "refers to itself"),
    ],
)  # fmt: skip
def test_schemas_that_grow(server: Server, schema: dict[str, Any], said: str) -> None:
    named = {"name": "f", "parameters": schema}
    form = {"type": "json_schema", "json_schema": {"schema": schema}}
    for asked in (
        {"response_format": form},
        {"tools": [{"type": "function", "function": named}], "tool_choice": "required"},
        {"functions": [named], "function_call": {"name": "f"}},
    ):
        assert said in refused(server, CHAT, {"messages": USER, **asked})


def test_a_schema_that_refers_to_itself_is_followed(server: Server) -> None:
    tree = {"type": "object", "properties": {"n": {"type": "integer"}, "left": {"$ref": "#/$defs/tree"}}}
    form = {
        "type": "json_schema",
        "json_schema": {"schema": {"$defs": {"tree": tree}, "$ref": "#/$defs/tree"}},
    }
    server.post(CHAT, messages=USER, response_format=form, max_tokens=8)


def test_a_schema_that_has_each_part_twice_is_made_once(server: Server) -> None:
    form = {"type": "json_schema", "json_schema": {"schema": doubling(16)}}
    begun = time.monotonic()
    server.post(CHAT, messages=USER, response_format=form, max_tokens=8)
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": [1] * 1_000_000}),
        ("/detokenize", {"tokens": [""] * 1_000_000}),
        (CHAT, {"messages": [{}] * 60_000}),
        (CHAT, {"messages": [{"role": 5, "content": 6}] * 60_000}),
        (TEXT, {"prompt": "Hi", "logit_bias": {str(i): "x" for i in range(200_000)}}),
        (TEXT, {"prompt": "Hi", "stop": [1] * 100}),
    ],
)
def test_bodies_of_nothing_but_mistakes(server: Server, path: str, body: dict[str, Any]) -> None:
    refused(server, path, body, within=6.0)


def test_pages_of_others(server: Server) -> None:
    """Whose script asks in the name of who reads them, or whose name leads here."""
    port = httpx.URL(server.url).port
    asked = {"prompt": "Hi", "max_tokens": 1}
    own = [f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}"]
    with server.http() as http:
        for host in own:
            assert http.post(TEXT, json=asked, headers={"host": host}).status_code == 200
            assert http.post(TEXT, json=asked, headers={"origin": f"http://{host}"}).status_code == 200
        for headers in (
            {"host": f"evil.example:{port}"}, {"origin": "http://evil.example"}, {"origin": "null"}, {"host": "[::"},
        ):  # fmt: skip
            answer = http.post(
                TEXT, content=json.dumps(asked), headers={"content-type": "text/plain", **headers}
            )
            assert answer.status_code == 403 and "--allowed-hosts" in answer.text
        assert http.get("/v1/models", headers={"host": "evil.example"}).status_code == 403
        assert http.get("/metrics/", headers={"host": f"127.0.0.1:{port}"}).status_code == 404
    options = ("--model", DEMO, "--ctx", 128, "--threads", 1)
    for more, key in ((("--allowed-hosts", "my.name"), None), ((), "sk-key")):
        with Server(*options, *more, key=key) as named, named.http() as http:
            assert http.post(TEXT, json=asked, headers={"host": "my.name"}).status_code == 200


def test_below_another_path() -> None:
    with Server("--model", DEMO, "--ctx", 128, "--threads", 1, "--root_path", "/llm") as server:
        for root in ("/llm", ""):
            server.post(f"{root}{TEXT}", prompt="Hi", max_tokens=1)
            server.post(f"{root}/tokenize", input="Hi")
            with server.http() as http:
                assert http.get(f"{root}/v1/models").status_code == 200
                assert "error" in http.post(f"{root}/v1/messages", json={}).json()
        assert "Traceback" not in server.stop(15)[1]


def test_folders_of_the_machine_are_not_told(tmp_path: Path) -> None:
    secret = tmp_path / "secret-folder"
    secret.mkdir()
    second, config = secret / "two.gguf", tmp_path / "config.json"
    shutil.copy(DEMO, second)
    models = [
        {"model": str(path), "model_alias": name, "n_ctx": 128} for name, path in (("a", DEMO), ("b", second))
    ]
    config.write_text(json.dumps({"models": models}), "utf-8")
    with Server("--config_file", config) as server:
        second.unlink()
        with server.http() as http:
            answer = http.post(TEXT, json={"model": "b", "prompt": "Hi", "max_tokens": 1})
        assert answer.status_code == 500 and "two.gguf" in answer.text and "secret-folder" not in answer.text


def test_names_of_models() -> None:
    def names(*models: dict[str, Any]) -> list[str | None]:
        settings = [ModelSettings.model_validate(m) for m in models]
        _name(settings)
        return [m.model_alias for m in settings]

    a, b = {"model": "/secret/a/m.gguf"}, {"model": "/secret/b/m.gguf"}
    assert names(a, b, {"model": "x.gguf"}) == ["m", "m-2", "x"]
    assert names(a, a, b) == ["m", "m-2", "m-3"]
    assert names(a, {**b, "model_alias": "m"}, {"model": "m-2.gguf"}) == ["m-2", "m", "m-2-2"]
    with pytest.raises(EntmtpError, match="two are called 'm'; give each a model_alias"):
        names({**a, "model_alias": "m"}, {**b, "model_alias": "m"})


def test_a_key_that_is_empty() -> None:
    assert "api_key: it is empty" in one_sentence(run("--model", DEMO, "--port", 0, "--api-key", ""))


@pytest.mark.parametrize("pre", ["gpt-4o", "deepseek-v3"])
def test_words_that_take_a_large_stack(pre: str) -> None:
    """llama.cpp splits texts by regular expressions of the C++ library, a call deeper for every character."""
    code = f"""
import threading
from entmtp import Llama
llm = Llama({str(DEMO)!r}, n_ctx=128, n_threads=1, verbose=False, kv_overrides={{"tokenizer.ggml.pre": {pre!r}}})
def read():
    for c in (b"a", b" ", b"-", b"\\n", "猫".encode()):
        text = c * (150_000 // len(c))
        tokens = llm.tokenize(text, add_bos=False)
        assert llm.detokenize(tokens) == text and len(tokens) < len(text) + 1
read()
thread = threading.Thread(target=read)
thread.start()
thread.join()
try:
    llm.tokenize(b"a" * (5 << 20))
except ValueError as e:
    print(e)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0 and "too long to read" in done.stdout, done.stderr


@pytest.mark.parametrize("path", [TEXT, CHAT, "/v1/messages", "/api/chat", "/v1/responses"])
def test_numbers_that_are_too_large(server: Server, path: str) -> None:
    asked = {"prompt": "Hi", "messages": USER, "input": "Hi", "max_tokens": 1, "model": "m"}
    for name, sign in (("top_p", ""), ("temperature", "-")):
        body = {**asked, "options": {name: 7.5}} if path == "/api/chat" else {**asked, name: 7.5}
        refused(server, path, json.dumps(body).replace("7.5", sign + "1" + "0" * 400).encode())
    assert "too large a number" in refused(
        server, path, json.dumps({**asked, "a": 7.5}).replace("7.5", "1e999").encode()
    )


def test_head_and_methods(server: Server) -> None:
    """Ollama's command asks HEAD / before anything else."""
    with server.http() as http:
        for path in ("/", "/health", "/v1/models", "/api/version"):
            head, got = http.head(path), http.get(path)
            assert head.status_code == got.status_code == 200 and not head.content
        wrong = http.get(TEXT)
        assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    with (
        Server("--model", DEMO, "--ctx", 128, "--threads", 1, "--page", "false") as bare,
        bare.http() as http,
    ):
        assert http.head("/").status_code == 200


def test_keys() -> None:
    with (
        Server("--model", DEMO, "--ctx", 128, "--threads", 1, "--api-key", "sécret\n", key=None) as server,
        server.http() as http,
    ):

        def status(**headers: bytes) -> int:
            http.headers.pop("authorization", None)
            given = [(name.replace("_", "-").encode(), value) for name, value in headers.items()]
            return http.get("/v1/models", headers=given).status_code  # type: ignore[arg-type]

        key = "sécret".encode()
        assert status(authorization=b"Bearer " + key) == status(authorization=b"bearer " + key) == 200
        assert status(x_api_key=key, authorization=b"Basic abc") == status(x_api_key=key) == 200
        for wrong in (b"Bearer secret", b"Basic " + key, key, b"Bearer", b""):
            assert status(authorization=wrong) == 401
