"""Clusters of 1 to 1,000 workers on a modelled S3, in virtual time: the real engine, only storage and clock are given.

    python -m benchmarks.cluster            every size, handlers of 10 ms, 1 s and 10 s, with and without coordinator
    python -m benchmarks.cluster --quick    up to 100 workers, 1 s handlers
    python -m benchmarks.cluster --idle     a simulated day of ten idle workers, and what it costs
    python -m benchmarks.cluster --latency  an empty queue for 200 ms, then a message from another process
    python -m benchmarks.cluster --show docs/scaling.json --plot docs/scaling.png    earlier runs

The model: latencies of S3 Standard (first byte of a small object 30 ms, write 70 ms, listing 80 ms, log-normal), and
3,500 writes and 5,500 reads a second for each prefix, beyond which it answers 503 SlowDown.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar

import anyio
from rich.console import Console
from rich.table import Table

from s3queue_async import Context, S3Queue, Settings
from s3queue_async.clock import Clock
from s3queue_async.errors import Throttled
from s3queue_async.metrics import dollars
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Deleted,
    IfVersion,
    Page,
    PreconditionFailed,
    Stored,
    Unmodified,
    Written,
)
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.clock import LoopClock, run_virtual, store_now

R = TypeVar("R")

SIZES = (1, 10, 100, 300, 1000)
HANDLERS_S = (0.01, 1.0, 10.0)
LOAD = 0.8
"""Messages arrive at this part of what the workers could handle."""
ARRIVALS_MAX = 1000.0
"""A second; what one machine can simulate in reasonable time."""
CONCURRENCY = 4
READ_S, WRITE_S, LIST_S = 0.03, 0.07, 0.08
SPREAD = 0.25
WRITES_MAX, READS_MAX = 3500, 5500
MONTH_S = 30 * 86_400.0
KINDS = ("segments", "claims", "listings", "board", "heartbeats", "other")


class Model:
    """The store: objects, how long it takes, how much it takes, and a count of what was asked."""

    def __init__(self, seed: int) -> None:
        self.memory = MemoryStorage(now=store_now, date_resolution_s=1.0)
        self.rng = Random(seed)
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.rates: Counter[tuple[int, str, str]] = Counter()
        self.claims = self.wasted = self.throttled = 0

    def charge(self, operation: str, key: str, now_s: float) -> None:
        """Count a request; Raises Throttled when its prefix gets too many."""
        prefix = "/".join(key.split("/")[:2]) if key.startswith("plugin/") else key.split("/")[0]
        reads = operation in ("get", "list")
        self.counts[operation] += 1
        self.kinds[_kind(operation, key)] += 1
        place = int(now_s), prefix, "reads" if reads else "writes"
        self.rates[place] += 1
        if self.rates[place] > (READS_MAX if reads else WRITES_MAX):
            self.throttled += 1
            raise Throttled(f"{operation} {key}: slow down.")

    @property
    def dollars(self) -> float:
        return dollars(self.counts)

    def busiest(self, since_s: float) -> float:
        """The largest part of a prefix's limit that was used in any second from then on."""
        used = [
            count / (READS_MAX if how == "reads" else WRITES_MAX)
            for (second, _, how), count in self.rates.items()
            if second >= since_s
        ]
        return max(used, default=0.0)

    def reset(self) -> None:
        self.counts.clear()
        self.kinds.clear()
        self.rates.clear()
        self.claims = self.wasted = self.throttled = 0


def _kind(operation: str, key: str) -> str:
    if operation == "list":
        return "listings"
    for start, kind in (
        ("claims/", "claims"),
        ("ready/", "segments"),
        ("delayed/", "segments"),
        ("plugin/coordinator/", "board"),
        ("plugin/workers/", "heartbeats"),
    ):
        if key.startswith(start):
            return kind
    return "other"


