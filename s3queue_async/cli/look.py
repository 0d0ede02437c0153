"""Commands that look: stats, peek, show, workers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import click
import msgspec

from s3queue_async.cli.common import Target, command, limit_option
from s3queue_async.cli.screen import Screen, clock_time, fields_of, number, preview, span
from s3queue_async.looks import MessageInfo
from s3queue_async.protocol import layout

PLACES = ("ready", "delayed", "dead")


@command("stats", short_help="Count the messages by state.")
@click.option("--exact", is_flag=True, help="List everything; otherwise up to 10,000 segments of a kind are looked at.")
async def stats(screen: Screen, target: Target, *, exact: bool) -> None:
    """Count the queue's messages by state, with the totals since its creation."""
    async with target.opened() as queue, screen.waiting(queue, "counting"):
        found = await queue.stats(exact=exact)
    if screen.json:
        screen.emit(found)
        return
    table = screen.table(target.url.partition("?")[0], "", "messages", right=("messages",))
    at_least = "" if found.complete else "at least "
    for name in ("pending", "delayed", "processing", "dead"):
        table.add_row(name, at_least + number(getattr(found, name)))
    table.add_section()
    for name in ("completed", "retried", "failed"):
        table.add_row(f"{name} so far", number(getattr(found, name)))
    table.add_section()
    table.add_row("workers", number(found.workers))
    table.add_row("oldest pending", span(found.oldest_age))
    screen.say(table)
    if not found.complete:
        screen.note("There is more than a quick look lists; --exact counts all of it.")


@command("peek", short_help="Show the next messages without taking them.")
@limit_option(10)
@click.option("--place", type=click.Choice(PLACES), multiple=True, help="Where to look.  [default: ready, delayed]")
@click.option("--priority", type=click.IntRange(0, layout.PRIORITY_MAX), help="Only messages of this priority.")
@click.option("--full", is_flag=True, help="Show whole payloads.")
async def peek(
    screen: Screen, target: Target, *, limit: int, place: tuple[str, ...], priority: int | None, full: bool
) -> None:
    """Show messages in the order of their delivery, roughly. Nothing is claimed."""
    shown = 0
    async with target.opened() as queue:
        async for info in queue.browse(*place, priority=priority, limit=limit):
            shown += 1
            print_message(screen, info, full=full)
    if not shown and not screen.json:
        screen.say("No messages.")


def print_message(screen: Screen, info: MessageInfo, *, full: bool = False) -> None:
    """One message in one line."""
    if screen.json:
        screen.emit(fields_of(info))
        return
    due = f" due {clock_time(info.due_at)}" if info.due_at is not None and info.state == "delayed" else ""
    tries = f" attempts {info.attempts}" if info.attempts else ""
    error = f" [{preview(info.error, 60)}]" if info.error else ""
    payload = preview(info.payload, 10**9 if full else 100)
    screen.say(f"{info.id}  p{info.priority:<3} {info.state:<10}{due}{tries}{error}  {payload}")


@command("show", short_help="Show one message: state, history, payload.")
@click.argument("message_id", metavar="ID")
async def show(screen: Screen, target: Target, *, message_id: str) -> None:
    """Show everything that is stored about a message: where it is, what happened to it, and its payload."""
    async with target.opened() as queue, screen.waiting(queue, "searching"):
        info = await queue.show(message_id)
    history = history_of(info)
    if screen.json:
        screen.emit(fields_of(info) | {"history": [{"at": at, "what": what} for at, what in history]})
        return
    table = screen.table("", "", "")
    table.show_header = False
    table.add_row("id", info.id)
    table.add_row("state", info.state)
    table.add_row("priority", str(info.priority))
    table.add_row("attempts", f"{info.attempts} of {info.max_attempts or 'the queue’s max_attempts'}")
    for name, value in (("deduplication id", info.dedup_id), ("object", info.segment), ("worker", info.worker_id)):
        if value:
            table.add_row(name, value)
    for name, text in info.headers.items():
        table.add_row(f"header {name}", text)
    screen.say(table)
    screen.say("History (UTC):")
    for at, what in history:
        screen.say(f"  {clock_time(at)}  {what}")
    if info.traceback:
        screen.say("Traceback:", info.traceback)
    if info.state == "completed":
        screen.say(f"Result: {preview(info.result, 10**9)}")
    else:
        screen.say("Payload:", _whole(info.payload))


def history_of(info: MessageInfo) -> list[tuple[datetime, str]]:
    """What is known to have happened to a message, and what will, in order."""
    happened: list[tuple[datetime, str]] = [(info.enqueued_at, "enqueued")]
    if info.failed_at is not None:
        died = "; it is a dead letter" if info.state == "dead" else ""
        happened.append((info.failed_at, f"attempt {max(1, info.attempts)} failed: {info.error}{died}"))
    if info.claimed_at is not None:
        happened.append((info.claimed_at, f"claimed by {info.worker_id}"))
    if info.completed_at is not None:
        happened.append((info.completed_at, f"completed by {info.worker_id} in {span(info.duration)}"))
    if info.due_at is not None and info.state != "dead":
        happened.append((info.due_at, "due"))
    if info.expires_at is not None:
        happened.append((info.expires_at, "expires"))
    return sorted(happened, key=lambda event: event[0])


def _whole(payload: Any) -> str:
    if isinstance(payload, bytes):
        return preview(payload, 10**9)
    try:
        return msgspec.json.format(msgspec.json.encode(payload, enc_hook=str), indent=2).decode()
    except (TypeError, ValueError):
        # What JSON cannot say.
        return repr(payload)


@command("workers", short_help="List the workers.")
async def workers(screen: Screen, target: Target) -> None:
    """List the registered workers as their last heartbeats describe them."""
    async with target.opened() as queue, screen.waiting(queue, "reading heartbeats"):
        seen = await queue.overview()
    leader = seen.coordinator.worker_id if seen.coordinator and seen.coordinator.state == "leading" else ""
    if screen.json:
        for worker in seen.workers:
            screen.emit(fields_of(worker) | {"coordinator": worker.id == leader})
        return
    if not seen.workers:
        screen.say("No workers.")
        return
    right = ("running", "capacity", "segments", "completed", "failed", "heartbeat")
    table = screen.table("", "worker", "state", *right, right=right)
    for worker in seen.workers:
        state = ("coordinates" if worker.id == leader else "alive") if worker.alive else "lost"
        table.add_row(
            worker.id,
            state,
            number(worker.in_flight),
            number(worker.capacity),
            number(worker.segments),
            number(worker.completed),
            number(worker.failed),
            f"{span(worker.heartbeat_age)} ago",
        )
    screen.say(table)


COMMANDS = (stats, peek, show, workers)
