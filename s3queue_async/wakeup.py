"""Wakes whoever waits for something to change."""

from __future__ import annotations

import anyio


class Wakeup:
    """Lets any number of tasks wait for the next change.

    Look at the condition, then wait, without an await between: ``while not ready(): await wakeup.wait()``.
    """

    __slots__ = ("_event",)

    def __init__(self) -> None:
        self._event = anyio.Event()

    def set(self) -> None:
        """Wake all who wait now."""
        self._event.set()
        self._event = anyio.Event()

    async def wait(self) -> None:
        """Return at the next ``set``."""
        await self._event.wait()
