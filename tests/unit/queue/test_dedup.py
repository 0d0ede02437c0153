"""Deduplication: one message for one id within the window, whoever enqueues it, and whatever became of the first."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from s3queue_async import Context, Settings
from s3queue_async.errors import InvalidSettings, QueueError
from tests.unit.queue.bed import Bed, Seen, virtual

SETTINGS = Settings(coordinator=False, dedup_window=60)


@virtual
async def test_the_second_enqueue_returns_the_first_id() -> None:
    """One after the other in one process: the same id, one message."""
    bed = Bed()
    async with bed.queue(settings=SETTINGS) as queue:
        first = await queue.enqueue("a", dedup_id="x")
        assert await queue.enqueue("b", dedup_id="x") == first
        assert await queue.enqueue("c", dedup_id="y") != first
        assert (await queue.stats()).pending == 2


@pytest.mark.parametrize("queues", [1, 2])
@pytest.mark.parametrize("latency_s", [0.0, 0.05])
@virtual
async def test_concurrent(queues: int, latency_s: float) -> None:
    """Fifty at once, from one queue object or from two: all get the same id, and it is handled once."""
    bed = Bed(latency_s=latency_s)
    seen = Seen()

    async def handler(payload: object) -> None:
        seen(payload)

    async with bed.queue(settings=SETTINGS) as one, bed.queue(settings=SETTINGS) as two:
        producers = [one, two][:queues]
        ids = await asyncio.gather(*(producers[n % queues].enqueue(n, dedup_id="x") for n in range(50)))
    assert len(set(ids)) == 1
    async with bed.queue(settings=SETTINGS, on_message=handler):
        await seen.count(1)
        await anyio.sleep(30)
    assert len(seen.items) == 1


@virtual
async def test_within_one_batch_with_others() -> None:
    """Duplicates leave a batch that has other messages, too; those are written and get ids of their own."""
    bed = Bed(latency_s=0.01)
    seen = Seen()

    async def handler(payload: int) -> None:
        seen(payload)

    async with bed.queue(settings=SETTINGS) as one:
        first = await one.enqueue(0, dedup_id="x")
        async with bed.queue(settings=SETTINGS) as two:
            ids = await asyncio.gather(*(two.enqueue(n, dedup_id="x" if n == 5 else None) for n in range(10)))
    assert ids[5] == first
    assert len(set(ids)) == 10
    async with bed.queue(settings=SETTINGS, on_message=handler):
        await seen.count(10)
        await anyio.sleep(30)
    assert sorted(seen.items) == [0, 0, 1, 2, 3, 4, 6, 7, 8, 9]


@pytest.mark.parametrize("later_s", [5, 40, 61, 200])
@virtual
async def test_finished_and_enqueued_again(later_s: float) -> None:
    """A finished message blocks its id until dedup_window seconds after its enqueue, and no longer."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: object) -> None:
        seen(payload)

    async with bed.queue(settings=SETTINGS, on_message=handler) as queue:
        first = await queue.enqueue("first", dedup_id="x")
        await seen.count(1)
        await anyio.sleep(later_s)
        second = await queue.enqueue("second", dedup_id="x")
        await anyio.sleep(5)
    if later_s < 60:
        assert second == first
        assert seen.items == ["first"]
    else:
        assert second != first
        assert seen.items == ["first", "second"]


@virtual
async def test_a_retried_message_keeps_its_id() -> None:
    """While its message waits for a retry, and after it became a dead letter, the id is taken within the window."""
    bed = Bed()
    dead = Seen()

    async def fail(payload: object) -> None:
        raise OSError

    settings = Settings(coordinator=False, max_attempts=2, backoff_base=10, dedup_window=60)
    async with bed.queue(settings=settings, on_message=fail) as queue:
        queue.on("message.dead", dead)
        first = await queue.enqueue("a", dedup_id="x")
        await anyio.sleep(5)
        assert await queue.enqueue("b", dedup_id="x") == first
        await dead.count(1)
        await anyio.sleep(2)
        assert await queue.enqueue("c", dedup_id="x") == first
        assert (await queue.stats(exact=True)).dead == 1


@virtual
async def test_enqueue_many_takes_a_function() -> None:
    """enqueue_many derives the ids from the payloads; equal ones get the id of the first."""
    bed = Bed()
    async with bed.queue(settings=SETTINGS) as queue:
        ids = await queue.enqueue_many(["a", "b", "a", "c", "b"], dedup_id=str)
        assert ids[2] == ids[0]
        assert ids[4] == ids[1]
        assert len(set(ids)) == 3
        assert (await queue.stats()).pending == 3
        with pytest.raises(InvalidSettings, match="must be a function"):
            await queue.enqueue_many(["a"], dedup_id="x")  # type: ignore[arg-type]  # the mistake under test


@virtual
async def test_markers_go_when_their_window_is_over() -> None:
    """A worker that stays removes markers of expired windows; nothing of deduplication is left then."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: object) -> None:
        seen(payload)

    async with bed.queue(settings=SETTINGS, on_message=handler) as queue:
        await asyncio.gather(*(queue.enqueue(n, dedup_id=f"id {n}") for n in range(20)))
        await seen.count(20)
        assert len(await bed.keys("plugin/dedup/")) == 20
        await anyio.sleep(150)
        assert await bed.keys("plugin/dedup/") == []


@virtual
async def test_an_enqueue_whose_reply_was_lost_and_is_repeated() -> None:
    """A caller that got no answer enqueues again with the same id: it is in the queue once, under the id returned."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: object, context: Context) -> None:
        seen((payload, context.message_id))

    away, faults = bed.lane()
    settings = Settings(coordinator=False, dedup_window=300)
    async with bed.queue(settings=settings, storage=away) as one:
        faults.lose_reply("put", key="ready/*")
        faults.unavailable("get", "put", key="ready/*")
        with pytest.raises(QueueError, match="not known") as caught:
            await one.enqueue("first", dedup_id="x")
        assert caught.value.retriable
    async with bed.queue(settings=settings) as two:
        again = await two.enqueue("again", dedup_id="x")
        async with bed.queue(settings=settings, on_message=handler):
            await seen.count(1)
            await anyio.sleep(60)
    assert seen.items == [("first", again)]


@virtual
async def test_a_producer_that_died_before_its_write() -> None:
    """An id whose producer died between marker and segment is free for the next enqueue, which is delivered."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: object) -> None:
        seen(payload)

    away, faults = bed.lane()
    async with bed.queue(settings=SETTINGS, storage=away) as one:
        faults.lose_request("put", key="ready/*", times=None)
        faults.unavailable("get", key="ready/*")
        with pytest.raises(QueueError):
            await one.enqueue("lost", dedup_id="x")
    async with bed.queue(settings=SETTINGS, on_message=handler) as two:
        await two.enqueue("again", dedup_id="x")
        await seen.count(1)
        await anyio.sleep(30)
    assert seen.items == ["again"]
