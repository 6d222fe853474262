"""The application: which path is answered how.

A path that is asked for an answer is a row of `ANSWERS`: how its request is read, and in which form it is answered.
What all of them share is in answer.py (the model's threads, streams), requests.py (queue, limits, clients who leave)
and errors.py.
"""

from __future__ import annotations

import base64
import hmac
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal
from urllib.parse import urlsplit

import numpy as np
from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException

from . import anthropic, asked, description, info, ollama, page, responses
from .answer import Form, OpenAI, Streamed, Threads, dump, write_whole
from .asked import Asked, parse
from .errors import Refused, worded
from .metrics import Metrics
from .model import Models
from .requests import Requests, ServedRequest, current
from .settings import ModelSettings, ServerSettings

Read = Callable[[dict[str, Any]], Asked]

ANSWERS: dict[str, tuple[Read, Callable[[dict[str, Any], ServedRequest], Form]]] = {
    "/v1/chat/completions": (asked.chat, OpenAI),
    "/v1/completions": (asked.text, OpenAI),
    "/v1/engines/copilot-codex/completions": (asked.text, OpenAI),
    "/v1/responses": (responses.read, responses.Answer),
    "/v1/messages": (anthropic.read, anthropic.Answer),
    "/api/chat": (ollama.read_chat, ollama.Chat),
    "/api/generate": (ollama.read_text, ollama.Generated),
}


MOST_TEXTS = 2048  # of a request for embeddings, as OpenAI has it


class Embedding(BaseModel):
    input: str | asked.Some[str]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)


class Tokenize(BaseModel):
    input: str
    model: str | None = None


class Detokenize(BaseModel):
    tokens: asked.Some[int]
    model: str | None = None


def _embed(llama: Any, body: Embedding) -> Any:
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not texts:
        raise Refused("input is empty: there is nothing to embed", "input")
    if len(texts) > MOST_TEXTS:
        raise Refused(f"input: {len(texts)} texts, there may be {MOST_TEXTS} in a request", "input")
    if (body.dimensions or 0) > (n := llama.n_embd()):
        raise Refused(f"dimensions: the vectors of this model have {n}", "dimensions")
    if not llama.context_params.embeddings:
        llama.create_embedding(texts[0])  # says why there are none
    data, n_tokens, served = list[dict[str, Any]](), 0, current.get()
    for piece in _pieces(llama, texts):
        if served is not None and served.over:
            raise Refused(
                "the embeddings took longer than an answer may (max_seconds); ask in parts", status=503
            )
        answer = llama.create_embedding(piece)
        n_tokens += answer["usage"]["prompt_tokens"]
        for one in answer["data"]:
            vector = _vector(one["embedding"], body)
            data.append({"object": "embedding", "embedding": vector, "index": len(data)})
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    return {"object": "list", "data": data, "model": llama.alias, "usage": usage}


def _pieces(llama: Any, texts: list[str]) -> Iterator[list[str]]:
    """The texts, as many at a time as fit into one batch."""
    piece, n_tokens = list[str](), 0
    for text in texts:
        if (n := len(llama.tokenize(text.encode()))) > llama.n_batch:  # llama-cpp-python would cut it
            raise Refused(f"input: a text has {n} tokens, it may have {llama.n_batch} (n_batch)", "input")
        if n == 0:
            raise Refused(
                "input: a text is empty, and this model's vocabulary has no token for its beginning", "input"
            )
        if n_tokens + n > llama.n_batch:
            yield piece
            piece, n_tokens = [], 0
        piece.append(text)
        n_tokens += n
    yield piece


def _vector(given: Any, body: Embedding) -> Any:
    """Of length 1, as OpenAI's and Ollama's are."""
    if isinstance(given[0], list):
        raise Refused(
            "this model has a vector for every token and none for a text: its file names no pooling; serve one that is "
            "made for embeddings", "input",
        )  # fmt: skip
    vector = np.array(given[: body.dimensions], np.float32)
    vector /= np.linalg.norm(vector) or 1
    if body.encoding_format != "base64":
        return vector.tolist()
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def _embed_as_ollama(llama: Any, body: Embedding) -> Any:
    answer = _embed(llama, body.model_copy(update={"encoding_format": None}))
    vectors = [one["embedding"] for one in answer["data"]]
    return {"model": body.model, "embeddings": vectors}


def _count(llama: Any, body: description.Counted) -> Any:
    wanted = anthropic.read({**body.model_dump(exclude_none=True), "max_tokens": 1})
    return {"input_tokens": llama.count(wanted.arguments(llama))}


def _tokens(llama: Any, body: Tokenize) -> list[int]:
    return list(llama.tokenize(body.input.encode(), special=True))


# what a model does at once
CALLS: dict[str, tuple[type[Any], Callable[[Any, Any], Any]]] = {
    "/v1/embeddings": (Embedding, _embed),
    "/api/embed": (Embedding, _embed_as_ollama),
    "/v1/messages/count_tokens": (description.Counted, _count),
    "/extras/tokenize": (Tokenize, lambda llama, body: {"tokens": _tokens(llama, body)}),
    "/extras/tokenize/count": (Tokenize, lambda llama, body: {"count": len(_tokens(llama, body))}),
    "/extras/detokenize": (
        Detokenize,
        lambda llama, body: {"text": llama.detokenize(body.tokens).decode("utf-8", "replace")},
    ),
}
# what `/docs` tells of bodies
BODIES: dict[str, type[BaseModel]] = {
    **description.OTHERS,
    **{path: asked.Text for path, (read, _) in ANSWERS.items() if read is asked.text},
    **{path: asked.Chat for path, (read, _) in ANSWERS.items() if read is asked.chat},
}
CALLS |= {path: CALLS[f"/extras{path}"] for path in ("/tokenize", "/tokenize/count", "/detokenize")}
BODIES |= {path: kind for path, (kind, _) in CALLS.items()}


