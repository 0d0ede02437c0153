"""Shutting down: what runs ends or is handed back, enqueues are flushed, and nothing is left of the worker."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

import anyio
import pytest

from s3queue_async import Context, DrainReport, S3Queue, Settings
from s3queue_async.errors import QueueClosed
from tests.unit.queue.bed import QUIET, Bed, Seen, eventually, virtual


class Slow:
    """A handler that takes its time, and remembers what it began and ended."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.started = Seen()
        self.ended = Seen()
        self.cancelled = Seen()

    async def __call__(self, payload: Any, context: Context) -> None:
        self.started(payload)
        try:
            await anyio.sleep(self.seconds)
        except anyio.get_cancelled_exc_class():
            self.cancelled(payload)
            raise
        self.ended((payload, context.attempt))


@virtual
async def test_running_handlers_end_and_the_rest_goes_back() -> None:
    """4 of 20 run: they end, 16 are handed back, no new one starts, the heartbeat is gone, and nothing else is left."""
    bed = Bed()
    slow = Slow(10)
    async with bed.queue() as producer:
        await producer.enqueue_many(range(20))
    settings = Settings(coordinator=False, split_after=None)
    async with bed.queue(settings=settings, on_message=slow, concurrency=4) as queue:
        await slow.started.count(4)
        await anyio.sleep(1)
        report = await queue.drain()
        assert report == DrainReport(
            finished=4, handed_back=16, cancelled=0, flushed=0, clean=True, elapsed=report.elapsed
        )
        assert report.elapsed == pytest.approx(9, abs=0.5)
        assert len(slow.started.items) == 4
        assert [key for key in await bed.leftovers() if not key.startswith("ready/")] == []
    rest = Slow(0)
    async with bed.queue(on_message=rest, concurrency=4):
        await rest.ended.count(16)
    assert sorted([*slow.ended.items, *rest.ended.items]) == [(number, 1) for number in range(20)]
    assert await bed.leftovers() == []


@virtual
async def test_the_timeout_cancels_and_hands_back() -> None:
    """Past the timeout handlers are cancelled; their messages go back without having used an attempt."""
    bed = Bed()
    slow = Slow(1000)
    async with bed.queue(on_message=slow, concurrency=5) as queue:
        await queue.enqueue_many(range(5))
        await slow.started.count(5)
        report = await queue.drain(timeout=3)
    assert (report.finished, report.cancelled, report.handed_back, report.clean) == (0, 5, 5, True)
    assert 3 <= report.elapsed < 4
    assert sorted(slow.cancelled.items) == list(range(5))
    rest = Slow(0)
    async with bed.queue(on_message=rest):
        await rest.ended.count(5)
    assert {attempt for _, attempt in rest.ended.items} == {1}


@virtual
async def test_a_handler_that_ends_well_on_cancellation_is_finished() -> None:
    """A handler that catches the cancellation and returns has finished its message."""
    bed = Bed()
    started = Seen()

    async def handler(payload: object) -> None:
        started(payload)
        try:
            await anyio.sleep(1000)
        except asyncio.CancelledError:
            return

    async with bed.queue(on_message=handler) as queue:
        await queue.enqueue(1)
        await started.count(1)
        report = await queue.drain(timeout=1)
        assert report.clean
    assert await bed.leftovers() == []


@virtual
async def test_heartbeats_go_on_until_the_end() -> None:
    """A drain that takes four lease times loses no lease."""
    bed = Bed()
    slow = Slow(120)
    lost = Seen()
    async with bed.queue(on_message=slow) as queue:
        queue.on("lease.lost", lost)
        await queue.enqueue(1)
        await slow.started.count(1)
        report = await queue.drain(timeout=300)
    assert (report.finished, report.clean) == (1, True)
    assert lost.items == []
    assert slow.ended.items == [(1, 1)]


@virtual
async def test_drained_twice() -> None:
    """Two drains at once and a third one later return the same report."""
    bed = Bed()
    slow = Slow(5)
    async with bed.queue(on_message=slow) as queue:
        await queue.enqueue(1)
        await slow.started.count(1)
        first, second = await asyncio.gather(queue.drain(), queue.drain())
        assert first is second
        assert await queue.drain() is first
        with pytest.raises(QueueClosed):
            await queue.enqueue(2)
        with pytest.raises(QueueClosed):
            await queue.start_processing(slow)
        with pytest.raises(QueueClosed):
            await queue.process_next()
    assert await queue.drain() is first


