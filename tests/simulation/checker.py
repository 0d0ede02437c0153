"""Reads a history and says what is wrong with it."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise

from s3queue_async.engine.registry import FENCED, NOT_RENEWED
from s3queue_async.engine.settler import TAKEN
from s3queue_async.protocol import layout
from tests.simulation.history import Disturbance, History, Loss, Run

DUE_TOLERANCE_S = 1.5
"""Servers' clocks differ by a second, and a due time is rounded."""
STOPS_WITHIN_S = 0.2
"""How long after it goes on a process that stood still may take to cancel what it held."""


def check(history: History) -> tuple[list[str], Counter[str]]:
    """What is wrong, and the duplicates that are not, by their cause."""
    problems = list(history.problems)
    causes: Counter[str] = Counter()
    by_message: dict[str, list[Run]] = defaultdict(list)
    for run in history.runs:
        by_message[run.message_id].append(run)
    _check_nothing_lost(history, by_message, problems)
    for message_id, runs in by_message.items():
        own = Counter[str]()
        _check_runs(history, message_id, runs, problems, own)
        causes += own
    _check_dead(history, by_message, problems)
    _check_losses(history, problems)
    if history.faultless and (causes or history.lost or history.ambiguous):
        problems.append(f"nothing went wrong, yet: {dict(causes)} {history.lost[:3]} {sorted(history.ambiguous)[:3]}")
    if history.leftovers:
        problems.append(f"left behind: {history.leftovers[:8]}")
    return problems, causes


def _check_nothing_lost(history: History, by_message: dict[str, list[Run]], problems: list[str]) -> None:
    jobs: Counter[int] = Counter()
    for sent in history.sent:
        runs = by_message.get(sent.message_id, [])
        finished = any(run.outcome == "returned" for run in runs)
        if not finished and sent.message_id not in history.dead:
            problems.append(f"lost: {sent.message_id} (job {sent.job.number}, {sent.job.kind})")
        early = [run for run in runs if run.started_s < sent.due_s - DUE_TOLERANCE_S]
        if early:
            problems.append(f"early: {sent.message_id} ran {sent.due_s - early[0].started_s:.1f} s before it was due")
        jobs[sent.job.number] += 1
    problems += [f"job {number} was acknowledged {count} times" for number, count in jobs.items() if count > 1]


def _check_runs(history: History, message_id: str, runs: list[Run], problems: list[str], causes: Counter[str]) -> None:
    ambiguous = message_id in history.ambiguous
    for earlier, later in pairwise(runs):
        if later.token < earlier.token and _slept(history, later):
            causes["suspend"] += 1
            continue
        _check_pair(history, message_id, earlier, later, problems, causes)
        if later.token <= earlier.token and not ambiguous:
            problems.append(f"token did not grow: {message_id} {earlier.token} -> {later.token}")
    done_s = history.done_at.get(message_id, float("inf"))
    for run in runs:
        # Whoever claims a message looks at its marker after that.
        if run.started_s > history.claimed_at.get((message_id, run.worker_id), 0.0) > done_s:
            problems.append(f"ran after it was finished: {message_id} on {run.process} at {run.started_s - 1000:.2f}")
    attempts_max = history.settings.max_attempts
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
    ambiguous = message_id in history.ambiguous
    if not over and not ambiguous and not _may_overlap(history, earlier, later):
        problems.append(f"two holders: {message_id} on {earlier.process} and {later.process}")
    if over and earlier.outcome in ("Release", "Retry", "ValueError", "cancelled"):
        return
    cause = _cause(history, earlier, later)
    if cause is None and ambiguous:
        cause = "ambiguous enqueue"
    if cause is None:
        problems.append(
            f"twice without a cause: {message_id} by {earlier.worker_id} ({earlier.outcome}) "
            f"and {later.worker_id} at {later.started_s - 1000:.2f}"
        )
    else:
        causes[cause] += 1


def _may_overlap(history: History, earlier: Run, later: Run) -> bool:
    """Whether the earlier holder was dead or stood still as the later one started, and stopped as it woke."""
    crashed = history.crashed_at.get(earlier.process)
    if crashed is not None and crashed <= later.started_s:
        return True
    for done in _disturbances(history, earlier, later):
        # The clock of a suspended machine stands: it trusts its lease until its next heartbeat is refused.
        stops_within_s = {"pause": STOPS_WITHIN_S, "suspend": history.settings.visibility_timeout}.get(done.kind)
        if stops_within_s is not None and later.started_s <= done.until_s + stops_within_s:
            ended_s = _ended_s(history, earlier)
            if ended_s is not None and ended_s <= done.until_s + stops_within_s:
                return True
    return False


def _ended_s(history: History, run: Run) -> float | None:
    """When a handler ended, or its process with it."""
    return history.crashed_at.get(run.process) if run.ended_s is None else run.ended_s


