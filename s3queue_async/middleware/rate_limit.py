"""Starts messages no faster than at a rate; needs the extra ``middleware`` (aiolimiter)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import anyio
from aiolimiter import AsyncLimiter

from s3queue_async.errors import InvalidSettings
from s3queue_async.message import Release
from s3queue_async.middleware.chain import CallNext, Delivery
from s3queue_async.settings import seconds, whole_number

RATE_MAX = 1e6
BURST_MAX = 1_000_000
TIMEOUT_PART = 0.5
"""The part of ``handler_timeout`` that may pass in waiting for a turn."""


class RateLimit:
    """Middleware that lets messages through at a rate; the others wait for their turn.

    The limit is this object's: several queues of one process may share it, other processes have their own. What
    waits keeps its place among the handlers that run at a time, so the worker claims no more than it may start.

    Args:
        rate: Messages in ``per`` seconds, above 0, up to 1,000,000.
        per: Seconds (or timedelta), above 0.
        burst: How many may start at once after a quiet time, 1 to 1,000,000; within any t seconds no more than
            ``burst + rate * t / per`` start.

    Raises:
        InvalidSettings: A value is out of its range.
    """

    def __init__(self, rate: float, *, per: float | timedelta = 1.0, burst: int = 1) -> None:
        per_s = seconds("per", per)
        if isinstance(rate, bool) or not 0 < rate <= RATE_MAX:
            raise InvalidSettings(f"rate={rate!r} must be a number above 0, up to {RATE_MAX:,.0f}.")
        if per_s <= 0:
            raise InvalidSettings(f"per={per!r} must be above 0 seconds.")
        whole_number("burst", burst, 1, BURST_MAX)
        self._each_s = per_s / rate
        self._limiter = AsyncLimiter(burst, burst * self._each_s)

    async def __call__(self, message: Delivery[Any], call_next: CallNext) -> Any:
        timeout_s = message.shared.settings.handler_timeout
        if timeout_s is None:
            await self._limiter.acquire()
        else:
            # The clock of the timeout runs already: a message that only waited must not fail for it.
            with anyio.move_on_after(timeout_s * TIMEOUT_PART) as scope:
                await self._limiter.acquire()
            if scope.cancelled_caught:
                raise Release(delay=self._each_s)
        return await call_next(message)
