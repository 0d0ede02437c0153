"""Workloads of this library alone: steady and mixed load, slow handlers, large payloads, concurrency, processes."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Sequence

import anyio

from benchmarks.contenders.base import Drained, drain, payloads
from benchmarks.contenders.ours import CONCURRENCY, Ours
from benchmarks.processes import workers
from benchmarks.throughput import MESSAGES, exact, on_core
from benchmarks.worker import Seen, Work
from benchmarks.workloads.common import Bench, Results, added, median, neighbours, per_million, rates, spread
from s3queue_async import S3Queue
from s3queue_async.protocol import layout
from s3queue_async.storage.metered import OPERATIONS
from s3queue_async.storage.open import storage_from_url

CONCURRENCIES = (3, 10, 50)
CONCURRENCY_MESSAGES = 25_600
CONCURRENCY_ROUNDS = 12
"""Many and short: a shared machine's speed changes by half within seconds, which tells more than the slots do."""
STEADY_RATES = (10, 100, 1000, 5000)
STEADY_S = 4.0
TICK_S = 0.01
SLOW_S = (0.01, 0.1, 1.0)
SLOW_CONCURRENCY = 50
SLOW_FOR_S = 2.0
SIZES = ((100, MESSAGES), (10_000, 5_120), (1_000_000, 96))
PROCESSES = (1, 4)
LOOK_S = 0.5
SPREAD_MESSAGES = 768_000
MIXED_MESSAGES = 20_000
MIXED_CHUNK = 500
MIXED_SINGLES = 20
"""Messages enqueued one by one after each chunk, at a higher priority."""


