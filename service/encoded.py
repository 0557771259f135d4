"""Pictures as they came, undecoded: bytes or text, and the hash that tells equal ones."""

import hashlib
from dataclasses import dataclass

from service import images

QUICKLY_HASHED = 2**17
"""Bytes that the event loop may hash itself, in a fraction of a millisecond."""
_LOCK_KEPT = 2047  # bytes at once for which `hashlib` keeps the interpreter's lock


@dataclass(frozen=True, kw_only=True)
class EncodedPicture:
    """A picture as it came.

    Attributes:
        content: undecoded; or text, a data URI or base64.
        param: its place in the request.
    """

    content: bytes | str
    param: str

    def read(self, limits: images.Limits) -> "ReadPicture":
        """The content as bytes; raises `ImageError` for too many, and for text that is none."""
        content = self.content
        if isinstance(content, str):
            content = images.from_text(content, limits, param=self.param)
        images.check_bytes(content, limits, param=self.param)
        return ReadPicture(content=content, content_hash=_sha256(content), param=self.param)


@dataclass(frozen=True, kw_only=True)
class ReadPicture:
    """A picture's bytes, the SHA-256 of all of them, and its place in the request."""

    content: bytes
    content_hash: str
    param: str


def _sha256(content: bytes) -> str:
    """Of little in steps that keep the interpreter's lock.

    `hashlib` gives it up for more at once, and under load it comes back later than the hash.
    """
    digest = hashlib.sha256()
    step = _LOCK_KEPT if len(content) <= QUICKLY_HASHED else len(content)
    for start in range(0, len(content), step):
        digest.update(content[start : start + step])
    return digest.hexdigest()
