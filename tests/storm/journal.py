"""What each process writes down, in a file of its own, so that a SIGKILL loses nothing of it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec

from tests.simulation.history import Job


class Line(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Something that happened; ``at_s`` is CLOCK_MONOTONIC, which all processes of a machine share."""

    at_s: float = msgspec.field(default_factory=time.monotonic)


class Registered(Line, frozen=True, kw_only=True):
    """A worker began a life under this id."""

    worker_id: str


class Started(Line, frozen=True, kw_only=True):
    """A handler is about to work; ``run`` is its number in this process."""

    run: int
    message_id: str
    number: int
    worker_id: str
    attempt: int
    token: int


class Ended(Line, frozen=True, kw_only=True):
    """A handler is about to return or raise."""

    run: int
    outcome: str


class Lost(Line, frozen=True, kw_only=True):
    """A ``lease.lost`` event."""

    worker_id: str
    message_ids: list[str]
    reason: str


class Ambiguous(Line, frozen=True, kw_only=True):
    """An ``enqueue.ambiguous`` event."""

    message_ids: list[str]


class Acknowledged(Line, frozen=True, kw_only=True):
    """An enqueue returned; without a job when a bulk failed, and it is not said which of its messages this one is."""

    message_id: str
    job: Job | None
    due_s: float
    dedup_id: str | None = None


class Unknown(Line, frozen=True, kw_only=True):
    """An enqueue failed; some of these may be in the queue."""

    numbers: list[int]
    error: str


AnyLine = Registered | Started | Ended | Lost | Ambiguous | Acknowledged | Unknown

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(AnyLine)


class Journal:
    """A file to which one process appends whole lines."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def write(self, *lines: AnyLine) -> None:
        os.write(self._file, b"".join(_encoder.encode(line) + b"\n" for line in lines))


class Tail:
    """Reads a journal while it grows."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[AnyLine]:
        """The lines that are new."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            whole = file.read().rpartition(b"\n")[0]
        if not whole:
            return []
        self._offset += len(whole) + 1
        return [_decoder.decode(line) for line in whole.split(b"\n")]
