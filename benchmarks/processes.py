"""Starts worker processes (benchmarks/worker.py), tells them to begin, and reads what they saw."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path

from benchmarks.worker import Seen, Work

ROOT = Path(__file__).parents[1]
LINE_MAX = 64 * 1024 * 1024
ENDS_WITHIN_S = 240.0


class WorkerProcess:
    """One worker that is ready to begin."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    def go(self) -> None:
        """Let it register and process."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"go\n")

    async def seen(self, *, tell: bool = False) -> Seen:
        """What it saw, once it has ended.

        Args:
            tell: Tell it to end; otherwise it does by itself.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if tell:
            self._process.stdin.close()
        async with asyncio.timeout(ENDS_WITHIN_S):
            line = await self._process.stdout.readline()
            await self._process.wait()
        if self._process.returncode:
            raise RuntimeError(f"A worker process ended with {self._process.returncode}; see above.")
        return Seen(**json.loads(line))


@asynccontextmanager
async def workers(works: Sequence[Work]) -> AsyncIterator[list[WorkerProcess]]:
    """Worker processes whose queues are open; those that still run at the end are killed."""
    started: list[asyncio.subprocess.Process] = []
    try:
        for work in works:
            started.append(
                await asyncio.create_subprocess_exec(
                    sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(work)), cwd=ROOT, env=dict(os.environ),
                    stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=LINE_MAX,
                )
            )  # fmt: skip
        for process in started:
            assert process.stdout is not None
            if await process.stdout.readline() != b"ready\n":
                raise RuntimeError(f"A worker process did not start (exit code {process.returncode}); see above.")
        yield [WorkerProcess(process) for process in started]
    finally:
        for process in started:
            if process.returncode is None:
                process.kill()
            await process.wait()