class Lane:
    """One process's way to the store; satisfies Storage. A process that is killed gets no reply any more."""

    date_resolution_s = 1.0

    def __init__(self, model: Model) -> None:
        self._model = model
        self._clock = LoopClock()
        self.killed = False

    async def open(self) -> None:
        await self._model.memory.open()

    async def close(self) -> None:
        return None

    async def _call(self, operation: str, key: str, middle_s: float, call: Callable[[], Awaitable[R]]) -> R:
        model = self._model
        if self.killed:
            await anyio.sleep_forever()
        took_s = middle_s * model.rng.lognormvariate(0, SPREAD)
        model.charge(operation, key, self._clock.monotonic())
        await anyio.sleep(took_s / 2)
        if self.killed:
            await anyio.sleep_forever()
        try:
            return await call()
        finally:
            await anyio.sleep(took_s / 2)

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        return await self._call("get", key, READ_S, lambda: self._model.memory.get(key, span=span, unless=unless))

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        claim = key.startswith("claims/")
        self._model.claims += claim
        try:
            return await self._call("put", key, WRITE_S, lambda: self._model.memory.put(key, body, when=when))
        except PreconditionFailed:
            self._model.wasted += claim
            raise

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        return await self._call("delete", key, WRITE_S, lambda: self._model.memory.delete(key, when=when))

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        first = keys[0] if keys else ""
        return await self._call("delete_many", first, WRITE_S, lambda: self._model.memory.delete_many(keys))

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        return await self._call(
            "list", prefix, LIST_S, lambda: self._model.memory.list(prefix, after=after, limit=limit)
        )


@dataclass
class Figures:
    """What one cluster came to."""

    workers: int
    handler_s: float
    coordinator: bool
    handled_per_s: float = 0.0
    requests_per_s: float = 0.0
    beside_per_s: float = 0.0
    by_kind: dict[str, float] = field(default_factory=dict)
    requests_per_message: float = 0.0
    wasted_part: float = 0.0
    latency_p50_s: float = 0.0
    latency_p99_s: float = 0.0
    worker_recovered_s: float | None = None
    coordinator_recovered_s: float | None = None
    dollars_per_million: float = 0.0
    busiest_part: float = 0.0
    throttled: int = 0
    lost: int = 0
    twice: int = 0


class Cluster:
    """Workers and producers on one modelled store."""

    def __init__(self, workers: int, handler_s: float, settings: Settings, seed: int = 1) -> None:
        self.model = Model(seed)
        self.rng = Random(seed)
        self.workers = workers
        self.handler_s = handler_s
        self.settings = settings
        self.clock: Clock = LoopClock()
        self.sent_at: dict[int, float] = {}
        self.started: dict[int, list[tuple[float, int]]] = {}
        self.done: Counter[int] = Counter()
        self.lanes: list[Lane] = []
        self.queues: list[S3Queue[int]] = []
        self.scopes: list[anyio.CancelScope] = []

    def queue(self, lane: Lane) -> S3Queue[int]:
        return S3Queue(storage=lane, payload_type=int, settings=self.settings, clock=LoopClock(), rng=self.fresh_rng())

    def fresh_rng(self) -> Random:
        return Random(self.rng.getrandbits(64))

    async def worker(self, number: int) -> None:
        lane = Lane(self.model)
        self.lanes.append(lane)

        async def handle(payload: int, context: Context) -> None:
            self.started.setdefault(payload, []).append((self.clock.monotonic(), number))
            await anyio.sleep(self.handler_s)
            if not lane.killed:
                self.done[payload] += 1

        with anyio.CancelScope() as scope:
            self.scopes.append(scope)
            queue = self.queue(lane)
            self.queues.append(queue)
            async with queue:
                await queue.start_processing(handle, concurrency=CONCURRENCY)
                await anyio.sleep_forever()

    def kill(self, number: int) -> float:
        """From now on nothing of this worker reaches the store, and its handlers are gone."""
        self.lanes[number].killed = True
        return self.clock.monotonic()

    async def produce(self, per_s: float, count: int) -> None:
        """Messages one by one at an even rate, from four processes."""
        async with AsyncExitStack() as stack:
            queues = [await stack.enter_async_context(self.queue(Lane(self.model))) for _ in range(4)]

            async def enqueue(number: int) -> None:
                await queues[number % 4].enqueue(number)
                self.sent_at[number] = self.clock.monotonic()

            began = self.clock.monotonic()
            async with anyio.create_task_group() as group:
                for number in range(count):
                    await anyio.sleep(max(0.0, began + number / per_s - self.clock.monotonic()))
                    group.start_soon(enqueue, number)

    async def until_done(self, count: int, within_s: float) -> None:
        ends = self.clock.monotonic() + within_s
        while len(self.done) < count and self.clock.monotonic() < ends:
            await anyio.sleep(0.25)


