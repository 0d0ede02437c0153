"""Whoever waits for something is told what became of it, also when it ends, fails, is cancelled or lost at that moment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from s3queue_async import DeadLetter, Message, Retry, S3Queue, Settings
from s3queue_async.errors import LeaseLost, QueueClosed, QueueError, StoreUnavailable
from s3queue_async.events import Event, LeaseLostEvent
from tests.unit.queue.bed import Bed, eventually, virtual

SETTINGS = Settings(coordinator=False)
WAITS_MAX_S = 300.0


async def outcome(waiting: Awaitable[Any]) -> Any:
    """What it returns, or the queue's error that it raises."""
    with anyio.fail_after(WAITS_MAX_S):
        try:
            return await waiting
        except QueueError as error:
            return error


# -- acknowledging ---------------------------------------------------------------------------------------------------


@virtual
async def test_the_lease_is_lost_while_an_acknowledgement_is_recorded() -> None:
    """The store is out of reach from then on: the acknowledgement raises LeaseLost."""
    bed = Bed()
    lane, faults = bed.lane()
    async with bed.queue(storage=lane) as queue:
        await queue.enqueue("x")
        (message,) = await queue.receive(1, wait=5)
        gate = faults.hold("delete", "delete_many", "put", times=None)
        assert isinstance(await outcome(message.ack()), LeaseLost)
        gate.open()


@virtual
async def test_the_program_is_cancelled_while_another_task_acknowledges() -> None:
    """The task that has the queue open is cancelled twice, so that it does not drain: who acknowledges is told."""
    bed = Bed()
    lane, faults = bed.lane()
    received: list[Message[Any]] = []
    outcomes: list[Any] = []

    async def program() -> None:
        async with bed.queue(storage=lane) as queue:
            await queue.enqueue_many(["first", "second"])
            received.extend(await queue.receive(2, wait=5))
            await anyio.sleep_forever()

    async def acknowledge(message: Message[Any]) -> None:
        outcomes.append(await outcome(message.ack()))

    holder = asyncio.create_task(program())
    await eventually(lambda: _is(len(received) == 2))
    gate = faults.hold("put", "delete", "delete_many", key="claims/*", times=None)
    async with anyio.create_task_group() as group:
        group.start_soon(acknowledge, received[0])
        holder.cancel()
        await anyio.sleep(1)
        holder.cancel()
        group.start_soon(acknowledge, received[1])
        await asyncio.wait({holder})
        gate.open()
    assert [type(error) for error in outcomes] == [LeaseLost, LeaseLost]


# -- enqueueing ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cancelled", [{0}, {1}, {0, 1}, {0, 1, 2}])
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside another"])
@virtual
async def test_one_of_several_that_enqueue_the_same_is_cancelled(cancelled: set[int], beside: bool) -> None:
    """Three callers share a message by its deduplication id: it goes as long as one of them waits for it."""
    bed = Bed()
    ids: dict[int | str, str] = {}
    async with bed.queue() as queue:
        gate = bed.faults.hold("put", key="ready/*", times=1)
        scopes = [anyio.CancelScope() for _ in range(3)]

        async def enqueue(payload: str) -> None:
            ids[payload] = await queue.enqueue(payload)

        async def enqueue_once(number: int) -> None:
            with scopes[number]:
                ids[number] = await outcome(queue.enqueue("shared", dedup_id="shared"))

        async with anyio.create_task_group() as group:
            group.start_soon(enqueue, "first")
            await gate.reached.wait()
            for number in range(3):
                group.start_soon(enqueue_once, number)
            if beside:
                group.start_soon(enqueue, "beside")
            await anyio.sleep(0.1)
            for number in cancelled:
                scopes[number].cancel()
            await anyio.sleep(0.1)
            gate.open()
        shared = {ids.pop(number) for number in range(3) if number not in cancelled}
        assert len(shared) == (0 if len(cancelled) == 3 else 1)
        assert sorted(await bed.live()) == sorted({*ids.values(), *shared})


