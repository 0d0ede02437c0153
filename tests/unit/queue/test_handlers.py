"""Handlers: their shapes, threads, registration, and those that block the event loop."""

from __future__ import annotations

import asyncio
import functools
import threading
from typing import Any

import anyio
import pytest

from s3queue_async import Context, S3Queue, Settings
from s3queue_async.errors import InvalidSettings
from s3queue_async.events import LeaseLostEvent, LoopBlocked
from s3queue_async.testing.clock import advance
from tests.unit.queue.bed import QUIET, Bed, Seen, virtual


class Callables:
    """Every shape that a handler may have; each tells what it got."""

    def __init__(self, seen: Seen) -> None:
        self.seen = seen

    async def payload_alone(self, payload: Any) -> None:
        self.seen((payload, None))

    async def with_context(self, payload: Any, context: Context) -> None:
        self.seen((payload, context.attempt))

    async def other_names(self, email: Any, c: Context) -> None:
        self.seen((email, c.attempt))

    async def context_by_default(self, payload: Any, context: Context | None = None) -> None:
        self.seen((payload, None if context is None else context.attempt))

    async def option(self, payload: Any, loud: bool = False) -> None:
        self.seen((payload, loud or None))

    async def star(self, *arguments: Any) -> None:
        self.seen((arguments[0], None if len(arguments) == 1 else arguments[1].attempt))

    async def __call__(self, payload: Any, context: Context) -> None:
        self.seen((payload, context.attempt))


@pytest.mark.parametrize(
    ("name", "second"),
    [
        ("payload_alone", None), ("with_context", 1), ("other_names", 1), ("context_by_default", 1), ("option", None),
        ("star", None), ("", 1), ("partial", 1),
    ],
)  # fmt: skip
@virtual
async def test_shapes(name: str, second: int | None) -> None:
    """(payload), (payload, context), methods, callable objects, partials: each is called with what it takes."""
    bed = Bed()
    seen = Seen()
    handler: Any = Callables(seen)
    if name == "partial":
        handler = functools.partial(Callables.with_context, handler)
    elif name:
        handler = getattr(handler, name)
    async with bed.queue(on_message=handler) as queue:
        await queue.enqueue("x")
        assert await seen.count(1) == [("x", second)]


def no_parameters() -> None: ...


def three(a: Any, b: Any, c: Any) -> None: ...


def keyword_needed(payload: Any, *, must: int) -> None: ...


@pytest.mark.parametrize("handler", [no_parameters, three, keyword_needed, "text", 5])
def test_bad_shapes(handler: Any) -> None:
    """What cannot be called with a payload is refused at registration, by name, before anything is opened."""
    with pytest.raises(InvalidSettings, match="handler"):
        S3Queue("memory://shapes", on_message=handler)


@pytest.mark.parametrize("concurrency", [0, -1, 10_001, 1.5, True])
def test_bad_concurrency(concurrency: Any) -> None:
    """concurrency must be a whole number from 1 to 10,000."""
    with pytest.raises(InvalidSettings, match="concurrency"):
        S3Queue("memory://shapes", on_message=lambda payload: None, concurrency=concurrency)


async def test_sync_handlers_run_in_threads() -> None:
    """A sync function runs in a thread, as many at a time as concurrency says, and its result is the result."""
    barrier = threading.Barrier(4, timeout=10)
    threads: set[int] = set()
    completed = Seen()

    def handler(payload: int, context: Context) -> int:
        threads.add(threading.get_ident())
        barrier.wait()
        return payload * 2

    async with S3Queue("memory://sync", settings=QUIET, on_message=handler, concurrency=4) as queue:
        queue.on("message.completed", completed)
        await queue.enqueue_many(range(8))
        events = await completed.count(8)
    assert sorted(event.result for event in events) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert threading.main_thread().ident not in threads
    assert len(threads) == 4


async def test_a_sync_handler_that_raises() -> None:
    """An exception in a thread is a failed attempt like any other."""
    retries = Seen()
    settings = Settings(coordinator=False, max_attempts=2, backoff_base=0)

    def handler(payload: int) -> None:
        raise ValueError("in a thread")

    async with S3Queue("memory://raises", settings=settings, on_message=handler, on_error=retries) as queue:
        await queue.enqueue(1)
        events = await retries.count(2)
    assert [event.error for event in events] == ["ValueError: in a thread"] * 2


@virtual
async def test_the_decorator() -> None:
    """@queue.handler registers and starts; a second handler is refused while the first one works."""
    bed = Bed()
    seen = Seen()
    async with bed.queue() as queue:

        @queue.handler
        async def first(payload: object) -> None:
            seen(payload)

        with pytest.raises(InvalidSettings, match="first"):

            @queue.handler(concurrency=3)
            async def second(payload: object) -> None: ...

        await queue.enqueue("x")
        await seen.count(1)
        assert seen.items == ["x"]
    assert asyncio.iscoroutinefunction(first)


@virtual
async def test_start_and_stop_processing() -> None:
    """After stop_processing nothing is handled and no worker is registered; another handler may then start."""
    bed = Bed()
    one, two = Seen(), Seen()

    async def first(payload: object) -> None:
        one(payload)

    async def second(payload: object) -> None:
        two(payload)

    async with bed.queue() as queue:
        with pytest.raises(InvalidSettings, match="no handler"):
            await queue.start_processing()
        await queue.start_processing(first, concurrency=2)
        assert queue.health().worker_id is not None
        await queue.enqueue(1)
        await one.count(1)
        await queue.stop_processing()
        assert queue.worker_id is None
        assert await queue.workers() == []
        await queue.enqueue(2)
        await anyio.sleep(60)
        assert (one.items, two.items) == ([1], [])
        await queue.start_processing(second)
        await two.count(1)
        await queue.stop_processing()
        await queue.stop_processing()
        await queue.start_processing()
        await queue.enqueue(3)
        await two.count(2)
    assert (one.items, two.items) == ([1], [2, 3])
    assert await bed.leftovers() == []


