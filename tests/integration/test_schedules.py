"""Schedules with real processes on real stores: one message for each tick, also when a process is killed."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from queue import Empty, SimpleQueue

import pytest

from s3queue_async.testing.servers import Server
from tests.conftest import BUCKET

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0

WORKER = """
import asyncio, sys
from s3queue_async import S3Queue, Settings

async def work(payload, context):
    print(context.headers["s3queue-tick"], context.message_id, flush=True)

async def main():
    settings = Settings(visibility_timeout=3, heartbeat_interval=1, max_poll_interval=0.5, election_interval=0.5)
    async with S3Queue(sys.argv[1], on_message=work, settings=settings) as queue:
        await queue.schedule("* * * * * *", "x", name="s", catch_up=True)
        await queue.run()

asyncio.run(main())
"""


class Worker:
    """A process, and what it handles."""

    def __init__(self, url: str, told: SimpleQueue[tuple[str, str]], environment: dict[str, str]) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("S3QUEUE_")}
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WORKER, url],
            env={**kept, "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        self._told = told
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as printed:
            for line in printed:
                tick, message_id = line.split()
                self._told.put((tick, message_id))

    def end(self, *, kill: bool) -> None:
        (self.process.kill if kill else self.process.terminate)()
        self.process.wait(WAIT_S)
        self._reader.join()


@pytest.mark.parametrize("store", ["sqlite", "seaweedfs"])
def test_three_processes_one_of_them_killed(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A tick each second, of three processes the coordinator's is killed: no tick is missing, none has two messages."""
    environment: dict[str, str] = {}
    if store == "sqlite":
        url = f"sqlite://{tmp_path}/queue.db"
    else:
        server: Server = request.getfixturevalue("seaweedfs")
        url = server.queue_url(BUCKET, f"schedules-{uuid.uuid4().hex}")
        environment = server.environment()
    told: SimpleQueue[tuple[str, str]] = SimpleQueue()
    ids: defaultdict[str, set[str]] = defaultdict(set)

    def until(enough: Callable[[], bool]) -> None:
        while not enough():
            try:
                tick, message_id = told.get(timeout=WAIT_S)
            except Empty:
                pytest.fail(f"nothing came for {WAIT_S:g} s after {len(ids)} ticks")
            ids[tick].add(message_id)

    # The first one there coordinates.
    workers = [Worker(url, told, environment)]
    try:
        until(lambda: len(ids) >= 2)
        workers += [Worker(url, told, environment) for _ in range(2)]
        until(lambda: len(ids) >= 5)
        workers[0].end(kill=True)
        killed_at = len(ids)
        until(lambda: len(ids) >= killed_at + 8)
        for worker in workers[1:]:
            worker.end(kill=False)
        until(told.empty)
    finally:
        for worker in workers:
            worker.end(kill=True)
    assert {len(found) for found in ids.values()} == {1}
    ticks = sorted(datetime.fromisoformat(tick).timestamp() for tick in ids)
    missing = set(range(int(ticks[0]), int(ticks[-1]) + 1)) - {int(tick) for tick in ticks}
    assert len(missing) <= 1, "what a worker holds when it drains goes back to the queue; nothing else is missing"