def create_app(server: ServerSettings, settings: list[ModelSettings]) -> tuple[Requests, Models]:
    """The application to serve, and its models, the first of them loaded.

    Raises:
        EntmtpError, ValueError: the model cannot be loaded; one sentence for the user.
    """
    metrics, threads = Metrics(), Threads(server.parallel)
    models = Models(
        settings, metrics, server.parallel, server.kv_tokens, server.stall, server.interrupt_requests
    )

    def may_ask(scope: Any) -> bool:
        """Whether a request has the API key, compared in the same time whatever it is."""
        if server.api_key is None:
            return True
        headers = Headers(scope=scope)
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), token.strip() if scheme.lower() == "bearer" else ""]
        # headers are bytes, which starlette reads as Latin-1
        return any([hmac.compare_digest(key.encode("latin-1"), server.api_key.encode()) for key in given])

    async def authenticate(request: Request) -> None:
        if not may_ask(request.scope):
            raise Refused("Invalid API key", status=401)

    async def answer(request: Request) -> Any:
        served = current.get()
        assert served is not None
        read, form_of = ANSWERS[served.path]
        body = parse(await request.body())
        wanted = read(body)
        served.n_same = wanted.n_same
        form = form_of(body, served)
        if wanted.body.stream:
            return Streamed(models, threads, wanted, form, served, not server.disable_ping_events)
        async with models.turn(wanted.body.model, threads.run) as llama:
            whole = await threads.run(write_whole, llama, wanted, served)
        return Response(dump(form.whole(whole)), media_type="application/json")

    async def call(request: Request) -> Any:
        served = current.get()
        assert served is not None
        kind, do = CALLS[served.path]
        body = kind.model_validate(parse(await request.body()))
        async with models.turn(body.model, threads.run) as llama:
            return Response(dump(await threads.run(do, llama, body)), media_type="application/json")

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    def across_origins(inner: Any) -> Any:
        if not server.cors:
            return inner
        return CORSMiddleware(
            inner, allow_origins=server.cors.split(","), allow_methods=["*"], allow_headers=["*"],
            expose_headers=["X-Request-ID", "Retry-After"],
        )  # fmt: skip

    hosts = _hosts(server)

    def may_call(scope: Any) -> bool:
        """Whether a page that a browser on this machine has open may ask, where nobody needs a key."""
        headers = Headers(scope=scope)
        origin = headers.get("origin") if scope["method"] == "POST" else None
        if hosts is None or (origin and server.cors and origin in server.cors.split(",")):
            return True
        named = [f"//{headers['host']}"] if "host" in headers else []
        return all(_host_of(name) in hosts for name in (*named, *([origin] if origin else [])))

    app = FastAPI(title="EntMTP", root_path=server.root_path, redirect_slashes=False)
    app.add_exception_handler(Refused, _refuse)
    app.add_exception_handler(HTTPException, _refuse)
    app.add_api_route("/health", health, summary="Whether it runs")
    keyed = [Depends(authenticate)]
    for paths, endpoint in ((ANSWERS, answer), (CALLS, call)):
        for path in paths:
            app.add_api_route(path, _guarded(endpoint), methods=["POST"], dependencies=keyed, name=path)
    app.include_router(info.routes(models, metrics), dependencies=keyed)
    app.include_router(ollama.routes(models), dependencies=keyed)
    description.describe(app, BODIES)
    if server.page:
        app.include_router(page.routes())
    else:
        bare = APIRouter(route_class=page.GetOnly)
        bare.add_api_route("/", health, include_in_schema=False)
        app.include_router(bare)

    def finished(request: ServedRequest) -> None:
        metrics.request(request, time.perf_counter())

    requests = Requests(
        _with_head(app), finished, may_ask, server.max_body, server.max_waiting, server.max_seconds,
        log=_log if settings[0].verbose else None, parallel=server.parallel, around=across_origins,
        may_call=may_call, root_path=server.root_path,
    )  # fmt: skip
    metrics.watch_queue(requests.waiting, requests.running)
    return requests, models


def _with_head(app: Any) -> Any:
    """HEAD is answered as GET; the server sends no body then. Ollama's command asks for / so, before anything else."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] == "HEAD":
            scope = {**scope, "method": "GET"}
        await app(scope, receive, send)

    return answer


def _hosts(server: ServerSettings) -> set[str] | None:
    """Names by which a server of this machine alone, without a key, is called; None: by any.

    A page of anybody's could ask it in the name of who reads the page, and have its own name lead here.
    """
    loopback = {"localhost", "127.0.0.1", "::1"}
    names = {name.strip() for name in (server.allowed_hosts or "").split(",") if name.strip()}
    if server.api_key is not None or server.host not in loopback or "*" in {*names, server.cors}:
        return None
    return loopback | names


def _host_of(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _guarded(endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """With any error as a response in the form of the path's API."""

    async def guarded(request: Request) -> Any:
        try:
            return await endpoint(request)
        except Exception as e:
            return await _refuse(request, worded(e))

    return guarded


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException):
        headers, error = error.headers, Refused(error.detail, status=error.status_code)
    else:
        headers = None
    refused = worded(error)
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    return JSONResponse(refused.content(path), refused.status, headers)
