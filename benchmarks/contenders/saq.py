"""SAQ: Redis lists and Lua scripts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saq import Queue, Worker

from benchmarks.contenders.base import Place, in_flight

IN_FLIGHT = 64
CONCURRENCY = 32


class Saq:
    """One queue and one worker on the same Redis connection pool."""

    def __init__(self, place: Place) -> None:
        self._queue = Queue.from_url(place.redis_url, name=place.prefix, max_concurrent_ops=IN_FLIGHT)
        self._worker: Worker[Any] | None = None
        self._task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self._queue.connect()

    async def enqueue(self, payloads: Sequence[bytes]) -> None:
        async def one(payload: bytes) -> None:
            await self._queue.enqueue("bench", payload=payload.decode())

        await in_flight(payloads, one, IN_FLIGHT)

    async def start(self, handle: Callable[[bytes], None]) -> None:
        async def bench(context: Any, *, payload: str) -> None:
            handle(payload.encode())

        self._worker = Worker(self._queue, functions=[("bench", bench)], concurrency=CONCURRENCY)
        self._task = asyncio.create_task(self._worker.start())

    async def finish(self) -> None: ...

    async def close(self) -> None:
        if self._worker is not None and self._task is not None:
            await self._worker.stop()
            await self._task
        await self._queue.disconnect()

    def requests(self) -> Mapping[str, int]:
        return {}


def make(place: Place) -> Saq:
    return Saq(place)
