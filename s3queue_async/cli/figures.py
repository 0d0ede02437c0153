"""From looks at a queue to rates, latencies and cost: what ``s3queue top`` shows, without anything of how."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import msgspec

from s3queue_async.looks import Overview
from s3queue_async.message import WorkerInfo
from s3queue_async.metrics import dollars

WINDOW_S = 30.0
POINTS_MAX = 600
HOUR_S = 3600.0


class WorkerFigures(msgspec.Struct, frozen=True):
    """A worker with what its last two heartbeats tell.

    Attributes:
        info: As it was last seen.
        rate: Messages completed a second between these heartbeats.
        cost_per_hour: Dollars for its requests at that pace.
        throttled_per_minute: Its requests that were refused for being too many.
    """

    info: WorkerInfo
    rate: float
    cost_per_hour: float
    throttled_per_minute: float


class Figures(msgspec.Struct, frozen=True):
    """What is shown of a queue at one moment.

    Attributes:
        overview: The last look.
        arriving, handled, failing: Messages a second; handled and failing by what workers tell, arriving by how the
            backlog changed as well.
        handler_s: Seconds that a completed message's handler ran, lately, on average; None when nothing was completed.
        latency_s: Seconds from its enqueue to its end, likewise.
        store_s: Seconds that the last look's requests took, each.
        cost_per_hour: Dollars for the requests of all workers.
        own_cost_per_hour: Dollars for those of whoever watches.
        throttled_per_minute: Requests that the store refused for being too many, of workers and watcher.
        workers: Each worker.
        trends: The course of some of these, oldest first; None where there was no value.
    """

    overview: Overview
    arriving: float
    handled: float
    failing: float
    handler_s: float | None
    latency_s: float | None
    store_s: float
    cost_per_hour: float
    own_cost_per_hour: float
    throttled_per_minute: float
    workers: list[WorkerFigures]
    trends: Mapping[str, Sequence[float | None]]


class Requests(msgspec.Struct, frozen=True):
    """The watcher's own requests so far: how many by operation, how many were throttled, how long all took."""

    by_operation: dict[str, int]
    throttled: int
    seconds: float


class _Pace(msgspec.Struct, frozen=True):
    rate: float = 0.0
    failing: float = 0.0
    cost_per_hour: float = 0.0
    throttled_per_minute: float = 0.0


