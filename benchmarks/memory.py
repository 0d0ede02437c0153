"""Resident size while a million small messages are enqueued and processed: it must be flat after the first 100,000.

A producer and a worker run side by side in this process on the embedded default (SQLite), the producer never more
than ``--backlog`` messages ahead. The measuring takes no part of the memory: it prints as it goes.

    python -m benchmarks.memory [--messages 1000000] [--step 100000]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import anyio
import psutil
from rich.console import Console
from rich.table import Table

from s3queue_async import S3Queue

CONCURRENCY = 20
CHUNK = 5_000


def resident_mib() -> float:
    gc.collect()
    return float(psutil.Process().memory_info().rss) / 2**20


async def run(url: str, messages: int, step: int, backlog: int, table: Table) -> list[float]:
    sizes: list[float] = []
    handled = 0
    began = time.perf_counter()
    room = anyio.Event()

    async with S3Queue(url) as queue:

        @queue.handler(concurrency=CONCURRENCY)
        async def count(payload: dict[str, int]) -> None:
            nonlocal handled
            handled += 1
            if handled % step == 0:
                sizes.append(resident_mib())
                table.add_row(f"{handled:,}", f"{sizes[-1]:,.1f}", f"{handled / (time.perf_counter() - began):,.0f}")
            if handled % CHUNK == 0:
                room.set()

        def chunk(start: int) -> Iterator[dict[str, int]]:
            return ({"number": number} for number in range(start, min(messages, start + CHUNK)))

        for start in range(0, messages, CHUNK):
            while start - handled > backlog:
                room = anyio.Event()
                await room.wait()
            await queue.enqueue_many(chunk(start))
        while handled < messages:
            room = anyio.Event()
            await room.wait()
    if handled != messages:
        raise RuntimeError(f"{messages} messages enqueued, {handled} handled")
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=1_000_000)
    parser.add_argument("--step", type=int, default=100_000)
    parser.add_argument("--backlog", type=int, default=50_000)
    arguments = parser.parse_args()
    console = Console()
    table = Table(title="Resident size by messages processed")
    for column in ("messages", "MiB", "messages/s so far"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as directory:
        url = f"sqlite://{Path(directory) / 'queue.db'}"
        sizes = asyncio.run(run(url, arguments.messages, arguments.step, arguments.backlog, table))
    console.print(table)
    growth = 100 * (max(sizes[1:], default=sizes[0]) / sizes[0] - 1)
    console.print(f"growth after the first {arguments.step:,}: {growth:+.1f} %")


if __name__ == "__main__":
    main()
