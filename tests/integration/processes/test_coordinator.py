"""The coordinator as a process that is killed, or stands still: work goes on, and only one publishes."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from s3queue_async import S3Queue, Settings
from s3queue_async.engine.election import TTL_ELECTIONS
from s3queue_async.protocol import board as boards
from s3queue_async.protocol.board import Board
from tests.integration.processes.harness import (
    BOARD,
    PAUSE_S,
    SOON_S,
    Fleet,
    Look,
    Place,
    Program,
    fleet,
    looking,
    until,
)
from tests.integration.processes.programs import LEASE_SHORT

pytestmark = [pytest.mark.integration, pytest.mark.alone]

ELECTION_S = 1.0
PAUSE_MAX_S = 5.0
BACKLOG = 2_000
EVENTS = ["coordinator.promoted", "coordinator.demoted"]
SETTINGS: dict[str, Any] = {
    **LEASE_SHORT,
    "election_interval": ELECTION_S,
    "max_poll_interval": 1.0,
    "segment_messages_max": 5,
}


async def the_board(look: Look) -> Board:
    body = await look.body(BOARD)
    assert body is not None
    return boards.decode(BOARD, body)


async def the_leader(look: Look, programs: Fleet, *, beside: Program | None = None) -> Program:
    """The program that leads, once one of them does."""
    found: list[Program] = []

    def elected() -> bool:
        found[:] = [p for p in programs.programs if p is not beside and not p.ended and leads(p)]
        return bool(found)

    await until("a coordinator is elected", elected)
    return found[0]


async def in_the_middle(look: Look, worker: Program) -> None:
    """Return once a worker whose handlers end no more has begun as much as it can, and all that it ended is recorded."""
    await until("it is in the middle", lambda: len(worker.started) - len(worker.handled) == worker.task.concurrency)
    ended = {line.message_id for line in worker.handled}
    deadline = time.monotonic() + SOON_S
    while not ended.isdisjoint(itertools.chain(*(await look.held_by(worker.worker_id)).values())):
        assert time.monotonic() < deadline, f"not recorded within {SOON_S:g} s"
        await asyncio.sleep(PAUSE_S)


@contextlib.asynccontextmanager
async def busy(queue: S3Queue[int], programs: Fleet) -> AsyncIterator[list[str]]:
    """Enqueue all the time, so that a pause is never for want of messages; the ids grow meanwhile."""
    ids: list[str] = []
    enough = asyncio.Event()

    async def feed() -> None:
        while not enough.is_set():
            if len(ids) - len(programs.handled) < BACKLOG:
                ids.extend(await queue.enqueue_many(range(len(ids), len(ids) + BACKLOG // 2)))
            await asyncio.sleep(PAUSE_S)

    async with asyncio.TaskGroup() as group:
        group.create_task(feed())
        try:
            yield ids
        finally:
            enough.set()


def leads(program: Program) -> bool:
    return len(program.told("coordinator.promoted")) > len(program.told("coordinator.demoted"))


@pytest.mark.parametrize("amid", ["its messages", "anything"])
async def test_coordinator_killed_under_load(place: Place, amid: str) -> None:
    """SIGKILL the coordinator of eight workers under load: another one within TTL + margin, and work goes on.

    Nothing is lost; no five seconds pass without a completion. Killed in the middle of its own messages, nothing is
    handled twice; at any moment, only what the killed process had ended without having it recorded.
    """
    with fleet(place, **SETTINGS) as programs:
        workers = await programs.start_workers(
            8, "sleep", seconds=0.05, concurrency=4, events=EVENTS, halts=f"{place.directory}/halt-"
        )
        settings = Settings(**SETTINGS)
        async with S3Queue[int](place.url, payload_type=int, settings=settings) as queue, looking(place) as look:
            leader = await the_leader(look, programs)
            async with busy(queue, programs) as ids:
                await until("the work is under way", lambda: len(programs.handled) > 400)
                term = (await the_board(look)).term
                if amid == "its messages":
                    halt = place.directory / f"halt-{leader.pid}"
                    halt.touch()
                    await in_the_middle(look, leader)
                killed_at = leader.kill()
                successor = await the_leader(look, programs)
            promoted = successor.told("coordinator.promoted")[-1]
            await programs.handles(ids, within_s=90)
            await look.gone()
            assert promoted.about["term"] > term
            await programs.stop()
            assert await look.messages() == {}
            assert await look.workers() == {}

    times = programs.times_handled()
    twice = {message_id for message_id, count in times.items() if count > 1}
    assert set(times) == set(ids)
    # What it had handled a moment ago and had not settled yet; nothing that only the others had to do with.
    in_flight = {line.message_id for line in leader.handled if line.end > killed_at - settings.checkpoint_interval}
    assert twice <= (set() if amid == "its messages" else in_flight)
    assert max(times.values()) <= 2
    elected_after_s = promoted.at - killed_at
    bound_s = TTL_ELECTIONS * ELECTION_S + settings.lease_margin + look.storage.date_resolution_s + 2 * ELECTION_S
    ends = sorted(line.end for line in programs.handled)
    longest_s = max(later - earlier for earlier, later in itertools.pairwise(ends))
    print(
        f"{place.kind}, killed amid {amid}: {len(workers)} workers, {len(ids)} messages, {len(twice)} handled twice; "
        f"another coordinator after {elected_after_s:.2f} s (bound {bound_s:.2f} s: TTL {TTL_ELECTIONS * ELECTION_S:g} + "
        f"margin {settings.lease_margin:g} + resolution {look.storage.date_resolution_s:g} + looks); "
        f"longest pause in completions {longest_s:.2f} s"
    )
    assert elected_after_s < bound_s
    assert longest_s < PAUSE_MAX_S


async def test_coordinator_that_stood_still(place: Place) -> None:
    """SIGSTOP the coordinator beyond its term, then SIGCONT: the board is the other one's all the time after."""
    if place.kind == "sqlite":
        pytest.skip("a process that is stopped inside a transaction holds the lock of the whole file")
    with fleet(place, **SETTINGS) as programs:
        await programs.start_workers(3, "sleep", seconds=0.05, concurrency=4, events=EVENTS)
        async with (
            S3Queue[int](place.url, payload_type=int, settings=Settings(**SETTINGS)) as queue,
            looking(place) as look,
        ):
            old = await the_leader(look, programs)
            ids = await queue.enqueue_many(range(300))
            old.signal(signal.SIGSTOP)
            new = await the_leader(look, programs, beside=old)
            ids += await queue.enqueue_many(range(300, 600))
            term = (await the_board(look)).term
            went_on_at = old.signal(signal.SIGCONT)
            await until("the old one knows", lambda: old.told("coordinator.demoted"))
            seen = [await the_board(look)]
            ids += await queue.enqueue_many(range(600, 900))
            await programs.handles(ids)
            seen.append(await the_board(look))
            demoted = old.told("coordinator.demoted")[0]
            assert leads(new)
            await look.gone()
            await programs.stop()

    assert set(programs.times_handled()) == set(ids)
    assert {board.term for board in seen} == {term}
    assert {board.leader for board in seen} == {new.worker_id}
    print(f"{place.kind}: the old coordinator knew {demoted.at - went_on_at:.2f} s after it went on")


async def test_a_coordinator_that_drains_hands_over_at_once(place: Place) -> None:
    """SIGTERM the coordinator: it resigns, and another one leads long before the board would have been over."""
    with fleet(place, **{**SETTINGS, "election_interval": 5.0}) as programs:
        await programs.start_workers(3, "sleep", seconds=0.01, events=EVENTS)
        async with (
            S3Queue[int](place.url, payload_type=int, settings=Settings(**SETTINGS)) as queue,
            looking(place) as look,
        ):
            old = await the_leader(look, programs)
            told_at = time.monotonic()
            await old.stop()
            new = await the_leader(look, programs)
            promoted = new.told("coordinator.promoted")[-1]
            ids = await queue.enqueue_many(range(100))
            await programs.handles(ids)
            await look.gone()
            await programs.stop()
    assert set(programs.times_handled().values()) == {1}
    print(f"{place.kind}: another coordinator {promoted.at - told_at:.2f} s after SIGTERM")
    assert promoted.at - told_at < TTL_ELECTIONS * 5.0 - 5.0
