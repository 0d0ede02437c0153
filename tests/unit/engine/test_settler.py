from __future__ import annotations

from random import Random

import anyio

from s3queue_async import Settings
from s3queue_async.clock import SystemClock
from s3queue_async.engine.held import Held
from s3queue_async.engine.registry import Counters, Lease, Registry, Vitals
from s3queue_async.engine.settler import Settler
from s3queue_async.engine.shared import Shared, TimedStorage
from s3queue_async.events import EventBus
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.protocol.segment import Index, Record
from s3queue_async.storage.base import IfAbsent
from s3queue_async.storage.memory import MemoryStorage

WORKER = "worker"


async def hold(shared: Shared) -> Held:
    """A segment of one message, written and claimed."""
    key = SegmentKey(Place.READY, shared.new_ulid(), 1, 0, 0)
    index = Index([Record("id", shared.time.now_ms(), 1)], 0)
    await shared.storage.put(key.text, segments.encode(index, [b"x"]))
    claim = claims.fresh(key.text, owner=WORKER, now_ms=shared.time.now_ms(), nonce=shared.nonce())
    written = await shared.storage.put(key.claim, claims.encode(claim), when=IfAbsent())
    return Held(key, claim, written.version, index, [b"x"], claimed_at=shared.clock.monotonic())


async def test_what_is_given_back_behind_a_finished_segment_stays() -> None:
    """One segment is finished and the next is given back untouched in the same moment, as a drain does: the finished
    one is deleted, the other one stays, and its claim is gone.
    """
    clock = SystemClock()
    timed = TimedStorage(MemoryStorage(), clock)
    await timed.open()
    await timed.list("", limit=1)
    shared = Shared(timed, timed.time, clock, Random(1), Settings(), EventBus())
    lease = Lease(shared, Registry(shared), WORKER, lambda: Vitals(1, 0, [], Counters()))
    await lease.register()
    ended: list[Held] = []
    settler = Settler(shared, lease, on_end=ended.append)
    finished, untouched = await hold(shared), await hold(shared)
    finished.waiting.clear()
    finished.finished.append(0)
    untouched.waiting.clear()

    async with anyio.create_task_group() as group:
        settler.submit(finished)
        settler.submit_give_back(untouched)
        group.start_soon(settler.run)
        with anyio.fail_after(5):
            while len(ended) < 2:
                await anyio.lowlevel.checkpoint()
        group.cancel_scope.cancel()

    assert [entry.key for entry in (await shared.storage.list(layout.READY)).entries] == [untouched.key.text]
    assert [entry.key for entry in (await shared.storage.list(layout.CLAIMS)).entries] == [finished.key.claim]
