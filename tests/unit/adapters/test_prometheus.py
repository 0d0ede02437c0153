"""Prometheus: every figure is there under its name, for one queue or several, and the text is what Prometheus reads."""

from __future__ import annotations

from collections.abc import Iterator

import anyio
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from s3queue_async import S3Queue
from s3queue_async.figures import FIGURES, LATENCIES
from s3queue_async.prometheus import PrometheusMetrics
from tests.unit.queue.bed import QUIET, Bed, Seen, virtual


async def nothing(payload: object) -> None: ...


def samples(registry: CollectorRegistry) -> dict[str, float]:
    """What Prometheus would read: each sample by its name and its labels other than ``queue="jobs"``."""
    text = generate_latest(registry).decode()
    return dict(_read(text))


def _read(text: str) -> Iterator[tuple[str, float]]:
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if (k, v) != ("queue", "jobs"))
            yield f"{sample.name}{{{labels}}}" if labels else sample.name, sample.value


@virtual
async def test_what_a_scrape_gets() -> None:
    """After an interval a scrape has the figures of its event, under the names of the table."""
    bed = Bed()
    seen = Seen()
    registry = CollectorRegistry()
    async with bed.queue(on_message=nothing) as queue:
        PrometheusMetrics(queue, name="jobs", registry=registry)
        queue.on("metrics", seen)
        await queue.enqueue_many(range(8))
        await queue.enqueue_many(range(4), priority=3, delay=3600)
        (snapshot,) = await seen.count(1)
        read = samples(registry)
    assert read["s3queue_messages_processed_total"] == 8
    assert read["s3queue_messages_enqueued_total"] == 12
    assert read["s3queue_delayed_messages"] == 4
    assert read["s3queue_held_messages"] == 0
    assert read["s3queue_is_coordinator"] == 0
    assert read["s3queue_s3_requests_total{operation=put}"] == snapshot.s3_requests["put"]
    assert read["s3queue_cost_dollars_total"] == pytest.approx(snapshot.cost_dollars)
    assert read["s3queue_handler_seconds_count"] == 8
    assert read["s3queue_handler_seconds_sum"] == pytest.approx(snapshot.handler_latency.total)
    assert read["s3queue_end_to_end_seconds{quantile=0.95}"] == snapshot.end_to_end_latency.p95
    names = {name.partition("{")[0].removesuffix("_total") for name in read}
    for figure in FIGURES:
        assert f"s3queue_{figure.name}" in names
    for name, _ in LATENCIES.values():
        assert f"s3queue_{name}" in names


@virtual
async def test_the_backlog_by_priority() -> None:
    """Each priority has its sample; the lowest has one even when nothing waits, and one that was seen falls to zero."""
    bed = Bed()
    seen = Seen()
    registry = CollectorRegistry()
    async with bed.queue(count_backlog=True) as queue:
        PrometheusMetrics(queue, name="jobs", registry=registry)
        queue.on("metrics", seen)
        assert not any(name.startswith("s3queue_backlog_messages") for name in samples(registry))
        await queue.enqueue_many(range(5), priority=9)
        await seen.count(1)
        read = samples(registry)
        assert read["s3queue_backlog_messages{priority=9}"] == 5
        assert read["s3queue_backlog_messages{priority=0}"] == 0
        await queue.purge()
        await seen.count(2)
        read = samples(registry)
        assert read["s3queue_backlog_messages{priority=9}"] == 0


@virtual
async def test_a_scrape_asks_nothing_of_the_store() -> None:
    """However often it is scraped, the store hears nothing of it."""
    bed = Bed()
    registry = CollectorRegistry()
    async with bed.queue() as queue:
        PrometheusMetrics(queue, registry=registry)
        bed.store.calls.clear()
        for _ in range(50):
            generate_latest(registry)
            await anyio.sleep(1)
        assert bed.store.calls == []


@virtual
async def test_several_queues() -> None:
    """Two queues share a registry by add(), told apart by their label; a third of the same name is refused."""
    one, two = Bed(), Bed()
    registry = CollectorRegistry()
    async with one.queue() as emails, two.queue(on_message=nothing) as thumbnails:
        both = PrometheusMetrics(emails, name="emails", registry=registry)
        both.add(thumbnails, name="thumbnails")
        with pytest.raises(ValueError, match="thumbnails"):
            both.add(emails, name="thumbnails")
        with pytest.raises(ValueError, match="Duplicated"):
            PrometheusMetrics(emails, registry=registry)
        await emails.enqueue(1)
        await anyio.sleep(11)
        read = samples(registry)
    assert read["s3queue_messages_enqueued_total{queue=emails}"] == 1
    assert read["s3queue_messages_enqueued_total{queue=thumbnails}"] == 0


@virtual
async def test_closing_it() -> None:
    """After close() nobody listens and the registry is empty; another one may take its place."""
    bed = Bed()
    registry = CollectorRegistry()
    async with bed.queue() as queue:
        metrics = PrometheusMetrics(queue, registry=registry)
        assert queue._bus.wants("metrics")
        metrics.close()
        assert not queue._bus.wants("metrics")
        assert samples(registry) == {}
        await anyio.sleep(11)
        assert not queue._bus.wants("message.completed")
        PrometheusMetrics(queue, registry=registry).close()


@virtual
async def test_the_label_of_a_queue() -> None:
    """Without a name the label is the url as far as it says where the queue lives."""
    registry = CollectorRegistry()
    queue = S3Queue[object]("s3://bucket/prod/jobs?endpoint_url=http://localhost:1", settings=QUIET)
    PrometheusMetrics(queue, registry=registry)
    assert "s3queue_term{queue=s3://bucket/prod/jobs}" in samples(registry)
