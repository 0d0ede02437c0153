"""Store time from ``Date`` headers: interval arithmetic over the exchanges with the store.

An exchange that began at local time ``sent`` and ended at ``received`` and carried the date ``d`` says: at some
moment between the two, the store's clock showed something in ``[d, d + resolution)``. Each exchange so bounds the
offset between store time and local time; intersecting them gives a bound tighter than the header's resolution.
Bounds widen with age, because two clocks drift.
"""

from __future__ import annotations

DRIFT_MAX = 500e-6
"""How much two clocks may drift apart, seconds a second: five times the 100 ppm of a cheap quartz."""


class StoreClock:
    """What local monotonic time says about the store's time."""

    def __init__(self, *, drift_max: float = DRIFT_MAX) -> None:
        self._drift_max = drift_max
        self._low = float("-inf")
        self._high = float("inf")
        self._at = 0.0
        self.resets = 0

    @property
    def known(self) -> bool:
        """Whether any exchange carried a date yet."""
        return self._high != float("inf")

    def observe(self, date_s: float, *, sent: float, received: float, resolution_s: float) -> None:
        """Take in one exchange.

        Args:
            date_s: The reply's date, seconds since the epoch.
            sent: Local monotonic time before the request.
            received: Local monotonic time after the reply.
            resolution_s: How coarse the date is.
        """
        low = date_s - received
        high = date_s + resolution_s - sent + self._drift_max * (received - sent)
        at = received
        if self.known:
            at = max(received, self._at)
            late = self._drift_max * (at - received)
            low, high = low - late, high + late
            slack = self._drift_max * (at - self._at)
            merged_low = max(low, self._low - slack)
            merged_high = min(high, self._high + slack)
            if merged_low <= merged_high:
                low, high = merged_low, merged_high
            else:
                # Servers behind one name disagree, or a clock was set. Allow both until the next exchange, so that
                # nobody acts early on either.
                low = min(low, self._low - slack)
                high = max(high, self._high + slack)
                self.resets += 1
        self._low, self._high, self._at = low, high, at

    def earliest(self, local: float) -> float:
        """The earliest that the store's time can be at this local time."""
        self._require_known()
        return local + self._low - self._drift_max * abs(local - self._at)

    def latest(self, local: float) -> float:
        """The latest that the store's time can be at this local time."""
        self._require_known()
        return local + self._high + self._drift_max * abs(local - self._at)

    def estimate(self, local: float) -> float:
        """The middle of what the store's time can be at this local time."""
        self._require_known()
        return local + (self._low + self._high) / 2

    def _require_known(self) -> None:
        if not self.known:
            raise RuntimeError("no reply of the store carried a date yet")
