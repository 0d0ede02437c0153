"""The result backend: what comes back, what is missing, what is deleted, and what cannot be kept."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel
from taskiq import InMemoryBroker, TaskiqDepends, TaskiqResult
from taskiq.depends.progress_tracker import ProgressTracker, TaskProgress, TaskState
from taskiq.exceptions import ResultGetError, ResultIsReadyError, ResultSetError
from taskiq.result_backends.dummy import DummyResultBackend
from taskiq.serializers import PickleSerializer

from s3queue_async import InvalidSettings, MessageNotFound, QueueClosed, S3Queue, StoreUnavailable
from s3queue_async.taskiq import S3QueueResultBackend
from s3queue_async.taskiq.results import WRITES_PER_LOOK
from s3queue_async.testing import FaultyMemory, LoopClock
from tests.unit.queue.bed import virtual
from tests.unit.taskiq.bench import make_broker, started, working


class Point(BaseModel):
    x: int
    at: datetime


def result(value: Any = None, **fields: Any) -> TaskiqResult[Any]:
    return TaskiqResult(**{"is_err": False, "return_value": value, "execution_time": 0.5, **fields})


def backend_on(store: FaultyMemory, **options: Any) -> S3QueueResultBackend:
    return S3QueueResultBackend(storage=store, clock=LoopClock(), **options)


async def keys(store: FaultyMemory) -> list[str]:
    return [entry.key for entry in (await store.memory.list("plugin/taskiq/")).entries]


@virtual
async def test_values_and_errors() -> None:
    """A task's annotation decides what its result becomes again; an error comes back as one of its kind."""
    broker = make_broker()

    @broker.task
    async def point(x: int) -> Point:
        return Point(x=x, at=datetime(2026, 1, 1, tzinfo=UTC))

    @broker.task
    async def fail() -> None:
        raise KeyError("missing")

    async with working(broker):
        assert (await (await point.kiq(3)).wait_result()).return_value == Point(
            x=3, at=datetime(2026, 1, 1, tzinfo=UTC)
        )
        failed = await (await fail.kiq()).wait_result()
        with pytest.raises(KeyError, match="missing"):
            failed.raise_for_error()


@virtual
async def test_what_cannot_be_stored() -> None:
    """A result that is no JSON is an error for whoever waits, instead of nothing at all."""
    broker = make_broker()

    @broker.task
    async def odd() -> object:
        return object()

    async with working(broker):
        got = await (await odd.kiq()).wait_result(timeout=10)
        assert got.is_err
        assert "cannot be stored" in str(got.error)
    store = FaultyMemory()
    backend = backend_on(store)
    await backend.startup()
    with pytest.raises(ResultSetError):
        await backend.set_result("x", result(object()))


@virtual
async def test_missing_results() -> None:
    """Not ready, and an error that says why, before the task is done and after the result's time."""
    store = FaultyMemory()
    backend = backend_on(store, ttl=60)
    await backend.startup()
    assert not await backend.is_result_ready("1")
    with pytest.raises(MessageNotFound, match="There is no result of the task '1'"):
        await backend.get_result("1")
    await backend.set_result("1", result("x", log="text"))
    assert await backend.is_result_ready("1")
    assert (await backend.get_result("1")).log is None
    assert (await backend.get_result("1", with_logs=True)).log == "text"
    await asyncio.sleep(61)
    assert not await backend.is_result_ready("1")
    with pytest.raises(MessageNotFound):
        await backend.get_result("1")


@virtual
async def test_old_results_are_deleted() -> None:
    """Whoever writes results deletes old ones, whatever their number, and only those."""
    store = FaultyMemory()
    backend = backend_on(store, ttl=60)
    await backend.startup()
    for number in range(2500):
        await backend.set_result(f"old-{number}", result())
    await asyncio.sleep(61)
    for number in range(10 * WRITES_PER_LOOK):
        await backend.set_result(f"new-{number:04d}", result())
    left: list[str] = []
    while (page := await store.memory.list("plugin/taskiq/", after=left[-1] if left else "")).entries:
        left += [entry.key for entry in page.entries]
    assert left == [f"plugin/taskiq/results/new-{number:04d}" for number in range(10 * WRITES_PER_LOOK)]


@virtual
async def test_deleting_old_results_fails() -> None:
    """That is nobody's business: the result is kept, and the next look deletes."""
    store = FaultyMemory()
    backend = backend_on(store, ttl=60)
    await backend.startup()
    store.unavailable("list", times=1)
    for number in range(WRITES_PER_LOOK):
        await backend.set_result(str(number), result(number))
    assert store.pending == []
    assert (await backend.get_result(str(WRITES_PER_LOOK - 1))).return_value == WRITES_PER_LOOK - 1


@virtual
async def test_results_that_are_fetched_once() -> None:
    """With keep_results=False a result is gone once it was fetched."""
    store = FaultyMemory()
    backend = backend_on(store, keep_results=False)
    await backend.startup()
    await backend.set_result("1", result("x"))
    assert (await backend.get_result("1")).return_value == "x"
    assert await keys(store) == []


