from __future__ import annotations

import time

import pytest

from s3queue_async import S3Queue, Settings
from tests.integration.processes.harness import SOON_S, Place, Program, fleet, looking, until

pytestmark = [pytest.mark.integration, pytest.mark.alone]

BATCH = 50
POISON = 17


async def test_a_message_that_kills_its_worker_reaches_the_dead_letters_alone(place: Place) -> None:
    """One message of a batch of 50 calls os._exit, and workers are started again as they die.

    After max_attempts it alone is a dead letter, with its attempts; the other 49 are handled, none more often than
    twice, and none of them has used up an attempt because of it.
    """
    settings = Settings(visibility_timeout=2.0, heartbeat_interval=0.5, max_poll_interval=0.5)
    with fleet(place, visibility_timeout=2.0, heartbeat_interval=0.5, max_poll_interval=0.5) as programs:

        def start() -> Program:
            return programs.start("worker", "poison", poison=POISON, seconds=0.01, concurrency=10)

        async with S3Queue[int](place.url, payload_type=int, settings=settings) as queue, looking(place) as look:
            ids = await queue.enqueue_many(range(BATCH))
            assert len(await look.keys("ready/")) == 1, "a batch is one segment"
            neighbours = {message_id for payload, message_id in enumerate(ids) if payload != POISON}
            working = [start(), start()]
            began = time.monotonic()

            def all_settled() -> bool:
                for place_of, worker in enumerate(working):
                    if worker.ended:
                        assert worker.process.returncode == 66, worker.log_tail()
                        working[place_of] = start()
                return neighbours <= set(programs.times_handled())

            await until("the neighbours are handled", all_settled)
            while not (dead := await queue.dead_letters.list()) or await look.keys("ready/"):
                assert time.monotonic() - began < SOON_S, "no dead letter in time"
                all_settled()
            took_s = time.monotonic() - began
            await programs.stop()
            assert await look.keys("ready/") == await look.keys("delayed/") == []

    [letter] = dead
    assert (letter.id, letter.payload, letter.attempts) == (ids[POISON], POISON, settings.max_attempts)
    assert "WorkerLost" in letter.error
    times = programs.times_handled()
    assert set(times) == neighbours
    assert max(times.values()) <= 2
    assert {line.attempt for line in programs.handled} == {1}
    tries = sorted((line for line in programs.lines("started") if line.payload == POISON), key=lambda line: line.start)
    assert [line.token for line in tries] == [1, 2, 3]
    print(
        f"{place.kind}: {len(programs.programs)} processes, dead after {took_s:.1f} s and {len(tries)} tries "
        f"(attempts shown: {[line.attempt for line in tries]}); "
        f"{sum(1 for count in times.values() if count > 1)} neighbours handled twice"
    )
