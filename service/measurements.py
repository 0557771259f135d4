"""What one request costs, gathered while it is served.

A context variable carries the request's `Measurements` past the routes, so that the decoding
threads' pool and the batcher add to it and the middleware at the door reads it.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

PhaseName = Literal["decode_wait", "decode", "queue", "inference", "search"]
_MOST_PHASES = 512  # of one request: some for each of its pictures
_MOST_SIZES = 16  # sizes of pictures that are told one by one


class Phase(NamedTuple):
    """A stretch of a request's time, by `time.monotonic()` in seconds."""

    name: PhaseName
    started: float
    ended: float


@dataclass(kw_only=True)
class Measurements:
    """One request's.

    Attributes:
        started: `time.monotonic()` of its first byte here.
        deadline_s: how long it may take to decode its pictures and run the model, counted from
            when its body was read; None: as long as it takes.
        body_read: when that was, by `time.monotonic()`.
        sizes: width x height of the first pictures.
        pictures, picture_bytes: decoded pictures, and their encoded bytes.
        error_code: of the answer, where it is an error.
        client_left: the connection was closed before there was an answer.
    """

    request_id: str = ""
    started: float = field(default_factory=time.monotonic)
    deadline_s: float | None = None
    body_read: float | None = None
    model: str | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)
    pictures: int = 0
    picture_bytes: int = 0
    phases: list[Phase] = field(default_factory=list)
    error_code: str | None = None
    client_left: bool = False

    @property
    def deadline(self) -> float | None:
        """When the pictures must be through, by `time.monotonic()`; None: never."""
        if self.deadline_s is None:
            return None
        return (self.body_read or self.started) + self.deadline_s

    @property
    def is_late(self) -> bool:
        """Whether the deadline has come."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def add_phase(self, name: PhaseName, started: float, ended: float) -> None:
        """Notes a stretch of time."""
        if len(self.phases) < _MOST_PHASES:
            self.phases.append(Phase(name, started, ended))

    def add_picture(self, width: int, height: int, encoded_bytes: int) -> None:
        """Notes a picture that was decoded."""
        self.pictures += 1
        self.picture_bytes += encoded_bytes
        if len(self.sizes) < _MOST_SIZES:
            self.sizes.append((width, height))

    def seconds(self, name: PhaseName) -> float | None:
        """The sum of all stretches of that name, which may overlap; None where there is none."""
        found = [phase.ended - phase.started for phase in self.phases if phase.name == name]
        return sum(found) if found else None


_current: ContextVar[Measurements] = ContextVar("measurements")


def current() -> Measurements:
    """Those of the request that is being served; outside of one, some that nobody reads."""
    return _current.get(None) or Measurements()


@contextmanager
def measuring(measurements: Measurements) -> Iterator[None]:
    """Makes `current` give these until the block ends."""
    token: Token[Measurements] = _current.set(measurements)
    try:
        yield
    finally:
        _current.reset(token)


@contextmanager
def timed(name: PhaseName) -> Iterator[None]:
    """Adds the block to the current request's phases."""
    started = time.monotonic()
    try:
        yield
    finally:
        current().add_phase(name, started, time.monotonic())
