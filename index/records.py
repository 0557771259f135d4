"""What goes into a collection and what comes out, and the checks at the door."""

import json
import math
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from index.database import damage
from index.errors import InvalidName, InvalidRecord, InvalidVector
from index.kinds import Metric

MAX_ID_CHARACTERS = 512
MAX_DIMENSION = 65_536
MAX_DEPTH = 64
"""Of metadata: objects and lists within one another, the outermost counted."""
_FLOAT32 = np.dtype(np.float32)  # comparing with the type makes one each time
_MAX_SQUARE = 1e37  # of a vector's length: four times as much is still a float32
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")

Outcome = Literal["created", "updated", "unchanged", "exists", "skipped"]
OnDuplicate = Literal["add", "skip", "update"]


# Equality of arrays is not a truth value, so the classes that hold vectors compare by identity.
@dataclass(frozen=True, eq=False)
class NewRecord:
    """A record to be written. `vectors` has one vector [dimension] for every space.

    `thumbnail` is kept beside the record as it is given; it is no part of what makes two records
    equal, and a record that is rewritten without one keeps the one that it has.
    """

    id: str
    vectors: Mapping[str, ArrayLike]
    metadata: Mapping[str, Any] = field(default_factory=dict)
    content_hash: str | None = None
    thumbnail: bytes | None = None


@dataclass(frozen=True, eq=False)
class Record:
    """A record as stored. `vectors` is empty unless asked for; times are Unix seconds."""

    id: str
    metadata: dict[str, Any]
    content_hash: str | None
    vectors: dict[str, NDArray[np.float32]]
    created_at: float
    updated_at: float


@dataclass(frozen=True)
class Page:
    """Some records in order of insertion; `next_cursor` is None on the last page."""

    records: list[Record]
    next_cursor: str | None


class Match(NamedTuple):
    """A search hit; see `Collection.search` for what `score` is.

    `metadata_json` is the record's metadata as JSON, decoded where somebody asks for it: many want
    ids and scores alone, and of a search of half a millisecond decoding ten is a twentieth.
    """

    id: str
    score: float
    metadata_json: str

    @property
    def metadata(self) -> dict[str, Any]:
        """The record's metadata, decoded each time that it is asked for.

        Raises:
            StoreDamaged: it is not as it was written.
        """
        try:
            return decode_metadata(self.metadata_json)
        except ValueError as error:
            whose = f"the collection of record {self.id!r}"
            raise damage(whose, "the record's metadata is garbled") from error


@dataclass(frozen=True)
class UpsertOutcome:
    """What a write did with one record.

    Attributes:
        outcome: "created", "updated" or "unchanged"; "exists" where `insert` found the id taken;
            "skipped" where another record has the same content. Where a record's content hash is
            the same, vectors that differ by rounding alone are unchanged, and those of before stay.
        same_as: the id of the record that has the same content and stands in this one's place.
    """

    id: str
    outcome: Outcome
    same_as: str | None = None


@dataclass(frozen=True, eq=False)
class CheckedRecord:
    """A `NewRecord` that passed `check_record`: copied, typed, ready for the store."""

    id: str
    metadata_json: str
    content_hash: str | None
    vectors: dict[str, NDArray[np.float32]]
    thumbnail: bytes | None


def check_record(
    record: NewRecord, spaces: Mapping[str, int], metric: Metric = "cosine"
) -> CheckedRecord:
    """Check one record against its collection's spaces (name -> dimension) and copy its vectors.

    Raises:
        InvalidRecord: the id, the content hash or the metadata cannot be stored.
        InvalidVector: a space is unknown or missing, or a vector does not fit its space.
    """
    if not is_possible_id(record.id):
        raise InvalidRecord(
            f"an id must be 1 to {MAX_ID_CHARACTERS} characters without control characters, "
            f"got {_shorten(record.id)}"
        )
    if record.content_hash is not None and not is_possible_id(record.content_hash):
        raise InvalidRecord(
            f"record {_shorten(record.id)}: content_hash must be None or 1 to {MAX_ID_CHARACTERS} "
            f"characters without control characters, got {_shorten(record.content_hash)}"
        )
    if not isinstance(record.vectors, Mapping):
        raise InvalidVector(f"record {_shorten(record.id)}: vectors must map a space to its vector")
    if set(record.vectors) != set(spaces):
        raise InvalidVector(
            f"record {_shorten(record.id)}: expected a vector for each of the spaces "
            f"{sorted(spaces)}, got {sorted(map(str, record.vectors))}"
        )
    return CheckedRecord(
        id=record.id,
        metadata_json=_metadata_to_json(record.id, record.metadata),
        content_hash=record.content_hash,
        vectors={
            space: check_vector(
                record.vectors[space],
                dimension,
                metric,
                described=f"record {_shorten(record.id)}, space {space!r}",
            )
            for space, dimension in spaces.items()
        },
        thumbnail=record.thumbnail,
    )


