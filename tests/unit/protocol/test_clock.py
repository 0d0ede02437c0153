"""Store time: whatever the exchanges look like, the interval holds the true time."""

import math
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from s3queue_async.protocol.clock import DRIFT_MAX, StoreClock

ROUNDING_S = 1e-6
"""Of floats near the epoch's seconds."""


@dataclass(frozen=True)
class Exchange:
    """When a request was sent, how long its reply took, and at which part of that the store looked at its clock."""

    sent: float
    took_s: float
    part: float = 0.5

    @property
    def received(self) -> float:
        return self.sent + self.took_s

    @property
    def answered(self) -> float:
        return self.sent + self.took_s * self.part


@dataclass(frozen=True)
class Store:
    """A store whose clock runs ``offset_s`` ahead of the local one, and drifts by ``rates`` (of the bound) in turn."""

    offset_s: float
    rates: tuple[float, ...] = (0.0,)
    period_s: float = 20.0
    resolution_s: float = 1.0

    def time(self, local: float) -> float:
        """What the store's clock shows."""
        whole = int(local // self.period_s)
        drift_s = 0.0
        for period in range(whole + 1):
            rate = self.rates[period % len(self.rates)]
            drift_s += DRIFT_MAX * rate * (self.period_s if period < whole else local - whole * self.period_s)
        return local + self.offset_s + drift_s

    def date(self, local: float) -> float:
        """What its reply says, which is coarse."""
        return math.floor(self.time(local) / self.resolution_s) * self.resolution_s

    def answer(self, clock: StoreClock, exchange: Exchange) -> None:
        clock.observe(
            self.date(exchange.answered),
            sent=exchange.sent,
            received=exchange.received,
            resolution_s=self.resolution_s,
        )


def contains(clock: StoreClock, local: float, true: float) -> bool:
    return clock.earliest(local) - ROUNDING_S <= true <= clock.latest(local) + ROUNDING_S


def width(clock: StoreClock, local: float) -> float:
    return clock.latest(local) - clock.earliest(local)


exchanges = st.builds(Exchange, st.floats(0, 600), st.floats(0, 60), st.floats(0, 1))
batches = st.lists(exchanges, min_size=1, max_size=12).map(lambda batch: sorted(batch, key=lambda one: one.received))
"""Any number at the same time; replies are taken in as they arrive."""

stores = st.builds(
    Store,
    offset_s=st.floats(-1000, 1_000_000),
    rates=st.lists(st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-1, 1), min_size=1, max_size=4).map(tuple),
    period_s=st.floats(5, 300),
    resolution_s=st.sampled_from([1.0, 0.001]),
)


class TestContainment:
    @given(stores, batches, st.floats(0, 3600))
    # The store answers at once, the reply crawls, and meanwhile the store's clock gains.
    @example(Store(0.0, (1.0,), resolution_s=0.001), [Exchange(1.0, 60.0, 0.0)], 0.0)
    def test_the_true_time_is_inside(self, store: Store, batch: list[Exchange], later_s: float) -> None:
        """After each exchange and any time later, earliest <= true store time <= latest, at any drift in the bound."""
        clock = StoreClock()
        for exchange in batch:
            store.answer(clock, exchange)
            assert contains(clock, exchange.received, store.time(exchange.received))
        local = batch[-1].received + later_s
        assert contains(clock, local, store.time(local))
        assert clock.earliest(local) <= clock.estimate(local) <= clock.latest(local)

    @given(stores, batches)
    def test_a_drift_within_the_bound_is_no_jump(self, store: Store, batch: list[Exchange]) -> None:
        """One store whose clock only drifts never makes its exchanges contradict each other."""
        clock = StoreClock()
        for exchange in batch:
            store.answer(clock, exchange)
        assert clock.resets == 0

    @given(stores, batches, st.floats(0, 1))
    def test_the_recent_past_is_inside_too(self, store: Store, batch: list[Exchange], part: float) -> None:
        """The interval for a local time before the last reply (a request's start, say) holds the true time as well."""
        clock = StoreClock()
        for exchange in batch:
            store.answer(clock, exchange)
        local = batch[-1].sent + part * batch[-1].took_s
        assert contains(clock, local, store.time(local))

    @given(stores, batches)
    def test_replies_taken_in_out_of_order(self, store: Store, batch: list[Exchange]) -> None:
        """Replies that tasks take in later than they came leave the true time inside."""
        clock = StoreClock()
        for exchange in reversed(batch):
            store.answer(clock, exchange)
        local = max(exchange.received for exchange in batch)
        assert contains(clock, local, store.time(local))


