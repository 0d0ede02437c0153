"""What a million messages cost: counts the requests of a small run, and multiplies them with S3's prices.

    python -m examples.cost
    python -m examples.cost --time 300      also what a worker costs that waits, or gets a message a second

The store is memory, because the number of requests does not depend on it. Listings and heartbeats are counted apart:
they depend on how long a worker runs, not on how many messages there are.
"""

from __future__ import annotations

import argparse
import asyncio
from collections import Counter

from s3queue_async import S3Queue
from s3queue_async.metrics import dollars
from s3queue_async.storage.base import Storage
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.storage.metered import OPERATIONS, MeteredStorage, Request

UPKEEP = ("plugin/", "queue.json")
NAMES = {"put": "PUT", "list": "LIST", "get": "GET", "delete": "DELETE", "delete_many": "DELETE (many)"}


class Counting:
    """A storage that counts what messages cost, and apart from that what the upkeep costs."""

    def __init__(self) -> None:
        self.messages: Counter[str] = Counter()
        self.upkeep: Counter[str] = Counter()
        self.storage: Storage = MeteredStorage(MemoryStorage(None), on_request=self._count)

    def _count(self, request: Request) -> None:
        upkeep = request.operation == "list" or request.key.startswith(UPKEEP)
        (self.upkeep if upkeep else self.messages)[request.operation] += 1


async def handled(messages: int, *, together: bool) -> Counter[str]:
    """The requests of messages that are enqueued alone or together, and handled by another process."""
    counting = Counting()
    async with S3Queue(storage=counting.storage) as producer:
        if together:
            await producer.enqueue_many(range(messages))
        else:
            for number in range(messages):
                await producer.enqueue(number)
    left = messages
    done = asyncio.Event()

    async def handle(number: int) -> None:
        nonlocal left
        left -= 1
        if not left:
            done.set()

    async with S3Queue(storage=counting.storage, on_message=handle):
        await done.wait()
    return counting.messages


async def over_time(seconds: float, *, every: float | None) -> Counter[str]:
    """The requests of a worker over so many seconds, while a message comes every so often, or none at all."""
    counting = Counting()

    async def handle(number: int) -> None: ...

    async def trickle(producer: S3Queue[int]) -> None:
        while every is not None:
            await producer.enqueue(0)
            await asyncio.sleep(every)

    async with (
        S3Queue(storage=counting.storage) as producer,
        S3Queue(storage=counting.storage, on_message=handle),
    ):
        trickling = asyncio.create_task(trickle(producer))
        # It takes a while until an idle worker looks as rarely as it may.
        await asyncio.sleep(60)
        before = counting.messages + counting.upkeep
        await asyncio.sleep(seconds)
        requests = counting.messages + counting.upkeep - before
        trickling.cancel()
    return requests


def listed(requests: Counter[str]) -> str:
    return ", ".join(f"{requests[name]:,} {NAMES[name]}" for name in OPERATIONS if requests[name])


def show_month(title: str, requests: Counter[str], seconds: float) -> None:
    print(f"{title}, {seconds:g} s: {listed(requests)}")
    print(f"    30 days of it: ${dollars(requests) / seconds * 30 * 24 * 3600:.2f}")


def show(title: str, requests: Counter[str], messages: int) -> None:
    print(f"{title}: {messages:,} messages cost {listed(requests)}")
    print(f"    a million of them: ${dollars(requests) * 1e6 / messages:.3f}")


async def main() -> None:
    parser = argparse.ArgumentParser(description="What a million messages cost.")
    parser.add_argument("--time", type=float, metavar="SECONDS", help="also look at a worker for so long (twice)")
    arguments = parser.parse_args()
    show("one message a segment", await handled(500, together=False), 500)
    show("256 messages a segment", await handled(100 * 256, together=True), 100 * 256)
    if arguments.time:
        show_month("an idle worker", await over_time(arguments.time, every=None), arguments.time)
        show_month("a worker that gets a message a second", await over_time(arguments.time, every=1.0), arguments.time)


if __name__ == "__main__":
    asyncio.run(main())
