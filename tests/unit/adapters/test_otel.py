"""OpenTelemetry: a message carries its producer's trace, the handler's span links to it, and a reader gets the figures."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.baggage.propagation import W3CBaggagePropagator
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import HistogramDataPoint, InMemoryMetricReader, NumberDataPoint
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from s3queue_async import Context, DeadLetter, Release, Retry, S3Queue
from s3queue_async.figures import FIGURES
from s3queue_async.otel import OpenTelemetryMetrics, OpenTelemetryTracing
from tests.unit.queue.bed import QUIET, Bed, Seen, virtual


class Spans:
    """A tracer provider that keeps what it was told."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider()
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = self.provider.get_tracer("test")
        self.tracing = OpenTelemetryTracing("jobs", tracer_provider=self.provider)

    def handling(self) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.kind is SpanKind.CONSUMER]


@pytest.fixture
def spans() -> Iterator[Spans]:
    made = Spans()
    yield made
    made.provider.shutdown()


def trace_id(span: Any) -> int:
    return int(span.get_span_context().trace_id)


def test_a_link_to_the_producer(spans: Spans) -> None:
    """The handler's span is the root of a trace of its own and links to the span in which the message was enqueued."""

    @virtual
    async def run() -> None:
        bed = Bed()
        done = Seen()

        async def handler(payload: int, context: Context) -> None:
            current = trace.get_current_span().get_span_context()
            done((current, dict(context.headers)))

        async with bed.queue(tracing=spans.tracing, on_message=handler) as queue:
            with spans.tracer.start_as_current_span("request") as request:
                message_id = await queue.enqueue(1, headers={"tenant": "a"}, priority=7)
            ((current, headers),) = await done.count(1)
            worker_id = queue.worker_id
        assert headers["tenant"] == "a"
        assert headers["traceparent"].split("-")[1] == f"{trace_id(request):032x}"
        (span,) = spans.handling()
        assert span.name == "process jobs"
        assert span.parent is None
        assert span.get_span_context() == current, "the handler runs in it"
        (link,) = span.links
        sent = request.get_span_context()
        assert (link.context.trace_id, link.context.span_id, link.context.is_remote) == (
            sent.trace_id,
            sent.span_id,
            True,
        )
        assert trace_id(span) != trace_id(request)
        assert span.attributes is not None
        assert span.attributes["messaging.message.id"] == message_id
        assert span.attributes["s3queue.attempt"] == 1
        assert span.attributes["s3queue.priority"] == 7
        assert span.attributes["s3queue.worker_id"] == worker_id
        assert span.status.status_code is StatusCode.UNSET

    run()


def test_many_messages_of_one_call(spans: Spans) -> None:
    """enqueue_many puts the trace into each of its messages; without a current span nothing is added."""

    @virtual
    async def run() -> None:
        bed = Bed()
        done = Seen()

        async def handler(payload: int, context: Context) -> None:
            done(context.headers.get("traceparent"))

        async with bed.queue(tracing=spans.tracing, on_message=handler) as queue:
            with spans.tracer.start_as_current_span("batch"):
                await queue.enqueue_many(range(3))
            await queue.enqueue(4)
            headers = await done.count(4)
        assert headers.count(None) == 1
        assert len({*headers}) == 2
        assert sorted(len(span.links) for span in spans.handling()) == [0, 1, 1, 1]

    run()


def test_each_attempt_is_a_span(spans: Spans) -> None:
    """A failure is recorded in its span; Retry, Release and DeadLetter are outcomes, not failures."""

    @virtual
    async def run() -> None:
        bed = Bed()
        seen = Seen()

        async def handler(payload: str, context: Context) -> None:
            seen(payload)
            if payload == "release" and context.token > 1:
                return
            raise {
                "fail": ValueError("broken"), "retry": Retry(delay=0), "dead": DeadLetter("no"), "release": Release()
            }[payload]  # fmt: skip

        async with bed.queue(tracing=spans.tracing, on_message=handler) as queue:
            await queue.enqueue_many(["fail", "retry", "dead", "release"], max_attempts=2)
            await seen.count(7)
        by_outcome: dict[Any, list[ReadableSpan]] = {}
        for span in spans.handling():
            assert span.attributes is not None
            by_outcome.setdefault(span.attributes.get("s3queue.outcome"), []).append(span)
        counts = {outcome: len(found) for outcome, found in by_outcome.items()}
        assert counts == {None: 3, "Retry": 2, "DeadLetter": 1, "Release": 1}
        failed = [span for span in by_outcome[None] if span.events]
        assert len(failed) == 2
        for span in failed:
            assert span.status.status_code is StatusCode.ERROR
            assert span.status.description == "ValueError: broken"
            assert [event.name for event in span.events] == ["exception"]
        for outcome in ("Retry", "DeadLetter", "Release"):
            assert all(span.status.status_code is StatusCode.UNSET for span in by_outcome[outcome])

    run()


