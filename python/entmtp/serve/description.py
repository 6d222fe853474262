"""The server's OpenAPI description, with the bodies of requests: they are read by hand, so FastAPI knows none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict

COMPONENT = "#/components/schemas/{model}"


class Described(BaseModel):
    """A body in another API's form: what of it is read. Nothing is checked by this."""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    stream: bool = False


class Response(Described):
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    text: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    metadata: dict[str, str] | None = None


class Counted(Described):
    messages: list[dict[str, Any]]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None


class Message(Counted):
    max_tokens: int
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None


class OllamaChat(Described):
    messages: list[dict[str, Any]]
    stream: bool = True
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    tools: list[dict[str, Any]] | None = None


class OllamaText(Described):
    prompt: str
    stream: bool = True
    system: str | None = None
    raw: bool = False
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None


class OllamaModel(BaseModel):
    model: str


OTHERS: dict[str, type[BaseModel]] = {
    "/v1/responses": Response, "/v1/messages": Message, "/api/chat": OllamaChat, "/api/generate": OllamaText,
    "/api/show": OllamaModel,
}  # fmt: skip


def describe(app: FastAPI, bodies: Mapping[str, type[BaseModel]]) -> None:
    """Put the models of bodies, by path, into what `/openapi.json` and `/docs` show."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            description = made()
            components = description.setdefault("components", {}).setdefault("schemas", {})
            for path, model in bodies.items():
                schema = model.model_json_schema(ref_template=COMPONENT)
                components |= schema.pop("$defs", {})
                components[model.__name__] = schema
                reference = {"$ref": COMPONENT.format(model=model.__name__)}
                content = {"application/json": {"schema": reference}}
                description["paths"][path]["post"]["requestBody"] = {"required": True, "content": content}
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
