"""Starts, signals and ends the processes of a storm."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import anyio
import msgspec

from tests.storm import programs
from tests.storm.journal import Acknowledged, AnyLine, Ended, Registered, Tail
from tests.storm.programs import Task
from tests.storm.proxy import Cut, Link

LOG_TAIL = 3000

# A hundred processes are started; importing the S3 client costs each a second of CPU unless a fork server did it before.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.storm.programs", "s3queue_async.storage.s3"])


@dataclass(eq=False)
class Program:
    """One process, from start to end.

    Attributes:
        ended_s: When it was seen to be gone.
        told_to_end, killed: What was done to it; it must end with exit code 0 after the one, by the signal after
            the other.
        disturbed: Whether it is paused or cut off at the moment.
    """

    task: Task
    link: Link
    lines: list[AnyLine] = field(default_factory=list)
    acknowledged: int = 0
    ended_s: float | None = None
    told_to_end: bool = False
    killed: bool = False
    disturbed: bool = False
    gone: anyio.Event = field(default_factory=anyio.Event)
    _released: anyio.Event = field(default_factory=anyio.Event)

    def __post_init__(self) -> None:
        self._tail = Tail(Path(self.task.directory) / f"{self.name}.journal")
        self._process = _context.Process(
            target=programs.main, args=(msgspec.json.encode(self.task),), name=self.name, daemon=True
        )
        self._process.start()
        assert self._process.pid is not None
        # The fork server reaps it at once, so its number may soon be another process's.
        self._pidfd = os.pidfd_open(self._process.pid)

    def __repr__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return self.task.name

    @property
    def role(self) -> str:
        return self.task.role

    @property
    def exit_code(self) -> int | None:
        return self._process.exitcode

    @property
    def alive(self) -> bool:
        return self.ended_s is None

    def read(self) -> None:
        """Add what is new in its journal to ``lines``."""
        new = self._tail.read()
        self.lines += new
        self.acknowledged += sum(isinstance(line, Acknowledged) for line in new)

    @property
    def registered(self) -> bool:
        """Whether it got so far that it takes SIGTERM as a request to drain."""
        self.read()
        return any(isinstance(line, Registered) for line in self.lines)

    @property
    def died_of_poison(self) -> bool:
        self.read()
        last = self.lines[-1] if self.lines else None
        return isinstance(last, Ended) and last.outcome == "poison"

    def log_tail(self) -> str:
        return (Path(self.task.directory) / f"{self.name}.log").read_text(errors="replace")[-LOG_TAIL:]

    async def ended(self) -> None:
        """Return once it is gone."""
        await anyio.wait_readable(self._process.sentinel)
        self._process.join()
        self.ended_s = time.monotonic()
        self.gone.set()
        self._released.set()

    # -- what is done to it --------------------------------------------------------------------------------------

    def kill(self) -> None:
        self.killed = True
        self._signal(signal.SIGKILL)

    def tell_to_end(self) -> None:
        self.told_to_end = True
        self._signal(signal.SIGTERM)

    def release(self) -> None:
        """End what disturbs it, now and later."""
        self._released.set()

    async def pause(self, for_s: float) -> tuple[float, float]:
        """Let it stand still for so long; returns since when and until when."""
        since_s = time.monotonic()
        self.disturbed = True
        self._signal(signal.SIGSTOP)
        try:
            with anyio.move_on_after(for_s):
                await self._released.wait()
        finally:
            self._signal(signal.SIGCONT)
            self.disturbed = False
        return since_s, time.monotonic()

    async def cut(self, how: Cut, for_s: float) -> tuple[float, float]:
        """Cut it off from the store for so long; returns since when and until when."""
        since_s = time.monotonic()
        self.disturbed = True
        self.link.cut(how)
        try:
            with anyio.move_on_after(for_s):
                await self._released.wait()
        finally:
            self.link.mend()
            self.disturbed = False
        return since_s, time.monotonic()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, number)

    def close(self) -> None:
        """Whatever happened: it does not stay behind."""
        if self.alive:
            self._signal(signal.SIGKILL)
            self._process.join()
        os.close(self._pidfd)
