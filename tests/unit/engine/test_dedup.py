"""Deduplication markers when two producers contend for one."""

from __future__ import annotations

from random import Random

import anyio

from s3queue_async import Settings
from s3queue_async.engine.dedup import Deduplicator, Reservation
from s3queue_async.engine.shared import Shared, TimedStorage
from s3queue_async.events import EventBus
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.clock import LoopClock, store_now
from tests.unit.queue.bed import virtual


@virtual
async def test_a_rename_waits_until_it_is_certain_who_has_the_id() -> None:
    """The first producer's write fails, the second one takes its marker over and fails, too. The first, about to try
    again, must not take the second one's message for written (found by simulation: acknowledged, and in no segment).
    """
    clock = LoopClock()
    timed = TimedStorage(MemoryStorage(now=store_now), clock)
    await timed.open()
    await timed.list("", limit=1)
    settings = Settings(coordinator=False)
    shared = Shared(timed, timed.time, clock, Random(1), settings, EventBus())
    dedup = Deduplicator(shared)

    def new_key() -> SegmentKey:
        return SegmentKey(Place.READY, shared.new_ulid(), 1, 0, 0)

    first = await dedup.reserve("x", "first", new_key())
    assert isinstance(first, Reservation)
    await anyio.sleep(settings.segment_age + 5)
    await timed.list("", limit=1)
    second = await dedup.reserve("x", "second", new_key())
    assert isinstance(second, Reservation)

    third = await dedup.rename(first, new_key())

    assert isinstance(third, Reservation)
    assert third.marker.message_id == "first"
