"""A worker in a process of its own: ``python -m benchmarks.worker TASK``.

It writes "ready" when its queue is open, begins when it reads a line, and ends when it has handled what the task says
or its input ends; then it drains and writes what it saw, as JSON. Starts of handlers are CLOCK_MONOTONIC, which all
processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.contenders.base import DIGITS
from benchmarks.contenders.ours import CONCURRENCY, Counted
from s3queue_async import S3Queue, Settings
from s3queue_async.storage.base import Storage
from s3queue_async.storage.metered import MeteredStorage
from s3queue_async.storage.open import storage_from_url
from s3queue_async.testing.faults import FaultyStorage


@dataclass
class Work:
    """What a worker process is to do.

    Attributes:
        url: The queue.
        concurrency: Handlers at a time.
        settings: What is not left at its default.
        delay_s: How long every request takes longer than it does, in seconds.
        stop_after: End when so many messages were handled; None: when the input ends.
        window: Between which two counts of handled messages the requests are counted, too.
    """

    url: str
    concurrency: int = CONCURRENCY
    settings: dict[str, Any] = field(default_factory=dict)
    delay_s: float = 0.0
    stop_after: int | None = None
    window: tuple[int, int] | None = None


@dataclass
class Seen:
    """What a worker process saw.

    Attributes:
        numbers: The payloads' numbers, in the order in which they came.
        starts: When each handler started, CLOCK_MONOTONIC seconds.
        own: Requests for messages by operation, until it ended and was drained.
        upkeep: Listings, heartbeats and what else depends on time, as long as it handled messages.
        window_own: Requests for messages in the window.
        window_upkeep: The others in the window.
        window_s: How long the window lasted, in seconds.
        rss_mib: Resident size when the last message was handled, and
        rss_max_mib: The largest that it ever was.
    """

    numbers: list[int] = field(default_factory=list)
    starts: list[float] = field(default_factory=list)
    own: dict[str, int] = field(default_factory=dict)
    upkeep: dict[str, int] = field(default_factory=dict)
    window_own: dict[str, int] = field(default_factory=dict)
    window_upkeep: dict[str, int] = field(default_factory=dict)
    window_s: float = 0.0
    rss_mib: float = 0.0
    rss_max_mib: float = 0.0


def delayed(url: str, seconds: float) -> Storage:
    """The url's storage; every request sets out so much later."""
    storage = storage_from_url(url)
    if not seconds:
        return storage
    slow = FaultyStorage(storage)
    slow.delay(seconds, times=None)
    return slow


async def work(task: Work) -> Seen:
    """Do what the task says."""
    seen, counted = Seen(), Counted()
    storage = MeteredStorage(delayed(task.url, task.delay_s), on_request=counted)
    over = asyncio.Event()
    marks: list[tuple[float, Counter[str], Counter[str]]] = []
    window = set(task.window or ())

    async with S3Queue(storage=storage, settings=Settings(**task.settings), auto_start=False) as queue:

        async def handle(payload: bytes) -> None:
            seen.starts.append(time.monotonic())
            seen.numbers.append(int(payload[:DIGITS]))
            count = len(seen.numbers)
            if count in window:
                marks.append((time.monotonic(), counted.own.copy(), counted.upkeep.copy()))
            if count == task.stop_after:
                seen.upkeep = dict(counted.upkeep)
                seen.rss_mib = psutil.Process().memory_info().rss / 2**20
                over.set()

        print("ready", flush=True)
        lines = await _input()
        await lines.readline()
        await queue.start_processing(handle, concurrency=task.concurrency)
        ends = asyncio.create_task(_until_end(lines, over))
        await over.wait()
        ends.cancel()
        await queue.drain()
    seen.own = dict(counted.own)
    seen.upkeep = seen.upkeep or dict(counted.upkeep)
    if len(marks) == 2:
        (began, own, upkeep), (ended, own_then, upkeep_then) = marks
        seen.window_s = ended - began
        seen.window_own, seen.window_upkeep = dict(own_then - own), dict(upkeep_then - upkeep)
    seen.rss_max_mib = _rss_max_mib()
    return seen


def _rss_max_mib() -> float:
    # Not getrusage: its maximum begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


async def _input() -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader


async def _until_end(lines: asyncio.StreamReader, over: asyncio.Event) -> None:
    await lines.read()
    over.set()


def main() -> None:
    print(json.dumps(asdict(asyncio.run(work(Work(**json.loads(sys.argv[1])))))))


if __name__ == "__main__":
    main()
