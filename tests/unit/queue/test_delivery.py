"""What is delivered, when, and in what order: delays, priorities, expiry, payloads, contexts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import msgspec
import pytest

from s3queue_async import Context, Release, Settings
from s3queue_async.testing.clock import store_now
from tests.unit.queue.bed import Bed, Seen, eventually, virtual


class Email(msgspec.Struct):
    to: str
    copies: int = 1


@dataclass
class Point:
    x: int
    y: float


@pytest.mark.parametrize("delay", [30, 0.5, timedelta(minutes=5)])
@virtual
async def test_delay(delay: float | timedelta) -> None:
    """A delayed message is delivered when it is due, at most 1.2 s later, and not before."""
    bed = Bed()
    arrived = Seen()

    async def handler(payload: object) -> None:
        arrived(anyio.current_time())

    async with bed.queue(on_message=handler) as queue:
        began = anyio.current_time()
        await queue.enqueue("later", delay=delay)
        (at,) = await arrived.count(1)
    wanted = delay.total_seconds() if isinstance(delay, timedelta) else delay
    assert wanted <= at - began < wanted + 1.2


@virtual
async def test_delay_seen_by_another_process() -> None:
    """A worker that did not enqueue the delayed message finds it when it is due, within a poll of its own."""
    bed = Bed()
    arrived = Seen()

    async def handler(payload: object) -> None:
        arrived(anyio.current_time())

    async with bed.queue() as producer, bed.queue(on_message=handler):
        began = anyio.current_time()
        await producer.enqueue("later", delay=60)
        (at,) = await arrived.count(1)
    assert 60 <= at - began < 61.5


@virtual
async def test_deliver_at() -> None:
    """deliver_at is a point in time; one that is past is delivered at once."""
    bed = Bed()
    arrived = Seen()

    async def handler(payload: str) -> None:
        arrived((payload, anyio.current_time() - began))

    began = anyio.current_time()
    async with bed.queue(on_message=handler) as queue:
        now = datetime.fromtimestamp(store_now(), UTC)
        await queue.enqueue("in a minute", deliver_at=now + timedelta(minutes=1))
        await queue.enqueue("yesterday", deliver_at=now - timedelta(days=1))
        items = await arrived.count(2)
    assert [payload for payload, _ in items] == ["yesterday", "in a minute"]
    assert items[0][1] < 0.5
    assert 60 <= items[1][1] < 61.2


@virtual
async def test_a_far_delay_waits_in_the_store_alone() -> None:
    """A message due in a day is delivered in a day, by a worker that was started ten minutes before."""
    bed = Bed()
    arrived = Seen()

    async def handler(payload: object) -> None:
        arrived(anyio.current_time())

    began = anyio.current_time()
    async with bed.queue() as producer:
        await producer.enqueue("later", delay=timedelta(days=1))
    await anyio.sleep(86400 - 600)
    async with bed.queue(on_message=handler):
        await anyio.sleep(500)
        assert arrived.items == []
        await arrived.count(1)
    assert 86400 <= arrived.items[0] - began < 86402


@virtual
async def test_priorities() -> None:
    """Higher priorities first, and within one priority the oldest first."""
    bed = Bed()
    order: list[str] = []
    done = Seen()

    async def handler(payload: str) -> None:
        order.append(payload)
        done(payload)

    async with bed.queue() as producer:
        for payload, priority in [("a0", 0), ("a255", 255), ("a7", 7), ("b0", 0), ("b255", 255), ("b7", 7)]:
            await producer.enqueue(payload, priority=priority)
            await anyio.sleep(0.01)
    async with bed.queue(on_message=handler, concurrency=1):
        await done.count(6)
    assert order == ["a255", "b255", "a7", "b7", "a0", "b0"]


@virtual
async def test_a_high_priority_overtakes_a_backlog() -> None:
    """A message of high priority that comes while a backlog of 17 s is worked off starts within 5 s.

    A listing may be used for half of the time for which a claim is trusted without another look (4 s).
    """
    bed = Bed(latency_s=0.01)
    done = Seen()

    async def handler(payload: int) -> None:
        await anyio.sleep(0.05)
        done(payload)

    settings = Settings(coordinator=False, segment_messages_max=10)
    async with bed.queue(settings=settings) as producer:
        await producer.enqueue_many(range(800))
        async with bed.queue(settings=settings, on_message=handler, concurrency=2):
            await done.count(100)
            began = anyio.current_time()
            await producer.enqueue(-1, priority=200)
            await done.until(lambda items: -1 in items)
            assert anyio.current_time() - began < 5
            await done.count(801)


@virtual
async def test_expired_messages_are_not_started() -> None:
    """expires_in that is over before a handler is free makes a dead letter that says so; in time, it runs."""
    bed = Bed()
    done, dead = Seen(), Seen()

    async def handler(payload: str) -> None:
        done(payload)

    async with bed.queue() as producer:
        await producer.enqueue("stale", expires_in=10)
        await producer.enqueue("fresh", expires_in=timedelta(hours=1))
    await anyio.sleep(60)
    async with bed.queue(on_message=handler, on_error=dead) as queue:
        await done.count(1)
        await dead.count(1)
        await eventually(lambda: bed.keys("dead/"))
        (letter,) = await queue.dead_letters.list()
    assert done.items == ["fresh"]
    assert letter.error == "Expired: it was not started before expires_in was over"
    assert (letter.payload, letter.attempts) == ("stale", 0)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (Email, Email("a@example.com", 2)),
        (Point, Point(1, 2.5)),
        (bytes, b"\x00raw\xff"),
        (Any, {"a": [1, None, "x"]}),
        (Any, b"raw"),
        (list[int], [1, 2, 3]),
        (int | None, None),
        (datetime, datetime(2024, 2, 29, tzinfo=UTC)),
    ],
)  # fmt: skip
@virtual
async def test_payload_types(kind: Any, payload: Any) -> None:
    """A payload comes out as it went in, as an object of the queue's payload_type."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: Any) -> None:
        seen(payload)

    async with bed.queue(payload_type=kind, on_message=handler) as queue:
        await queue.enqueue(payload)
        assert await seen.count(1) == [payload]
    assert type(seen.items[0]) is type(payload)