@virtual
async def test_odd_task_ids() -> None:
    """Whatever a task's id is, its result is found by it, and by no other."""
    store = FaultyMemory()
    backend = backend_on(store)
    await backend.startup()
    ids = ["a/b", "a%2Fb", "../x", "ä", "x" * 2000, "x" * 2001, " "]
    for task_id in ids:
        await backend.set_result(task_id, result(task_id))
    for task_id in ids:
        assert (await backend.get_result(task_id)).return_value == task_id
    assert all(len(key) < 1000 for key in await keys(store))


@virtual
async def test_progress() -> None:
    """What a task says of its progress is there for whoever asks, and nothing before."""
    broker = make_broker()

    @broker.task
    async def work(progress: ProgressTracker[str] = TaskiqDepends()) -> None:  # noqa: B008 - so taskiq has it
        await progress.set_progress(TaskState.STARTED, "half")

    async with working(broker):
        task = await work.kiq()
        assert await task.get_progress() is None
        await task.wait_result()
        assert await task.get_progress() == TaskProgress(state=TaskState.STARTED, meta="half")


@virtual
async def test_a_store_that_fails() -> None:
    """Short failures are waited out; for good ones the store's error comes, as taskiq's."""
    broker = make_broker(store := FaultyMemory())

    @broker.task
    async def nothing() -> None: ...

    async with started(broker):
        task = await nothing.kiq()
        backend = broker.result_backend
        store.unavailable("put", times=2)
        store.throttle("put", times=2)
        await backend.set_result(task.task_id, result("x"))
        store.unavailable("get", times=4)
        assert (await task.get_result()).return_value == "x"
        store.unavailable("get", retriable=False)
        with pytest.raises(ResultIsReadyError) as raised:
            await task.is_ready()
        assert isinstance(raised.value.__cause__, StoreUnavailable)
        with pytest.raises(ResultGetError) as refused:
            await task.get_result()
        assert isinstance(refused.value.__cause__, StoreUnavailable)
        store.clear()


async def test_with_another_broker(tmp_path: Path) -> None:
    """With a url of its own it serves any broker, and whoever opens the same url finds the results."""
    url = f"sqlite:{tmp_path}/results.db"
    broker = InMemoryBroker().with_result_backend(S3QueueResultBackend(url, serializer=PickleSerializer()))

    @broker.task
    async def double(x: int) -> int:
        return 2 * x

    await broker.startup()
    task = await double.kiq(2)
    assert (await task.wait_result()).return_value == 4
    await broker.shutdown()
    again = S3QueueResultBackend(url, serializer=PickleSerializer())
    await again.startup()
    assert (await again.get_result(task.task_id)).return_value == 4
    await again.shutdown()


@virtual
async def test_on_the_brokers_store() -> None:
    """Without a url it is on the store of its broker, beside the messages; result_ttl=None keeps none."""
    store = FaultyMemory()
    broker = make_broker(store).with_result_backend(S3QueueResultBackend(ttl=1000, clock=LoopClock()))

    @broker.task
    async def one() -> int:
        return 1

    async with working(broker):
        task = await one.kiq()
        assert (await task.wait_result()).return_value == 1
        assert await keys(store) == [f"plugin/taskiq/results/{task.task_id}"]
    assert isinstance(make_broker(result_ttl=None).result_backend, DummyResultBackend)


@virtual
async def test_bad_use() -> None:
    """Each says what to do."""
    for ttl in (0, -1, 1e12):
        with pytest.raises(InvalidSettings, match=r"ttl=.* is out of range: above 0 seconds, up to ten years"):
            S3QueueResultBackend(ttl=ttl)
    with pytest.raises(QueueClosed, match="pass it a url"):
        await S3QueueResultBackend().is_result_ready("1")


@virtual
async def test_results_are_json() -> None:
    """Anybody can read them; docs/object_layout.md shows one."""
    store = FaultyMemory()
    backend = backend_on(store)
    await backend.startup()
    await backend.set_result("1", result({"a": [1]}, labels={"k": "v"}))
    (key,) = await keys(store)
    body = (await store.memory.get(key)).body  # type: ignore[union-attr] # no version was named
    assert msgspec.json.decode(body) == {
        "is_err": False,
        "log": None,
        "return_value": {"a": [1]},
        "execution_time": 0.5,
        "labels": {"k": "v"},
        "error": None,
    }


def test_queue_has_room_for_others() -> None:
    """plugin_storage is for anybody: a namespace of one's own, relative keys, a time to live."""

    async def main() -> None:
        async with S3Queue(storage=(store := FaultyMemory()), clock=LoopClock()) as queue:
            plugin = queue.plugin_storage("mine", ttl=10)
            await plugin.put("a", b"1")
            assert [entry.key for entry in (await store.memory.list("plugin/mine/")).entries] == ["plugin/mine/a"]
            assert plugin.ttl_s == 10
            with pytest.raises(ValueError, match="one part of a key"):
                queue.plugin_storage("a/b")

    virtual(main)()
