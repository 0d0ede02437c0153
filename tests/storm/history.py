"""From the journals of a storm to the history that the simulation's checker reads."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

from s3queue_async import Settings
from tests.simulation.history import History, Job, Loss, Run, Sent
from tests.storm.journal import Acknowledged, Ambiguous, AnyLine, Ended, Lost, Started
from tests.storm.processes import Program
from tests.storm.storm import Plan, Record

SCHEDULING_S = 1.0
"""How long a process may take to get the processor after SIGCONT; simulated processes have it at once."""


def assemble(plan: Plan, record: Record) -> History:
    """Everything that any process wrote down, and what the controller did."""
    history = History(
        settings=Settings(**plan.settings),
        crashed_at=record.crashed_at,
        disturbed=[replace(done, until_s=done.until_s + SCHEDULING_S) for done in record.disturbed],
        dead=record.dead,
        problems=list(record.problems),
        leftovers=record.leftovers,
    )
    acknowledged: list[Acknowledged] = []
    for program in record.programs:
        program.read()
        _add_runs(history, program)
        for line in program.lines:
            _add(history, program, line)
            if isinstance(line, Acknowledged):
                acknowledged.append(line)
    history.runs.sort(key=lambda run: run.started_s)
    history.lost.sort(key=lambda loss: loss.at_s)
    _add_sent(history, acknowledged)
    return history


def _add_runs(history: History, program: Program) -> None:
    runs: dict[int, Run] = {}
    for line in program.lines:
        if isinstance(line, Started):
            runs[line.run] = Run(
                message_id=line.message_id,
                number=line.number,
                process=program.name,
                worker_id=line.worker_id,
                attempt=line.attempt,
                token=line.token,
                started_s=line.at_s,
            )
        elif isinstance(line, Ended):
            runs[line.run].ended_s = line.at_s
            runs[line.run].outcome = line.outcome
    history.runs += runs.values()


def _add(history: History, program: Program, line: AnyLine) -> None:
    if isinstance(line, Lost):
        history.lost.append(Loss(at_s=line.at_s, process=program.name, worker_id=line.worker_id, reason=line.reason))
    elif isinstance(line, Ambiguous):
        history.ambiguous.update(line.message_ids)


def _add_sent(history: History, acknowledged: list[Acknowledged]) -> None:
    """A bulk that failed in part says which ids are durable, not whose they are: the runs tell."""
    numbers = {run.message_id: run.number for run in history.runs}
    nameless = count(-1, -1)
    for line in acknowledged:
        job = line.job or Job(numbers.get(line.message_id, next(nameless)), "of a bulk that failed in part", 0.0)
        history.sent.append(
            Sent(
                message_id=line.message_id,
                job=job,
                acknowledged_s=line.at_s,
                due_s=line.due_s,
                dedup_id=line.dedup_id,
            )
        )
