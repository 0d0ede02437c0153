"""``s3queue bench``: how fast this machine and this store are, on a queue of its own that is deleted again."""

from __future__ import annotations

from collections.abc import Mapping
from random import SystemRandom  # noqa: TID251 - names the queue, and fills the payloads
from statistics import median, quantiles
from typing import Any

import anyio
import click
import msgspec

from s3queue_async.cli.common import Target, command
from s3queue_async.cli.screen import Screen, number, span
from s3queue_async.clock import SystemClock
from s3queue_async.metrics import dollars
from s3queue_async.queue import S3Queue
from s3queue_async.settings import Settings
from s3queue_async.storage.base import LIST_LIMIT_MAX, Storage
from s3queue_async.storage.metered import OPERATIONS
from s3queue_async.storage.plugin import PluginStorage
from s3queue_async.worker import CONCURRENCY_MAX

CLOCK = SystemClock()
SETTINGS = Settings(coordinator=False)


class Bench(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured.

    Attributes:
        messages, size: How many, of how many bytes each.
        enqueued_per_second: Enqueued together.
        handled_per_second: By a handler that does nothing, in one process.
        enqueue_p50, enqueue_p95: Seconds that enqueueing a single message took.
        latency_p50, latency_p95: Seconds from its enqueue to its handler, in one process.
        requests: Of enqueueing and handling them together, by operation.
        cost_per_million: Dollars for a million messages at S3's list prices, enqueued together and handled.
    """

    messages: int
    size: int
    enqueued_per_second: float
    handled_per_second: float
    enqueue_p50: float
    enqueue_p95: float
    latency_p50: float
    latency_p95: float
    requests: Mapping[str, int]
    cost_per_million: float


@command("bench", short_help="Measure this machine and this store.")
@click.option("--messages", "-m", type=click.IntRange(1, 10_000_000), default=5000, show_default=True)
@click.option("--size", type=click.IntRange(1, 10_000_000), default=200, show_default=True, help="Bytes of a payload.")
@click.option("--singles", type=click.IntRange(2, 10_000), default=20, show_default=True, help="Enqueued one by one.")
@click.option("--concurrency", "-c", type=click.IntRange(1, CONCURRENCY_MAX), default=100, show_default=True)
async def bench(screen: Screen, target: Target, *, messages: int, size: int, singles: int, concurrency: int) -> None:
    """Enqueue and handle messages in a queue of its own, below plugin/bench-... of this one, and delete that again.

    Requests to an S3 store are billed as usual; the result says what they cost.
    """
    storage = target.storage()
    name = f"bench-{SystemRandom().getrandbits(48):012x}"
    await storage.open()
    try:
        try:
            with screen.progress("handled", total=messages) as tell:
                found = await _measure(PluginStorage(storage, name), tell, messages, size, singles, concurrency)
        finally:
            with anyio.CancelScope(shield=True):
                await _delete_all(PluginStorage(storage, name))
    finally:
        await storage.close()
    if screen.json:
        screen.emit(found)
        return
    table = screen.table(f"{messages:,} messages of {size:,} bytes", "", "", right=("",))
    table.show_header = False
    table.add_row("enqueued together", f"{number(found.enqueued_per_second)} a second")
    table.add_row("handled", f"{number(found.handled_per_second)} a second")
    table.add_row("a single enqueue", f"{span(found.enqueue_p50)} (p95 {span(found.enqueue_p95)})")
    table.add_row("from enqueue to handler", f"{span(found.latency_p50)} (p95 {span(found.latency_p95)})")
    table.add_row("requests", ", ".join(f"{count:,} {name}" for name, count in found.requests.items() if count))
    table.add_row("a million such messages", f"${found.cost_per_million:.3f} on S3")
    screen.say(table)


async def _measure(storage: Storage, tell: Any, messages: int, size: int, singles: int, concurrency: int) -> Bench:
    payload = SystemRandom().randbytes(size)
    async with S3Queue(storage=storage, settings=SETTINGS) as producer:
        before = _counts(producer)
        began = CLOCK.monotonic()
        await producer.enqueue_many(payload for _ in range(messages))
        enqueue_s = CLOCK.monotonic() - began
        requests = _less(_counts(producer), before)
    handled = 0
    arrived = anyio.Event()
    wanted = messages

    async def handle(body: bytes) -> None:
        nonlocal handled
        handled += 1
        if handled % 100 == 0:
            tell(handled)
        if handled >= wanted:
            arrived.set()

    async with S3Queue(storage=storage, settings=SETTINGS, on_message=handle, concurrency=concurrency) as worker:
        before = _counts(worker)
        began = CLOCK.monotonic()
        await arrived.wait()
        handle_s = CLOCK.monotonic() - began
        requests = {name: count + _less(_counts(worker), before)[name] for name, count in requests.items()}
        enqueues: list[float] = []
        latencies: list[float] = []
        for _ in range(singles):
            wanted, arrived = handled + 1, anyio.Event()
            began = CLOCK.monotonic()
            await worker.enqueue(payload)
            enqueues.append(CLOCK.monotonic() - began)
            await arrived.wait()
            latencies.append(CLOCK.monotonic() - began)
    return Bench(
        messages=messages,
        size=size,
        enqueued_per_second=messages / enqueue_s,
        handled_per_second=messages / handle_s,
        enqueue_p50=median(enqueues),
        enqueue_p95=quantiles(enqueues, n=20)[-1],
        latency_p50=median(latencies),
        latency_p95=quantiles(latencies, n=20)[-1],
        requests=requests,
        cost_per_million=dollars(requests) / messages * 1e6,
    )


def _counts(queue: S3Queue[Any]) -> dict[str, int]:
    made = queue.requests()
    return {name: getattr(made, name).attempts for name in OPERATIONS}


def _less(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: count - before[name] for name, count in now.items()}


async def _delete_all(storage: Storage) -> None:
    while True:
        page = await storage.list("", limit=LIST_LIMIT_MAX)
        if not page.entries:
            return
        await storage.delete_many([entry.key for entry in page.entries])


COMMANDS = (bench,)