def test_a_sync_handler_and_what_it_calls(spans: Spans) -> None:
    """A handler in a thread runs in its span, too, so that what it calls becomes a child of it."""
    handled: list[int] = []

    def handler(payload: int) -> None:
        with spans.tracer.start_as_current_span("query"):
            handled.append(payload)

    async def run() -> None:
        finished = asyncio.Event()
        queue = S3Queue[int](
            "memory://",
            settings=QUIET,
            tracing=spans.tracing,
            on_message=handler,
            on_complete=lambda event: finished.set(),
        )
        async with queue:
            await queue.enqueue(1)
            async with asyncio.timeout(30):
                await finished.wait()

    asyncio.run(run())
    (span,) = spans.handling()
    (query,) = [found for found in spans._exporter.get_finished_spans() if found.name == "query"]
    assert query.parent is not None
    assert query.parent == span.get_span_context()
    assert handled == [1]


def test_received_messages(spans: Spans) -> None:
    """With receive() the same span is there for whoever enters it."""

    @virtual
    async def run() -> None:
        bed = Bed()
        async with bed.queue(tracing=spans.tracing) as queue:
            with spans.tracer.start_as_current_span("request") as request:
                await queue.enqueue(1)
            (message,) = await queue.receive()
            with spans.tracing.handling(message.context):
                await message.ack()
        (span,) = spans.handling()
        assert [link.context.trace_id for link in span.links] == [trace_id(request)]

    run()


def test_the_propagator_of_the_application(spans: Spans) -> None:
    """Another propagator writes its own headers, and the producer's headers of the same name win."""
    tracing = OpenTelemetryTracing("jobs", tracer_provider=spans.provider, propagator=W3CBaggagePropagator())
    token = context.attach(baggage.set_baggage("tenant", "a"))
    try:
        assert tracing.outgoing({"b": "c"}) == {"baggage": "tenant=a", "b": "c"}
        assert tracing.outgoing({"baggage": "mine"}) == {"baggage": "mine"}
    finally:
        context.detach(token)
    assert tracing.outgoing(None) is None
    with spans.tracer.start_as_current_span("request"):
        assert spans.tracing.outgoing({"traceparent": "mine"}) == {"traceparent": "mine"}


def points(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    """The data points that a reader collects now, by the instrument's name."""
    found: dict[str, list[Any]] = {}
    data = reader.get_metrics_data()
    for resource in data.resource_metrics if data is not None else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                found.setdefault(metric.name, []).extend(metric.data.data_points)
    return found


@virtual
async def test_what_a_reader_collects() -> None:
    """A reader gets every figure of the last event with the queue's name, and each latency in a histogram."""
    bed = Bed()
    seen = Seen()
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)

    async def handler(payload: object) -> None: ...

    async with bed.queue(on_message=handler) as queue:
        metrics = OpenTelemetryMetrics(queue, name="jobs", meter_provider=provider)
        off = queue.on("metrics", seen)
        await queue.enqueue_many(range(6))
        await queue.enqueue_many(range(2), delay=3600)
        (snapshot,) = await seen.count(1)
        collected = points(reader)
        assert {f"s3queue.{figure.field}" for figure in FIGURES} <= collected.keys()
        assert [(p.value, p.attributes["priority"]) for p in collected["s3queue.backlog"]] == [(0, "0")]
        (processed,) = collected["s3queue.processed"]
        assert isinstance(processed, NumberDataPoint)
        assert (processed.value, processed.attributes) == (6, {"queue": "jobs"})
        (delayed,) = collected["s3queue.delayed"]
        assert delayed.value == 2
        puts = [p.value for p in collected["s3queue.s3_requests"] if p.attributes["operation"] == "put"]
        assert puts == [snapshot.s3_requests["put"]]
        for name in ("s3queue.handler_latency", "s3queue.end_to_end_latency"):
            (latency,) = collected[name]
            assert isinstance(latency, HistogramDataPoint)
            assert latency.count == 6
            assert latency.explicit_bounds[0] == 0.005
        off()
        metrics.close()
        assert not queue._bus.wants("metrics")
        assert "s3queue.term" not in points(reader)
    provider.shutdown()