def _disturbances(history: History, earlier: Run, later: Run) -> list[Disturbance]:
    """What was done to the earlier holder's process between its start and the later start."""
    # A suspended machine finds out only some time after it woke.
    after_s = {"suspend": history.settings.visibility_timeout}
    return [
        done
        for done in history.disturbed
        if done.process == earlier.process
        and done.since_s <= later.started_s
        and done.until_s + after_s.get(done.kind, 0.0) >= earlier.started_s
    ]


def _cause(history: History, earlier: Run, later: Run) -> str | None:
    """Why the earlier holder was not the only one, if there is a reason."""
    crashed = history.crashed_at.get(earlier.process)
    if crashed is not None and earlier.started_s - 1e-9 <= crashed <= later.started_s:
        return "crash"
    kinds = [done.kind for done in _disturbances(history, earlier, later)]
    if "suspend" in kinds:
        return "suspend"
    if "pause" in kinds and crashed is not None:
        # It was killed before it could say that its lease was over.
        return "pause"
    for loss in history.lost:
        mine = loss.process == earlier.process and loss.worker_id == earlier.worker_id and loss.of_the_worker
        if mine and loss.at_s >= earlier.started_s - 1e-9:
            return kinds[0] if kinds else "cut off by the store"
    return None


def _slept(history: History, run: Run) -> bool:
    """Whether a holder began this run in the belief that the lease was good, because its clock had stood still."""
    within_s = history.settings.visibility_timeout
    ended_s = _ended_s(history, run)
    return any(
        done.kind == "suspend"
        and done.process == run.process
        and done.until_s <= run.started_s <= done.until_s + within_s
        and ended_s is not None
        and ended_s <= done.until_s + within_s
        for done in history.disturbed
    )


def _check_dead(history: History, by_message: dict[str, list[Run]], problems: list[str]) -> None:
    kinds = {sent.message_id: sent.job for sent in history.sent}
    attempts_max = history.settings.max_attempts
    for message_id, (reason, attempts) in history.dead.items():
        job = kinds.get(message_id)
        if job is None or job.kind in ("dead", "poison"):
            continue
        starts = sum(1 for run in by_message.get(message_id, []) if run.outcome != "Release")
        # A message that was in hand when a worker was lost, and again when the next one was lost while it ran alone
        # (by the claim; the handler may not have begun yet), is charged for both.
        losses = len(history.crashed_at) + len(history.lost)
        # As it is for the worker that left without the reply to its claim: nobody can tell it from one that was lost.
        first = f"{layout.CLAIMS}{message_id.partition('-')[0]}-"
        losses += any(key.startswith(first) for key in history.doubted)
        if starts + min(losses, attempts_max) < attempts_max:
            problems.append(
                f"dead without cause: {message_id} ({job.kind}, {reason!r}, {attempts} attempts, {starts} starts)"
            )
    for sent in history.sent:
        if sent.job.kind == "poison" and sent.message_id not in history.dead:
            problems.append(f"poison is no dead letter: {sent.message_id}")


def _disturbed_before(history: History, loss: Loss) -> bool:
    since_s = loss.at_s - 2 * history.settings.visibility_timeout
    return any(done.process == loss.process and done.until_s >= since_s for done in history.disturbed)


def _settled_by_a_sleeper(history: History, loss: Loss) -> bool:
    """Whether its earlier holder's clock had stood still: it believed its lease to be good, and ended the segment."""
    within_s = history.settings.visibility_timeout + history.settings.claim_linger
    held = {run.process for run in history.runs if run.message_id in loss.message_ids and run.started_s < loss.at_s}
    return any(
        done.kind == "suspend"
        and done.process in held - {loss.process}
        and done.since_s <= loss.at_s <= done.until_s + within_s
        for done in history.disturbed
    )


def _check_losses(history: History, problems: list[str]) -> None:
    """No lease is lost without a reason, and a worker whose lease was good all the time loses no claim."""
    over = {(loss.process, loss.worker_id) for loss in history.lost if loss.of_the_worker}
    suspended = {done.process for done in history.disturbed if done.kind == "suspend"}
    for loss in history.lost:
        if loss.reason == NOT_RENEWED and loss.heartbeats_failed is False and not _disturbed_before(history, loss):
            problems.append(f"lost its lease, yet no heartbeat failed: {loss.worker_id} at {loss.at_s - 1000:.2f}")
        gone = loss.process in history.crashed_at or loss.process in suspended
        excused = gone or (loss.process, loss.worker_id) in over or _settled_by_a_sleeper(history, loss)
        if loss.reason == TAKEN and not excused:
            problems.append(f"taken from a living worker: {loss.worker_id} at {loss.at_s - 1000:.2f}: {loss.reason}")
        fenced = history.fenced is None or history.fenced.get(loss.worker_id, float("inf")) <= loss.at_s
        if loss.reason == FENCED and not fenced:
            problems.append(f"not fenced, but believed so: {loss.worker_id} at {loss.at_s - 1000:.2f}")
