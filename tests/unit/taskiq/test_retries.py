"""Retries of tasks by the queue: what the middleware makes of each way in which a task can fail."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from taskiq import Context, TaskiqDepends
from taskiq.brokers.inmemory_broker import InMemoryBroker
from taskiq.exceptions import NoResultError

from s3queue_async import DeadLetter, Release, Retry, Settings
from s3queue_async.taskiq import S3QueueBroker, S3QueueRetryMiddleware
from tests.unit.queue.bed import Seen, eventually, virtual
from tests.unit.taskiq.bench import make_broker, working


def broker_of(**settings: Any) -> S3QueueBroker:
    broker = make_broker(settings=Settings(coordinator=False, backoff_jitter=0, **settings))
    return broker.with_middlewares(S3QueueRetryMiddleware())


@virtual
async def test_backoff_and_dead_letter() -> None:
    """Attempts with the queue's backoff; a result after the last one only, and a dead letter with the traceback."""
    broker = broker_of(max_attempts=3, backoff_base=100)
    runs: list[float] = []

    @broker.task
    async def fail(text: str) -> None:
        runs.append(anyio.current_time())
        raise ValueError(f"{text} {len(runs)}")

    async with working(broker):
        task = await fail.kiq("no")
        result = await task.wait_result(check_interval=10)
        assert len(runs) == 3
        assert str(result.error) == "no 3"
        (letter,) = await eventually(broker.queue.dead_letters.list)
        assert (letter.attempts, letter.error) == (3, "ValueError: no 3")
        assert "in fail" in letter.traceback
        assert letter.headers["taskiq_task_id"] == task.task_id
    assert 99.9 < runs[1] - runs[0] < 110
    assert 199.9 < runs[2] - runs[1] < 210


@virtual
async def test_success_at_last_and_redrive() -> None:
    """A task that fails at first has the result of its success; a redriven dead letter is run again."""
    broker = broker_of(max_attempts=2)
    failures = [ValueError("1"), ValueError("2"), ValueError("3"), None]

    @broker.task
    async def fickle() -> str:
        if error := failures.pop(0):
            raise error
        return "done"

    async with working(broker):
        task = await fickle.kiq()
        assert (await task.wait_result()).is_err
        await eventually(broker.queue.dead_letters.list)
        assert await broker.queue.dead_letters.redrive() == 1

        async def is_done() -> bool:
            return not (await task.get_result()).is_err

        await eventually(is_done)
        assert (await task.get_result()).return_value == "done"
    assert failures == []


@virtual
async def test_max_attempts_of_one_task() -> None:
    """The label max_attempts goes before the setting."""
    broker = broker_of(max_attempts=2)
    runs = Seen()

    @broker.task(max_attempts=5)
    async def fail() -> None:
        runs(1)
        raise OSError

    async with working(broker):
        await fail.kiq()
        (letter,) = await eventually(broker.queue.dead_letters.list)
    assert (letter.attempts, len(runs.items)) == (5, 5)


@virtual
async def test_outcomes() -> None:
    """Retry with its delay, DeadLetter, Release without counting, and taskiq's own reject."""
    broker = broker_of(max_attempts=2)
    runs: dict[str, list[float]] = {}

    @broker.task
    async def do(what: str, context: Context = TaskiqDepends()) -> str:  # noqa: B008 - so taskiq has it
        times = runs.setdefault(what, [])
        times.append(anyio.current_time())
        if what == "retry" and len(times) == 1:
            raise Retry(delay=500)
        if what == "dead":
            raise DeadLetter("of no use")
        if what == "release" and len(times) < 4:
            raise Release(delay=50)
        if what == "reject":
            context.reject()
        if what == "no result":
            raise NoResultError
        return what

    async with working(broker):
        tasks = {what: await do.kiq(what) for what in ("retry", "dead", "release", "reject", "no result")}
        assert (await tasks["retry"].wait_result()).return_value == "retry"
        assert (await tasks["release"].wait_result()).return_value == "release"
        assert "TaskRejectedError" in str((await tasks["reject"].wait_result()).error)
        assert (await tasks["dead"].wait_result()).is_err
        letters = {letter.error for letter in await broker.queue.dead_letters.list()}
        assert not await tasks["no result"].is_ready()
    assert letters == {"of no use", "rejected by the task"}
    assert 499.9 < runs["retry"][1] - runs["retry"][0] < 510
    assert len(runs["release"]) == 4
    assert len(runs["no result"]) == 1


@pytest.mark.parametrize(("default", "label", "attempts"), [(True, None, 2), (True, False, 1), (False, None, 1)])
def test_who_is_retried(default: bool, label: bool | None, attempts: int) -> None:
    """The label retry_on_error says so, or else the default; what is not retried is done, with its error as result."""

    async def main() -> None:
        broker = make_broker(settings=Settings(max_attempts=2, coordinator=False))
        broker.add_middlewares(S3QueueRetryMiddleware(default_retry_label=default))
        runs: list[int] = []

        labels: dict[str, Any] = {} if label is None else {"retry_on_error": label}

        async def fail() -> None:
            runs.append(1)
            raise ValueError

        task_that_fails = broker.register_task(fail, "fail", **labels)
        async with working(broker):
            task = await task_that_fails.kiq()
            assert (await task.wait_result()).is_err
            assert len(await broker.queue.dead_letters.list()) == (1 if attempts > 1 else 0)
        assert len(runs) == attempts

    virtual(main)()


@virtual
async def test_acknowledged_when_received() -> None:
    """What is acknowledged already cannot be tried again: it fails once, and its result is the error."""
    broker = broker_of(max_attempts=3)
    runs: list[int] = []

    @broker.task(ack_type="when_received")
    async def fail() -> None:
        runs.append(1)
        raise ValueError

    async with working(broker):
        assert (await (await fail.kiq()).wait_result()).is_err
        assert await broker.queue.dead_letters.list() == []
    assert runs == [1]


async def test_with_another_broker() -> None:
    """It does nothing there, as in a program's tests with taskiq's InMemoryBroker."""
    broker = InMemoryBroker().with_middlewares(S3QueueRetryMiddleware())

    @broker.task
    async def fail() -> None:
        raise ValueError("no")

    result = await (await fail.kiq()).wait_result()
    assert isinstance(result.error, ValueError)
