"""When a schedule is due: arithmetic on store time, and cron expressions in a time zone. Nothing here waits.

Cron is cronsim's (extra ``schedule``): it does what Debian's cron does, also where clocks are put forward or back.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Protocol
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from s3queue_async.errors import InvalidSettings

LOOK_BACK_FIRST_MS = 60_000
LOOK_BACK_FACTOR = 8
_CRON_HINT = (
    'Use five fields, "minute hour day-of-month month day-of-week", e.g. "0 3 * * *", or six with seconds first.'
)


class Ticks(Protocol):
    """The moments of a schedule, milliseconds of store time."""

    def after(self, moment_ms: int) -> Iterator[int]:
        """Every tick later than this moment, in order."""
        ...


class Every:
    """A tick every so many milliseconds, counted from a moment."""

    def __init__(self, every_ms: int, anchor_ms: int) -> None:
        self._every_ms = every_ms
        self._anchor_ms = anchor_ms

    def after(self, moment_ms: int) -> Iterator[int]:
        """Every tick later than this moment; the first one ever is one interval after the anchor."""
        tick_ms = self._anchor_ms + self._every_ms * max(1, (moment_ms - self._anchor_ms) // self._every_ms + 1)
        while True:
            yield tick_ms
            tick_ms += self._every_ms


class Cron:
    """The ticks of a cron expression in a time zone.

    Raises:
        InvalidSettings: The expression or the time zone cannot be understood, or cronsim is not installed.
    """

    def __init__(self, expression: str, timezone: str) -> None:
        self._zone = zone(timezone)
        self._expression = expression
        cronsim = _cronsim()
        try:
            cronsim.CronSim(expression, datetime(2000, 1, 1, tzinfo=self._zone))
        except cronsim.CronSimError as error:
            raise InvalidSettings(
                f"cron={expression!r} is no cron expression: {error}.", suggestion=_CRON_HINT
            ) from None

    def after(self, moment_ms: int) -> Iterator[int]:
        """Every tick later than this moment; none at all when the expression matches no day."""
        start = datetime.fromtimestamp(moment_ms // 1000, UTC).astimezone(self._zone)
        for local in _cronsim().CronSim(self._expression, start):
            tick_ms = int(local.timestamp()) * 1000
            # In the hour that clocks show twice, the search begins in the first of the two.
            if tick_ms > moment_ms:
                yield tick_ms


def latest(ticks: Ticks, *, after_ms: int, until_ms: int) -> int | None:
    """The last tick later than ``after_ms``, and not later than ``until_ms``; None when there is none.

    It looks at the last minute first, then further and further back, so that a schedule of seconds that nobody looked
    at for a month costs no more than one of days.
    """
    back_ms = LOOK_BACK_FIRST_MS
    while True:
        found = None
        from_ms = max(after_ms, until_ms - back_ms)
        for tick_ms in ticks.after(from_ms):
            if tick_ms > until_ms:
                break
            found = tick_ms
        if found is not None or from_ms <= after_ms:
            return found
        back_ms *= LOOK_BACK_FACTOR


def zone(name: str) -> ZoneInfo:
    """The time zone of this name. Raises InvalidSettings."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise InvalidSettings(
            f"timezone={name!r} is no time zone that this machine knows: {error}.",
            suggestion="Use a name of the IANA database, e.g. \"Europe/Berlin\"; 'pip install tzdata' brings it.",
        ) from None


@functools.cache
def _cronsim() -> Any:
    try:
        import cronsim
    except ImportError as error:
        raise InvalidSettings(
            f"A cron expression needs a library that is missing: {error}.",
            suggestion="pip install 's3queue-async[schedule]'; every= works without it.",
        ) from None
    return cronsim
