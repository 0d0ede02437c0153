"""Wakes whoever waits for something to change, or to happen once."""

from __future__ import annotations

import anyio
import anyio.lowlevel


class Wakeup:
    """Lets any number of tasks wait for the next change.

    Look at the condition, then wait, without an await between: ``while not ready(): await wakeup.wait()``.
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        # Made for who waits: most changes find nobody, and an event is dearer than all else here.
        self._event: anyio.Event | None = None

    def set(self) -> None:
        """Wake all who wait now."""
        if self._event is not None:
            self._event.set()
            self._event = None

    async def wait(self) -> None:
        """Return at the next ``set``."""
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()


class Latch:
    """An event that may be set for good, and costs next to nothing where nobody has to wait for it."""

    __slots__ = ("_event", "_set")

    def __init__(self) -> None:
        self._event: anyio.Event | None = None
        self._set = False

    def set(self) -> None:
        """It has happened."""
        self._set = True
        if self._event is not None:
            self._event.set()

    def is_set(self) -> bool:
        """Whether it has happened."""
        return self._set

    async def wait(self) -> None:
        """Return once it has happened."""
        if self._set:
            await anyio.lowlevel.checkpoint()
            return
        if self._event is None:
            self._event = anyio.Event()
        await self._event.wait()
