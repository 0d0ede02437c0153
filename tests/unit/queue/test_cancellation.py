"""Cancellation and cuts at every request, one by one: nothing is lost, nothing stays behind, no task is left."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest

from s3queue_async import Context, DeadLetter, Retry, S3Queue, Settings
from s3queue_async.errors import StoreUnavailable
from tests.unit.queue.bed import Bed, Recorder, eventually, virtual

SETTINGS = Settings(
    coordinator=False,
    visibility_timeout=3,
    heartbeat_interval=0.9,
    claim_linger=3,
    segment_age=1,
    dedup_window=8,
    backoff_base=0.5,
    drain_timeout=2,
)
STEPS_MAX = 200


class Snare(Recorder):
    """Stops at the n-th request that the scenario makes: before it is applied, or after.

    Attributes:
        reached: Set once that request is there; it waits until it is cancelled or ``go`` is set.
    """

    def __init__(self, inner: Any, number: int, *, applied: bool) -> None:
        super().__init__(inner)
        self.left = number
        self.applied = applied
        self.armed = False
        self.reached = anyio.Event()
        self.go = anyio.Event()

    async def _run(self, operation: str, keys: tuple[str, ...], request: Callable[[], Awaitable[Any]]) -> Any:
        if not self.armed:
            return await super()._run(operation, keys, request)
        self.left -= 1
        if self.left != 0:
            return await super()._run(operation, keys, request)
        if self.applied:
            try:
                return await super()._run(operation, keys, request)
            finally:
                # An answer such as "not found" is a reply, too.
                await self._stop()
        await self._stop()
        return await super()._run(operation, keys, request)

    async def _stop(self) -> None:
        self.reached.set()
        await self.go.wait()


class Account:
    """What producers were told, and what handlers ended."""

    def __init__(self) -> None:
        self.acknowledged: set[str] = set()
        self.ended: Counter[str] = Counter()

    async def handler(self, payload: int, context: Context) -> None:
        await anyio.sleep(0.05)
        if payload % 5 == 1 and context.attempt == 1:
            raise Retry(delay=1)
        if payload % 5 == 2 and context.attempt == 1:
            raise ValueError("once")
        if payload % 5 == 3:
            self.ended[context.message_id] += 1
            raise DeadLetter("no use")
        self.ended[context.message_id] += 1

    async def produce(self, queue: S3Queue[Any]) -> None:
        for number in range(0, 10, 5):
            self.acknowledged.update(await queue.enqueue_many(range(number, number + 5)))
        self.acknowledged.add(await queue.enqueue(0, dedup_id="x"))

    async def is_done(self) -> bool:
        return self.acknowledged <= set(self.ended)


async def finish(bed: Bed, account: Account) -> None:
    """A fresh queue completes what is left; at the end there is nothing but the dead letters."""

    async def done() -> bool:
        live = await bed.live()
        return await account.is_done() and all(
            place.startswith("dead/") for places in live.values() for place in places
        )

    async with bed.queue(settings=SETTINGS, on_message=account.handler) as queue:
        await eventually(done, every_s=1)
        await queue.dead_letters.purge()
        await anyio.sleep(15)
    assert await bed.leftovers() == []


@pytest.mark.parametrize("applied", [False, True])
@pytest.mark.parametrize("how", ["task", "scope"])
def test_the_program_is_cancelled(applied: bool, how: str) -> None:
    """A program that enqueues and handles is cancelled at its n-th request: a fresh one completes everything."""

    @virtual
    async def at_request(number: int) -> None:
        bed = Bed(seed=number)
        account = Account()
        snare = Snare(bed.store, number, applied=applied)

        async def program(queue: S3Queue[Any]) -> None:
            async with queue:
                snare.armed = True
                await account.produce(queue)
                await eventually(account.is_done)
                await anyio.sleep(3)

        queue = bed.queue(settings=SETTINGS, storage=snare, on_message=account.handler)
        over = await run_cut(snare, lambda: program(queue), how)
        passed.append(over)
        await finish(bed, account)
        if over:
            assert set(account.ended.values()) == {1}

    passed: list[bool] = []
    for number in range(1, STEPS_MAX):
        at_request(number)
        if passed[-1]:
            break
    assert passed[-1], "the scenario must run through in the end"
    assert len(passed) > 10


async def run_cut(snare: Snare, program: Callable[[], Awaitable[None]], how: str) -> bool:
    """Run the program and cancel it where the snare stops it; True when it ran through."""

    async def run() -> None:
        await program()

    async def cut() -> None:
        await snare.reached.wait()
        # Whoever was stopped may go on only where nothing else ends it: a write under way is awaited, not abandoned.
        await anyio.sleep(1)
        snare.go.set()

    cutter = asyncio.create_task(cut())
    try:
        if how == "task":
            task = asyncio.create_task(run())
            reached = asyncio.create_task(snare.reached.wait())
            await asyncio.wait({task, reached}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                await task
                reached.cancel()
                await asyncio.gather(reached, return_exceptions=True)
                return True
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            assert task.cancelled() or task.exception() is None or isinstance(task.exception(), BaseException)
            return False
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as group:

                async def watch() -> None:
                    await snare.reached.wait()
                    scope.cancel()

                group.start_soon(watch)
                await run()
                if not snare.reached.is_set():
                    group.cancel_scope.cancel()
                    return True
        return False
    finally:
        cutter.cancel()
        await asyncio.gather(cutter, return_exceptions=True)


@pytest.mark.parametrize("applied", [False, True])
def test_one_enqueue_is_cancelled(applied: bool) -> None:
    """One caller among others is cancelled at the n-th request: the others' messages are there, once each.

    The cancelled caller's own message is either not there or there once; with a dedup_id it can be enqueued again.
    """

    @virtual
    async def at_request(number: int) -> None:
        bed = Bed(seed=number)
        snare = Snare(bed.store, number, applied=applied)
        async with bed.queue(settings=SETTINGS, storage=snare) as queue:
            snare.armed = True
            victim = asyncio.create_task(queue.enqueue("victim", dedup_id="v"))
            others = [asyncio.create_task(queue.enqueue(n)) for n in range(3)]
            reached = asyncio.create_task(snare.reached.wait())
            await asyncio.wait({victim, reached}, return_when=asyncio.FIRST_COMPLETED)
            passed.append(not snare.reached.is_set())
            victim.cancel()
            await anyio.sleep(0.5)
            snare.go.set()
            reached.cancel()
            await asyncio.gather(victim, reached, return_exceptions=True)
            ids = set(await asyncio.gather(*others))
            again = await queue.enqueue("victim", dedup_id="v")
        records = [record for key in await bed.keys("ready/") for record in (await bed.segment(key)).index.records]
        assert Counter(record.id for record in records) == Counter({again, *ids})

    passed: list[bool] = []
    for number in range(1, STEPS_MAX):
        at_request(number)
        if passed[-1]:
            break
    assert passed[-1]


@virtual
async def test_cancelled_before_it_is_sent() -> None:
    """A caller that is cancelled while its batch still waits takes its message out: it is never written."""
    bed = Bed(latency_s=1)
    async with bed.queue(settings=SETTINGS) as queue:
        first = asyncio.create_task(queue.enqueue("first"))
        await anyio.sleep(0.1)
        second = asyncio.create_task(queue.enqueue("second"))
        third = asyncio.create_task(queue.enqueue("third"))
        await anyio.sleep(0.1)
        second.cancel()
        with pytest.raises(asyncio.CancelledError):
            await second
        await asyncio.gather(first, third)
        assert (await queue.stats()).pending == 2


@virtual
async def test_cancelled_while_it_is_sent() -> None:
    """A caller that is cancelled while its segment is on its way learns of it only when the outcome is known."""
    bed = Bed(latency_s=2)
    async with bed.queue(settings=SETTINGS) as queue:
        began = anyio.current_time()
        task = asyncio.create_task(queue.enqueue("x"))
        await anyio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert anyio.current_time() - began >= 2
        assert (await queue.stats()).pending == 1


@pytest.mark.parametrize("applied", [False, True])
def test_the_store_is_cut_off_for_good(applied: bool) -> None:
    """From its n-th request on a worker reaches nothing: another one completes everything, nothing is left."""

    @virtual
    async def at_request(number: int) -> None:
        bed = Bed(seed=number)
        account = Account()
        store, faults = bed.lane()
        snare = Snare(store, number, applied=applied)
        async with bed.queue(settings=SETTINGS, storage=snare, on_message=account.handler) as queue:
            snare.armed = True
            async with anyio.create_task_group() as group:

                async def produce() -> None:
                    try:
                        await account.produce(queue)
                    except StoreUnavailable:
                        return
                    await eventually(account.is_done)
                    await anyio.sleep(3)
                    if not snare.reached.is_set():
                        snare.armed = False
                        passed.append(number)
                        group.cancel_scope.cancel()

                group.start_soon(produce)
                await snare.reached.wait()
                faults.unavailable()
                snare.go.set()
                await anyio.sleep(10)
                group.cancel_scope.cancel()
        await finish(bed, account)

    passed: list[int] = []
    for number in range(1, STEPS_MAX):
        at_request(number)
        if passed:
            break
    assert passed


async def leave_a_suspect(bed: Bed) -> None:
    """A message whose worker was lost while it handled it: whoever gets it records its start first, and runs it alone."""
    lane, faults = bed.lane()
    reached = anyio.Event()

    async def cut(payload: str) -> None:
        faults.unavailable()
        reached.set()
        await anyio.sleep_forever()

    async with anyio.create_task_group() as group:

        async def lost() -> None:
            async with bed.queue(storage=lane, settings=SETTINGS, on_message=cut) as queue:
                await queue.enqueue("suspect")
                await anyio.sleep_forever()

        group.start_soon(lost)
        await reached.wait()
        group.cancel_scope.cancel()


@pytest.mark.parametrize("how", ["receive", "process_next"])
@pytest.mark.parametrize("applied", [False, True], ids=["before", "after"])
def test_a_recorded_start_is_cancelled(applied: bool, how: str) -> None:
    """Who asked for a message is cancelled while its start is recorded: it comes to the next, soon, and is not lost."""

    async def main() -> None:
        bed = Bed()
        await leave_a_suspect(bed)
        handled: list[Any] = []
        async with bed.queue(settings=SETTINGS, on_message=handled.append, auto_start=False) as queue:
            hold = bed.faults.hold_reply if applied else bed.faults.hold
            # The first write of a claim takes the segment over, the second records the start.
            gate = hold("put", key="claims/*", skip=1)

            async def ask() -> None:
                if how == "receive":
                    await queue.receive(wait=60)
                await eventually(queue.process_next)

            async with anyio.create_task_group() as group:
                group.start_soon(ask)
                await gate.reached.wait()
                assert any(key.startswith("ready/") for key in await bed.keys())
                group.cancel_scope.cancel()
            assert handled == []
            began = anyio.current_time()
            (message,) = await queue.receive(wait=60)
            assert anyio.current_time() - began < 5
            assert (message.payload, message.context.attempt) == ("suspect", 1)
            await message.release()
        async with bed.queue(settings=SETTINGS, on_message=handled.append) as queue:
            await eventually(lambda: _all_gone(queue))
        assert handled == ["suspect"]

    virtual(main)()


@pytest.mark.parametrize("how", ["handler", "receive"])
def test_the_time_of_a_drain_is_over_while_a_start_is_recorded(how: str) -> None:
    """It is not started any more, so that nobody waits for its end; the attempt does not count."""

    async def main() -> None:
        bed = Bed()
        await leave_a_suspect(bed)
        handled: list[Any] = []
        received: list[Any] = []

        async def handle(payload: str) -> None:
            handled.append(payload)
            await anyio.sleep(3600)

        async with bed.queue(settings=SETTINGS) as queue, anyio.create_task_group() as group:
            gate = bed.faults.hold("put", key="claims/*", skip=1)

            async def receive() -> None:
                received.extend(await queue.receive(wait=60, ack_within=3600))

            if how == "handler":
                queue.handler(handle)
            else:
                group.start_soon(receive)
            await gate.reached.wait()

            async def open_late() -> None:
                await anyio.sleep(0.5)
                gate.open()

            group.start_soon(open_late)
            report = await queue.drain(timeout=0.2)
            assert report.elapsed < 5
            assert (report.clean, report.handed_back) == (True, 1)
        assert handled == received == []
        async with bed.queue(settings=SETTINGS) as queue:
            (message,) = await queue.receive(wait=60)
            assert message.context.attempt == 1
            await message.ack()

    virtual(main)()


async def _all_gone(queue: S3Queue[Any]) -> bool:
    stats = await queue.stats(exact=True)
    return stats.pending + stats.processing + stats.delayed == 0
