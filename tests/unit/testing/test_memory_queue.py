"""The queue for users' tests: what it records, when it handles, and what its failures say."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import ANY

import anyio
import anyio.from_thread
import anyio.to_thread
import msgspec
import pytest

from s3queue_async import Context, DeadLetter, InvalidPriority, InvalidSettings, Release, Settings, StoreUnavailable
from s3queue_async.testing import FaultyMemory, MemoryQueue, NotIdle, VirtualLoop, run_virtual
from tests.unit.queue.bed import virtual


class Email(msgspec.Struct):
    to: str
    tags: list[str] = []


@dataclass
class Order:
    number: int
    lines: dict[str, int]


# -- run_until_idle ------------------------------------------------------------------------------------------------


@virtual
async def test_nothing_is_handled_before_it_is_asked_for() -> None:
    """Messages wait for run_until_idle, which handles all of them, and those that handlers enqueue."""
    handled: list[int] = []
    async with MemoryQueue() as queue:

        @queue.handler
        async def handle(number: int) -> None:
            handled.append(number)
            if number > 0:
                await queue.enqueue(number - 1)

        await queue.enqueue(3)
        await asyncio.sleep(100)
        assert handled == []
        report = await queue.run_until_idle()
        assert handled == [3, 2, 1, 0]
        assert (report.completed, report.retried, report.dead, report.errors) == (4, 0, 0, [])
        assert queue.worker_id is None, "it processes no more"
        assert (await queue.run_until_idle()).completed == 0


@virtual
async def test_delays_and_retries_take_no_time() -> None:
    """A month of delay and every backoff go by in virtual time; the store's clock shows it."""
    runs: list[tuple[int, datetime]] = []
    began = time.monotonic()
    async with MemoryQueue(settings=Settings(max_attempts=3, backoff_base=3600, backoff_max=7200)) as queue:

        @queue.handler
        async def fail(payload: str, context: Context) -> None:
            runs.append((context.attempt, queue.now()))
            raise ValueError(payload)

        enqueued_at = queue.now()
        assert abs((enqueued_at - datetime.now(UTC)).total_seconds()) < 60
        await queue.enqueue("no", delay=timedelta(days=30))
        report = await queue.run_until_idle()
        assert [attempt for attempt, _ in runs] == [1, 2, 3]
        assert runs[0][1] - enqueued_at >= timedelta(days=30)
        assert runs[1][1] - runs[0][1] >= timedelta(hours=1)
        assert runs[2][1] - runs[1][1] >= timedelta(hours=2)
        assert (report.completed, report.retried, report.dead) == (0, 2, 1)
        assert [str(error) for error in report.errors] == ["no"] * 3
        assert report.elapsed >= 30 * 86400
        assert [letter.error for letter in await queue.dead_letters.list()] == ["ValueError: no"]
    assert time.monotonic() - began < 10


@virtual
async def test_deliver_at_goes_by_the_wall_clock() -> None:
    """A point in time that the code under test computes from its own clock is met as a delay would be."""
    async with MemoryQueue(on_message=lambda payload: None) as queue:
        await queue.enqueue("x", deliver_at=datetime.now(UTC) + timedelta(minutes=5))
        assert 240 < (await queue.run_until_idle()).elapsed < 360


@virtual
async def test_handlers_errors_can_be_raised() -> None:
    """With raise_errors an assertion that fails in a handler fails the test."""
    async with MemoryQueue(settings=Settings(max_attempts=1)) as queue:

        @queue.handler
        async def check(number: int) -> None:
            assert number == 1, "not one"

        await queue.enqueue(2)
        with pytest.raises(ExceptionGroup) as raised:
            await queue.run_until_idle(raise_errors=True)
        assert isinstance(raised.value.exceptions[0], AssertionError)
        await queue.enqueue(1)
        assert (await queue.run_until_idle(raise_errors=True)).errors == []


@virtual
async def test_no_handler() -> None:
    """Where a message waits and nobody could take it, that is said at once; where none waits, all is well."""
    async with MemoryQueue() as queue:
        await queue.run_until_idle()
        await queue.enqueue(1)
        with pytest.raises(InvalidSettings, match="there is no handler"):
            await queue.run_until_idle()


@virtual
async def test_a_handler_that_enqueues_for_ever() -> None:
    """It ends with NotIdle after runs_max runs."""
    async with MemoryQueue() as queue:

        @queue.handler
        async def again(number: int) -> None:
            await queue.enqueue(number + 1)

        await queue.enqueue(0)
        with pytest.raises(NotIdle, match="more than 50 times"):
            await queue.run_until_idle(runs_max=50)


