"""A taskiq worker in the test's own process, on virtual time: taskiq's Receiver, and a store in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import anyio
from taskiq.receiver import Receiver

from s3queue_async import Settings
from s3queue_async.taskiq import S3QueueBroker
from s3queue_async.testing import FaultyMemory, LoopClock

QUIET = Settings(coordinator=False)


def make_broker(store: FaultyMemory | None = None, **options: Any) -> S3QueueBroker:
    settings = options.pop("settings", QUIET)
    return S3QueueBroker(storage=store or FaultyMemory(), settings=settings, clock=LoopClock(), **options)


@asynccontextmanager
async def started(*brokers: S3QueueBroker) -> AsyncIterator[None]:
    """Brokers between startup and shutdown, as in a client."""
    for broker in brokers:
        await broker.startup()
    try:
        yield
    finally:
        for broker in reversed(brokers):
            await broker.shutdown()


@asynccontextmanager
async def working(broker: S3QueueBroker, **options: Any) -> AsyncIterator[Receiver]:
    """What `taskiq worker` does in one of its processes, from its start to the end after SIGTERM."""
    broker.is_worker_process = True
    await broker.startup()
    finish = asyncio.Event()
    with ThreadPoolExecutor(2) as executor:
        receiver = Receiver(broker, executor, **{"run_startup": False, "max_async_tasks": 10, **options})
        async with anyio.create_task_group() as group:
            group.start_soon(receiver.listen, finish)
            try:
                yield receiver
            finally:
                finish.set()
    await broker.shutdown()
