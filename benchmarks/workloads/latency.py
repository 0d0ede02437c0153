"""Latency in round trips: a loopback store hides them, so each request is made to take longer by a known time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from benchmarks.contenders.base import payloads
from benchmarks.processes import workers
from benchmarks.worker import Work, delayed
from benchmarks.workloads.common import Bench, Results, spread
from s3queue_async import S3Queue, Settings

DELAYS_S = (0.0, 0.01, 0.05, 0.1)
TWO_WORKERS_AT_S = 0.05
"""Where a second worker process is tried, too: then the one that claims need not be the one that coordinates."""
MESSAGES = 20
WARM = 5
PAUSE_S = (0.1, 0.23)
"""Between two messages; the second one for a worker elsewhere, so that messages fall everywhere between two polls."""
SETTLE_S = 2.0
ARRIVES_WITHIN_S = 30.0


async def latency(bench: Bench) -> Results:
    """From the start of an enqueue to the start of its handler, for one message at a time."""
    poll_s = Settings().poll_interval
    rows = []
    for delay_s in DELAYS_S:
        count = bench.count(MESSAGES, least=2)
        here = await _here(bench, delay_s, count)
        rows.append(_row("same process", 0, delay_s, here, 0.0))
        for number in (1, 2) if delay_s == TWO_WORKERS_AT_S else (1,):
            elsewhere = await _elsewhere(bench, delay_s, count, number)
            rows.append(_row("another process", number, delay_s, elsewhere, poll_s))
    return {"rows": rows, "poll_s": poll_s}


def _row(where: str, worker_processes: int, delay_s: float, took: Sequence[float], poll_s: float) -> Results:
    """Round trips are those of the delay alone: what the store takes itself counts against us."""
    found = spread(took)
    trips = {name: round(found[f"{name}_ms"] / 1e3 / delay_s, 2) if delay_s else None for name in ("p50", "p99")}
    beyond_poll = round((found["p50_ms"] / 1e3 - poll_s) / delay_s, 2) if delay_s else None
    return {
        "where": where,
        "workers": worker_processes,
        "delay_ms": round(delay_s * 1e3),
        **found,
        "p50_trips": trips["p50"],
        "p99_trips": trips["p99"],
        "p50_trips_beyond_poll": beyond_poll,
    }


async def _here(bench: Bench, delay_s: float, count: int) -> list[float]:
    took: list[float] = []
    arrived = asyncio.Event()
    at = 0.0

    async def handle(payload: bytes) -> None:
        nonlocal at
        at = time.perf_counter()
        arrived.set()

    storage = delayed(bench.url(bench.place("latency")), delay_s)
    async with S3Queue[bytes](storage=storage, auto_start=False) as queue:
        await queue.start_processing(handle)
        for payload in payloads(count + WARM):
            await asyncio.sleep(PAUSE_S[0] + 2 * delay_s)
            arrived.clear()
            began = time.perf_counter()
            await queue.enqueue(payload)
            await asyncio.wait_for(arrived.wait(), ARRIVES_WITHIN_S)
            took.append(at - began)
    return took[WARM:]


async def _elsewhere(bench: Bench, delay_s: float, count: int, number: int) -> list[float]:
    """With so many worker processes, all warm: one of them coordinates."""
    url = bench.url(bench.place("latency"))
    began_at: dict[int, float] = {}
    async with (
        S3Queue[bytes](storage=delayed(url, delay_s)) as queue,
        workers([Work(url, 10, delay_s=delay_s)] * number) as started,
    ):
        for worker in started:
            worker.go()
        await asyncio.sleep(SETTLE_S)
        for sent, payload in enumerate(payloads(count + WARM)):
            began_at[sent] = time.monotonic()
            await queue.enqueue(payload)
            await asyncio.sleep(PAUSE_S[1])
        await asyncio.sleep(SETTLE_S + 6 * delay_s)
        seen = [await worker.seen(tell=True) for worker in started]
    came = {number: at for one in seen for number, at in zip(one.numbers, one.starts, strict=True)}
    missing = began_at.keys() - came.keys()
    if missing:
        raise RuntimeError(f"{len(missing)} of {len(began_at)} messages did not arrive in time")
    return [came[sent] - began_at[sent] for sent in range(WARM, count + WARM)]
