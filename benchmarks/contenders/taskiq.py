"""taskiq with taskiq-redis: a Redis stream, which acknowledges, or a Redis list, which does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from taskiq.api import run_receiver_task
from taskiq_redis import ListQueueBroker, RedisStreamBroker

from benchmarks.contenders.base import Place, ended, in_flight

IN_FLIGHT = 64
CONCURRENCY = 100
PREFETCH = 100
CONNECTIONS = 100


class Taskiq:
    """One broker for the producer and the worker.

    Args:
        place: The Redis, and the name of the queue.
        broker: "stream" (a message that a worker dies with is delivered again) or "list" (it is lost).
    """

    def __init__(self, place: Place, *, broker: str = "stream") -> None:
        kind = {"stream": RedisStreamBroker, "list": ListQueueBroker}[broker]
        self._broker = kind(place.redis_url, queue_name=place.prefix, max_connection_pool_size=CONNECTIONS)
        self._handle: Callable[[bytes], None] | None = None

        async def bench(payload: str) -> None:
            assert self._handle is not None
            self._handle(payload.encode())

        self._task = self._broker.register_task(bench, task_name="bench")
        self._worker: asyncio.Task[None] | None = None

    async def open(self) -> None:
        await self._broker.startup()

    async def enqueue(self, payloads: Sequence[bytes]) -> None:
        async def one(payload: bytes) -> None:
            await self._task.kiq(payload.decode())

        await in_flight(payloads, one, IN_FLIGHT)

    async def start(self, handle: Callable[[bytes], None]) -> None:
        self._handle = handle
        receiver = run_receiver_task(self._broker, max_async_tasks=CONCURRENCY, max_prefetch=PREFETCH)
        self._worker = asyncio.create_task(receiver)

    async def finish(self) -> None: ...

    async def close(self) -> None:
        await ended(self._worker)
        await self._broker.shutdown()

    def requests(self) -> Mapping[str, int]:
        return {}


def make(place: Place, **options: str) -> Taskiq:
    return Taskiq(place, **options)
