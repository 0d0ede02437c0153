"""Reads and changes the object that holds a queue's schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

from s3queue_async.engine.shared import Shared
from s3queue_async.errors import StoreUnavailable
from s3queue_async.scheduling.timetable import FORMAT_VERSION, KEY, NAMESPACE, Definition, Timetable, decode, encode
from s3queue_async.storage.base import IfAbsent, IfVersion, NotFound, Stored, Superseded, Unmodified
from s3queue_async.storage.plugin import PluginStorage, plugin_prefix

SWAP_TRIES_MAX = 32
DECIDE_WITHIN_S = 20.0

_WHOLE_KEY = plugin_prefix(NAMESPACE) + KEY
_EMPTY = Timetable(nonce="", format=FORMAT_VERSION, schedules={})


class TimetableStore:
    """The schedules as this process saw them last.

    Attributes:
        schedules: By name.
        looked_at: Local time before the request that showed them.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._plugin = PluginStorage(shared.storage, NAMESPACE)
        self._version: str | None = None
        self.schedules: dict[str, Definition] = {}
        self.looked_at = -math.inf

    async def look(self) -> dict[str, Definition]:
        """The schedules as they are now; an object that did not change is not sent again.

        Raises:
            CorruptObject, NewerFormat: The object cannot be read.
            Unreadable: This process lacks the key that it is encrypted with.
            StoreUnavailable, Throttled: The store did not answer for a while.
        """
        clock = self._shared.clock
        give_up_at = clock.monotonic() + DECIDE_WITHIN_S
        await self._shared.insist(self._read, while_true=lambda: clock.monotonic() < give_up_at)
        return self.schedules

    async def _read(self) -> None:
        while True:
            asked_at = self._shared.clock.monotonic()
            before = self._version
            found: Stored | Unmodified | None
            try:
                found = await self._plugin.get(KEY, unless=before)
            except NotFound:
                found = None
            # Otherwise this process wrote it meanwhile, or saw it change: the reply may be older.
            if self._version == before:
                break
        if found is None:
            self._take_in(_EMPTY, None)
        elif isinstance(found, Stored):
            body = self._shared.packer.unpack_history(_WHOLE_KEY, found.body)
            self._take_in(decode(_WHOLE_KEY, body), found.version)
        self.looked_at = asked_at

    def _take_in(self, timetable: Timetable, version: str | None) -> None:
        self.schedules, self._version = timetable.schedules, version

    async def update(self, change: Callable[[dict[str, Definition]], bool]) -> dict[str, Definition]:
        """Change the schedules by compare-and-swap; ``change`` says whether there is anything to write.

        Raises:
            InvalidSettings: There would be too many, or they would be too large.
            StoreUnavailable: Others were faster every time, or the store did not confirm it.
        """
        shared = self._shared
        for tries in range(SWAP_TRIES_MAX):
            schedules = dict(await self.look())
            if not change(schedules):
                return schedules
            new = Timetable(nonce=shared.nonce(), format=FORMAT_VERSION, schedules=schedules)
            body = shared.packer.pack_history(_WHOLE_KEY, encode(new))
            when = IfAbsent() if self._version is None else IfVersion(self._version)
            try:
                version = await shared.swap(KEY, body, when=when, deadline_s=DECIDE_WITHIN_S, storage=self._plugin)
            except Superseded:
                await shared.pause(tries)
            else:
                self._take_in(new, version)
                return schedules
        raise StoreUnavailable(
            f"The schedules were changed by others during each of {SWAP_TRIES_MAX} tries to change them."
        )
