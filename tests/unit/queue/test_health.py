"""When a process is ready, and what it says when it is not."""

from __future__ import annotations

import anyio

from s3queue_async import Settings
from tests.unit.queue.bed import Bed, Seen, eventually, virtual


async def nothing(payload: object) -> None: ...


@virtual
async def test_a_worker_alone_is_ready_once_it_has_looked() -> None:
    """Without a coordinator the first look at what is there makes it ready; until then it says what it lacks."""
    bed = Bed()
    store, faults = bed.lane()
    queue = bed.queue(storage=store)
    assert queue.health().reason == "the queue is not open"
    async with queue:
        assert (queue.health().ready, queue.health().reason) == (True, "")
        gate = faults.hold("list", key="ready/*")
        await queue.start_processing(nothing)
        await gate.reached.wait()
        health = queue.health()
        assert (health.live, health.ready, health.reason) == (True, False, "the worker has not looked for work yet")
        gate.open()
        await anyio.sleep(0.1)
        assert (queue.health().ready, queue.health().reason) == (True, "")


@virtual
async def test_a_worker_that_sees_a_coordinator_is_ready() -> None:
    """A live board is a way to work, so that a worker that cannot list is ready as well."""
    bed = Bed()
    store, faults = bed.lane()
    async with bed.queue(settings=Settings(), on_message=nothing) as first:
        await anyio.sleep(5)
        assert first.is_coordinator
        async with bed.queue(settings=Settings(), storage=store) as second:
            faults.hold("list", key="ready/*")
            await second.start_processing(nothing)

            async def ready() -> bool:
                return second.health().ready

            await eventually(ready)
            assert not second.is_coordinator
            faults.clear()


@virtual
async def test_a_receiver_needs_no_look() -> None:
    """A process that only receives looks when it is asked to, and is ready before."""
    bed = Bed()
    async with bed.queue() as queue:
        assert await queue.receive(wait=0) == []
        await anyio.sleep(60)
        assert queue.health().ready


@virtual
async def test_a_lost_lease_and_a_drain_have_their_reasons() -> None:
    """Cut off from the store for longer than its lease, a worker says so; a queue that drains does, too."""
    bed = Bed()
    store, faults = bed.lane()
    stopped, started, release = Seen(), Seen(), anyio.Event()

    async def handler(payload: object) -> None:
        started(payload)
        await release.wait()

    async with bed.queue(storage=store, on_message=handler) as queue:
        queue.on("lease.lost", stopped)
        await anyio.sleep(15)
        faults.unavailable("put", key="plugin/workers/*")
        await stopped.count(1)
        reason = queue.health().reason
        assert reason in ("the worker's lease is over", "the worker is not registered yet")
        faults.clear()

        async def ready() -> bool:
            return queue.health().ready

        await eventually(ready)
        await queue.enqueue(1)
        await started.count(1)
        async with anyio.create_task_group() as group:
            group.start_soon(queue.drain)
            await anyio.sleep(1)
            assert queue.health().reason == "the queue drains"
            release.set()
    assert queue.health().reason == "the queue is not open"