@pytest.mark.parametrize("bulk", [False, True])
@virtual
async def test_the_program_is_cancelled_while_enqueues_wait_for_room(bulk: bool) -> None:
    """The store hangs, so many wait to be written: when the queue goes without a drain, each of them is told."""
    bed = Bed()
    opened: list[S3Queue[Any]] = []
    outcomes: list[Any] = []

    async def program() -> None:
        async with bed.queue(settings=Settings(coordinator=False, segment_messages_max=1)) as queue:
            opened.append(queue)
            await anyio.sleep_forever()

    async def enqueue(number: int) -> None:
        call = opened[0].enqueue_many([number]) if bulk else opened[0].enqueue(number)
        outcomes.append(await outcome(call))

    holder = asyncio.create_task(program())
    await eventually(lambda: _is(bool(opened)))
    gate = bed.faults.hold("put", key="ready/*", times=None)
    async with anyio.create_task_group() as group:
        for number in range(60):
            group.start_soon(enqueue, number)
        await anyio.sleep(1)
        holder.cancel()
        await anyio.sleep(1)
        holder.cancel()
        await asyncio.wait({holder})
    gate.open()
    assert {type(error) for error in outcomes} <= {QueueClosed, StoreUnavailable}
    assert len(outcomes) == 60


# -- events ----------------------------------------------------------------------------------------------------------


@virtual
async def test_events_of_a_closed_queue() -> None:
    """Who begins to read them once the queue is closed reads none."""
    bed = Bed()
    async with bed.queue() as queue:
        events = queue.events()
    assert await outcome(_all_of(events)) == []
    assert await outcome(_all_of(queue.events())) == []


async def _all_of(events: AsyncIterator[Event]) -> list[Event]:
    return [event async for event in events]


# -- dead letters ----------------------------------------------------------------------------------------------------


@virtual
async def test_redriven_at_any_moment_of_a_drain() -> None:
    """A redrive that the queue's end overtakes raises, or has done what it says."""
    for moments in range(0, 160, 2):
        bed = Bed()
        await _let_die(bed, 3)
        async with bed.queue() as queue, anyio.create_task_group() as group:
            outcomes: list[Any] = []

            async def redrive(queue: S3Queue[Any], outcomes: list[Any]) -> None:
                outcomes.append(await outcome(queue.dead_letters.redrive()))

            group.start_soon(redrive, queue, outcomes)
            for _ in range(moments):
                await anyio.lowlevel.checkpoint()
            await outcome(queue.drain())
        assert outcomes == [3] or isinstance(outcomes[0], QueueError)


@pytest.mark.parametrize("operation", ["put", "delete"])
@virtual
async def test_the_lease_is_lost_during_a_redrive(operation: str) -> None:
    """The store is out of reach for longer than the lease lasts: the redrive raises LeaseLost."""
    bed = Bed()
    await _let_die(bed, 3)
    lane, faults = bed.lane()
    async with bed.queue(storage=lane) as queue, anyio.create_task_group() as group:
        gate = faults.hold(operation, key="claims/*" if operation == "put" else "dead/*", times=1)

        async def cut_off() -> None:
            await gate.reached.wait()
            faults.unavailable("put", key="plugin/workers/*")
            await anyio.sleep(60)
            faults.clear()
            gate.open()

        group.start_soon(cut_off)
        assert isinstance(await outcome(queue.dead_letters.redrive()), LeaseLost)


# -- registering -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["receive", "start_processing"])
@virtual
async def test_the_first_registration_fails(how: str) -> None:
    """Who waits for it goes on once a later one works."""
    bed = Bed()
    async with bed.queue() as queue, bed.queue() as producer, anyio.create_task_group() as group:
        await producer.enqueue("x")
        away = bed.faults.unavailable("put", key="plugin/workers/*")

        async def come_back() -> None:
            await anyio.sleep(60)
            bed.faults.remove(away)

        group.start_soon(come_back)
        began = anyio.current_time()
        if how == "receive":
            (message,) = await outcome(queue.receive(1))
            await message.ack()
        else:
            await outcome(queue.start_processing(_handle))
        assert queue.worker_id in [worker.id for worker in await queue.workers()]
        assert 60 <= anyio.current_time() - began < 100


