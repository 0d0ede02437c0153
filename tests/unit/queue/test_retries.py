"""What becomes of a message by what its handler does: attempts, backoff, outcomes, and never two live copies."""

from __future__ import annotations

from itertools import pairwise
from random import Random
from typing import Any

import anyio
import pytest

from s3queue_async import Context, DeadLetter, Release, Retry, Settings
from s3queue_async.events import MessageDead, MessageRetry
from s3queue_async.message import MessageStatus
from tests.unit.queue.bed import QUIET, Bed, Seen, eventually, virtual


def settings(**changes: Any) -> Settings:
    return Settings(**{"coordinator": False, **changes})


@virtual
async def test_attempts_and_backoff() -> None:
    """Attempts count from 1 to max_attempts, the delays grow from backoff_base by doubling plus jitter, then: dead."""
    bed = Bed()
    runs: list[tuple[int, int, float]] = []
    retries, dead = Seen(), Seen()

    async def fail(payload: str, context: Context) -> None:
        runs.append((context.attempt, context.max_attempts, anyio.current_time()))
        raise ValueError(f"no luck\nwith {payload}")

    async with bed.queue(
        settings=settings(max_attempts=5, backoff_base=2, backoff_jitter=0.25), on_message=fail
    ) as queue:
        queue.on("message.retry", retries)
        queue.on("message.dead", dead)
        message_id = await queue.enqueue("x")
        await dead.count(1)
    assert [(attempt, most) for attempt, most, _ in runs] == [(number, 5) for number in range(1, 6)]
    waits = [later[2] - earlier[2] for earlier, later in pairwise(runs)]
    for number, (wait, event) in enumerate(zip(waits, retries.items, strict=True)):
        assert isinstance(event, MessageRetry)
        least = 2.0 * 2**number
        assert least <= event.delay <= least * 1.25
        assert event.delay - 0.001 <= wait < event.delay + 1.0, "delivered when due, and soon after"
        assert event.attempt == number + 1
    assert dead.items == [
        MessageDead(
            message_id=message_id,
            worker_id=dead.items[0].worker_id,
            attempts=5,
            error="ValueError: no luck with x",
        )
    ]


@virtual
async def test_backoff_is_bounded() -> None:
    """No delay is above backoff_max, and a message of its own max_attempts is tried that often."""
    bed = Bed()
    retries, dead = Seen(), Seen()

    async def fail(payload: object) -> None:
        raise OSError

    async with bed.queue(settings=settings(backoff_base=1, backoff_max=5), on_message=fail, on_error=retries) as queue:
        queue.on("message.dead", dead)
        await queue.enqueue(1, max_attempts=7)
        await dead.count(1)
    delays = [event.delay for event in retries.items if isinstance(event, MessageRetry)]
    assert len(delays) == 6
    assert delays[-1] == 5
    assert all(delay <= 5 for delay in delays)


@virtual
async def test_one_attempt_means_one() -> None:
    """With max_attempts=1 on the message the first failure makes it a dead letter, without a retry event."""
    bed = Bed()
    seen = Seen()

    async def fail(payload: object) -> None:
        raise OSError("once")

    async with bed.queue(on_message=fail, on_error=seen) as queue:
        await queue.enqueue(1, max_attempts=1)
        await seen.count(1)
    assert [type(event) for event in seen.items] == [MessageDead]


@virtual
async def test_retry_with_a_delay_of_its_own() -> None:
    """Retry(delay=) comes back after that delay, the attempt counts; Retry(delay=0) comes back at once."""
    bed = Bed()
    times: list[float] = []
    done = Seen()

    async def handler(payload: object, context: Context) -> None:
        times.append(anyio.current_time())
        if context.attempt == 1:
            raise Retry(delay=40)
        if context.attempt == 2:
            raise Retry(delay=0, reason="again")
        done(context.attempt)

    async with bed.queue(on_message=handler) as queue:
        await queue.enqueue(1)
        assert await done.count(1) == [3]
    assert 40 <= times[1] - times[0] < 41.5
    assert times[2] - times[1] < 1.5


