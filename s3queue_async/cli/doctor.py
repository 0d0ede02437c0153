"""``s3queue doctor``: what is wrong with a store, its bucket, or what lies in it."""

from __future__ import annotations

from collections import Counter
from random import SystemRandom  # noqa: TID251 - names what the checks write
from typing import Any

import click
import msgspec

from s3queue_async.cli.checks import NEEDS, Check, Doctor, policy
from s3queue_async.cli.common import Target, command
from s3queue_async.cli.exits import Exit, Failed
from s3queue_async.cli.screen import Screen, span
from s3queue_async.clock import SystemClock, wall_clock
from s3queue_async.errors import QueueError
from s3queue_async.protocol import layout
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.queue import S3Queue
from s3queue_async.storage.base import LIST_LIMIT_MAX, Entry, Storage
from s3queue_async.storage.examine import Examinable
from s3queue_async.storage.plugin import plugin_prefix
from s3queue_async.storage.sqlite import SqliteStorage

CLOCK = SystemClock()
PAGES_MAX = 10
OLD_S = 3600.0
MARKS = {"ok": "✓", "warn": "!", "fault": "✗", "skipped": "-"}
STYLES = {"ok": "green", "warn": "yellow", "fault": "bold red", "skipped": "bright_black"}
KNOWN = (layout.READY, layout.DELAYED, layout.DEAD, layout.CLAIMS, layout.HISTORY, layout.QUARANTINE, "plugin/")


@command("doctor", short_help="Find out what is wrong with the store.")
@click.option("--policy", "show_policy", is_flag=True, help="Print the IAM policy also where nothing is lacking.")
async def doctor(screen: Screen, target: Target, *, show_policy: bool) -> Exit:
    """Check the store: reach, clock, permissions, conditional writes, latency, versioning, lifecycle rules, leftovers.

    A few small objects are written below plugin/doctor/ and plugin/probe/, and deleted again. Exit code 1 when a fault
    was found; warnings cost money, or will hurt one day.
    """
    storage = target.storage()
    if isinstance(storage, SqliteStorage) and not storage.path.exists():
        raise Failed(
            Exit.NOT_FOUND,
            f"There is no file {storage.path}.",
            "The first enqueue or worker makes it; or check the url.",
        )
    run = Doctor(storage, clock=CLOCK, random=SystemRandom(), wall=wall_clock)
    try:
        with screen.progress("checking"):
            if await run.examine():
                await _examine_queue(run.checks, target, storage)
    finally:
        await storage.close()
    wanted = policy(storage.bucket, storage.prefix) if isinstance(storage, Examinable) else None
    faults = sum(check.state == "fault" for check in run.checks)
    if screen.json:
        lacking = [NEEDS[what] for what in run.lacking]
        screen.emit({"ok": not faults, "checks": run.checks, "lacking": lacking, "policy": wanted})
        return Exit.FAULT if faults else Exit.DONE
    table = screen.table("", "", "what", "found")
    table.show_header = False
    for check in run.checks:
        found = check.found + (f"\n→ {check.advice}" if check.advice else "")
        table.add_row(MARKS[check.state], check.name, found, style=STYLES[check.state])
    screen.say(table)
    if wanted is not None and (run.lacking or show_policy):
        screen.say("The policy that a queue needs:", _formatted(wanted))
    warnings = sum(check.state == "warn" for check in run.checks)
    counted = [
        f"{count} {what}{'s' * (count != 1)}" for count, what in ((faults, "fault"), (warnings, "warning")) if count
    ]
    screen.say(f"{' and '.join(counted)}." if counted else "All is well.")
    return Exit.FAULT if faults else Exit.DONE


def _formatted(value: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(value), indent=2).decode()


async def _examine_queue(checks: list[Check], target: Target, storage: Storage) -> None:
    """What lies in the queue that should not, and whether anybody works on it."""
    try:
        # Only names: a queue object would make the queue where there is none.
        listed, whole = await _listed(storage)
        if not any(entry.key == layout.CONFIG for entry in listed) and whole:
            checks.append(Check("queue", "warn", "there is none here yet", "The first enqueue or worker makes it."))
        else:
            async with target.opened() as queue:
                checks.append(await _working(queue))
        checks.extend(_leftovers(listed, whole))
    except (QueueError, Failed) as error:
        checks.append(Check("queue", "fault", str(error.args[0]), getattr(error, "suggestion", "")))


async def _working(queue: S3Queue[Any]) -> Check:
    overview = await queue.overview()
    stats = overview.stats
    alive = sum(worker.alive for worker in overview.workers)
    found = f"{stats.pending:,} pending, {stats.delayed:,} delayed, {stats.dead:,} dead letters; {alive:,} workers"
    if stats.pending and not alive:
        oldest = span(stats.oldest_age)
        return Check("queue", "warn", f"{found}: nobody works, the oldest waits since {oldest}", "Start a worker.")
    return Check("queue", "ok", found)


async def _listed(storage: Storage) -> tuple[list[Entry], bool]:
    """Everything in the queue, up to so many pages of each prefix, and whether that was all."""
    entries: list[Entry] = []
    whole = True
    for prefix in ("queue.json", *KNOWN):
        after = ""
        for _ in range(PAGES_MAX):
            page = await storage.list(prefix, after=after, limit=LIST_LIMIT_MAX)
            entries += page.entries
            if not page.more:
                break
            after = page.entries[-1].key
        else:
            whole = False
    return entries, whole


def _leftovers(entries: list[Entry], whole: bool) -> list[Check]:
    newest_s = max((entry.modified_s for entry in entries), default=0.0)
    counts: Counter[str] = Counter()
    segments = set()
    for entry in entries:
        if entry.key.startswith((layout.READY, layout.DELAYED, layout.DEAD)):
            try:
                segments.add(SegmentKey.parse(entry.key).name)
            except ValueError:
                counts["objects of somebody else"] += 1
    for entry in entries:
        # Compared with the newest object's time: both are the store's.
        old = newest_s - entry.modified_s > OLD_S
        if entry.key.startswith(layout.QUARANTINE):
            counts["objects set aside under quarantine/"] += 1
        elif entry.key.startswith(layout.CLAIMS) and old and whole:
            counts["claims of segments that are gone"] += layout.claim_name(entry.key) not in segments
        elif entry.key.startswith((plugin_prefix("probe"), plugin_prefix("doctor"), "plugin/bench-")) and old:
            counts["objects of probes and benchmarks that were broken off"] += 1
        elif entry.key.startswith(plugin_prefix(layout.WORKERS)) and newest_s - entry.modified_s > 24 * OLD_S:
            counts["heartbeats of workers that are long gone"] += 1
    found = [f"{count:,} {what}" for what, count in counts.items() if count]
    if not found:
        return [Check("leftovers", "ok", "none" if whole else "none among the first 10,000 objects of each kind")]
    advice = "Look at quarantine/ first; what is left of probes, benchmarks and gone segments may be deleted by hand."
    return [Check("leftovers", "warn", "; ".join(found), advice)]


COMMANDS = (doctor,)
