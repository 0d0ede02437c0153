"""Delays: bounded, growing, and jittered within bounds."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3queue_async.protocol.backoff import Polling, retry_delay_s

attempts = st.integers(1, 40) | st.integers(1, 10**9)
bases_s = st.floats(0, 3600)
maxima_s = st.floats(0, 86_400)
parts = st.floats(0, 1)
chances = st.floats(0, 1, exclude_max=True)


class TestRetryDelay:
    @given(attempts, bases_s, maxima_s, parts, chances)
    def test_bounds(self, attempt: int, base_s: float, max_s: float, jitter: float, chance: float) -> None:
        """At least the exponential delay, at most that and its jitter, and never beyond the maximum."""
        delay_s = retry_delay_s(attempt, base_s=base_s, max_s=max_s, jitter=jitter, chance=chance)
        plain_s = base_s * 2.0 ** min(attempt - 1, 62)
        assert min(plain_s, max_s) <= delay_s <= min(plain_s * (1 + jitter), max_s)
        assert math.isfinite(delay_s)

    @given(st.integers(1, 100), bases_s, maxima_s, parts, chances)
    def test_grows(self, attempt: int, base_s: float, max_s: float, jitter: float, chance: float) -> None:
        """With the same chance a later attempt never waits less, and twice as long while the maximum allows it."""
        now_s, next_s = (
            retry_delay_s(number, base_s=base_s, max_s=max_s, jitter=jitter, chance=chance)
            for number in (attempt, attempt + 1)
        )
        assert next_s >= now_s
        if next_s < max_s and attempt < 60:
            assert next_s == pytest.approx(2 * now_s)

    @pytest.mark.parametrize(("attempt", "delay_s"), [(1, 1), (2, 2), (3, 4), (9, 256), (10, 300), (10**9, 300)])
    def test_defaults(self, attempt: int, delay_s: float) -> None:
        """Base 1 s and maximum 300 s: 1, 2, 4 ... 256, 300 for ever."""
        assert retry_delay_s(attempt, base_s=1, max_s=300, jitter=0, chance=0.5) == delay_s

    def test_jitter_spreads(self) -> None:
        """A tenth of jitter spreads the first delay evenly from 1.0 to 1.1 s."""
        delays = [retry_delay_s(1, base_s=1, max_s=300, jitter=0.1, chance=step / 4) for step in range(4)]
        assert delays == pytest.approx([1.0, 1.025, 1.05, 1.075])


looks = st.lists(st.just("found") | st.just("empty") | st.floats(0, 20), max_size=80)
"""A number is an empty look with that cap."""


class TestPolling:
    @given(st.floats(0.001, 10), st.floats(0.001, 60), looks, chances)
    def test_bounds(self, min_s: float, max_s: float, seen: list[str | float], chance: float) -> None:
        """Whatever is seen, the interval stays between the least and the most, and the wait within a quarter of it."""
        polling = Polling(min_s=min_s, max_s=max_s)
        most_s = max(min_s, max_s)
        for look in seen:
            if look == "found":
                polling.found()
                assert polling.interval_s == min_s
            elif isinstance(look, float):
                polling.empty(cap_s=look)
                assert polling.interval_s <= max(min_s, min(most_s, look))
            else:
                before_s = polling.interval_s
                polling.empty()
                assert polling.interval_s >= before_s
            assert min_s <= polling.interval_s <= most_s
            assert 0.75 * polling.interval_s <= polling.delay_s(chance) <= 1.25 * polling.interval_s

    def test_idle_reaches_the_most(self) -> None:
        """A default poller that finds nothing for a minute looks every 5 s, and not before half a minute."""
        polling = Polling(min_s=0.1, max_s=5)
        idle_s = 0.0
        while polling.interval_s < 5:
            idle_s += polling.interval_s
            polling.empty()
        assert 30 < idle_s < 60

    def test_waits_are_a_share_of_the_idle_time(self) -> None:
        """Between the least and the most, the next wait is 10 to 20 % of the time that it has been idle."""
        polling = Polling(min_s=0.1, max_s=100)
        idle_s = 0.0
        for look in range(45):
            if look >= 10:
                assert 0.1 < polling.interval_s / idle_s < 0.2
            idle_s += polling.interval_s
            polling.empty()

    def test_starts_at_the_least(self) -> None:
        """A new poller looks soon."""
        assert Polling(min_s=0.1, max_s=5).interval_s == 0.1

    def test_a_most_below_the_least(self) -> None:
        """A maximum below the minimum counts as the minimum."""
        polling = Polling(min_s=2, max_s=1)
        polling.empty()
        assert polling.interval_s == 2
