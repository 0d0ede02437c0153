"""Local time as the library sees it: monotonic, injected, and never a wall clock."""

from __future__ import annotations

import time
from typing import Protocol

import anyio


class Clock(Protocol):
    """What the engine needs of local time; tests and the simulation give their own."""

    def monotonic(self) -> float:
        """Seconds since some fixed moment; never goes back, and counts time in which the machine slept."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after that many seconds (0 or less: let others run once)."""
        ...


class SystemClock:
    """The machine's clock.

    Uses CLOCK_BOOTTIME where the system has it, because CLOCK_MONOTONIC stands still while a machine is suspended:
    a worker that slept through its lease must notice.
    """

    _source = getattr(time, "CLOCK_BOOTTIME", None)

    def monotonic(self) -> float:
        if self._source is None:
            return time.monotonic()
        return time.clock_gettime(self._source)

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(max(0.0, seconds))
