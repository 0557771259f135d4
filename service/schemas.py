"""What goes over the wire.

`service.collection_schemas` has collections and snapshots, `service.model_schemas` embeddings and
maps.
"""

import json
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema
from pydantic_core import PydanticKnownError

from backbone.pictures import Mode
from index.records import OnDuplicate, Outcome
from service.encoder import Feature

PICTURE_EXAMPLE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAIAgMAAAC5YVYYAAAADFBMVEVwwI9wcI+gIF"
    "8gIN91v4zZAAAAIElEQVR42mP8/5GJ4QLDXwdm8WtMAgxMrAxMDA5MDAoAXrcFbvA72HMAAAAASUVORK5CYII="
)
Picture = Annotated[
    str,
    Field(
        description="a picture as a data URI (data:image/jpeg;base64,...) or as base64; or its "
        "http(s) URL, where the operator has switched fetching on",
        examples=[PICTURE_EXAMPLE],
    ),
]
Metadata = Annotated[
    dict[str, Any], Field(default_factory=dict, description="any JSON object, given back as it is")
]
FILTER_EXAMPLE = {
    "must": [{"key": "label", "match": {"value": "cat"}}],
    "must_not": [{"key": "stars", "range": {"lt": 3}}],
}
_FILTER_TOLD = (
    "which pictures count, by their metadata: an object of must, should and must_not, each a list "
    "of conditions; a condition is a key with one of match, range, exists, or another such object "
    "(docs/filters.md)"
)


def _no_truth_value(error: Literal["int_type", "float_type"]) -> BeforeValidator:
    def check(value: object) -> object:
        values = value if isinstance(value, list) else [value]
        if bool in set(map(type, values)):  # pydantic would take true for 1
            raise PydanticKnownError(error)
        return value

    return BeforeValidator(check)


Whole: TypeAlias = Annotated[int, _no_truth_value("int_type")]
"""A whole number in a request."""
Number: TypeAlias = Annotated[float, _no_truth_value("float_type")]
"""A number in a request."""
Numbers: TypeAlias = Annotated[list[float], _no_truth_value("float_type")]
"""A list of numbers in a request."""


class Options(BaseModel):
    """A request's options: in the query string, or beside the picture in JSON."""

    model_config = ConfigDict(extra="forbid")


class Answer(BaseModel):
    """Something that the service says."""


class FilterText(Options):
    """A filter in the query string."""

    filter: str | None = Field(
        default=None,
        description=f"as JSON: {_FILTER_TOLD}",
        examples=[json.dumps(FILTER_EXAMPLE)],
    )


class FilterObject(Options):
    """A filter in a JSON body. The index says what is wrong with one."""

    filter: Annotated[
        Any,
        WithJsonSchema(
            {
                "anyOf": [{"type": "object"}, {"type": "null"}],
                "default": None,
                "description": _FILTER_TOLD,
                "examples": [FILTER_EXAMPLE],
            }
        ),
    ] = None


ErrorType = Literal["invalid_request_error", "not_found_error", "rate_limit_error", "server_error"]


class ErrorDetail(Answer):
    """What went wrong."""

    message: str = Field(
        description="for people: the field, the value and the rule",
        examples=["head is 9; the model has 3, numbered from 0 to 2"],
    )
    type: ErrorType = Field(description="the kind of error, as its status has it")
    param: str | None = Field(
        description="the field, query parameter or position that was wrong; null where none was",
        examples=["head", "input[2]"],
    )
    code: str = Field(description="for programs: what it was", examples=["invalid_head"])


class ErrorAnswer(Answer):
    """The one shape of every error."""

    error: ErrorDetail = Field(description="what went wrong")


class ModelCard(Answer):
    """One model, in OpenAI's shape with what a picture model adds."""

    id: str = Field(description="the model's name, for `model` in requests", examples=["default"])
    object: Literal["model"] = Field(default="model", description="always model")
    created: int = Field(default=0, description="always 0: kept for OpenAI's shape")
    owned_by: str = Field(default="dinoscope", description="kept for OpenAI's shape")
    architecture: str = Field(description="network and patch size", examples=["vit_tiny/8"])
    fingerprint: str = Field(
        description="vectors of models with different fingerprints cannot be compared",
        examples=["9799cc5f78fcdc8a"],
    )
    embedding_size: int = Field(description="of feature=cls", examples=[192])
    copy_embedding_size: int = Field(description="of feature=copy", examples=[384])
    features: dict[Feature, int] = Field(
        description="the features that the model has, and the length of each; of patches, of one "
        "patch",
        examples=[{"cls": 192, "last4": 768, "cls+mean": 384, "patches": 192, "copy": 384}],
    )
    input_size: int = Field(description="side of the square that cls is made of, in pixels")
    patch_size: int | None = Field(description="side in pixels; null for a convolutional network")
    max_resolution: int = Field(
        description="most pixels of the short side that maps may be made of", examples=[137]
    )
    blocks: int = Field(description="0 for a convolutional network")
    heads: int = Field(description="0 for a convolutional network, which has no attention")
    picture_mode: Mode = Field(description="what it sees of a picture: grey (L), RGB or RGBA")
    licence: str = Field(description="of the weights", examples=["Apache-2.0"])


class ModelList(Answer):
    """The models that are served."""

    object: Literal["list"] = Field(default="list", description="always list")
    data: list[ModelCard] = Field(description="one for each model")


class Deleted(Answer):
    """What was deleted."""

    deleted: str = Field(description="its name or id", examples=["cat-1"])


class DeletedImages(Answer):
    """How many pictures were deleted."""

    deleted: int = Field(description="how many", examples=[12])


class NewImage(Options):
    """One picture for a collection."""

    image: Picture
    id: str | None = Field(
        default=None, description="default: made from the content's hash", examples=["cat-1"]
    )
    metadata: Metadata


