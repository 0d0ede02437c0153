"""Reads a history and says what is wrong with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

from tests.simulation.cluster import History, Run

DUE_TOLERANCE_S = 1.5


def check(history: History) -> tuple[list[str], Counter[str]]:
    """What is wrong, and the duplicates that are not, by their cause."""
    problems = list(history.problems)
    causes: Counter[str] = Counter()
    by_message: dict[str, list[Run]] = defaultdict(list)
    for run in history.runs:
        by_message[run.message_id].append(run)
    _check_nothing_lost(history, by_message, problems)
    for message_id, runs in by_message.items():
        _check_runs(history, message_id, runs, problems, causes)
    _check_dead(history, by_message, problems)
    if history.leftovers:
        problems.append(f"left behind: {history.leftovers[:8]}")
    return problems, causes


def _check_nothing_lost(history: History, by_message: dict[str, list[Run]], problems: list[str]) -> None:
    for sent in history.sent:
        finished = any(run.outcome == "returned" for run in by_message[sent.message_id])
        if not finished and sent.message_id not in history.dead:
            problems.append(f"lost: {sent.message_id} (job {sent.job.number}, {sent.job.kind})")
        runs = by_message[sent.message_id]
        early = [run for run in runs if run.started_s < sent.due_s - DUE_TOLERANCE_S]
        if early:
            problems.append(f"early: {sent.message_id} ran {sent.due_s - early[0].started_s:.1f} s before it was due")
    jobs: Counter[int] = Counter()
    for sent in history.sent:
        jobs[sent.job.number] += 1
    for number, count in jobs.items():
        if count > 1:
            problems.append(f"job {number} was acknowledged {count} times")


def _check_runs(history: History, message_id: str, runs: list[Run], problems: list[str], causes: Counter[str]) -> None:
    ambiguous = message_id in history.ambiguous
    for earlier, later in pairwise(runs):
        _check_pair(history, message_id, earlier, later, problems, causes)
        if later.token <= earlier.token and not ambiguous:
            problems.append(f"token did not grow: {message_id} {earlier.token} -> {later.token}")
    attempts_max = history.scenario.settings.max_attempts
    for run in runs:
        if run.attempt > attempts_max:
            problems.append(f"attempt {run.attempt} of {attempts_max}: {message_id}")
    uncharged = sum(1 for run in runs if run.outcome in ("", "poison", "cancelled", "Release", "returned"))
    if len(runs) > attempts_max + uncharged + sum(causes.values()):
        problems.append(f"{len(runs)} starts of {message_id}, allowed are {attempts_max} attempts")


def _check_pair(
    history: History, message_id: str, earlier: Run, later: Run, problems: list[str], causes: Counter[str]
) -> None:
    """A second start needs a reason: the first one asked for it, or its holder was disturbed."""
    over = earlier.ended_s is not None and earlier.ended_s <= later.started_s
    if not over and not _silent(history, earlier, later):
        problems.append(f"two holders: {message_id} on {earlier.process} and {later.process}")
    if over and earlier.outcome in ("Release", "Retry", "ValueError", "cancelled"):
        return
    cause = _disturbance(history, earlier, later)
    if cause is None and message_id in history.ambiguous:
        cause = "ambiguous enqueue"
    if cause is None:
        problems.append(
            f"twice without a cause: {message_id} by {earlier.worker_id} ({earlier.outcome}) "
            f"and {later.worker_id} at {later.started_s - 1000:.2f}"
        )
    else:
        causes[cause] += 1


def _silent(history: History, earlier: Run, later: Run) -> bool:
    """Whether the earlier holder was dead or stood still as the later one started."""
    crashed = history.crashed_at.get(str(earlier.process))
    if crashed is not None and crashed <= later.started_s:
        return True
    return any(
        process == str(earlier.process) and kind == "pause" and since <= later.started_s
        for since, _, process, kind in history.disturbed
    )


def _disturbance(history: History, earlier: Run, later: Run) -> str | None:
    """What happened to the earlier holder between its start and the later start."""
    name = str(earlier.process)
    crashed = history.crashed_at.get(name)
    if crashed is not None and earlier.started_s - 1e-9 <= crashed <= later.started_s:
        return "crash"
    for since, until, process, kind in history.disturbed:
        if process == name and since <= later.started_s and until >= earlier.started_s - 60.0:
            return kind
    for at_s, process, worker_id in history.lost:
        if process == name and worker_id == earlier.worker_id and at_s >= earlier.started_s - 1e-9:
            # The store was out of this worker's reach for as long as its lease.
            return "cut off by the store"
    return None


def _check_dead(history: History, by_message: dict[str, list[Run]], problems: list[str]) -> None:
    kinds = {sent.message_id: sent.job for sent in history.sent}
    for message_id, (reason, attempts) in history.dead.items():
        job = kinds.get(message_id)
        if job is None or job.kind in ("dead", "poison"):
            continue
        runs = by_message[message_id]
        starts = sum(1 for run in runs if run.outcome != "Release")
        # A message that was in hand when a worker was lost, and again when the next one was lost while it ran alone
        # (by the claim; the handler may not have begun yet), is charged for both.
        losses = len(history.crashed_at) + len(history.lost)
        if starts + min(losses, history.scenario.settings.max_attempts) < history.scenario.settings.max_attempts:
            problems.append(
                f"dead without cause: {message_id} ({job.kind}, {reason!r}, {attempts} attempts, {starts} starts)"
            )
    for sent in history.sent:
        if sent.job.kind == "poison" and sent.message_id not in history.dead:
            problems.append(f"poison is no dead letter: {sent.message_id}")