async def measure(workers: int, handler_s: float, settings: Settings, seconds: float, *, kill: bool) -> Figures:
    """Run one cluster under a steady load; then kill a worker, then the coordinator, and see how long each takes."""
    cluster = Cluster(workers, handler_s, settings)
    model = cluster.model
    figures = Figures(workers, handler_s, settings.coordinator)
    per_s = min(ARRIVALS_MAX, LOAD * workers * CONCURRENCY / handler_s)
    count = max(20, int(per_s * seconds))
    warm_s = 15.0
    async with anyio.create_task_group() as group:
        for number in range(workers):
            group.start_soon(cluster.worker, number)
        await anyio.sleep(warm_s)
        model.reset()
        began = cluster.clock.monotonic()
        await cluster.produce(per_s, count)
        await cluster.until_done(count, 60 + 20 * handler_s)
        took_s = cluster.clock.monotonic() - began
        figures.lost = count - len(cluster.done)
        figures.twice = sum(1 for times in cluster.done.values() if times > 1)
        _sum_up(cluster, figures, count, took_s, began)
        if kill and workers > 1:
            await _kill(cluster, figures, count, per_s)
        group.cancel_scope.cancel()
    return figures


def _sum_up(cluster: Cluster, figures: Figures, count: int, took_s: float, began: float) -> None:
    model = cluster.model
    requests = sum(model.counts.values())
    figures.handled_per_s = len(cluster.done) / took_s
    figures.requests_per_s = requests / took_s
    figures.by_kind = {kind: model.kinds[kind] / took_s for kind in KINDS}
    figures.beside_per_s = sum(figures.by_kind[kind] for kind in ("listings", "board", "heartbeats", "other"))
    figures.requests_per_message = requests / count
    figures.wasted_part = model.wasted / max(1, model.claims)
    waits = sorted(cluster.started[n][0][0] - sent for n, sent in cluster.sent_at.items() if n in cluster.started)
    figures.latency_p50_s = waits[len(waits) // 2]
    figures.latency_p99_s = waits[int(0.99 * (len(waits) - 1))]
    figures.dollars_per_million = model.dollars / count * 1e6
    figures.busiest_part = model.busiest(began)
    figures.throttled = model.throttled


async def _kill(cluster: Cluster, figures: Figures, count: int, per_s: float) -> None:
    """The worker with the most in hand, then the coordinator."""
    more = max(20, int(per_s * 20))

    async def load(first: int) -> None:
        async with cluster.queue(Lane(cluster.model)) as queue, anyio.create_task_group() as group:
            began = cluster.clock.monotonic()
            for number in range(first, first + more):
                await anyio.sleep(max(0.0, began + (number - first) / per_s - cluster.clock.monotonic()))
                group.start_soon(queue.enqueue, number)

    async with anyio.create_task_group() as group:
        group.start_soon(load, count)
        await anyio.sleep(5 + cluster.handler_s / 2)
        running: dict[int, list[int]] = {n: [] for n, queue in enumerate(cluster.queues) if not queue.is_coordinator}
        for message, starts in cluster.started.items():
            if not cluster.done[message] and starts[-1][1] in running:
                running[starts[-1][1]].append(message)
        victim, held = max(running.items(), key=lambda item: len(item[1]))
        killed_at = cluster.kill(victim)
        while not all(any(who != victim for _, who in cluster.started[n]) for n in held):
            await anyio.sleep(0.25)
        if held:
            figures.worker_recovered_s = cluster.clock.monotonic() - killed_at
    leader = next((n for n, queue in enumerate(cluster.queues) if queue.is_coordinator), None)
    if leader is None:
        return
    async with anyio.create_task_group() as group:
        group.start_soon(load, count + more)
        await anyio.sleep(3)
        killed_at = cluster.kill(leader)
        while not any(queue.is_coordinator for n, queue in enumerate(cluster.queues) if n != leader):
            await anyio.sleep(0.1)
        figures.coordinator_recovered_s = cluster.clock.monotonic() - killed_at


async def idle(workers: int, seconds: float, settings: Settings) -> tuple[Counter[str], Counter[str]]:
    """What idle workers ask of the store in so long."""
    cluster = Cluster(workers, 1.0, settings)
    async with anyio.create_task_group() as group:
        for number in range(workers):
            group.start_soon(cluster.worker, number)
        await anyio.sleep(300)
        cluster.model.reset()
        left_s = seconds
        while left_s > 0:
            # So that what the model remembers of each second does not pile up.
            await anyio.sleep(min(left_s, 3600))
            left_s -= 3600
            cluster.model.rates.clear()
        counts, kinds = Counter(cluster.model.counts), Counter(cluster.model.kinds)
        group.cancel_scope.cancel()
    return counts, kinds


async def latency(workers: int, settings: Settings, times: int) -> list[float]:
    """From the start of an enqueue in another process to the start of its handler; the queue was empty for 200 ms."""
    cluster = Cluster(workers, 0.01, settings)
    waits: list[float] = []
    async with anyio.create_task_group() as group:
        for number in range(workers):
            group.start_soon(cluster.worker, number)
        await anyio.sleep(30)
        async with cluster.queue(Lane(cluster.model)) as queue:
            for number in range(times):
                await queue.enqueue(number)
                written_at = cluster.clock.monotonic()
                while number not in cluster.started:
                    await anyio.sleep(0.002)
                waits.append(cluster.started[number][0][0] - written_at)
                while not cluster.done[number]:
                    await anyio.sleep(0.002)
                await anyio.sleep(0.2)
        group.cancel_scope.cancel()
    return waits


# -- what is printed ---------------------------------------------------------------------------------------------------


def show(rows: Sequence[Figures], console: Console) -> None:
    table = Table(title="Clusters on a modelled S3 Standard, steady load", title_justify="left")
    for name in (
        "workers", "handler", "coordinator", "handled/s", "requests/s", "beside messages/s", "requests/message",
        "wasted claims", "dispatch p50", "p99", "worker killed", "coordinator killed", "$/million", "of a prefix",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            str(row.workers), f"{row.handler_s:g} s", "yes" if row.coordinator else "no", f"{row.handled_per_s:.0f}",
            f"{row.requests_per_s:.0f}", f"{row.beside_per_s:.0f}", f"{row.requests_per_message:.2f}",
            f"{row.wasted_part:.1%}", f"{row.latency_p50_s:.2f} s", f"{row.latency_p99_s:.2f} s",
            _or_dash(row.worker_recovered_s), _or_dash(row.coordinator_recovered_s),
            f"{row.dollars_per_million:.2f}", f"{row.busiest_part:.0%}",
        )  # fmt: skip
        if row.lost or row.twice:
            console.print(f"[red]{row.workers} workers: {row.lost} lost, {row.twice} handled twice")
    console.print(table)


def _or_dash(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds:.1f} s"


def plot(rows: Sequence[Figures], path: Path) -> None:
    """Requests beside the messages' own, and dispatch latency, by the number of workers."""
    import matplotlib  # not needed unless a plot is asked for

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4))
    for coordinator, style in ((True, "o-"), (False, "s--")):
        for handler_s in sorted({row.handler_s for row in rows}):
            chosen = [row for row in rows if row.coordinator == coordinator and row.handler_s == handler_s]
            label = f"{handler_s:g} s handlers, {'coordinator' if coordinator else 'direct claims'}"
            sizes = [row.workers for row in chosen]
            axes[0].plot(sizes, [row.beside_per_s for row in chosen], style, label=label)
            axes[1].plot(sizes, [row.latency_p50_s for row in chosen], style, label=label)
    for axis, title in zip(axes, ("requests/s beside the messages' own", "dispatch latency p50, seconds"), strict=True):
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("workers")
        axis.set_title(title)
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--idle", action="store_true")
    parser.add_argument("--latency", action="store_true")
    parser.add_argument("--workers", type=int, nargs="*")
    parser.add_argument("--handlers", type=float, nargs="*")
    parser.add_argument("--seconds", type=float, default=20.0, help="of load in each run")
    parser.add_argument("--hours", type=float, default=24.0, help="of idleness")
    parser.add_argument("--only", choices=("coordinator", "direct"))
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--show", type=Path, nargs="+", help="simulate nothing, show what earlier runs wrote with --json"
    )
    parser.add_argument("--plot", type=Path)
    chosen = parser.parse_args()
    console = Console(width=200)
    if chosen.idle:
        return _show_idle(chosen, console)
    if chosen.latency:
        return _show_latency(chosen, console)
    if chosen.show:
        return _report(
            [Figures(**row) for path in chosen.show for row in json.loads(path.read_text())], chosen, console
        )
    sizes = chosen.workers or ((1, 10, 100) if chosen.quick else SIZES)
    handlers = chosen.handlers or ((1.0,) if chosen.quick else HANDLERS_S)
    modes = {"coordinator": (True,), "direct": (False,), None: (True, False)}[chosen.only]
    rows: list[Figures] = []
    for handler_s in handlers:
        for workers in sizes:
            for coordinator in modes:
                settings = Settings(coordinator=coordinator)
                row = run_virtual(lambda: measure(workers, handler_s, settings, chosen.seconds, kill=True))  # noqa: B023 - called at once
                rows.append(row)
                kinds = ", ".join(f"{kind} {rate:.1f}" for kind, rate in row.by_kind.items())
                console.print(
                    f"{workers} workers, {handler_s:g} s, coordinator={coordinator}: requests/s by kind: {kinds}"
                )
    return _report(rows, chosen, console)


