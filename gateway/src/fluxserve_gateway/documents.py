"""Describe the bodies and answers of the drawing routes for the OpenAPI document: FastAPI sees neither."""

from __future__ import annotations

from typing import Any

from fluxserve_gateway.fields import Edit, Generation

FILE = {"type": "string", "format": "binary"}
REFERENCE = {
    "type": "object",
    "properties": {"image_url": {"type": "string", "description": "a data URL of PNG, JPEG or WebP in base64"}},
    "required": ["image_url"],
    "additionalProperties": False,
}


def with_field(schema: dict[str, Any], name: str, value: dict[str, Any]) -> dict[str, Any]:
    return {
        **schema,
        "properties": {**schema["properties"], name: value},
        "required": [*schema["required"], name],
    }


def body(content: dict[str, Any]) -> dict[str, Any]:
    kinds = {kind: {"schema": schema} for kind, schema in content.items()}
    return {"requestBody": {"required": True, "content": kinds}}


_EDIT = Edit.model_json_schema()

GENERATION = body({"application/json": Generation.model_json_schema()})

EDIT = body(
    {
        "multipart/form-data": with_field(_EDIT, "image", {"type": "array", "items": FILE, "minItems": 1}),
        "application/json": with_field(_EDIT, "images", {"type": "array", "items": REFERENCE, "minItems": 1}),
    }
)

_ERROR = {
    "type": "object",
    "properties": {
        "error": {
            "type": "object",
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
            "required": ["message", "type", "param", "code"],
        }
    },
    "required": ["error"],
}

_PICTURE = {
    "type": "object",
    "properties": {"b64_json": {"type": "string"}, "url": {"type": "string"}, "seed": {"type": "integer"}},
    "required": ["seed"],
}
_ANSWER = {
    "type": "object",
    "properties": {
        "created": {"type": "integer"},
        "background": {"const": "opaque"},
        "output_format": {"enum": ["png", "jpeg", "webp"]},
        "size": {"type": "string"},
        "safety_identifier": {"type": ["string", "null"]},
        "usage": {"type": "object"},
        "data": {"type": "array", "items": _PICTURE, "minItems": 1},
    },
    "required": ["created", "data", "size", "output_format", "usage"],
}

_WORDS = {
    400: "a field is refused; `param` names it",
    401: "no key, or an unknown one",
    403: "a web page's request to a gateway without keys",
    404: "no such model, or job",
    408: "the body did not arrive in time",
    409: "the request was cancelled on the server, or its idempotency key came with another before",
    413: "the body is too large",
    415: "another media type",
    429: "a limit of the key",
    500: "a fault of the server",
    502: "the server could not be reached",
    503: "no server can take the request now",
    504: "the request took too long",
}

MODEL = {"parameters": [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]}


def refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Describe the answers with these statuses: errors, as OpenAI writes them."""
    content = {"application/json": {"schema": _ERROR}}
    return {status: {"description": _WORDS[status], "content": content} for status in statuses}


PICTURES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "the pictures, or, with `stream`, events",
        "content": {"application/json": {"schema": _ANSWER}, "text/event-stream": {}},
    },
    **refusals(*_WORDS),
}
