"""Local time as the library sees it: monotonic, injected, and never a wall clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Protocol

import anyio


class Clock(Protocol):
    """What the engine needs of local time; tests and the simulation give their own."""

    @property
    def monotonic(self) -> Callable[[], float]:
        """Seconds since some fixed moment; never goes back, and counts time in which the machine slept."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after that many seconds (0 or less: let others run once)."""
        ...


def wall_clock() -> float:
    """What this machine's clock shows, seconds since the epoch; for people and for diagnosis, never for the protocol."""
    return time.time()


class SystemClock:
    """The machine's clock.

    Uses CLOCK_BOOTTIME where the system has it, because CLOCK_MONOTONIC stands still while a machine is suspended:
    a worker that slept through its lease must notice.
    """

    def __init__(self) -> None:
        source = getattr(time, "CLOCK_BOOTTIME", None)
        # Called several times for each message: without a frame of Python's own it takes a third of the time.
        self.monotonic: Callable[[], float] = time.monotonic if source is None else partial(time.clock_gettime, source)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(max(0.0, seconds))