@virtual
async def test_enqueues_under_way_are_flushed() -> None:
    """What was passed to enqueue before the drain is durable after it, and the report counts it."""
    bed = Bed(latency_s=0.5)
    async with bed.queue() as queue:
        async with anyio.create_task_group() as group:
            ids: list[str] = []

            async def enqueue(number: int) -> None:
                ids.append(await queue.enqueue(number))

            for number in range(50):
                group.start_soon(enqueue, number)
            await anyio.sleep(0.1)
            report = await queue.drain()
        assert report.flushed == 50
        assert len(ids) == 50
        assert (await queue.stats()).pending == 50


@virtual
async def test_enqueue_many_under_way() -> None:
    """A drain in the middle of enqueue_many: it raises QueueClosed, and its enqueued_ids are just what is there."""
    bed = Bed(latency_s=0.5)

    async def payloads() -> Any:
        for number in range(10_000):
            await anyio.sleep(0.001)
            yield number

    async with bed.queue() as queue:
        errors: list[QueueClosed] = []
        async with anyio.create_task_group() as group:

            async def enqueue() -> None:
                try:
                    await queue.enqueue_many(payloads())
                except QueueClosed as error:
                    errors.append(error)

            group.start_soon(enqueue)
            await anyio.sleep(3)
            await queue.drain()
        ids = errors[0].enqueued_ids  # type: ignore[attr-defined]  # set for the caller
    there = [record.id for key in await bed.keys("ready/") for record in (await bed.segment(key)).index.records]
    assert sorted(ids) == sorted(there)
    assert 1000 < len(ids) < 10_000


@virtual
async def test_an_exception_passes_on_unwrapped() -> None:
    """Leaving the block by an exception drains and passes that very exception on, not a group of it."""
    bed = Bed()
    slow = Slow(5)
    error = KeyError("mine")
    with pytest.raises(KeyError) as caught:  # noqa: PT012 - the block is what is tested
        async with bed.queue(on_message=slow) as queue:
            await queue.enqueue(1)
            await slow.started.count(1)
            raise error
    assert caught.value is error
    assert slow.ended.items == [(1, 1)]
    assert await bed.leftovers() == []


