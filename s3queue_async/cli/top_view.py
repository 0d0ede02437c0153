"""How ``s3queue top`` looks: one frame from figures, for any width."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from s3queue_async.cli.figures import Figures, WorkerFigures, sparkline
from s3queue_async.cli.screen import number, span

WIDE = 120
PRIORITIES_MAX = 8
WORKERS_MIN = 3
LEADS = "◆"
MONEY_DIGITS = 4


def frame(figures: Figures, *, title: str, width: int, height: int | None = None) -> RenderableType:
    """Everything, in one column or two.

    Args:
        figures: What to show.
        title: What names the queue.
        width: Columns of the terminal.
        height: Its lines; as many workers are listed as fit. None: all of them.
    """
    inner = width // 2 if width >= WIDE else width
    counts = _panel("messages", _counts(figures))
    backlog = _panel("waiting by priority", _backlog(figures, inner - 4))
    trends = _panel("course", _trends(figures, inner - 4))
    store = _panel("coordination and store", _store(figures))
    head = _head(figures, title, width)
    if width >= WIDE:
        body: RenderableType = _columns(Group(counts, backlog), Group(trends, store))
        used = 1 + max(_lines(figures, 4) + 11, 16)
    else:
        body = Group(counts, backlog, trends, store)
        used = 1 + 9 + _lines(figures, 2) + 7 + 8
    room = None if height is None else max(WORKERS_MIN, height - used - 4)
    return Group(head, body, _panel("workers", _workers(figures, width, room)))


def _lines(figures: Figures, least: int) -> int:
    return max(least, min(PRIORITIES_MAX, len(figures.overview.waiting))) + 2


def _panel(title: str, inside: RenderableType) -> Panel:
    return Panel(inside, title=title, title_align="left", box=box.ROUNDED, border_style="bright_black", padding=(0, 1))


def _columns(left: RenderableType, right: RenderableType) -> Table:
    grid = Table.grid(expand=True)
    grid.add_column(ratio=1)
    grid.add_column(ratio=1)
    grid.add_row(left, right)
    return grid


def state_of(figures: Figures) -> tuple[str, str]:
    """The queue's state in a word, and its colour."""
    stats = figures.overview.stats
    if figures.throttled_per_minute > 0:
        return "throttled", "bold yellow"
    if stats.pending and not any(worker.info.alive for worker in figures.workers):
        return "nobody works", "bold red"
    if stats.pending or stats.processing:
        return "busy", "bold green"
    return "idle", "bold cyan"


def _head(figures: Figures, title: str, width: int) -> Text:
    word, style = state_of(figures)
    when = figures.overview.at.strftime("%H:%M:%S UTC")
    name = title if len(title) <= width - 40 else "…" + title[-(width - 41) :]
    left = Text.assemble(("s3queue top  ", "bold"), name, "  ", (word, style))
    left.append(" " * max(1, width - left.cell_len - len(when)))
    left.append(when, "bright_black")
    return left


def _pairs(rows: list[tuple[str, RenderableType, str, RenderableType]]) -> Table:
    grid = Table.grid(expand=True, padding=(0, 2))
    for _ in range(2):
        grid.add_column(style="bright_black", no_wrap=True)
        grid.add_column(justify="right", ratio=1, no_wrap=True)
    for row in rows:
        grid.add_row(*row)
    return grid


def _counts(figures: Figures) -> Table:
    stats = figures.overview.stats
    at_least = "" if stats.complete else "≥ "
    oldest = Text(span(stats.oldest_age), "yellow" if (stats.oldest_age or 0) > 60 else "")
    dead = Text(at_least + number(stats.dead), "red" if stats.dead else "")
    return _pairs(
        [
            ("pending", Text(at_least + number(stats.pending), "bold"), "arriving", _rate(figures.arriving)),
            ("processing", number(stats.processing), "handled", _rate(figures.handled)),
            ("delayed", at_least + number(stats.delayed), "failing", _rate(figures.failing, bad=True)),
            ("dead letters", dead, "oldest pending", oldest),
            ("completed so far", number(stats.completed), "done in about", _eta(figures)),
        ]
    )


def _rate(value: float, *, bad: bool = False) -> Text:
    return Text(f"{number(value)}/s", "red" if bad and value > 0 else "")


def _eta(figures: Figures) -> str:
    surplus = figures.handled - figures.arriving
    pending = figures.overview.stats.pending
    if not pending:
        return "-"
    return span(pending / surplus) if surplus > 0 else "never, at this pace"


