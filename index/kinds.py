"""Which structure a collection is searched through, and its settings."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, cast, get_args

from index.errors import InvalidSettings

Kind = Literal["flat", "hnsw", "ivf_sq8", "ivf_pq", "mapped"]
Metric = Literal["cosine", "ip", "l2"]
ChosenKind = Literal["auto", "flat", "hnsw", "ivf_sq8", "ivf_pq", "mapped"]

FLAT_UP_TO = 50_000
"""Rows up to which an exact scan is as fast as anybody needs."""
HNSW_UP_TO = 2_000_000
"""Rows up to which the graph, which holds whole vectors, is taken; beyond it 8-bit codes are."""
TRAINABLE_FROM = 4_096
"""Rows that the inverted-file kinds need to train on."""


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """How one collection is indexed. Checks itself.

    Attributes:
        kind: one of `Kind`, or `auto`: by the number of rows, see `choose_kind`.
        hnsw_m: links of a vector in the graph; twice as many on its lowest level.
        ef_construction: candidates looked at for the links of a new vector.
        lists: inverted lists of the IVF kinds; None: about 4 √rows.
        pq_bytes: bytes of a vector in `ivf_pq`, a divisor of the dimension; None: about a quarter
            of the dimension.
        target_recall: the part of the true nearest that searches aim for, in (0, 1].

    Raises:
        InvalidSettings: a value is out of its range, or not of its type.
    """

    kind: ChosenKind = "auto"
    hnsw_m: int = 32
    ef_construction: int = 80
    lists: int | None = None
    pq_bytes: int | None = None
    target_recall: float = 0.99

    def __post_init__(self) -> None:
        if self.kind not in get_args(ChosenKind):
            known = ", ".join(get_args(ChosenKind))
            raise InvalidSettings(f"kind must be one of {known}, got {self.kind!r}")
        # faiss draws each vector's level with odds of 1 / hnsw_m: below 4 the graph is mostly upper
        # levels.
        _check_int("hnsw_m", self.hnsw_m, 4, 256)
        _check_int("ef_construction", self.ef_construction, 8, 2_048)
        if self.lists is not None:
            _check_int("lists", self.lists, 1, 1_048_576)
        if self.pq_bytes is not None:
            _check_int("pq_bytes", self.pq_bytes, 1, 65_536)
        target = self.target_recall
        if isinstance(target, bool) or not isinstance(target, int | float) or not 0 < target <= 1:
            raise InvalidSettings(f"target_recall must be in (0, 1], got {target!r}")

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON values, for `from_dict`."""
        return asdict(self)

    def structure(self) -> dict[str, Any]:
        """What a structure that is there cannot be changed in: everything but kind and target."""
        values = asdict(self)
        return {key: values[key] for key in ("hnsw_m", "ef_construction", "lists", "pq_bytes")}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "IndexSettings":
        """The settings that `to_dict` gave; a key that is absent takes its default.

        Raises:
            InvalidSettings: a key is unknown, or a value does not fit.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(str(key) for key in values if key not in known)
        if unknown:
            raise InvalidSettings(
                f"unknown index settings {', '.join(unknown)}; known are {', '.join(known)}"
            )
        return cls(**values)


def check_kind(kind: str) -> Kind:
    """The kind of that name; raises `InvalidSettings` unless it is one."""
    for known in get_args(Kind):
        if kind == known:
            return cast(Kind, known)
    raise InvalidSettings(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")


def check_metric(metric: str) -> Metric:
    """The metric of that name; raises `InvalidSettings` unless it is one."""
    for known in get_args(Metric):
        if metric == known:
            return cast(Metric, known)
    raise InvalidSettings(f"metric must be one of {', '.join(get_args(Metric))}, got {metric!r}")


def choose_kind(settings: IndexSettings, rows: int, present: Kind | None = None) -> Kind:
    """The kind for a collection of `rows` vectors, which has the kind `present`.

    `auto` takes flat up to FLAT_UP_TO rows, hnsw up to HNSW_UP_TO and ivf_sq8 above. A kind that is
    trained is flat below TRAINABLE_FROM rows, whatever was chosen. What was right before rows were
    removed stays until a fifth of them has gone: a build is not undone for a few.
    """
    kind = _kind_of(settings, rows)
    return present if present == _kind_of(settings, rows * 5 // 4) else kind


def _kind_of(settings: IndexSettings, rows: int) -> Kind:
    kind: Kind
    if settings.kind == "auto":
        kind = "flat" if rows <= FLAT_UP_TO else "hnsw" if rows <= HNSW_UP_TO else "ivf_sq8"
    else:
        kind = settings.kind
    return "flat" if is_trained(kind) and rows < TRAINABLE_FROM else kind


def is_trained(kind: Kind) -> bool:
    """Whether `Ann.train` needs a sample of vectors for this kind."""
    return kind in ("ivf_sq8", "ivf_pq", "mapped")


def lists_for(settings: IndexSettings, rows: int) -> int:
    """How many inverted lists `rows` vectors want."""
    return settings.lists or max(1, round(4 * rows**0.5))


def training_rows(settings: IndexSettings, rows: int) -> int:
    """How many of `rows` vectors make a good sample for `Ann.train`: 64 a list, 16,384 at least."""
    return min(rows, max(16_384, 64 * lists_for(settings, rows)))


def pq_bytes_for(settings: IndexSettings, dimension: int) -> int:
    """Into how many parts, a byte each, `ivf_pq` cuts a vector.

    Raises:
        InvalidSettings: `pq_bytes` does not divide the dimension.
    """
    wanted = settings.pq_bytes
    if wanted is None:
        divisors = [parts for parts in range(1, dimension + 1) if dimension % parts == 0]
        return max(parts for parts in divisors if parts <= max(1, dimension // 4))
    if dimension % wanted:
        raise InvalidSettings(f"pq_bytes must divide the dimension, {dimension}, got {wanted}")
    return wanted


def check_fit(settings: IndexSettings, spaces: Mapping[str, int]) -> None:
    """Raise `InvalidSettings` unless a collection with these spaces can have the settings."""
    for dimension in spaces.values():
        pq_bytes_for(settings, dimension)


def _check_int(field: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidSettings(f"{field} must be a whole number from {low} to {high}, got {value!r}")
