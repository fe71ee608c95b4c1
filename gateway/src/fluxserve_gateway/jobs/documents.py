"""The bodies and answers of the routes of jobs, for the OpenAPI document."""

from __future__ import annotations

from typing import Any

from fluxserve_gateway.documents import FILE, REFERENCE, body, refusals, with_field
from fluxserve_gateway.jobs.intake import JobEdit, JobGeneration

_TEXT = {"type": "string"}
_TIME = {"type": ["integer", "null"]}

_JOB = {
    "type": "object",
    "properties": {
        "id": _TEXT,
        "object": {"const": "job"},
        "status": {"enum": ["queued", "in_progress", "cancelling", "completed", "failed", "cancelled"]},
        "model": _TEXT,
        "operation": {"enum": ["image_generation", "image_edit"]},
        "created_at": {"type": "integer"},
        "started_at": _TIME,
        "completed_at": _TIME,
        "expires_at": _TIME,
        "queue_position": {"type": ["integer", "null"]},
        "step": {"type": "integer"},
        "steps": {"type": "integer"},
        "error": {"type": ["object", "null"]},
        "result": {"type": ["object", "null"]},
    },
    "required": ["id", "object", "status", "model", "created_at", "step", "steps", "error", "result"],
}
_PAGE = {
    "type": "object",
    "properties": {
        "object": {"const": "list"},
        "data": {"type": "array", "items": _JOB},
        "first_id": {"type": ["string", "null"]},
        "last_id": {"type": ["string", "null"]},
        "has_more": {"type": "boolean"},
    },
    "required": ["object", "data", "has_more"],
}


def _query(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": False, "schema": schema}


def _path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _TEXT}


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_EDIT = JobEdit.model_json_schema()
_KEY = {"name": "Idempotency-Key", "in": "header", "required": False, "schema": {"type": "string", "maxLength": 255}}

SUBMIT = {
    "parameters": [_KEY],
    **body(
        {
            "multipart/form-data": with_field(_EDIT, "image", {"type": "array", "items": FILE, "minItems": 1}),
            "application/json": {
                "anyOf": [
                    JobGeneration.model_json_schema(),
                    with_field(_EDIT, "images", {"type": "array", "items": REFERENCE, "minItems": 1}),
                ]
            },
        }
    ),
}
LIST = {
    "parameters": [
        _query("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 20}),
        _query("after", _TEXT),
        _query("order", {"enum": ["asc", "desc"], "default": "desc"}),
    ]
}
ONE = {"parameters": [_path("job_id")]}
IMAGE = {"parameters": [_path("job_id"), _path("number")]}

LINK = {"parameters": [_path("job_id"), _path("name")]}

Answers = dict[int | str, dict[str, Any]]

TAKEN: Answers = {
    202: _json("the job", _JOB),
    **refusals(400, 401, 403, 404, 408, 409, 413, 415, 429, 500, 503),
}
PAGE: Answers = {200: _json("jobs, and whether there are more", _PAGE), **refusals(400, 401, 403, 503)}
FOUND: Answers = {200: _json("the job", _JOB), **refusals(401, 403, 404, 503)}
PICTURE: Answers = {
    200: {"description": "the picture", "content": {f"image/{kind}": {} for kind in ("png", "jpeg", "webp")}},
    **refusals(401, 403, 404, 503),
}
LINKED: Answers = {200: PICTURE[200], **refusals(404, 503)}
SECRET: Answers = {
    200: _json("the secret", {"type": "object", "properties": {"secret": _TEXT}, "required": ["secret"]}),
    **refusals(401, 403),
}
