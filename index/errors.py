"""Everything that `index` raises on purpose.

    CollectionError
    ├── CollectionNotFound
    ├── CollectionExists
    ├── InvalidName
    ├── InvalidRecord
    ├── InvalidVector
    ├── InvalidCursor
    ├── InvalidSettings
    ├── InvalidFilter
    ├── RecordNotFound
    ├── ModelMismatch
    ├── ImportFailed
    ├── FormatUnavailable
    ├── StoreInUse
    ├── StoreFailed
    ├── StoreDamaged
    ├── SnapshotNotFound
    └── SnapshotDamaged

A number that is wrong by the calling code alone (`k=0`, `limit=-1`) is a plain `ValueError`.
Messages name collections, records and spaces, never the values of vectors.
"""


class CollectionError(Exception):
    """The base of everything below."""


class CollectionNotFound(CollectionError):
    """No collection has this name, or it was closed or deleted while in use."""


class CollectionExists(CollectionError):
    """The name is taken."""


class InvalidName(CollectionError):
    """A collection's or a space's name is not of the allowed form."""


class InvalidRecord(CollectionError):
    """An id, content hash or metadata that cannot be stored."""


class InvalidVector(CollectionError):
    """A vector (or a set of spaces) that does not fit: space, dimension, NaN, infinite, zero."""


class InvalidCursor(CollectionError):
    """A scroll cursor that this program did not give out."""


class InvalidSettings(CollectionError):
    """Settings of an index that do not fit: an unknown key, a value out of its range."""


class InvalidFilter(CollectionError):
    """A filter that cannot be understood; the message names the place in it (`filter.must[2]`)."""


class RecordNotFound(CollectionError):
    """The collection has no record with this id."""


class ModelMismatch(CollectionError):
    """The collection's vectors were made by another model."""


class ImportFailed(CollectionError):
    """A file that cannot be imported, or not beyond the place that the message names."""


class FormatUnavailable(CollectionError):
    """An export's format that is not known, or that needs an extra which is not installed."""


class StoreInUse(CollectionError):
    """Another owner (process or `CollectionSet`) holds the folder."""


class StoreFailed(CollectionError):
    """The operating system refused (disk full, I/O error, permission); the write did not happen.

    Where it was the sync that failed, the write may be there after a crash: whole, or not at all.
    """


class StoreDamaged(CollectionError):
    """A collection's file cannot be read: missing, corrupt, or written by a newer version."""


class SnapshotNotFound(CollectionError):
    """The collection has no snapshot of this name."""


class SnapshotDamaged(CollectionError):
    """A snapshot is not as it was written; nothing was restored from it."""
