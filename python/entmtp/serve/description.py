"""The server's OpenAPI description, with the bodies of requests: they are read by hand, so FastAPI knows none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

COMPONENT = "#/components/schemas/{model}"


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
