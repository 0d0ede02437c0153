"""``s3queue tail``: follow what arrives, what dies, and what is completed."""

from __future__ import annotations

import anyio
import click

from s3queue_async.cli.common import Seconds, Target, command
from s3queue_async.cli.look import print_message
from s3queue_async.cli.screen import Screen, clock_time, fields_of, span
from s3queue_async.clock import SystemClock
from s3queue_async.looks import MessageInfo
from s3queue_async.message import CompletedMessage

CLOCK = SystemClock()


@command("tail", short_help="Follow messages as they arrive, die, or are completed.")
@click.option("--interval", type=Seconds(), default="1s", show_default=True, help="Between two looks.")
@click.option("--for", "duration", type=Seconds(), help="End after this long.")
@click.option("--limit", "-n", type=click.IntRange(1), help="End after so many messages.")
@click.option(
    "--burst", type=click.IntRange(1), default=100, show_default=True, help="Show so many a look, count the rest."
)
async def tail(
    screen: Screen, target: Target, *, interval: float, duration: float | None, limit: int | None, burst: int
) -> None:
    """Follow a queue from outside, until Ctrl-C.

    A look lists what is new. A message that is enqueued and handled between two looks is not seen; completed ones are
    seen where retain_completed keeps a history.
    """
    shown = 0
    async with target.opened() as queue:
        follower = queue.follow()
        with anyio.move_on_after(duration):
            while limit is None or shown < limit:
                await CLOCK.sleep(interval)
                most = burst if limit is None else min(burst, limit - shown)
                news = await follower.look(limit=most)
                for info in news.messages:
                    _print(screen, info)
                shown += len(news.messages)
                if news.skipped:
                    if screen.json:
                        screen.emit({"skipped": news.skipped})
                    else:
                        screen.say(f"… and {news.skipped:,} more")


def _print(screen: Screen, info: MessageInfo | CompletedMessage) -> None:
    if isinstance(info, MessageInfo):
        print_message(screen, info)
    elif screen.json:
        screen.emit({"state": "completed", **fields_of(info)})
    else:
        screen.say(
            f"{info.id}  completed  in {span(info.duration)} at {clock_time(info.completed_at)} by {info.worker_id}"
        )


COMMANDS = (tail,)
