"""Messages taken one by one and acknowledged explicitly; and one message at a time for scripts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from s3queue_async import Context, DeadLetter, Message, Settings
from s3queue_async.errors import InvalidSettings, LeaseLost, QueueClosed
from s3queue_async.message import MessageStatus
from tests.unit.queue.bed import Bed, Seen, eventually, virtual

SETTINGS = Settings(coordinator=False, backoff_base=5, backoff_jitter=0)


@virtual
async def test_receive_and_acknowledge() -> None:
    """What is acknowledged is done; receive returns what there is, at most as many as asked for."""
    bed = Bed()
    async with bed.queue() as queue:
        ids = await queue.enqueue_many(range(7))
        first = await queue.receive(3)
        second = await queue.receive(100)
        assert sorted(message.payload for message in (*first, *second)) == list(range(7))
        assert len(first) == 3
        assert {message.id for message in (*first, *second)} == set(ids)
        for message in (*first, *second):
            await message.ack()
            with pytest.raises(LeaseLost):
                await message.ack()
        assert (await queue.stats(exact=True)).total == 7
        assert (await queue.stats(exact=True)).completed == 7
    assert await bed.leftovers() == []


@virtual
async def test_receive_waits() -> None:
    """Without messages receive returns after ``wait``; with wait=0 it looks once; one that comes ends the wait."""
    bed = Bed()
    async with bed.queue() as queue, bed.queue() as producer:
        began = anyio.current_time()
        assert await queue.receive(wait=0) == []
        assert anyio.current_time() - began < 1
        assert await queue.receive(wait=13) == []
        assert 13 <= anyio.current_time() - began < 14.5
        await producer.enqueue("there")
        (message,) = await queue.receive(wait=0)
        await message.ack()
        began = anyio.current_time()
        async with anyio.create_task_group() as group:

            async def receive() -> None:
                (message,) = await queue.receive(wait=60)
                await message.ack()

            group.start_soon(receive)
            await anyio.sleep(5)
            await producer.enqueue("later")
        assert 5 <= anyio.current_time() - began < 11


@virtual
async def test_acknowledgements_at_any_moment_of_each_other() -> None:
    """The last message of a segment is acknowledged while the one before is being recorded: both return."""
    bed = Bed()
    async with bed.queue() as queue:
        for moments in range(40):
            await queue.enqueue_many(["first", "second"])
            first, second = await queue.receive(2, wait=5)
            with anyio.fail_after(60):
                async with anyio.create_task_group() as group:
                    group.start_soon(first.ack)
                    for _ in range(moments):
                        await anyio.lowlevel.checkpoint()
                    group.start_soon(second.ack)
        assert (await queue.stats(exact=True)).completed == 80


@virtual
async def test_the_four_verbs() -> None:
    """ack ends it, retry counts an attempt and waits, dead_letter sets it aside, release counts nothing."""
    bed = Bed()
    async with bed.queue(settings=SETTINGS) as queue:
        for payload in ("ack", "retry", "dead", "release"):
            await queue.enqueue(payload)
        messages: dict[str, Message[Any]] = {}
        while len(messages) < 4:
            for message in await queue.receive():
                messages[message.payload] = message
        await messages["ack"].ack()
        await messages["retry"].retry(delay=20, reason="not yet")
        await messages["dead"].dead_letter("of no use")
        await messages["release"].release()
        assert await queue.status(messages["retry"].id) is MessageStatus.RETRYING
        (letter,) = await queue.dead_letters.list()
        assert (letter.payload, letter.error, letter.attempts) == ("dead", "of no use", 1)
        (again,) = await queue.receive(wait=5)
        assert (again.payload, again.context.attempt) == ("release", 1)
        assert again.context.token > messages["release"].context.token
        await again.ack()
        (again,) = await queue.receive(wait=30)
        assert (again.payload, again.context.attempt) == ("retry", 2)
        await again.ack()
    assert [key for key in await bed.leftovers() if not key.startswith(("dead/", "claims/"))] == []


@virtual
async def test_consume() -> None:
    """consume() gives every message as it comes, and ends when the queue drains."""
    bed = Bed()
    got: list[int] = []
    async with bed.queue() as queue, bed.queue() as producer:
        await producer.enqueue_many(range(5))
        async for message in queue.consume():
            got.append(message.payload)
            await message.ack()
            if len(got) == 5:
                await producer.enqueue_many(range(5, 8))
            if len(got) == 8:
                await queue.drain()
    assert sorted(got) == list(range(8))
    assert [key for key in await bed.leftovers() if not key.startswith("claims/")] == []


@virtual
async def test_ack_within() -> None:
    """It goes before visibility_timeout, in both directions, as long as the receiver lives."""
    bed = Bed()
    async with bed.queue() as queue, bed.queue() as other:
        await queue.enqueue_many(["long", "short"])
        (long,) = await queue.receive(1, ack_within=timedelta(hours=1))
        (short,) = await queue.receive(1, ack_within=5)
        (again,) = await other.receive(wait=20)
        assert again.payload == short.payload
        await again.dead_letter()
        assert await other.receive(wait=3500) == []
        await long.ack()
        for bad in (0, -1, 31 * 86400, "x"):
            with pytest.raises(InvalidSettings, match="ack_within"):
                await queue.receive(ack_within=bad)  # type: ignore[arg-type]


@virtual
async def test_fail() -> None:
    """It is what a handler's exception would be: a retry after the backoff, then a dead letter with the traceback."""
    bed = Bed()
    async with bed.queue(settings=Settings(max_attempts=2, coordinator=False)) as queue:
        await queue.enqueue("x")
        for attempt in (1, 2):
            (message,) = await queue.receive(wait=10)
            assert message.context.attempt == attempt
            try:
                raise ValueError("no")
            except ValueError as error:
                await message.fail(error)
        (letter,) = await queue.dead_letters.list()
        assert (letter.error, letter.attempts) == ("ValueError: no", 2)
        assert 'raise ValueError("no")' in letter.traceback
        await queue.enqueue("y")
        (message,) = await queue.receive(wait=10)
        await message.fail(DeadLetter("at once"))
        assert {letter.error for letter in await queue.dead_letters.list()} == {"ValueError: no", "at once"}


