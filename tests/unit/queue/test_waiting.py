"""Whoever waits for something is told what became of it, also when it ends, fails, is cancelled or lost at that moment."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from s3queue_async import DeadLetter, Message, S3Queue, Settings
from s3queue_async.errors import LeaseLost, QueueClosed, QueueError
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
