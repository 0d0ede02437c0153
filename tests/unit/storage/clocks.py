"""A clock for these tests whose time only passes while somebody sleeps."""

from __future__ import annotations

from anyio.lowlevel import checkpoint


class SteppingClock:
    """Sleeping moves the time on at once; ``slept`` keeps how long each sleep was."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += max(0.0, seconds)
        await checkpoint()
