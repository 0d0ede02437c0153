"""What compression and encryption of a segment take, and how long the event loop stands still meanwhile.

python -m benchmarks.packing
"""

from __future__ import annotations

import asyncio
import json
import os
import time

from rich.console import Console
from rich.table import Table

from s3queue_async import Keyring
from s3queue_async.engine.packing import Packer
from s3queue_async.protocol.segment import Index, Record, Segment

SIZES = (256 * 2**10, 4 * 2**20, 64 * 2**20)
ROUNDS = 5
KEY = "ready/255/01ARZ3NDEKTSV4RRFFQ69G5FAV-1"


def records(size: int) -> bytes:
    """JSON as a service might enqueue it."""
    rows = [
        {"id": i, "name": f"user {i}", "email": f"user{i * 7919 % 10007}@example.com", "ok": True}
        for i in range(size // 60)
    ]
    return json.dumps(rows).encode()[:size]


class Lag:
    """The longest that the event loop stood still."""

    def __init__(self) -> None:
        self.worst_s = 0.0

    async def run(self) -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0.001)
            self.worst_s = max(self.worst_s, time.perf_counter() - began - 0.001)


async def measure(payload: bytes, compression: str | None, keyring: Keyring | None, lag: Lag) -> list[str]:
    packer = Packer(compression=compression, keyring=keyring)
    segment = Segment(Index([Record("x", 1, len(payload))], 1), [payload])
    packing, unpacking, lags = [], [], []
    body = b""
    for _ in range(ROUNDS):
        lag.worst_s = 0.0
        began = time.perf_counter()
        body = await packer.pack(KEY, segment)
        packed = time.perf_counter()
        await asyncio.sleep(0.005)
        again = time.perf_counter()
        read = await packer.unpack(KEY, body)
        unpacking.append(time.perf_counter() - again)
        packing.append(packed - began)
        await asyncio.sleep(0.005)
        lags.append(lag.worst_s)
        if read != segment:
            raise AssertionError("what was read is not what was written")
    middle = ROUNDS // 2
    figures = [f"{1e3 * sorted(values)[middle]:.1f} ms" for values in (packing, unpacking, lags)]
    return [f"{len(body) / len(payload):.0%}", *figures]


async def main() -> None:
    keyring = Keyring({"bench": Keyring.new_key()})
    table = Table(title=f"One segment of one message, median of {ROUNDS}")
    for column in ("payload", "", "stored", "pack", "unpack", "loop stood still"):
        table.add_column(column, justify="right")
    async with asyncio.TaskGroup() as group:
        lag = Lag()
        watching = group.create_task(lag.run())
        for size in SIZES:
            for kind, payload in (("JSON", records(size)), ("noise", os.urandom(size))):
                for name, compression, ring in (
                    ("plain", None, None),
                    ("zstd", "zstd", None),
                    ("encrypted", None, keyring),
                    ("both", "zstd", keyring),
                ):
                    row = await measure(payload, compression, ring, lag)
                    table.add_row(f"{size / 2**20:g} MiB {kind}", name, *row)
        watching.cancel()
    Console(width=100).print(table)


if __name__ == "__main__":
    asyncio.run(main())
