"""What an export holds in every format: a header, records, and at its end how many they were."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, NoReturn

from index.errors import CollectionError, ImportFailed
from index.records import NewRecord, Record, check_spaces, is_possible_id

FORMAT = "dinoscope-collection"
VERSION = 1
_HEADER_KEYS = {"format", "version", "model", "metric", "spaces"}

# Records as they are read, each with where it stands: "pictures.jsonl, line 7".
Placed = Iterator[tuple[str, NewRecord]]


@dataclass(frozen=True, eq=False)
class ExportedRecord:
    """A record with its vectors, and its thumbnail where it has one."""

    record: Record
    thumbnail: bytes | None


@dataclass(frozen=True)
class Header:
    """What an export says of the collection that it came from.

    Attributes:
        model: the fingerprint of the model that made the vectors.
        metric: how vectors were compared; the vectors themselves are as they were given.
        spaces: space -> dimension.
    """

    model: str
    metric: str
    spaces: Mapping[str, int]

    def to_json(self) -> str:
        """One line of JSON, which `from_json` reads."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "model": self.model,
                "metric": self.metric,
                "spaces": dict(self.spaces),
            },
            ensure_ascii=False,
        )

    @classmethod
    def from_json(cls, text: bytes, at: str) -> "Header":
        """Read and check a header that stands `at` a place; raises `ImportFailed`."""
        found = parse_object(text, at)
        if found.get("format") != FORMAT:
            raise ImportFailed(f'{at}: expected a header with "format": "{FORMAT}"')
        version = found.get("version")
        if version != VERSION:
            raise ImportFailed(
                f"{at}: its format is version {version!r} and this program reads {VERSION} "
                "(a newer release may have written it; upgrading helps)"
            )
        check_keys(found, required=_HEADER_KEYS, at=at)
        for key in ("model", "metric"):
            if not is_possible_id(found[key]):
                raise ImportFailed(f"{at}: {key} must be a short string")
        if not isinstance(found["spaces"], dict):
            raise ImportFailed(f"{at}: spaces must map names to dimensions")
        try:
            check_spaces(found["spaces"])
        except CollectionError as error:
            raise ImportFailed(f"{at}: {error}") from error
        return cls(found["model"], found["metric"], found["spaces"])


def parse_object(text: bytes, at: str) -> dict[str, Any]:
    """Decode a JSON object more strictly than `json` does: no NaN, no key twice, UTF-8 alone.

    Raises:
        ImportFailed: naming the place, `at`.
    """
    try:
        # Text, as json.loads would guess at the encoding of bytes.
        found = json.loads(
            text.decode(), parse_constant=_refuse_constant, object_pairs_hook=_distinct
        )
    except json.JSONDecodeError as error:
        raise ImportFailed(f"{at}: not JSON: {error.msg}, at character {error.pos + 1}") from error
    except UnicodeDecodeError as error:
        raise ImportFailed(f"{at}: not UTF-8: {error.reason}, at byte {error.start + 1}") from error
    except RecursionError as error:
        raise ImportFailed(f"{at}: nested too deeply") from error
    except ValueError as error:
        raise ImportFailed(f"{at}: {error}") from error
    if not isinstance(found, dict):
        raise ImportFailed(f"{at}: expected a JSON object, got {type(found).__name__}")
    return found


def check_keys(
    found: Mapping[str, object],
    *,
    required: AbstractSet[str],
    optional: AbstractSet[str] = frozenset(),
    at: str,
) -> None:
    """Raise `ImportFailed` where a required key is missing or one stands there that is neither."""
    unknown = sorted(found.keys() - required - optional)
    if unknown:
        allowed = sorted(required | optional)
        raise ImportFailed(f"{at}: unknown keys {_listed(unknown)}; there may be {allowed}")
    missing = sorted(required - found.keys())
    if missing:
        raise ImportFailed(f"{at}: {_listed(missing)} missing")


def _listed(names: list[str]) -> str:
    shown = ", ".join(repr(name[:60]) for name in names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON; numbers must be finite")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice[:60]!r} stands there twice")
    return found
