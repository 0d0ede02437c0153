"""The workloads of the regression guard: the real engine, on a store in memory that counts, in virtual time.

Nothing here depends on the machine: time is virtual, chance has a seed, each request takes the same virtual time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from random import Random
from typing import Any

import anyio

from s3queue_async import Context, Retry, S3Queue, Settings
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Deleted,
    IfVersion,
    Page,
    Stored,
    Unmodified,
    Written,
)
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.clock import LoopClock, run_virtual, store_now

REQUEST_S = 0.02
"""Each request takes so long."""
PAYLOAD = {"to": "somebody@example.com", "subject": "x" * 60}
TOGETHER = 32
"""Handlers at a time where nothing else is meant."""
SETTLED_S = 30.0
"""After the last message: until then finished claims linger, and heartbeats carry sums."""
PATIENCE_S = 100_000.0
STORE_COUNTS = ("PUT", "GET", "LIST", "DELETE", "bytes written", "bytes read", "keys listed")
ALONE = Settings(coordinator=False)
CLUSTER_WORKERS = 4
CLUSTER_ARRIVALS_PER_S = 20.0
CLUSTER_HANDLER_S = 0.1


class CountingStorage(MemoryStorage):
    """A store in memory that takes its time and counts what it is asked for; queues may close it and open it again."""

    def __init__(self) -> None:
        super().__init__(now=store_now)
        self.counts: Counter[str] = Counter()

    async def close(self) -> None:
        """Stay open: other queues are on it, too."""

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        self.counts["GET"] += 1
        await anyio.sleep(REQUEST_S)
        reply = await super().get(key, span=span, unless=unless)
        if isinstance(reply, Stored):
            self.counts["bytes read"] += len(reply.body)
        return reply

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        self.counts["PUT"] += 1
        self.counts["bytes written"] += len(body)
        await anyio.sleep(REQUEST_S)
        return await super().put(key, body, when=when)

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        self.counts["DELETE"] += 1
        await anyio.sleep(REQUEST_S)
        return await super().delete(key, when=when)

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        self.counts["DELETE"] += 1
        await anyio.sleep(REQUEST_S)
        return await super().delete_many(keys)

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        self.counts["LIST"] += 1
        await anyio.sleep(REQUEST_S)
        page = await super().list(prefix, after=after, limit=limit)
        self.counts["keys listed"] += len(page.entries)
        return page


class Bench:
    """One store, and queues on it whose chance comes from a seed."""

    def __init__(self) -> None:
        self.store = CountingStorage()
        self._rng = Random(1)

    def queue(self, settings: Settings = ALONE, **options: Any) -> S3Queue[Any]:
        return S3Queue(
            storage=self.store, settings=settings, clock=LoopClock(), rng=Random(self._rng.getrandbits(64)), **options
        )


class Finish:
    """Counts handled messages, and says when all are."""

    def __init__(self, messages: int) -> None:
        self.handled = 0
        self._messages = messages
        self._all = anyio.Event()

    def one(self) -> None:
        self.handled += 1
        if self.handled == self._messages:
            self._all.set()

    async def wait(self) -> None:
        """Until all are handled and settled; Raises RuntimeError when one was handled twice."""
        with anyio.fail_after(PATIENCE_S):
            await self._all.wait()
        await anyio.sleep(SETTLED_S)
        if self.handled != self._messages:
            raise RuntimeError(f"{self._messages} messages were enqueued, {self.handled} were handled")


async def nothing_before(bench: Bench, messages: int) -> None:
    """The workload begins with an empty store."""


async def enqueue_burst(bench: Bench, messages: int) -> None:
    async with bench.queue() as queue:
        await queue.enqueue_many(PAYLOAD for _ in range(messages))


async def enqueue_together(bench: Bench, messages: int) -> None:
    """Callers that each enqueue one message after the other."""

    async def caller(queue: S3Queue[Any], count: int) -> None:
        for _ in range(count):
            await queue.enqueue(PAYLOAD)

    async with bench.queue() as queue, anyio.create_task_group() as group:
        for _ in range(TOGETHER):
            group.start_soon(caller, queue, messages // TOGETHER)


async def enqueue_singles(bench: Bench, messages: int) -> None:
    async with bench.queue() as queue:
        for _ in range(messages):
            await queue.enqueue(PAYLOAD)


async def process(bench: Bench, messages: int) -> None:
    finish = Finish(messages)

    async def handle(payload: dict[str, str]) -> None:
        finish.one()

    async with bench.queue(on_message=handle, concurrency=TOGETHER):
        await finish.wait()


async def retry(bench: Bench, messages: int) -> None:
    finish = Finish(messages)

    async def handle(payload: dict[str, str], context: Context) -> None:
        if context.attempt == 1:
            # Not an error of another kind: the traceback that is kept of it has the machine's paths in it.
            raise Retry
        finish.one()

    async with bench.queue(on_message=handle, concurrency=TOGETHER):
        await finish.wait()


async def one_process(bench: Bench, messages: int) -> None:
    """Producer and worker in one queue object: what an idle worker gets, it gets from memory."""
    finish = Finish(messages)
    handled = anyio.Event()

    async def handle(payload: dict[str, str]) -> None:
        finish.one()
        handled.set()

    async with bench.queue(on_message=handle, concurrency=TOGETHER) as queue:
        await anyio.sleep(1)
        for _ in range(messages):
            handled = anyio.Event()
            await queue.enqueue(PAYLOAD)
            await handled.wait()
        await finish.wait()


async def idle(bench: Bench, minutes: int) -> None:
    async def handle(payload: dict[str, str]) -> None:
        raise RuntimeError("an idle queue delivered a message")

    async with AsyncExitStack() as stack:
        for _ in range(2):
            await stack.enter_async_context(bench.queue(Settings(), on_message=handle))
        await anyio.sleep(60.0 * minutes)


async def cluster(bench: Bench, messages: int) -> None:
    """Single messages from one process at an even rate, for workers that have a coordinator."""
    await _from_elsewhere(bench, messages, workers=CLUSTER_WORKERS, arrivals_per_s=CLUSTER_ARRIVALS_PER_S)


async def trickle(bench: Bench, messages: int) -> None:
    """A message a second from another process, for a worker that coordinates nobody but itself."""
    await _from_elsewhere(bench, messages, workers=1, arrivals_per_s=1.0)


async def _from_elsewhere(bench: Bench, messages: int, *, workers: int, arrivals_per_s: float) -> None:
    finish = Finish(messages)

    async def handle(payload: dict[str, str]) -> None:
        await anyio.sleep(CLUSTER_HANDLER_S)
        finish.one()

    async with AsyncExitStack() as stack:
        for _ in range(workers):
            await stack.enter_async_context(bench.queue(Settings(), on_message=handle))
        producer = await stack.enter_async_context(bench.queue(Settings()))
        await anyio.sleep(SETTLED_S)
        async with anyio.create_task_group() as group:
            for _ in range(messages):
                group.start_soon(producer.enqueue, PAYLOAD)
                await anyio.sleep(1 / arrivals_per_s)
        await finish.wait()


Step = Callable[[Bench, int], Awaitable[None]]


@dataclass(frozen=True)
class Workload:
    """What is done, and how often.

    Attributes:
        before: What is in the store before; not counted.
        work: What is counted.
        messages: How many (or minutes) at native speed.
        messages_slow: The same where each instruction is followed, which is fifty times slower; None: not there.
        unit: What the counts are divided by.
    """

    before: Step
    work: Step
    messages: int
    messages_slow: int | None
    unit: str = "message"


WORKLOADS = {
    "enqueue, 256 a segment": Workload(nothing_before, enqueue_burst, 25_600, 512),
    "enqueue, 32 callers": Workload(nothing_before, enqueue_together, 6_400, 256),
    "enqueue, one by one": Workload(nothing_before, enqueue_singles, 1_000, 24),
    "process, 256 a segment": Workload(enqueue_burst, process, 25_600, 512),
    "process, 1 a segment": Workload(enqueue_singles, process, 1_000, 24),
    "one by one in one process": Workload(nothing_before, one_process, 500, 16),
    "retry once, 256 a segment": Workload(enqueue_burst, retry, 5_120, 256),
    "4 workers, a coordinator": Workload(nothing_before, cluster, 600, None),
    "1 worker, a message a second": Workload(nothing_before, trickle, 120, None),
    "2 idle workers": Workload(nothing_before, idle, 60, None, unit="minute"),
}


def run(workload: Workload, messages: int, begin: Callable[[Bench], None], end: Callable[[Bench], None]) -> None:
    """Do it once; ``begin`` and ``end`` are called around what counts."""

    async def main() -> None:
        bench = Bench()
        await bench.store.open()
        await workload.before(bench, messages)
        # What was enqueued is in the past by then, as it is for another process.
        await anyio.sleep(SETTLED_S)
        begin(bench)
        await workload.work(bench, messages)
        end(bench)

    run_virtual(main)
