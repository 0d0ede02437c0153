"""A store in this process's memory: for tests, and for queues that need not outlive the process."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar

from anyio.lowlevel import checkpoint

from s3queue_async.errors import StoreUnavailable
from s3queue_async.storage._sorted import SortedStrings
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Deleted,
    Entry,
    IfAbsent,
    IfVersion,
    NotFound,
    Page,
    PreconditionFailed,
    Stored,
    Unmodified,
    Written,
)


@dataclass(frozen=True, slots=True)
class _Object:
    body: bytes
    version: str
    modified_s: float


@dataclass(slots=True)
class _Space:
    """The objects behind one name; every MemoryStorage of that name shares them."""

    objects: dict[str, _Object] = field(default_factory=dict)
    keys: SortedStrings = field(default_factory=SortedStrings)


class MemoryStorage:
    """A storage in memory, shared by name inside one process.

    Versions are hashes of the body, as on S3: two equal bodies have equal versions. Each call is atomic; a
    cancelled call was not applied. Objects live until ``forget`` is called or the process ends.

    Args:
        name: Storages of one name see the same objects; None makes a storage of its own.
        now: The store's clock in seconds since the epoch.
        date_resolution_s: How coarse dates are, in seconds; 1.0 imitates HTTP dates.
    """

    _spaces: ClassVar[dict[str, _Space]] = {}

    def __init__(
        self,
        name: str | None = None,
        *,
        now: Callable[[], float] = time.time,
        date_resolution_s: float = 0.001,
    ) -> None:
        self.name = name
        self._space = _Space() if name is None else self._spaces.setdefault(name, _Space())
        self._now = now
        self._date_resolution_s = date_resolution_s
        self._is_open = False

    def __repr__(self) -> str:
        return f"MemoryStorage({self.name!r})"

    @classmethod
    def forget(cls, name: str) -> None:
        """Drop the objects of a name; storages that have it already keep theirs."""
        cls._spaces.pop(name, None)

    @property
    def date_resolution_s(self) -> float:
        """How coarse dates are, in seconds."""
        return self._date_resolution_s

    async def open(self) -> None:
        """Make the storage usable."""
        await checkpoint()
        self._is_open = True

    async def close(self) -> None:
        """Make the storage unusable; the objects stay. Calling it twice is fine."""
        self._is_open = False

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        """Read an object; see Storage.get."""
        date_s = await self._begin()
        found = self._space.objects.get(key)
        if found is None:
            raise NotFound(key, date_s=date_s)
        if unless is not None and found.version == unless:
            return Unmodified(date_s)
        body = found.body if span is None else found.body[span[0] : span[0] + span[1]]
        return Stored(key, body, found.version, found.modified_s, date_s)

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        """Write an object whole; see Storage.put."""
        date_s = await self._begin()
        objects = self._space.objects
        found = objects.get(key)
        self._check(key, found, when, date_s)
        body = bytes(body)
        version = hashlib.md5(body, usedforsecurity=False).hexdigest()
        objects[key] = _Object(body, version, date_s)
        if found is None:
            self._space.keys.add(key)
        return Written(version, date_s)

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        """Delete an object; see Storage.delete."""
        date_s = await self._begin()
        self._check(key, self._space.objects.get(key), when, date_s)
        self._remove(key)
        return Deleted(date_s)

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        """Delete up to 1,000 objects at once; see Storage.delete_many."""
        date_s = await self._begin()
        for key in keys:
            self._remove(key)
        return Deleted(date_s)

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        """List keys in order; see Storage.list."""
        date_s = await self._begin()
        inclusive = prefix > after
        entries: list[Entry] = []
        for key in islice(self._space.keys.after(max(prefix, after), inclusive=inclusive), limit + 1):
            if not key.startswith(prefix):
                break
            if len(entries) == limit:
                return Page(entries, True, date_s)
            found = self._space.objects[key]
            entries.append(Entry(key, found.version, len(found.body), found.modified_s))
        return Page(entries, False, date_s)

    async def _begin(self) -> float:
        # Other tasks run between two calls, as with a real store; nothing runs between the look and the write.
        await checkpoint()
        if not self._is_open:
            raise StoreUnavailable(
                f"{self!r} is not open.", retriable=False, suggestion="Call open() first, and no more after close()."
            )
        return round(math.floor(self._now() / self._date_resolution_s) * self._date_resolution_s, 6)

    @staticmethod
    def _check(key: str, found: _Object | None, when: Condition | None, date_s: float) -> None:
        match when:
            case IfAbsent():
                holds = found is None
            case IfVersion(version):
                holds = found is not None and found.version == version
            case None:
                holds = True
        if not holds:
            raise PreconditionFailed(key, date_s=date_s)

    def _remove(self, key: str) -> None:
        if self._space.objects.pop(key, None) is not None:
            self._space.keys.remove(key)
