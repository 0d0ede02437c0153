"""Adds up what happens in this process: the figures of ``queue.metrics()`` and of the ``metrics`` event.

It listens to events of messages only while somebody wants figures, so that they cost nothing otherwise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import anyio
import msgspec

from s3queue_async.clock import Clock
from s3queue_async.engine.coordination import Coordination
from s3queue_async.engine.reading import Backlog
from s3queue_async.engine.session import Session
from s3queue_async.engine.shared import Shared
from s3queue_async.errors import StoreUnavailable, Throttled
from s3queue_async.events import (
    EventBus,
    Latency,
    MessageCompleted,
    MessageDead,
    MessageEnqueued,
    MessageRetry,
    MetricsSnapshot,
)
from s3queue_async.log import log
from s3queue_async.storage.metered import OPERATIONS, MeteredStorage, StorageMetrics
from s3queue_async.storage.throttle import ThrottledStorage

DOLLARS_PER_MILLION: Mapping[str, float] = MappingProxyType(
    {"put": 5.0, "list": 5.0, "get": 0.4, "delete": 0.0, "delete_many": 0.0}
)
"""List prices of requests, S3 Standard in us-east-1, by operation; from https://aws.amazon.com/s3/pricing/."""

OCTAVE_MIN = -20
OCTAVES = 50
OCTAVE_PARTS = 16


