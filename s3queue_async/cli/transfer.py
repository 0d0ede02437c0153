"""``s3queue export`` and ``s3queue import``: a queue's messages as JSON lines."""

from __future__ import annotations

import math
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import click
import msgspec

from s3queue_async.cli.common import Target, command, settings_with
from s3queue_async.cli.exits import Exit, Failed
from s3queue_async.cli.feeding import RESUME_WINDOW_S, Feeder, Item, Options
from s3queue_async.cli.look import PLACES
from s3queue_async.cli.reading import Input
from s3queue_async.cli.screen import Screen, payload_fields, payload_of
from s3queue_async.clock import wall_clock
from s3queue_async.looks import MessageInfo


class Line(msgspec.Struct, omit_defaults=True, kw_only=True):
    """A message as it is exported, without its payload, which has one of three names."""

    id: str = ""
    state: str = ""
    priority: int = 0
    enqueued_at: datetime | None = None
    deliver_at: datetime | None = None
    expires_at: datetime | None = None
    attempts: int = 0
    max_attempts: int | None = None
    dedup_id: str | None = None
    headers: dict[str, str] = {}
    error: str = ""


@command("export", short_help="Write the messages as JSON lines.")
@click.option("--output", "-o", metavar="FILE", help="Write to a file that is not there yet, instead of stdout.")
@click.option("--place", type=click.Choice(PLACES), multiple=True, help="Which.  [default: ready, delayed]")
@click.option("--limit", "-n", type=click.IntRange(1), help="At most so many.")
async def export(
    screen: Screen, target: Target, *, output: str | None, place: tuple[str, ...], limit: int | None
) -> None:
    """Write every message as a line of JSON, held ones included; nothing is claimed or deleted.

    It is no snapshot: stop the workers and producers first where each message must be there exactly once.
    """
    count = 0
    async with target.opened() as queue:
        with ExitStack() as stack:
            out: Any = sys.stdout.buffer
            if output is not None:
                out = stack.enter_context(_new_file(output))
            tell = stack.enter_context(screen.progress("exported"))
            async for info in queue.browse(*place, limit=limit):
                out.write(msgspec.json.encode({**exported(info), **payload_fields(info.payload)}) + b"\n")
                count += 1
                tell(count)
            out.flush()
    if output is not None and screen.json:
        screen.emit({"exported": count})
    else:
        screen.note(f"{count:,} messages exported.")


def _new_file(path: str) -> BinaryIO:
    # Never over something that is there: it might be the only copy.
    return Path(path).open("xb")


def exported(info: MessageInfo) -> dict[str, Any]:
    """A message's line, without what is as usual."""
    line = Line(
        id=info.id,
        state=info.state.value,
        priority=info.priority,
        enqueued_at=info.enqueued_at,
        deliver_at=info.due_at,
        expires_at=info.expires_at,
        attempts=info.attempts,
        max_attempts=info.max_attempts,
        dedup_id=info.dedup_id,
        headers=dict(info.headers),
        error=info.error,
    )
    fields: dict[str, Any] = msgspec.to_builtins(line)
    return fields


@command("import", short_help="Enqueue what export wrote.")
@click.argument("path", metavar="FILE")
@click.option("--no-dedup", is_flag=True, help="Without deduplication ids: faster, and a second run enqueues it again.")
@click.option("--resume", metavar="NAME", help="Name this input, so that the same command goes on after a failure.")
async def import_(screen: Screen, target: Target, *, path: str, no_dedup: bool, resume: str | None) -> None:
    """Enqueue the messages of a file that export wrote (- for stdin): payload, priority, headers, times, limits.

    Attempts begin anew, dead letters become ready, and ids are new. Each message is deduplicated by the id that it had,
    or by its own deduplication id, so that a second run adds nothing.
    """
    source = Input(path, "json")

    async def batches() -> AsyncIterator[list[Item]]:
        async for lines in source.batches():
            now = datetime.fromtimestamp(wall_clock(), UTC)
            yield [_item(source, number, line, now, dedup=not no_dedup) for number, line in lines]

    async with target.opened(create=True, settings=settings_with(dedup_window=RESUME_WINDOW_S)) as queue:
        storage = target.storage()
        await storage.open()
        try:
            with screen.progress("imported") as tell:
                fed = await Feeder(queue, storage, resume).feed(batches(), tell, keep_ids=False)
        finally:
            await storage.close()
    if screen.json:
        screen.emit({"imported": fed.enqueued, "skipped": fed.skipped})
    else:
        earlier = f" ({fed.skipped:,} by an earlier run)" if fed.skipped else ""
        screen.say(f"{fed.enqueued:,} messages imported{earlier}.")


def _item(source: Input, number: int, fields: Any, now: datetime, *, dedup: bool) -> Item:
    try:
        if not isinstance(fields, dict):
            raise ValueError("it is no object")
        payload = payload_of(fields)
        line = msgspec.convert(fields, Line)
    except (ValueError, msgspec.MsgspecError) as error:
        raise Failed(
            Exit.USAGE, f"{source.name}, line {number:,}, is not what export writes: {error}.", "See docs/cli.md."
        ) from error
    due = line.deliver_at if line.deliver_at is not None and line.deliver_at > now else None
    expires_in = None
    if line.expires_at is not None:
        # What has expired meanwhile becomes a dead letter at once, as it would have there.
        # Whole seconds, because messages of equal options travel together.
        expires_in = max(0.001, math.ceil((line.expires_at - now).total_seconds()))
    options = Options(
        priority=line.priority,
        deliver_at=due,
        headers=tuple(line.headers.items()),
        max_attempts=line.max_attempts,
        expires_in=expires_in,
    )
    return Item(number, payload, options, (line.dedup_id or f"import:{line.id}") if dedup and line.id else None)


COMMANDS = (export, import_)
