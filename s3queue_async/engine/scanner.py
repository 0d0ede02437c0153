"""Lists the queue's segments and claims: what is there, without what does not count."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from s3queue_async.engine.shared import Shared
from s3queue_async.errors import Unreadable
from s3queue_async.events import ObjectSetAside, ObjectUnreadable, SegmentVoided
from s3queue_async.log import log
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.storage.base import LIST_LIMIT_MAX, Entry

PAGES_MAX = 10
"""Pages of one listing that are read for one look."""
DELAYED_EVERY_S = 1.0
"""How often delayed segments are listed while none is known to become due."""
REPORTED_MAX = 20_000
LACKING_EVERY_S = 60.0
LACKING_MAX = 100


class SegmentPage(msgspec.Struct, frozen=True):
    """Some segments in the order of their keys; ``last``: the last key that was listed."""

    keys: list[SegmentKey]
    last: str
    more: bool


class DuePage(msgspec.Struct, frozen=True):
    """Delayed segments that are due; ``next_due_ms``: when the first of the others will be, if one was listed."""

    keys: list[SegmentKey]
    next_due_ms: int | None
    more: bool


class Scanner:
    """Lists segments, and clears away what a writer left behind too late.

    Args:
        shared: What all roles have.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._reported: set[str] = set()
        self._lacking: dict[str, float] = {}

    async def ready(self, *, after: str, limit: int) -> SegmentPage:
        """A page of what is ready, most urgent and then oldest first."""
        page = await self._shared.storage.list(layout.READY, after=after, limit=limit)
        last = page.entries[-1].key if page.entries else after
        return SegmentPage(await self._segments(page.entries), last, page.more)

    async def due(self, *, limit: int) -> DuePage:
        """The first delayed segments that are due."""
        page = await self._shared.storage.list(layout.DELAYED, limit=limit)
        # After the reply, whose date a local clock that has just jumped cannot change (found by simulation).
        bound = layout.due_bound(int(self._shared.time.certain() * 1000))
        due = [entry for entry in page.entries if entry.key < bound]
        next_due_ms = None
        for entry in page.entries[len(due) :]:
            try:
                next_due_ms = SegmentKey.parse(entry.key).due_ms
            except ValueError:
                continue
            break
        return DuePage(await self._segments(due), next_due_ms, page.more)

    async def claims(self, first: str, last: str | None = None) -> dict[str, float]:
        """When the claims between two names were written last, by segment name.

        Args:
            first: Names from this text on.
            last: Up to this one; None: all, as far as so many pages reach.
        """
        found: dict[str, float] = {}
        after = layout.CLAIMS + first
        for _ in range(PAGES_MAX):
            page = await self._shared.storage.list(layout.CLAIMS, after=after, limit=LIST_LIMIT_MAX)
            found.update((layout.claim_name(entry.key), entry.modified_s) for entry in page.entries)
            if not page.more or (last is not None and layout.claim_name(page.entries[-1].key) > last):
                break
            after = page.entries[-1].key
        return found

    async def _segments(self, entries: Sequence[Entry]) -> list[SegmentKey]:
        keys = []
        for entry in entries:
            try:
                key = SegmentKey.parse(entry.key)
            except ValueError:
                self.report(entry.key, "its name is no segment's")
                continue
            if segments.is_void(key.created_ms, entry.modified_s, self._shared.settings.segment_age):
                await self._clear_left_void(key, entry.modified_s)
            else:
                keys.append(key)
        return keys

    async def _clear_left_void(self, key: SegmentKey, modified_s: float) -> None:
        """Delete a void segment that its writer left behind.

        At first it is left alone: its writer deletes it in a moment, and several who do would, on a store that allows
        one write a second to one key, be refused until they slow down all that they write (found by simulation).
        """
        if self._shared.time.earliest() - modified_s > self._shared.settings.segment_age:
            await self.clear_void(key)

    async def clear_void(self, key: SegmentKey) -> None:
        """Delete a void segment."""
        self._shared.bus.emit(SegmentVoided(key=key.text))
        await self._shared.storage.delete(key.text)

    def report(self, key: str, reason: str, quarantined: str | None = None) -> None:
        """Say once of an object that it cannot be used."""
        if key in self._reported:
            return
        if len(self._reported) > REPORTED_MAX:
            self._reported.clear()
        self._reported.add(key)
        log.error("an object of the queue cannot be used", key=key, reason=reason, quarantined=quarantined)
        self._shared.bus.emit(ObjectSetAside(key=key, reason=reason, quarantined=quarantined))

    def report_unreadable(self, error: Unreadable) -> None:
        """Say what this process lacks: once a minute for each lack, not for each of the segments that need it."""
        now = self._shared.clock.monotonic()
        if now < self._lacking.get(error.reason, now):
            return
        if len(self._lacking) >= LACKING_MAX:
            self._lacking.clear()
        self._lacking[error.reason] = now + LACKING_EVERY_S
        log.error(
            "messages cannot be read here, and are left to others",
            key=error.key,
            reason=error.reason,
            suggestion=error.suggestion,
        )
        self._shared.bus.emit(ObjectUnreadable(key=error.key, reason=error.reason, suggestion=error.suggestion))
