"""Metrics and traces for OpenTelemetry; needs the extra ``otel``, and the SDK that the application configures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from opentelemetry import metrics, propagate, trace
from opentelemetry.context import Context as Variables
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation
from opentelemetry.propagators.textmap import TextMapPropagator
from opentelemetry.trace import Link, SpanKind, Status, StatusCode, TracerProvider

from s3queue_async.events import MessageCompleted, MetricsSnapshot
from s3queue_async.figures import FIGURES, Figure
from s3queue_async.message import Context, DeadLetter, Release, Retry
from s3queue_async.queue import S3Queue

SCOPE = "s3queue_async"
PREFIX = "s3queue."
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)
"""Upper bounds of the buckets of the two histograms, unless a view of the application's says otherwise."""


class OpenTelemetryMetrics:
    """Shows a meter the figures of a queue, as its last ``metrics`` event told them, and records latencies as they come.

    Args:
        queue: The queue; it need not be open yet.
        name: What the attribute ``queue`` says; None: the queue's url without its parameters.
        meter_provider: Whose meter; None: the global one.
    """

    def __init__(
        self, queue: S3Queue[Any], *, name: str | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        self._attributes = {"queue": (queue.url or "").partition("?")[0] if name is None else name}
        meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
        self._handler = meter.create_histogram(
            PREFIX + "handler_latency",
            "s",
            "From a handler's start to its end, of completed messages.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._end_to_end = meter.create_histogram(
            PREFIX + "end_to_end_latency",
            "s",
            "From the enqueue to the completion, of completed messages.",
            explicit_bucket_boundaries_advisory=SECONDS,
        )
        self._off = [
            queue.on(MetricsSnapshot.name, self._take),
            queue.on(MessageCompleted.name, self._record),
        ]
        self._snapshot: MetricsSnapshot | None = queue.metrics()
        for figure in FIGURES:
            if figure.kind == "gauge":
                create: Callable[..., Any] = meter.create_observable_gauge
            elif figure.of_worker:
                # It begins again with each worker, and what is observed of a counter must never fall.
                create = meter.create_observable_up_down_counter
            else:
                create = meter.create_observable_counter
            create(PREFIX + figure.field, [self._observer(figure)], figure.unit, figure.text)

    def close(self) -> None:
        """Listen no more; nothing is observed from then on."""
        for off in self._off:
            off()
        self._off = []
        self._snapshot = None

    def _take(self, snapshot: MetricsSnapshot) -> None:
        # A reader in a thread looks at it: a snapshot is replaced, and never changed.
        self._snapshot = snapshot

    def _record(self, event: MessageCompleted) -> None:
        self._handler.record(event.duration, self._attributes)
        self._end_to_end.record(event.latency, self._attributes)

    def _observer(self, figure: Figure) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(options: CallbackOptions) -> Iterable[Observation]:
            snapshot = self._snapshot
            if snapshot is None:
                return
            for label, value in figure.values(snapshot).items():
                attributes = {**self._attributes, figure.label: label} if figure.label else self._attributes
                yield Observation(value, attributes)

        return observe


class OpenTelemetryTracing:
    """Carries the producer's trace in the headers of its messages, and links the handler's span to it.

    Pass it as ``S3Queue(tracing=...)`` on both sides. The handler's span begins a trace of its own, because a message
    may wait for days and be tried many times; what it links to is the span in which ``enqueue`` was called. For
    messages from ``receive()``, enter ``handling(message.context)`` yourself.

    Args:
        name: The queue's name in the name of the spans, ``process <name>``, and in their attributes.
        tracer_provider: Whose tracer; None: the global one.
        propagator: What writes and reads the headers; None: the global one, ``traceparent`` unless it is configured.
    """

    def __init__(
        self,
        name: str = "s3queue",
        *,
        tracer_provider: TracerProvider | None = None,
        propagator: TextMapPropagator | None = None,
    ) -> None:
        self._name = name
        self._tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
        self._propagator = propagator

    def outgoing(self, headers: Mapping[str, str] | None) -> Mapping[str, str] | None:
        """The headers with the current trace in them; the producer's own of the same name win."""
        carrier: dict[str, str] = {}
        self._text_map.inject(carrier)
        return {**carrier, **(headers or {})} if carrier else headers

    @contextmanager
    def handling(self, context: Context) -> Iterator[None]:
        """A span around the handling of a message.

        Args:
            context: The message's.
        """
        sent = trace.get_current_span(self._text_map.extract(dict(context.headers), Variables())).get_span_context()
        with self._tracer.start_as_current_span(
            f"process {self._name}",
            # A root: the span in which the queue was opened has nothing to do with it.
            context=Variables(),
            kind=SpanKind.CONSUMER,
            links=[Link(sent)] if sent.is_valid else [],
            attributes={
                "messaging.system": "s3queue",
                "messaging.operation.type": "process",
                "messaging.operation.name": "process",
                "messaging.destination.name": self._name,
                "messaging.message.id": context.message_id,
                "s3queue.attempt": context.attempt,
                "s3queue.priority": context.priority,
                "s3queue.worker_id": context.worker_id,
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                yield
            except (Retry, Release, DeadLetter) as outcome:
                # What the handler says of its message is no failure of the handler.
                span.set_attribute("s3queue.outcome", type(outcome).__name__)
                raise
            except BaseException as error:
                span.record_exception(error)
                span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
                raise

    @property
    def _text_map(self) -> TextMapPropagator:
        # Looked up at each use: applications configure it after their imports.
        return propagate.get_global_textmap() if self._propagator is None else self._propagator
