from __future__ import annotations

import asyncio
import signal
import time
from typing import Any

import pytest

from s3queue_async import S3Queue, Settings
from s3queue_async.engine.finder import OTHERS_AFTER_S
from tests.integration.processes.harness import PAUSE_S, Look, Place, Program, fleet, looking, until
from tests.integration.processes.programs import LEASE_SHORT

pytestmark = [pytest.mark.integration, pytest.mark.alone]

RUNNING = 200
WAITING = 100
MAX_POLL_S = 1.0
AT_ONCE_S = 1.25 * MAX_POLL_S + OTHERS_AFTER_S + 0.5
"""One look, what ranking leaves to the worker that is still registered, and half a second for a busy machine."""
SETTINGS: dict[str, Any] = {
    **LEASE_SHORT,
    "max_poll_interval": MAX_POLL_S,
    "segment_messages_max": 300,
    "split_after": None,
}


async def beats_seen(look: Look, worker_id: str, leaves: asyncio.Event) -> int:
    """How many different heartbeats there were until the worker's entry was gone."""
    nonces: set[tuple[str, str]] = set()
    while True:
        heartbeat = (await look.workers()).get(worker_id)
        if heartbeat is None:
            leaves.set()
            return len(nonces)
        nonces.add((heartbeat.nonce, heartbeat.state))
        await asyncio.sleep(0.1)


async def test_sigterm_lets_running_handlers_end(place: Place) -> None:
    """SIGTERM during 200 running handlers that go on for longer than the visibility timeout.

    No new claim; what was not started is handed back and another worker starts it at once; heartbeats go on until
    the last handler has ended; then the registry entry is gone and the exit code is 0. Everything is handled once.
    """
    with fleet(place, **SETTINGS, drain_timeout=10) as programs:
        leaving = programs.start("leaving", "sleep", seconds=5.0, concurrency=RUNNING, events=["message.claimed"])
        await leaving.ready()
        gate = place.directory / "opens"
        staying = programs.start("staying", "sleep", seconds=0.05, concurrency=50, opens=str(gate))
        await until("the other worker may start quickly", lambda: staying.told("waiting"))
        settings = Settings(**SETTINGS)
        async with S3Queue[int](place.url, payload_type=int, settings=settings) as queue, looking(place) as look:
            ids = await queue.enqueue_many(range(RUNNING + WAITING))
            await until("200 handlers run", lambda: len(leaving.started) == RUNNING)
            gate.touch()
            await staying.ready()
            told_at = leaving.signal(signal.SIGTERM)
            left = asyncio.Event()
            async with asyncio.TaskGroup() as group:
                beats = group.create_task(beats_seen(look, leaving.worker_id, left))
                await until("the other worker starts what was handed back", lambda: staying.started)
                later = await queue.enqueue_many(range(RUNNING + WAITING, RUNNING + WAITING + 50))
                await leaving.ends_well()
            ended_after_s = time.monotonic() - told_at
            assert set(await look.workers()) == {staying.worker_id}
            await programs.handles([*ids, *later])
            await look.gone()
            await staying.stop()
            assert await look.messages() == {}
            assert await look.workers() == {}

    assert programs.times_handled() == dict.fromkeys([*ids, *later], 1)
    assert {line.attempt for line in programs.handled} == {1}
    assert len(leaving.handled) == RUNNING
    assert all(event.at < told_at for event in leaving.told("message.claimed"))
    assert ended_after_s > settings.visibility_timeout, "the test is about a long drain"
    assert beats.result() >= 3, "heartbeats go on while it drains: one a second"
    at_once_s = min(line.start for line in staying.started) - told_at
    [report] = leaving.told("report")
    assert report.about["finished"] == RUNNING
    assert report.about["handed_back"] == WAITING
    assert report.about["clean"]
    print(
        f"{place.kind}: handed back and started elsewhere {at_once_s:.2f} s after SIGTERM, ended after "
        f"{ended_after_s:.2f} s, {beats.result()} heartbeats meanwhile"
    )
    assert at_once_s < AT_ONCE_S


async def test_sigterm_hands_back_what_does_not_end_in_time(place: Place) -> None:
    """SIGTERM during 200 handlers that go on for longer than drain_timeout.

    They are cancelled and handed back, another worker handles them at once as the first attempt, the registry entry
    is gone, and the exit code is 0.
    """
    with fleet(place, **SETTINGS, drain_timeout=1.0) as programs:
        leaving = programs.start("leaving", "sleep", seconds=60.0, concurrency=RUNNING)
        await leaving.ready()
        gate = place.directory / "opens"
        staying = programs.start("staying", "sleep", seconds=0.05, concurrency=50, opens=str(gate))
        await until("the other worker may start quickly", lambda: staying.told("waiting"))
        settings = Settings(**SETTINGS)
        async with S3Queue[int](place.url, payload_type=int, settings=settings) as queue, looking(place) as look:
            ids = await queue.enqueue_many(range(RUNNING))
            await until("200 handlers run", lambda: len(leaving.started) == RUNNING)
            gate.touch()
            await staying.ready()
            told_at = leaving.signal(signal.SIGTERM)
            await leaving.ends_well()
            ended_after_s = time.monotonic() - told_at
            assert set(await look.workers()) == {staying.worker_id}
            await programs.handles(ids)
            await look.gone()
            await staying.stop()

    assert {line.message_id for line in leaving.of("cancelled")} == set(ids)
    assert programs.times_handled() == dict.fromkeys(ids, 1)
    assert {line.attempt for line in staying.handled} == {1}
    at_once_s = min(line.start for line in staying.started) - max(line.end for line in leaving.of("cancelled"))
    print(
        f"{place.kind}: ended {ended_after_s:.2f} s after SIGTERM, started elsewhere {at_once_s:.2f} s after the cancel"
    )
    assert at_once_s < AT_ONCE_S


async def test_workers_that_are_replaced_all_the_time_lose_and_repeat_nothing(place: Place) -> None:
    """Busy workers on small segments get SIGTERM one after the other, and new ones come: everything is handled once."""
    small = Settings(segment_messages_max=2)
    with fleet(place, segment_messages_max=2) as programs:

        def start() -> Program:
            return programs.start("worker", "sleep", seconds=0.002, concurrency=16)

        async with S3Queue[int](place.url, payload_type=int, settings=small) as queue, looking(place) as look:
            ids: list[str] = []
            working = [start(), start()]
            for _ in range(4):
                await working[0].ready()
                leaving = working.pop(0)
                enough = len(leaving.handled) + 50
                while len(leaving.handled) < enough:
                    if len(ids) - len(programs.handled) < 500:
                        ids += await queue.enqueue_many(range(len(ids), len(ids) + 500))
                    await asyncio.sleep(PAUSE_S)
                leaving.signal(signal.SIGTERM)
                working.append(start())
                await leaving.ends_well()
            await working[-1].ready()
            await look.gone()
            await programs.stop()
            assert await look.messages() == {}

    assert programs.times_handled() == dict.fromkeys(ids, 1)
    handed_back = [worker.told("report")[0].about["handed_back"] for worker in programs.programs]
    print(f"{place.kind}: {len(ids)} messages, {len(programs.programs)} workers, handed back {handed_back}")
