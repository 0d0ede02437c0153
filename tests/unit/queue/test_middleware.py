"""Middleware: what it sees, what it may change, and that nothing is called where there is none."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from s3queue_async import Context, DeadLetter, Release, Retry, S3Queue, Settings
from s3queue_async.errors import InvalidSettings
from s3queue_async.message import Outcome
from s3queue_async.middleware import CallNext, Delivery
from s3queue_async.worker import Handler
from tests.unit.queue.bed import QUIET, Bed, Seen, virtual

KEEP = Settings(coordinator=False, retain_completed=3600, max_attempts=3, backoff_base=0)


@virtual
async def test_order_payload_and_result() -> None:
    """The first is the outermost; each may change the payload on the way in and the result on the way out."""
    bed = Bed()
    done = Seen()

    def layer(name: str) -> Any:
        async def middleware(message: Delivery[list[str]], call_next: CallNext) -> Any:
            message.payload = [*message.payload, name]
            return [*await call_next(message), name]

        return middleware

    async def handler(payload: list[str], context: Context) -> list[str]:
        return [*payload, context.message_id]

    queue = bed.queue(settings=KEEP, on_message=handler, middleware=[layer("a"), layer("b")], on_complete=done)
    queue.middleware(layer("c"))
    async with queue:
        message_id = await queue.enqueue(["x"])
        await done.count(1)
    assert done.items[0].result == ["x", "a", "b", "c", message_id, "c", "b", "a"]


@virtual
async def test_what_it_sees_of_a_message() -> None:
    """Payload, id and context are those that the handler gets, for a handler that wants no context, too."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: str) -> None: ...

    async with bed.queue() as queue:

        @queue.middleware
        async def look(message: Delivery[str], call_next: CallNext) -> Any:
            context = message.context
            seen((message.id, message.payload, context.headers, context.priority, context.attempt, context.token))
            return await call_next(message)

        queue.handler(handler)
        message_id = await queue.enqueue("x", headers={"a": "b"}, priority=4)
        await seen.count(1)
    assert seen.items == [(message_id, "x", {"a": "b"}, 4, 1, 1)]


@pytest.mark.parametrize(
    "raised", [Retry(delay=1, reason="later"), DeadLetter("no use"), Release(delay=1), ValueError("broken")]
)
@virtual
async def test_it_sees_what_the_handler_raises(raised: Exception) -> None:
    """Exceptions and outcomes come by as they were raised, and do what they do without middleware."""
    bed = Bed()
    seen, dead, completed = Seen(), Seen(), Seen()

    async def look(message: Delivery[int], call_next: CallNext) -> Any:
        try:
            return await call_next(message)
        except Exception as error:
            seen(error)
            raise

    async def handler(payload: int, context: Context) -> int:
        if not seen.items:
            raise raised
        return context.attempt

    async with bed.queue(settings=KEEP, on_message=handler, middleware=[look], on_complete=completed) as queue:
        queue.on("message.dead", dead)
        await queue.enqueue(1)
        if isinstance(raised, DeadLetter):
            await dead.count(1)
            assert dead.items[0].error == "no use"
        else:
            await completed.count(1)
            assert completed.items[0].attempt == (1 if isinstance(raised, Release) else 2)
    assert seen.items == [raised]


@pytest.mark.parametrize(
    ("turned_into", "expected"),
    [(None, "completed"), (DeadLetter("gone"), "dead: gone"), (Retry(delay=0), "dead: Retry: retry asked for")],
)
@virtual
async def test_it_changes_the_outcome(turned_into: Outcome | None, expected: str) -> None:
    """A failure becomes a success, a dead letter or another attempt; of the handler's error nothing is left."""
    bed = Bed()
    ends = Seen()

    async def turn(message: Delivery[int], call_next: CallNext) -> Any:
        try:
            return await call_next(message)
        except ValueError:
            if turned_into is not None:
                raise turned_into from None
            return "saved"

    async def handler(payload: int) -> None:
        raise ValueError("no")

    async with bed.queue(settings=KEEP, on_message=handler, middleware=[turn]) as queue:
        queue.on("message.completed", lambda event: ends(f"completed: {event.result}"))
        queue.on("message.dead", lambda event: ends(f"dead: {event.error}"))
        await queue.enqueue(1)
        await ends.count(1)
    assert ends.items[0].startswith(expected)


