"""jqueue: all messages in one JSON object, rewritten by every commit; commits are shared by all who wait."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence

from jqueue import BrokerQueue
from jqueue.adapters.storage.s3 import S3Storage

from benchmarks.contenders.base import Place, ended, in_flight

PER_DEQUEUE = 250


class JQueue:
    """One broker in this process, which the producer and the worker share: its best case, nobody else writes."""

    def __init__(self, place: Place) -> None:
        os.environ.update(AWS_ACCESS_KEY_ID=place.access_key_id, AWS_SECRET_ACCESS_KEY=place.secret_access_key)
        storage = S3Storage(
            bucket=place.bucket,
            key=f"{place.prefix}/queue.json",
            region_name=place.region,
            endpoint_url=place.endpoint_url,
        )
        self._queue = BrokerQueue(storage)
        self._worker: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self._queue.__aenter__()

    async def enqueue(self, payloads: Sequence[bytes]) -> None:
        async def one(payload: bytes) -> None:
            await self._queue.enqueue("bench", payload)

        # All at once: they share one commit.
        await in_flight(payloads, one, len(payloads))

    async def start(self, handle: Callable[[bytes], None]) -> None:
        async def work() -> None:
            while True:
                jobs = await self._queue.dequeue("bench", batch_size=PER_DEQUEUE)
                for job in jobs:
                    handle(job.payload)
                await in_flight([job.id for job in jobs], self._queue.ack, PER_DEQUEUE)

        self._worker = asyncio.create_task(work())

    async def finish(self) -> None: ...

    async def close(self) -> None:
        await ended(self._worker)
        await self._queue.__aexit__(None, None, None)

    def requests(self) -> Mapping[str, int]:
        return {}


def make(place: Place) -> JQueue:
    return JQueue(place)
