"""Commands that change a queue, or say how it is configured: purge, coordinator, config."""

from __future__ import annotations

import os
from typing import Any

import anyio
import click
import msgspec

from s3queue_async.cli.common import Seconds, Target, command, yes_option
from s3queue_async.cli.exits import Exit, Failed
from s3queue_async.cli.screen import Screen, span
from s3queue_async.clock import SystemClock
from s3queue_async.looks import CoordinatorInfo
from s3queue_async.queue import URL_VARIABLE, S3Queue
from s3queue_async.settings import ENVIRONMENT_PREFIX, Settings

CLOCK = SystemClock()
LOOK_EVERY_S = 0.5


@command("purge", short_help="Delete every message that waits.")
@yes_option
async def purge(screen: Screen, target: Target, *, yes: bool) -> None:
    """Delete every message that waits, delayed ones included. Those that are being handled stay, dead letters, too."""
    async with target.opened() as queue:
        before = await queue.stats()
        at_least = "" if before.complete else "at least "
        waiting = before.pending + before.delayed
        screen.confirm(f"Delete {at_least}{waiting:,} waiting messages of {target.url.partition('?')[0]}?", yes=yes)
        with screen.progress("deleted", total=waiting if before.complete else None) as tell:
            count = await queue.purge(on_progress=tell)
    if screen.json:
        screen.emit({"purged": count})
    else:
        screen.say(f"{count:,} deleted.")


@click.group("coordinator", short_help="Who coordinates the workers, and how to change that.")
def coordinator() -> None:
    """The worker that lists for all others; nothing depends on it, see docs/coordinator.md."""


@command("show", short_help="Show who coordinates.")
async def coordinator_show(screen: Screen, target: Target) -> None:
    """Show who coordinates, by the board that it publishes."""
    async with target.opened() as queue:
        _print(screen, await queue.coordinator.show())


@command("step-down", short_help="Have another worker coordinate.")
@click.option(
    "--wait", type=Seconds(), default="30s", show_default=True, help="For the next coordinator; 0 does not wait."
)
@yes_option
async def step_down(screen: Screen, target: Target, *, wait: float, yes: bool) -> None:
    """Resign in the coordinator's place, so that another worker takes over. No message is touched.

    Where there is one worker only, it takes over again after four election intervals.
    """
    async with target.opened() as queue:
        before = await queue.coordinator.show()
        if before is None or before.state != "leading":
            raise Failed(Exit.NOT_FOUND, "Nobody coordinates now.", "Workers list for themselves meanwhile.")
        screen.confirm(f"Have {before.worker_id} (term {before.term}) step down?", yes=yes)
        await queue.coordinator.step_down()
        if not screen.json:
            screen.say(f"{before.worker_id} was asked to step down.")
        after = await _next(queue, before.term, wait)
        _print(screen, after)
        if wait and (after is None or after.term == before.term):
            raise Failed(Exit.PARTLY, f"Nobody has taken over within {span(wait)}.", "s3queue workers lists who could.")


async def _next(queue: S3Queue[Any], term: int, wait_s: float) -> CoordinatorInfo | None:
    with anyio.move_on_after(wait_s):
        while wait_s > 0:
            found = await queue.coordinator.show()
            if found is not None and found.term > term:
                return found
            await CLOCK.sleep(LOOK_EVERY_S)
    return await queue.coordinator.show()


def _print(screen: Screen, info: CoordinatorInfo | None) -> None:
    if screen.json:
        screen.emit(info)
    elif info is None:
        screen.say("There was no coordinator yet.")
    else:
        screen.say(
            f"{info.worker_id}, term {info.term}: {info.state}; {info.workers} workers, {info.tickets} tickets; "
            f"the board is {span(info.board_age)} old"
        )


for _command in (coordinator_show, step_down):
    coordinator.add_command(_command)


@command("config", short_help="Show every setting, and where it comes from.")
async def config(screen: Screen, target: Target) -> None:
    """Show every setting that a process started here would have, and where it comes from.

    segment_age and claim_linger are fixed by the queue: what it was made with counts.
    """
    settings = Settings().with_environment()
    source = dict.fromkeys(Settings.__struct_fields__, "default")
    for name in source:
        variable = f"{ENVIRONMENT_PREFIX}{name.upper()}"
        if variable in os.environ:
            source[name] = variable
    storage = repr(target.storage())
    try:
        async with target.opened(settings=Settings()) as queue:
            there = True
            for name in ("segment_age", "claim_linger"):
                if getattr(queue.settings, name) != getattr(settings, name):
                    source[name] = "queue.json"
            settings = queue.settings
    except Failed as missing:
        if missing.code is not Exit.NOT_FOUND:
            raise
        there = False
    values = msgspec.structs.asdict(settings)
    if screen.json:
        rows = {name: {"value": value, "from": source[name]} for name, value in values.items()}
        screen.emit({"url": target.url, "storage": storage, "exists": there, "settings": rows})
        return
    where = URL_VARIABLE if os.environ.get(URL_VARIABLE) == target.url else "--url"
    screen.say(f"{target.url} (from {where}): {storage}" + ("" if there else ", where no queue is yet"))
    table = screen.table("", "setting", "value", "from", right=("value",))
    for name, value in values.items():
        table.add_row(name, str(value), source[name])
    screen.say(table)


COMMANDS = (purge, coordinator, config)