@virtual
async def test_drained_while_nobody_can_register() -> None:
    """Who waits for the registration is told."""
    bed = Bed()
    async with bed.queue() as queue, anyio.create_task_group() as group:
        bed.faults.unavailable("put", key="plugin/workers/*")
        outcomes: list[Any] = []

        async def receive() -> None:
            outcomes.append(await outcome(queue.receive(1)))

        group.start_soon(receive)
        await anyio.sleep(3)
        await outcome(queue.drain())
        await eventually(lambda: _is(len(outcomes) == 1))
        assert isinstance(outcomes[0], QueueClosed)


# -- one look --------------------------------------------------------------------------------------------------------


def _look(queue: S3Queue[Any], how: str) -> Awaitable[Any]:
    return queue.receive(1, wait=0) if how == "receive" else queue.process_next()


@pytest.mark.parametrize("how", ["receive", "process_next"])
@virtual
async def test_the_lease_is_lost_during_a_look(how: str) -> None:
    """The store is out of reach: a call that is to look once returns when the lease is lost."""
    bed = Bed()
    lane, faults = bed.lane()
    async with bed.queue(storage=lane, auto_start=False, on_message=_handle) as queue:
        await _look(queue, how)
        gate = faults.hold("list", "put", times=None)
        assert await outcome(_look(queue, how)) in ([], False)
        gate.open()


@pytest.mark.parametrize("how", ["receive", "process_next"])
@virtual
async def test_drained_at_any_moment_of_a_look(how: str) -> None:
    """It returns, having found nothing, or raises QueueClosed."""
    for moments in range(40):
        bed = Bed()
        outcomes: list[Any] = []

        async def look(queue: S3Queue[Any], outcomes: list[Any] = outcomes) -> None:
            outcomes.append(await outcome(_look(queue, how)))

        async with bed.queue(auto_start=False, on_message=_handle) as queue, anyio.create_task_group() as group:
            await _look(queue, how)
            group.start_soon(look, queue)
            for _ in range(moments):
                await anyio.lowlevel.checkpoint()
            await queue.drain()
        assert outcomes[0] in ([], False) or isinstance(outcomes[0], QueueClosed)


@pytest.mark.parametrize("how", ["delay", "retry"])
@virtual
async def test_delayed_while_the_delayed_are_listed(how: str) -> None:
    """A message that the listing under way does not show is handled when it is due."""
    bed = Bed()
    handled: list[float] = []

    async def handle(payload: str) -> None:
        if how == "retry" and not handled:
            handled.append(0.0)
            raise Retry(delay=2)
        handled.append(anyio.current_time())

    settings = Settings(coordinator=False, max_poll_interval=60)
    async with bed.queue(settings=settings, on_message=handle) as queue:
        await anyio.sleep(200)
        gate = bed.faults.hold_reply("list", key="delayed/*")
        await gate.reached.wait()
        enqueued_at = anyio.current_time()
        await queue.enqueue("x", delay=2 if how == "delay" else None)
        await eventually(lambda: _is(how == "delay" or any(key.startswith("delayed/") for key in bed.bodies())))
        gate.open()
        await eventually(lambda: _is(bool(handled) and handled[-1] > 0))
        assert 2 <= handled[-1] - enqueued_at < 4


# -- stopping and starting -------------------------------------------------------------------------------------------


@virtual
async def test_received_at_any_moment_of_a_stop() -> None:
    """Who receives while the worker stops gets the messages from the next one."""
    for moments in range(60):
        bed = Bed()
        async with bed.queue() as queue:
            await queue.enqueue("first")
            await (await queue.receive(1))[0].ack()
            await queue.enqueue("second")
            stopped = queue.stop_processing()
            for _ in range(moments):
                await anyio.lowlevel.checkpoint()
            began = anyio.current_time()
            (message,) = await outcome(queue.receive(1))
            assert (message.payload, anyio.current_time() - began < 5) == ("second", True)
            await message.ack()
            await stopped