class Watch:
    """Remembers as many looks as the figures need."""

    def __init__(self) -> None:
        self._looks: deque[tuple[float, int, Requests]] = deque()
        self._last: dict[str, WorkerInfo] = {}
        self._paces: dict[str, _Pace] = {}
        self._trends: dict[str, deque[float | None]] = {
            name: deque(maxlen=POINTS_MAX) for name in ("backlog", "handled", "handler", "latency", "store")
        }

    def add(self, overview: Overview, requests: Requests) -> Figures:
        """Take in a look, and say what it and those before come to."""
        now_s = overview.at.timestamp()
        stats = overview.stats
        inside = stats.pending + stats.delayed + stats.processing + stats.dead
        self._looks.append((now_s, inside, requests))
        while len(self._looks) > 2 and self._looks[1][0] <= now_s - WINDOW_S:
            self._looks.popleft()
        then_s, inside_then, requests_then = self._looks[0]
        elapsed_s = max(1e-3, now_s - then_s)
        completed, handler_s, latency_s = self._take_in(overview.workers)
        alive = [worker for worker in overview.workers if worker.alive]
        handled = sum(self._pace(worker).rate for worker in alive)
        failing = sum(self._pace(worker).failing for worker in alive)
        watched_for_s = now_s - then_s
        arriving = max(0.0, (inside - inside_then) / elapsed_s + handled) if watched_for_s > 0 else 0.0
        last = self._looks[-2][2] if len(self._looks) > 1 else Requests({}, 0, 0.0)
        made = sum(requests.by_operation.values()) - sum(last.by_operation.values())
        store_s = (requests.seconds - last.seconds) / made if made > 0 else 0.0
        own = _less(requests.by_operation, requests_then.by_operation)
        throttled = (requests.throttled - requests_then.throttled) * 60 / elapsed_s if watched_for_s > 0 else 0.0
        if completed:
            average_handler_s: float | None = handler_s / completed
            average_latency_s: float | None = latency_s / completed
        else:
            # Between two heartbeats of busy workers what the last ones said goes on.
            average_handler_s = _latest(self._trends["handler"]) if handled else None
            average_latency_s = _latest(self._trends["latency"]) if handled else None
        for name, value in (
            ("backlog", float(stats.pending)),
            ("handled", handled),
            ("handler", average_handler_s),
            ("latency", average_latency_s),
            ("store", store_s),
        ):
            self._trends[name].append(value)
        return Figures(
            overview=overview,
            arriving=arriving,
            handled=handled,
            failing=failing,
            handler_s=_latest(self._trends["handler"]),
            latency_s=_latest(self._trends["latency"]),
            store_s=store_s,
            cost_per_hour=sum(self._pace(worker).cost_per_hour for worker in alive),
            own_cost_per_hour=dollars(own) * HOUR_S / elapsed_s if watched_for_s > 0 else 0.0,
            throttled_per_minute=throttled + sum(self._pace(worker).throttled_per_minute for worker in alive),
            workers=[self._figures(worker) for worker in overview.workers],
            trends={name: list(points) for name, points in self._trends.items()},
        )

    def _take_in(self, workers: Sequence[WorkerInfo]) -> tuple[int, float, float]:
        """What was completed since the last look by what the workers say now, with its handler and end-to-end seconds."""
        completed = 0
        handler_s = latency_s = 0.0
        for worker in workers:
            before = self._last.get(worker.id)
            if before is not None and worker.reported_at == before.reported_at:
                continue
            if before is not None and before.reported_at is not None and worker.reported_at is not None:
                elapsed_s = max(1e-3, (worker.reported_at - before.reported_at).total_seconds())
                done = worker.completed - before.completed
                completed += done
                handler_s += worker.handler_seconds - before.handler_seconds
                latency_s += worker.latency_seconds - before.latency_seconds
                self._paces[worker.id] = _Pace(
                    done / elapsed_s,
                    (worker.failed - before.failed) / elapsed_s,
                    dollars(_less(worker.requests, before.requests)) * HOUR_S / elapsed_s,
                    (worker.throttled - before.throttled) * 60 / elapsed_s,
                )
        self._last = {worker.id: worker for worker in workers}
        self._paces = {name: pace for name, pace in self._paces.items() if name in self._last}
        return completed, handler_s, latency_s

    def _pace(self, worker: WorkerInfo) -> _Pace:
        return self._paces.get(worker.id, _Pace())

    def _figures(self, worker: WorkerInfo) -> WorkerFigures:
        pace = self._pace(worker)
        return WorkerFigures(worker, pace.rate, pace.cost_per_hour, pace.throttled_per_minute)


def _less(now: Mapping[str, int], before: Mapping[str, int]) -> dict[str, int]:
    return {name: max(0, count - before.get(name, 0)) for name, count in now.items()}


def _latest(points: Sequence[float | None]) -> float | None:
    return next((point for point in reversed(points) if point is not None), None)


BLOCKS = "▁▂▃▄▅▆▇█"


def sparkline(points: Sequence[float | None], width: int) -> str:
    """The last points as blocks, the highest of them full; a gap where there was no value."""
    shown = list(points)[-width:]
    values = [point for point in shown if point is not None]
    top = max(values, default=0.0)
    text = ""
    for point in shown:
        if point is None:
            text += " "
        elif top <= 0 or not math.isfinite(point):
            text += BLOCKS[0]
        else:
            text += BLOCKS[min(len(BLOCKS) - 1, int(point / top * (len(BLOCKS) - 1) + 0.5))]
    return text.rjust(width)
