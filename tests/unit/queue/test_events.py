"""Events and health: who is told what, callbacks that fail, and what a process knows of itself."""

from __future__ import annotations

import contextlib
from typing import Any

import anyio
import pytest

from s3queue_async import Context, S3Queue, Settings
from s3queue_async.errors import InvalidSettings, InvalidURL, UnknownSetting
from s3queue_async.events import Event
from tests.unit.queue.bed import Bed, Seen, virtual


@virtual
async def test_a_life_in_events() -> None:
    """A message that fails once and then succeeds: enqueued, claimed, processing, retry, ..., completed, in order."""
    bed = Bed()
    everything, done = Seen(), Seen()

    async def handler(payload: int, context: Context) -> int:
        if context.attempt == 1:
            raise OSError
        return payload + 1

    async with bed.queue(on_complete=done) as queue:
        queue.on("*", everything)
        await queue.start_processing(handler)
        message_id = await queue.enqueue(41)
        (completed,) = await done.count(1)
        await anyio.sleep(1)
    assert (completed.message_id, completed.result, completed.attempt) == (message_id, 42, 2)
    assert [event.name for event in everything.items] == [
        "workers.started",
        "message.enqueued",
        "message.claimed",
        "message.processing",
        "message.retry",
        "message.claimed",
        "message.processing",
        "message.completed",
        "workers.stopped",
    ]
    assert {event.message_id for event in everything.items if hasattr(event, "message_id")} == {message_id}
    assert everything.items[-1].reason == "drained"


@virtual
async def test_events_as_an_iterator() -> None:
    """queue.events() gives every event from its start on and ends when the queue is closed."""
    bed = Bed()
    names: list[str] = []
    reading = anyio.Event()

    async def read(queue: S3Queue[Any]) -> None:
        async with contextlib.aclosing(queue.events()) as events:  # type: ignore[type-var]  # it is a generator
            reading.set()
            async for event in events:
                assert isinstance(event, Event)
                names.append(event.name)

    async with anyio.create_task_group() as group, bed.queue() as queue:
        group.start_soon(read, queue)
        await reading.wait()
        await anyio.sleep(0.1)
        await queue.enqueue_many([1, 2])
        await anyio.sleep(0.1)
    assert names == ["message.enqueued", "message.enqueued"]


@virtual
async def test_failing_callbacks_hurt_nobody() -> None:
    """Callbacks that raise, at once or when awaited, change nothing for the others and for the messages."""
    bed = Bed()
    done = Seen()

    def bad(event: Event) -> None:
        raise ValueError("bad callback")

    async def bad_async(event: Event) -> None:
        raise ValueError("bad async callback")

    async def handler(payload: object) -> None: ...

    async with bed.queue(on_message=handler) as queue:
        for callback in (bad, bad_async, done):
            queue.on("message.completed", callback)
        await queue.enqueue_many(range(5))
        await done.count(5)
    assert await bed.leftovers() == []


@virtual
async def test_async_callbacks_are_awaited() -> None:
    """An async callback runs to its end, one event after the other, also for events just before the close."""
    bed = Bed()
    seen: list[int] = []

    async def slowly(event: Any) -> None:
        await anyio.sleep(0.5)
        seen.append(event.result)

    async def handler(payload: int) -> int:
        return payload

    async with bed.queue(on_message=handler, on_complete=slowly, concurrency=1) as queue:
        await queue.enqueue_many(range(3))
        await anyio.sleep(5)
    assert seen == [0, 1, 2]


@virtual
async def test_a_callback_can_be_taken_back() -> None:
    """What on() returns ends it; an unknown name is refused with the names that there are."""
    bed = Bed()
    seen = Seen()
    async with bed.queue() as queue:
        off = queue.on("message.enqueued", seen)
        await queue.enqueue(1)
        off()
        off()
        await queue.enqueue(2)
        with pytest.raises(InvalidSettings, match=r"message\.completed"):
            queue.on("message.complete", seen)
    assert len(seen.items) == 1