async def concurrency(bench: Bench) -> Results:
    """The drain of a backlog by the number of handlers at a time."""
    messages, rounds = bench.count(CONCURRENCY_MESSAGES, multiple=256), bench.many(CONCURRENCY_ROUNDS)
    found: dict[int, list[float]] = defaultdict(list)
    for number in range(rounds):
        # There and back, so that a machine that slows down or recovers favours none; each way on each core.
        with on_core(number // 2):
            for most in CONCURRENCIES if number % 2 == 0 else reversed(CONCURRENCIES):
                run = exact(await drain(Ours(bench.place("concurrency"), concurrency=most), messages))
                found[most].append(run.process.rate)
    rows: list[Results] = []
    for before, most in zip((None, *CONCURRENCIES), CONCURRENCIES, strict=False):
        ratio = None if before is None else neighbours(found[most], found[before])
        rows.append({"concurrency": most, "process_rate": round(median(found[most]), 1), "ratio": ratio})
    return {"messages": messages, "rounds": rounds, "rows": rows}


async def slow(bench: Bench) -> Results:
    """Handlers that take a while, as many at a time as there are slots; the ideal has no queue in it."""
    rows = []
    for handler_s in SLOW_S:
        ideal = SLOW_CONCURRENCY / handler_s
        messages = bench.count(round(ideal * SLOW_FOR_S), least=SLOW_CONCURRENCY)
        contender = Ours(bench.place("slow"), concurrency=SLOW_CONCURRENCY, handler_s=handler_s)
        run = exact(await drain(contender, messages))
        rows.append({"handler_s": handler_s, "concurrency": SLOW_CONCURRENCY, "ideal": ideal, **rates([run])})
    return {"rows": rows}


async def sizes(bench: Bench) -> Results:
    """Payloads of 100 bytes, 10 KB and 1 MB."""
    runs: dict[int, list[Drained]] = defaultdict(list)
    for _ in range(bench.rounds):
        for size, messages in SIZES:
            contender = Ours(bench.place(f"size-{size}"))
            runs[size].append(exact(await drain(contender, bench.count(messages, least=4), payload_bytes=size)))
    return {"rows": [{"payload_bytes": size, **rates(runs[size])} for size, _ in SIZES]}


async def steady(bench: Bench) -> Results:
    """Messages that are enqueued one by one at a steady rate, while a worker in another process handles them."""
    rows = []
    for rate in STEADY_RATES:
        messages = bench.count(round(rate * STEADY_S), least=4)
        url = bench.url(bench.place(f"steady-{rate}"))
        acked: list[float] = []
        began_at: dict[int, float] = {}
        async with S3Queue[bytes](url) as queue, workers([Work(url, stop_after=messages)]) as (worker,):
            worker.go()
            await _steadily(queue, payloads(messages), rate, acked, began_at)
            seen = await worker.seen()
            requests = queue.requests()
            produced: dict[str, int] = {name: getattr(requests, name).attempts for name in OPERATIONS}
        came = dict(zip(seen.numbers, seen.starts, strict=True))
        _exact([seen], messages)
        total = added(produced, seen.own, seen.upkeep)
        rows.append(
            {
                "rate": rate,
                "messages": messages,
                "enqueue": spread(acked),
                "to_handler": spread([came[number] - at for number, at in began_at.items()]),
                "requests_per_message": round(sum(total.values()) / messages, 3),
                "dollars": round(per_million(total, messages), 2),
            }
        )
    return {"rows": rows}


async def _steadily(
    queue: S3Queue[bytes], batch: Sequence[bytes], rate: float, acked: list[float], began_at: dict[int, float]
) -> None:
    async def one(number: int) -> None:
        began_at[number] = began = time.monotonic()
        await queue.enqueue(batch[number])
        acked.append(time.monotonic() - began)

    start = time.monotonic()
    sent = 0
    async with anyio.create_task_group() as group:
        while sent < len(batch):
            due = min(len(batch), int((time.monotonic() - start) * rate) + 1)
            for number in range(sent, due):
                group.start_soon(one, number)
            sent = due
            await asyncio.sleep(TICK_S)


async def mixed(bench: Bench) -> Results:
    """Chunks and urgent single messages are enqueued while others are handled, in one process and across two."""
    rows = []
    messages = bench.count(MIXED_MESSAGES, least=MIXED_CHUNK + MIXED_SINGLES)
    together: list[float] = []
    apart: list[float] = []
    for _ in range(bench.rounds):
        together.append(await _mixed_together(bench, messages))
        apart.append(await _mixed_apart(bench, messages))
    for where, found in (("one process", together), ("two processes", apart)):
        rows.append({"where": where, "messages": messages, "rate": round(median(found), 1)})
    return {"rows": rows}


async def _mixed_together(bench: Bench, messages: int) -> float:
    numbers: Counter[bytes] = Counter()
    done = asyncio.Event()

    async def handle(payload: bytes) -> None:
        numbers[payload] += 1
        if len(numbers) == messages:
            done.set()

    async with S3Queue[bytes](bench.url(bench.place("mixed")), auto_start=False) as queue:
        await queue.start_processing(handle, concurrency=SLOW_CONCURRENCY)
        began = time.perf_counter()
        await _enqueue_mixed(queue, payloads(messages))
        await asyncio.wait_for(done.wait(), 60)
        took = time.perf_counter() - began
    if max(numbers.values()) > 1:
        raise RuntimeError("A message was handled twice under mixed load.")
    return messages / took


async def _mixed_apart(bench: Bench, messages: int) -> float:
    url = bench.url(bench.place("mixed"))
    async with S3Queue[bytes](url) as queue, workers([Work(url, SLOW_CONCURRENCY, stop_after=messages)]) as (worker,):
        worker.go()
        began = time.monotonic()
        await _enqueue_mixed(queue, payloads(messages))
        seen = await worker.seen()
    _exact([seen], messages)
    return messages / (max(seen.starts) - began)


async def _enqueue_mixed(queue: S3Queue[bytes], batch: Sequence[bytes]) -> None:
    step = MIXED_CHUNK + MIXED_SINGLES
    for start in range(0, len(batch), step):
        await queue.enqueue_many(batch[start : start + MIXED_CHUNK])
        async with anyio.create_task_group() as group:
            for payload in batch[start + MIXED_CHUNK : start + step]:
                group.start_soon(_enqueue_urgent, queue, payload)


async def _enqueue_urgent(queue: S3Queue[bytes], payload: bytes) -> None:
    await queue.enqueue(payload, priority=5)


async def processes(bench: Bench) -> Results:
    """The drain of a backlog by one and by four worker processes that begin together."""
    messages = bench.count(SPREAD_MESSAGES, multiple=256)
    found: dict[int, list[float]] = defaultdict(list)
    parts: dict[int, list[int]] = {}
    # Long runs, so that getting up to speed counts for little: a round less.
    rounds = max(1, bench.rounds - 1)
    for _ in range(rounds):
        for number in PROCESSES:
            rate, parts[number] = await _drained(bench, messages, [CONCURRENCY] * number)
            found[number].append(rate)
    return {
        "messages": messages,
        "rounds": rounds,
        "ratio": neighbours(found[PROCESSES[-1]], found[PROCESSES[0]]),
        "rows": [
            {"processes": number, "rate": round(median(found[number]), 1), "handled_by_each": parts[number]}
            for number in PROCESSES
        ],
    }


async def _drained(bench: Bench, messages: int, concurrencies: Sequence[int]) -> tuple[float, list[int]]:
    """Drain a backlog by worker processes with so many handlers each.

    Returns:
        Messages a second, from the word to begin to the last handler; and how many each handled, the least first.
    """
    url = bench.url(bench.place("drained"))
    async with S3Queue[bytes](url) as queue:
        await queue.enqueue_many(payloads(messages))
        async with workers([Work(url, concurrency) for concurrency in concurrencies]) as started:
            began = time.monotonic()
            for worker in started:
                worker.go()
            await _until_empty(queue, url)
            seen = [await worker.seen(tell=True) for worker in started]
    _exact(seen, messages)
    rate = messages / (max(max(one.starts, default=0.0) for one in seen) - began)
    return rate, sorted(len(one.numbers) for one in seen)


async def _until_empty(queue: S3Queue[bytes], url: str) -> None:
    """Return once nothing waits and nothing is held; looking takes next to nothing from those that are measured."""
    storage = storage_from_url(url)
    await storage.open()
    try:
        while True:
            page = await storage.list(layout.READY, limit=1)
            if not page.entries:
                break
            await asyncio.sleep(LOOK_S)
    finally:
        await storage.close()
    stats = await queue.stats()
    if stats.pending + stats.delayed + stats.processing:
        raise RuntimeError(f"The queue should be empty: {stats}")


def _exact(seen: Sequence[Seen], messages: int) -> None:
    """Raises RuntimeError when a message was lost or came twice."""
    numbers = [number for one in seen for number in one.numbers]
    if len(numbers) != messages or len(set(numbers)) != messages:
        raise RuntimeError(f"{messages} messages enqueued, {len(numbers)} handled, {len(set(numbers))} of them once")