class TestTightness:
    @given(stores, batches)
    def test_never_wider_than_the_last_exchange(self, store: Store, batch: list[Exchange]) -> None:
        """Each exchange bounds the time to its own duration and the date's coarseness, whatever came before."""
        clock = StoreClock()
        for exchange in batch:
            store.answer(clock, exchange)
            bound = (exchange.took_s + store.resolution_s) * (1 + 2 * DRIFT_MAX)
            assert width(clock, exchange.received) <= bound + ROUNDING_S

    def test_exchanges_narrow_each_other(self) -> None:
        """Ten exchanges at different parts of a second bound the time to a tenth of the header's resolution."""
        clock = StoreClock()
        store = Store(1_000_000.37)
        for place in range(11):
            store.answer(clock, Exchange(place * 1.1, 0.01))
        assert width(clock, 11.01) < 0.15

    def test_widens_with_age(self) -> None:
        """An hour without an exchange costs an hour's drift to either side."""
        clock = StoreClock()
        Store(5000.0).answer(clock, Exchange(10.0, 0.1))
        aged = width(clock, 3610.1) - width(clock, 10.1)
        assert aged == pytest.approx(2 * 3600 * DRIFT_MAX, rel=1e-6)


class TestJump:
    @given(
        st.floats(-1000, 1_000_000),
        batches,
        st.floats(130, 100_000) | st.floats(-100_000, -130),
        st.lists(st.tuples(st.floats(0, 30), st.floats(0, 5), st.floats(0, 1)), min_size=2, max_size=6),
    )
    def test_recovers(
        self, offset_s: float, batch: list[Exchange], jump_s: float, after: list[tuple[float, float, float]]
    ) -> None:
        """The store's clock is set: first the old and the new time are allowed, from the second reply only the new."""
        clock = StoreClock()
        old, new = Store(offset_s), Store(offset_s + jump_s)
        for exchange in batch:
            old.answer(clock, exchange)
        local = batch[-1].received
        for place, (pause_s, took_s, part) in enumerate(after):
            exchange = Exchange(local + pause_s, took_s, part)
            local = exchange.received
            new.answer(clock, exchange)
            assert contains(clock, local, new.time(local))
            if place == 0:
                assert contains(clock, local, old.time(local))
            else:
                assert width(clock, local) <= took_s + 1 + ROUNDING_S + 2 * DRIFT_MAX * (pause_s + took_s)
        assert clock.resets == 1

    @given(st.lists(st.tuples(st.floats(0, 5), st.sampled_from([-4.0, 0.0, 4.0])), min_size=1, max_size=20))
    def test_servers_that_disagree(self, answers: list[tuple[float, float]]) -> None:
        """Servers behind one name differ by more than an exchange hides: each reply's own time is inside after it."""
        clock = StoreClock()
        local = 0.0
        for pause_s, ahead_s in answers:
            server = Store(5000.0 + ahead_s)
            exchange = Exchange(local + pause_s, 0.05)
            local = exchange.received
            server.answer(clock, exchange)
            assert contains(clock, local, server.time(local))
            assert width(clock, local) < 8 + 2 * 1.1

    @given(st.lists(st.tuples(st.floats(0, 5), st.floats(-10, 10)), min_size=1, max_size=20))
    def test_any_disagreement_errs_by_no_more_than_an_exchange(self, answers: list[tuple[float, float]]) -> None:
        """A difference too small to be noticed misleads by less than one exchange's duration and coarseness."""
        clock = StoreClock()
        local = 0.0
        for pause_s, ahead_s in answers:
            server = Store(5000.0 + ahead_s)
            exchange = Exchange(local + pause_s, 0.05)
            local = exchange.received
            server.answer(clock, exchange)
            true = server.time(local)
            assert clock.earliest(local) - 1.06 <= true <= clock.latest(local) + 1.06


class TestUnknown:
    def test_no_exchange_yet(self) -> None:
        """Without any dated reply there is no store time; nobody gets a made-up one."""
        clock = StoreClock()
        assert not clock.known
        for ask in (clock.earliest, clock.latest, clock.estimate):
            with pytest.raises(RuntimeError, match="no reply"):
                ask(1.0)

    def test_one_exchange_is_enough(self) -> None:
        """The first dated reply makes store time known, to the exchange's duration and the date's coarseness."""
        clock = StoreClock()
        clock.observe(1000.0, sent=5.0, received=5.5, resolution_s=1.0)
        assert clock.known
        assert (clock.earliest(5.5), clock.latest(5.5)) == pytest.approx((1000.0, 1001.5), abs=1e-3)
