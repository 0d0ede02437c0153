"""Figures: what the metrics event and queue.metrics() say, who counts the backlog, and that nobody pays for nothing."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import anyio
import pytest
import structlog
from hypothesis import example, given
from hypothesis import strategies as st

from s3queue_async import Context, DeadLetter, MetricsSnapshot, S3Queue, Settings, log_metrics
from s3queue_async.events import MessageCompleted, MessageDead, MessageEnqueued, MessageRetry
from s3queue_async.figures import FIGURES, fields
from s3queue_async.metrics import DOLLARS_PER_MILLION, Histogram, dollars
from tests.unit.queue.bed import QUIET, Bed, Recorder, Seen, virtual

COUNTED = (MessageEnqueued.name, MessageCompleted.name, MessageRetry.name, MessageDead.name)
COORDINATED = Settings(metrics_interval=10)


async def nothing(payload: object) -> None: ...


def listings(store: Recorder, prefix: str) -> int:
    return sum(call.operation == "list" and call.keys[0] == prefix for call in store.calls)


@virtual
async def test_an_interval_in_figures() -> None:
    """Ten seconds with twenty messages: the counts, the rate and the latencies are theirs, and the requests are counted."""
    bed = Bed()
    seen, done = Seen(), Seen()

    async def handler(payload: int, context: Context) -> None:
        await anyio.sleep(0.1 if payload < 10 else 2)
        if payload == 0 and context.attempt == 1:
            raise OSError
        if payload == 1:
            raise DeadLetter("no")

    async with bed.queue(on_message=handler, concurrency=20, on_complete=done) as queue:
        queue.on("metrics", seen)
        await queue.enqueue_many(range(20))
        await done.count(19)
        (snapshot,) = await seen.count(1)
        requests = queue.requests()
    assert (snapshot.enqueued, snapshot.processed, snapshot.retried, snapshot.dead) == (20, 19, 1, 1)
    assert 10 <= snapshot.interval < 10.1
    assert snapshot.processing_rate == pytest.approx(1.9, rel=0.02)
    assert snapshot.handler_latency.count == 19
    assert snapshot.handler_latency.total == pytest.approx(9 * 0.1 + 10 * 2, rel=0.01)
    assert snapshot.handler_latency.p50 == pytest.approx(2, rel=0.04)
    assert snapshot.end_to_end_latency.p99 == pytest.approx(2, rel=0.1)
    assert snapshot.s3_requests == {
        operation: getattr(requests, operation).attempts for operation in DOLLARS_PER_MILLION
    }
    assert snapshot.s3_requests["put"] > 2
    assert snapshot.cost_dollars == dollars(snapshot.s3_requests)
    assert snapshot.cost_per_million is not None
    assert 0 < snapshot.cost_per_million <= snapshot.cost_dollars / 20 * 1e6
    assert snapshot.worker_id is not None
    assert snapshot.poll_interval > 0


@virtual
async def test_every_interval() -> None:
    """The event comes every metrics_interval, and the rates and quantiles are those of the last one alone."""
    bed = Bed()
    seen = Seen()
    settings = Settings(coordinator=False, metrics_interval=60)
    async with bed.queue(settings=settings, on_message=nothing) as queue:
        queue.on("metrics", seen)
        began = anyio.current_time()
        await queue.enqueue_many(range(6))
        await seen.count(1)
        await queue.enqueue_many(range(12))
        await seen.count(3)
        assert anyio.current_time() - began == pytest.approx(180, abs=0.1)
    assert [snapshot.processed for snapshot in seen.items] == [6, 18, 18]
    assert [snapshot.processing_rate for snapshot in seen.items] == [pytest.approx(r, rel=0.01) for r in (0.1, 0.2, 0)]
    assert [snapshot.handler_latency.p50 is None for snapshot in seen.items] == [False, False, True]
    assert [snapshot.cost_per_million is None for snapshot in seen.items] == [False, False, True]


@virtual
async def test_it_costs_nothing_when_nobody_listens() -> None:
    """Without a listener no message makes an event; with one it does, until the listener is gone."""
    bed = Bed()
    seen = Seen()
    async with bed.queue(on_message=nothing) as queue:
        await anyio.sleep(60)
        assert not any(queue._bus.wants(name) for name in COUNTED)
        off = queue.on("metrics", seen)
        await seen.count(2)
        assert all(queue._bus.wants(name) for name in COUNTED)
        off()
        await anyio.sleep(20)
        assert not any(queue._bus.wants(name) for name in COUNTED)
        assert len(seen.items) == 2
        queue.on("metrics", seen)
        await seen.count(3)
    assert seen.items[2].interval == pytest.approx(10, abs=0.1)


@virtual
async def test_a_direct_look() -> None:
    """metrics() counts from its first call on, with rates over the last interval and a bit, and makes no request."""
    bed = Bed()
    done = Seen()
    async with bed.queue(on_message=nothing, on_complete=done) as queue:
        await queue.enqueue(0)
        await done.count(1)
        first = queue.metrics()
        assert (first.enqueued, first.processed, first.processing_rate) == (0, 0, 0.0)
        await queue.enqueue_many(range(30))
        await done.count(31)
        await anyio.sleep(5)
        second = queue.metrics()
        assert (second.enqueued, second.processed) == (30, 30)
        assert second.interval == pytest.approx(5, abs=0.5)
        for _ in range(10):
            await anyio.sleep(5)
            calls = len(bed.store.calls)
            last = queue.metrics()
            assert len(bed.store.calls) == calls
        assert 10 <= last.interval <= 20
        assert (last.processed, last.processing_rate) == (30, 0.0)


@virtual
async def test_before_and_after_the_queue_is_open() -> None:
    """A look is possible at any time: a queue that is not open has no worker and did nothing."""
    bed = Bed()
    queue = bed.queue()
    assert queue.metrics().worker_id is None
    async with queue:
        await queue.enqueue(1)
    assert queue.metrics().enqueued == 1


@virtual
async def test_acknowledged_messages_count() -> None:
    """A message that is received and acknowledged is completed like any other; one that is released is not."""
    bed = Bed()
    done = Seen()
    async with bed.queue(on_complete=done) as queue:
        queue.metrics()
        message_id = await queue.enqueue("a")
        (message,) = await queue.receive()
        await anyio.sleep(3)
        await message.ack()
        await queue.enqueue("b")
        (message,) = await queue.receive()
        await message.release()
        assert queue.metrics().processed == 1
        (event,) = done.items
    assert (event.message_id, event.attempt, event.result) == (message_id, 1, None)
    assert event.duration == pytest.approx(3, abs=0.1)
    assert event.latency == pytest.approx(3, abs=0.2)


@virtual
async def test_latency_is_from_the_enqueue() -> None:
    """A message that waited an hour for a worker has an hour of latency, and a handler that took no time."""
    bed = Bed()
    done = Seen()
    async with bed.queue() as producer:
        await producer.enqueue(1)
    await anyio.sleep(3600)
    async with bed.queue(on_message=nothing, on_complete=done):
        (event,) = await done.count(1)
    assert event.latency == pytest.approx(3600, abs=1)
    assert event.duration < 0.1


@virtual
async def test_the_coordinator_alone_counts_the_backlog() -> None:
    """Of a producer and three workers that all listen, the coordinator says what waits; the others ask nothing for it."""
    bed = Bed()
    seen = [Seen() for _ in range(4)]
    started, release = Seen(), anyio.Event()

    async def slow(payload: object) -> None:
        started(payload)
        await release.wait()

    lanes = [bed.lane()[0] for _ in range(4)]
    async with (
        bed.queue(settings=COORDINATED, storage=lanes[0], on_message=slow, concurrency=1) as first,
        bed.queue(settings=COORDINATED, storage=lanes[1], on_message=slow, concurrency=1) as second,
        bed.queue(settings=COORDINATED, storage=lanes[2], on_message=slow, concurrency=1) as third,
        bed.queue(settings=COORDINATED, storage=lanes[3]) as producer,
    ):
        queues = [first, second, third, producer]
        await anyio.sleep(30)
        for queue, collect in zip(queues, seen, strict=True):
            queue.on("metrics", collect)
        for number in range(3):
            await producer.enqueue(number, priority=100)
        await started.count(3)
        await producer.enqueue_many(range(5))
        await producer.enqueue_many(range(7), priority=9)
        await producer.enqueue_many(range(3), priority=200, delay=3600)
        await anyio.sleep(35)
        told = [collect.items[-1] for collect in seen]
        assert sum(snapshot.is_coordinator for snapshot in told) == 1
        assert [snapshot.backlog is not None for snapshot in told] == [snapshot.is_coordinator for snapshot in told]
        (coordinator,) = [snapshot for snapshot in told if snapshot.is_coordinator]
        assert (coordinator.backlog, coordinator.delayed, coordinator.held) == ({0: 5, 9: 7}, 3, 3)
        assert (coordinator.active_workers, coordinator.term > 0) == (3, True)
        assert listings(lanes[3], "ready/") == 0
        release.set()


@virtual
async def test_the_backlog_without_a_coordinator() -> None:
    """Where no coordinator is live each worker counts; a process without a worker does only when told to, or never."""
    bed = Bed()
    await bed.open()
    seen: dict[str, Seen] = {name: Seen() for name in ("worker", "producer", "exporter", "never")}
    async with (
        bed.queue(on_message=nothing) as worker,
        bed.queue() as producer,
        bed.queue(count_backlog=True) as exporter,
        bed.queue(count_backlog=False, on_message=nothing) as never,
    ):
        for queue, collect in zip((worker, producer, exporter, never), seen.values(), strict=True):
            queue.on("metrics", collect)
        await producer.enqueue(1, delay=3600, priority=5)
        for collect in seen.values():
            await collect.count(1)
    none = {0: 0}
    told = {name: (collect.items[0].backlog, collect.items[0].delayed) for name, collect in seen.items()}
    assert told == {"worker": (none, 1), "producer": (None, None), "exporter": (none, 1), "never": (None, None)}
    async with bed.queue(count_backlog=True) as exporter:
        assert exporter.metrics().backlog is None, "a direct look asks nothing"


@virtual
async def test_the_backlog_is_listed_once_an_interval() -> None:
    """An exporter makes three listings an interval, whatever else looks at the figures."""
    bed = Bed()
    seen = Seen()
    store, _ = bed.lane()
    async with bed.queue(storage=store, count_backlog=True) as exporter:
        exporter.on("metrics", seen)
        exporter.on("metrics", log_metrics)
        store.calls.clear()
        for _ in range(95):
            exporter.metrics()
            await anyio.sleep(1)
        assert len(seen.items) == 9
        assert Counter(call.operation for call in store.calls) == {"list": 27}


@virtual
async def test_a_long_backlog_ends_somewhere() -> None:
    """More than 10,000 segments of a kind are not counted to the end."""
    bed = Bed()
    seen = Seen()
    settings = Settings(coordinator=False, segment_messages_max=1)
    store, _ = bed.lane()
    async with bed.queue(settings=settings, storage=store, count_backlog=True) as queue:
        await queue.enqueue_many(range(10_500))
        queue.on("metrics", seen)
        (snapshot,) = await seen.count(1)
        assert snapshot.backlog == {0: 10_000}
        await queue.purge()


@virtual
async def test_what_is_held_counts_until_it_is_settled() -> None:
    """Messages that are being handled are told apart, so that nobody scales their worker away; then they are gone."""
    bed = Bed()
    seen, release = Seen(), anyio.Event()

    async def handler(payload: object) -> None:
        await release.wait()

    async with bed.queue(on_message=handler) as queue:
        queue.on("metrics", seen)
        await queue.enqueue_many(range(2))
        await seen.count(1)
        release.set()
        await seen.count(2)
    assert [(snapshot.backlog, snapshot.held) for snapshot in seen.items] == [({0: 0}, 2), ({0: 0}, 0)]


@virtual
async def test_foreign_objects_are_not_counted() -> None:
    """An object of somebody else's under the queue's prefixes changes nothing."""
    bed = Bed()
    seen = Seen()
    async with bed.queue(count_backlog=True) as queue:
        await bed.memory.put("ready/readme.txt", b"hello")
        await queue.enqueue(1)
        queue.on("metrics", seen)
        (snapshot,) = await seen.count(1)
    assert (snapshot.backlog, snapshot.delayed, snapshot.held) == ({0: 1}, 0, 0)


@virtual
async def test_figures_come_while_the_store_is_away() -> None:
    """A store that does not answer takes the backlog from the figures, and nothing else."""
    bed = Bed()
    seen = Seen()
    store, faults = bed.lane()
    async with bed.queue(storage=store, count_backlog=True) as queue:
        queue.on("metrics", seen)
        await seen.count(1)
        faults.unavailable("list", times=None)
        await seen.count(2)
        faults.clear()
        await seen.count(3)
    assert [snapshot.backlog for snapshot in seen.items] == [{0: 0}, None, {0: 0}]


@virtual
async def test_figures_come_while_the_store_is_slow() -> None:
    """A listing that takes longer than an interval is given up, and the event comes at twice the interval at most."""
    bed = Bed()
    seen = Seen()
    store, faults = bed.lane()
    async with bed.queue(storage=store, count_backlog=True) as queue:
        queue.on("metrics", seen)
        faults.hold("list", times=None)
        began = anyio.current_time()
        await seen.count(2)
        assert anyio.current_time() - began == pytest.approx(40, abs=0.1)
    assert [snapshot.backlog for snapshot in seen.items] == [None, None]


@virtual
async def test_throttling_is_counted() -> None:
    """Refusals for being too many, and the requests that waited because of them."""
    bed = Bed()
    store, faults = bed.lane()
    async with bed.queue(storage=store) as queue:
        before = queue.metrics()
        faults.throttle("list", retry_after_s=2.0)
        await queue.stats()
        after = queue.metrics()
    assert (before.throttling_errors, before.throttled_waits, before.throttled_wait_seconds) == (0, 0, 0.0)
    assert after.throttling_errors == 1
    assert after.throttled_waits >= 1
    assert after.throttled_wait_seconds >= 2


@virtual
async def test_the_log_line() -> None:
    """log_metrics writes one line an interval, flat, without what is not known."""
    bed = Bed()
    seen = Seen()
    try:
        with structlog.testing.capture_logs() as lines:
            async with bed.queue(on_message=nothing) as queue:
                queue.on("metrics", log_metrics)
                queue.on("metrics", seen)
                await queue.enqueue_many(range(3), priority=7)
                await seen.count(2)
    finally:
        structlog.reset_defaults()
    first, second = [line for line in lines if line["event"] == "metrics"]
    assert first["processed"] == 3
    assert first["handler_p99"] < 0.1
    assert first["s3_requests_put"] > 0
    assert first["delayed"] == 0
    assert "handler_p99" not in second
    assert not any(value is None or isinstance(value, dict) for value in first.values())


def test_a_snapshot_does_not_change() -> None:
    """Everybody gets the same object, so nobody may change it."""
    with pytest.raises(AttributeError):
        MetricsSnapshot().processed = 1  # type: ignore[misc]  # that is the point


def test_every_figure_has_a_name() -> None:
    """The table of the adapters has each field but the two that describe the snapshot itself, once."""
    assert fields() == set(MetricsSnapshot.__struct_fields__) - {"worker_id", "interval"}
    assert max(Counter(figure.name for figure in FIGURES).values()) == 1


def test_list_prices() -> None:
    """1,000 PUT and 1,000 LIST are half a cent each, 1,000 GET are 0.04 cents, and deleting is free."""
    assert dollars({"put": 1000}) == pytest.approx(0.005)
    assert dollars({"list": 1000}) == pytest.approx(0.005)
    assert dollars({"get": 1000}) == pytest.approx(0.0004)
    assert dollars({"delete": 10**9, "delete_many": 10**9}) == 0


@given(st.lists(st.floats(1e-6, 5e8), min_size=1, max_size=200), st.lists(st.floats(0, 1e12), max_size=20))
@example([1e-6], [])
@example([1.0, 2.0, 4.0], [])
def test_quantiles(durations: list[float], before: list[float]) -> None:
    """Quantiles of what came since a mark are within 3.2 % of the exact ones, for a microsecond and for 15 years."""
    histogram = Histogram()
    for duration in before:
        histogram.add(duration)
    mark = histogram.counts.copy()
    for duration in durations:
        histogram.add(duration)
    latency = histogram.latency(mark)
    ordered = sorted(durations)
    assert latency.count == len(before) + len(durations)
    for part, told in ((0.5, latency.p50), (0.95, latency.p95), (0.99, latency.p99)):
        assert told == pytest.approx(ordered[math.ceil(part * len(ordered)) - 1], rel=0.032)
    assert len(histogram.counts) == 800


@pytest.mark.parametrize("odd", [0.0, -1.0, 1e-12, 1e300, 5e-324])
def test_odd_durations_are_counted(odd: float) -> None:
    """What is shorter or longer than any bucket goes into the first or the last one."""
    histogram = Histogram()
    histogram.add(odd)
    assert sum(histogram.counts) == 1


def test_it_may_be_asked_for_before_the_loop_runs() -> None:
    """Applications make their queue and attach what listens when they are imported."""
    queue: S3Queue[Any] = S3Queue("memory://", settings=QUIET)
    queue.on("metrics", log_metrics)
    assert queue.metrics().s3_requests == dict.fromkeys(DOLLARS_PER_MILLION, 0)
