"""The broker under taskiq's own receiver: acknowledgement, labels, what becomes of tasks that nobody acknowledges."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import anyio
import pytest
from taskiq import AckableMessage, AsyncBroker, Context, TaskiqDepends, TaskiqEvents, TaskiqMessage, TaskiqMiddleware
from taskiq.acks import AcknowledgeType
from taskiq.api import run_receiver_task
from taskiq.exceptions import SendTaskError
from taskiq.middlewares import SimpleRetryMiddleware, SmartRetryMiddleware

from s3queue_async import InvalidPriority, InvalidSettings, QueueClosed, Settings, StoreUnavailable
from s3queue_async.message import MessageStatus
from s3queue_async.testing import FaultyMemory
from tests.unit.queue.bed import Seen, eventually, virtual
from tests.unit.taskiq.bench import QUIET, make_broker, started, working

DAY_S = 86400


async def settled(broker: Any) -> bool:
    """Whether nothing waits and nothing is held."""
    stats = await broker.queue.stats(exact=True)
    return bool(stats.pending + stats.delayed + stats.processing == 0)


# -- tasks ---------------------------------------------------------------------------------------------------------


@virtual
async def test_a_task_and_its_result() -> None:
    """What is sent is run with its arguments, async or sync, and its result comes back as what the task returns."""
    broker = make_broker()
    threads: set[str] = set()

    @broker.task
    async def add(left: int, right: int) -> int:
        return left + right

    @broker.task
    def shout(text: str) -> str:
        threads.add(threading.current_thread().name)
        return text.upper()

    async with working(broker):
        result = await (await add.kiq(1, right=2)).wait_result()
        assert (result.return_value, result.is_err) == (3, False)
        assert (await (await shout.kiq("hey")).wait_result()).return_value == "HEY"
        await eventually(lambda: settled(broker))
    assert threads.isdisjoint({threading.current_thread().name})


@virtual
async def test_bytes_go_as_they_are() -> None:
    """What a formatter makes need not be text."""
    broker = make_broker()
    message = broker.formatter.dumps(
        TaskiqMessage(task_id="1", task_name="any", labels={}, labels_types=None, args=[], kwargs={})
    )
    message.message = bytes(range(256))
    async with started(broker):
        await broker.kick(message)
        listening = broker.listen()
        fetched = await anext(listening)
        assert isinstance(fetched, AckableMessage)
        assert fetched.data == bytes(range(256))
        await fetched.ack()  # type: ignore[misc]
        assert await settled(broker)
        await listening.aclose()


@virtual
async def test_delay_and_priority() -> None:
    """A delayed task runs when it is due; higher priorities run first."""
    broker = make_broker()
    ran = Seen()

    @broker.task
    async def note(name: str) -> None:
        ran((name, anyio.current_time()))

    async with started(broker):
        began = anyio.current_time()
        await note.kicker().with_labels(delay=60).kiq("late")
        await note.kicker().with_labels(priority=1).kiq("second")
        await note.kicker().with_labels(priority="200").kiq("first")
        await note.kiq("third")
    async with working(broker, max_async_tasks=1):
        await ran.count(4)
    assert [name for name, _ in ran.items] == ["first", "second", "third", "late"]
    assert 59.9 < ran.items[3][1] - began < 70


@virtual
async def test_labels_that_are_wrong() -> None:
    """Nothing is sent, and the error's cause names the label and what it may be."""
    broker = make_broker()

    @broker.task
    async def nothing() -> None: ...

    async def sent(**labels: Any) -> BaseException | None:
        with pytest.raises(SendTaskError) as raised:
            await nothing.kicker().with_labels(**labels).kiq()
        return raised.value.__cause__

    async with started(broker):
        assert "delay='soon' must be a number of seconds" in str(await sent(delay="soon"))
        assert "delay=-1.0 is out of range" in str(await sent(delay=-1))
        error = await sent(priority=256)
        assert isinstance(error, InvalidPriority)
        assert "priority='high' is no whole number" in str(await sent(priority="high"))
        assert "max_attempts='x' must be a whole number, 1 to 10000" in str(await sent(max_attempts="x"))
        error = await sent(max_attempts=0)
        assert isinstance(error, InvalidSettings)
        assert "expires_in" in str(await sent(expires_in=0))
        assert (await broker.queue.stats(exact=True)).total == 0


