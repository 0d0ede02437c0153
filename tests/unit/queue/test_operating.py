"""Looking at a queue and operating it: states, counts, dead letters, history, purge, workers, limits."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

import anyio
import pytest

from s3queue_async import Context, S3Queue, Settings
from s3queue_async.errors import InvalidSettings, MessageNotFound, QueueFull
from s3queue_async.message import MessageStatus
from tests.unit.queue.bed import QUIET, Bed, Seen, eventually, virtual


@virtual
async def test_status_through_a_life() -> None:
    """pending, processing, retrying, processing, completed; and delayed, and unknown for ids that never were."""
    bed = Bed()
    started = Seen()
    go_on = anyio.Event()

    async def handler(payload: str, context: Context) -> None:
        started((payload, context.attempt))
        await go_on.wait()
        if context.attempt == 1:
            raise OSError

    settings = Settings(coordinator=False, backoff_base=20, backoff_jitter=0, retain_completed=3600)
    async with bed.queue(settings=settings, on_message=handler, auto_start=False) as queue:
        message_id = await queue.enqueue("a")
        later = await queue.enqueue("b", delay=3600)
        assert await queue.status(message_id) is MessageStatus.PENDING
        assert await queue.status(later) is MessageStatus.DELAYED
        await queue.start_processing()
        await started.count(1)
        assert await queue.status(message_id) is MessageStatus.PROCESSING
        go_on.set()
        await anyio.sleep(10)
        assert await queue.status(message_id) is MessageStatus.RETRYING
        await started.count(2)
        await anyio.sleep(1)
        assert await queue.status(message_id) is MessageStatus.COMPLETED
        assert await queue.status(later) is MessageStatus.DELAYED
        for unknown in ("", "x", message_id[:-1], f"{message_id[:26]}-000001", "0" * 26 + "-000000"):
            assert await queue.status(unknown) is MessageStatus.UNKNOWN


@virtual
async def test_status_with_history() -> None:
    """With retain_completed a finished message stays COMPLETED long after its claim is gone."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: object) -> None:
        seen(payload)

    settings = Settings(coordinator=False, retain_completed=3600)
    async with bed.queue(settings=settings, on_message=handler) as queue:
        message_id = await queue.enqueue("a")
        await seen.count(1)
        await anyio.sleep(600)
        assert await bed.keys("claims/") == []
        assert await queue.status(message_id) is MessageStatus.COMPLETED


@pytest.mark.parametrize("exact", [False, True])
@virtual
async def test_stats(exact: bool) -> None:
    """Every message is counted in exactly one state, and the oldest pending one tells its age."""
    bed = Bed()
    started = Seen()

    async def handler(payload: int) -> None:
        started(payload)
        await anyio.sleep(1000 if payload == 0 else 0)

    settings = Settings(coordinator=False, split_after=None)
    async with bed.queue(settings=settings, on_message=handler, auto_start=False, concurrency=1) as queue:
        await queue.enqueue_many(range(5), priority=1)
        await queue.enqueue_many(range(3), delay=3600)
        assert (await queue.stats(exact=exact)).pending == 5
        await queue.start_processing()
        await started.count(1)
        await queue.enqueue_many(range(7))
        await anyio.sleep(1)
        stats = await queue.stats(exact=exact)
        assert (stats.processing, stats.pending, stats.delayed) == (5, 7, 3)
        assert stats.total == 15
        assert stats.workers == 1
        assert stats.complete
        assert stats.oldest_age is not None
        assert 1 <= stats.oldest_age < 1.5
        async with bed.queue() as other:
            seen = await other.stats(exact=exact)
        assert (seen.processing, seen.pending, seen.delayed) == (5, 7, 3)


async def make_dead(queue: S3Queue[Any], bed: Bed, count: int) -> list[str]:
    """So many dead letters, in one segment as far as they go."""
    dead = Seen()
    off = queue.on("message.dead", dead)
    ids = await queue.enqueue_many(range(count), max_attempts=1)
    await dead.count(count)
    await eventually(lambda: queue_has_dead(queue, count))
    off()
    return ids


async def queue_has_dead(queue: S3Queue[Any], count: int) -> bool:
    return (await queue.stats(exact=True)).dead == count


