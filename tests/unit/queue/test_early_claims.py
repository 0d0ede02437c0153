"""A worker claims what its own process enqueues while it is written: one round trip to the handler's start."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import anyio
import pytest

from s3queue_async import StoreUnavailable
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.storage.base import Stored
from tests.unit.queue.bed import Bed, Seen, virtual

ROUND_TRIP_S = 0.1


async def _claimed_alone(bed: Bed) -> None:
    """Return once there is an early claim, while no segment is there."""
    while True:
        page = await bed.memory.list(layout.CLAIMS)
        if page.entries:
            break
        await anyio.sleep(0.01)
    assert not (await bed.memory.list(layout.READY)).entries
    stored = await bed.memory.get(page.entries[0].key)
    assert isinstance(stored, Stored)
    assert claims.decode(stored.key, stored.body).early


def quick(seen: Seen) -> Callable[[str], Awaitable[None]]:
    """A handler that is done at once."""

    async def handle(payload: str) -> None:
        seen(payload)

    return handle


@virtual
async def test_the_handler_starts_after_one_round_trip() -> None:
    """An idle worker of the same process has the message after the time of one request, not of two."""
    bed = Bed(latency_s=ROUND_TRIP_S)
    seen = Seen()
    async with bed.queue() as queue:
        started = queue._clock.monotonic
        at: list[float] = []

        @queue.handler(concurrency=1)
        async def handle(payload: int) -> None:
            at.append(started())
            seen(payload)

        await anyio.sleep(5)
        for number in range(5):
            enqueued_at = started()
            await queue.enqueue(number)
            await seen.count(number + 1)
            assert at[-1] - enqueued_at == pytest.approx(ROUND_TRIP_S, abs=0.01)
            await anyio.sleep(1)
    assert await bed.leftovers() == []


@pytest.mark.parametrize("fault", ["lose_request", "lose_reply"])
@pytest.mark.parametrize("times", [1, 3])
@virtual
async def test_a_write_in_doubt(fault: str, times: int) -> None:
    """The claim is there, the segment's request or reply is lost: the claim proves nothing; handled once, none lost."""
    bed = Bed(latency_s=ROUND_TRIP_S)
    seen = Seen()
    async with bed.queue(on_message=quick(seen)) as queue:
        await anyio.sleep(5)
        getattr(bed.faults, fault)("put", key="ready/*", times=times)
        await queue.enqueue("one")
        await seen.count(1)
        await anyio.sleep(60)
    assert seen.items == ["one"]
    assert await bed.leftovers() == []


@virtual
async def test_a_write_that_never_lands() -> None:
    """The store takes claims but no segments: the enqueue fails, nobody runs anything, and no claim stays."""
    bed = Bed(latency_s=ROUND_TRIP_S)
    seen = Seen()
    async with bed.queue(on_message=quick(seen)) as queue:
        await anyio.sleep(5)
        bed.faults.lose_request("put", key="ready/*", times=None)
        async with anyio.create_task_group() as group:
            group.start_soon(_claimed_alone, bed)
            with pytest.raises(StoreUnavailable):
                await queue.enqueue("one")
        bed.faults.clear()
        await queue.enqueue("two")
        await seen.count(1)
        await anyio.sleep(90)
    assert seen.items == ["two"]
    assert await bed.leftovers() == []


@virtual
async def test_a_write_that_lands_late() -> None:
    """The segment lands after its writer gave it up, beside its claim: it is void, and the message runs once."""
    bed = Bed(latency_s=ROUND_TRIP_S)
    seen = Seen()
    async with bed.queue(on_message=quick(seen)) as queue:
        await anyio.sleep(5)
        gate = bed.faults.land_late("put", key="ready/*")
        bed.faults.lose_request("put", key="ready/*", times=1000)
        async with anyio.create_task_group() as group:

            async def later() -> None:
                await anyio.sleep(7)
                bed.faults.clear()
                await gate.land()

            group.start_soon(later)
            await queue.enqueue("one")
        await seen.count(1)
        await anyio.sleep(60)
    assert seen.items == ["one"]
    assert await bed.leftovers() == []


@virtual
async def test_a_claim_in_doubt() -> None:
    """The early claim's reply is lost for long: the message is handled once all the same, under a claim of its own."""
    bed = Bed(latency_s=ROUND_TRIP_S)
    seen = Seen()
    async with bed.queue(on_message=quick(seen)) as queue:
        await anyio.sleep(5)
        bed.faults.lose_reply("put", key="claims/*", times=8)
        await queue.enqueue("one")
        await seen.count(1)
        await anyio.sleep(60)
    assert seen.items == ["one"]
    assert await bed.leftovers() == []


@virtual
async def test_the_writer_dies_beside_its_claim() -> None:
    """The process ends after its claim and before its segment: another worker's sweep deletes the claim."""
    bed = Bed(latency_s=ROUND_TRIP_S)
    lane, faults = bed.lane()
    seen = Seen()
    async with bed.queue(on_message=quick(seen)) as other:
        with anyio.CancelScope() as scope:
            async with bed.queue(storage=lane, on_message=quick(seen)) as queue:
                await anyio.sleep(5)
                faults.lose_request("put", key="ready/*", times=None)
                faults.lose_request("delete", "delete_many", "put", key="plugin/*", times=None)
                async with anyio.create_task_group() as group:
                    group.start_soon(queue.enqueue, "one")
                    await _claimed_alone(bed)
                    faults.lose_request("put", "delete", "delete_many", key="claims/*", times=None)
                    scope.cancel()
        await anyio.sleep(180)
        assert not (await bed.memory.list(layout.CLAIMS)).entries
        await other.enqueue("two")
        await seen.count(1)
        await anyio.sleep(60)
    assert seen.items == ["two"]
    assert await bed.leftovers() == []
