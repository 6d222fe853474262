"""llama-cpp-python's application with our models behind it.

Four names of its modules are replaced, all here: the class that holds the models, the thread that runs them, the
function that streams an answer, and the one that words an error. Routes, request types, authentication and locking are
its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any

import anyio
from anyio.streams.memory import MemoryObjectSendStream
from fastapi import Depends, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse
from llama_cpp.server import app as stock
from llama_cpp.server.errors import RouteErrorHandler
from starlette.datastructures import Headers

from ..llama import Llama
from . import info
from .metrics import Metrics
from .model import Models, SlotModels
from .requests import Requests, ServedRequest, current
from .settings import ModelSettings, ServerSettings

_word_error = RouteErrorHandler.error_message_wrapper


def create_app(server: ServerSettings, settings: list[ModelSettings]) -> tuple[Requests, Models]:
    """The application to serve, and its models, the first of them loaded.

    Raises:
        EntmtpError, ValueError: the model cannot be loaded; one sentence for the user.
    """
    metrics = Metrics()
    replaced: list[tuple[Any, str, Any]] = [
        (
            stock,
            "LlamaProxy",
            partial(Models, metrics=metrics, parallel=server.parallel, kv_tokens=server.kv_tokens),
        ),
        (stock, "run_in_threadpool", in_model_thread),
        (stock, "get_event_publisher", publish),
        (RouteErrorHandler, "error_message_wrapper", worded),
    ]
    if server.parallel > 1:
        replaced.append((stock, "get_llama_proxy", slot_of_request))
    locked = stock.get_llama_proxy  # one request after the other
    for where, name, ours in replaced:
        setattr(where, name, ours)
    global _model_threads
    _model_threads = ThreadPoolExecutor(server.parallel, thread_name_prefix="model")
    app = stock.create_app(server_settings=server, model_settings=list[Any](settings))
    app.dependency_overrides[locked] = stock.get_llama_proxy
    app.dependency_overrides[stock.authenticate] = authenticate
    app.user_middleware = [m for m in app.user_middleware if m.cls is not CORSMiddleware]
    if server.cors:
        app.add_middleware(
            CORSMiddleware, allow_origins=server.cors.split(","), allow_methods=["*"], allow_headers=["*"]
        )

    async def read_metrics(request: Request) -> Response:
        text, content_type = metrics.text(request.headers.get("accept"))
        return Response(text, headers={"content-type": content_type})

    app.add_api_route(
        "/metrics", read_metrics, summary="Prometheus metrics", tags=["Extras"],
        dependencies=[Depends(stock.authenticate)],
    )  # fmt: skip
    assert isinstance(stock._llama_proxy, Models)
    info.add_routes(app, stock._llama_proxy, stock.authenticate)
    app.add_exception_handler(json.JSONDecodeError, _not_json)

    def finished(request: ServedRequest) -> None:
        metrics.request(request, time.perf_counter())

    requests = Requests(app, finished, may_ask, server.max_body, server.max_waiting)
    metrics.watch_queue(requests.waiting, requests.running)
    return requests, stock._llama_proxy


async def slot_of_request() -> AsyncIterator[SlotModels]:
    """Stands in for llama-cpp-python's `get_llama_proxy` where answers are written in parallel."""
    assert isinstance(stock._llama_proxy, Models)
    async with stock._llama_proxy.of_request() as models:
        yield models


_model_threads = ThreadPoolExecutor(1, thread_name_prefix="model")