@virtual
async def test_dedup_id() -> None:
    """A task with a dedup_id is there once, however often it is sent; what taskiq repeats of itself is not kept out."""
    broker = make_broker().with_middlewares(SimpleRetryMiddleware())
    runs = Seen()

    @broker.task(retry_on_error=True, max_retries=3, dedup_id="once")
    async def fail() -> None:
        runs(1)
        raise ValueError

    async with started(broker):
        await fail.kiq()
        await fail.kiq()
        assert (await broker.queue.stats()).pending == 1
    async with working(broker):
        await runs.count(3)
        await eventually(lambda: settled(broker))
    assert len(runs.items) == 3


@virtual
async def test_expired_tasks_are_not_run() -> None:
    """After expires_in a task that nobody began is a dead letter."""
    broker = make_broker()

    @broker.task(expires_in=10)
    async def never() -> None:
        raise AssertionError

    async with started(broker):
        await never.kiq()
        await asyncio.sleep(20)
    async with working(broker):
        await eventually(broker.queue.dead_letters.list)
        (letter,) = await broker.queue.dead_letters.list()
        assert letter.error.startswith("Expired")
        assert letter.headers["taskiq_task_name"].endswith(":never")


# -- acknowledgement -----------------------------------------------------------------------------------------------


@virtual
async def test_long_tasks_are_delivered_once() -> None:
    """A task may take long: its worker's heartbeats keep it, and nobody else gets it."""
    store = FaultyMemory()
    one, other = make_broker(store), make_broker(store)
    runs: list[str] = []

    async def long(where: str) -> str:
        runs.append(where)
        await asyncio.sleep(900)
        return where

    task = one.register_task(lambda: long("one"), "long")
    other.register_task(lambda: long("other"), "long")
    async with working(one), working(other):
        result = await (await task.kiq()).wait_result(check_interval=60)
    assert runs == [result.return_value]


@virtual
async def test_ack_within() -> None:
    """Past ack_within a task that is still running is delivered again; its late acknowledgement hurts nobody."""
    broker = make_broker(ack_within=100)
    runs = Seen()

    @broker.task
    async def slow() -> None:
        runs(anyio.current_time())
        if len(runs.items) == 1:
            await asyncio.sleep(300)

    async with working(broker):
        await slow.kiq()
        await runs.count(2)
        await asyncio.sleep(400)
        assert await settled(broker)
    first, second = runs.items
    assert 99.9 < second - first < 110


@pytest.mark.parametrize("kind", list(AcknowledgeType))
def test_kinds_of_acknowledgement(kind: AcknowledgeType) -> None:
    """Each of taskiq's kinds ends with the message gone; when the task is received, before the task runs."""
    broker = make_broker()
    states: list[MessageStatus] = []

    @broker.task(ack_type=kind.value)
    async def look(context: Context = TaskiqDepends()) -> None:  # noqa: B008 - so taskiq has it
        delivery = broker.delivery(context.message.task_id)
        assert delivery is not None
        states.append(await broker.queue.status(delivery.message.id))
        if kind is AcknowledgeType.MANUAL:
            await context.ack()

    async def main() -> None:
        async with working(broker):
            await (await look.kiq()).wait_result()
            await eventually(lambda: settled(broker))
            assert await broker.queue.dead_letters.list() == []

    virtual(main)()
    early = kind is AcknowledgeType.WHEN_RECEIVED
    assert states == [MessageStatus.COMPLETED if early else MessageStatus.PROCESSING]


