"""What the API's description says of bodies that may be JSON, a form or a raw picture."""

from typing import Any

from pydantic import BaseModel

from service.schemas import ErrorAnswer

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": description}
    for status, description in {
        400: "A picture, a vector, a filter or a field that cannot be used; the message names it.",
        404: "No such model, collection, snapshot or picture.",
        409: "The collection was made with another model, or the snapshot is damaged.",
        413: "A picture or the request is too large.",
        415: "Not a picture, or not of an allowed format.",
        422: "A parameter that is unknown, or not of its kind; the message names it.",
        429: "The queue is full; `Retry-After` says when to come again.",
        503: "The model or the store failed, or the service is stopping.",
        507: "The disk is full; nothing of the write was kept.",
    }.items()
}


def picture_body(model: type[BaseModel], *, fields: dict[str, Any] | None = None) -> dict[str, Any]:
    """`openapi_extra` for a route that takes `model` as JSON, or pictures as a form or raw."""
    form = {"image": {"type": "string", "format": "binary"}, **(fields or {})}
    return {
        "requestBody": {
            "required": True,
            "content": {
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": form, "required": ["image"]}
                },
                "image/*": {"schema": {"type": "string", "format": "binary"}},
                "application/json": {"schema": _schema(model)},
            },
        }
    }


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` for a route that may be given `model` as JSON."""
    content = {"application/json": {"schema": _schema(model)}}
    return {"requestBody": {"required": False, "content": content}}


def _schema(model: type[BaseModel]) -> Any:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return _inlined(schema, schema.pop("$defs", {}))


def _inlined(schema: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(schema, dict):
        reference = schema.get("$ref", "")
        if reference:
            return _inlined(definitions[reference.rpartition("/")[2]], definitions)
        return {key: _inlined(value, definitions) for key, value in schema.items()}
    return (
        [_inlined(value, definitions) for value in schema] if isinstance(schema, list) else schema
    )