@pytest.mark.parametrize("running", [False, True])
@virtual
async def test_started_at_any_moment_of_a_stop(running: bool) -> None:
    """A worker that is stopped and started again handles messages, whenever it is started."""
    for moments in range(60):
        bed = Bed()
        handled: list[str] = []

        async def handle(payload: str, handled: list[str] = handled) -> None:
            await anyio.sleep(3 if payload == "slow" else 0)
            handled.append(payload)

        async with bed.queue() as queue:
            await queue.start_processing(handle)
            if running:
                await queue.enqueue("slow")
                await anyio.sleep(1)
            stopped = queue.stop_processing()
            for _ in range(moments):
                await anyio.lowlevel.checkpoint()
            await outcome(queue.start_processing())
            await outcome(stopped)
            await queue.enqueue("after it")
            await eventually(partial(_contains, handled, "after it"))
            assert running == ("slow" in handled)


@virtual
async def test_a_handler_begins_at_any_moment_of_the_loss_of_the_lease() -> None:
    """It runs under the next lease."""
    for moments in range(30):
        bed = Bed()
        lost = anyio.Event()
        handled: list[Any] = []
        async with bed.queue(
            settings=Settings(coordinator=False, visibility_timeout=3, heartbeat_interval=0.9)
        ) as queue:
            await queue.receive(1, wait=0)
            queue.on(LeaseLostEvent.name, partial(_set, lost))
            away = bed.faults.unavailable("put", key="plugin/workers/*")
            await lost.wait()
            bed.faults.remove(away)
            for _ in range(moments):
                await anyio.lowlevel.checkpoint()
            queue.handler(_appending(handled))
            await queue.enqueue("x")
            await eventually(partial(_contains, handled, "x"))


@virtual
async def test_stopped_while_nobody_can_register() -> None:
    """Who waits for the start goes on."""
    bed = Bed()
    async with bed.queue() as queue:
        away = bed.faults.unavailable("put", key="plugin/workers/*")
        started = queue.start_processing(_handle)
        await anyio.sleep(3)
        stopped = queue.stop_processing()
        await outcome(started)
        await outcome(stopped)
        bed.faults.remove(away)


@virtual
async def test_a_handler_begins_while_dead_letters_are_redriven() -> None:
    """It goes on after that, and so does a second redrive that began during the first."""
    for moments in range(0, 200, 5):
        bed = Bed()
        await _let_die(bed, 2)
        handled: list[Any] = []
        counts: list[int] = []
        async with bed.queue() as queue, anyio.create_task_group() as group:

            async def redrive(queue: S3Queue[Any] = queue, counts: list[int] = counts) -> None:
                counts.append(await outcome(queue.dead_letters.redrive()))

            group.start_soon(redrive)
            for _ in range(moments // 2):
                await anyio.lowlevel.checkpoint()
            group.start_soon(redrive)
            for _ in range(moments // 2):
                await anyio.lowlevel.checkpoint()
            queue.handler(_appending(handled))
            await eventually(partial(_contains, handled, 0))
            await eventually(partial(_contains, handled, 1))
        assert sum(counts) == 2


@virtual
async def test_redrives_beside_each_other_leave_no_worker() -> None:
    """The worker that was begun for them ends with the last of them."""
    bed = Bed()
    await _let_die(bed, 2)
    async with bed.queue() as queue:
        async with anyio.create_task_group() as group:
            group.start_soon(queue.dead_letters.redrive)
            group.start_soon(queue.dead_letters.redrive)
        assert await queue.workers() == []
        assert (await queue.stats(exact=True)).pending == 2


def _set(event: anyio.Event, _: Any) -> None:
    event.set()


def _appending(handled: list[Any]) -> Callable[[Any], Awaitable[None]]:
    async def handle(payload: Any) -> None:
        handled.append(payload)

    return handle


async def _contains(handled: list[Any], payload: Any) -> bool:
    return payload in handled


async def _handle(payload: Any) -> None:
    """Do nothing."""


async def _let_die(bed: Bed, count: int) -> None:
    """Have so many dead letters, each in a segment of its own."""

    async def fail(payload: Any) -> None:
        raise DeadLetter("as the test wants it")

    async with bed.queue(on_message=fail) as queue:
        for number in range(count):
            await queue.enqueue(number)
            await eventually(partial(_are_dead, queue, number + 1))


async def _are_dead(queue: S3Queue[Any], count: int) -> bool:
    return (await queue.stats(exact=True)).dead == count


async def _is(condition: bool) -> bool:
    return condition