class Switch:
    """A handler that fails until it is told otherwise."""

    def __init__(self) -> None:
        self.fails = True
        self.seen = Seen()

    async def __call__(self, payload: int, context: Context) -> None:
        if self.fails:
            raise OSError(f"no {payload}")
        self.seen((payload, context.attempt))


@virtual
async def test_redrive_all() -> None:
    """redrive() makes every dead letter ready again with all its attempts before it."""
    bed = Bed()
    switch = Switch()
    async with bed.queue(on_message=switch) as queue:
        await make_dead(queue, bed, 10)
        switch.fails = False
        assert await queue.dead_letters.redrive() == 10
        assert sorted(await switch.seen.count(10)) == [(number, 1) for number in range(10)]
        assert await queue.dead_letters.list() == []
    assert await bed.leftovers() == []


@virtual
async def test_redrive_some() -> None:
    """redrive(ids) takes these alone; the others stay dead letters with error and attempts."""
    bed = Bed()
    switch = Switch()
    async with bed.queue(on_message=switch) as queue:
        ids = await make_dead(queue, bed, 10)
        switch.fails = False
        assert await queue.dead_letters.redrive([ids[3], ids[7], "0" * 26 + "-000000"]) == 2
        assert sorted(await switch.seen.count(2)) == [(3, 1), (7, 1)]
        letters = await queue.dead_letters.list()
        assert sorted(letter.payload for letter in letters) == [0, 1, 2, 4, 5, 6, 8, 9]
        assert {(letter.attempts, letter.error) for letter in letters} == {
            (1, f"OSError: no {letter.payload}") for letter in letters
        }
        assert len(await queue.dead_letters.list(limit=3)) == 3
        assert await queue.dead_letters.redrive([ids[3]]) == 0
        with pytest.raises(InvalidSettings, match=ids[0]):
            await queue.dead_letters.redrive(ids[0])


@virtual
async def test_purge_dead_letters() -> None:
    """purge(ids) deletes these dead letters, purge() all of them; a queue without a worker can do it, too."""
    bed = Bed()
    async with bed.queue(on_message=Switch()) as queue:
        ids = await make_dead(queue, bed, 10)
    async with bed.queue() as other:
        assert await other.dead_letters.purge(ids[:4]) == 4
        assert len(await other.dead_letters.list()) == 6
        assert other.worker_id is None, "the session made for it has left"
        assert await other.workers() == []
        assert await other.dead_letters.purge() == 6
        assert await other.dead_letters.list() == []
    async with bed.queue(on_message=Switch()):
        await anyio.sleep(100)
    assert await bed.leftovers() == []


@virtual
async def test_redrive_without_a_worker() -> None:
    """A script that only redrives leaves no worker behind, and what it redrove is there for others."""
    bed = Bed()
    switch = Switch()
    async with bed.queue(on_message=switch) as queue:
        await make_dead(queue, bed, 5)
    async with bed.queue() as script:
        assert await script.dead_letters.redrive() == 5
        assert await bed.keys("plugin/workers/") == []
    switch.fails = False
    async with bed.queue(on_message=switch):
        await switch.seen.count(5)


@virtual
async def test_purge() -> None:
    """purge() deletes what waits, delayed messages included; what is being handled goes on."""
    bed = Bed()
    seen, done = Seen(), Seen()

    async def handler(payload: int) -> None:
        seen(payload)
        await anyio.sleep(50)
        done(payload)

    async with bed.queue(on_message=handler, concurrency=1) as queue:
        await queue.enqueue(1)
        await seen.count(1)
        await queue.enqueue_many([2, 3], delay=100)
        await queue.enqueue_many([4, 5, 6])
        assert await queue.purge() == 5
        stats = await queue.stats(exact=True)
        assert (stats.pending, stats.delayed, stats.processing) == (0, 0, 1)
        await done.count(1)
    assert done.items == [1]