def _backlog(figures: Figures, width: int) -> RenderableType:
    waiting = sorted(figures.overview.waiting.items(), reverse=True)
    if not waiting:
        return Text("nothing waits", "bright_black")
    more = waiting[PRIORITIES_MAX - 1 :] if len(waiting) > PRIORITIES_MAX else []
    shown = waiting[: len(waiting) - len(more)]
    top = max(1, *(count for _, count in waiting))
    room = max(5, width - 5 - 14)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(justify="right", style="bright_black", width=4)
    grid.add_column(width=room, no_wrap=True)
    grid.add_column(justify="right", min_width=10)
    for priority, count in shown:
        grid.add_row(f"p{priority}", Text("█" * max(1, round(count / top * room)), "green"), number(count))
    if more:
        rest = sum(count for _, count in more)
        grid.add_row("…", Text(f"{len(more)} lower priorities", "bright_black"), number(rest))
    return grid


def _trends(figures: Figures, width: int) -> Table:
    room = max(10, width - 17 - 12)
    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="bright_black", width=16, no_wrap=True)
    grid.add_column(width=room, no_wrap=True)
    grid.add_column(justify="right", width=11, no_wrap=True)
    latest = figures.trends
    for label, name, style, value in (
        ("pending", "backlog", "green", number(figures.overview.stats.pending)),
        ("handled", "handled", "green", f"{number(figures.handled)}/s"),
        ("handler", "handler", "cyan", span(figures.handler_s)),
        ("enqueue to end", "latency", "cyan", span(figures.latency_s)),
        ("store's answer", "store", "magenta", span(figures.store_s)),
    ):
        grid.add_row(label, Text(sparkline(latest.get(name, ()), room), style), value)
    return grid


def _store(figures: Figures) -> Table:
    info = figures.overview.coordinator
    grid = Table.grid(expand=True, padding=(0, 2))
    grid.add_column(style="bright_black", no_wrap=True)
    grid.add_column(ratio=1, overflow="ellipsis", no_wrap=True)
    if info is None:
        grid.add_row("coordinator", Text("none yet", "bright_black"))
    else:
        style = "" if info.state == "leading" else "yellow"
        name = info.worker_id if not style else f"{info.worker_id} ({info.state})"
        grid.add_row("coordinator", Text.assemble((f"{LEADS} ", "cyan"), (name, style)))
        board = f"{info.term}, board {span(info.board_age)} old, {number(info.tickets)} tickets"
        grid.add_row("term", board)
    throttled = figures.throttled_per_minute
    grid.add_row("throttled", Text(f"{number(throttled)} requests a minute", "bold yellow" if throttled else ""))
    grid.add_row("workers cost", f"{_money(figures.cost_per_hour)} an hour at S3's list prices")
    grid.add_row("this view costs", f"{_money(figures.own_cost_per_hour)} an hour")
    return grid


def _money(dollars: float) -> str:
    return f"${dollars:,.2f}" if dollars >= 1 else f"${dollars:.{MONEY_DIGITS}f}"


def _workers(figures: Figures, width: int, room: int | None) -> RenderableType:
    if not figures.workers:
        return Text("none is registered", "bright_black")
    # Whoever needs attention first, then whoever does most.
    ordered = sorted(figures.workers, key=lambda worker: (worker.info.alive, -worker.rate, worker.info.id))
    shown = ordered if room is None or len(ordered) <= room else ordered[: max(1, room - 1)]
    wide = width >= WIDE
    table = Table(box=None, expand=True, pad_edge=False, header_style="bright_black", padding=(0, 1))
    table.add_column("  worker", ratio=1, overflow="ellipsis", no_wrap=True)
    table.add_column("running", justify="right", no_wrap=True)
    table.add_column("done/s", justify="right", no_wrap=True)
    if wide:
        for name in ("completed", "failed", "dead", "handler", "throttled/min", "$/hour"):
            table.add_column(name, justify="right", no_wrap=True)
    table.add_column("heartbeat", justify="right", no_wrap=True)
    info = figures.overview.coordinator
    leader = info.worker_id if info is not None and info.state == "leading" else ""
    for worker in shown:
        table.add_row(*_worker_row(worker, wide=wide, leads=worker.info.id == leader))
    if len(shown) < len(ordered):
        table.add_row(Text(f"… and {len(ordered) - len(shown):,} more", "bright_black"))
    return table


def _worker_row(worker: WorkerFigures, *, wide: bool, leads: bool) -> list[RenderableType]:
    info = worker.info
    name = Text.assemble((LEADS if leads else " ", "cyan"), " ", (info.id, "" if info.alive else "red"))
    row: list[RenderableType] = [name, f"{number(info.in_flight)}/{number(info.capacity)}", number(worker.rate)]
    if wide:
        throttled = Text(number(worker.throttled_per_minute), "yellow" if worker.throttled_per_minute else "")
        handler_s = info.handler_seconds / info.completed if info.completed else None
        row += [number(info.completed), Text(number(info.failed), "red" if info.failed else ""),
                Text(number(info.dead), "red" if info.dead else ""), span(handler_s), throttled,
                _money(worker.cost_per_hour)]  # fmt: skip
    age = f"{span(info.heartbeat_age)} ago"
    row.append(Text(age) if info.alive else Text(f"lost, {age}", "bold red"))
    return row
