"""Counts what a storage is asked for: every attempt, how it ended, how long it took, how many bytes it moved."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from s3queue_async.clock import Clock, SystemClock
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Deleted,
    IfVersion,
    Page,
    Storage,
    Stored,
    Unmodified,
    Written,
)

Operation = Literal["get", "put", "delete", "delete_many", "list"]
OPERATIONS: tuple[Operation, ...] = ("get", "put", "delete", "delete_many", "list")

_Reply = TypeVar("_Reply")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """One attempt, as the hook sees it.

    Attributes:
        key: The key, the prefix of a listing, or "" for several keys.
        seconds: How long it took.
        bytes_in: Body bytes that were read.
        bytes_out: Body bytes that were sent.
        error: The name of the error's class; None when there was none.
        unmodified: Whether the answer was that the object still has the named version (304).
    """

    operation: Operation
    key: str
    seconds: float
    bytes_in: int
    bytes_out: int
    error: str | None
    unmodified: bool = False


@dataclass(frozen=True, slots=True)
class OperationMetrics:
    """What was counted of one operation; ``errors`` maps the names of error classes to how often they came."""

    attempts: int = 0
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    unmodified: int = 0
    errors: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class StorageMetrics:
    """What was counted so far, by operation."""

    get: OperationMetrics
    put: OperationMetrics
    delete: OperationMetrics
    delete_many: OperationMetrics
    list: OperationMetrics

    @property
    def attempts(self) -> int:
        """All requests."""
        return sum(getattr(self, operation).attempts for operation in OPERATIONS)

    @property
    def precondition_failed(self) -> int:
        """Conditional writes and deletes that were refused (412)."""
        return sum(getattr(self, operation).errors.get("PreconditionFailed", 0) for operation in OPERATIONS)

    @property
    def throttled(self) -> int:
        """Requests that the store refused for being too many."""
        return sum(getattr(self, operation).errors.get("Throttled", 0) for operation in OPERATIONS)

    @property
    def unmodified(self) -> int:
        """Conditional reads that found nothing new (304)."""
        return self.get.unmodified


@dataclass(slots=True)
class _Counts:
    attempts: int = 0
    seconds: float = 0.0
    bytes_in: int = 0
    bytes_out: int = 0
    unmodified: int = 0
    errors: Counter[str] = field(default_factory=Counter)

    def frozen(self) -> OperationMetrics:
        return OperationMetrics(
            self.attempts, self.seconds, self.bytes_in, self.bytes_out, self.unmodified, dict(self.errors)
        )


class MeteredStorage:
    """A storage that counts and times each call of the one below; replies and errors pass through.

    Args:
        storage: The storage below.
        on_request: Called after each attempt; if it raises, that is logged and changes nothing.
        clock: What the times are taken with.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        on_request: Callable[[Request], None] | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._storage = storage
        self._on_request = on_request
        self._clock = SystemClock() if clock is None else clock
        self._counts: dict[Operation, _Counts] = {operation: _Counts() for operation in OPERATIONS}

    def __repr__(self) -> str:
        return f"MeteredStorage({self._storage!r})"

    @property
    def date_resolution_s(self) -> float:
        """As of the storage below."""
        return self._storage.date_resolution_s

    def snapshot(self) -> StorageMetrics:
        """What was counted so far."""
        return StorageMetrics(**{operation: counts.frozen() for operation, counts in self._counts.items()})

    def totals(self) -> tuple[dict[str, int], int]:
        """The requests so far by operation, those that were made at all, and how many of all were throttled."""
        made: dict[str, int] = {
            operation: counts.attempts for operation, counts in self._counts.items() if counts.attempts
        }
        return made, sum(counts.errors["Throttled"] for counts in self._counts.values())

    async def open(self) -> None:
        """Open the storage below."""
        await self._storage.open()

    async def close(self) -> None:
        """Close the storage below."""
        await self._storage.close()

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        """Read an object; see Storage.get."""
        return await self._measure("get", key, 0, self._storage.get(key, span=span, unless=unless))

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        """Write an object whole; see Storage.put."""
        return await self._measure("put", key, len(body), self._storage.put(key, body, when=when))

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        """Delete an object; see Storage.delete."""
        return await self._measure("delete", key, 0, self._storage.delete(key, when=when))

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        """Delete up to 1,000 objects; see Storage.delete_many."""
        return await self._measure("delete_many", "", 0, self._storage.delete_many(keys))

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        """List keys in order; see Storage.list."""
        return await self._measure("list", prefix, 0, self._storage.list(prefix, after=after, limit=limit))

    async def _measure(self, operation: Operation, key: str, bytes_out: int, call: Awaitable[_Reply]) -> _Reply:
        counts = self._counts[operation]
        began_s = self._clock.monotonic()
        # Counted as they begin, so that a snapshot shows what is under way, too.
        counts.attempts += 1
        counts.bytes_out += bytes_out
        try:
            reply = await call
        except BaseException as error:
            name = type(error).__name__
            counts.errors[name] += 1
            self._ended(counts, operation, key, began_s, 0, bytes_out, error=name)
            raise
        bytes_in = len(reply.body) if isinstance(reply, Stored) else 0
        self._ended(counts, operation, key, began_s, bytes_in, bytes_out, unmodified=isinstance(reply, Unmodified))
        return reply

    def _ended(
        self,
        counts: _Counts,
        operation: Operation,
        key: str,
        began_s: float,
        bytes_in: int,
        bytes_out: int,
        *,
        error: str | None = None,
        unmodified: bool = False,
    ) -> None:
        seconds = self._clock.monotonic() - began_s
        counts.seconds += seconds
        counts.bytes_in += bytes_in
        counts.unmodified += unmodified
        if self._on_request is not None:
            try:
                self._on_request(Request(operation, key, seconds, bytes_in, bytes_out, error, unmodified))
            except Exception:  # noqa: BLE001 - whatever an observer raises, the request is over and has its outcome
                _log.exception("on_request failed")