class Histogram:
    """Counts durations in buckets, 16 for each doubling from 1 µs to 17 years; its memory never grows."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (OCTAVES * OCTAVE_PARTS)
        self.total = 0.0

    def add(self, seconds: float) -> None:
        """Count a duration."""
        fraction, exponent = math.frexp(seconds)
        bucket = (exponent - 1 - OCTAVE_MIN) * OCTAVE_PARTS + int((2 * fraction - 1) * OCTAVE_PARTS)
        if bucket < 0 or seconds <= 0:
            bucket = 0
        elif bucket >= len(self.counts):
            bucket = len(self.counts) - 1
        self.counts[bucket] += 1
        self.total += seconds

    def latency(self, before: list[int]) -> Latency:
        """What was counted, with the quantiles of what came after ``counts`` was as in ``before``."""
        news = [now - then for now, then in zip(self.counts, before, strict=True)]
        count = sum(self.counts)
        return Latency(
            count=count,
            total=self.total,
            p50=_quantile(news, 0.50),
            p95=_quantile(news, 0.95),
            p99=_quantile(news, 0.99),
        )


def _quantile(counts: list[int], part: float) -> float | None:
    rank = math.ceil(part * sum(counts))
    if rank == 0:
        return None
    bucket = -1
    while rank > 0:
        bucket += 1
        rank -= counts[bucket]
    octave, place = divmod(bucket, OCTAVE_PARTS)
    return math.ldexp(1 + (place + 0.5) / OCTAVE_PARTS, octave + OCTAVE_MIN)


@dataclass(frozen=True, slots=True)
class _Mark:
    """The state at the beginning of an interval."""

    at: float
    enqueued: int
    processed: int
    requests: Mapping[str, int]
    handler: list[int]
    end_to_end: list[int]


class Meter:
    """Knows the figures of one queue object, and emits them as long as somebody listens for them.

    Args:
        shared: What all roles have.
        metered: Counts the requests.
        throttled: Slows down when the store asks for it.
        session: The session of this process; None without one.
        count_backlog: Asks the store what is not settled.
        backlog: Whether to count the backlog; None: where this process coordinates, or its worker sees no coordinator.
    """

    def __init__(
        self,
        shared: Shared,
        metered: MeteredStorage,
        throttled: ThrottledStorage,
        session: Callable[[], Session | None],
        count_backlog: Callable[[], Awaitable[Backlog]],
        *,
        backlog: bool | None,
    ) -> None:
        self._shared = shared
        self._metered = metered
        self._throttled = throttled
        self._session = session
        self._count_backlog = count_backlog
        self._counts_backlog = backlog
        self._clock: Clock = shared.clock
        self._bus: EventBus = shared.bus
        self._listening: list[Callable[[], None]] = []
        self._looked_at = False
        self._emitting = False
        self._marks: deque[_Mark] = deque(maxlen=2)
        self._enqueued = self._processed = self._retried = self._dead = 0
        self._handler, self._end_to_end = Histogram(), Histogram()
        self._backlog: Backlog | None = None
        self._priorities = {0}

    def look(self) -> MetricsSnapshot:
        """The figures now; the rates are about the last whole interval and what has passed since."""
        if not self._bus.wants(MetricsSnapshot.name):
            # Nobody else keeps the counting going until the next look.
            self._looked_at = True
        self._begin()
        now = self._clock.monotonic()
        snapshot = self._since(self._marks[0], now)
        if not self._emitting and now - self._marks[-1].at >= self._shared.settings.metrics_interval:
            self._marks.append(self._mark(now))
        return snapshot

    async def run(self) -> None:
        """Emit the figures whenever an interval is over and somebody listens, until cancelled."""
        while True:
            while not self._bus.wants(MetricsSnapshot.name):
                if not self._looked_at:
                    self._end()
                await self._bus.changed.wait()
            self._begin()
            self._emitting = True
            try:
                while self._bus.wants(MetricsSnapshot.name):
                    await self._interval()
            finally:
                self._emitting = False
                self._backlog = None

    async def _interval(self) -> None:
        await self._clock.sleep(self._shared.settings.metrics_interval)
        if not self._bus.wants(MetricsSnapshot.name):
            return
        self._backlog = await self._counted()
        now = self._clock.monotonic()
        snapshot = self._since(self._marks[-1], now)
        self._marks.append(self._mark(now))
        self._bus.emit(snapshot)

    # -- listening -----------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        if self._listening:
            return
        self._listening = [
            self._bus.on(MessageEnqueued.name, self._on_enqueued),
            self._bus.on(MessageCompleted.name, self._on_completed),
            self._bus.on(MessageRetry.name, self._on_retry),
            self._bus.on(MessageDead.name, self._on_dead),
        ]
        self._marks.clear()
        self._marks.append(self._mark(self._clock.monotonic()))

    def _end(self) -> None:
        for off in self._listening:
            off()
        self._listening = []

    def _on_enqueued(self, event: MessageEnqueued) -> None:
        self._enqueued += 1

    def _on_completed(self, event: MessageCompleted) -> None:
        self._processed += 1
        self._handler.add(event.duration)
        self._end_to_end.add(event.latency)

    def _on_retry(self, event: MessageRetry) -> None:
        self._retried += 1

    def _on_dead(self, event: MessageDead) -> None:
        self._dead += 1

    # -- adding up -----------------------------------------------------------------------------------------------

    def _mark(self, now: float) -> _Mark:
        return _Mark(
            now,
            self._enqueued,
            self._processed,
            _attempts(self._metered.snapshot()),
            self._handler.counts.copy(),
            self._end_to_end.counts.copy(),
        )

    def _since(self, mark: _Mark, now: float) -> MetricsSnapshot:
        interval_s = now - mark.at
        store = self._metered.snapshot()
        requests = _attempts(store)
        news: dict[str, int] = {operation: requests[operation] - mark.requests[operation] for operation in OPERATIONS}
        processed = self._processed - mark.processed
        session = self._session()
        known = Coordination() if session is None else session.coordination
        return MetricsSnapshot(
            worker_id=None if session is None else session.worker_id,
            interval=interval_s,
            active_workers=known.active_workers,
            is_coordinator=known.is_coordinator,
            term=known.term,
            tickets_available=known.tickets_available,
            tickets_claimed=known.tickets_claimed,
            tickets_stalled=known.tickets_stalled,
            claims_direct=known.claims_direct,
            claims_wasted=known.claims_wasted,
            poll_interval=known.poll_interval_s,
            enqueued=self._enqueued,
            processed=self._processed,
            retried=self._retried,
            dead=self._dead,
            processing_rate=_rate(processed, interval_s),
            handler_latency=self._handler.latency(mark.handler),
            end_to_end_latency=self._end_to_end.latency(mark.end_to_end),
            s3_requests=requests,
            s3_ops_per_second={operation: _rate(count, interval_s) for operation, count in news.items()},
            throttling_errors=store.throttled,
            throttled_waits=self._throttled.waits,
            throttled_wait_seconds=self._throttled.waited_s,
            segment_bytes_before=self._shared.packer.bytes_before,
            segment_bytes_stored=self._shared.packer.bytes_stored,
            packing_seconds=self._shared.packer.seconds,
            backlog=None if self._backlog is None else self._backlog.waiting,
            delayed=None if self._backlog is None else self._backlog.delayed,
            held=None if self._backlog is None else self._backlog.held,
            cost_dollars=dollars(requests),
            cost_per_million=_per_million(dollars(news), max(processed, self._enqueued - mark.enqueued)),
        )

    # -- the backlog ---------------------------------------------------------------------------------------------

    @property
    def _wants_backlog(self) -> bool:
        if self._counts_backlog is not None:
            return self._counts_backlog
        session = self._session()
        if session is None or session.is_over:
            return False
        known = session.coordination
        return known.is_coordinator or not known.board_live

    async def _counted(self) -> Backlog | None:
        """The backlog, where this process is to count it and the store answers."""
        if not self._wants_backlog:
            return None
        # A store that does not answer must not hold up the other figures for long.
        with anyio.move_on_after(self._shared.settings.metrics_interval):
            try:
                counted = await self._count_backlog()
            except (StoreUnavailable, Throttled) as error:
                log.warning("the backlog could not be counted", error=str(error))
                return None
            # A priority of which nothing is left is told as 0: a gauge that is not told any more keeps its last value.
            self._priorities |= counted.waiting.keys()
            waiting = {priority: counted.waiting.get(priority, 0) for priority in sorted(self._priorities)}
            return msgspec.structs.replace(counted, waiting=waiting)
        log.warning("the backlog could not be counted", error="the store took longer than metrics_interval")
        return None


def dollars(requests: Mapping[str, int]) -> float:
    """What requests cost at S3's list prices.

    Args:
        requests: How many, by operation.
    """
    return sum(count * DOLLARS_PER_MILLION[operation] for operation, count in requests.items()) / 1e6


def _attempts(store: StorageMetrics) -> dict[str, int]:
    return {operation: getattr(store, operation).attempts for operation in OPERATIONS}


def _rate(count: int, interval_s: float) -> float:
    return count / interval_s if interval_s > 0 else 0.0


def _per_million(cost: float, messages: int) -> float | None:
    return cost / messages * 1e6 if messages else None