@virtual
async def test_it_does_not_call_the_handler() -> None:
    """Without call_next the handler is not called, and what the middleware returns or raises counts."""
    bed = Bed()
    completed, called = Seen(), Seen()

    async def stop(message: Delivery[int], call_next: CallNext) -> Any:
        if message.context.attempt == 1:
            raise ValueError("not yet")
        return "skipped"

    async def handler(payload: int) -> None:
        called(payload)

    async with bed.queue(settings=KEEP, on_message=handler, middleware=[stop], on_complete=completed) as queue:
        await queue.enqueue(1)
        await completed.count(1)
    assert (completed.items[0].result, completed.items[0].attempt, called.items) == ("skipped", 2, [])


@virtual
async def test_it_calls_the_handler_twice() -> None:
    """call_next may be called again: a try in place, within one attempt."""
    bed = Bed()
    completed = Seen()
    calls: list[int] = []

    async def again(message: Delivery[int], call_next: CallNext) -> Any:
        try:
            return await call_next(message)
        except ValueError:
            await anyio.sleep(1)
            return await call_next(message)

    async def handler(payload: int, context: Context) -> str:
        calls.append(context.attempt)
        if len(calls) == 1:
            raise ValueError
        return "second"

    async with bed.queue(settings=KEEP, on_message=handler, middleware=[again], on_complete=completed) as queue:
        await queue.enqueue(1)
        await completed.count(1)
    assert (calls, completed.items[0].result) == ([1, 1], "second")


@pytest.mark.parametrize("where", ["middleware", "handler"])
@virtual
async def test_cancelled_by_a_drain(where: str) -> None:
    """A drain whose time is over cancels both, inside out, wherever they wait; the attempt does not count."""
    bed = Bed()
    seen, started = Seen(), Seen()

    async def middleware(message: Delivery[int], call_next: CallNext) -> Any:
        try:
            started(1)
            if where == "middleware":
                await anyio.sleep_forever()
            return await call_next(message)
        finally:
            seen("middleware")

    async def handler(payload: int) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            seen("handler")

    async with bed.queue(on_message=handler, middleware=[middleware]) as queue:
        await queue.enqueue(1)
        await started.count(1)
        report = await queue.drain(timeout=3)
    assert (report.cancelled, report.clean) == (1, True)
    assert seen.items == (["middleware"] if where == "middleware" else ["handler", "middleware"])
    (key,) = await bed.keys("ready/")
    assert (await bed.segment(key)).index.records[0].attempts == 0


@virtual
async def test_cancelled_by_the_handler_timeout() -> None:
    """handler_timeout ends both; the attempt fails, and the error names the timeout."""
    bed = Bed()
    retries, seen = Seen(), Seen()

    async def middleware(message: Delivery[int], call_next: CallNext) -> Any:
        try:
            return await call_next(message)
        except asyncio.CancelledError:
            seen("cancelled")
            raise

    async def handler(payload: int) -> None:
        await anyio.sleep_forever()

    settings = Settings(coordinator=False, handler_timeout=5, max_attempts=2, backoff_base=0)
    async with bed.queue(settings=settings, on_message=handler, middleware=[middleware], on_error=retries) as queue:
        await queue.enqueue(1)
        await retries.count(2)
    assert seen.items == ["cancelled", "cancelled"]
    assert all("handler_timeout=5 s" in event.error for event in retries.items)


def middleware_counts(made: int) -> Any:
    async def step(message: Delivery[int], call_next: CallNext) -> Any:
        return await call_next(message)

    return [step] * made