class UploadOptions(Options):
    """For all pictures of an upload."""

    on_duplicate: OnDuplicate = Field(
        default="add",
        description="what becomes of a new id whose very content another picture has: add it all "
        "the same, skip it, or update the other's metadata, under the other's id",
    )


class NewImages(UploadOptions):
    """Pictures for a collection."""

    images: list[NewImage] = Field(min_length=1, description="the pictures, one or more")


class ImageOptions(UploadOptions):
    """For a raw picture: its id and metadata."""

    id: str | None = Field(
        default=None, description="default: made from the content's hash", examples=["cat-1"]
    )
    metadata: str | None = Field(
        default=None, description="a JSON object", examples=['{"label": "cat"}']
    )


class Stored(Answer):
    """What happened to one picture of an upload; `error` where it failed."""

    id: str | None = Field(description="null where it failed and no id was given")
    outcome: Outcome | Literal["failed"] = Field(description="what happened")
    same_as: str | None = Field(
        default=None,
        description="the picture with the same content that stands in this one's place, where "
        "on_duplicate was skip or update",
    )
    error: ErrorDetail | None = Field(default=None, description="why it failed")


class StoredImages(Answer):
    """What happened to each picture, in the order of the request; durable when this is sent."""

    images: list[Stored] = Field(description="one for each picture")


class ImageRecord(Answer):
    """One picture of a collection."""

    id: str = Field(description="unique in its collection", examples=["cat-1"])
    metadata: dict[str, Any] = Field(
        description="as it was given", examples=[{"label": "cat", "stars": 5}]
    )
    content_hash: str | None = Field(description="SHA-256 of the picture's bytes; null: unknown")
    created_at: float = Field(description="unix time in seconds")
    updated_at: float = Field(description="unix time in seconds")


class PageOptions(FilterText):
    """Which part of a listing."""

    cursor: str | None = Field(default=None, description="next_cursor of the page before")
    limit: Whole = Field(default=100, ge=1, le=1000, description="most pictures in the answer")


class ImagePage(Answer):
    """A part of a listing, in a stable order."""

    images: list[ImageRecord] = Field(description="the pictures' records")
    next_cursor: str | None = Field(description="for the next page; null on the last")


class SearchTerms(Options):
    """How many matches, and how good."""

    k: Whole = Field(default=10, ge=1, le=1000, description="most matches")
    min_score: Number | None = Field(default=None, ge=-1.0, le=1.0, description="least cosine")


class SearchOptions(SearchTerms, FilterText):
    """A search's options beside a picture."""


class SearchRequest(SearchTerms, FilterObject):
    """A search by one of: a picture, the id of one in the collection, a vector."""

    image: Picture | None = Field(default=None, description="a picture")
    id: str | None = Field(
        default=None, description="of a picture in the collection", examples=["cat-1"]
    )
    vector: Numbers | None = Field(
        default=None, description="a CLS embedding of the model, of any length but zero"
    )


class SearchMatch(Answer):
    """One match; `score` is the cosine."""

    id: str = Field(description="of the picture in the collection", examples=["cat-1"])
    score: float = Field(description="the cosine", examples=[0.87])
    metadata: dict[str, Any] = Field(description="of the picture", examples=[{"label": "cat"}])


class SearchAnswer(Answer):
    """Matches, best first."""

    matches: list[SearchMatch] = Field(description="best first")


class ClassifyTerms(Options):
    """The k-NN vote."""

    label: str | None = Field(
        default=None,
        min_length=1,
        description="the metadata key whose value is voted on; needed",
        examples=["label"],
    )
    k: Whole = Field(default=20, ge=1, le=1000, description="neighbours that vote")
    temperature: Number = Field(default=0.07, gt=0.0, description="weight is exp(score / this)")


class ClassifyOptions(ClassifyTerms, FilterText):
    """The vote's options beside a picture."""


class ClassifyRequest(ClassifyTerms, FilterObject):
    """One picture to classify."""

    image: Picture


class LabelProbability(Answer):
    """A label's share of the votes."""

    label: Any = Field(description="a value of the metadata key", examples=["cat"])
    probability: float = Field(description="its share of the votes", examples=[0.8])


class ClassifyAnswer(Answer):
    """Labels by falling share of the votes, and who voted."""

    labels: list[LabelProbability] = Field(description="most likely first")
    neighbours: list[SearchMatch] = Field(description="those that were asked, nearest first")


class CopyTerms(Options):
    """How many candidates."""

    k: Whole = Field(default=10, ge=1, le=1000, description="most candidates")


class CopyOptions(CopyTerms, FilterText):
    """The options beside a picture."""


class CopyRequest(CopyTerms, FilterObject):
    """One picture whose copies are looked for."""

    image: Picture


class CopyMatch(Answer):
    """A candidate; no verdict while the collection is not calibrated."""

    id: str = Field(description="of the picture in the collection", examples=["cat-1"])
    score: float = Field(description="cosine of the copy descriptors")
    normalized_score: float | None = Field(
        default=None, description="null while the collection is not calibrated"
    )
    is_copy: bool | None = Field(
        default=None, description="null while the collection is not calibrated"
    )


class CopyAnswer(Answer):
    """Candidates, best first."""

    calibrated: bool = Field(default=False, description="whether there is a verdict")
    threshold: float | None = Field(
        default=None, description="of normalized_score; null while not calibrated"
    )
    matches: list[CopyMatch] = Field(description="best first")


class Health(Answer):
    """Alive or ready, and why not."""

    status: Literal["ok", "unavailable"] = Field(description="unavailable: not ready")
    reasons: list[str] = Field(default=[], description="what is wrong, for people")
