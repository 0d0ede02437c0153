"""What top makes of looks: rates, latencies, cost; and how it is drawn, at any width."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from io import StringIO

import pytest
from rich.console import Console

from s3queue_async import CoordinatorInfo, Overview, QueueStats, WorkerInfo
from s3queue_async.cli.figures import Figures, Requests, Watch, sparkline
from s3queue_async.cli.top_view import frame, state_of

BEGAN = datetime(2026, 1, 1, tzinfo=UTC)


def worker(
    name: str = "w", *, at_s: float, completed: int = 0, alive: bool = True, throttled: int = 0, puts: int = 0
) -> WorkerInfo:
    return WorkerInfo(
        id=name, capacity=10, in_flight=3, segments=1, completed=completed, heartbeat_age=1.0, alive=alive,
        failed=completed // 10, handler_seconds=0.2 * completed, latency_seconds=2.0 * completed,
        requests={"put": puts}, throttled=throttled, reported_at=BEGAN + timedelta(seconds=at_s),
    )  # fmt: skip


def overview(at_s: float, *workers: WorkerInfo, pending: int = 0, waiting: dict[int, int] | None = None) -> Overview:
    return Overview(
        at=BEGAN + timedelta(seconds=at_s),
        stats=QueueStats(pending=pending, workers=len(workers)),
        waiting={0: pending} if waiting is None else waiting,
        workers=list(workers),
        coordinator=CoordinatorInfo(worker_id="w", term=3, state="leading", board_age=0.5, workers=2, tickets=1),
    )


def requests(lists: int, *, throttled: int = 0) -> Requests:
    return Requests({"list": lists}, throttled, lists * 0.02)


def test_rates_latencies_and_cost() -> None:
    """Between two heartbeats ten seconds apart: 100 completed are 10 a second; what came in is that and the growth."""
    watch = Watch()
    first = watch.add(overview(0, worker(at_s=0, completed=50, puts=1000), pending=100), requests(4))
    assert (first.handled, first.arriving, first.handler_s) == (0, 0, None)
    figures = watch.add(overview(10, worker(at_s=10, completed=150, puts=3000), pending=130), requests(8))
    assert figures.handled == pytest.approx(10)
    assert figures.failing == pytest.approx(1)
    assert figures.arriving == pytest.approx(13)
    assert figures.handler_s == pytest.approx(0.2)
    assert figures.latency_s == pytest.approx(2.0)
    assert figures.store_s == pytest.approx(0.02)
    # 2,000 PUT in ten seconds, at $5 a million.
    assert figures.cost_per_hour == pytest.approx(2000 * 5e-6 * 360)
    assert figures.own_cost_per_hour == pytest.approx(4 * 5e-6 * 360)
    same = watch.add(overview(12, worker(at_s=10, completed=150, puts=3000), pending=110), requests(12))
    assert same.handled == pytest.approx(10)
    assert same.trends["handler"][-1] == pytest.approx(0.2)


def test_throttling() -> None:
    """Refusals of workers and of the watcher add up, by the minute."""
    watch = Watch()
    watch.add(overview(0, worker(at_s=0)), requests(1))
    figures = watch.add(overview(10, worker(at_s=10, throttled=5)), requests(2, throttled=1))
    assert figures.throttled_per_minute == pytest.approx(36)
    assert state_of(figures)[0] == "throttled"


def test_workers_come_and_go() -> None:
    """A new worker has no pace yet, one that is gone has none any more, one that is lost counts no longer."""
    watch = Watch()
    watch.add(overview(0, worker("a", at_s=0), worker("b", at_s=0)), requests(1))
    both = watch.add(overview(10, worker("a", at_s=10, completed=100), worker("b", at_s=10, completed=50)), requests(2))
    assert both.handled == pytest.approx(15)
    lost = watch.add(overview(12, worker("a", at_s=10, completed=100, alive=False), worker("c", at_s=11)), requests(3))
    assert lost.handled == 0
    assert [figures.rate for figures in lost.workers] == [pytest.approx(10), 0]


@pytest.mark.parametrize(
    ("pending", "alive", "word"), [(0, True, "idle"), (5, True, "busy"), (5, False, "nobody works"), (0, False, "idle")]
)
def test_state_in_a_word(pending: int, alive: bool, word: str) -> None:
    """What the head of the view says."""
    figures = Watch().add(overview(0, worker(at_s=0, alive=alive), pending=pending), requests(1))
    assert state_of(figures)[0] == word


@pytest.mark.parametrize(
    ("points", "shown"),
    [
        ([], "     "),
        ([0.0, 0.0], "   ▁▁"),
        ([0.0, 7.0], "   ▁█"),
        ([1.0, None, 2.0], "  ▅ █"),
        ([9.0, 1.0, 1.0, 1.0, 1.0, 2.0], "▅▅▅▅█"),
    ],
)
def test_sparklines(points: list[float | None], shown: str) -> None:
    """The last points, the highest of those that are shown full."""
    assert sparkline(points, 5) == shown


def drawn(figures: Figures, width: int, height: int | None = None) -> list[str]:
    console = Console(width=width, file=StringIO(), record=True)
    console.print(frame(figures, title="s3://bucket/a/queue", width=width, height=height))
    return console.export_text().splitlines()


def crowd(number: int) -> Figures:
    watch = Watch()
    for at_s in (0, 10):
        workers = [worker(f"host-{n:04}", at_s=at_s, completed=n * at_s) for n in range(number)]
        waiting = {priority: 1000 * (priority + 1) for priority in range(20)}
        figures = watch.add(overview(at_s, *workers, pending=210_000, waiting=waiting), requests(at_s))
    return figures


@pytest.mark.parametrize("width", [60, 80, 100, 119, 120, 160, 240])
def test_fits(width: int) -> None:
    """No line is wider than the terminal, and what matters is there at each width."""
    lines = drawn(crowd(5), width)
    assert max(len(line) for line in lines) <= width
    text = "\n".join(lines)
    for part in (
        "s3queue top",
        "busy",
        "210,000",
        "p19",
        "lower priorities",
        "coordinator",
        "an hour",
        "host-0004",
        "ago",
    ):
        assert part in text


@pytest.mark.parametrize("size", [(80, 50), (80, 70), (160, 40), (160, 60), (200, 100)])
def test_many_workers_fit_the_height(size: tuple[int, int]) -> None:
    """Of a thousand workers as many are shown as there is room for, and the others are counted."""
    width, height = size
    lines = drawn(crowd(1000), width, height)
    assert len(lines) <= height
    assert any("more" in line for line in lines)
    assert "host-0999" in "\n".join(lines)


def test_a_lost_worker_comes_first() -> None:
    """Whoever needs attention is on top of the list."""
    watch = Watch()
    workers = [worker(f"w{n}", at_s=0) for n in range(50)] + [worker("zz", at_s=0, alive=False)]
    text = drawn(watch.add(overview(0, *workers), requests(1)), 80, 45)
    rows = [line for line in text if "ago" in line]
    assert "zz" in rows[0]
    assert "lost" in rows[0]
