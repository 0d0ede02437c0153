"""What every contender can do, and the one way in which all of them are measured.

Only the standard library is used here: the peers run in a virtual environment of their own, without this library.
"""

from __future__ import annotations

import asyncio
import gc
import resource
import statistics
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

T = TypeVar("T")

PAYLOAD_BYTES = 100
DIGITS = 8
PATIENCE_S = 20.0
"""A message that has not come when nothing came for so long is lost."""


@dataclass(frozen=True)
class Place:
    """Where the messages of one run live; nothing else is under the prefix."""

    endpoint_url: str
    region: str
    access_key_id: str
    secret_access_key: str
    bucket: str
    prefix: str
    redis_url: str = ""


@dataclass(frozen=True)
class Task:
    """What one contender is to do in a process of its own."""

    contender: str
    work: str
    messages: int
    place: Place
    payload_bytes: int = PAYLOAD_BYTES
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """So many messages took so long; ``requests`` is empty for a contender that cannot tell."""

    messages: int
    seconds: float
    cpu_s: float
    requests: dict[str, int]

    @property
    def rate(self) -> float:
        return self.messages / self.seconds

    @property
    def requests_per_message(self) -> float:
        return sum(self.requests.values()) / self.messages


@dataclass(frozen=True)
class Drained:
    """A backlog that was enqueued and then processed."""

    enqueue: Sample
    process: Sample
    lost: int
    duplicated: int


class Contender(Protocol):
    """A queue, as the benchmarks see it. Its producer and its worker are in one process."""

    async def open(self) -> None:
        """Connect; not measured."""

    async def enqueue(self, payloads: Sequence[bytes]) -> None:
        """Enqueue all, as fast as this contender can; they are durable when this returns."""

    async def start(self, handle: Callable[[bytes], None]) -> None:
        """Begin to process with a handler that does nothing but call this."""

    async def finish(self) -> None:
        """Whatever belongs to processing besides the handlers; nothing for a contender that is measured without."""

    async def close(self) -> None:
        """End the worker and disconnect; not measured."""

    def requests(self) -> Mapping[str, int]:
        """The requests of its store so far, by operation; {} when it does not count them."""


class Tally:
    """The handler of every contender: remembers what came, and knows when that is everything."""

    def __init__(self, expected: int) -> None:
        self.expected = expected
        self.seen: list[bytes] = []
        self.full = asyncio.Event()
        self._look_at = expected

    def __call__(self, payload: bytes) -> None:
        self.seen.append(payload)
        if len(self.seen) >= self._look_at:
            missing = self.lost
            self._look_at = len(self.seen) + missing
            if not missing:
                self.full.set()

    async def wait(self, patience_s: float = PATIENCE_S) -> None:
        """Return once all came, or nothing came for a long time."""
        known = -1
        while not self.full.is_set() and known != len(self.seen):
            known = len(self.seen)
            try:
                await asyncio.wait_for(self.full.wait(), patience_s)
            except TimeoutError:
                continue

    @property
    def lost(self) -> int:
        return max(0, self.expected - len(set(self.seen)))

    @property
    def duplicated(self) -> int:
        return len(self.seen) - len(set(self.seen))


def payloads(count: int, size: int = PAYLOAD_BYTES, *, first: int = 0) -> list[bytes]:
    """Payloads that all differ: a number, then filling."""
    filling = b"x" * (size - DIGITS)
    return [b"%0*d%s" % (DIGITS, number, filling) for number in range(first, first + count)]


def plain(name: str, work: Coroutine[Any, Any, None]) -> Awaitable[None]:
    """Run a phase with nothing around it."""
    return work


async def measured(messages: int, work: Awaitable[None], requests: Callable[[], Mapping[str, int]]) -> Sample:
    """Await the work; its time, this process's CPU, and the requests that it made."""
    # Otherwise one contender's run would pay for what another left: a closed S3 client is tens of thousands of objects.
    gc.collect()
    before = dict(requests())
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    await work
    took = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    made = {name: count - before.get(name, 0) for name, count in requests().items()}
    return Sample(messages, took, cpu_s, made)


async def drain(
    contender: Contender,
    messages: int,
    *,
    payload_bytes: int = PAYLOAD_BYTES,
    patience_s: float = PATIENCE_S,
    grace_s: float = 0.0,
    around: Callable[[str, Coroutine[Any, Any, None]], Awaitable[None]] = plain,
) -> Drained:
    """Enqueue so many messages in one burst, then process them.

    Args:
        contender: Whose queue is empty.
        messages: How many.
        payload_bytes: Of each message.
        patience_s: See Tally.wait.
        grace_s: How long to look for duplicates afterwards, in seconds.
        around: Called with the name of each phase and the phase, and returns what is measured; for profiles.
    """
    batch = payloads(messages, payload_bytes)
    tally = Tally(messages)

    async def process() -> None:
        await contender.start(tally)
        await tally.wait(patience_s)
        await contender.finish()

    await contender.open()
    try:
        enqueued = await measured(messages, around("enqueue", contender.enqueue(batch)), contender.requests)
        processed = await measured(messages, around("process", process()), contender.requests)
        await asyncio.sleep(grace_s)
    finally:
        await contender.close()
    return Drained(enqueued, processed, tally.lost, tally.duplicated)


async def round_trips(contender: Contender, count: int, *, pause_s: float = 0.05, warm: int = 3) -> list[float]:
    """Seconds from the start of an enqueue to the start of its handler, one message at a time in one process."""
    arrived = asyncio.Event()
    at = 0.0

    def handle(payload: bytes) -> None:
        nonlocal at
        at = time.perf_counter()
        arrived.set()

    took: list[float] = []
    await contender.open()
    try:
        await contender.start(handle)
        for payload in payloads(count + warm):
            arrived.clear()
            began = time.perf_counter()
            await contender.enqueue([payload])
            await asyncio.wait_for(arrived.wait(), PATIENCE_S)
            took.append(at - began)
            await asyncio.sleep(pause_s)
    finally:
        await contender.close()
    return took[warm:]


async def in_flight(items: Sequence[T], call: Callable[[T], Coroutine[Any, Any, Any]], most: int) -> None:
    """Call it with every item, so many at a time."""
    waiting = iter(items)

    async def run() -> None:
        for item in waiting:
            await call(item)

    async with asyncio.TaskGroup() as group:
        for _ in range(min(most, len(items))):
            group.create_task(run())


async def ended(worker: asyncio.Task[None] | None) -> None:
    """Cancel a worker; raises what it failed with before."""
    if worker is None:
        return
    worker.cancel()
    try:
        await worker
    except asyncio.CancelledError:
        return


def quantile(values: Sequence[float], part: float) -> float:
    """The value that so large a part of the values does not exceed; the only value when there is one."""
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=1000, method="inclusive")[round(part * 1000) - 1]
