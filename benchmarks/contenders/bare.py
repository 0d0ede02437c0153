"""The bare loop: the requests that the queue makes on the same path, and nothing around them.

For a segment, a conditional PUT to enqueue; a conditional PUT of a claim beside a GET, then a DELETE, to process; the
claims are deleted in batches. As many are in flight, and nothing is encoded, decoded, scheduled or watched.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import anyio

from benchmarks.contenders.base import Place, in_flight
from benchmarks.contenders.ours import queue_url
from s3queue_async.protocol import segment as segments
from s3queue_async.storage.base import IfAbsent
from s3queue_async.storage.open import storage_from_url

IN_FLIGHT = 16
CLAIMS_AT_ONCE = 32
CLAIM_BODY = b"c" * 180
DELETES_AT_ONCE = 1000


class Bare:
    """The same requests, straight to the S3 client's wrapper.

    Args:
        place: Where the objects go.
        scheme: Which of the S3 clients: "s3" or "s3+obstore".
        per_segment: Messages in one object.
    """

    def __init__(self, place: Place, *, scheme: str = "s3", per_segment: int = 256) -> None:
        os.environ.update(AWS_ACCESS_KEY_ID=place.access_key_id, AWS_SECRET_ACCESS_KEY=place.secret_access_key)
        self._storage = storage_from_url(queue_url(place, scheme))
        self._per_segment = per_segment
        self._payloads: Sequence[bytes] = ()
        self._names: list[str] = []
        self._requests: Counter[str] = Counter()

    async def open(self) -> None:
        await self._storage.open()

    async def enqueue(self, payloads: Sequence[bytes]) -> None:
        each = self._per_segment
        records = [segments.Record(f"{'0' * 26}-00{i:04x}", 0, len(payloads[0]), 1) for i in range(each)]
        body = segments.encode(segments.Index(records, 0), payloads[:each])
        self._payloads = payloads
        self._names = [f"{i:026d}-{each}" for i in range(len(payloads) // each)]

        async def put(name: str) -> None:
            self._requests["put"] += 1
            await self._storage.put(f"ready/255/{name}", body, when=IfAbsent())

        await in_flight(self._names, put, IN_FLIGHT)

    async def start(self, handle: Callable[[bytes], None]) -> None:
        async def one(name: str) -> None:
            self._requests.update(("put", "get", "delete"))
            async with anyio.create_task_group() as group:
                group.start_soon(self._storage.get, f"ready/255/{name}")
                await self._storage.put(f"claims/{name}", CLAIM_BODY, when=IfAbsent())
            await self._storage.delete(f"ready/255/{name}")

        await in_flight(self._names, one, CLAIMS_AT_ONCE)
        for start in range(0, len(self._names), DELETES_AT_ONCE):
            self._requests["delete_many"] += 1
            await self._storage.delete_many([f"claims/{name}" for name in self._names[start : start + DELETES_AT_ONCE]])
        for payload in self._payloads:
            handle(payload)

    async def finish(self) -> None: ...

    async def close(self) -> None:
        await self._storage.close()

    def requests(self) -> Mapping[str, int]:
        return self._requests


def make(place: Place, **options: Any) -> Bare:
    return Bare(place, **options)