@virtual
async def test_unacknowledged_is_delivered_again() -> None:
    """Past visibility_timeout a message is delivered again as its next attempt; the late ack raises LeaseLost."""
    bed = Bed()
    async with bed.queue() as queue, bed.queue() as other:
        await queue.enqueue("x")
        (message,) = await queue.receive()
        assert await other.receive(wait=25) == []
        began = anyio.current_time()
        (again,) = await other.receive(wait=60)
        assert anyio.current_time() - began < 11
        assert again.context.attempt == 2
        assert again.context.token > message.context.token
        with pytest.raises(LeaseLost):
            await message.ack()
        await again.ack()
        assert (await queue.stats(exact=True)).processing == 0


@virtual
async def test_unacknowledged_to_the_end_is_a_dead_letter() -> None:
    """A message that nobody ever acknowledges ends as a dead letter that says so."""
    bed = Bed()
    async with bed.queue(settings=Settings(coordinator=False, max_attempts=2)) as queue:
        await queue.enqueue("x")
        for _ in range(2):
            (message,) = await queue.receive(wait=60)
        await anyio.sleep(40)
        (letter,) = await queue.dead_letters.list()
        assert (letter.attempts, letter.error) == (2, "Retry: not acknowledged within visibility_timeout")
        with pytest.raises(LeaseLost):
            await message.ack()


@virtual
async def test_drain_hands_back_what_is_not_acknowledged() -> None:
    """Draining gives unacknowledged messages back without counting the attempt, and a later ack raises LeaseLost."""
    bed = Bed()
    queue = bed.queue()
    async with queue:
        await queue.enqueue_many(range(4))
        messages = await queue.receive(4)
        await messages[0].ack()
        report = await queue.drain(timeout=1)
        assert report.handed_back == 3
        with pytest.raises(LeaseLost):
            await messages[1].ack()
        with pytest.raises(QueueClosed):
            await queue.receive()
    async with bed.queue() as other:
        again = await other.receive(10, wait=30)
        assert sorted(message.payload for message in again) == [1, 2, 3]
        assert {message.context.attempt for message in again} == {1}
        for message in again:
            await message.ack()


@virtual
async def test_a_payload_that_does_not_decode_is_not_received() -> None:
    """A message of another type becomes a dead letter; receive returns the others."""
    bed = Bed()
    async with bed.queue() as producer:
        await producer.enqueue("text")
        await producer.enqueue(5)
    async with bed.queue(payload_type=int) as queue:
        got = [message for _ in range(3) for message in await queue.receive(wait=3)]
        assert [message.payload for message in got] == [5]
        await got[0].ack()
        await eventually(lambda: bed.keys("dead/"))


@pytest.mark.parametrize("arguments", [{"max_messages": 0}, {"max_messages": 1001}, {"wait": -1}, {"wait": 4000}])
@virtual
async def test_bad_arguments(arguments: dict[str, Any]) -> None:
    """Arguments out of range are refused by name, before any worker is registered."""
    bed = Bed()
    async with bed.queue() as queue:
        with pytest.raises(InvalidSettings, match=next(iter(arguments))):
            await queue.receive(**arguments)
        assert queue.worker_id is None


@virtual
async def test_process_next() -> None:
    """One message at a time, settled before it returns; False when there is none."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: int, context: Context) -> int:
        seen((payload, context.attempt))
        if payload == 1:
            raise DeadLetter("no")
        return payload

    async with bed.queue(on_message=handler, auto_start=False, settings=SETTINGS) as queue:
        assert await queue.process_next() is False
        ids = await queue.enqueue_many(range(3))
        for number in range(3):
            assert await queue.process_next() is True
            assert len(seen.items) == number + 1
        assert await queue.process_next() is False
        assert await queue.status(ids[1]) is MessageStatus.DEAD
        stats = await queue.stats(exact=True)
        assert (stats.completed, stats.dead, stats.processing) == (2, 1, 0)


@virtual
async def test_process_next_in_a_new_process_each_time() -> None:
    """Lambda: each call opens, handles one message of a segment of three, and leaves the rest for the next call."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: int, context: Context) -> None:
        seen((payload, context.attempt))

    async with bed.queue() as producer:
        await producer.enqueue_many(range(3))
    calls = 0
    while True:
        async with bed.queue(on_message=handler, auto_start=False) as queue:
            if not await queue.process_next():
                break
        calls += 1
    assert calls == 3
    assert sorted(seen.items) == [(0, 1), (1, 1), (2, 1)]


@virtual
async def test_process_next_without_a_handler() -> None:
    """Without a handler it is refused with what to do."""
    bed = Bed()
    async with bed.queue() as queue:
        with pytest.raises(InvalidSettings, match="handler"):
            await queue.process_next()
