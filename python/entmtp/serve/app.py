"""The application: which path is answered how.

A path that is asked for an answer is a row of `ANSWERS`: how its request is read, and in which form it is answered.
What all of them share is in answer.py (the model's threads, streams), requests.py (queue, limits, clients who leave)
and errors.py.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers

from . import anthropic, asked, info, ollama, page, responses
from .answer import Form, OpenAI, Streamed, Threads, dump, write_whole
from .asked import Asked, parse
from .description import describe
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


class Embedding(BaseModel):
    input: str | list[str]
    model: str | None = None


class Tokenize(BaseModel):
    input: str
    model: str | None = None


class Detokenize(BaseModel):
    tokens: list[int]
    model: str | None = None


def _embed(llama: Any, body: Embedding) -> Any:
    return llama.create_embedding(body.input, model=llama.alias)


def _tokens(llama: Any, body: Tokenize) -> list[int]:
    return list(llama.tokenize(body.input.encode(), special=True))


# what a model does at once
CALLS: dict[str, tuple[type[Any], Callable[[Any, Any], Any]]] = {
    "/v1/embeddings": (Embedding, _embed),
    "/extras/tokenize": (Tokenize, lambda llama, body: {"tokens": _tokens(llama, body)}),
    "/extras/tokenize/count": (Tokenize, lambda llama, body: {"count": len(_tokens(llama, body))}),
    "/extras/detokenize": (
        Detokenize,
        lambda llama, body: {"text": llama.detokenize(body.tokens).decode("utf-8", "replace")},
    ),
}
# what `/docs` tells of bodies; those of other APIs are described by who made them
BODIES: dict[str, type[BaseModel]] = {
    **{path: asked.Text for path, (read, _) in ANSWERS.items() if read is asked.text},
    **{path: asked.Chat for path, (read, _) in ANSWERS.items() if read is asked.chat},
    **{path: kind for path, (kind, _) in CALLS.items()},
}
CALLS |= {path: CALLS[f"/extras{path}"] for path in ("/tokenize", "/tokenize/count", "/detokenize")}


def create_app(server: ServerSettings, settings: list[ModelSettings]) -> tuple[Requests, Models]:
    """The application to serve, and its models, the first of them loaded.

    Raises:
        EntmtpError, ValueError: the model cannot be loaded; one sentence for the user.
    """
    metrics, threads = Metrics(), Threads(server.parallel)
    models = Models(settings, metrics, server.parallel, server.kv_tokens, server.interrupt_requests)

    def may_ask(scope: Any) -> bool:
        """Whether a request has the API key, compared in the same time whatever it is."""
        headers = Headers(scope=scope)
        given = headers.get("authorization", "").removeprefix("Bearer ") or headers.get("x-api-key", "")
        return server.api_key is None or hmac.compare_digest(given.encode(), server.api_key.encode())

    async def authenticate(request: Request) -> None:
        if not may_ask(request.scope):
            raise HTTPException(401, "Invalid API key")

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

    app = FastAPI(title="EntMTP", root_path=server.root_path)
    if server.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=server.cors.split(","), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_exception_handler(Refused, _refuse)
    app.add_api_route("/health", health, summary="Whether it runs")
    keyed = [Depends(authenticate)]
    for paths, endpoint in ((ANSWERS, answer), (CALLS, call)):
        for path in paths:
            app.add_api_route(path, _guarded(endpoint), methods=["POST"], dependencies=keyed, name=path)
    describe(app, BODIES)
    app.include_router(info.routes(models, metrics), dependencies=keyed)
    app.include_router(ollama.routes(models), dependencies=keyed)
    if server.page:
        app.include_router(page.routes())

    def finished(request: ServedRequest) -> None:
        metrics.request(request, time.perf_counter())

    requests = Requests(app, finished, may_ask, server.max_body, server.max_waiting, server.max_seconds)
    metrics.watch_queue(requests.waiting, requests.running)
    return requests, models


def _guarded(endpoint: Callable[[Request], Any]) -> Callable[[Request], Any]:
    """With any error as a response in the form of the path's API."""

    async def guarded(request: Request) -> Any:
        try:
            return await endpoint(request)
        except Exception as e:
            return await _refuse(request, worded(e))

    return guarded


async def _refuse(request: Request, error: Exception) -> JSONResponse:
    refused = worded(error)
    path = request.scope["path"].removeprefix(request.scope.get("root_path", ""))
    return JSONResponse(refused.content(path), refused.status)