@virtual
async def test_health() -> None:
    """A producer is ready and live without a worker; a worker is ready once it is registered, and not while it drains."""
    bed = Bed()
    started = Seen()

    async def handler(payload: object) -> None:
        started(payload)
        await anyio.sleep(5)

    queue = bed.queue()
    assert not queue.health().ready
    async with queue:
        health = await queue.health()
        assert (health.live, health.ready, health.worker_id, health.last_heartbeat) == (True, True, None, None)
        await queue.start_processing(handler)
        await anyio.sleep(25)
        health = queue.health()
        assert (health.live, health.ready, health.coordinator) == (True, True, False)
        assert health.worker_id == queue.worker_id
        assert health.last_heartbeat is not None
        assert health.last_heartbeat < 60.1, "a worker that holds nothing beats every minute"
        assert health.last_progress is not None
        assert health.last_progress < 6
        await queue.enqueue(1)
        await started.count(1)
        async with anyio.create_task_group() as group:
            group.start_soon(queue.drain)
            await anyio.sleep(1)
            assert not queue.health().ready
    assert not queue.health().ready


@virtual
async def test_health_while_the_store_is_away() -> None:
    """Without a store the worker is not ready after its lease is over, and it is again once the store is back."""
    bed = Bed()

    async def handler(payload: object) -> None: ...

    async with bed.queue(on_message=handler) as queue:
        await anyio.sleep(1)
        first = queue.worker_id
        fault = bed.faults.unavailable()
        await anyio.sleep(40)
        assert not queue.health().ready
        bed.faults.remove(fault)
        await anyio.sleep(40)
        assert queue.health().ready
        assert queue.worker_id not in (None, first)


@virtual
async def test_throttled_event() -> None:
    """A store that asks for fewer requests is reported with operation and wait, and the message is written all the same."""
    bed = Bed()
    seen = Seen()
    async with bed.queue() as queue:
        queue.on("s3.throttled", seen)
        bed.faults.throttle("put", key="ready/*", times=2)
        await queue.enqueue(1)
        assert (await queue.stats()).pending == 1
    assert [event.operation for event in seen.items] == ["put", "put"]
    assert all(event.wait >= 0 for event in seen.items)


def test_settings_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """S3QUEUE_<NAME> fills in what the code left at its default; S3QUEUE_URL is the default url."""
    monkeypatch.setenv("S3QUEUE_URL", "memory://from-the-environment")
    monkeypatch.setenv("S3QUEUE_MAX_ATTEMPTS", "9")
    monkeypatch.setenv("S3QUEUE_VISIBILITY_TIMEOUT", "60.5")
    monkeypatch.setenv("S3QUEUE_COORDINATOR", "off")
    monkeypatch.setenv("S3QUEUE_HANDLER_TIMEOUT", "none")
    queue: S3Queue[Any] = S3Queue(settings=Settings(max_attempts=4))
    assert queue.url == "memory://from-the-environment"
    settings = queue.settings
    assert (settings.max_attempts, settings.visibility_timeout, settings.coordinator) == (4, 60.5, False)
    assert settings.handler_timeout is None


def test_bad_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that names no setting, or whose text is no value, is refused by its name; no url at all, too."""
    monkeypatch.delenv("S3QUEUE_URL", raising=False)
    with pytest.raises(InvalidURL, match="S3QUEUE_URL"):
        S3Queue()
    with monkeypatch.context() as patch:
        patch.setenv("S3QUEUE_MAX_ATTEMPS", "9")
        with pytest.raises(UnknownSetting, match="'max_attempts'"):
            S3Queue("memory://x")
    with monkeypatch.context() as patch:
        patch.setenv("S3QUEUE_MAX_ATTEMPTS", "many")
        with pytest.raises(InvalidSettings, match="S3QUEUE_MAX_ATTEMPTS='many'"):
            S3Queue("memory://x")
    with monkeypatch.context() as patch:
        patch.setenv("S3QUEUE_HEARTBEAT_INTERVAL", "29")
        with pytest.raises(InvalidSettings, match="visibility_timeout"):
            S3Queue("memory://x")
