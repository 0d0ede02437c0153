"""Stops calling a handler that keeps failing, and tries one message now and then until it works again.

Not one of PyPI's circuit breakers: those that are maintained read the wall clock by themselves, count successes that
were begun before the circuit opened, and let everything through at once when they try again. With many handlers at a
time the last two decide whether a breaker protects anything.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import anyio

from s3queue_async.engine.shared import Shared
from s3queue_async.errors import InvalidSettings
from s3queue_async.log import log
from s3queue_async.message import Outcome, Release
from s3queue_async.middleware.chain import CallNext, Delivery
from s3queue_async.settings import seconds, whole_number
from s3queue_async.wakeup import Wakeup
from s3queue_async.worker import timed_out

FAILURES_MAX = 1_000_000
TIMEOUT_PART = 0.5
"""The part of ``handler_timeout`` for which a message may be held."""

Failing = type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool]


@dataclass(frozen=True, slots=True)
class _Pass:
    """Leave to call the handler.

    Attributes:
        period: How often the circuit had opened by then; what a call of an earlier period comes to says nothing.
        probe: Whether the circuit waits for this call.
    """

    period: int
    probe: bool


class CircuitBreaker:
    """Middleware that opens after failures in a row: then no handler is called for a while.

    While it is open, a message that comes is held, so that the worker claims no more than it holds; after
    ``recovery`` it is given back without an attempt. Then one message is tried: if it works the circuit closes,
    otherwise it stays open for as long again.

    Args:
        failures: How many in a row open it, 1 to 1,000,000.
        recovery: Seconds (or timedelta) for which it stays open, above 0.
        counts: Which exceptions are failures: a class, several, or a function that says so. By default all but Retry,
            DeadLetter and Release, which say nothing about what the handler depends on. A handler that exceeds
            ``handler_timeout`` has failed, too.
        name: What the log calls it.

    Raises:
        InvalidSettings: A value is out of its range.
    """

    def __init__(
        self,
        *,
        failures: int = 5,
        recovery: float | timedelta = 30.0,
        counts: Failing | None = None,
        name: str = "handler",
    ) -> None:
        self._failures_max = whole_number("failures", failures, 1, FAILURES_MAX)
        self._recovery_s = seconds("recovery", recovery)
        if self._recovery_s <= 0:
            raise InvalidSettings(f"recovery={recovery!r} must be above 0 seconds.")
        self._counts = _predicate(counts)
        self.name = name
        self._failures = 0
        self._period = 0
        self._opened_at: float | None = None
        self._probing = False
        self._changed = Wakeup()

    @property
    def state(self) -> Literal["closed", "open", "half-open"]:
        """Half-open: one message is being tried."""
        if self._opened_at is None:
            return "closed"
        return "half-open" if self._probing else "open"

    async def __call__(self, message: Delivery[Any], call_next: CallNext) -> Any:
        clock = message.shared.clock
        leave = _Pass(self._period, probe=False) if self._opened_at is None else await self._admit(message.shared)
        try:
            result = await call_next(message)
        except Exception as error:
            if self._counts(error):
                self._failed(leave, clock.monotonic(), error)
            else:
                self._undecided(leave)
            raise
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError) and timed_out(error):
                self._failed(leave, clock.monotonic(), error)
            else:
                self._undecided(leave)
            raise
        self._worked(leave)
        return result

    async def _admit(self, shared: Shared) -> _Pass:
        """Hold the message until it may be tried. Raises Release when it is given back."""
        timeout_s = shared.settings.handler_timeout
        hold_s = self._recovery_s if timeout_s is None else min(self._recovery_s, timeout_s * TIMEOUT_PART)
        give_up_at = shared.clock.monotonic() + hold_s
        while self._opened_at is not None:
            now = shared.clock.monotonic()
            closed_until = self._opened_at + self._recovery_s
            if not self._probing and now >= closed_until:
                self._probing = True
                return _Pass(self._period, probe=True)
            if now >= give_up_at:
                raise Release(delay=max(0.0, closed_until - now))
            until = give_up_at if self._probing else min(give_up_at, closed_until)
            with anyio.move_on_after(until - now):
                await self._changed.wait()
        return _Pass(self._period, probe=False)

    def _worked(self, leave: _Pass) -> None:
        if leave.period != self._period:
            return
        self._failures = 0
        if leave.probe:
            self._probing = False
            self._opened_at = None
            self._changed.set()
            log.info("circuit closed", circuit=self.name)

    def _failed(self, leave: _Pass, now: float, error: BaseException) -> None:
        if leave.period != self._period:
            return
        self._failures += 1
        if leave.probe or self._failures >= self._failures_max:
            self._period += 1
            self._failures = 0
            self._probing = False
            self._opened_at = now
            self._changed.set()
            reason = type(error).__name__
            log.warning("circuit opened", circuit=self.name, error=reason, for_s=self._recovery_s)

    def _undecided(self, leave: _Pass) -> None:
        """The call says nothing: somebody else is to be tried."""
        if leave.probe and leave.period == self._period:
            self._probing = False
            self._changed.set()


def _predicate(counts: Failing | None) -> Callable[[Exception], bool]:
    if counts is None:
        return lambda error: not isinstance(error, Outcome)
    classes = counts if isinstance(counts, tuple) else (counts,)
    if all(isinstance(kind, type) and issubclass(kind, Exception) for kind in classes) and classes:
        kinds: tuple[type[Exception], ...] = classes  # type: ignore[assignment]  # looked at in the line above
        return lambda error: isinstance(error, kinds)
    if isinstance(counts, tuple | type) or not callable(counts):
        raise InvalidSettings(
            f"counts={counts!r} must be an exception class, a tuple of them, or a function from exception to bool."
        )
    return counts
