"""Reads listings, claims and segments for those who only look: what cannot be read is logged, and left out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Container, Iterable, Mapping, Sequence

import msgspec

from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.errors import CorruptObject, Unreadable
from s3queue_async.log import log
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.claim import Claim
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.protocol.segment import Segment
from s3queue_async.storage.base import Entry, NotFound, Stored


class Backlog(msgspec.Struct, frozen=True):
    """Messages of the queue that are not settled.

    Attributes:
        waiting: Ready or due and held by nobody, by priority.
        delayed: Not due yet.
        held: Of segments that workers hold, or have given back and nobody took since.
        oldest_ms: When the oldest segment of those that wait was created, store time; None when nothing waits.
    """

    waiting: dict[int, int]
    delayed: int
    held: int
    oldest_ms: int | None

    @property
    def pending(self) -> int:
        return sum(self.waiting.values())


class Reading:
    """Reads what is there, whoever holds it.

    Args:
        shared: What all roles have.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared

    async def entries(self, prefix: str, pages: int | None) -> tuple[list[Entry], bool]:
        """Up to so many pages of a listing (None: all), and whether that was everything."""
        entries: list[Entry] = []
        after = ""
        turned = 0
        while True:
            page = await self._shared.storage.list(prefix, after=after)
            entries += page.entries
            turned += 1
            if not page.more:
                return entries, True
            if pages is not None and turned >= pages:
                return entries, False
            after = page.entries[-1].key

    async def listed(self, prefixes: Sequence[str], pages: int | None) -> tuple[dict[str, list[Entry]], bool]:
        """As ``entries``, for several prefixes at a time."""
        found: dict[str, list[Entry]] = {}
        complete = True

        async def list_into(prefix: str) -> None:
            nonlocal complete
            found[prefix], whole = await self.entries(prefix, pages)
            complete = complete and whole

        await together(prefixes, list_into, at_once=len(prefixes))
        return found, complete

    async def each(self, prefix: str, *, after: str = "") -> AsyncIterator[Entry]:
        """Every object under a prefix, in the order of keys, page by page."""
        while True:
            page = await self._shared.storage.list(prefix, after=after)
            for entry in page.entries:
                yield entry
            if not page.more:
                return
            after = page.entries[-1].key

    async def each_key(self, prefix: str, *, after: str = "") -> AsyncIterator[SegmentKey]:
        """The keys of all segments under a prefix."""
        async for entry in self.each(prefix, after=after):
            for key in keys_of([entry]):
                yield key

    async def claim(self, key: str) -> Claim | None:
        """The claim under this key; None when there is none, one of an unknown owner when it cannot be read."""
        try:
            stored = await self._shared.storage.get(key)
        except NotFound:
            return None
        assert isinstance(stored, Stored)
        try:
            return claims.decode(key, stored.body)
        except CorruptObject:
            # Nobody can tell whose it is; the claim loop reports it, and replaces it when its time is over.
            return Claim(nonce="", segment="", owner="unknown", token=0, claimed_ms=0)

    async def index(self, key: SegmentKey) -> segments.Index | None:
        """A segment's index; None when it is gone or damaged. Raises Unreadable when others may be able to read it."""
        try:
            stored = await self._shared.storage.get(key.text, span=(0, segments.INDEX_GUESS_BYTES))
            assert isinstance(stored, Stored)
            end = self._shared.packer.index_end(key.text, stored.body)
            if end > len(stored.body):
                stored = await self._shared.storage.get(key.text, span=(0, end))
                assert isinstance(stored, Stored)
            return self._shared.packer.unpack_index(key.text, stored.body)
        except NotFound:
            return None
        except CorruptObject as error:
            return self._unreadable(error)

    async def segment(self, key: SegmentKey) -> Segment | None:
        """A segment; None when it is gone or damaged. Raises Unreadable when others may be able to read it."""
        try:
            stored = await self._shared.storage.get(key.text)
        except NotFound:
            return None
        assert isinstance(stored, Stored)
        try:
            return await self._shared.packer.unpack(key.text, stored.body)
        except CorruptObject as error:
            return self._unreadable(error)

    @staticmethod
    def _unreadable(error: CorruptObject) -> None:
        # Whoever claims it sets it aside; who only looks goes on with the others.
        log.error("an object of the queue cannot be used", key=error.key, reason=error.reason)


def count(entries: Iterable[Entry], held: Container[str], now_ms: int, own: Mapping[str, int] | None = None) -> Backlog:
    """Count the messages of ready and delayed segments by their keys.

    Args:
        entries: As they were listed.
        held: Names of segments with a claim.
        now_ms: Store time.
        own: How many messages are left of the segments that this process holds, by name.
    """
    own = own or {}
    waiting: dict[int, int] = {}
    delayed = in_hand = 0
    oldest_ms: int | None = None
    for key in keys_of(entries):
        if key.name in own:
            in_hand += own[key.name]
        elif key.name in held:
            in_hand += key.count
        elif key.due_ms > now_ms:
            delayed += key.count
        else:
            waiting[key.priority] = waiting.get(key.priority, 0) + key.count
            oldest_ms = key.created_ms if oldest_ms is None else min(oldest_ms, key.created_ms)
    return Backlog(waiting, delayed, in_hand, oldest_ms)


def claimed_names(entries: Iterable[Entry]) -> set[str]:
    """Names of the segments that claims are about."""
    return {layout.claim_name(entry.key) for entry in entries}


def keys_of(entries: Iterable[Entry]) -> list[SegmentKey]:
    """The segments among the objects of a listing."""
    keys: list[SegmentKey] = []
    for entry in entries:
        try:
            keys.append(SegmentKey.parse(entry.key))
        except ValueError:
            # A foreign object under our prefix; the claim loop reports it.
            continue
    return keys


def require_some(found: Sequence[object], unread: Sequence[Unreadable]) -> None:
    """Say what had to be left out; raise that when nothing else was found."""
    if not unread:
        return
    if not found:
        raise unread[0]
    log.error("some cannot be read here, and are left out", count=len(unread), first=str(unread[0]))
