"""``s3queue dead``: list, show, count, redrive and purge dead letters."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import click

from s3queue_async.cli.common import Moment, Target, command, limit_option, yes_option
from s3queue_async.cli.exits import Exit, Failed
from s3queue_async.cli.look import show
from s3queue_async.cli.screen import Screen, clock_time, fields_of, number, preview
from s3queue_async.clock import wall_clock
from s3queue_async.message import DeadMessage
from s3queue_async.queue import S3Queue

Where = Callable[[DeadMessage], bool]


def filters(body: Any) -> Any:
    """Options that choose dead letters; together they narrow."""
    for option in (
        click.option("--until", type=Moment(wall_clock, ago=True), help="Died before: ISO time, or a duration ago."),
        click.option("--since", type=Moment(wall_clock, ago=True), help="Died after: ISO time, or a duration ago."),
        click.option("--header", metavar="NAME=VALUE", multiple=True, help="Has this header."),
        click.option("--priority", type=click.IntRange(0, 255), help="Has this priority."),
        click.option("--error", metavar="REGEX", help="The error matches somewhere."),
    ):
        body = option(body)
    return body


def where_of(
    *,
    error: str | None,
    priority: int | None,
    header: tuple[str, ...],
    since: datetime | None,
    until: datetime | None,
) -> Where | None:
    """The filter that the options make; None when they make none."""
    tests: list[Where] = []
    if error is not None:
        try:
            pattern = re.compile(error)
        except re.error as wrong:
            raise click.BadParameter(f"{error!r} is no regular expression: {wrong}.", param_hint="--error") from wrong
        tests.append(lambda letter: pattern.search(letter.error) is not None)
    if priority is not None:
        tests.append(lambda letter: letter.priority == priority)
    for text in header:
        tests.append(_header_test(text))
    if since is not None:
        tests.append(lambda letter: letter.died_at >= since)
    if until is not None:
        tests.append(lambda letter: letter.died_at < until)
    return (lambda letter: all(test(letter) for test in tests)) if tests else None


def _header_test(text: str) -> Where:
    name, equals, value = text.partition("=")
    if not equals:
        raise click.BadParameter(f"{text!r} must be NAME=VALUE.", param_hint="--header")
    return lambda letter: letter.headers.get(name) == value


@click.group("dead", short_help="Dead letters: list, show, redrive, purge.")
def dead() -> None:
    """Messages that failed for good, and the way back."""


@command("list", short_help="List dead letters, or count them by error.")
@limit_option(100)
@click.option("--summary", is_flag=True, help="Count by error instead; reads all of them.")
@filters
async def list_(screen: Screen, target: Target, *, limit: int, summary: bool, **chosen: Any) -> None:
    """List dead letters, those that died first before the others."""
    where = where_of(**chosen)
    async with target.opened() as queue:
        if summary:
            await _summary(screen, queue, where)
            return
        shown = 0
        table = screen.table("", "id", "died (UTC)", "attempts", "error", "payload", right=("attempts",))
        with screen.progress("dead letters read") as tell:
            read = 0
            async for letter in queue.dead_letters.each():
                read += 1
                if where is not None and not where(letter):
                    tell(read)
                    continue
                shown += 1
                if screen.json:
                    screen.emit(fields_of(letter))
                else:
                    error, payload = preview(letter.error, 80), preview(letter.payload, 60)
                    table.add_row(letter.id, clock_time(letter.died_at), number(letter.attempts), error, payload)
                if shown == limit:
                    break
        if screen.json:
            return
        screen.say(table if shown else "No dead letters.")
        if shown == limit:
            screen.note(f"These are the first {limit:,}; --limit shows more, --summary counts all of them by error.")


async def _summary(screen: Screen, queue: S3Queue[Any], where: Where | None) -> None:
    with screen.progress("dead letters read") as tell:
        kinds = await queue.dead_letters.summary(where=where, on_progress=tell)
    if screen.json:
        for kind in kinds:
            screen.emit(kind)
        return
    table = screen.table("", "count", "error", "first (UTC)", "last (UTC)", "for example", right=("count",))
    for kind in kinds:
        table.add_row(number(kind.count), kind.error, clock_time(kind.first), clock_time(kind.last), kind.example)
    screen.say(table if kinds else "No dead letters.")


@command("redrive", short_help="Make dead letters ready again.")
@click.argument("ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@yes_option
@filters
async def redrive(
    screen: Screen, target: Target, *, ids: tuple[str, ...], everything: bool, yes: bool, **chosen: Any
) -> None:
    """Make dead letters ready again, with all their attempts before them.

    Name ids, or filter, or say --all. Unless ids are named, it asks first.
    """
    await _move(screen, target, ids, everything, yes, chosen, redrives=True)


@command("purge", short_help="Delete dead letters.")
@click.argument("ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them.")
@yes_option
@filters
async def purge(
    screen: Screen, target: Target, *, ids: tuple[str, ...], everything: bool, yes: bool, **chosen: Any
) -> None:
    """Delete dead letters for good: those with these ids, those that the filters choose, or --all. It asks first."""
    await _move(screen, target, ids, everything, yes, chosen, redrives=False)


async def _move(
    screen: Screen,
    target: Target,
    ids: tuple[str, ...],
    everything: bool,
    yes: bool,
    chosen: dict[str, Any],
    *,
    redrives: bool,
) -> None:
    where = where_of(**chosen)
    if not ids and where is None and not everything:
        raise click.UsageError("Name ids, or use a filter, or say --all.")
    if ids and everything:
        raise click.UsageError("Ids and --all exclude each other.")
    verb, done = ("redrive", "redriven") if redrives else ("purge", "purged")
    async with target.opened() as queue:
        dead = (await queue.stats()).dead
        which = f"{len(ids):,} named" if ids else "those that match" if where is not None else "all"
        screen.confirm(f"{verb.capitalize()} {which} of {dead:,} dead letters?", yes=yes or (redrives and bool(ids)))
        move = queue.dead_letters.redrive if redrives else queue.dead_letters.purge
        with screen.progress(done, total=None if where is not None else len(ids) or dead) as tell:
            count = await move(ids or None, where=where, on_progress=tell)
    if screen.json:
        screen.emit({done: count})
    else:
        screen.say(f"{count:,} {done}.")
    if ids and where is None and count < len(set(ids)):
        raise Failed(
            Exit.NOT_FOUND,
            f"{len(set(ids)) - count:,} of the ids are not among the dead letters, or somebody else is at them.",
            "s3queue dead list shows which there are; s3queue show ID says where a message is.",
        )


for _command in (list_, show, redrive, purge):
    dead.add_command(_command)

COMMANDS = (dead,)