@virtual
async def test_a_handler_that_never_ends() -> None:
    """It ends with NotIdle once patience is over, which names the message; a handler that takes shorter does not."""
    async with MemoryQueue(settings=Settings(drain_timeout=1, coordinator=False)) as queue:

        @queue.handler
        async def handle(seconds: float) -> None:
            await asyncio.sleep(seconds)

        await queue.enqueue(500)
        assert (await queue.run_until_idle(patience=600)).completed == 1
        message_id = await queue.enqueue(10_000)
        with pytest.raises(NotIdle, match=f"message {message_id} .attempt 1. has been running"):
            await queue.run_until_idle(patience=timedelta(minutes=10))


@virtual
async def test_bad_arguments() -> None:
    """Each says what is allowed."""
    async with MemoryQueue() as queue:
        with pytest.raises(InvalidSettings, match=r"runs_max=0 must be a whole number, 1 to 1000000"):
            await queue.run_until_idle(runs_max=0)
        with pytest.raises(InvalidSettings, match=r"patience=0 must be above 0"):
            await queue.run_until_idle(patience=0)
        with pytest.raises(InvalidSettings, match=r"times=0 must be a whole number"):
            queue.assert_enqueued(times=0)
        with pytest.raises(TypeError, match="no field 'prio'; there are: payload, priority"):
            queue.assert_enqueued(prio=1)  # type: ignore[call-arg]


@virtual
async def test_processing_of_its_own_accord_goes_on() -> None:
    """With auto_start it is as in production, and run_until_idle waits for what is left."""
    handled: list[int] = []
    async with MemoryQueue(auto_start=True, on_message=handled.append) as queue:
        await queue.enqueue(1)
        await asyncio.sleep(10)
        assert handled == [1]
        await queue.enqueue(2, delay=5)
        await queue.run_until_idle()
        assert handled == [1, 2]
        assert queue.worker_id is not None


@virtual
async def test_received_messages_come_back() -> None:
    """What the test receives and does not acknowledge is due again after visibility_timeout."""
    handled: list[Any] = []
    async with MemoryQueue(on_message=handled.append) as queue:
        await queue.enqueue("x")
        assert len(await queue.receive(wait=1)) == 1
        report = await queue.run_until_idle()
        assert handled == ["x"]
        assert report.elapsed > 29


@virtual
async def test_released_messages() -> None:
    """Release is no error of the queue's: it is handled again at its time."""
    attempts: list[int] = []
    async with MemoryQueue() as queue:

        @queue.handler
        async def handle(payload: str, context: Context) -> None:
            attempts.append(context.attempt)
            if len(attempts) < 3:
                raise Release(delay=60)

        await queue.enqueue("x")
        report = await queue.run_until_idle()
        assert attempts == [1, 1, 1]
        assert (report.completed, report.retried) == (1, 0)
        assert report.elapsed > 119


@virtual
async def test_tracing_is_passed_on() -> None:
    """What production gives as tracing sees its enqueues and its handlers here, too."""
    seen: list[str] = []

    class Trace:
        def outgoing(self, headers: Any) -> dict[str, str]:
            return {**(headers or {}), "trace": "1"}

        @contextmanager
        def handling(self, context: Context) -> Iterator[None]:
            seen.append(f"begin {context.headers['trace']}")
            try:
                yield
            except DeadLetter:
                seen.append("dead")
                raise

    async with MemoryQueue(tracing=Trace()) as queue:

        @queue.handler
        async def handle(payload: str) -> None:
            raise DeadLetter("no")

        await queue.enqueue("x", headers={"a": "b"})
        await queue.run_until_idle()
    assert seen == ["begin 1", "dead"]


@virtual
async def test_schedules_and_middleware() -> None:
    """Schedules tick as time goes by, where the queue was told to have them; middleware is around the handler."""
    handled: list[Any] = []
    passed: list[str] = []

    async def note(message: Any, call_next: Any) -> Any:
        passed.append(message.payload)
        return await call_next(message)

    async with MemoryQueue(scheduler=True, middleware=[note], on_message=handled.append) as queue:
        await queue.schedule(every=timedelta(hours=1), payload="tick")
        await asyncio.sleep(10 * 3600 + 60)
        assert handled == []
        assert (await queue.run_until_idle()).completed == 10
        assert handled == passed == ["tick"] * 10


