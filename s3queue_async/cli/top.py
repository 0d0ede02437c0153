"""``s3queue top``: the queue, live."""

from __future__ import annotations

from typing import Any

import click
from rich.live import Live

from s3queue_async.cli.common import Seconds, Target, command
from s3queue_async.cli.figures import Figures, Requests, Watch
from s3queue_async.cli.screen import Screen, fields_of
from s3queue_async.cli.top_view import frame
from s3queue_async.clock import SystemClock
from s3queue_async.errors import StoreUnavailable, Throttled
from s3queue_async.queue import S3Queue
from s3queue_async.storage.metered import OPERATIONS

CLOCK = SystemClock()


@command("top", short_help="Watch the queue live.")
@click.option("--interval", type=Seconds(), default="2s", show_default=True, help="Between two looks.")
@click.option("--looks", "-n", type=click.IntRange(1), help="End after so many looks; without a terminal: 1.")
async def top(screen: Screen, target: Target, *, interval: float, looks: int | None) -> None:
    """Watch the queue until Ctrl-C: backlog by priority, rates, latencies, workers, coordinator, throttling and cost.

    Workers tell what they did with their heartbeats, so rates and latencies are as fresh as those. A look takes four
    listings or more; the view shows what that costs. With --json, each look is a line.
    """
    title = target.url.partition("?")[0]
    live = screen.out.is_terminal and not screen.json
    left = looks if looks is not None else None if live or screen.json else 1
    watch = Watch()
    async with target.opened() as queue:
        figures = await look(queue, watch)
        if not live:
            while True:
                if screen.json:
                    screen.emit(figures_fields(figures))
                else:
                    screen.say(frame(figures, title=title, width=screen.out.width))
                left = None if left is None else left - 1
                if left == 0:
                    return
                await CLOCK.sleep(interval)
                figures = await look(queue, watch)
        with Live(console=screen.out, screen=True, auto_refresh=False) as view:
            while True:
                size = screen.out.size
                view.update(frame(figures, title=title, width=size.width, height=size.height), refresh=True)
                left = None if left is None else left - 1
                if left == 0:
                    return
                await CLOCK.sleep(interval)
                try:
                    figures = await look(queue, watch)
                except (StoreUnavailable, Throttled) as error:
                    # Whoever watches a store in trouble wants to go on watching.
                    if not error.retriable:
                        raise
                    title = f"{target.url.partition('?')[0]} (no answer: {error.args[0]})"
                else:
                    title = target.url.partition("?")[0]


async def look(queue: S3Queue[Any], watch: Watch) -> Figures:
    """Look once more."""
    overview = await queue.overview()
    made = queue.requests()
    counts = {name: getattr(made, name) for name in OPERATIONS}
    return watch.add(
        overview,
        Requests(
            {name: count.attempts for name, count in counts.items()},
            made.throttled,
            sum(count.seconds for count in counts.values()),
        ),
    )


def figures_fields(figures: Figures) -> dict[str, Any]:
    """A look as JSON: without the course of things, which the lines before it tell."""
    fields = fields_of(figures)
    del fields["trends"]
    overview = fields.pop("overview")
    workers = [{**fields_of(worker.info), **_less_info(worker)} for worker in fields.pop("workers")]
    return {**fields_of(overview), **fields, "workers": workers}


def _less_info(worker: Any) -> dict[str, Any]:
    fields = fields_of(worker)
    del fields["info"]
    return fields


COMMANDS = (top,)