@virtual
async def test_manual_acknowledgement_that_never_comes() -> None:
    """A task that was to acknowledge by itself, ends, and has not is tried again, and is a dead letter in the end.

    taskiq keeps the Context of the task that it began last, so it takes another task to notice.
    """
    broker = make_broker(settings=Settings(max_attempts=2, coordinator=False))
    runs = Seen()

    @broker.task(ack_type="manual")
    async def forget() -> None:
        runs(1)

    @broker.task
    async def other() -> None: ...

    async with working(broker):
        await forget.kiq()
        for number in (1, 2):
            await runs.count(number)
            await other.kiq()
        await eventually(broker.queue.dead_letters.list)
        (letter,) = await broker.queue.dead_letters.list()
        assert (letter.attempts, letter.error) == (2, "Retry: taskiq gave it up without acknowledging it")


@virtual
async def test_manual_acknowledgement_later() -> None:
    """It may come from elsewhere, long after the task has ended: as long as somebody can acknowledge, all is well."""
    broker = make_broker()
    contexts: list[Context] = []
    runs = Seen()

    @broker.task(ack_type="manual")
    async def keep(context: Context = TaskiqDepends()) -> None:  # noqa: B008 - so taskiq has it
        contexts.append(context)
        runs(1)

    async with working(broker):
        await keep.kiq()
        await runs.count(1)
        gc.collect()
        await asyncio.sleep(1000)
        assert not await settled(broker)
        await contexts.pop().ack()
        assert await settled(broker)
        assert runs.items == [1]


class _Failing(TaskiqMiddleware):
    def __init__(self, hook: str) -> None:
        super().__init__()
        self.calls = 0
        setattr(type(self), hook, type(self)._fail)

    async def _fail(self, *arguments: Any) -> None:
        self.calls += 1
        raise RuntimeError(f"middleware failed, call {self.calls}")


@pytest.mark.parametrize("hook", ["pre_execute", "post_execute", "on_error"])
def test_middlewares_that_fail(hook: str) -> None:
    """taskiq drops such a message without a word; here it is tried again, and the dead letter has the traceback."""

    async def main() -> None:
        middleware = type("Failing", (_Failing,), {})(hook)
        broker = make_broker(settings=Settings(max_attempts=2, coordinator=False)).with_middlewares(middleware)

        @broker.task
        async def fail() -> None:
            raise ValueError("the task's own")

        async with working(broker):
            await fail.kiq()
            await eventually(broker.queue.dead_letters.list)
            (letter,) = await broker.queue.dead_letters.list()
            assert letter.attempts == 2
            assert letter.error == "RuntimeError: middleware failed, call 2"
            assert "in _fail" in letter.traceback

    virtual(main)()


@virtual
async def test_messages_of_nobody() -> None:
    """A message that taskiq cannot read, or whose task it does not know, is done: that is how taskiq has it."""
    store = FaultyMemory()
    broker, stranger = make_broker(store), make_broker(store)

    @stranger.task("unknown-here")
    async def unknown() -> None: ...

    stranger.local_task_registry.clear()
    AsyncBroker.global_task_registry.pop("unknown-here", None)
    async with started(stranger):
        await unknown.kiq()
        await stranger.queue.enqueue(b"no message of taskiq's")
    async with working(broker):
        await eventually(lambda: settled(broker))
        assert await broker.queue.dead_letters.list() == []


# -- retries by taskiq's own middlewares -----------------------------------------------------------------------------


@virtual
async def test_simple_retries() -> None:
    """max_retries runs, one after the other; the result is that of the last."""
    broker = make_broker().with_middlewares(SimpleRetryMiddleware())
    runs: list[float] = []

    @broker.task(retry_on_error=True, max_retries=4)
    async def fail() -> None:
        runs.append(anyio.current_time())
        raise ValueError(str(len(runs)))

    async with working(broker):
        result = await (await fail.kiq()).wait_result()
        await eventually(lambda: settled(broker))
    assert len(runs) == 4
    assert isinstance(result.error, ValueError)
    assert str(result.error) == "4"


@virtual
async def test_smart_retries() -> None:
    """The delay between two runs is the middleware's: it goes by the label delay."""
    middleware = SmartRetryMiddleware(default_delay=50, use_delay_exponent=True, max_delay_exponent=1000)
    broker = make_broker().with_middlewares(middleware)
    runs = Seen()

    @broker.task(retry_on_error=True, max_retries=3)
    async def fail() -> None:
        runs(anyio.current_time())
        raise ValueError

    async with working(broker):
        await fail.kiq()
        first, second, third = await runs.count(3)
    assert 49.9 < second - first < 60
    assert 99.9 < third - second < 110


