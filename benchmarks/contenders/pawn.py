"""pawn-queue: an object for each message, a lease object for each message that is handled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pawn_queue import PawnQueue

from benchmarks.contenders.base import Place, ended, in_flight

IN_FLIGHT = 32
PER_POLL = 100
TOPIC = "bench"


class Pawn:
    """One producer, and one consumer that polls again at once; it never waits between two polls."""

    def __init__(self, place: Place) -> None:
        # It knows no prefix: each run has a bucket of its own.
        self._config = {
            "s3": {
                "endpoint_url": place.endpoint_url,
                "bucket_name": place.bucket,
                "aws_access_key_id": place.access_key_id,
                "aws_secret_access_key": place.secret_access_key,
                "region_name": place.region,
                "use_ssl": False,
            },
            "polling": {"interval_seconds": 0.0, "max_messages_per_poll": PER_POLL, "jitter_max_ms": 0},
            "concurrency": {"strategy": "conditional_write"},
        }
        self._topic = f"{TOPIC}-{place.prefix}"
        self._worker: asyncio.Task[None] | None = None

    async def open(self) -> None:
        self._queue = await PawnQueue.from_config(self._config)
        await self._queue.setup()
        await self._queue.create_topic(self._topic)
        self._producer = await self._queue.register_producer("producer")
        self._consumer = await self._queue.register_consumer("consumer", topics=[self._topic])

    async def enqueue(self, payloads: Sequence[bytes]) -> None:
        async def publish(payload: bytes) -> None:
            await self._producer.publish(self._topic, {"p": payload.decode()})

        await in_flight(payloads, publish, IN_FLIGHT)

    async def start(self, handle: Callable[[bytes], None]) -> None:
        async def one(message: Any) -> None:
            handle(message.payload["p"].encode())
            await message.ack()

        async def work() -> None:
            while True:
                await in_flight(await self._consumer.poll(), one, IN_FLIGHT)

        self._worker = asyncio.create_task(work())

    async def finish(self) -> None: ...

    async def close(self) -> None:
        await ended(self._worker)
        await self._queue.teardown()

    def requests(self) -> Mapping[str, int]:
        return {}


def make(place: Place) -> Pawn:
    return Pawn(place)