def _report(rows: list[Figures], chosen: argparse.Namespace, console: Console) -> int:
    rows.sort(key=lambda row: (row.handler_s, row.workers, not row.coordinator))
    show(rows, console)
    console.print("The estimate that this design began with, for 100 workers: 3,200 GET/s and 50 LIST/s.")
    if chosen.json:
        chosen.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if chosen.plot:
        plot(rows, chosen.plot)
    return 1 if any(row.lost for row in rows) else 0


def _show_idle(chosen: argparse.Namespace, console: Console) -> int:
    workers = (chosen.workers or [10])[0]
    seconds = chosen.hours * 3600
    for coordinator in (True, False):
        settings = Settings(coordinator=coordinator)
        counts, kinds = run_virtual(lambda: idle(workers, seconds, settings))  # noqa: B023 - called at once
        month = {operation: dollars({operation: count}) / seconds * MONTH_S for operation, count in counts.items()}
        parts = ", ".join(
            f"{operation} {count:,} (${month[operation]:.2f})" for operation, count in counts.most_common()
        )
        console.print(
            f"{workers} idle workers, {chosen.hours:g} simulated hours, coordinator={coordinator}: {parts}; "
            f"by kind {dict(kinds.most_common())}: ${sum(month.values()):.2f} a month"
        )
    return 0


def _show_latency(chosen: argparse.Namespace, console: Console) -> int:
    for workers in chosen.workers or (2, 4, 10):
        settings = Settings()
        waits = run_virtual(lambda: latency(workers, settings, 200))  # noqa: B023 - called at once
        quantiles = statistics.quantiles(waits, n=100)
        bound_s = settings.dispatch_interval + LIST_S + 2 * WRITE_S + READ_S
        console.print(
            f"{workers} workers: from written to started p50 {quantiles[49]:.3f} s, p99 {quantiles[98]:.3f} s "
            f"(one dispatch interval + four round trips: {bound_s:.3f} s)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
