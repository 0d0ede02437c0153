"""Finds what is new in a queue since the last look, by the names of keys."""

from __future__ import annotations

import msgspec

from s3queue_async.engine.browser import Browser
from s3queue_async.engine.inspector import QUICK_PAGES, Inspector
from s3queue_async.engine.reading import Reading, keys_of
from s3queue_async.engine.shared import Shared
from s3queue_async.errors import Unreadable
from s3queue_async.looks import MessageInfo
from s3queue_async.message import CompletedMessage
from s3queue_async.protocol import layout
from s3queue_async.protocol.layout import SegmentKey

LAST = "\x7f"
"""Sorts behind everything that a key is made of."""


class News(msgspec.Struct, frozen=True):
    """What came since the last look.

    Attributes:
        messages: In the order of their arrival, roughly.
        skipped: How many more there were.
    """

    messages: list[MessageInfo | CompletedMessage]
    skipped: int


class Follower:
    """Tells what is new since it was made.

    Names begin with the store time at which they were made, so a look lists what was named lately: in each priority,
    among the dead letters, in the history. Objects may land a little after the time in their names, so every look goes
    back as far as that, and remembers what it has shown. Delayed messages sort by when they are due: of them the first
    10,000 segments are listed.

    Args:
        shared: What all roles have.
        browser: Reads messages.
        inspector: Reads the history.
    """

    def __init__(self, shared: Shared, browser: Browser, inspector: Inspector) -> None:
        self._shared = shared
        self._browser = browser
        self._inspector = inspector
        self._reading = Reading(shared)
        self._from_ms = self._looked_ms = shared.time.now_ms()
        self._seen: dict[str, int] = {}

    async def look(self, *, limit: int) -> News:
        """What is new since the last look, ``limit`` messages of it at most; the others are counted."""
        settings = self._shared.settings
        late_ms = int(1000 * (settings.segment_age + settings.lease_margin + self._shared.time.resolution_s))
        since_ms = max(self._from_ms, self._looked_ms - late_ms)
        self._looked_ms = self._shared.time.now_ms()
        keys = [key for key in await self._named_since(since_ms) if self._is_new(key.name, key.created_ms)]
        messages: list[MessageInfo | CompletedMessage] = []
        skipped = 0
        for key in sorted(keys, key=lambda key: key.ulid):
            if len(messages) >= limit:
                skipped += key.count
                continue
            try:
                infos = await self._browser.segment(key)
            except Unreadable:
                # It is told by number; why it cannot be read, peek and show say.
                skipped += key.count
                continue
            room = limit - len(messages)
            messages += infos[:room]
            skipped += len(infos[room:])
        async for entry in self._reading.each(layout.HISTORY, after=layout.history_key(since_ms, "")):
            if not self._is_new(entry.key, self._looked_ms):
                continue
            try:
                completed = await self._inspector.completed_in(entry.key)
            except Unreadable:
                skipped += 1
                continue
            room = max(0, limit - len(messages))
            messages += completed[:room]
            skipped += len(completed[room:])
        self._seen = {name: made_ms for name, made_ms in self._seen.items() if made_ms >= since_ms - late_ms}
        return News(messages, skipped)

    def _is_new(self, name: str, made_ms: int) -> bool:
        if name in self._seen or made_ms < self._from_ms:
            return False
        self._seen[name] = made_ms
        return True

    async def _named_since(self, since_ms: int) -> list[SegmentKey]:
        first = layout.ulid(since_ms, 0)
        keys: list[SegmentKey] = []
        for prefix in [*await self._priorities(), layout.DEAD]:
            keys += [key async for key in self._reading.each_key(prefix, after=prefix + first)]
        delayed, _ = await self._reading.entries(layout.DELAYED, QUICK_PAGES)
        return keys + [key for key in keys_of(delayed) if key.ulid >= first]

    async def _priorities(self) -> list[str]:
        """What the keys of each priority that has messages start with: a listing of one key for each, and one more."""
        prefixes: list[str] = []
        after = ""
        while True:
            page = await self._shared.storage.list(layout.READY, after=after, limit=1)
            if not page.entries:
                return prefixes
            prefix = page.entries[0].key.rpartition("/")[0] + "/"
            prefixes.append(prefix)
            after = prefix + LAST
