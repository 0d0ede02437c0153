"""What the figures of a snapshot are called outside, in one table for all adapters; and the line for the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from s3queue_async.events import Latency, MetricsSnapshot
from s3queue_async.log import log

QUANTILES: Mapping[str, float] = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a snapshot, as monitoring systems know it.

    Attributes:
        field: Its name in MetricsSnapshot.
        name: Its name with its unit, as Prometheus wants it, without ``s3queue_`` and ``_total``.
        kind: Whether it only grows, or goes up and down.
        unit: In UCUM, as OpenTelemetry wants it.
        text: What it is.
        label: What tells its values apart, when it has several.
        of_worker: Whether it begins again with each worker that the process registers.
    """

    field: str
    name: str
    kind: Literal["counter", "gauge"]
    unit: str
    text: str
    label: str = ""
    of_worker: bool = False

    def values(self, snapshot: MetricsSnapshot) -> Mapping[str, float]:
        """Its values by what the label says, "" without a label; empty where the snapshot has none."""
        value = getattr(snapshot, self.field)
        if value is None:
            return {}
        if self.label:
            return {str(key): float(count) for key, count in value.items()}
        return {"": float(value)}


FIGURES = (
    Figure("active_workers", "active_workers", "gauge", "{worker}", "Registered workers, as last seen here."),
    Figure("is_coordinator", "is_coordinator", "gauge", "1", "1 in the process that coordinates."),
    Figure("term", "term", "gauge", "1", "The latest term of a coordinator that was seen here."),
    Figure("tickets_available", "tickets_available", "gauge", "{ticket}", "Tickets that nobody has claimed yet."),
    Figure(
        "tickets_claimed", "tickets_claimed", "counter", "{segment}", "Segments claimed by a ticket.", of_worker=True
    ),
    Figure(
        "tickets_stalled",
        "tickets_stalled",
        "counter",
        "{ticket}",
        "Tickets that nobody claimed in time, counted by the coordinator.",
        of_worker=True,
    ),
    Figure("claims_direct", "claims_direct", "counter", "{segment}", "Segments claimed without one.", of_worker=True),
    Figure("claims_wasted", "claims_wasted", "counter", "{claim}", "Claims that somebody else had.", of_worker=True),
    Figure("poll_interval", "poll_interval_seconds", "gauge", "s", "Time between two looks for work."),
    Figure("enqueued", "messages_enqueued", "counter", "{message}", "Messages enqueued by this process."),
    Figure("processed", "messages_processed", "counter", "{message}", "Messages completed by this process."),
    Figure("retried", "messages_retried", "counter", "{message}", "Attempts that led to another attempt."),
    Figure("dead", "messages_dead", "counter", "{message}", "Messages that became dead letters here."),
    Figure("processing_rate", "processing_rate", "gauge", "{message}/s", "Messages completed a second."),
    Figure("s3_requests", "s3_requests", "counter", "{request}", "Requests of the store.", "operation"),
    Figure(
        "s3_ops_per_second", "s3_ops_per_second", "gauge", "{request}/s", "Requests of the store a second.", "operation"
    ),
    Figure("throttling_errors", "throttling_errors", "counter", "{request}", "Requests refused for being too many."),
    Figure("throttled_waits", "throttled_waits", "counter", "{request}", "Requests that waited because of that."),
    Figure("throttled_wait_seconds", "throttled_wait_seconds", "counter", "s", "How long they waited."),
    Figure(
        "segment_bytes_before",
        "segment_before_bytes",
        "counter",
        "By",
        "Segments that were compressed or encrypted, as they would be without.",
    ),
    Figure("segment_bytes_stored", "segment_stored_bytes", "counter", "By", "The same segments, as stored."),
    Figure("packing_seconds", "packing_seconds", "counter", "s", "Spent on compression and encryption."),
    Figure(
        "backlog", "backlog_messages", "gauge", "{message}", "Messages ready or due, and held by nobody.", "priority"
    ),
    Figure("delayed", "delayed_messages", "gauge", "{message}", "Messages that are not due yet."),
    Figure("held", "held_messages", "gauge", "{message}", "Messages of segments that workers hold."),
    Figure("cost_dollars", "cost_dollars", "counter", "USD", "What the requests cost at S3's list prices."),
    Figure("cost_per_million", "cost_per_million_messages_dollars", "gauge", "USD", "What a million messages cost so."),
)
"""All but the latencies, which have several values of their own."""

LATENCIES: Mapping[str, tuple[str, str]] = {
    "handler_latency": ("handler_seconds", "From a handler's start to its end, of completed messages."),
    "end_to_end_latency": ("end_to_end_seconds", "From the enqueue to the completion, of completed messages."),
}
"""Field, name, and what it is."""


def log_metrics(snapshot: MetricsSnapshot) -> None:
    """Write a snapshot to the log, in one line; have it called with ``queue.on("metrics", log_metrics)``.

    Args:
        snapshot: What the ``metrics`` event carries.
    """
    log.info("metrics", **_flat(snapshot))


def _flat(snapshot: MetricsSnapshot) -> dict[str, Any]:
    """One level, without what is None or was not counted; durations and rates rounded."""
    flat: dict[str, Any] = {}
    for name in snapshot.__struct_fields__:
        value = getattr(snapshot, name)
        if isinstance(value, Latency):
            short = name.removesuffix("_latency")
            parts = {f"{short}_{part}": getattr(value, part) for part in QUANTILES}
        elif isinstance(value, dict):
            parts = {f"{name}_{key}": part for key, part in value.items()}
        else:
            parts = {name: value}
        flat |= {key: _rounded(part) for key, part in parts.items() if part is not None}
    return flat


def _rounded(value: Any) -> Any:
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def fields() -> frozenset[str]:
    """The fields of a snapshot that the tables have."""
    return frozenset({figure.field for figure in FIGURES} | LATENCIES.keys())


assert fields() <= {field.name for field in msgspec.structs.fields(MetricsSnapshot)}
