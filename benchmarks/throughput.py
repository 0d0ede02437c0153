"""Messages a second beside a bare loop that issues the same S3 requests with no queue around them.

Both run in turn (A B A B ...) in this process against one SeaweedFS server, on payloads of 100 bytes and a handler
that does nothing. The bare loop makes the requests that the queue makes on the same path - for a segment, a
conditional PUT to enqueue; a conditional PUT of a claim beside a GET, then a DELETE, to process; the claims are
deleted in batches - with as many in flight, and neither encodes, decodes, schedules nor watches anything.

    python -m benchmarks.throughput [--rounds 5] [--messages 20000] [--singles 600] [--profile enqueue|process]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import anyio
from rich.console import Console
from rich.table import Table

from s3queue_async import S3Queue, Settings
from s3queue_async.protocol import segment as segments
from s3queue_async.storage.base import IfAbsent
from s3queue_async.storage.s3 import S3Storage
from s3queue_async.testing.servers import Server, seaweedfs

BUCKET = "bench"
PAYLOAD = b"x" * 100
IN_FLIGHT = 16
CLAIMS_AT_ONCE = 32
CLAIM_BODY = b"c" * 180
CONCURRENCY = 32


@dataclass(frozen=True)
class Sample:
    """One run of one side."""

    messages: int
    seconds: float
    cpu_s: float
    requests: float

    @property
    def rate(self) -> float:
        return self.messages / self.seconds


async def measured(messages: int, work: Awaitable[Any], requests: Callable[[], int]) -> Sample:
    before = requests()
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    await work
    took = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    return Sample(messages, took, cpu_s, requests() - before)


async def limited(jobs: list[Callable[[], Coroutine[Any, Any, Any]]], most: int) -> None:
    """Run the jobs, so many at a time."""
    waiting = iter(jobs)

    async def runner() -> None:
        for job in waiting:
            await job()

    async with anyio.create_task_group() as group:
        for _ in range(min(most, len(jobs))):
            group.start_soon(runner)


class Bare:
    """The same requests, straight to the S3 client's wrapper."""

    def __init__(self, server: Server, prefix: str, messages: int, per_segment: int) -> None:
        self.storage = S3Storage(
            BUCKET,
            prefix,
            endpoint_url=server.endpoint_url,
            region=server.region,
            addressing="path",
            access_key_id=server.access_key_id,
            secret_access_key=server.secret_access_key,
        )
        records = [segments.Record(f"{'0' * 26}-00{i:04x}", 0, len(PAYLOAD), 1) for i in range(per_segment)]
        self.body = segments.encode(segments.Index(records, 0), [PAYLOAD] * per_segment)
        self.names = [f"{i:026d}-{per_segment}" for i in range(messages // per_segment)]
        self.requests = 0

    async def enqueue(self) -> None:
        async def put(name: str) -> None:
            self.requests += 1
            await self.storage.put(f"ready/255/{name}", self.body, when=IfAbsent())

        await limited([lambda name=name: put(name) for name in self.names], IN_FLIGHT)  # type: ignore[misc]

    async def process(self) -> None:
        async def one(name: str) -> None:
            self.requests += 3
            async with anyio.create_task_group() as group:
                group.start_soon(self.storage.get, f"ready/255/{name}")
                await self.storage.put(f"claims/{name}", CLAIM_BODY, when=IfAbsent())
            await self.storage.delete(f"ready/255/{name}")

        await limited([lambda name=name: one(name) for name in self.names], CLAIMS_AT_ONCE)  # type: ignore[misc]
        for start in range(0, len(self.names), 1000):
            self.requests += 1
            await self.storage.delete_many([f"claims/{name}" for name in self.names[start : start + 1000]])


async def bare_round(server: Server, prefix: str, messages: int, per_segment: int) -> dict[str, Sample]:
    bare = Bare(server, prefix, messages, per_segment)
    await bare.storage.open()
    try:
        enqueue = await measured(messages, bare.enqueue(), lambda: bare.requests)
        process = await measured(messages, bare.process(), lambda: bare.requests)
    finally:
        await bare.storage.close()
    return {"enqueue": enqueue, "process": process}


async def queue_round(
    server: Server, prefix: str, messages: int, per_segment: int, profile: str | None
) -> dict[str, Sample]:
    settings = Settings(segment_messages_max=per_segment)
    url = server.queue_url(BUCKET, prefix)

    async def profiled(name: str, work: Coroutine[Any, Any, Any]) -> None:
        if profile != name:
            await work
            return
        profiler = cProfile.Profile()
        profiler.enable()
        await work
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)

    async with S3Queue(url, settings=settings) as queue:
        ids: list[str] = []

        async def enqueue() -> None:
            ids.extend(await queue.enqueue_many(PAYLOAD for _ in range(messages)))

        sample = await measured(messages, profiled("enqueue", enqueue()), lambda: queue.requests().attempts)
        if len(set(ids)) != messages:
            raise RuntimeError(f"{messages} messages enqueued, {len(set(ids))} ids")

    handled = 0

    async with S3Queue(url, settings=settings, auto_start=False) as queue:
        done = anyio.Event()

        async def nothing(payload: bytes) -> None:
            nonlocal handled
            handled += 1
            if handled >= messages:
                done.set()

        async def process() -> None:
            await queue.start_processing(nothing, concurrency=CONCURRENCY)
            await done.wait()
            await queue.drain()

        processed = await measured(messages, profiled("process", process()), lambda: queue.requests().attempts)
    if handled != messages:
        raise RuntimeError(f"{messages} messages enqueued, {handled} handled")
    return {"enqueue": sample, "process": processed}


async def compare(
    server: Server, *, rounds: int, messages: int, per_segment: int, profile: str | None
) -> dict[tuple[str, str], list[Sample]]:
    samples: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for number in range(rounds):
        prefix = f"{per_segment}-{number}-{os.getpid()}"
        for side, results in (
            ("bare", await bare_round(server, f"bare-{prefix}", messages, per_segment)),
            ("queue", await queue_round(server, f"queue-{prefix}", messages, per_segment, profile)),
        ):
            for phase, sample in results.items():
                samples[phase, side].append(sample)
    return samples


def report(console: Console, per_segment: int, samples: dict[tuple[str, str], list[Sample]]) -> dict[str, float]:
    """Print the medians; return the ratio of each phase."""
    table = Table(title=f"{per_segment} message{'s' if per_segment > 1 else ''} a segment (medians)")
    for column in ("phase", "side", "messages/s", "ratio", "requests/message", "client CPU us/message"):
        table.add_column(column, justify="left" if column in ("phase", "side") else "right")
    ratios: dict[str, float] = {}
    for phase in ("enqueue", "process"):
        # Each round's two sides ran one after the other: the ratio of neighbours is the least disturbed.
        pairs = zip(samples[phase, "queue"], samples[phase, "bare"], strict=True)
        ratios[phase] = statistics.median(queue.rate / bare.rate for queue, bare in pairs)
        for side in ("bare", "queue"):
            runs = samples[phase, side]
            table.add_row(
                phase,
                side,
                f"{statistics.median(run.rate for run in runs):,.0f}",
                f"{ratios[phase]:.2f}" if side == "queue" else "",
                f"{statistics.median(run.requests / run.messages for run in runs):.3f}",
                f"{statistics.median(run.cpu_s / run.messages for run in runs) * 1e6:,.1f}",
            )
    console.print(table)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=20_480, help="at 256 a segment")
    parser.add_argument("--singles", type=int, default=600, help="at 1 a segment")
    parser.add_argument("--profile", choices=("enqueue", "process"), help="print a profile of that phase")
    arguments = parser.parse_args()
    console = Console()
    with seaweedfs([BUCKET]) as server:
        os.environ.update(server.environment())
        for per_segment, messages in ((256, arguments.messages // 256 * 256), (1, arguments.singles)):
            if messages:
                samples = asyncio.run(
                    compare(
                        server,
                        rounds=arguments.rounds,
                        messages=messages,
                        per_segment=per_segment,
                        profile=arguments.profile,
                    )
                )
                report(console, per_segment, samples)


if __name__ == "__main__":
    main()
