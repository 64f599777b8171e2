"""What the server says of itself in OpenAPI 3.1."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vit_common.versions import package_version

if TYPE_CHECKING:
    from vit_cli.serve.service import Service

_ERRORS = {
    "400": "The body is broken.",
    "408": "The body did not come in time.",
    "413": "Too many bytes, pixels or images.",
    "415": "Not an image, a form or JSON, or an image of a kind that is not taken.",
    "421": "This server does not answer to that name (Host).",
    "422": "An image that cannot be decoded, or an option that is unknown or out of range.",
    "429": "Too many images are waiting; see Retry-After.",
    "500": "The network could not be run, or its output is not finite.",
    "503": "The server is being stopped.",
    "504": "Not done in time.",
}


def description(service: Service) -> dict[str, Any]:
    """The document at /openapi.json."""
    prediction = _object(
        {"label": _STRING, "index": _INTEGER, "probability": {"type": "number"}},
    )
    neighbour = _object({"file": _STRING, "index": _INTEGER, "similarity": {"type": "number"}})
    numbers = {"type": "array", "items": {"type": "number"}}
    grid = {"type": "array", "items": numbers}
    heads = {"type": "array", "items": {"type": "array", "items": grid}}
    maps = {"grid": numbers, "attention": heads, "rollout": grid, "image": _STRING}
    paths: dict[str, Any] = {}
    if service.classifies:
        paths["/predict"] = _post(
            "Classify images",
            {"predictions": {"type": "array", "items": prediction}},
            [_option("top_k", "Classes per image.", 5)],
        )
    paths["/features"] = _post("Embeddings of images", {"features": {"type": "array"}})
    paths["/attention"] = _post(
        "What the class token attends to, in every block and head, over the patches; one image",
        maps,
    )
    if service.index is not None:
        paths["/neighbours"] = _post(
            "The nearest pictures of the index",
            {"neighbours": {"type": "array", "items": neighbour}},
            [_option("top", "Pictures per image.", 10)],
        )
        number = {"name": "number", "in": "path", "required": True, "schema": _INTEGER}
        paths["/picture/{number}"] = _get(
            "A picture of the index, small",
            "image/jpeg",
            [number],
            {"404": "There is none of that number, or its file cannot be read."},
        )
    paths["/health"] = _get("Whether it works", "application/json", errors={"503": _ERRORS["503"]})
    paths["/metrics"] = _get("Numbers for Prometheus", "text/plain")
    paths["/openapi.json"] = _get("This document", "application/json")
    paths["/"] = _get("A page to drop a photo on", "text/html")
    return {
        "openapi": "3.1.0",
        "info": {"title": f"vit serve: {service.name}", "version": package_version()},
        "paths": paths,
    }


_STRING, _INTEGER = {"type": "string"}, {"type": "integer"}


def _object(properties: dict[str, Any], required: bool = True) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "object", "properties": properties}
    return {**found, "required": [*properties]} if required else found


def _option(name: str, what: str, default: int) -> dict[str, Any]:
    schema = {"type": "integer", "minimum": 1, "default": default}
    return {"name": name, "in": "query", "description": what, "schema": schema}


def _content(schema: Any) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _post(
    what: str, result: dict[str, Any], options: list[dict[str, Any]] | None = None
) -> dict[str, Any]:
    binary = {"type": "string", "format": "binary"}
    base64 = {"type": "string", "contentEncoding": "base64"}
    row = _object({"name": _STRING, **result, "error": _STRING}, required=False)
    answer = _object({"model": _STRING, "results": {"type": "array", "items": row}})
    return {
        "post": {
            "summary": what,
            "parameters": options or [],
            "requestBody": {
                "required": True,
                "content": {
                    "image/*": {"schema": binary},
                    "multipart/form-data": {
                        "schema": _object({"images": {"type": "array", "items": binary}})
                    },
                    "application/json": {
                        "schema": {
                            "oneOf": [
                                _object({"image": base64}),
                                _object({"images": {"type": "array", "items": base64}}),
                            ]
                        }
                    },
                },
            },
            "responses": {
                "200": {"description": "One result per image", "content": _content(answer)},
                **_errors(_ERRORS),
            },
        }
    }


def _errors(texts: Mapping[str, str]) -> dict[str, Any]:
    content = _content(_object({"error": _STRING}))
    return {status: {"description": text, "content": content} for status, text in texts.items()}


def _get(
    what: str,
    kind: str,
    parameters: list[dict[str, Any]] | None = None,
    errors: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    every = {"421": _ERRORS["421"], "500": "Something went wrong; it is in the log."}
    return {
        "get": {
            "summary": what,
            "parameters": parameters or [],
            "responses": {
                "200": {"description": what, "content": {kind: {}}},
                **_errors({**every, **(errors or {})}),
            },
        }
    }
