"""What the API's description says of parameters, errors, and bodies of several kinds."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Path
from pydantic import BaseModel

from service.schemas import ErrorAnswer

CollectionName = Annotated[str, Path(description="the collection's name", examples=["default"])]
ImageId = Annotated[
    str, Path(description="the picture's id; slashes stand as they are", examples=["cat-1"])
]
SnapshotName = Annotated[
    str, Path(description="the snapshot's name", examples=["20261122T203100Z"])
]

Responses = dict[int | str, dict[str, Any]]

_TOLD = {
    400: "A picture, a vector, a filter or a field that cannot be used; the message names it.",
    404: "No such model, collection, snapshot or picture.",
    409: "The collection was made with another model, or the snapshot is damaged.",
    413: "A picture or the request is too large.",
    415: "Not a picture, or not of an allowed format.",
    422: "A parameter that is unknown, or not of its kind; the message names it.",
    429: "The queue is full; `Retry-After` says when to come again.",
    503: "The model or the store failed, or the service is stopping.",
    507: "The disk is full; nothing of the write was kept.",
}
_WAIT = {
    "Retry-After": {
        "description": "seconds to wait before the next try",
        "schema": {"type": "integer", "minimum": 1},
    }
}


ERRORS: Responses = {
    status: {
        "model": ErrorAnswer,
        "description": told,
        **({"headers": _WAIT} if status in (429, 503) else {}),
    }
    for status, told in _TOLD.items()
}
"""Of a route that works with a collection."""

PICTURE_ERRORS: Responses = {
    status: told for status, told in ERRORS.items() if status not in (409, 507)
}
"""Of a route that is given pictures, and works with the model alone."""


def binary(description: str) -> dict[str, Any]:
    """The content of a media type that is not text."""
    return {"schema": {"type": "string", "format": "binary", "description": description}}


def picture_body(
    model: type[BaseModel],
    *,
    examples: Mapping[str, Any],
    fields: Mapping[str, Any] | None = None,
    options: type[BaseModel] | None = None,
) -> dict[str, Any]:
    """`openapi_extra` for a route that takes `model` as JSON, or pictures as a form or raw.

    Args:
        examples: JSON bodies by name.
        fields: of the form, beside `image`.
        options: what the route reads itself out of the query string (`uploads.read_options`).
    """
    image = {"type": "string", "format": "binary", "description": "a picture's file; repeatable"}
    form = {"image": image, **(fields or {})}
    return {
        "parameters": [] if options is None else _in_query(options),
        "requestBody": {
            "required": True,
            "description": "The picture in JSON, as a form's file, or raw.",
            "content": {
                "multipart/form-data": {
                    "schema": {"type": "object", "properties": form, "required": ["image"]}
                },
                "image/*": binary("a picture's file"),
                "application/json": {"schema": _schema(model), "examples": _named(examples)},
            },
        },
    }


def json_body(model: type[BaseModel], *, examples: Mapping[str, Any]) -> dict[str, Any]:
    """`openapi_extra` for a route that may be given `model` as JSON."""
    content = {"application/json": {"schema": _schema(model), "examples": _named(examples)}}
    return {"requestBody": {"required": False, "content": content}}


def _named(examples: Mapping[str, Any]) -> dict[str, Any]:
    return {name: {"value": value} for name, value in examples.items()}


def _in_query(options: type[BaseModel]) -> list[dict[str, Any]]:
    """As FastAPI describes a model of `Query()`."""
    parameters = []
    for name, schema in _schema(options)["properties"].items():
        if schema.get("default", ...) is None:
            del schema["default"]
        parameter = {"name": name, "in": "query", "required": False, "schema": schema}
        parameters.append(parameter | {"description": schema["description"]})
    return parameters


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