@virtual
async def test_two_queues_on_one_store() -> None:
    """What one enqueues the other handles; the store outlives both."""
    store = FaultyMemory()
    handled: list[Any] = []
    async with MemoryQueue(store=store) as front, MemoryQueue(store=store, on_message=handled.append) as back:
        await front.enqueue("x")
        await back.run_until_idle()
        assert handled == ["x"]
        await front.enqueue("left")
    async with MemoryQueue(store=store, on_message=handled.append) as later:
        await later.run_until_idle()
    assert handled == ["x", "left"]


@virtual
async def test_a_store_that_fails() -> None:
    """Enqueues and handlers get through short failures; what the store refuses for good is told."""
    handled: list[Any] = []
    async with MemoryQueue(on_message=handled.append) as queue:
        queue.store.unavailable(times=5)
        await queue.enqueue("x")
        queue.store.throttle("put", "delete", times=2)
        queue.store.lose_reply("put", times=1)
        await queue.run_until_idle()
        assert handled == ["x"]
        queue.store.unavailable("put", retriable=False)
        with pytest.raises(StoreUnavailable):
            await queue.enqueue("y")
        assert len(queue.enqueued) == 1
        queue.store.clear()


# -- threads -------------------------------------------------------------------------------------------------------


@virtual
async def test_sync_handlers_run_in_threads() -> None:
    """Virtual time goes no faster than the threads that work: no timeout comes early, and the end is waited for."""
    names: set[str] = set()
    async with MemoryQueue(settings=Settings(handler_timeout=5, coordinator=False)) as queue:

        @queue.handler
        def work(number: int) -> int:
            names.add(threading.current_thread().name)
            time.sleep(0.05)
            return number

        await queue.enqueue_many(range(3))
        report = await queue.run_until_idle()
        assert report.completed == 3
        assert report.errors == []
        assert report.elapsed < 5
    assert threading.current_thread().name not in names


@virtual
async def test_threads_of_the_handlers_own() -> None:
    """Those of asyncio and of anyio count, and they may call back."""
    async with MemoryQueue(settings=Settings(handler_timeout=5, coordinator=False)) as queue:

        @queue.handler
        async def work(number: int) -> None:
            await asyncio.to_thread(time.sleep, 0.02)
            await anyio.to_thread.run_sync(time.sleep, 0.02)
            await anyio.to_thread.run_sync(lambda: anyio.from_thread.run(anyio.sleep, 0.02))

        await queue.enqueue(1)
        report = await queue.run_until_idle()
        assert (report.completed, report.errors) == (1, [])


def test_virtual_loop_waits_for_watched_threads() -> None:
    """As long as somebody says that threads are at work, time goes at its real pace; then it jumps."""

    async def main() -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        began = time.monotonic()
        off = loop.watch_threads(lambda: True)
        await asyncio.sleep(0.05)
        slow = time.monotonic() - began
        off()
        await asyncio.sleep(3600)
        return slow, time.monotonic() - began

    slow, whole = run_virtual(main)
    assert slow >= 0.04
    assert whole < 60


# -- without virtual time ------------------------------------------------------------------------------------------


async def test_on_an_ordinary_loop() -> None:
    """It works on whatever loop runs: delays are waited for there."""
    handled: list[Any] = []
    began = time.monotonic()
    async with MemoryQueue(on_message=handled.append) as queue:
        await queue.enqueue("x", delay=0.2)
        await queue.run_until_idle()
    assert handled == ["x"]
    assert time.monotonic() - began >= 0.1


# -- the record ----------------------------------------------------------------------------------------------------


