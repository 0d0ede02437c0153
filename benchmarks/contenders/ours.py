"""This library, with its default settings."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlencode

from benchmarks.contenders.base import Place
from s3queue_async import S3Queue, Settings
from s3queue_async.storage.metered import OPERATIONS, MeteredStorage, Request
from s3queue_async.storage.open import storage_from_url

CONCURRENCY = 32
UPKEEP = ("plugin/", "queue.json")
"""What a worker asks for as time passes, rather than for messages; so it does with listings."""


class Counted:
    """Requests so far, those for messages apart from those that come with time."""

    def __init__(self) -> None:
        self.own: Counter[str] = Counter()
        self.upkeep: Counter[str] = Counter()

    def __call__(self, request: Request) -> None:
        upkeep = request.operation == "list" or request.key.startswith(UPKEEP)
        (self.upkeep if upkeep else self.own)[request.operation] += 1


def queue_url(place: Place, scheme: str) -> str:
    """The url of the queue; the credentials go by the environment."""
    query = urlencode({"endpoint_url": place.endpoint_url, "region": place.region, "addressing": "path"})
    return f"{scheme}://{place.bucket}/{place.prefix}?{query}"


class Ours:
    """A queue whose producer and worker are one object.

    Args:
        place: Where it lives.
        scheme: Which of the S3 clients: "s3" or "s3+obstore".
        concurrency: Handlers at a time.
        handler_s: How long a handler takes, in seconds.
        settings: What is not left at its default.
        counted: Is told of every request; None leaves out what that costs.
    """

    def __init__(
        self,
        place: Place,
        *,
        scheme: str = "s3",
        concurrency: int = CONCURRENCY,
        handler_s: float = 0.0,
        settings: Mapping[str, Any] | None = None,
        counted: Counted | None = None,
    ) -> None:
        os.environ.update(AWS_ACCESS_KEY_ID=place.access_key_id, AWS_SECRET_ACCESS_KEY=place.secret_access_key)
        url = queue_url(place, scheme)
        self.queue: S3Queue[bytes] = S3Queue(
            url,
            storage=None if counted is None else MeteredStorage(storage_from_url(url), on_request=counted),
            settings=Settings(**(settings or {})),
            auto_start=False,
        )
        self._concurrency = concurrency
        self._handler_s = handler_s

    async def open(self) -> None:
        await self.queue.__aenter__()

    async def enqueue(self, payloads: Sequence[bytes]) -> None:
        ids = await self.queue.enqueue_many(payloads) if len(payloads) > 1 else [await self.queue.enqueue(payloads[0])]
        if len(set(ids)) != len(payloads):
            raise RuntimeError(f"{len(payloads)} messages enqueued, {len(set(ids))} ids")

    async def start(self, handle: Callable[[bytes], None]) -> None:
        handler_s = self._handler_s

        async def nothing(payload: bytes) -> None:
            handle(payload)

        async def slow(payload: bytes) -> None:
            await asyncio.sleep(handler_s)
            handle(payload)

        await self.queue.start_processing(slow if handler_s else nothing, concurrency=self._concurrency)

    async def finish(self) -> None:
        """Everything is settled: it belongs to processing."""
        await self.queue.drain()

    async def close(self) -> None:
        await self.queue.__aexit__(None, None, None)

    def requests(self) -> Mapping[str, int]:
        counted = self.queue.requests()
        return {operation: getattr(counted, operation).attempts for operation in OPERATIONS}


def make(place: Place, **options: Any) -> Ours:
    return Ours(place, **options)