@virtual
async def test_retry_beyond_the_last_attempt_is_a_dead_letter() -> None:
    """A Retry of the last attempt ends as a dead letter with its reason."""
    bed = Bed()
    dead = Seen()

    async def handler(payload: object) -> None:
        raise Retry(delay=1, reason="the gate is shut")

    async with bed.queue(settings=settings(max_attempts=2), on_message=handler) as queue:
        queue.on("message.dead", dead)
        await queue.enqueue(1)
        await dead.count(1)
        await eventually(lambda: bed.keys("dead/"))
        (letter,) = await queue.dead_letters.list()
    assert (letter.attempts, letter.error, letter.traceback) == (2, "Retry: the gate is shut", "")


@virtual
async def test_dead_letter_at_once() -> None:
    """DeadLetter("why") ends the message after one attempt, with the reason."""
    bed = Bed()
    dead = Seen()

    async def handler(payload: object) -> None:
        raise DeadLetter("the address is no address")

    async with bed.queue(on_message=handler) as queue:
        queue.on("message.dead", dead)
        message_id = await queue.enqueue({"to": "x"}, headers={"trace": "t1"}, priority=9)
        await dead.count(1)
        await eventually(lambda: bed.keys("dead/"))
        (letter,) = await queue.dead_letters.list()
        assert await queue.status(message_id) is MessageStatus.DEAD
    assert (letter.id, letter.payload, letter.attempts) == (message_id, {"to": "x"}, 1)
    assert (letter.error, dict(letter.headers), letter.priority) == (
        "the address is no address", {"trace": "t1"}, 9,
    )  # fmt: skip
    assert letter.died_at >= letter.enqueued_at


@virtual
async def test_a_failure_keeps_its_traceback() -> None:
    """The dead letter of an exception names class, text, and where it was raised."""
    bed = Bed()
    dead = Seen()

    async def broken_handler(payload: object) -> None:
        raise KeyError("missing")

    async with bed.queue(settings=settings(max_attempts=1), on_message=broken_handler, on_error=dead) as queue:
        await queue.enqueue(1)
        await dead.count(1)
        await eventually(lambda: bed.keys("dead/"))
        (letter,) = await queue.dead_letters.list()
    assert letter.error == "KeyError: 'missing'"
    assert "broken_handler" in letter.traceback


@virtual
async def test_release_does_not_count() -> None:
    """Release gives the message back: the next delivery has the same attempt number and a greater token."""
    bed = Bed()
    runs: list[tuple[int, int]] = []
    done = Seen()

    async def handler(payload: object, context: Context) -> None:
        runs.append((context.attempt, context.token))
        if len(runs) <= 5:
            raise Release(delay=0 if len(runs) % 2 else 3)
        done(payload)

    async with bed.queue(on_message=handler) as queue:
        await queue.enqueue(1, max_attempts=2)
        await done.count(1)
    assert [attempt for attempt, _ in runs] == [1] * 6
    tokens = [token for _, token in runs]
    assert tokens == sorted(set(tokens))


@virtual
async def test_handler_timeout() -> None:
    """A handler that exceeds handler_timeout is cancelled, and the attempt fails with a TimeoutError."""
    bed = Bed()
    ended = Seen()
    retries = Seen()

    async def slow(payload: object, context: Context) -> None:
        began = anyio.current_time()
        try:
            await anyio.sleep(100 if context.attempt == 1 else 1)
        finally:
            ended(anyio.current_time() - began)

    async with bed.queue(settings=settings(handler_timeout=3), on_message=slow, on_error=retries) as queue:
        await queue.enqueue(1)
        took = await ended.count(2)
    assert took == [pytest.approx(3), pytest.approx(1)]
    assert [event.error for event in retries.items] == ["TimeoutError: the handler exceeded handler_timeout=3 s"]


