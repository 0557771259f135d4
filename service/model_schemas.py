"""What goes over the wire of embeddings and maps: what can be asked of the model itself."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from service.encoder import Feature
from service.heatmaps import Colormap
from service.schemas import PICTURE_EXAMPLE, Answer, Number, Options, Picture, Whole

View = Literal["attention", "pca", "similarity"]
MapFormat = Literal["png", "webp", "json", "npy"]
Grid = Annotated[list[int], Field(min_length=2, max_length=2)]


ModelName = Annotated[
    str | None,
    Field(
        description="the model's name, as in /v1/models; without it the first of these",
        examples=["default"],
    ),
]


class EmbeddingOptions(Options):
    """How embeddings are given."""

    model: ModelName = None
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None,
        description="float (or null): a list of numbers; base64: little-endian float32. With "
        "`Accept: application/x-npy` or `application/octet-stream` the answer is one .npy file "
        "instead, and this is left out.",
    )
    normalize: bool = Field(
        default=True, description="scale each embedding to unit length; of patches, each patch"
    )
    feature: Feature = Field(
        default="cls",
        description="cls: the CLS token of the last block. last4: CLS of the last 4 blocks, oldest "
        "first, one after the other. cls+mean: CLS and the mean of the patch tokens. patches: all "
        "patch tokens of the same view. copy: the paper's copy descriptor of the whole picture "
        "squashed to a square, raw. /v1/models tells which the model has, and their lengths.",
    )
    dimensions: Whole | None = Field(
        default=None,
        description="must be the feature's own length, if given: DINO was not trained for shorter "
        "embeddings, and they cannot be cut",
        examples=[192],
    )
    user: str | None = Field(
        default=None, description="taken for compatibility, not used", examples=["somebody"]
    )


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class EmbeddingRequest(EmbeddingOptions):
    """OpenAI's embedding request, with pictures for texts."""

    input: Annotated[
        list[Picture],
        BeforeValidator(_as_list, json_schema_input_type=Picture | list[Picture]),
        Field(description="one picture or a list of them", examples=[PICTURE_EXAMPLE]),
    ]


class Embedding(Answer):
    """One picture's embedding."""

    object: Literal["embedding"] = Field(default="embedding", description="always embedding")
    index: int = Field(description="the picture's place in the request, from 0")
    embedding: list[float] | list[list[list[float]]] | str = Field(
        description="numbers; of patches, rows of columns of numbers; or base64 of little-endian "
        "float32, of patches row by row",
        examples=[[0.0513, 0.0939, -0.2384]],
    )


class Usage(Answer):
    """OpenAI's token counts; pictures have none."""

    prompt_tokens: int = Field(default=0, description="always 0: pictures have no tokens to pay")
    total_tokens: int = Field(default=0, description="always 0")


class EmbeddingAnswer(Answer):
    """OpenAI's embedding answer."""

    object: Literal["list"] = Field(default="list", description="always list")
    data: list[Embedding] = Field(description="one for each picture, in their order")
    model: str = Field(description="the model's name", examples=["default"])
    grid: Grid | None = Field(
        default=None, description="of feature=patches alone: rows and columns", examples=[[8, 8]]
    )
    usage: Usage = Field(default=Usage(), description="kept for OpenAI's shape")


def _as_text(value: Any) -> Any:
    """[x, y] in JSON, as the query string has it."""
    if isinstance(value, list) and len(value) == 2:
        return ",".join(_digits(number) for number in value)
    return value


def _digits(number: Any) -> str:
    text = str(number)
    return f"{number:.17f}" if isinstance(number, float) and "e" in text else text


