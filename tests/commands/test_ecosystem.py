"""LangChain and LlamaIndex as clients of the server: the examples of docs/serve.md, run as they stand there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest

from helpers.serving import Server

DOCS = Path(__file__).resolve().parents[2] / "docs" / "serve.md"
QUESTION = "How many apples are left?"


@pytest.fixture(scope="module")
def server(models: dict[str, Path]) -> Iterator[Server]:
    with Server(
        "--model", models["f32"], "--heads", models["hydra"], "--draft", "static", "--trees", "generic-hydra:n8",
        "--ctx", 512, "--threads", 1, "--n-threads-batch", 1, "--type-k", 0, "--type-v", 0,
    ) as server:  # fmt: skip
        yield server


@pytest.fixture(scope="module")
def expected(models: dict[str, Path]) -> str:
    llm = llama_cpp.Llama(
        str(models["f32"]), n_ctx=512, n_threads=1, n_threads_batch=1, type_k=0, type_v=0, verbose=False
    )
    messages = [{"role": "user", "content": QUESTION}]
    answer = llm.create_chat_completion(messages, max_tokens=32, temperature=0, repeat_penalty=1.1)
    llm.close()
    return str(answer["choices"][0]["message"]["content"])


def example(name: str, server: Server) -> dict[str, Any]:
    """Run the Python example under a heading of docs/serve.md against the server; the names it leaves behind."""
    section = DOCS.read_text("utf-8").split(f"### {name}\n")[1]
    code = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert code
    names: dict[str, Any] = {}
    exec(code[1].replace("http://127.0.0.1:8000", server.url).replace('"none"', f'"{server.key}"'), names)
    return names


def test_openai(server: Server, expected: str) -> None:
    names = example("The openai package", server)
    assert names["answer"].choices[0].message.content == expected
    assert names["streamed"] == expected


def test_langchain(server: Server, expected: str) -> None:
    pytest.importorskip("langchain_openai", reason="the extra langchain is not installed")
    names = example("LangChain", server)
    assert names["answer"].content == expected
    assert names["streamed"] == expected
    assert server.metrics()['entmtp_requests_total{path="/v1/chat/completions",status="200"}'] >= 2


def test_llama_index(server: Server, expected: str) -> None:
    pytest.importorskip("llama_index.llms.openai_like", reason="the extra llama-index is not installed")
    names = example("LlamaIndex", server)
    assert names["answer"].message.content == expected
    assert names["streamed"] == expected
