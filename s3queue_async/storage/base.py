"""The storage floor's contract: four verbs, conditions as values, and what each error means.

A storage is rooted at one queue: keys are relative to it, forward slashes separate their parts. Every reply and
every answer carries ``date_s``, the store's own clock (seconds since the epoch) as it answered, because the
protocol never looks at a local wall clock. ``None`` means that the reply carried no date.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from s3queue_async.errors import QueueError

LIST_LIMIT_MAX = 1000


@dataclass(frozen=True, slots=True)
class IfAbsent:
    """Write only when no object has the key (``If-None-Match: *``)."""


@dataclass(frozen=True, slots=True)
class IfVersion:
    """Write or delete only when the object still has this version (``If-Match``)."""

    version: str


Condition = IfAbsent | IfVersion


@dataclass(frozen=True, slots=True)
class Stored:
    """An object as it was read. ``body`` is the part asked for when a span was given."""

    key: str
    body: bytes
    version: str
    modified_s: float
    date_s: float | None


@dataclass(frozen=True, slots=True)
class Unmodified:
    """The object still has the version that the caller named."""

    date_s: float | None


@dataclass(frozen=True, slots=True)
class Written:
    """The write was applied; ``version`` names what was written."""

    version: str
    date_s: float | None


@dataclass(frozen=True, slots=True)
class Deleted:
    """No object has the key now (or the keys)."""

    date_s: float | None


@dataclass(frozen=True, slots=True)
class Entry:
    """One object in a listing."""

    key: str
    version: str
    size: int
    modified_s: float


@dataclass(frozen=True, slots=True)
class Page:
    """One page of a listing in key order; ``more`` says that keys follow the last one."""

    entries: Sequence[Entry]
    more: bool
    date_s: float | None


class StorageAnswer(QueueError):
    """An answer of the store that is an outcome, not a failure; engines expect and handle it."""

    def __init__(self, key: str, *, date_s: float | None = None) -> None:
        super().__init__(f"{type(self).__name__}: {key}.", suggestion="")
        self.key = key
        self.date_s = date_s


class NotFound(StorageAnswer):
    """No object has the key (GET only; a failed condition is PreconditionFailed)."""


class PreconditionFailed(StorageAnswer):
    """The condition did not hold. Not a verdict: an own earlier try may be what is in the way. Read it."""


class Conflict(StorageAnswer):
    """A racing request made the store refuse this one (409). Try a create again; re-read before an update."""


class Superseded(StorageAnswer):
    """Something else is under the key, and the own write is certainly not. Read ``stored`` and decide anew.

    Attributes:
        stored: The object that is there instead; None when there is none.
    """

    def __init__(self, key: str, stored: Stored | None, *, date_s: float | None = None) -> None:
        super().__init__(key, date_s=date_s)
        self.stored = stored


@runtime_checkable
class Storage(Protocol):
    """What a queue needs of a store. Strongly consistent; each call is one request, tried once.

    Raises, besides the answers above: ``Throttled`` when the store asks for fewer requests, and
    ``StoreUnavailable`` for everything else. After either, a write may have been applied, or may still be.
    """

    @property
    def date_resolution_s(self) -> float:
        """How coarse ``date_s`` and ``modified_s`` are: 1.0 for HTTP dates; the true time is in [d, d + r)."""

    async def open(self) -> None:
        """Connect. Raises StoreUnavailable (not retriable when a bucket is missing or access is denied)."""

    async def close(self) -> None:
        """Give back every connection and file. Calling it twice is fine."""

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        """Read an object.

        Args:
            key: The object's key.
            span: First byte and number of bytes (1 or more); the reply may be shorter at the object's end.
            unless: A version; the reply is Unmodified when the object still has it.

        Raises:
            NotFound: No object has the key.
        """

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        """Write an object whole.

        Raises:
            PreconditionFailed: The condition did not hold; also for IfVersion on a missing key.
            Conflict: A racing request was in the way.
        """

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        """Delete an object; without a condition a missing one is fine.

        Raises:
            PreconditionFailed: The object has another version or is missing.
        """

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        """Delete up to 1,000 objects without a condition, in one request where the store can."""

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        """List keys that start with prefix and sort after ``after`` (a whole key), in UTF-8 byte order.

        Args:
            prefix: What the keys start with; "" for all.
            after: List only keys greater than this one; it need not exist.
            limit: Entries in the page, 1 to 1,000.
        """
