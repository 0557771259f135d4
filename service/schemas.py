"""What goes over the wire; `service.collection_schemas` has collections and snapshots."""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from backbone.pictures import Mode
from index.records import OnDuplicate, Outcome
from service.heatmaps import Colormap

Picture = Annotated[
    str,
    Field(description="a picture as a data URI (data:image/jpeg;base64,...) or as base64"),
]
Metadata = Annotated[
    dict[str, Any], Field(default_factory=dict, description="any JSON object, given back as it is")
]
_FILTER_EXAMPLE = {
    "must": [{"key": "label", "match": {"value": "cat"}}],
    "must_not": [{"key": "stars", "range": {"lt": 3}}],
}
_FILTER_TOLD = (
    "which pictures count, by their metadata: an object of must, should and must_not, each a list "
    "of conditions; a condition is a key with one of match, range, exists, or another such object "
    "(docs/filters.md)"
)


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
        examples=[json.dumps(_FILTER_EXAMPLE)],
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
                "examples": [_FILTER_EXAMPLE],
            }
        ),
    ] = None


class ErrorDetail(Answer):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(Answer):
    """The one shape of every error."""

    error: ErrorDetail


ModelName = Annotated[
    str | None,
    Field(description="the model's name, as in /v1/models; without it the first of these"),
]


class EmbeddingOptions(Options):
    """How embeddings are given."""

    model: ModelName = None
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="float: a list of numbers; base64: little-endian float32"
    )
    normalize: bool = Field(default=True, description="scale each embedding to unit length")
    feature: Literal["cls", "copy"] = Field(
        default="cls", description="cls: the CLS token; copy: the paper's copy descriptor, raw"
    )
    user: str | None = Field(default=None, description="taken for compatibility, not used")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EmbeddingRequest(EmbeddingOptions):
    """OpenAI's embedding request, with pictures for texts."""

    input: Annotated[
        list[Picture],
        BeforeValidator(_as_list, json_schema_input_type=Picture | list[Picture]),
        Field(description="one picture or a list of them"),
    ]
    dimensions: int | None = Field(default=None, description="must be the model's own, if given")


class Embedding(Answer):
    """One picture's embedding."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(Answer):
    """OpenAI's token counts; pictures have none."""

    prompt_tokens: int = 0
    total_tokens: int = 0


class EmbeddingAnswer(Answer):
    """OpenAI's embedding answer."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage = Usage()


class AttentionOptions(Options):
    """How attention is drawn."""

    model: ModelName = None
    head: str = Field(
        default="mean",
        pattern=r"^(mean|all|[0-9]{1,3})$",
        coerce_numbers_to_str=True,  # in JSON, a number is a number
        description="mean over heads, one head by number from 0, or all as a grid",
    )
    threshold: float | None = Field(
        default=None, gt=0.0, le=1.0, description="colour only the patches with this share of mass"
    )
    colormap: Colormap = Field(default="viridis", description="colours from weak to strong")
    overlay: float = Field(
        default=0.6, ge=0.0, le=1.0, description="strength over the picture; 1 is the map alone"
    )
    size: int | None = Field(
        default=None, ge=16, le=2048, description="long side of each map in pixels; default: own"
    )


class AttentionRequest(AttentionOptions):
    """One picture and how to draw its attention."""

    image: Picture


class AttentionAnswer(Answer):
    """Raw attention of CLS to each patch: `maps[head][row][column]`."""

    model: str
    grid: tuple[int, int] = Field(description="rows and columns of patches")
    heads: list[int | str]
    maps: list[list[list[float]]]


class ModelCard(Answer):
    """One model, in OpenAI's shape with what a picture model adds."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "dinoscope"
    architecture: str
    fingerprint: str
    embedding_size: int
    copy_embedding_size: int = Field(description="of feature=copy")
    input_size: int
    patch_size: int | None = Field(description="null for a convolutional network")
    heads: int = Field(description="0 for a convolutional network, which has no attention")
    picture_mode: Mode = Field(description="what it sees of a picture: grey (L), RGB or RGBA")
    licence: str


