"""What a storm came to, for people."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tests.simulation.history import History
from tests.storm.journal import Acknowledged, Ambiguous, Lost, Unknown
from tests.storm.storm import Plan, Record

PROBLEMS_SHOWN = 10
STORIES_SHOWN = 3
LINES_SHOWN = 60
_MESSAGE_ID = re.compile(r"\b[0-9A-HJKMNP-TV-Z]{26}-[0-9a-f]{6,}\b")
TAKEN_OVER = "segment taken over"


def table(plan: Plan, record: Record, history: History, causes: Counter[str], problems: list[str]) -> Table:
    """The summary."""
    counts = record.counts
    logs = [(Path(program.task.directory) / f"{program.name}.log").read_text() for program in record.programs]
    unknown = sum(len(line.numbers) for p in record.programs for line in p.lines if isinstance(line, Unknown))
    rows: list[tuple[str, object]] = [
        ("storm", f"{record.storm_s:,.0f} s"),
        ("empty after the faults ended", f"{record.drained_s:,.0f} s"),
        ("processes", f"{len(record.programs):,} ({plan.workers} + {plan.producers} at a time)"),
        ("messages acknowledged", f"{len(history.sent):,}"),
        ("outcome unknown to the producer", f"{unknown:,}"),
        ("enqueued ambiguously", f"{len(history.ambiguous):,}"),
        ("handler runs", f"{len(history.runs):,}"),
        ("dead letters", f"{len(history.dead):,}"),
        ("SIGKILL", f"{counts['kill']:,} workers, {counts['kill producer']:,} producers"),
        ("killed by a message", f"{counts['poisoned']:,}"),
        ("SIGSTOP, then SIGCONT", f"{counts['pause']:,} workers, {counts['pause producer']:,} producers"),
        ("SIGTERM", f"{counts['terminate']:,} workers"),
        ("cut off from the store", f"{counts['cut']:,} workers, {counts['cut producer']:,} producers"),
        ("leases lost", f"{sum(loss.of_the_worker for loss in history.lost):,}"),
        ("segments taken over", f"{sum(log.count(TAKEN_OVER) for log in logs):,}"),
    ]
    rows += [(f"proxy: {toxic}", f"{count:,}") for toxic, count in sorted(record.toxics.items())]
    rows += [(f"run twice after: {cause}", f"{count:,}") for cause, count in sorted(causes.items())]
    rows.append(("problems", f"{len(problems):,}"))
    shown = Table(title=f"Storm with seed {plan.seed}", show_header=False)
    for name, value in rows:
        shown.add_row(name, str(value))
    return shown


def stories(console: Console, record: Record, history: History, problems: list[str]) -> None:
    """The problems, and what happened to the messages that the first ones are about."""
    for problem in problems[:PROBLEMS_SHOWN]:
        console.print(f"PROBLEM {problem}", markup=False, style="red")
    if len(problems) > PROBLEMS_SHOWN:
        console.print(f"and {len(problems) - PROBLEMS_SHOWN} more", style="red")
    named = [found[0] for problem in problems if (found := _MESSAGE_ID.search(problem))]
    for message_id in list(dict.fromkeys(named))[:STORIES_SHOWN]:
        console.print(f"\n{message_id}", style="bold")
        for at_s, line in _story(message_id, record, history)[-LINES_SHOWN:]:
            console.print(f"  {at_s:.3f} {line}", markup=False, highlight=False)


def _story(message_id: str, record: Record, history: History) -> list[tuple[float, str]]:
    """Everything about a message and the processes that had it, in order."""
    story: list[tuple[float, str]] = []
    runs = [run for run in history.runs if run.message_id == message_id]
    names = {run.process for run in runs}
    for run in runs:
        about = f"{run.process} {run.worker_id} attempt {run.attempt} token {run.token}"
        story.append((run.started_s, f"started by {about}"))
        if run.ended_s is not None:
            story.append((run.ended_s, f"{run.outcome or 'ended'}: {about}"))
    for program in record.programs:
        for line in program.lines:
            if isinstance(line, Acknowledged) and line.message_id == message_id:
                story.append((line.at_s, f"acknowledged to {program}: {line.job}"))
            elif (isinstance(line, Lost | Ambiguous)) and message_id in line.message_ids:
                story.append((line.at_s, f"{program}: {type(line).__name__} {getattr(line, 'reason', '')}"))
        story += _logged(Path(program.task.directory) / f"{program.name}.log", message_id)
    story += [(at_s, f"{name} is gone") for name, at_s in history.crashed_at.items() if name in names]
    for done in history.disturbed:
        if done.process in names:
            story.append((done.since_s, f"{done.kind} of {done.process} until {done.until_s:.3f}"))
    return sorted(story)


def _logged(log: Path, message_id: str) -> list[tuple[float, str]]:
    """What a process logged of the message, or of the segment that it was first in."""
    found = []
    for line in log.read_text(errors="replace").splitlines():
        at, _, text = line.partition(" ")
        if message_id[:26] in text and at.replace(".", "", 1).isdecimal():
            found.append((float(at), f"{log.stem}: {text[:300]}"))
    return found