def check_vector(
    vector: ArrayLike, dimension: int, metric: Metric = "cosine", *, described: str
) -> NDArray[np.float32]:
    """Copy a vector [dimension] to contiguous float32.

    Raises:
        InvalidVector: not numbers, another shape, a NaN or infinity; or all zeros, of which the
            cosine is not defined.
    """
    return _check_numbers(vector, (dimension,), metric, described=described)


def check_query(
    vector: ArrayLike, dimension: int, metric: Metric = "cosine", *, described: str
) -> NDArray[np.float32]:
    """`check_vector`, and `prepared`."""
    if (
        metric == "cosine"
        and isinstance(vector, np.ndarray)
        and vector.dtype == _FLOAT32
        and vector.shape == (dimension,)
    ):
        # In one go, as each step costs a search of a few hundred microseconds some of them.
        wide = vector.astype(np.float64)
        square = float(wide.dot(wide))  # NaN and infinity come through, all zeros give zero
        if 0.0 < square < math.inf:
            return (wide * (1 / math.sqrt(square))).astype(np.float32)
    checked = check_vector(vector, dimension, metric, described=described)
    query: NDArray[np.float32] = prepared(checked[np.newaxis], metric)[0]
    return query


def check_queries(
    vectors: ArrayLike, dimension: int, metric: Metric = "cosine", *, described: str
) -> NDArray[np.float32]:
    """`check_query` for each row of [n, dimension]."""
    return prepared(_check_numbers(vectors, (None, dimension), metric, described=described), metric)


def check_name(name: str) -> None:
    """Raise `InvalidName` unless `name` can name a collection or a space."""
    if not is_name(name):
        raise InvalidName(
            "a name must be 1 to 63 characters out of a-z, 0-9, '_' and '-', "
            f"beginning with a letter or digit; got {_shorten(name)}"
        )


def is_name(value: object) -> bool:
    """Whether a collection or a space may have this name, and so whether a folder may hold one."""
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def check_ids(ids: Iterable[str]) -> list[str]:
    """The ids as a list; raises `TypeError` for one string, whose characters would pass for ids."""
    if isinstance(ids, str):
        raise TypeError(f"expected a list of ids, got the string {_shorten(ids)}")
    return list(ids)


def check_positive(**number: int) -> None:
    """Raise `ValueError` unless each number, given by its name, is at least 1."""
    for name, value in number.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")


def check_model(model: str) -> None:
    """Raise `ValueError` unless `model` can be kept as a model's fingerprint."""
    if not is_possible_id(model):
        raise ValueError(f"model must be a fingerprint, a short string; got {_shorten(model)}")


def check_spaces(spaces: Mapping[str, int]) -> None:
    """Raise `InvalidName` or `InvalidVector` unless `spaces` maps names to dimensions."""
    if not spaces:
        raise InvalidVector("a collection needs at least one space (name -> dimension)")
    for space, dimension in spaces.items():
        check_name(space)
        is_integer = isinstance(dimension, int) and not isinstance(dimension, bool)
        if not is_integer or not 1 <= dimension <= MAX_DIMENSION:
            raise InvalidVector(
                f"space {space!r}: expected a dimension from 1 to {MAX_DIMENSION}, "
                f"got {_shorten(dimension)}"
            )


def is_possible_id(value: object) -> bool:
    """Whether a record may have this id: other ids need not be looked for."""
    return (
        isinstance(value, str)
        and 1 <= len(value) <= MAX_ID_CHARACTERS
        # Cc: control characters. Cs: half of a surrogate pair, which no UTF-8 can hold. What is
        # printable has neither, and most ids are.
        and (
            value.isprintable()
            or not any(unicodedata.category(character) in {"Cc", "Cs"} for character in value)
        )
    )


