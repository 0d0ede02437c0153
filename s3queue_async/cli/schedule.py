"""``s3queue schedule``: messages at certain times."""

from __future__ import annotations

import click

from s3queue_async.cli.common import Seconds, Target, command, yes_option
from s3queue_async.cli.exits import Exit, Failed
from s3queue_async.cli.reading import Format, argument_payload
from s3queue_async.cli.screen import Screen, clock_time, fields_of, preview, span
from s3queue_async.scheduling import Schedule


@click.group("schedule", short_help="Messages at certain times: list, add, remove.")
def schedule() -> None:
    """Cron expressions and intervals; each tick is enqueued once, see docs/scheduling.md."""


@command("list", short_help="List the schedules.")
async def list_(screen: Screen, target: Target) -> None:
    """List the schedules with their last and next ticks (UTC)."""
    async with target.opened() as queue:
        found = await queue.schedules()
    if screen.json:
        for one in found:
            screen.emit(fields_of(one))
        return
    table = screen.table("", "name", "when", "last", "next", "payload")
    for one in found:
        table.add_row(
            one.name, _when(one), clock_time(one.last_tick), clock_time(one.next_tick), preview(one.payload, 60)
        )
    screen.say(table if found else "No schedules.")


@command("add", short_help="Add a schedule, or change it.")
@click.argument("payload")
@click.option("--cron", metavar="FIELDS", help="Five fields as for cron, or six with seconds first.")
@click.option("--every", type=Seconds(), help="An interval, instead of --cron.")
@click.option("--name", help="What tells it apart; by default made of everything else.")
@click.option("--timezone", default="UTC", show_default=True, help="Of the cron expression, such as Europe/Berlin.")
@click.option("--format", "kind", type=click.Choice(["auto", "json", "text"]), default="auto", show_default=True)
@click.option("--priority", type=click.IntRange(0, 255), default=0, show_default=True)
async def add(
    screen: Screen,
    target: Target,
    *,
    payload: str,
    cron: str | None,
    every: float | None,
    name: str | None,
    timezone: str,
    kind: Format,
    priority: int,
) -> None:
    """Enqueue PAYLOAD at certain times; the same name changes a schedule that is there."""
    if (cron is None) == (every is None):
        raise click.UsageError("Pass --cron or --every.")
    async with target.opened(create=True) as queue:
        found = await queue.schedule(
            cron, argument_payload(payload, kind), every=every, name=name, timezone=timezone, priority=priority
        )
    if screen.json:
        screen.emit(fields_of(found))
    else:
        screen.say(f"{found.name}: {_when(found)}, next {clock_time(found.next_tick)} UTC")


@command("remove", short_help="Remove a schedule.")
@click.argument("name")
@yes_option
async def remove(screen: Screen, target: Target, *, name: str, yes: bool) -> None:
    """Remove a schedule; what it has enqueued stays."""
    async with target.opened() as queue:
        screen.confirm(f"Remove the schedule {name!r}?", yes=yes)
        there = await queue.unschedule(name)
    if not there:
        raise Failed(Exit.NOT_FOUND, f"There is no schedule {name!r}.", "s3queue schedule list shows which there are.")
    if screen.json:
        screen.emit({"removed": name})
    else:
        screen.say(f"{name} removed.")


def _when(one: Schedule) -> str:
    if one.cron is not None:
        return f"{one.cron} ({one.timezone})"
    return f"every {span(one.every)}"


for _command in (list_, add, remove):
    schedule.add_command(_command)

COMMANDS = (schedule,)
