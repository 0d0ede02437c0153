"""Does it matter how much waits? Backlogs of 50, 5,000 and a million messages, and a long history.

Segments of 50 messages throughout, so that a backlog of 50 has the layout of the others.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.contenders.base import payloads
from benchmarks.processes import workers
from benchmarks.throughput import on_core
from benchmarks.worker import Seen, Work
from benchmarks.workloads.beside import PAID
from benchmarks.workloads.common import Bench, Results, median, neighbours
from s3queue_async import S3Queue, Settings

PER_SEGMENT = 50
SETTINGS: dict[str, Any] = {"segment_messages_max": PER_SEGMENT}
MILLION = 1_000_000
SAMPLE = 20_000
ROUNDS = 3
WINDOW_PART = 0.25
SMALL = (50, 5_000)
HISTORY = 10_000
KEPT = {"retain_completed": 3600.0}
CHUNK = 50_000


async def backlog(bench: Bench) -> Results:
    """Rates, requests and memory with nothing else in the queue, and with a million messages."""
    million = bench.count(MILLION, multiple=PER_SEGMENT)
    sample = bench.count(SAMPLE, least=8 * PER_SEGMENT, multiple=PER_SEGMENT)
    big = bench.url(bench.place("million"))
    filled_s = await _enqueue(big, million)
    bench.say(f"  {million:,} messages enqueued in {filled_s:.1f} s")
    enqueue: dict[str, list[float]] = {"empty": [], "million": []}
    process: dict[str, list[Seen]] = {"empty": [], "million": []}
    rounds = bench.many(ROUNDS)
    for number in range(rounds):
        pair = [("empty", bench.url(bench.place("empty"))), ("million", big)]
        # Each goes first in turn.
        with on_core(number // 2):
            for name, url in pair[:: 1 if number % 2 else -1]:
                enqueue[name].append(sample / await _enqueue(url, sample, first=million + number * sample))
            for name, url in pair[:: 1 if number % 2 else -1]:
                process[name].append(await _process(url, sample))
    rows = [
        {
            "backlog": name,
            "messages": million if name == "million" else 0,
            "enqueue_rate": round(median(enqueue[name]), 1),
            "process_rate": round(median(_rate(seen, sample) for seen in process[name]), 1),
            "rss_mib": round(median(seen.rss_mib for seen in process[name]), 1),
            "rss_max_mib": round(median(seen.rss_max_mib for seen in process[name]), 1),
            **_window(process[name], sample),
        }
        for name in enqueue
    ]
    return {
        "fill_rate": round(million / filled_s, 1),
        "sample": sample,
        "rounds": rounds,
        "rows": rows,
        "ratios": {
            "enqueue": neighbours(enqueue["million"], enqueue["empty"]),
            "process": neighbours(*([_rate(seen, sample) for seen in process[name]] for name in ("million", "empty"))),
        },
        "requests": [*[await _small(bench, count) for count in SMALL], _of_window(million, rows[1])],
        "history": await _history(bench),
    }


def _rate(seen: Seen, sample: int) -> float:
    """Messages a second from the first to the last; what starting takes is the same everywhere."""
    return (sample - 1) / (seen.starts[sample - 1] - seen.starts[0])


def _window(seen: Sequence[Seen], sample: int) -> Results:
    """Requests a message in the middle of a run, where what is claimed ahead stays the same."""
    messages = sample - 2 * round(sample * WINDOW_PART)
    return {
        **{
            name: median(_own(one.window_own, messages)[name] for one in seen)
            for name in ("own_per_message", "paid_per_message")
        },
        "upkeep_per_s": round(median(sum(one.window_upkeep.values()) / one.window_s for one in seen), 1),
        "all_per_message": round(
            median((sum(one.window_own.values()) + sum(one.window_upkeep.values())) / messages for one in seen), 4
        ),
    }


def _of_window(messages: int, row: Results) -> Results:
    return {"backlog": messages, **{name: row[name] for name in ("own_per_message", "paid_per_message")}}


async def _small(bench: Bench, count: int) -> Results:
    """Requests a message when all of a backlog is processed, from the worker's start to its end."""
    url = bench.url(bench.place(f"backlog-{count}"))
    await _enqueue(url, count)
    seen = await _process(url, count, window=False)
    return {"backlog": count, **_requests(seen, count)}


async def _history(bench: Bench) -> list[Results]:
    """The same with results kept: without finished messages, and with many."""
    count = SMALL[-1]
    url = bench.url(bench.place("history"))
    rows = []
    for finished in (0, bench.count(HISTORY, multiple=PER_SEGMENT)):
        if finished:
            # What the first row left is part of the history.
            more = max(PER_SEGMENT, finished - count)
            await _enqueue(url, more, settings=KEPT)
            await _process(url, more, window=False, settings=KEPT)
        await _enqueue(url, count, settings=KEPT)
        seen = await _process(url, count, window=False, settings=KEPT)
        rows.append({"finished": finished, **_requests(seen, count), "rate": round(_rate(seen, count), 1)})
    return rows


def _requests(seen: Seen, count: int) -> Results:
    return {**_own(seen.own, count), "upkeep": sum(seen.upkeep.values())}


def _own(requests: Mapping[str, int], count: int) -> Results:
    """Requests for messages; those that cost something apart, because how many DELETEs go together depends on luck."""
    paid = sum(requests.get(name, 0) for name in PAID)
    return {"own_per_message": round(sum(requests.values()) / count, 4), "paid_per_message": round(paid / count, 4)}


async def _enqueue(url: str, count: int, *, first: int = 0, settings: dict[str, Any] | None = None) -> float:
    """Seconds that it took."""
    async with S3Queue[bytes](url, settings=Settings(**SETTINGS, **(settings or {}))) as queue:
        took = 0.0
        for start in range(0, count, CHUNK):
            batch = payloads(min(CHUNK, count - start), first=first + start)
            began = time.perf_counter()
            await queue.enqueue_many(batch)
            took += time.perf_counter() - began
        return took


async def _process(url: str, count: int, *, window: bool = True, settings: dict[str, Any] | None = None) -> Seen:
    """Have a new worker process handle so many messages."""
    edge = round(count * WINDOW_PART)
    work = Work(
        url,
        settings={**SETTINGS, **(settings or {})},
        stop_after=count,
        window=(edge, count - edge) if window else None,
    )
    async with workers([work]) as (worker,):
        worker.go()
        seen = await worker.seen()
    if len(set(seen.numbers)) != len(seen.numbers):
        raise RuntimeError(f"{len(seen.numbers)} messages handled, {len(set(seen.numbers))} of them once")
    return seen
