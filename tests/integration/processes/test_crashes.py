"""What SIGKILL and SIGSTOP cost: nothing that was acknowledged, and twice only what was in flight."""

from __future__ import annotations

import signal
import time

import pytest

from s3queue_async import S3Queue, Settings
from tests.integration.processes.harness import Place, Program, fleet, looking, until
from tests.integration.processes.programs import LEASE_SHORT

pytestmark = [pytest.mark.integration, pytest.mark.alone]

MAX_POLL_S = 1.0
POLL_JITTER = 1.25
"""A wait between two looks is up to a quarter longer than the interval."""


def is_halfway(worker: Program) -> bool:
    """Whether a worker is in the middle of a batch of 100."""
    return 20 <= len(worker.handled) % 100 < 80


async def test_worker_killed_in_the_middle_of_a_batch(place: Place) -> None:
    """SIGKILL one of two workers in the middle of a batch.

    Nothing is lost; handled twice is only what it held at the kill; and the other one, which has nothing else to do by
    then, starts what it held within TTL + margin + the resolution of the store's dates + one poll.
    """
    settings = {**LEASE_SHORT, "max_poll_interval": MAX_POLL_S, "segment_messages_max": 100}
    with fleet(place, **settings) as programs:
        workers = await programs.start_workers(2, "sleep", seconds=0.02, concurrency=4)
        async with (
            S3Queue[int](place.url, payload_type=int, settings=Settings(**settings)) as queue,
            looking(place) as look,
        ):
            ids = await queue.enqueue_many(range(300))
            await until("one is in the middle of a batch", lambda: any(map(is_halfway, workers)))
            victim, survivor = workers if is_halfway(workers[0]) else reversed(workers)
            killed_at = victim.kill()
            held = await look.held_by(victim.worker_id)
            in_flight = {message_id for messages in held.values() for message_id in messages}
            assert in_flight, "it held something at the kill"
            await programs.handles(ids)
            await look.gone()
            resolution_s = look.storage.date_resolution_s
            await survivor.stop()
            assert await look.messages() == {}
            assert await look.workers() == {}

    times = programs.times_handled()
    twice = {message_id for message_id, count in times.items() if count > 1}
    assert set(times) == set(ids)
    assert max(times.values()) <= 2
    assert twice <= in_flight
    assert twice <= {line.message_id for line in victim.handled}
    assert all(line.attempt == 1 for line in programs.handled)

    taken_after_s = min(line.start for line in survivor.started if line.message_id in in_flight) - killed_at
    made = Settings(**settings)
    bound_s = made.visibility_timeout + made.lease_margin + resolution_s + POLL_JITTER * MAX_POLL_S
    print(
        f"{place.kind}: {len(in_flight)} messages in {len(held)} segments in flight at the kill, {len(twice)} handled "
        f"twice; taken over after {taken_after_s:.2f} s (bound {bound_s:.2f} s: TTL {made.visibility_timeout:g} + "
        f"margin {made.lease_margin:g} + resolution {resolution_s:g} + poll {POLL_JITTER * MAX_POLL_S:g})"
    )
    assert taken_after_s < bound_s


@pytest.mark.parametrize("endless", [False, True], ids=["calls in turn", "one endless call"])
async def test_producer_killed_in_the_middle_of_enqueue_many(place: Place, endless: bool) -> None:
    """SIGKILL a producer in the middle of enqueue_many: nothing acknowledged is lost, nothing is handled twice."""
    with fleet(place) as programs:
        await programs.start_workers(2)
        producer = programs.start("producer", "produce", seconds=1.0 if endless else 0.0)
        await until("2,000 messages are acknowledged", lambda: len(producer.of("acknowledged")) >= 2_000)
        producer.kill()
        acknowledged = {line.message_id: line.payload for line in producer.of("acknowledged")}
        await programs.handles(acknowledged)
        async with looking(place) as look:
            await look.gone()
            await programs.stop()
            assert await look.messages() == {}

    handled = programs.handled
    assert max(programs.times_handled().values()) == 1
    payloads = {line.message_id: line.payload for line in handled}
    assert len(set(payloads.values())) == len(handled), "a payload was enqueued twice"
    assert acknowledged.items() <= payloads.items()
    print(f"{place.kind}: {len(acknowledged)} acknowledged, {len(handled) - len(acknowledged)} more were durable")


async def test_worker_stopped_for_longer_than_its_lease(place: Place) -> None:
    """SIGSTOP a worker in the middle of a batch until another one runs what it held; then SIGCONT.

    The woken worker writes nothing to what it lost, although its handlers end then, starts nothing more of it, and
    comes back under a new id. Nothing is lost, and what is handled twice was running as it was stopped, or done
    and not settled; whoever runs it later has the higher token.
    """
    settings = {**LEASE_SHORT, "max_poll_interval": MAX_POLL_S, "split_after": None, "checkpoint_interval": 60}
    batch = 20
    with fleet(place, **settings) as programs:
        gates = [place.directory / f"gate-{number}" for number in range(2)]
        async with S3Queue[int](place.url, payload_type=int) as queue, looking(place) as look:
            sleeper = programs.start("sleeper", "gate", gate=str(gates[0]), concurrency=4)
            await sleeper.ready()
            ids = await queue.enqueue_many(range(batch))
            await until("the sleeper runs as many as it may", lambda: len(sleeper.started) == 4)
            [segment] = await look.held_by(sleeper.worker_id)
            old_id = sleeper.worker_id
            sleeper.signal(signal.SIGSTOP)
            stopped_at = time.monotonic()
            running = {line.message_id for line in sleeper.started}

            taker = programs.start("taker", "gate", gate=str(gates[1]), concurrency=4)
            await taker.ready()
            await until("the other worker runs what the sleeper held", lambda: taker.started)
            taken_after_s = taker.started[0].start - stopped_at
            assert old_id not in await look.workers()
            before = (await look.claims())[segment]
            assert before.owner == taker.worker_id

            gates[0].touch()
            sleeper.signal(signal.SIGCONT)
            await sleeper.ready(lives=2)
            assert (await look.claims())[segment] == before, "the woken worker wrote to the claim that it lost"
            assert await look.body(segment) is not None, "the woken worker deleted the segment that it lost"
            workers = await look.workers()
            assert set(workers) == {taker.worker_id, sleeper.worker_id}
            assert {line.message_id for line in sleeper.started if line.worker_id == old_id} == running
            [lost] = sleeper.told("lease.lost")
            assert set(lost.about["message_ids"]) == set(ids)

            gates[1].touch()
            await programs.handles(ids)
            await look.gone()
            await programs.stop()
            assert await look.messages() == {}
            assert await look.workers() == {}

    times = programs.times_handled()
    assert set(times) == set(ids)
    twice = {message_id for message_id, count in times.items() if count > 1}
    assert twice <= running
    assert sleeper.worker_ids[0] == old_id
    assert len(set(sleeper.worker_ids)) == 2
    assert {line.token for line in sleeper.started if line.worker_id == old_id} == {1}
    assert all(line.token > 1 and line.attempt == 1 for line in taker.handled)
    assert {line.message_id for line in taker.handled} == set(ids)
    print(
        f"{place.kind}: taken over {taken_after_s:.2f} s after SIGSTOP; woken after a lease of "
        f"{LEASE_SHORT['visibility_timeout']:g} s, {len(twice)} of {batch} handled twice, {len(running)} were running"
    )