@virtual
async def test_requeue() -> None:
    """Context.requeue sends the task again, and stores no result before the last run."""
    broker = make_broker()
    runs: list[int] = []

    @broker.task
    async def later(context: Context = TaskiqDepends()) -> int:  # noqa: B008 - so taskiq has it
        runs.append(1)
        if len(runs) < 3:
            await context.requeue()
        return len(runs)

    async with working(broker):
        assert (await (await later.kiq()).wait_result()).return_value == 3


# -- life ----------------------------------------------------------------------------------------------------------


@virtual
async def test_events_and_restart() -> None:
    """startup and shutdown call taskiq's events; a broker can be started again, and starting twice is one start."""
    broker = make_broker()
    seen: list[str] = []
    broker.add_event_handler(TaskiqEvents.CLIENT_STARTUP, lambda _: seen.append("startup"))
    broker.add_event_handler(TaskiqEvents.CLIENT_SHUTDOWN, lambda _: seen.append("shutdown"))

    @broker.task
    async def nothing() -> None: ...

    for _ in range(2):
        async with started(broker):
            await nothing.kiq()
    assert seen == ["startup", "shutdown"] * 2
    await broker.startup()
    queue = broker.queue
    await broker.startup()
    assert broker.queue is queue
    assert (await queue.stats()).pending == 2
    await broker.shutdown()
    await broker.shutdown()


@virtual
async def test_without_startup() -> None:
    """Sending says what is missing."""
    broker = make_broker()

    @broker.task
    async def nothing() -> None: ...

    with pytest.raises(SendTaskError) as raised:
        await nothing.kiq()
    assert isinstance(raised.value.__cause__, QueueClosed)
    assert "await broker.startup()" in str(raised.value.__cause__)


@virtual
async def test_startup_that_fails() -> None:
    """A store that cannot be opened, or an event handler that fails: startup raises it, and leaves nothing behind."""
    store = FaultyMemory()
    broker = make_broker(store)
    store.unavailable(retriable=False)
    with pytest.raises(StoreUnavailable):
        await broker.startup()
    store.clear()

    async def fail(_: object) -> None:
        raise ValueError("no")

    broker.add_event_handler(TaskiqEvents.CLIENT_STARTUP, fail)
    with pytest.raises(ValueError, match="no"):
        await broker.startup()
    with pytest.raises(QueueClosed):
        _ = broker.queue
    broker.event_handlers.clear()
    async with started(broker):
        assert broker.queue.health().live


@virtual
async def test_startup_that_is_cancelled() -> None:
    """Nothing is left behind; the next one works."""
    store = FaultyMemory()
    broker = make_broker(store)
    gate = store.hold("get", "put", "list")
    with anyio.move_on_after(5) as scope:
        await broker.startup()
    assert scope.cancelled_caught
    gate.open()
    async with started(broker):
        assert broker.queue.health().live


# -- shutdown ------------------------------------------------------------------------------------------------------


@virtual
async def test_shutdown_waits_for_running_tasks() -> None:
    """What runs ends and is acknowledged; what nobody began is left in the queue at once, with all its attempts."""
    store = FaultyMemory()
    broker = make_broker(store)
    runs = Seen()

    @broker.task
    async def slow(number: int) -> None:
        runs(number)
        await asyncio.sleep(1000)

    async with started(broker):
        for number in range(5):
            await slow.kiq(number)
    async with working(broker, max_async_tasks=2):
        await runs.count(2)
    assert len(runs.items) == 2
    later = make_broker(store)
    async with started(later):
        stats = await later.queue.stats(exact=True)
        assert (stats.pending, stats.processing, stats.workers) == (3, 0, 0)
        messages = [message for _ in range(3) for message in await later.queue.receive(1, wait=1)]
        assert {message.context.attempt for message in messages} == {1}