@pytest.mark.parametrize("made", [0, 3])
@virtual
async def test_what_never_waits_takes_one_step(made: int) -> None:
    """A handler that never waits is over in one step of its slot, inside middleware that never waits, too.

    Without middleware it is the plain handler that runs: nothing is called around it.
    """
    bed = Bed()
    busy, done = Seen(), Seen()

    async def handler(payload: int) -> None:
        assert queue._worker is not None
        busy(len(queue._worker._busy))
        if payload == 2:
            await anyio.lowlevel.checkpoint()
            busy(len(queue._worker._busy))

    queue = bed.queue(on_message=handler, middleware=middleware_counts(made), on_complete=done)
    async with queue:
        assert queue._worker is not None
        assert (type(queue._worker.handler) is Handler) == (made == 0)
        await queue.enqueue_many([0, 1, 2])
        await done.count(3)
    assert busy.items == [0, 0, 0, 1]


def test_a_sync_handler_runs_in_a_thread() -> None:
    """Middleware goes around the thread; process_next passes it, too."""
    import threading

    threads: list[int] = []

    def handler(payload: int, context: Context) -> int:
        threads.append(threading.get_ident())
        return payload * 2

    async def main() -> tuple[list[Any], int]:
        results: list[Any] = []

        async def look(message: Delivery[int], call_next: CallNext) -> Any:
            results.append(await call_next(message))
            return results[-1]

        async with S3Queue(
            "memory://in-a-thread", settings=QUIET, on_message=handler, middleware=[look], auto_start=False
        ) as queue:
            await queue.enqueue(21)
            assert await queue.process_next()
        return results, threading.get_ident()

    results, loop_thread = asyncio.run(main())
    assert results == [42]
    assert threads != [loop_thread]


@virtual
async def test_tracing_goes_around_it() -> None:
    """A span covers the middleware as well as the handler."""
    bed = Bed()
    steps = Seen()

    class Spans:
        def outgoing(self, headers: Any) -> Any:
            return headers

        @contextmanager
        def handling(self, context: Context) -> Iterator[None]:
            steps("begin")
            yield
            steps("end")

    async def middleware(message: Delivery[int], call_next: CallNext) -> Any:
        steps("in")
        await call_next(message)
        steps("out")

    async def handler(payload: int) -> None:
        steps("handler")

    async with bed.queue(on_message=handler, middleware=[middleware], tracing=Spans()) as queue:
        await queue.enqueue(1)
        await steps.count(5)
    assert steps.items == ["begin", "in", "handler", "out", "end"]


async def two(message: Any, call_next: Any) -> None: ...
async def one(message: Any) -> None: ...
async def three(message: Any, call_next: Any, more: Any) -> None: ...
def not_async(message: Any, call_next: Any) -> None: ...


class AsObject:
    async def __call__(self, message: Any, call_next: Any) -> None: ...


@pytest.mark.parametrize(
    ("layer", "named"),
    [
        (one, "one cannot be called with"),
        (three, "three cannot be called with"),
        (not_async, "not_async is not async"),
        (AsObject, "AsObject is not a function"),
        (5, "5 is not a function"),
    ],
)
def test_what_is_no_middleware(layer: Any, named: str) -> None:
    """The error names it, and says how it should be written; an object that can be called is fine."""
    with pytest.raises(InvalidSettings, match=named) as caught:
        S3Queue("memory://", middleware=[layer])
    assert caught.value.suggestion
    with pytest.raises(InvalidSettings, match=named):
        S3Queue("memory://").middleware(layer)
    S3Queue("memory://", middleware=[two, AsObject()])


@virtual
async def test_too_late() -> None:
    """Once the handler runs, middleware is refused; after stop_processing it is taken."""
    bed = Bed()
    seen = Seen()

    async def late(message: Delivery[int], call_next: CallNext) -> Any:
        seen(message.payload)
        return await call_next(message)

    async def handler(payload: int) -> None: ...

    async with bed.queue(on_message=handler) as queue:
        with pytest.raises(InvalidSettings, match="runs already"):
            queue.middleware(late)
        await queue.stop_processing()
        decorated: Callable[..., Any] = queue.middleware(late)
        assert decorated is late
        await queue.start_processing()
        await queue.enqueue(1)
        await seen.count(1)