@virtual
async def test_auto_start_off() -> None:
    """With auto_start=False a handler waits for start_processing."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: object) -> None:
        seen(payload)

    async with bed.queue(on_message=handler, auto_start=False) as queue:
        await queue.enqueue(1)
        await anyio.sleep(60)
        assert seen.items == []
        assert queue.worker_id is None
        await queue.start_processing()
        await seen.count(1)


@pytest.mark.parametrize("first_step", [False, True])
@virtual
async def test_a_handler_that_blocks_the_loop_is_named(first_step: bool) -> None:
    """A step of more than 1 s emits loop.blocked with the handler's name, the message and the seconds."""
    bed = Bed()
    blocked, completed = Seen(), Seen()

    async def parse_everything(payload: float) -> None:
        if not first_step:
            await anyio.sleep(1)
        advance(payload)

    async with bed.queue(on_message=parse_everything, on_complete=completed) as queue:
        queue.on("loop.blocked", blocked)
        await queue.enqueue(0.9)
        await completed.count(1)
        assert blocked.items == []
        message_id = await queue.enqueue(3.5)
        await completed.count(2)
    (event,) = blocked.items
    assert isinstance(event, LoopBlocked)
    assert "parse_everything" in event.handler
    assert event.message_id == message_id
    assert event.seconds == pytest.approx(3.5)


@virtual
async def test_a_block_of_15_s_loses_nothing() -> None:
    """With default settings, 15 s without the event loop cost no lease, and nothing is handled twice."""
    bed = Bed()
    handled: list[int] = []
    done, lost = Seen(), Seen()

    async def handler(payload: int) -> None:
        await anyio.sleep(0.2)
        if payload == 3:
            advance(15)
        await anyio.sleep(0.2)
        handled.append(payload)
        done(payload)

    async with bed.queue(on_message=handler) as queue, bed.queue(on_message=handler) as other:
        queue.on("lease.lost", lost)
        other.on("lease.lost", lost)
        await anyio.sleep(1)
        ids = (queue.worker_id, other.worker_id)
        await queue.enqueue_many(range(40))
        await done.count(40)
        await anyio.sleep(60)
        assert (queue.worker_id, other.worker_id) == ids
    assert sorted(handled) == list(range(40))
    assert lost.items == []


@virtual
async def test_a_block_of_60_s_loses_the_lease() -> None:
    """Past its trust the worker settles nothing, comes back under a new id, and the message is done in the end.

    Of the messages in hand at the block some may be handled twice; none is lost, and the others pay no attempt.
    """
    bed = Bed()
    runs: list[tuple[int, int]] = []
    completed, lost, started = Seen(), Seen(), Seen()

    async def handler(payload: int, context: Context) -> None:
        runs.append((payload, context.attempt))
        if payload == 3 and sum(number == 3 for number, _ in runs) == 1:
            await anyio.sleep(1)
            advance(60)
        await anyio.sleep(0.1)

    async with bed.queue(on_message=handler, on_complete=completed) as queue:
        queue.on("lease.lost", lost)
        queue.on("workers.started", started)
        await anyio.sleep(1)
        first_id = queue.worker_id
        ids = await queue.enqueue_many(range(10))
        await completed.until(lambda events: {event.message_id for event in events} == set(ids))
        await anyio.sleep(20)
        assert queue.worker_id != first_id
        assert queue.worker_id is not None
        stats = await queue.stats(exact=True)
        assert (stats.pending, stats.processing, stats.dead) == (0, 0, 0)
    assert all(isinstance(event, LeaseLostEvent) and event.worker_id == first_id for event in lost.items)
    assert sorted(message_id for event in lost.items for message_id in event.message_ids) == sorted(ids)
    assert all(number in {payload for payload, _ in runs} for number in range(10))
    assert {attempt for payload, attempt in runs if payload != 3} == {1}
    assert await bed.live() == {}


@virtual
async def test_a_handler_that_returns_after_its_lease_completes_nothing() -> None:
    """It blocks the loop past the lease and returns at once: one completed event, one counted, both of the second run."""
    bed = Bed()
    workers: list[str] = []
    completed = Seen()

    async def handler(payload: int, context: Context) -> None:
        workers.append(context.worker_id)
        if len(workers) == 1:
            advance(60)

    async with bed.queue(on_message=handler, on_complete=completed) as queue:
        await queue.enqueue(1)
        await completed.count(1)
        await anyio.sleep(60)
        assert (await queue.stats(exact=True)).completed == 1
    assert len(workers) == 2
    assert [event.worker_id for event in completed.items] == workers[1:]


@virtual
async def test_a_worker_that_slept_through_its_lease_settles_nothing() -> None:
    """Another worker took over meanwhile: the sleeper's result does not count, its handler is told by lease_lost."""
    bed = Bed()
    told = Seen()
    done = Seen()
    store, faults = bed.lane()

    async def sleeper(payload: str, context: Context) -> None:
        await context.lease_lost.wait()
        told(context.token)

    async def taker(payload: str, context: Context) -> None:
        done((payload, context.token, context.attempt))

    async with bed.queue(storage=store, on_message=sleeper) as one:
        await one.enqueue("x")
        await anyio.sleep(1)
        faults.unavailable("put", "get", "delete", "list")
        async with bed.queue(on_message=taker):
            await done.count(1)
        faults.clear()
        await anyio.sleep(5)
    assert done.items == [("x", 2, 1)]
    assert told.items == [] or told.items == [1]
    assert await bed.live() == {}