class ModelList(Answer):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Deleted(Answer):
    """What was deleted."""

    deleted: str


class DeletedImages(Answer):
    """How many pictures were deleted."""

    deleted: int


class NewImage(Options):
    """One picture for a collection."""

    image: Picture
    id: str | None = Field(default=None, description="default: made from the content's hash")
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

    images: list[NewImage] = Field(min_length=1)


class ImageOptions(UploadOptions):
    """For a raw picture: its id and metadata."""

    id: str | None = Field(default=None, description="default: made from the content's hash")
    metadata: str | None = Field(default=None, description="a JSON object")


class Stored(Answer):
    """What happened to one picture of an upload; `error` where it failed."""

    id: str | None = Field(description="null where it failed and no id was given")
    outcome: Outcome | Literal["failed"]
    same_as: str | None = Field(
        default=None,
        description="the picture with the same content that stands in this one's place, where "
        "on_duplicate was skip or update",
    )
    error: ErrorDetail | None = None


class StoredImages(Answer):
    """What happened to each picture, in the order of the request; durable when this is sent."""

    images: list[Stored]


class ImageRecord(Answer):
    """One picture of a collection."""

    id: str
    metadata: dict[str, Any]
    content_hash: str | None
    created_at: float
    updated_at: float


class PageOptions(FilterText):
    """Which part of a listing."""

    cursor: str | None = Field(default=None, description="next_cursor of the page before")
    limit: int = Field(default=100, ge=1, le=1000)


class ImagePage(Answer):
    """A part of a listing, in a stable order."""

    images: list[ImageRecord]
    next_cursor: str | None


class SearchTerms(Options):
    """How many matches, and how good."""

    k: int = Field(default=10, ge=1, le=1000, description="most matches")
    min_score: float | None = Field(default=None, ge=-1.0, le=1.0, description="least cosine")


class SearchOptions(SearchTerms, FilterText):
    """A search's options beside a picture."""


class SearchRequest(SearchTerms, FilterObject):
    """A search by one of: a picture, the id of one in the collection, a vector."""

    image: Picture | None = None
    id: str | None = None
    vector: list[float] | None = None


class SearchMatch(Answer):
    """One match; `score` is the cosine."""

    id: str
    score: float
    metadata: dict[str, Any]


class SearchAnswer(Answer):
    """Matches, best first."""

    matches: list[SearchMatch]


class ClassifyTerms(Options):
    """The k-NN vote."""

    label: str | None = Field(
        default=None, min_length=1, description="the metadata key whose value is voted on; needed"
    )
    k: int = Field(default=20, ge=1, le=1000, description="neighbours that vote")
    temperature: float = Field(default=0.07, gt=0.0, description="weight is exp(score / this)")


class ClassifyOptions(ClassifyTerms, FilterText):
    """The vote's options beside a picture."""


class ClassifyRequest(ClassifyTerms, FilterObject):
    """One picture to classify."""

    image: Picture


class LabelProbability(Answer):
    """A label's share of the votes."""

    label: Any
    probability: float


class ClassifyAnswer(Answer):
    """Labels by falling share of the votes, and who voted."""

    labels: list[LabelProbability]
    neighbours: list[SearchMatch]


class CopyTerms(Options):
    """How many candidates."""

    k: int = Field(default=10, ge=1, le=1000, description="most candidates")


class CopyOptions(CopyTerms, FilterText):
    """The options beside a picture."""


class CopyRequest(CopyTerms, FilterObject):
    """One picture whose copies are looked for."""

    image: Picture


class CopyMatch(Answer):
    """A candidate; no verdict while the collection is not calibrated."""

    id: str
    score: float = Field(description="cosine of the copy descriptors")
    normalized_score: float | None = None
    is_copy: bool | None = None


class CopyAnswer(Answer):
    """Candidates, best first."""

    calibrated: bool = False
    threshold: float | None = None
    matches: list[CopyMatch]


class Health(Answer):
    """Alive or ready, and why not."""

    status: Literal["ok", "unavailable"]
    reasons: list[str] = []