@virtual
async def test_a_cancelled_task_drains() -> None:
    """When the task around the block is cancelled, running handlers end first, and then the cancellation goes on."""
    bed = Bed()
    slow = Slow(5)

    async def serve() -> None:
        async with bed.queue(on_message=slow) as queue:
            await queue.enqueue(1)
            await anyio.sleep(60)

    task = asyncio.create_task(serve())
    await slow.started.count(1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert slow.ended.items == [(1, 1)]
    assert await bed.leftovers() == []


@virtual
async def test_a_caller_that_stops_waiting_does_not_stop_the_drain() -> None:
    """A drain whose caller loses patience goes on; leaving the block waits for it."""
    bed = Bed()
    slow = Slow(10)
    async with bed.queue(on_message=slow) as queue:
        await queue.enqueue(1)
        await slow.started.count(1)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(queue.drain(), 2)
    assert slow.ended.items == [(1, 1)]
    assert (await queue.drain()).finished == 1
    assert await bed.leftovers() == []


@virtual
async def test_a_second_cancellation_breaks_the_drain_off() -> None:
    """A task that is cancelled again while it drains ends at once, leaves no task behind, and loses no message."""
    bed = Bed()
    slow, rest = Slow(20), Slow(0)

    async def serve() -> None:
        async with bed.queue(on_message=slow) as queue:
            await queue.enqueue(1)
            await anyio.sleep(60)

    task = asyncio.create_task(serve())
    await slow.started.count(1)
    task.cancel()
    await anyio.sleep(3)
    began = anyio.current_time()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert anyio.current_time() - began < 1
    async with bed.queue(on_message=rest):
        await rest.ended.count(1)


@virtual
async def test_a_cancelled_scope_leaves_the_message_to_others_at_once() -> None:
    """A cancel scope around the block cancels the handlers, too: the message is there for others without a TTL."""
    bed = Bed()
    slow, rest = Slow(5), Slow(0)
    with anyio.move_on_after(2) as scope:
        async with bed.queue(on_message=slow) as queue:
            await queue.enqueue(1)
            await anyio.sleep(60)
    assert scope.cancelled_caught
    assert slow.cancelled.items == [1]
    assert await bed.keys("plugin/workers/") == []
    async with bed.queue(on_message=rest):
        with anyio.fail_after(10):
            await rest.ended.count(1)
    assert await bed.leftovers() == []


@virtual
async def test_lingering_claims_go_when_alone() -> None:
    """A worker that leaves alone deletes the claims of ended segments at once; beside another one it leaves them."""
    bed = Bed()
    slow = Slow(0)
    async with bed.queue(on_message=slow) as queue:
        await queue.enqueue(1)
        await slow.ended.count(1)
        await anyio.sleep(1)
        assert len(await bed.keys("claims/")) == 1
    assert await bed.leftovers() == []
    async with bed.queue(on_message=slow) as other:
        await anyio.sleep(1)
        async with bed.queue(on_message=slow) as queue:
            await anyio.sleep(1)
            await other.stop_processing()
            await queue.enqueue(2)
            await slow.ended.count(2)
            await anyio.sleep(1)
            await other.start_processing()
        assert len(await bed.keys("claims/")) == 1


@virtual
async def test_drain_without_a_worker() -> None:
    """A producer's drain has nothing to do, and takes no time."""
    bed = Bed()
    async with bed.queue() as queue:
        await queue.enqueue(1)
        assert await queue.drain() == DrainReport()


@virtual
async def test_drain_while_the_store_is_away() -> None:
    """A drain whose store does not answer ends with clean=False once the lease is over; the message is not lost."""
    bed = Bed()
    slow = Slow(1)
    store, faults = bed.lane()
    async with bed.queue(storage=store, on_message=slow) as queue:
        await queue.enqueue(1)
        await slow.started.count(1)
        faults.unavailable("put", "delete", "delete_many", "list", "get")
        with anyio.fail_after(120):
            report = await queue.drain()
        assert not report.clean
    async with bed.queue(on_message=slow):
        await slow.ended.count(2)
        await anyio.sleep(5)
    assert await bed.live() == {}


@virtual
async def test_not_open() -> None:
    """Before it is opened, and after it was closed, a queue refuses to work; it cannot be opened twice."""
    bed = Bed()
    queue = bed.queue()
    with pytest.raises(QueueClosed):
        await queue.enqueue(1)
    with pytest.raises(QueueClosed):
        await queue.drain()
    async with queue:
        with pytest.raises(QueueClosed):
            await queue.__aenter__()
    with pytest.raises(QueueClosed):
        await queue.stats()
    with pytest.raises(QueueClosed):
        await queue.__aenter__()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_run_until_a_signal(signum: signal.Signals) -> None:
    """run() serves until SIGTERM or SIGINT, then drains and returns the report."""
    started = Seen()
    release = anyio.Event()

    async def handler(payload: object) -> None:
        started(payload)
        await release.wait()

    queue = S3Queue(f"memory://run-{signum}", settings=QUIET, on_message=handler, auto_start=False)
    async with queue:
        await queue.enqueue(1)
        async with anyio.create_task_group() as group:

            async def not_ready() -> bool:
                return not queue.health().ready

            async def stop() -> None:
                await started.count(1)
                os.kill(os.getpid(), signum)
                await eventually(not_ready, every_s=0.01)
                release.set()

            group.start_soon(stop)
            report = await queue.run()
    assert report.clean
    assert report.finished == 1


async def test_a_second_signal_cancels() -> None:
    """While handlers still run, another signal cancels them at once; their messages are handed back."""
    started = Seen()
    cancelled = Seen()

    async def handler(payload: object) -> None:
        started(payload)
        try:
            await anyio.sleep(60)
        finally:
            cancelled(payload)

    queue = S3Queue("memory://run-twice", settings=QUIET, on_message=handler)
    async with anyio.create_task_group() as group:

        async def not_ready() -> bool:
            return not queue.health().ready

        async def stop() -> None:
            await queue.enqueue(1)
            await started.count(1)
            os.kill(os.getpid(), signal.SIGTERM)
            await eventually(not_ready, every_s=0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        async with queue:
            group.start_soon(stop)
            report = await queue.run()
    assert cancelled.items == [1]
    assert report.handed_back == 1