def _of(pattern: str, rule: str) -> AfterValidator:
    """A text that matches; one that does not is told the rule, where pydantic tells the pattern."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise PydanticCustomError("rule", rule)
        return text

    return AfterValidator(check)


_FRACTION = r"(0?\.[0-9]{1,17}|[01](\.0{1,17})?)"
_POINT = f"{_FRACTION}, ?{_FRACTION}"
PointText = Annotated[
    str,
    BeforeValidator(_as_text, json_schema_input_type=Annotated[str, Field(pattern=f"^{_POINT}$")]),
    _of(_POINT, "must be two numbers from 0 to 1 with a comma between them, like 0.5,0.25"),
]
_HEAD = "(mean|max|all|[0-9]{1,3})"
HeadText = Annotated[
    str,
    # In JSON, a number is a number.
    Field(coerce_numbers_to_str=True, json_schema_extra={"pattern": f"^{_HEAD}$"}),
    _of(_HEAD, "must be mean, max, all, or the number of a head"),
]


class AttentionOptions(Options):
    """Which map is made of a picture, and how it is drawn."""

    model: ModelName = None
    view: View = Field(
        default="attention",
        description="attention: where a token looks. pca: the patch tokens' first three principal "
        "components as red, green and blue. similarity: the cosine of every patch token to the one "
        "at `point`.",
    )
    head: HeadText = Field(
        default="mean",
        description="mean or max over heads, one head by number from 0, or all as a grid with "
        "their numbers; of view=attention",
        examples=["mean", "0", "all"],
    )
    block: Whole | None = Field(
        default=None,
        ge=-1000,
        le=1000,
        description="whose attention: from 0, or from -1 for the last backwards; default: the last",
        examples=[-1],
    )
    point: PointText | None = Field(
        default=None,
        description="x,y from the top left, as fractions of the picture's width and height from 0 "
        "to 1: the patch there takes the place of CLS; needed by view=similarity",
        examples=["0.5,0.25"],
    )
    rollout: bool = Field(
        default=False,
        description="attention rolled out over all blocks (arXiv 2005.00928): heads averaged, the "
        "identity added, rows scaled to one, and multiplied",
    )
    resolution: Whole | None = Field(
        default=None,
        ge=1,
        description="short side of the picture in pixels as the model sees it, at most "
        "`max_resolution` of the model, rounded to whole patches: more is finer and slower. "
        "Default: about as many pixels in all as an embedding's input has, so that a map costs "
        "what an embedding costs",
        examples=[128],
    )
    threshold: Number | None = Field(
        default=None,
        gt=0.0,
        le=1.0,
        description="colour only the strongest patches, which hold this share of each map's mass",
        examples=[0.6],
    )
    colormap: Colormap = Field(default="viridis", description="colours from weak to strong")
    overlay: Number = Field(
        default=0.6, ge=0.0, le=1.0, description="strength over the picture; 1 is the map alone"
    )
    size: Whole | None = Field(
        default=None,
        ge=16,
        le=2048,
        description="long side of each map in pixels; default: the picture's, at most 1024",
        examples=[480],
    )
    format: MapFormat | None = Field(
        default=None,
        description="png or webp: drawn. json or npy: the numbers, however they would be "
        "drawn. Default: what the header Accept likes best, else png",
    )

    @property
    def at(self) -> tuple[float, float] | None:
        """`point` as numbers."""
        if self.point is None:
            return None
        x, y = self.point.split(",")
        return float(x), float(y)


class AttentionRequest(AttentionOptions):
    """One picture, which map, and how it is drawn."""

    image: Picture


class AttentionAnswer(Answer):
    """A picture's maps as numbers: `maps[i][row][column]`."""

    model: str = Field(description="the model's name", examples=["default"])
    view: View = Field(description="what the maps show")
    grid: Grid = Field(description="rows and columns of patches", examples=[[17, 26]])
    block: int | None = Field(
        description="whose attention, from 0; null where rolled out, and for the other views"
    )
    heads: list[int | str] = Field(
        description="what each map is: a head's number, mean, max, rollout, similarity, or the "
        "number of a principal component from 0",
        examples=[["mean"]],
    )
    maps: list[list[list[float]]] = Field(
        description="attention to each patch (CLS's share left out), cosines, or places along "
        "principal components"
    )
