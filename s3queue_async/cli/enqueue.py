"""``s3queue enqueue``: messages from arguments, files and pipes."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import click

from s3queue_async.cli.common import Moment, Seconds, Target, command, settings_with
from s3queue_async.cli.feeding import RESUME_WINDOW_S, Feeder, Item, Options
from s3queue_async.cli.reading import Format, Input, argument_payload
from s3queue_async.cli.screen import Screen
from s3queue_async.clock import wall_clock
from s3queue_async.protocol import layout
from s3queue_async.settings import Settings

NAME = re.compile(r"[A-Za-z0-9._-]{1,200}")


@command("enqueue", short_help="Enqueue messages: arguments, files, stdin.")
@click.argument("payloads", nargs=-1)
@click.option("--file", "-f", "path", metavar="FILE", help="Read messages from a file, one a line; - for stdin.")
@click.option(
    "--format", "kind", type=click.Choice(["auto", "json", "text", "csv"]), default="auto", show_default=True,
    help="What a line or an argument is. auto: arguments are JSON where they can be, files by their suffix, stdin JSON.",
)  # fmt: skip
@click.option("--priority", type=click.IntRange(0, layout.PRIORITY_MAX), default=0, show_default=True)
@click.option("--delay", type=Seconds(), help="Deliver them so much later.")
@click.option("--deliver-at", type=Moment(wall_clock, ago=False), help="Deliver them then.")
@click.option("--header", metavar="NAME=VALUE", multiple=True, help="Goes along; may be repeated.")
@click.option("--max-attempts", type=click.IntRange(1, 10_000), help="Instead of the queue's.")
@click.option("--expires-in", type=Seconds(), help="Do not start them any more after this long.")
@click.option("--dedup-id", metavar="ID", help="Deduplication id of the one message.")
@click.option("--dedup-field", metavar="NAME", help="The field or column that is each message's deduplication id.")
@click.option("--resume", metavar="NAME", help="Name this input, so that the same command goes on after a failure.")
@click.option("--ids", is_flag=True, help="Print every id, also for files.")
async def enqueue(
    screen: Screen,
    target: Target,
    *,
    payloads: tuple[str, ...],
    path: str | None,
    kind: Format,
    dedup_id: str | None,
    dedup_field: str | None,
    resume: str | None,
    ids: bool,
    **how: Any,
) -> None:
    """Enqueue each argument as a message, or each line of a file: JSON, text, or rows of CSV (with a first line of names).

    A long input is enqueued piece by piece. With --resume, each line has a deduplication id, and the queue remembers how
    far it came: after a failure the same command goes on, and nothing is enqueued twice (docs/cli.md has the limits).
    """
    _check(payloads, path, dedup_id, dedup_field, resume)
    options = options_of(**how)
    source = None if path is None else Input(path, kind)

    async def batches() -> AsyncIterator[list[Item]]:
        if source is None:
            yield [
                Item(number, payload, options, _dedup(payload, number, dedup_id, dedup_field))
                for number, payload in enumerate((argument_payload(text, kind) for text in payloads), 1)
            ]
            return
        async for lines in source.batches():
            yield [
                Item(line, payload, options, f"{resume}:{line}" if resume else _dedup(payload, line, None, dedup_field))
                for line, payload in lines
            ]

    settings = settings_with(dedup_window=RESUME_WINDOW_S) if resume else Settings(coordinator=False)
    wants_ids = ids or source is None
    async with target.opened(create=True, settings=settings) as queue:
        storage = target.storage()
        await storage.open()
        try:
            with screen.progress("enqueued") as tell:

                def told(done: int, note: str = "") -> None:
                    size = None if source is None else source.size
                    tell(done, f"{source.read / size:.0%} read" if source and size else note)

                fed = await Feeder(queue, storage, resume).feed(batches(), told, keep_ids=wants_ids)
        finally:
            await storage.close()
    if wants_ids:
        for message_id in fed.ids:
            if screen.json:
                screen.emit({"id": message_id})
            else:
                screen.say(message_id)
    if source is None:
        return
    if screen.json:
        screen.emit({"enqueued": fed.enqueued, "skipped": fed.skipped})
    else:
        earlier = f" ({fed.skipped:,} by an earlier run)" if fed.skipped else ""
        screen.note(f"{fed.enqueued:,} messages enqueued{earlier}.")


def _check(
    payloads: tuple[str, ...], path: str | None, dedup_id: str | None, dedup_field: str | None, resume: str | None
) -> None:
    if bool(payloads) == (path is not None):
        raise click.UsageError("Pass messages as arguments, or a file with --file (- for stdin).")
    if dedup_id is not None and len(payloads) != 1:
        raise click.UsageError("--dedup-id is for one message; --dedup-field and --resume are for many.")
    if resume is not None and (path is None or dedup_field is not None or NAME.fullmatch(resume) is None):
        raise click.UsageError(
            "--resume needs a --file and no --dedup-field; its name has letters, digits, '.', '_' and '-' only."
        )


def options_of(
    *,
    priority: int,
    delay: float | None,
    deliver_at: datetime | None,
    header: tuple[str, ...],
    max_attempts: int | None,
    expires_in: float | None,
) -> Options:
    """The options of all messages of one command."""
    pairs = []
    for text in header:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter(f"{text!r} must be NAME=VALUE.", param_hint="--header")
        pairs.append((name, value))
    return Options(priority, delay, deliver_at, tuple(pairs), max_attempts, expires_in)


def _dedup(payload: Any, line: int, dedup_id: str | None, field: str | None) -> str | None:
    if field is None:
        return dedup_id
    value = payload.get(field) if isinstance(payload, dict) else None
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise click.ClickException(f"Line {line:,} has no field {field!r} with a text or a whole number in it.")
    return str(value)


COMMANDS = (enqueue,)
