"""The HTTP door's description: an OpenAPI document, and a page of it that loads nothing from other servers."""

from __future__ import annotations

import html
import json
from typing import Any

from icportrait.contract import DType
from icportrait.deploy.triton_config import STREAM, UNARY
from icportrait.gateway.kserve import MODELS
from icportrait.gateway.portraits_form import FIELDS, FILES
from icportrait.request import INPUTS, OUTPUTS, RequestInput

_KINDS = {DType.INT32: "integer", DType.INT64: "integer", DType.FLOAT32: "number", DType.BYTES: "string"}
_ERRORS = {
    "400": "a bad value, or a picture that can't be read; the text names it",
    "401": "no valid API key",
    "403": "the API key doesn't allow it",
    "404": "no such model or path",
    "408": "the body came too slowly",
    "413": "the body is too large",
    "415": "the body is compressed",
    "429": "over the API key's rate or quota; Retry-After says when to try again",
    "500": "a fault of the server",
    "503": "the queue is full, or the server is stopping or not ready; Retry-After says when to try again",
    "504": "the request's deadline_ms passed",
}


def _schema(field: RequestInput) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": _KINDS[field.dtype]}
    if field.dtype in (DType.INT32, DType.INT64):
        schema["format"] = field.dtype.name.lower()
    limits = {"minimum": field.minimum, "maximum": field.maximum, "default": field.default}
    schema |= {name: value for name, value in limits.items() if value is not None}
    if field.choices:
        schema["enum"] = list(field.choices)
    if field.size > 1:
        default = schema.pop("default", None)
        schema = {"type": "array", "items": schema, "minItems": field.size, "maxItems": field.size}
        if default:
            schema["default"] = list(default)
    return schema


def _object(properties: dict[str, Any], required: list[str]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": required}


def _content(kind: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {kind: {"schema": schema}}


def _answers(description: str, content: dict[str, Any]) -> dict[str, Any]:
    errors = {status: {"$ref": f"#/components/responses/{status}"} for status in _ERRORS}
    return {"200": {"description": description, **({"content": content} if content else {})}, **errors}


def _get(summary: str, description: str = "", **more: Any) -> dict[str, Any]:
    return {"get": {"summary": summary, "responses": _answers(description or summary, {}), **more}}


def _document() -> dict[str, Any]:
    text = {"type": "string"}
    picture = {"type": "string", "format": "binary"}
    form = {name: picture if name in FILES else _schema(field) for name, field in FIELDS.items()}
    generate = {field.name: _schema(field) for field in INPUTS}
    outputs = {name: {"type": _KINDS[dtype]} for name, dtype, _ in OUTPUTS}
    tensor = _object(
        {
            "name": text,
            "datatype": text,
            "shape": {"type": "array", "items": {"type": "integer"}},
            "data": {"type": "array", "items": {}},
            "parameters": {"type": "object"},
        },
        ["name", "datatype", "shape"],
    )
    required = [field.name for field in INPUTS if field.required]
    model = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string", "enum": list(MODELS)}}]
    stream = {"name": "stream", "in": "query", "schema": {"type": "integer", "enum": [0, 1]}}
    of_model = "/v2/models/{model}"
    paths = {
        "/v1/portraits": {
            "post": {
                "summary": "Two pictures in, a portrait out",
                "description": "One portrait comes as a picture, with its metadata in the header icportrait-metadata; "
                "several, or one with Accept: application/json, as JSON with pictures in base64. With ?stream=1 come "
                "server-sent events: step, then portraits, or error.",
                "parameters": [stream],
                "requestBody": {"required": True, "content": _content("multipart/form-data", _object(form, required))},
                "responses": _answers(
                    "the portrait",
                    {
                        **{f"image/{kind}": {"schema": picture} for kind in FIELDS["output_format"].choices},
                        "application/json": {"schema": {"type": "object"}},
                        "text/event-stream": {"schema": text},
                    },
                ),
            }
        },
        f"{of_model}/generate": {
            "post": {
                "summary": "Inputs as an object's members, in and out",
                "description": 'Pictures are base64, with "encoding": "base64".',
                "parameters": model,
                "requestBody": {"required": True, "content": _content("application/json", _object(generate, required))},
                "responses": _answers("outputs", _content("application/json", _object(outputs, []))),
            }
        },
        f"{of_model}/generate_stream": {
            "post": {
                "summary": f"As generate; {STREAM} tells of every step",
                "parameters": model,
                "requestBody": {"required": True, "content": _content("application/json", _object(generate, required))},
                "responses": _answers("server-sent events", _content("text/event-stream", text)),
            }
        },
        f"{of_model}/infer": {
            "post": {
                "summary": f"KServe's v2 infer, with the binary extension; {UNARY} only",
                "parameters": model,
                "requestBody": {
                    "required": True,
                    "content": _content(
                        "application/json", _object({"inputs": {"type": "array", "items": tensor}}, ["inputs"])
                    ),
                },
                "responses": _answers("outputs", _content("application/json", {"type": "object"})),
            }
        },
        of_model: _get("The model's inputs and outputs", parameters=model),
        f"{of_model}/config": _get("The model's configuration", parameters=model),
        f"{of_model}/stats": _get("What the model has done", parameters=model),
        f"{of_model}/ready": _get("Whether requests are taken", parameters=model),
        "/v2": _get("The server's name and version"),
        "/v2/health/live": _get("Whether the server lives"),
        "/v2/health/ready": _get("Whether requests are taken"),
    }
    error = _content("application/json", _object({"error": text}, ["error"]))
    return {
        "openapi": "3.1.0",
        "info": {"title": "IC-Portrait", "version": "2"},
        "security": [{}, {"key": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "responses": {status: {"description": what, "content": error} for status, what in _ERRORS.items()},
        },
    }


def _page(document: dict[str, Any]) -> str:
    rows = []
    for path, methods in document["paths"].items():
        for method, what in methods.items():
            words = f"{what['summary']}. {what.get('description', '')}"
            rows.append(f"<tr><td><code>{method.upper()} {html.escape(path)}</code><td>{html.escape(words)}")
    options = []
    for field in INPUTS:
        limits = _schema(field)
        allowed = ", ".join(field.choices) or (
            f"{field.minimum:g}..{field.maximum:g}" if field.maximum else "a picture"
        )
        options.append(f"<tr><td><code>{field.name}</code><td>{html.escape(allowed)}<td>{limits.get('default', '')}")
    errors = [f"<tr><td>{status}<td>{html.escape(what)}" for status, what in _ERRORS.items()]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>IC-Portrait</title>'
        "<style>body{font:16px sans-serif;max-width:60em;margin:2em auto;padding:0 1em}"
        "td{padding:.3em 1em .3em 0;vertical-align:top}</style>"
        "<h1>IC-Portrait</h1><p>Two pictures in, a portrait out:"
        "<pre>curl -F profile=@me.jpg -F reference=@portrait.jpg -F seed=7 -o out.png SERVER/v1/portraits</pre>"
        f"<table>{''.join(rows)}</table><h2>Inputs</h2><table>{''.join(options)}</table>"
        f"<h2>Errors</h2><table>{''.join(errors)}</table>"
        '<p>For programs: <a href="/openapi.json">openapi.json</a></html>'
    )


_CONTENT = _document()
DOCUMENT = json.dumps(_CONTENT, indent=1).encode()
PAGE = _page(_CONTENT).encode()
