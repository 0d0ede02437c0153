"""The messages that this worker holds and has not started, in the order in which they are to start."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Callable

import anyio

from s3queue_async.clock import Clock
from s3queue_async.engine.held import Held


def _order(held: Held) -> tuple[int, str]:
    return -held.index.priority, held.key.ulid


class Feed:
    """Hands messages to whoever runs them.

    A message that may have killed a worker runs alone: nothing else starts while it waits for the running handlers
    to end (for ``patience_s`` at most: a handler that has run for longer is hardly the one) and while it runs.
    """

    def __init__(self, clock: Clock, *, patience_s: float, on_hungry: Callable[[], None]) -> None:
        self._clock = clock
        self._patience_s = patience_s
        self._on_hungry = on_hungry
        self._held: list[Held] = []
        self._takers: deque[anyio.Event] = deque()
        self._alone: Held | None = None
        self._alone_since: float | None = None
        self.running = 0
        self.finished = 0

    @property
    def queued(self) -> int:
        """Messages that wait here."""
        return sum(len(held.waiting) for held in self._held)

    @property
    def queued_bytes(self) -> int:
        """Payload bytes of the segments of which messages wait here."""
        return sum(held.size for held in self._held)

    @property
    def idle(self) -> int:
        """Takers that wait for a message."""
        return len(self._takers)

    def add(self, held: Held) -> None:
        insort(self._held, held, key=_order)
        self.wake(1)

    def remove(self, held: Held) -> None:
        """Nothing of this segment is to start any more."""
        if held in self._held:
            self._held.remove(held)
        if self._alone is held and held.running == 0:
            self._alone = None
        self._alone_since = None
        self.wake(1)

    def take(self) -> tuple[Held, int] | None:
        """The next message to start, now counted as running; None when none may start."""
        if self._alone is not None:
            return None
        while self._held:
            held = self._held[0]
            if not held.waiting:
                del self._held[0]
                continue
            if held.isolated and not self._may_run_alone(held):
                return None
            index = held.waiting.popleft()
            held.running += 1
            self.running += 1
            if not held.waiting:
                del self._held[0]
                self._on_hungry()
            return held, index
        return None

    def done(self, held: Held) -> None:
        """A message that was taken does not run any more."""
        held.running -= 1
        self.running -= 1
        self.finished += 1
        if self._alone is held:
            self._alone = None
            self.wake(1)
        elif self.running == 0 and self._held and self._held[0].isolated:
            self.wake(1)

    async def wait(self) -> None:
        """Return when there may be something to take."""
        event = anyio.Event()
        self._takers.append(event)
        self._on_hungry()
        try:
            await event.wait()
        except BaseException:
            if event.is_set():
                # Somebody else may have what this taker was woken for.
                self.wake_next()
            else:
                self._takers.remove(event)
            raise

    def wake_next(self) -> None:
        """Let one more taker look, if anything waits; who is busy for a while with what it took calls this."""
        if self._held and self._takers:
            self._takers.popleft().set()

    def wake(self, count: int) -> None:
        """Let up to ``count`` takers look again."""
        for _ in range(min(count, len(self._takers))):
            self._takers.popleft().set()

    def _may_run_alone(self, held: Held) -> bool:
        if self.running:
            now = self._clock.monotonic()
            if self._alone_since is None:
                self._alone_since = now
            if now - self._alone_since < self._patience_s:
                return False
        self._alone_since = None
        self._alone = held
        return True