@virtual
async def test_shutdown_gives_up_on_tasks_that_run_on() -> None:
    """After taskiq's --wait-tasks-timeout the message of what still runs goes back at once; the attempt does not count."""
    store = FaultyMemory()
    broker = make_broker(store)
    runs = Seen()

    @broker.task
    async def endless() -> None:
        runs(1)
        await asyncio.sleep(DAY_S)

    async with working(broker, wait_tasks_timeout=10):
        await endless.kiq()
        await runs.count(1)
        began = anyio.current_time()
    assert anyio.current_time() - began < 15
    later = make_broker(store)
    async with started(later):
        (message,) = await later.queue.receive(wait=1)
        assert message.context.attempt == 1
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
        await asyncio.wait({task})


@virtual
async def test_shutdown_at_any_moment() -> None:
    """Whenever the shutdown comes, also between a receive and its delivery, each task is run or waits; none is held."""
    for step in range(40):
        store = FaultyMemory()
        broker = make_broker(store)
        runs: list[int] = []

        @broker.task("note")
        async def note(number: int) -> None:
            runs.append(number)  # noqa: B023 - run in this round

        async with started(broker):
            await note.kiq(1)
            await note.kiq(2)
        async with working(broker):
            for _ in range(step * 4):
                await asyncio.sleep(0)
        later = make_broker(store)
        async with started(later):
            stats = await later.queue.stats(exact=True)
            assert (stats.processing, stats.delayed, stats.workers) == (0, 0, 0), step
            assert stats.pending + len(runs) == 2, step
        AsyncBroker.global_task_registry.pop("note", None)


@virtual
async def test_a_receiver_that_is_cancelled() -> None:
    """run_receiver_task, cancelled in the middle: what it had fetched goes back at once; what it ran ends as usual."""
    broker = make_broker()
    runs = Seen()

    @broker.task
    async def wait(number: int) -> None:
        runs(number)
        await asyncio.sleep(100)

    async with started(broker):
        for number in range(4):
            await wait.kiq(number)
        receiving = asyncio.create_task(run_receiver_task(broker, max_async_tasks=2, max_prefetch=2))
        await runs.count(2)
        await asyncio.sleep(5)
        receiving.cancel()
        await asyncio.wait({receiving})
        receiving = asyncio.create_task(run_receiver_task(broker, max_async_tasks=4))
        began = anyio.current_time()

        async def all_began() -> bool:
            # What taskiq dropped in a cycle of references is noticed with the next collection of garbage.
            gc.collect()
            return len(runs.items) == 4

        await eventually(all_began)
        assert anyio.current_time() - began < 10
        await eventually(lambda: settled(broker))
        receiving.cancel()
        await asyncio.wait({receiving})
    assert sorted(runs.items) == [0, 1, 2, 3]


@virtual
async def test_shutdown_that_is_broken_off() -> None:
    """taskiq's --shutdown-timeout while the store is away: shutdown ends soon after; the lease does the rest."""
    store = FaultyMemory()
    broker = make_broker(store)
    runs = Seen()

    @broker.task
    async def endless() -> None:
        runs(1)
        await asyncio.sleep(DAY_S)

    broker.is_worker_process = True
    await broker.startup()
    await endless.kiq()
    fetched = await anext(broker.listen())
    assert isinstance(fetched, AckableMessage)
    store.unavailable()
    began = anyio.current_time()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(broker.shutdown(), 5)
    assert anyio.current_time() - began < 30
    store.clear()
    later = make_broker(store)
    async with started(later):
        (message,) = await later.queue.receive(wait=120)
        assert message.payload == fetched.data


@virtual
async def test_a_store_that_fails_for_a_while() -> None:
    """Sending, running and results get through; each task runs once."""
    store = FaultyMemory()
    broker = make_broker(store, settings=QUIET)
    runs: list[int] = []

    @broker.task
    async def note(number: int) -> int:
        runs.append(number)
        return number

    async with working(broker):
        for number in range(10):
            store.unavailable("put", times=1, skip=number % 4)
            store.throttle("get", "put", times=1, skip=number % 3)
            task = await note.kiq(number)
            assert (await task.wait_result()).return_value == number
        await eventually(lambda: settled(broker))
    assert runs == list(range(10))
