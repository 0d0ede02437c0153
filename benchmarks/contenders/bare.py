"""The bare loop: the requests that the queue makes on the same path, and nothing around them.

For a segment, a conditional PUT to enqueue; a conditional PUT of a claim beside a GET, then a DELETE, to process; the
claims are deleted in batches. As many are in flight, and nothing is encoded, decoded, scheduled or watched.

There are two: on aiobotocore's own calls, which is what a program without this library does; and on this library's
storage adapter, which makes the same requests with less of the client's CPU, and so asks more of the queue above it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from typing import Any, Protocol

import anyio
from aiobotocore.config import AioConfig
from aiobotocore.session import get_session

from benchmarks.contenders.base import Place, in_flight
from benchmarks.contenders.ours import queue_url
from s3queue_async.protocol import segment as segments
from s3queue_async.storage.base import IfAbsent, Storage
from s3queue_async.storage.open import storage_from_url

IN_FLIGHT = 16
CLAIMS_AT_ONCE = 32
CLAIM_BODY = b"c" * 180
DELETES_AT_ONCE = 1000


class Client(Protocol):
    """What the loop asks of an S3 client."""

    async def open(self) -> None: ...

    async def create(self, key: str, body: bytes) -> None: ...

    async def get(self, key: str) -> None: ...

    async def delete(self, key: str) -> None: ...

    async def delete_many(self, keys: Sequence[str]) -> None: ...

    async def close(self) -> None: ...


class Aiobotocore:
    """aiobotocore's own calls, with what its configuration offers to make them fast."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._client: Any = None
        self._exits = AsyncExitStack()

    async def open(self) -> None:
        place = self._place
        client = get_session().create_client(
            "s3",
            endpoint_url=place.endpoint_url,
            region_name=place.region,
            aws_access_key_id=place.access_key_id,
            aws_secret_access_key=place.secret_access_key,
            config=AioConfig(
                s3={"addressing_style": "path"},
                max_pool_connections=2 * CLAIMS_AT_ONCE,
                parameter_validation=False,
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
        self._client = await self._exits.enter_async_context(client)

    def _object(self, key: str) -> dict[str, str]:
        return {"Bucket": self._place.bucket, "Key": f"{self._place.prefix}/{key}"}

    async def create(self, key: str, body: bytes) -> None:
        await self._client.put_object(**self._object(key), Body=body, IfNoneMatch="*")

    async def get(self, key: str) -> None:
        reply = await self._client.get_object(**self._object(key))
        async with reply["Body"] as stream:
            await stream.read()

    async def delete(self, key: str) -> None:
        await self._client.delete_object(**self._object(key))

    async def delete_many(self, keys: Sequence[str]) -> None:
        objects = [{"Key": self._object(key)["Key"]} for key in keys]
        await self._client.delete_objects(Bucket=self._place.bucket, Delete={"Objects": objects, "Quiet": True})

    async def close(self) -> None:
        await self._exits.aclose()


class Adapter:
    """This library's storage adapter."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.open, self.close = storage.open, storage.close

    async def create(self, key: str, body: bytes) -> None:
        await self._storage.put(key, body, when=IfAbsent())

    async def get(self, key: str) -> None:
        await self._storage.get(key)

    async def delete(self, key: str) -> None:
        await self._storage.delete(key)

    async def delete_many(self, keys: Sequence[str]) -> None:
        await self._storage.delete_many(keys)


class Bare:
    """The same requests, straight to an S3 client.

    Args:
        client: Opened and closed by the loop.
        per_segment: Messages in one object.
    """

    def __init__(self, client: Client, *, per_segment: int) -> None:
        self._client = client
        self._per_segment = per_segment
        self._payloads: Sequence[bytes] = ()
        self._names: list[str] = []
        self._requests: Counter[str] = Counter()

    async def open(self) -> None:
        await self._client.open()

    async def enqueue(self, payloads: Sequence[bytes]) -> None:
        each = self._per_segment
        records = [segments.Record(f"{'0' * 26}-00{i:04x}", 0, len(payloads[0]), 1) for i in range(each)]
        body = segments.encode(segments.Index(records, 0), payloads[:each])
        self._payloads = payloads
        self._names = [f"{i:026d}-{each}" for i in range(len(payloads) // each)]

        async def put(name: str) -> None:
            self._requests["put"] += 1
            await self._client.create(f"ready/255/{name}", body)

        await in_flight(self._names, put, IN_FLIGHT)

    async def start(self, handle: Callable[[bytes], None]) -> None:
        async def one(name: str) -> None:
            self._requests.update(("put", "get", "delete"))
            async with anyio.create_task_group() as group:
                group.start_soon(self._client.get, f"ready/255/{name}")
                await self._client.create(f"claims/{name}", CLAIM_BODY)
            await self._client.delete(f"ready/255/{name}")

        await in_flight(self._names, one, CLAIMS_AT_ONCE)
        for start in range(0, len(self._names), DELETES_AT_ONCE):
            self._requests["delete_many"] += 1
            await self._client.delete_many([f"claims/{name}" for name in self._names[start : start + DELETES_AT_ONCE]])
        for payload in self._payloads:
            handle(payload)

    async def finish(self) -> None: ...

    async def close(self) -> None:
        await self._client.close()

    def requests(self) -> Mapping[str, int]:
        return self._requests


def loops(places: Mapping[str, Place], *, scheme: str, per_segment: int) -> dict[str, Bare]:
    """The loops beside which a queue on this S3 client is measured, by name.

    Args:
        places: Where each loop keeps its objects.
        scheme: Which of the S3 clients: "s3" or "s3+obstore".
        per_segment: Messages in one object.
    """
    where = places["adapter"]
    os.environ.update(AWS_ACCESS_KEY_ID=where.access_key_id, AWS_SECRET_ACCESS_KEY=where.secret_access_key)
    clients: dict[str, Client] = {"adapter": Adapter(storage_from_url(queue_url(where, scheme)))}
    if scheme == "s3":
        clients = {"bare": Aiobotocore(places["bare"]), **clients}
    return {name: Bare(client, per_segment=per_segment) for name, client in clients.items()}
