"""What `/docs` shows beyond what FastAPI can see: form fields, image answers, problems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deployments.contract import ImageRequest
    from deployments.registry import ModelSpec

DESCRIPTION = (
    "Five image models behind one API. Send a picture as the form field `image`; the answer is a "
    "picture. Every error is problem+json (RFC 9457) with fact, value, remedy and request id."
)
_PROBLEM: dict[str, Any] = {
    "type": "object",
    "required": ["type", "title", "status", "code", "detail", "fact", "value", "remedy"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "code": {"type": "string"},
        "detail": {"type": "string"},
        "fact": {"type": "string", "description": "what is wrong"},
        "value": {"type": "string", "description": "what was found"},
        "remedy": {"type": "string", "description": "what to do"},
        "request_id": {"type": "string"},
        "errors": {"type": "array", "items": {"type": "object"}},
    },
}
_STATUSES = {
    400: "The body or the image cannot be read",
    406: "No output format fits the Accept header",
    408: "The upload did not end in time",
    413: "Too many bytes or pixels",
    415: "Not an image, or not multipart",
    422: "A parameter is unknown, out of range or contradictory",
    429: "Every queue slot is taken; see Retry-After",
    503: "The model is not ready; see Retry-After",
    504: "Not finished by the deadline",
}
_HEADERS = {
    "X-Request-Id": "of this request",
    "X-Imagen-Model": "name@digest",
    "X-Imagen-Seed": "the seed used, where the model uses chance",
    "X-Imagen-Batch-Size": "rows in the forward pass that carried this one",
    "X-Imagen-Gpu-Seconds": "share of a GPU's time",
    "X-Imagen-Determinism": "exact: the bits depend on the request alone; bounded: nearly",
    "X-Imagen-Size": "width x height of the result, px",
    "X-Imagen-Note": "what else to know, such as: first of 12 frames",
    "Server-Timing": "milliseconds by stage",
}
_ONLY_WITH_ANOTHER = {"color"}
"""Fields that a form must not send by default, because they contradict another's default."""

RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The picture",
        "content": {
            f"image/{name}": {"schema": {"type": "string", "format": "binary"}}
            for name in ("png", "webp", "jpeg")
        },
        "headers": {
            name: {"description": text, "schema": {"type": "string"}}
            for name, text in _HEADERS.items()
        },
    },
    **{
        status: {"description": text, "content": {"application/problem+json": {"schema": _PROBLEM}}}
        for status, text in _STATUSES.items()
    },
}


def request_body(kind: type[ImageRequest], spec: ModelSpec) -> dict[str, Any]:
    """The multipart body of a route: the fields its model reads, with the model's defaults."""
    schema = kind.model_json_schema()["properties"]
    fields = {name: dict(schema[name]) for name in schema if name in spec.parameters}
    for name, value in spec.defaults.items():
        fields[name]["default"] = value
    for name in _ONLY_WITH_ANOTHER & fields.keys():
        del fields[name]["default"]
    image = {"type": "string", "format": "binary", "description": "The picture, a file."}
    body = {
        "type": "object",
        "required": ["image"],
        "additionalProperties": False,
        "properties": {"image": image, **fields},
    }
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": body}}}}


def describe_model(spec: ModelSpec, route: str, state: str) -> dict[str, Any]:
    """A model as `GET /api/v1/models` shows it."""
    return {
        "name": spec.name,
        "task": str(spec.task),
        "route": route,
        "state": state,
        "summary": spec.summary,
        "family": spec.family,
        "licence": spec.licence,
        "commercial": spec.commercial,
        "parameters": sorted(spec.parameters),
        "defaults": spec.defaults,
        "buckets_px": [list(bucket) for bucket in spec.buckets],
        "scale": spec.scale,
        "num_gpus": spec.num_gpus,
    }
