"""The page at `/`: a chat that shows where the tokens of an answer came from (docs/serve.md).

It is a file of HTML, one of script and one of style, and asks this server alone.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response
from fastapi.routing import APIRoute
from starlette.routing import Match

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/script.js": ("script.js", "text/javascript; charset=utf-8"),
    "/page/style.css": ("style.css", "text/css; charset=utf-8"),
}

HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


class GetOnly(APIRoute):
    """A path that exists for GET alone: another method finds what it would find without the page."""

    def matches(self, scope: Any) -> Any:
        match, child = super().matches(scope)
        return (match if match is Match.FULL else Match.NONE), child


def routes() -> APIRouter:
    """The page's files, read once; nobody needs the key for them."""
    router = APIRouter(route_class=GetOnly)
    for path, (name, kind) in FILES.items():
        router.add_api_route(
            path, _answer(files(__package__).joinpath(name).read_bytes(), kind), include_in_schema=False
        )
    return router


def _answer(content: bytes, kind: str) -> Callable[[], Any]:
    async def answer() -> Response:
        return Response(content, media_type=kind, headers=HEADERS)

    return answer