@virtual
async def test_the_record() -> None:
    """Everything that was passed is there, in order, durations in seconds; duplicates and what failed are not."""
    async with MemoryQueue() as queue:
        at = datetime.now(UTC) + timedelta(hours=1)
        first = await queue.enqueue("a", priority=9, delay=timedelta(minutes=1), headers={"k": "v"}, max_attempts=2)
        assert await queue.enqueue("b", dedup_id="once", deliver_at=at) == await queue.enqueue("b", dedup_id="once")
        ids = await queue.enqueue_many(iter("cd"), priority=1, expires_in=5)

        async def numbers() -> AsyncIterator[str]:
            yield "e"

        await queue.enqueue_many(numbers(), dedup_id=lambda payload: f"id-{payload}")
        with pytest.raises(InvalidPriority):
            await queue.enqueue("never", priority=-1)
        rows = [(m.payload, m.priority, m.delay, m.dedup_id, m.expires_in) for m in queue.enqueued]
        assert rows == [
            ("a", 9, 60.0, None, None),
            ("b", 0, None, "once", None),
            ("c", 1, None, None, 5.0),
            ("d", 1, None, None, 5.0),
            ("e", 0, None, "id-e", None),
        ]
        assert (queue.enqueued[0].id, queue.enqueued[0].headers, queue.enqueued[0].max_attempts) == (
            first,
            {"k": "v"},
            2,
        )
        assert queue.enqueued[1].deliver_at == at
        assert [message.id for message in queue.enqueued[2:4]] == ids


def failure(queue: MemoryQueue[Any], **expected: Any) -> list[str]:
    with pytest.raises(AssertionError) as raised:
        queue.assert_enqueued(**expected)
    return str(raised.value).splitlines()


@virtual
async def test_assertions_that_hold() -> None:
    """Any of the fields, ANY inside of a payload, a number of times."""
    async with MemoryQueue() as queue:
        queue.assert_not_enqueued()
        await queue.enqueue(Email("a", ["x"]), priority=5, delay=60)
        await queue.enqueue(Email("b"), priority=5)
        assert queue.assert_enqueued(payload=Email("b")).priority == 5
        assert queue.assert_enqueued() is queue.enqueued[0]
        queue.assert_enqueued(priority=5, times=2)
        queue.assert_enqueued(payload=Email("a", ANY), delay=timedelta(minutes=1), times=1)
        queue.assert_not_enqueued(payload=Email("c"))
        queue.assert_not_enqueued(payload=Email("b"), delay=60)
        queue.enqueued.clear()
        queue.assert_not_enqueued()


@virtual
async def test_what_failures_say() -> None:
    """The nearest message comes first, and each place where it differs is named."""
    async with MemoryQueue() as queue:
        assert failure(queue, payload=1) == [
            "No message was enqueued with",
            "  payload = 1",
            "Nothing was enqueued at all.",
        ]
        far = await queue.enqueue("something else")
        near = await queue.enqueue(Email("b@example.com", ["x", "y"]), priority=5)
        lines = failure(queue, payload=Email("a@example.com", ["x", "z", "w"]), priority=5)
        assert lines[:4] == [
            "No message was enqueued with",
            "  payload = Email(to='a@example.com', tags=['x', 'z', 'w'])",
            "  priority = 5",
            "2 messages were enqueued; the nearest:",
        ]
        first, second = (next(i for i, line in enumerate(lines) if name in line) for name in (far, near))
        assert first < second, "fewer differences: the payload is another kind altogether, and the priority differs"
        assert lines[second + 1 :] == [
            "    payload.to: 'b@example.com', expected 'a@example.com'",
            "    payload.tags[1]: 'y', expected 'z'",
            "    payload.tags[2]: missing, expected 'w'",
        ]


@virtual
async def test_what_failures_say_of_mappings_and_dataclasses() -> None:
    """Their parts are named, too; what is too much is named as such; long values are cut."""
    async with MemoryQueue() as queue:
        await queue.enqueue({"order": Order(1, {"pen": 2, "ink": 1}), "text": "t" * 1000})
        lines = failure(queue, payload={"order": Order(1, {"pen": 3}), "text": ""})
        assert lines[-3:-1] == [
            "    payload['order'].lines['pen']: 2, expected 3",
            "    payload['order'].lines['ink']: 1, not expected",
        ]
        assert len(lines[-1]) < 300
        for _ in range(4):
            await queue.enqueue(0)
        assert failure(queue, payload=1)[-1] == "- and 2 more"


@virtual
async def test_what_failures_say_of_numbers() -> None:
    """Too few or too many: how many there were."""
    async with MemoryQueue() as queue:
        await queue.enqueue(1)
        assert failure(queue, payload=1, times=2)[0] == "1 and not 2 enqueued with"
        assert failure(queue, times=3)[0] == "1 and not 3 enqueued"
        with pytest.raises(AssertionError, match=r"(?s)No message should be enqueued with.*priority = 0.*but 1 were"):
            queue.assert_not_enqueued(priority=0)
        with pytest.raises(AssertionError, match=r"No message should be enqueued\nbut 1 were"):
            queue.assert_not_enqueued()
