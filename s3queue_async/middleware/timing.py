"""Says how long each handler ran, and how it ended."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec

from s3queue_async.errors import InvalidSettings
from s3queue_async.log import log
from s3queue_async.middleware.chain import CallNext, Delivery
from s3queue_async.settings import seconds


class Timed(msgspec.Struct, frozen=True, kw_only=True):
    """One run of a handler.

    Attributes:
        message_id: The message's id.
        attempt: 1 for the first attempt.
        seconds: How long it ran, inner middleware included.
        waited: Seconds from the enqueue to the beginning of this run, by the store's clock.
        outcome: "completed", or the class of what was raised ("ValueError", "Retry", "CancelledError").
    """

    message_id: str
    attempt: int
    seconds: float
    waited: float
    outcome: str


class Timing:
    """Middleware that measures each run of a handler.

    Args:
        report: Called with a Timed for each run; None: it is logged, at info.
        slow: Seconds (or timedelta) from which on a run counts, and is logged as a warning; 0: every run counts.

    Raises:
        InvalidSettings: ``slow`` is negative.
    """

    def __init__(self, report: Callable[[Timed], object] | None = None, *, slow: float | timedelta = 0.0) -> None:
        self._report = self._log if report is None else report
        self._slow_s = seconds("slow", slow)
        if self._slow_s < 0:
            raise InvalidSettings(f"slow={slow!r} must not be negative: 0 seconds or more.")

    async def __call__(self, message: Delivery[Any], call_next: CallNext) -> Any:
        shared, context = message.shared, message.context
        waited_s = max(0.0, shared.time.now_ms() / 1000 - context.enqueued_at.timestamp())
        began = shared.clock.monotonic()
        outcome = "completed"
        try:
            return await call_next(message)
        except BaseException as error:
            outcome = type(error).__name__
            raise
        finally:
            took_s = shared.clock.monotonic() - began
            if took_s >= self._slow_s:
                self._report(
                    Timed(
                        message_id=message.id, attempt=context.attempt, seconds=took_s, waited=waited_s, outcome=outcome
                    )
                )

    def _log(self, timed: Timed) -> None:
        say, event = (log.warning, "a slow handler") if self._slow_s > 0 else (log.info, "handled")
        say(
            event,
            message=timed.message_id,
            attempt=timed.attempt,
            seconds=round(timed.seconds, 6),
            waited=round(timed.waited, 3),
            outcome=timed.outcome,
        )
