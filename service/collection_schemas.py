"""What goes over the wire of collections as wholes: their indexes and their snapshots."""

from pydantic import Field

from index.kinds import ChosenKind, IndexSettings, Kind
from service.schemas import Answer, Number, Options, Whole


class IndexOptions(Options):
    """How a collection is indexed; what is left out takes its default.

    The ranges are those of `IndexSettings`, which says what is wrong.
    """

    kind: ChosenKind = Field(
        default=IndexSettings.kind, description="auto: by the number of pictures"
    )
    hnsw_m: Whole = Field(
        default=IndexSettings.hnsw_m, description="links of a vector in the graph, 4 to 256"
    )
    ef_construction: Whole = Field(
        default=IndexSettings.ef_construction,
        description="candidates for a new vector's links, 8 to 2048",
    )
    lists: Whole | None = Field(
        default=IndexSettings.lists,
        description="inverted lists of the ivf kinds and mapped; null: by the number of pictures",
    )
    pq_bytes: Whole | None = Field(
        default=IndexSettings.pq_bytes,
        description="bytes of a vector in ivf_pq, a divisor of every vector's length; "
        "null: about a quarter of the length",
    )
    target_recall: Number = Field(
        default=IndexSettings.target_recall,
        description="the part of the true nearest that a search should find, above 0 up to 1",
    )


class CollectionOptions(Options):
    """What a collection should be like."""

    model: str | None = Field(
        default=None,
        description="the model whose vectors it holds, by its name in /v1/models; null: the first "
        "of these, or the one that it has. It cannot be changed later.",
        examples=["default"],
    )
    index: IndexOptions | None = Field(
        default=None, description="null: auto for a new collection, else as it is"
    )


class SpaceAnswer(Answer):
    """The index of one of the vectors that each picture has."""

    kind: Kind = Field(description="what answers searches now")
    dimension: int = Field(description="of a vector")
    rows: int = Field(description="vectors in memory, of deleted pictures too until cleared out")
    pending: int = Field(
        description="those of them that the structure lacks yet; they are searched exactly"
    )
    effort: int = Field(description="how hard a search tries; 0 for flat")
    recall: float | None = Field(
        description="recall@10 against an exact scan, when last measured; null before that"
    )
    generation: int = Field(description="how many times the index was saved")
    saved_rows: int = Field(description="vectors in the saved index")
    memory_bytes: int = Field(description="in memory")


class IndexAnswer(Answer):
    """What stands of a collection's indexes."""

    settings: IndexOptions = Field(description="what is asked for")
    metric: str = Field(description="how vectors are compared", examples=["cosine"])
    removed: int = Field(description="deleted pictures that are not yet cleared out")
    is_building: bool = Field(description="whether background work is going on, or waits")
    disk_bytes: int = Field(description="of the collection's files")
    memory_bytes: int = Field(description="in memory")
    spaces: dict[str, SpaceAnswer] = Field(description="cls: for searches; copy: for copies")


class CollectionSummary(Answer):
    """One collection."""

    name: str = Field(description="the collection's name", examples=["default"])
    count: int = Field(description="how many pictures it holds")
    model: str = Field(description="fingerprint of the model whose vectors it holds")
    created_at: float = Field(description="unix time in seconds")


class CollectionAnswer(CollectionSummary):
    """One collection, with its index."""

    index: IndexAnswer = Field(description="what stands of its index")


class CollectionList(Answer):
    """Every collection."""

    collections: list[CollectionSummary] = Field(description="in the order of their names")


class SnapshotAnswer(Answer):
    """A collection as it was."""

    name: str = Field(description="when it was made, in UTC", examples=["20261122T203100Z"])
    collection: str = Field(description="whose copy it is", examples=["default"])
    created_at: float = Field(description="unix time in seconds; what was stored before is in it")
    bytes: int = Field(description="the size of its file")
    count: int = Field(description="how many pictures it holds")
    model: str = Field(description="fingerprint of the model whose vectors it holds")


class SnapshotList(Answer):
    """A collection's snapshots, oldest first."""

    snapshots: list[SnapshotAnswer] = Field(description="oldest first")
