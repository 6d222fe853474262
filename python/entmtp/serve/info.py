"""What the server says of itself; none of it waits for the model."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response

from .errors import Refused
from .metrics import Metrics
from .model import Models


def routes(models: Models, metrics: Metrics) -> APIRouter:
    """Those that need the key."""
    router = APIRouter()

    @router.get("/v1/models", summary="Models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in models]}

    @router.get("/v1/models/{name:path}", summary="Model")
    async def get_model(name: str) -> dict[str, Any]:
        if name not in list(models):
            raise Refused(f"there is no model {name!r}; there is {', '.join(models)}", "model", 404)
        return _model(name)

    @router.get("/metrics", summary="Prometheus metrics")
    async def read_metrics(request: Request) -> Response:
        text, content_type = metrics.text(request.headers.get("accept"))
        return Response(text, headers={"content-type": content_type})

    return router


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "me", "permissions": []}
