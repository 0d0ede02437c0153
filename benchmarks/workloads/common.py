"""What every part of the benchmark has, and small arithmetic that they share."""

from __future__ import annotations

import itertools
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console

from benchmarks.contenders.base import Drained, Place, quantile
from benchmarks.contenders.ours import queue_url
from benchmarks.throughput import BUCKET, place
from s3queue_async.metrics import dollars
from s3queue_async.testing.servers import Server

Results = dict[str, Any]
"""What a part found: nothing but what JSON knows."""


@dataclass
class Bench:
    """One run of the benchmark.

    Attributes:
        server: The S3 server.
        redis_url: The Redis; "" when there is none.
        console: Says what goes on.
        scale: What every number of messages is multiplied with; 1 for the real thing, less for a trial.
        rounds: How often each measurement is taken, in turn with the others.
        schemes: Which of our S3 clients can be used; the first is the default.
        skipped: Names and reasons of what could not run.
    """

    server: Server
    redis_url: str
    console: Console
    scale: float = 1.0
    rounds: int = 3
    schemes: list[str] = field(default_factory=lambda: ["s3"])
    skipped: dict[str, str] = field(default_factory=dict)
    _numbers: itertools.count[int] = field(default_factory=itertools.count)

    def place(self, name: str, *, alone: bool = False) -> Place:
        """Where nothing is yet.

        Args:
            name: For people who look into the bucket.
            alone: In a bucket of its own, for a contender that knows no prefix.
        """
        prefix = f"{name}-{next(self._numbers)}"
        if alone:
            self.server.create_bucket(f"{BUCKET}-{prefix}")
        bucket = f"{BUCKET}-{prefix}" if alone else BUCKET
        return place(self.server, prefix, bucket=bucket, redis_url=self.redis_url)

    def url(self, where: Place, scheme: str | None = None) -> str:
        """The url of a queue there."""
        return queue_url(where, scheme or self.schemes[0])

    def count(self, messages: int, *, least: int = 1, multiple: int = 1) -> int:
        """So many messages at this scale."""
        return max(least, round(messages * self.scale) // multiple * multiple, multiple)

    def many(self, times: int) -> int:
        """So many times as many rounds as elsewhere, where a ratio is judged that single runs tell little of."""
        return times * self.rounds if self.rounds > 1 else 1

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def neighbours(rates: Sequence[float], beside: Sequence[float]) -> float:
    """The median ratio of those that ran one after the other, which are the least disturbed."""
    return round(median(rate / other for rate, other in zip(rates, beside, strict=True)), 3)


def spread(values: Sequence[float]) -> Results:
    """Median and 99th percentile, in milliseconds."""
    return {
        "count": len(values),
        "p50_ms": round(quantile(values, 0.5) * 1e3, 3),
        "p99_ms": round(quantile(values, 0.99) * 1e3, 3),
    }


def rates(runs: Sequence[Drained]) -> Results:
    """The medians of some runs of one thing, and what was lost and duplicated in all of them."""
    return {
        "messages": runs[0].process.messages,
        "enqueue_rate": round(median(run.enqueue.rate for run in runs), 1),
        "process_rate": round(median(run.process.rate for run in runs), 1),
        "lost": sum(run.lost for run in runs),
        "duplicated": sum(run.duplicated for run in runs),
    }


def per_million(requests: Mapping[str, int], messages: int) -> float:
    """What a million messages cost at S3's list prices, in dollars."""
    return dollars(requests) * 1e6 / messages


def added(*counts: Mapping[str, int]) -> dict[str, int]:
    """The sum of some counts of requests."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(count)
    return dict(total)