@virtual
async def test_a_payload_of_another_type_is_a_dead_letter() -> None:
    """A message that another program wrote with another type never reaches the handler; its neighbours do."""
    bed = Bed()
    seen, dead = Seen(), Seen()

    async def handler(email: Email) -> None:
        seen(email)

    async with bed.queue() as producer:
        await asyncio.gather(producer.enqueue({"to": 5}), producer.enqueue({"to": "b"}), producer.enqueue(b"\xc1"))
    async with bed.queue(payload_type=Email, on_message=handler, on_error=dead) as queue:
        await dead.count(1)
        await seen.until(lambda items: Email("b") in items)
        await eventually(lambda: bed.keys("dead/"))
        letters = await queue.dead_letters.list()
    assert {letter.error.split(":")[0] for letter in letters} == {"InvalidPayload"}
    assert {"to": 5} in [msgspec.msgpack.decode(letter.payload) for letter in letters if letter.payload != b"\xc1"]


@virtual
async def test_context() -> None:
    """The context says which message, which attempt of how many, who handles it, since when, and the headers."""
    bed = Bed()
    contexts = Seen()

    async def handler(payload: object, context: Context) -> None:
        contexts(context)

    began = datetime.fromtimestamp(store_now(), UTC)
    async with bed.queue() as producer:
        message_id = await producer.enqueue("x", headers={"trace": "42"}, priority=3, max_attempts=8)
    await anyio.sleep(7)
    async with bed.queue(on_message=handler) as queue:
        (context,) = await contexts.count(1)
        assert context.worker_id == queue.worker_id
    assert (context.message_id, context.attempt, context.max_attempts) == (message_id, 1, 8)
    assert (context.headers, context.priority, context.token) == ({"trace": "42"}, 3, 1)
    assert timedelta(0) <= context.enqueued_at - began < timedelta(seconds=1)
    assert timedelta(seconds=6) < context.claimed_at - context.enqueued_at < timedelta(seconds=9)
    assert not context.lease_lost.is_set()
    assert "attempt=1/8" in repr(context)


@virtual
async def test_headers_stay_through_moves() -> None:
    """Headers, id, time of the enqueue and priority stay with a message that is delivered again and again."""
    bed = Bed()
    contexts = Seen()

    async def handler(payload: object, context: Context) -> None:
        contexts(context)
        if context.attempt == 1 and len(contexts.items) < 3:
            raise Release
        if context.attempt < 3:
            raise OSError

    async with bed.queue(on_message=handler) as queue:
        await queue.enqueue("x", headers={"trace": "42"}, priority=3)
        seen = await contexts.count(5)
    assert len({(c.message_id, c.enqueued_at, c.priority, tuple(c.headers.items())) for c in seen}) == 1
    assert [c.attempt for c in seen] == [1, 1, 1, 2, 3]
    assert [c.token for c in seen] == sorted({c.token for c in seen})


@virtual
async def test_enqueue_many_streams() -> None:
    """Payloads of an async iterable are taken as they are written, ids come in their order."""
    bed = Bed(latency_s=0.01)
    taken = 0

    async def payloads() -> Any:
        nonlocal taken
        for number in range(50_000):
            taken += 1
            yield number

    async with bed.queue() as producer:
        async with anyio.create_task_group() as group:
            ids: list[str] = []

            async def enqueue() -> None:
                ids.extend(await producer.enqueue_many(payloads()))

            group.start_soon(enqueue)
            await anyio.sleep(0.005)
            assert 0 < taken < 50_000, "bounded: nothing was written yet"
        assert len(set(ids)) == 50_000
        assert (await producer.stats(exact=True)).pending == 50_000
    order = [record.id for key in await bed.keys("ready/") for record in (await bed.segment(key)).index.records]
    assert sorted(order) == sorted(ids)


@virtual
async def test_enqueue_many_that_fails_in_the_middle() -> None:
    """What was written before a payload that cannot be encoded stays, and the error has its ids."""
    bed = Bed()
    settings = Settings(coordinator=False, segment_messages_max=10)
    async with bed.queue(settings=settings) as producer:
        with pytest.raises(Exception, match="cannot be enqueued") as caught:
            await producer.enqueue_many([*range(25), object(), *range(25)])
        ids = caught.value.enqueued_ids  # type: ignore[attr-defined]  # set for the caller
        assert len(ids) == 20
        assert (await producer.stats()).pending == 20
