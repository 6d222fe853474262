"""What the server says of itself; none of it waits for the model, as llama-cpp-python's list of models does."""

from __future__ import annotations

from typing import Any

from fastapi import Depends, FastAPI
from fastapi.responses import JSONResponse
from llama_cpp.server import app as stock

from .asked import Refused
from .model import Models


def add_routes(app: FastAPI, models: Models, authenticate: Any) -> None:
    """Add them, in front of the routes with the same path."""
    keyed = [Depends(authenticate)]

    async def health() -> dict[str, str]:
        return {"status": "ok"}

    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in models]}

    async def get_model(name: str) -> Any:
        if name in list(models):
            return _model(name)
        refused = Refused(f"there is no model {name!r}; there is {', '.join(models)}", "model", 404)
        return JSONResponse(refused.content(), refused.status)

    before = list(app.router.routes)
    app.add_api_route("/health", health, summary="Whether it runs")
    app.add_api_route("/v1/models", list_models, summary="Models", dependencies=keyed)
    app.add_api_route("/v1/models/{name:path}", get_model, summary="Model", dependencies=keyed)
    app.add_api_route("/tokenize", stock.tokenize, methods=["POST"], dependencies=keyed)
    app.add_api_route("/detokenize", stock.detokenize, methods=["POST"], dependencies=keyed)
    app.router.routes[:] = app.router.routes[len(before) :] + before


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "me", "permissions": []}