def prepared(vectors: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
    """Vectors [n, dimension] as the index holds them: of unit length where the metric is cosine.

    Rows must be finite, and with the metric cosine not all zero.
    """
    if metric != "cosine":
        return np.ascontiguousarray(vectors)
    # In float64 no finite float32 row overflows or underflows when squared.
    wide = vectors.astype(np.float64)
    wide /= np.sqrt(np.add.reduce(wide * wide, axis=1))[:, np.newaxis]
    return wide.astype(np.float32)


def _check_numbers(
    values: ArrayLike, shape: tuple[int | None, ...], metric: Metric, *, described: str
) -> NDArray[np.float32]:
    try:
        given = np.asarray(values)
    except ValueError as error:  # rows of unequal length
        raise InvalidVector(f"{described}: not an array of numbers: {error}") from error
    if given.dtype.kind not in "fiu":
        raise InvalidVector(f"{described}: expected real numbers, got {given.dtype}")
    fits = given.shape == shape or (
        given.ndim == len(shape)
        and all(n in (None, got) for n, got in zip(shape, given.shape, strict=True))
    )
    if not fits:
        wanted = ", ".join("n" if size is None else str(size) for size in shape)
        raise InvalidVector(f"{described}: expected shape [{wanted}], got {list(given.shape)}")
    if given.ndim == 1 and given.dtype == np.float32:
        copied = np.array(given, dtype=np.float32, order="C")
        # One product tells that all is well: NaN and infinity come through, all zeros give zero.
        wide = copied.astype(np.float64)
        if 0.0 < wide.dot(wide) < (np.inf if metric == "cosine" else _MAX_SQUARE):
            return copied
    # What is too large for float32 becomes infinite here and is refused below.
    with np.errstate(over="ignore"):
        copied = np.array(given, dtype=np.float32, order="C")
    rows = np.atleast_2d(copied)
    faults = [(~np.isfinite(rows).all(axis=1), "expected finite numbers, got NaN or infinity")]
    if metric == "cosine":
        faults.append((~rows.any(axis=1), "expected a vector with a direction, got all zeros"))
    else:  # what would make scores infinite
        wide = rows.astype(np.float64)
        too_long = np.einsum("nd,nd->n", wide, wide) >= _MAX_SQUARE
        faults.append((too_long, f"expected a length below {_MAX_SQUARE**0.5:.1e}"))
    for bad, reason in faults:
        if bad.any():
            where = f", row {int(bad.argmax())}" if copied.ndim == 2 else ""
            raise InvalidVector(f"{described}{where}: {reason}")
    return copied


def _metadata_to_json(record_id: str, metadata: Mapping[str, Any]) -> str:
    """One text for one meaning: keys sorted, so equal metadata are equal strings."""
    what = f"record {_shorten(record_id)}: metadata must be a JSON object"
    if not isinstance(metadata, Mapping):
        raise InvalidRecord(f"{what}, got {type(metadata).__name__}")
    given = dict(metadata)
    try:
        if not _is_plain(given) and _is_deeper(given, MAX_DEPTH):
            raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
        text = _TO_JSON.encode(given)
        text.encode()  # refuses half a surrogate pair
        # The encoder turns the key 1 into "1" and a tuple into a list without a word.
        returns_equal = _is_plain(given) or json.loads(text) == given
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRecord(f"{what}: {error}") from error
    if not returns_equal:
        raise InvalidRecord(f"{what}: its keys must be strings and its sequences lists")
    return text


def decode_metadata(text: str) -> dict[str, Any]:
    """A record's metadata out of the JSON that is stored of it.

    Raises:
        ValueError: it is not a JSON object.
    """
    try:
        metadata, end = _FROM_JSON.raw_decode(text)  # half of what json.loads takes
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if end != len(text) or not isinstance(metadata, dict):
        raise ValueError("not one JSON object")
    return metadata


def _is_plain(metadata: dict[Any, Any]) -> bool:
    """Whether all keys are strings, and all values of a kind that JSON gives back as it was."""
    return all(type(key) is str for key in metadata) and all(
        type(value) in _PLAIN for value in metadata.values()
    )


def _is_deeper(value: object, levels: int) -> bool:
    """Whether there are containers within containers beyond so many levels."""
    if isinstance(value, Mapping):
        return not levels or any(_is_deeper(each, levels - 1) for each in value.values())
    if isinstance(value, list | tuple):
        return not levels or any(_is_deeper(each, levels - 1) for each in value)
    return False


_PLAIN = frozenset({str, int, float, bool, type(None)})
_FROM_JSON = json.JSONDecoder()
_TO_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False)


def _shorten(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:60]}... ({len(shown)} characters)"
