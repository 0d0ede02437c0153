"""Metrics for Prometheus; needs the extra ``prometheus``."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from s3queue_async.events import MetricsSnapshot
from s3queue_async.figures import FIGURES, LATENCIES, QUANTILES, Figure
from s3queue_async.queue import S3Queue

PREFIX = "s3queue_"


class PrometheusMetrics(Collector):
    """Shows a registry the figures of one queue or of several, as their last ``metrics`` events told them.

    What a scrape gets is up to ``metrics_interval`` old; a scrape asks nothing of the store.

    Args:
        queue: The first queue; it need not be open yet.
        name: What the label ``queue`` says; None: the queue's url without its parameters.
        registry: Where to register.

    Raises:
        ValueError: The registry has such a collector already: use its ``add``.
    """

    def __init__(self, queue: S3Queue[Any], *, name: str | None = None, registry: CollectorRegistry = REGISTRY) -> None:
        self._snapshots: dict[str, MetricsSnapshot] = {}
        self._off: list[Callable[[], None]] = []
        self._registry = registry
        registry.register(self)
        try:
            self.add(queue, name=name)
        except BaseException:
            registry.unregister(self)
            raise

    def add(self, queue: S3Queue[Any], *, name: str | None = None) -> None:
        """Show another queue beside the first.

        Args:
            queue: The queue.
            name: What the label ``queue`` says; None: the queue's url without its parameters.

        Raises:
            ValueError: There is a queue of that name already.
        """
        label = (queue.url or "").partition("?")[0] if name is None else name
        if label in self._snapshots:
            raise ValueError(f"There is a queue {label!r} already; give this one another name.")

        def take(snapshot: MetricsSnapshot) -> None:
            # A scrape in a thread reads it: a snapshot is replaced, and never changed.
            self._snapshots[label] = snapshot

        self._off.append(queue.on(MetricsSnapshot.name, take))
        take(queue.metrics())

    def close(self) -> None:
        """Listen no more, and leave the registry."""
        for off in self._off:
            off()
        self._off = []
        self._registry.unregister(self)

    def describe(self) -> Iterable[Metric]:
        """The families without their samples, so that a registry finds names that are taken."""
        return [*(_family(figure) for figure in FIGURES), *(_summary(field) for field in LATENCIES)]

    def collect(self) -> Iterable[Metric]:
        """The families with what each queue told last."""
        queues = list(self._snapshots.items())
        for figure in FIGURES:
            family = _family(figure)
            for queue, snapshot in queues:
                for label, value in figure.values(snapshot).items():
                    family.add_metric([queue, label] if figure.label else [queue], value)
            yield family
        for field in LATENCIES:
            summary = _summary(field)
            for queue, snapshot in queues:
                latency = getattr(snapshot, field)
                for part, quantile in QUANTILES.items():
                    seconds = getattr(latency, part)
                    if seconds is not None:
                        labels = {"queue": queue, "quantile": f"{quantile:g}"}
                        summary.add_sample(summary.name, labels, seconds)
                summary.add_metric([queue], latency.count, latency.total)
            yield summary


def _family(figure: Figure) -> CounterMetricFamily | GaugeMetricFamily:
    labels = ["queue", figure.label] if figure.label else ["queue"]
    kind = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
    return kind(PREFIX + figure.name, figure.text, labels=labels)


def _summary(field: str) -> SummaryMetricFamily:
    name, text = LATENCIES[field]
    return SummaryMetricFamily(PREFIX + name, text, labels=["queue"])