@virtual
async def test_a_handler_that_cancels_itself_fails_like_any_other() -> None:
    """A CancelledError that nobody asked for is a failed attempt; the worker goes on with the next message."""
    bed = Bed()
    seen, retries = Seen(), Seen()

    async def handler(payload: str, context: Context) -> None:
        if payload == "odd" and context.attempt == 1:
            raise anyio.get_cancelled_exc_class()
        if payload == "odder" and context.attempt == 1:
            with anyio.CancelScope() as scope:
                scope.cancel()
                await anyio.sleep(1)
            await anyio.sleep(1)
            raise anyio.get_cancelled_exc_class()
        seen(payload)

    async with bed.queue(on_message=handler, on_error=retries, concurrency=1) as queue:
        await queue.enqueue_many(["odd", "odder", "even"])
        assert sorted(await seen.count(3)) == ["even", "odd", "odder"]
        assert queue.worker_id is not None
    assert sorted(event.error for event in retries.items) == ["CancelledError", "CancelledError"]
    assert await bed.leftovers() == []


@pytest.mark.parametrize("seed", range(4))
@virtual
async def test_never_in_two_live_segments(seed: int) -> None:
    """Whatever handlers do, a scan after each request finds every message in at most one segment that may be run."""
    bed = Bed(seed=seed, latency_s=0.02)
    chance = Random(seed)
    ended: dict[int, int] = {}
    done = Seen()

    async def handler(payload: int, context: Context) -> None:
        await anyio.sleep(chance.random() * 4)
        match chance.randrange(6):
            case 0:
                raise ValueError("boom")
            case 1:
                raise Retry(delay=chance.random() * 5)
            case 2:
                raise Release(delay=chance.choice([0, 0, 2]))
            case _:
                ended[payload] = ended.get(payload, 0) + 1
                done(payload)

    async def watch() -> None:
        seen = 0
        while True:
            if len(bed.store.calls) != seen:
                seen = len(bed.store.calls)
                twice = {message: places for message, places in (await bed.live()).items() if len(places) > 1}
                assert not twice
            await anyio.sleep(0.011)

    async with anyio.create_task_group() as group:
        async with (
            bed.queue(settings=settings(max_attempts=100, backoff_max=3), concurrency=4, on_message=handler) as one,
            bed.queue(settings=settings(max_attempts=100, backoff_max=3), concurrency=4, on_message=handler),
        ):
            group.start_soon(watch)
            await one.enqueue_many(range(30))
            await one.enqueue_many(range(30, 40), delay=3)
            await done.count(40)
        group.cancel_scope.cancel()
    assert ended == dict.fromkeys(range(40), 1)
    assert await bed.live() == {}
    # A worker that leaves beside another one lets its claims linger; whoever comes next clears them away.
    async with bed.queue(on_message=handler):
        await anyio.sleep(100)
    assert await bed.leftovers() == []


@virtual
async def test_retried_messages_of_one_segment_share_their_next() -> None:
    """100 messages that fail together move into one segment, not a hundred."""
    bed = Bed()
    done = Seen()

    async def handler(payload: int, context: Context) -> None:
        if context.attempt == 1:
            raise OSError
        done(payload)

    async with bed.queue(settings=settings(backoff_jitter=0), on_message=handler, concurrency=100) as queue:
        await queue.enqueue_many(range(100))
        await done.count(100)
    written = [call.keys[0] for call in bed.store.calls if call.operation == "put" and call.keys[0].startswith("delay")]
    assert 1 <= len(written) <= 3


@virtual
async def test_counters_of_failures() -> None:
    """stats() counts completed, failed attempts, retries and dead letters."""
    bed = Bed()
    done, errors = Seen(), Seen()

    async def handler(payload: str, context: Context) -> None:
        if payload == "dead" or (payload == "flaky" and context.attempt == 1):
            raise OSError
        done(payload)

    async with bed.queue(settings=settings(max_attempts=2), on_message=handler, on_error=errors) as queue:
        await queue.enqueue_many(["dead", "flaky", "good"])
        await done.count(2)
        await errors.count(3)
    async with bed.queue(settings=QUIET) as other:
        stats = await other.stats(exact=True)
    assert (stats.completed, stats.failed, stats.retried, stats.dead, stats.pending) == (2, 3, 2, 1, 0)
    assert stats.total == 3
    assert stats.workers == 0
