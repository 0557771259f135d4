"""Files that are on disk for certain, and that can be told from damaged ones."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from index.errors import StoreFailed

# Large, because a thread takes the interpreter's lock again after each piece, and beside a busy
# thread waits for it up to 5 ms: 2 GB then took 4 s so, and 24 s in pieces of 256 KB.
_PIECE_BYTES = 8 << 20


class ManifestDamaged(Exception):
    """A manifest that is not as it was written; `reason` finishes the sentence "its manifest"."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@contextmanager
def refusals_named(what: str) -> Iterator[None]:
    """Turn what the operating system refuses inside the block into `StoreFailed("what: why")`."""
    try:
        yield
    except OSError as error:
        raise StoreFailed(f"{what}: {error.strerror or error}") from error


def fsync(path: Path) -> None:
    """Put a file's content, or a folder's list of names, on disk.

    A rename, a new file or a removal survives power loss only once its folder has been synced.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pieces_of(path: Path) -> Iterator[memoryview]:
    """A file's content, piece by piece; each piece is overwritten by the next."""
    buffer = memoryview(bytearray(_PIECE_BYTES))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield buffer[:count]


def sha256_of(path: Path) -> str:
    """A file's checksum, in hexadecimal; `sha256sum` prints the same.

    Of 2 GB in memory here (a processor with SHA instructions): SHA-256 1.1 s, BLAKE2b 2.1 s,
    CRC-32 .5 s. SHA-256 needs 5 s without those instructions; CRC-32's 32 bits are few for files
    of gigabytes, and no everyday tool prints BLAKE2b's or CRC-32's figure to compare with.
    """
    digest = hashlib.sha256()
    for piece in pieces_of(path):
        digest.update(piece)
    return digest.hexdigest()


def write_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write `manifest` (JSON values) with its own checksum, in the place of any older one.

    On disk when this returns; after a crash there is the old one or the new one. What the manifest
    speaks of must be on disk before.
    """
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_bytes(_encode(manifest))
    fsync(unfinished)
    unfinished.replace(path)
    fsync(path.parent)


def read_manifest(path: Path, *, version: int) -> dict[str, Any]:
    """What `write_manifest` wrote, with `"format": version` in it.

    Raises:
        FileNotFoundError: there is none.
        ManifestDamaged: it cannot be read, a byte has changed, or it is of another version.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ManifestDamaged(f"cannot be read: {error.strerror or error}") from error
    try:
        manifest = json.loads(content)["manifest"]
        is_whole = content == _encode(manifest)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ManifestDamaged("is damaged") from error
    if not is_whole or not isinstance(manifest, dict):
        raise ManifestDamaged("is damaged")
    if manifest.get("format") != version:
        raise ManifestDamaged(f"has format {manifest.get('format')!r}, expected {version}")
    return manifest


def _encode(manifest: Mapping[str, Any]) -> bytes:
    """One text for one manifest, so that a changed space counts as damage like any other byte."""
    text = json.dumps(manifest, sort_keys=True, allow_nan=False)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    whole = {"manifest": manifest, "sha256": checksum}
    return json.dumps(whole, sort_keys=True, indent=1).encode()
