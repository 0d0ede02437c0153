"""Arithmetic of waiting: retry delays and adaptive polling. Nothing here sleeps."""

from __future__ import annotations

POLL_GROWTH = 1.15
"""An idle poller waits about 13 % of the time it has been idle already: a queue that was busy a second ago is looked
at again after a tenth of one, a queue that was idle for a minute after seconds."""

BACKOFF_EXPONENT_MAX = 62


def retry_delay_s(attempt: int, *, base_s: float, max_s: float, jitter: float, chance: float) -> float:
    """Seconds to wait before the next attempt: exponential, bounded, jittered.

    Args:
        attempt: The attempt that failed, 1 or more.
        base_s: Delay after the first attempt.
        max_s: Bound of the delay, jitter included.
        jitter: Part of the delay that is random, 0 to 1: the delay grows by up to this part of it.
        chance: A random number in [0, 1).
    """
    exponent = min(max(attempt, 1) - 1, BACKOFF_EXPONENT_MAX)
    return min(max_s, base_s * 2.0**exponent * (1 + jitter * chance))


class Polling:
    """How long to wait until the next look: the least after work, growing towards the most without."""

    def __init__(self, *, min_s: float, max_s: float, growth: float = POLL_GROWTH) -> None:
        self._min_s = min_s
        self._max_s = max(min_s, max_s)
        self._growth = growth
        self.interval_s = min_s

    def found(self) -> None:
        """There was work: look again soon."""
        self.interval_s = self._min_s

    def empty(self, *, cap_s: float | None = None) -> None:
        """There was none: wait longer next time, but no longer than ``cap_s`` when it is given."""
        most = self._max_s if cap_s is None else max(self._min_s, min(self._max_s, cap_s))
        self.interval_s = min(most, max(self._min_s, self.interval_s) * self._growth)

    def delay_s(self, chance: float) -> float:
        """The next wait: shortened by up to a quarter by a random number in [0, 1), so that workers do not move in step."""
        return self.interval_s * (1 - 0.25 * chance)