async def in_model_thread(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run what uses a model, in one of as many threads as there are answers at a time; a cancellation waits for it.

    In a larger pool every thread would get an OpenMP team and a heap of its own: 16 clients cost 50 MB in 100,000
    tokens.
    """
    asked = partial(call, *args, **kwargs)
    if isinstance(call, Llama) or call.__name__ == "create_chat_completion":  # llama(...) completes a text
        asked = partial(_all_choices, call, kwargs)
    work = partial(copy_context().run, asked)
    with anyio.CancelScope(shield=True):
        return await asyncio.get_running_loop().run_in_executor(_model_threads, work)


def _all_choices(create: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
    """One answer with all choices that the request wants."""
    served = current.get()
    llama: Any = getattr(create, "__self__", create)
    answer: dict[str, Any] = {}
    for index, choice in enumerate(served.asked.choices if served else [{}]):
        one = create(**{**kwargs, **choice, "model": llama.alias})
        one["choices"][0]["index"] = index
        if answer:
            answer["choices"] += one["choices"]
            assert served is not None
            answer["usage"] = served.usage()
        else:
            answer = one
        if served and served.stopped:
            break
    return answer


def may_ask(scope: Any) -> bool:
    """Whether a request has the API key, compared in the same time whatever it is."""
    key = next(stock.get_server_settings()).api_key
    given = Headers(scope=scope).get("authorization", "").removeprefix("Bearer ")
    return key is None or hmac.compare_digest(given.encode(), key.encode())


async def authenticate(request: Request) -> None:
    if not may_ask(request.scope):
        raise HTTPException(401, "Invalid API key")


async def publish(
    request: Request,
    inner_send_chan: MemoryObjectSendStream[Any],
    body: Any,
    body_model: str | None,
    llama_call: Any,
    kwargs: dict[str, Any],
) -> None:
    """Stream an answer as server-sent events; stands in for llama-cpp-python's `get_event_publisher`.

    The whole answer is written in one thread, and what is ready is sent together: a change of threads per token would
    cost more than the token's own Python code. The model is free as soon as the answer is written, however slowly the
    client reads; the answer's generator is closed before that, for its clean-up touches the model.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Queue[bytes | None] = asyncio.Queue()
    served = current.get()
    interruptible = next(stock.get_server_settings()).interrupt_requests

    def put(event: Any) -> None:
        loop.call_soon_threadsafe(ready.put_nowait, _event(event))

    def write(llama: Any) -> None:
        chunk: dict[str, Any] = {}
        for index, choice in enumerate(served.asked.choices if served else [{}]):
            # llama-cpp-python's application names the method of its own class
            create = getattr(llama, llama_call.__name__)
            with contextlib.closing(create(**{**kwargs, **choice, "model": llama.alias})) as chunks:
                for chunk in chunks:
                    chunk["choices"][0]["index"] = index
                    put(chunk)
                    if interruptible and stock.llama_outer_lock.locked():
                        return
            if served and served.stopped:
                return
        if served and served.asked.include_usage:
            put({**chunk, "choices": [], "usage": served.usage()})

    async def answer() -> None:
        try:
            async with contextlib.asynccontextmanager(stock.get_llama_proxy)() as proxy:
                llama = stock.prepare_request_resources(body, proxy, body_model, kwargs)
                await in_model_thread(write, llama)
            put("[DONE]")
        except Exception as e:
            status, error = worded(RouteErrorHandler, e, body)
            if served is not None:
                served.failed = status  # the response's, if this is the first event
            put({"error": error})
        finally:
            loop.call_soon(ready.put_nowait, None)

    async with inner_send_chan, anyio.create_task_group() as tasks:
        tasks.start_soon(answer)
        more = True
        while more:
            events = [await ready.get()]
            while not ready.empty():
                events.append(ready.get_nowait())
            more = events[-1] is not None
            data = b"".join(event for event in events if event)
            if data and not (served and served.stopped):
                await inner_send_chan.send(data)


def worded(handler: Any, error: Exception, body: Any = None) -> tuple[int, dict[str, Any]]:
    """Status and OpenAI's error object; a client's mistake is a 400 and leaves no traceback in the log."""
    served = current.get()
    param: str | None = None
    known = any(pattern.search(str(error)) for pattern in RouteErrorHandler.pattern_and_formatters)
    if served is not None and served.stopped:
        status, text = 499, served.stopped
    elif isinstance(error, RequestValidationError):
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        param = str(first["loc"][1]) if where else None
        status, text = 400, f"{where}: {first['msg']}" if where else first["msg"]
    elif isinstance(error, ValueError) and not known:
        status, text = 400, str(error)
    elif isinstance(error, RuntimeError) and "embedding=True" in str(error):
        status, text = (
            400,
            "this model is served for text; start the server with --embedding true for embeddings",
        )
    else:
        return _word_error(handler, error, body)  # type: ignore[return-value]
    return status, _error(text, param)


def _error(text: str, param: str | None = None) -> dict[str, Any]:
    return {"message": text, "type": "invalid_request_error", "param": param, "code": None}


def _event(data: Any) -> bytes:
    text = data if isinstance(data, str) else json.dumps(data)
    return f"data: {text}\n\n".encode()


async def _not_json(request: Request, error: Exception) -> Response:
    text = f"the body of the request is not JSON: {error}"
    return JSONResponse({"error": _error(text)}, status_code=400)
