"""Several worker processes under one: signals go on to them, one that dies is started again, none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import anyio
from anyio.abc import Process

from s3queue_async.cli.exits import Exit, Failed
from s3queue_async.clock import SystemClock
from s3queue_async.log import log

CLOCK = SystemClock()
PAUSE_FIRST_S = 0.5
PAUSE_MAX_S = 30.0
WELL_AFTER_S = 60.0
"""A process that ran for so long has proved itself: its next start waits as short as the first."""
FINAL = frozenset({Exit.USAGE, Exit.NOT_FOUND})
"""Ends that another start would not change."""


async def parent_gone() -> None:
    """Return once the supervisor has closed the other end of stdin, which it does by ending, however it ends."""
    while True:
        await anyio.wait_readable(0)
        if not os.read(0, 1024):
            return


class Supervisor:
    """Starts processes of ``s3queue`` and stays as long as they should run.

    Args:
        arguments: Of each process.
        environment: Of each process.
        number: How many.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], number: int) -> None:
        self._command = [sys.executable, "-m", "s3queue_async", *arguments]
        self._environment = environment
        self._number = number
        self._running: dict[int, Process] = {}
        self._stopping = anyio.Event()
        self._code = int(Exit.DONE)

    async def run(self) -> int:
        """Run until a signal, or until a process ends in a way that another start would not change; the exit code."""
        async with anyio.create_task_group() as group:
            group.start_soon(self._pass_signals)
            async with anyio.create_task_group() as keeping:
                for number in range(self._number):
                    keeping.start_soon(self._keep, number)
            group.cancel_scope.cancel()
        return self._code

    async def run_reloading(self, *paths: Path) -> int:
        """As ``run``, and start all of them anew whenever a Python file below these directories changes."""
        try:
            import watchfiles
        except ImportError as error:
            raise Failed(
                Exit.USAGE, f"--reload needs what is not installed ({error}).", "Run: pip install 's3queue-async[cli]'"
            ) from error
        async with anyio.create_task_group() as group:
            group.start_soon(self._pass_signals)
            ended = anyio.Event()
            group.start_soon(self._once_each, ended)
            async for changed in watchfiles.awatch(
                *(paths or (Path.cwd(),)), watch_filter=watchfiles.PythonFilter(), stop_event=self._stopping
            ):
                log.info("reloading", changed=sorted({Path(path).name for _, path in changed})[:5])
                self._signal(signal.SIGTERM)
                await ended.wait()
                ended = anyio.Event()
                group.start_soon(self._once_each, ended)
            await ended.wait()
            group.cancel_scope.cancel()
        return self._code

    async def _once_each(self, ended: anyio.Event) -> None:
        try:
            async with anyio.create_task_group() as group:
                for number in range(self._number):
                    group.start_soon(self._run_one, number)
        finally:
            ended.set()

    async def _keep(self, number: int) -> None:
        pause_s = PAUSE_FIRST_S
        while not self._stopping.is_set():
            began = CLOCK.monotonic()
            code = await self._run_one(number)
            if self._stopping.is_set():
                return
            if code in FINAL:
                self._code = code
                self._stop(signal.SIGTERM)
                return
            if CLOCK.monotonic() - began > WELL_AFTER_S:
                pause_s = PAUSE_FIRST_S
            log.error("a worker process ended, starting it again", process=number, code=code, pause=pause_s)
            with anyio.move_on_after(pause_s):
                await self._stopping.wait()
            pause_s = min(PAUSE_MAX_S, 2 * pause_s)

    async def _run_one(self, number: int) -> int:
        # In a session of its own: a Ctrl-C reaches it once, through this process.
        async with await anyio.open_process(
            self._command, stdin=subprocess.PIPE, stdout=None, stderr=None, env=self._environment,
            start_new_session=True,
        ) as process:  # fmt: skip
            self._running[number] = process
            try:
                code = await process.wait()
            finally:
                del self._running[number]
        if self._stopping.is_set() and code not in (0, -signal.SIGTERM, -signal.SIGINT):
            self._code = self._code or Exit.FAULT
        return code

    async def _pass_signals(self) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for signum in signals:
                log.info("signal received, stopping the worker processes", signal=signum.name)
                self._stop(signum)

    def _stop(self, signum: signal.Signals) -> None:
        self._stopping.set()
        self._signal(signum)

    def _signal(self, signum: signal.Signals) -> None:
        for process in list(self._running.values()):
            process.send_signal(signum)
