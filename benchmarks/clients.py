"""The client's CPU for one request of each kind: aiobotocore, obstore's signatures, and obstore's own requests.

All three ask one SeaweedFS server in turn (A B C A B C ...), from this process, with as many requests in flight. The
third has no place in the library, because it loses the store's time (docs/storage.md); it shows what that would bring.
CPU is this process's, with obstore's threads; the server is another process.

    python -m benchmarks.clients [--rounds 7] [--requests 400] [--in-flight 16]
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import anyio
import obstore
from obstore.store import S3Store
from rich.console import Console
from rich.table import Table

from s3queue_async.storage.s3 import S3Storage
from s3queue_async.storage.s3_obstore import ObstoreStorage
from s3queue_async.testing.servers import Server, seaweedfs

BUCKET = "clients"
BODY = b"x" * 1000
LISTED = 1000
LIST_PART = 25
"""A listing of a thousand keys is asked for so many times less often than the rest."""

Kind = Literal["PUT", "GET", "GET, not modified", "LIST, 1,000 keys", "LIST, 1 key", "DELETE", "DeleteObjects, 10 keys"]
Call = Callable[[int], Awaitable[Any]]


@dataclass(frozen=True)
class Sample:
    """One run of one kind of request by one client, per request."""

    cpu_us: float
    took_us: float


def by_storage(storage: S3Storage, name: str, version: str) -> Mapping[Kind, Call]:
    return {
        "PUT": lambda number: storage.put(f"{name}/{number}", BODY),
        "GET": lambda number: storage.get("one/key"),
        "GET, not modified": lambda number: storage.get("one/key", unless=version),
        "LIST, 1,000 keys": lambda number: storage.list("many/"),
        "LIST, 1 key": lambda number: storage.list("one/"),
        "DELETE": lambda number: storage.delete(f"{name}/{number}"),
        "DeleteObjects, 10 keys": lambda number: storage.delete_many([f"{name}/{key}" for key in range(10)]),
    }


def by_obstore(store: S3Store, name: str) -> Mapping[Kind, Call]:
    async def get(number: int) -> bytes:
        reply = await obstore.get_async(store, "one/key")
        return bytes(await reply.bytes_async())

    async def listed(prefix: str) -> int:
        # One more than there are, because a full chunk is handed over only when more follows it.
        return sum([len(chunk) async for chunk in obstore.list(store, prefix, chunk_size=LISTED + 1)])

    return {
        "PUT": lambda number: obstore.put_async(store, f"{name}/{number}", BODY, use_multipart=False),
        "GET": get,
        "LIST, 1,000 keys": lambda number: listed("many"),
        "LIST, 1 key": lambda number: listed("one"),
        "DELETE": lambda number: obstore.delete_async(store, f"{name}/{number}"),
        "DeleteObjects, 10 keys": lambda number: obstore.delete_async(store, [f"{name}/{key}" for key in range(10)]),
    }


async def measure(call: Call, requests: int, in_flight: int) -> Sample:
    numbers = iter(range(requests))

    async def runner() -> None:
        for number in numbers:
            await call(number)

    before, began = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    async with anyio.create_task_group() as group:
        for _ in range(in_flight):
            group.start_soon(runner)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Sample(cpu_s / requests * 1e6, took / requests * 1e6)


async def compare(server: Server, rounds: int, requests: int, in_flight: int) -> dict[Kind, dict[str, list[Sample]]]:
    options: dict[str, Any] = {
        "endpoint_url": server.endpoint_url,
        "region": server.region,
        "addressing": "path",
        "access_key_id": server.access_key_id,
        "secret_access_key": server.secret_access_key,
    }
    by_aiobotocore, by_signatures = S3Storage(BUCKET, **options), ObstoreStorage(BUCKET, **options)
    store = S3Store(
        BUCKET,
        endpoint=server.endpoint_url,
        region=server.region,
        access_key_id=server.access_key_id,
        secret_access_key=server.secret_access_key,
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    await by_aiobotocore.open()
    await by_signatures.open()
    try:
        await measure(lambda number: by_signatures.put(f"many/{number:05}", BODY), LISTED, in_flight)
        version = (await by_signatures.put("one/key", BODY)).version
        clients: dict[str, Mapping[Kind, Call]] = {
            "aiobotocore": by_storage(by_aiobotocore, "a", version),
            "obstore signs": by_storage(by_signatures, "b", version),
            "obstore's own": by_obstore(store, "c"),
        }
        samples: dict[Kind, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
        for kind in clients["aiobotocore"]:
            count = max(in_flight, requests // LIST_PART) if "," in kind and "not" not in kind else requests
            for calls in clients.values():
                if kind in calls:
                    await measure(calls[kind], in_flight, in_flight)
            for _ in range(rounds):
                for client, calls in clients.items():
                    if kind in calls:
                        samples[kind][client].append(await measure(calls[kind], count, in_flight))
        return samples
    finally:
        await by_signatures.close()
        await by_aiobotocore.close()


def show(samples: Mapping[Kind, Mapping[str, list[Sample]]], in_flight: int) -> None:
    table = Table("request", title=f"CPU of the client for one request, us ({in_flight} in flight, medians)")
    clients = list(samples["PUT"])
    for client in clients:
        table.add_column(client, justify="right")
    for client in clients[1:]:
        table.add_column(f"aiobotocore / {client}", justify="right")
    table.add_column("took: " + ", ".join(clients), justify="right")
    for kind, found in samples.items():
        cpu = {client: statistics.median(sample.cpu_us for sample in runs) for client, runs in found.items()}
        took = {client: statistics.median(sample.took_us for sample in runs) for client, runs in found.items()}
        # Of neighbouring rounds, so that a busy moment of the machine hits both sides.
        ratios = {
            client: statistics.median(
                one.cpu_us / other.cpu_us for one, other in zip(found["aiobotocore"], runs, strict=True)
            )
            for client, runs in found.items()
        }
        table.add_row(
            kind,
            *(f"{cpu[client]:,.0f}" if client in cpu else "" for client in clients),
            *(f"{ratios[client]:.1f}" if client in ratios else "" for client in clients[1:]),
            ", ".join(f"{took[client]:,.0f}" for client in clients if client in took),
        )
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--in-flight", type=int, default=16)
    arguments = parser.parse_args()
    with seaweedfs([BUCKET]) as server:
        samples = asyncio.run(compare(server, arguments.rounds, arguments.requests, arguments.in_flight))
    show(samples, arguments.in_flight)


if __name__ == "__main__":
    main()