@virtual
async def test_results_and_history() -> None:
    """With retain_completed what handlers returned can be read for that long, newest first, and then goes."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: int) -> Any:
        await anyio.sleep(2)
        seen(payload)
        return {"twice": payload * 2} if payload < 5 else object()

    settings = Settings(coordinator=False, retain_completed=timedelta(minutes=5))  # type: ignore[arg-type]
    async with bed.queue(settings=settings, on_message=handler, concurrency=1) as queue:
        ids = []
        for number in range(6):
            ids.append(await queue.enqueue(number))
            await anyio.sleep(0.01)
        await seen.count(6)
        await anyio.sleep(3)
        assert await queue.results(ids[4]) == {"twice": 8}
        assert (await queue.results(ids[5])).startswith("<object object")
        history = await queue.history()
        assert [entry.id for entry in history] == ids[::-1]
        assert {entry.worker_id for entry in history} == {queue.worker_id}
        assert all(2 <= entry.duration < 2.1 and entry.attempts == 1 for entry in history)
        assert all(entry.completed_at > entry.enqueued_at for entry in history)
        assert [entry.id for entry in await queue.history(limit=2)] == ids[:3:-1]
        await anyio.sleep(400)
        assert await queue.history() == []
        with pytest.raises(MessageNotFound):
            await queue.results(ids[0])


@virtual
async def test_no_results_without_history() -> None:
    """Without retain_completed nothing is kept: results() raises MessageNotFound and says why."""
    bed = Bed()
    async with bed.queue() as queue:
        with pytest.raises(MessageNotFound, match="retain_completed"):
            await queue.results("0" * 26 + "-000000")
        assert await queue.history() == []


@virtual
async def test_workers() -> None:
    """workers() lists every worker with its capacity and what it does, and forgets those that left."""
    bed = Bed()
    started = Seen()

    async def handler(payload: object) -> None:
        started(payload)
        await anyio.sleep(300)

    async with bed.queue(on_message=handler, concurrency=3) as one:
        await one.enqueue_many(range(2))
        await started.count(2)
        async with bed.queue(on_message=handler, concurrency=7) as two:
            await anyio.sleep(15)
            infos = {info.id: info for info in await two.workers()}
            assert set(infos) == {one.worker_id, two.worker_id}
            first = infos[str(one.worker_id)]
            assert (first.capacity, first.in_flight, first.segments, first.alive) == (3, 2, 1, True)
            assert first.heartbeat_age < 10.1
        assert [info.id for info in await one.workers()] == [one.worker_id]


@virtual
async def test_max_pending() -> None:
    """At max_pending messages enqueue raises QueueFull, which is retriable; with room again it goes through."""
    bed = Bed()
    switch = Switch()
    switch.fails = False
    settings = Settings(coordinator=False, max_pending=10)
    async with bed.queue(settings=settings) as queue:
        await queue.enqueue_many(range(8))
        await queue.enqueue_many(range(2), delay=1)
        with pytest.raises(QueueFull, match="max_pending=10") as caught:
            await queue.enqueue("one too many")
        assert caught.value.retriable
        with pytest.raises(QueueFull):
            await queue.enqueue_many(range(3))
        async with bed.queue(on_message=switch):
            await switch.seen.count(10)
        await anyio.sleep(2)
        await queue.enqueue("fits")


@virtual
async def test_max_pending_holds_for_concurrent_callers() -> None:
    """A burst does not get past the limit: of 100 concurrent calls just ten succeed."""
    bed = Bed(latency_s=0.02)
    async with bed.queue(settings=Settings(coordinator=False, max_pending=10)) as queue:
        await anyio.sleep(5)
        outcomes = await asyncio.gather(*(queue.enqueue(n) for n in range(100)), return_exceptions=True)
        assert sum(isinstance(outcome, str) for outcome in outcomes) == 10
        assert all(isinstance(outcome, str | QueueFull) for outcome in outcomes)


@virtual
async def test_counts_beyond_a_page() -> None:
    """More than 1,000 segments of each kind are counted in pages."""
    bed = Bed()
    async with bed.queue(settings=Settings(coordinator=False, segment_messages_max=1)) as queue:
        await queue.enqueue_many(range(1500))
        await queue.enqueue_many(range(1100), delay=50)
        stats = await queue.stats()
        assert (stats.pending, stats.delayed, stats.complete) == (1500, 1100, True)
        assert await queue.purge() == 2600


@virtual
async def test_limits_are_checked() -> None:
    """A limit out of range is refused with its name."""
    bed = Bed()
    async with bed.queue(settings=QUIET) as queue:
        with pytest.raises(InvalidSettings, match="limit"):
            await queue.history(limit=0)
        with pytest.raises(InvalidSettings, match="limit"):
            await queue.dead_letters.list(limit=-1)
