"""What a queue costs: every request is counted at the store."""

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest

from tests.unit.queue.bed import Bed, Seen, virtual


async def handle_all(bed: Bed, count: int) -> None:
    """A worker in another process handles what is there, leaves, and every claim's linger is over."""
    seen = Seen()
    async with bed.queue(on_message=lambda_of(seen)):
        await seen.count(count)
        await anyio.sleep(30)


def lambda_of(seen: Seen) -> Any:
    async def handler(payload: Any) -> None:
        seen(payload)

    return handler


@pytest.mark.parametrize("many", [False, True])
@virtual
async def test_a_hundred_messages_enqueued_together(many: bool) -> None:
    """100 messages, enqueued together and handled elsewhere without error, cost 2 PUT + 1 GET + 2 DELETE."""
    bed = Bed(latency_s=0.02)
    async with bed.queue() as producer:
        if many:
            await producer.enqueue_many(range(100))
        else:
            await asyncio.gather(*(producer.enqueue(number) for number in range(100)))
    await handle_all(bed, 100)
    assert bed.store.count() == {"put": 2, "get": 1, "delete": 2}
    assert await bed.leftovers() == []


@virtual
async def test_handed_over_in_one_process() -> None:
    """An idle worker of the same process takes the segment from memory: no GET."""
    bed = Bed(latency_s=0.02)
    seen = Seen()
    async with bed.queue(on_message=lambda_of(seen)) as queue:
        await anyio.sleep(1)
        await asyncio.gather(*(queue.enqueue(number) for number in range(100)))
        await seen.count(100)
        await anyio.sleep(30)
    assert bed.store.count() == {"put": 2, "delete": 2}


@pytest.mark.parametrize("handed_over", [False, True])
@virtual
async def test_one_message_alone(handed_over: bool) -> None:
    """One message costs 2 PUT + at most 1 GET + 2 DELETE."""
    bed = Bed(latency_s=0.02)
    seen = Seen()
    if handed_over:
        async with bed.queue(on_message=lambda_of(seen)) as queue:
            await anyio.sleep(1)
            await queue.enqueue("alone")
            await seen.count(1)
            await anyio.sleep(30)
    else:
        async with bed.queue() as producer:
            await producer.enqueue("alone")
        await handle_all(bed, 1)
    counted = bed.store.count()
    assert counted == {"put": 2, "delete": 2} if handed_over else {"put": 2, "get": 1, "delete": 2}


@pytest.mark.parametrize("latency_s", [0.0, 0.05])
@virtual
async def test_a_thousand_concurrent_enqueues(latency_s: float) -> None:
    """1,000 concurrent calls cost at most 20 PUT, however slow the store is."""
    bed = Bed(latency_s=latency_s)
    async with bed.queue() as producer:
        ids = await asyncio.gather(*(producer.enqueue(number) for number in range(1000)))
        before = producer.requests().put.attempts
    assert len(set(ids)) == 1000
    assert bed.store.count()["put"] <= 20
    assert before >= bed.store.count()["put"]


@virtual
async def test_a_heartbeat_is_one_put_however_much_is_held() -> None:
    """With 2,000 messages of 40 segments in hand, 65 s of heartbeats cost 6 PUT, and nothing else is written."""
    bed = Bed()
    async with bed.queue() as producer:
        for _ in range(40):
            await producer.enqueue_many(range(50))
    started = Seen()

    async def stay(payload: int) -> None:
        started(payload)
        await anyio.sleep(90)

    async with bed.queue(on_message=stay, concurrency=2000) as queue:
        await started.count(2000)
        bed.store.calls.clear()
        await anyio.sleep(65)
        writes = [call for call in bed.store.calls if call.operation == "put"]
        assert {call.keys[0] for call in writes} == {f"plugin/workers/{queue.worker_id}"}
        assert len(writes) == 6


@virtual
async def test_a_producer_registers_no_worker() -> None:
    """A queue object without a handler writes nothing but its messages, and lists nothing."""
    bed = Bed()
    async with bed.queue() as producer:
        bed.store.calls.clear()
        for number in range(3):
            await producer.enqueue(number)
            await anyio.sleep(60)
        assert producer.worker_id is None
        assert await producer.workers() == []
        calls = [call for call in bed.store.calls if call.keys != ("plugin/workers/",)]
        assert [call.operation for call in calls] == ["put"] * 3
        assert all(call.keys[0].startswith("ready/") for call in calls)


@virtual
async def test_the_metered_storage_says_the_same() -> None:
    """queue.requests() counts every request that reaches the store."""
    bed = Bed()
    seen = Seen()
    async with bed.queue(on_message=lambda_of(seen)) as queue:
        await asyncio.gather(*(queue.enqueue(number) for number in range(300)))
        await seen.count(300)
        await anyio.sleep(30)
        metrics = queue.requests()
        for operation in ("put", "get", "list"):
            reached = [call for call in bed.store.calls if call.operation == operation]
            assert getattr(metrics, operation).attempts == len(reached)
        assert metrics.attempts == len(bed.store.calls)
        assert metrics.put.bytes_out > 0
