"""Coincidences too rare for a random seed, acted out; each of these is what shows that one safeguard is needed."""

from __future__ import annotations

import anyio

from s3queue_async import Context, S3Queue, Settings
from s3queue_async.protocol import layout
from s3queue_async.testing.clock import LoopClock
from tests.unit.queue.bed import QUIET, Bed, Seen, eventually, virtual
from tests.unit.queue.test_takeover import Killable
from tests.unit.queue.test_tombstones import TOMBSTONES, WORKERS, Runs, clean, copied

YOUNG = Settings(
    coordinator=False,
    segment_age=2,
    claim_linger=4,
    visibility_timeout=20,
    heartbeat_interval=5,
    backoff_base=0.2,
    max_attempts=5,
)
"""Segments are old, and claims gone, soon."""


@virtual
async def test_a_local_clock_that_jumps_does_not_cut_a_linger_short() -> None:
    """The claim of a finished segment stays for ``claim_linger`` by the store's time, wherever the local clock goes."""
    bed = Bed()
    done = Seen()
    clock = LoopClock()

    async def handle(payload: str) -> None:
        done(payload)

    async with bed.queue() as producer, S3Queue[str](storage=bed.store, settings=QUIET, clock=clock, on_message=handle):
        await producer.enqueue("one")
        await done.count(1)

        async def ended() -> bool:
            return not await bed.keys(layout.READY)

        await eventually(ended)
        ended_at = anyio.current_time()
        clock.offset_s += QUIET.claim_linger + 5
        while anyio.current_time() - ended_at < QUIET.claim_linger - 0.5:
            assert await bed.keys(layout.CLAIMS)
            await anyio.sleep(0.5)
    assert await bed.leftovers() == []


@virtual
async def test_a_local_clock_that_jumps_while_a_heartbeat_is_under_way() -> None:
    """The lease seems to be over for a moment, until that heartbeat's reply comes: what was finished then is settled."""
    bed = Bed()
    lane, faults = bed.lane()
    runs = Seen()
    clock = LoopClock()
    ends = anyio.Event()

    async def handle(payload: str) -> None:
        runs(payload)
        await ends.wait()

    lapsed_s = 1.0
    async with S3Queue[str](storage=lane, settings=YOUNG, clock=clock, on_message=handle) as queue:
        await queue.enqueue("one")
        await runs.count(1)
        await anyio.sleep(1)
        beating = faults.hold_reply("put", key="plugin/workers/*")
        await beating.reached.wait()
        clock.offset_s += YOUNG.visibility_timeout - YOUNG.lease_margin - YOUNG.heartbeat_interval + lapsed_s
        ends.set()
        await anyio.sleep(1)
        beating.open()
        await anyio.sleep(5 * YOUNG.visibility_timeout)
    assert runs.items == ["one"]
    assert await bed.leftovers() == []


@virtual
async def test_a_worker_leaves_while_its_delete_of_a_claim_is_lost() -> None:
    """A write of the segment that was repeated on its way has brought it back meanwhile: nobody runs its message again."""
    bed = Bed()
    lane, faults = bed.lane()
    runs = Seen()

    async def handle(payload: str) -> None:
        runs(payload)

    async with bed.queue(settings=YOUNG, storage=lane, on_message=handle) as leaving:
        ending = faults.hold("delete", key="ready/*")
        lost = faults.hold("delete_many", key="claims/*")
        faults.unavailable("delete_many", key="claims/*")
        await leaving.enqueue("one")
        await runs.count(1)
        await ending.reached.wait()
        (key,) = await bed.keys(layout.READY)
        copy = bed.bodies()[key]
        ending.open()
        await anyio.sleep(YOUNG.segment_age / 2)
        assert await bed.keys(layout.READY) == []
        await bed.memory.put(key, copy)
        async with bed.queue(settings=YOUNG, on_message=handle) as staying:
            await staying.start_processing()
            await lost.reached.wait()
            await leaving.drain()
            await anyio.sleep(5 * YOUNG.visibility_timeout)
    assert runs.items == ["one"]
    assert await bed.leftovers() == []


@virtual
async def test_a_late_delete_while_a_settlement_is_finished_by_another() -> None:
    """A worker is killed with its DELETE under way. It lands while another one, which has read the segment, is about to
    write what moved out of it; that was run meanwhile, and its claim is gone: it is not written a second time.
    """
    bed = Bed()
    runs = Seen()

    async def fail(payload: int, context: Context) -> None:
        # So long that nothing about the segment is young any more as it is settled.
        await anyio.sleep(4)
        raise OSError(f"no {payload}")

    async def succeed(payload: int, context: Context) -> None:
        runs((payload, context.attempt))

    first = Killable(bed, fail, settings=YOUNG)
    late = first.faults.land_late("delete", key="ready/*", times=None)
    second = Killable(bed, succeed, settings=YOUNG)
    rewriting = second.faults.hold("put", key="delayed/*")
    async with bed.queue(settings=YOUNG) as producer, anyio.create_task_group() as group:
        await producer.enqueue(1)
        group.start_soon(first.run)
        await late.reached.wait()
        first.kill()
        group.start_soon(second.run)
        await rewriting.reached.wait()
        await late.land()
        async with bed.queue(settings=YOUNG, on_message=succeed):
            await runs.count(1)
            # The claim of what moved has to be gone, too: nothing shows any more that it was written.
            await anyio.sleep(YOUNG.claim_linger + 4)
            rewriting.open()
            await anyio.sleep(30)
        second.kill()
    assert runs.items == [(1, 2)]


@virtual
async def test_a_rename_whose_reply_was_lost() -> None:
    """What moved could not be written in time, got another key, and that reply was lost for long. Whoever goes on writes
    it under the key that the claim names, so that the next worker, should this one die now, writes nothing more.
    """
    bed = Bed()
    runs = Seen()

    async def fail(payload: int, context: Context) -> None:
        raise OSError(f"no {payload}")

    async def succeed(payload: int, context: Context) -> None:
        runs((payload, context.attempt))

    first = Killable(bed, fail, settings=YOUNG)
    moving = first.faults.hold("put", key="delayed/*")
    deleting = first.faults.hold("delete", key="ready/*")
    async with bed.queue(settings=YOUNG) as producer, anyio.create_task_group() as group:
        await producer.enqueue(1)
        group.start_soon(first.run)
        await moving.reached.wait()
        lost = first.faults.lose_reply("put", key="claims/*")
        away = first.faults.unavailable("get", "put", key="claims/*")
        await anyio.sleep(2 * YOUNG.segment_age)
        moving.open()
        # So long that the worker gives the rename up, and decides on another.
        await anyio.sleep(YOUNG.visibility_timeout + 5)
        assert lost.spent
        first.faults.remove(away)
        await deleting.reached.wait()
        first.kill()
        async with bed.queue(settings=YOUNG, on_message=succeed):
            await runs.count(1)
            await anyio.sleep(60)
    assert runs.items == [(1, 2)]
    assert await bed.live() == {}


@virtual
async def test_a_key_that_was_made_while_the_local_clock_was_ahead() -> None:
    """No reply said yet that the clock had jumped, so the key bears a time to come. The reply to its write is lost, and
    the message has been run and forgotten as its writer looks: it is not written again unless that is said.
    """
    bed = Bed()
    lane, faults = bed.lane()
    runs = Seen()
    ambiguous = Seen()
    clock = LoopClock()

    async def handle(payload: str) -> None:
        runs(payload)

    producer = S3Queue[str](storage=lane, settings=YOUNG, clock=clock)
    async with producer, bed.queue(settings=YOUNG, on_message=handle):
        producer.on("enqueue.ambiguous", ambiguous)
        await anyio.sleep(30)
        clock.offset_s += 20
        faults.lose_reply("put", key="ready/*")
        faults.unavailable("get", "put", key="*")
        async with anyio.create_task_group() as group:
            group.start_soon(producer.enqueue, "one")
            await runs.count(1)
            await anyio.sleep(YOUNG.claim_linger + 4)
            faults.clear()
        await anyio.sleep(60)
    assert len(runs.items) == 1 + len(ambiguous.items)
    assert await bed.leftovers() == []


@virtual
async def test_a_worker_that_was_at_rest_trusts_no_long_lease_once_it_claims() -> None:
    """A beat that hangs as it claims, and says that it rests, keeps others from landing: its handler is stopped before
    another worker runs the message.
    """
    bed = Bed()
    started, stopped, taken = Seen(), Seen(), Seen()

    async def hang(payload: int) -> None:
        started(payload)
        try:
            await anyio.sleep_forever()
        finally:
            stopped(anyio.current_time())

    async def handler(payload: int) -> None:
        taken(anyio.current_time())

    worker = Killable(bed, hang)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await worker.ready.wait()
        async with bed.queue() as producer:
            await anyio.sleep(60)
            hanging = worker.faults.hold("put", key="plugin/workers/*")
            await hanging.reached.wait()
            await producer.enqueue(1)
            await started.count(1)
            worker.faults.unavailable(key="plugin/workers/*")
            async with bed.queue(on_message=handler):
                (taken_at,) = await taken.count(1)
                (stopped_at,) = await stopped.count(1)
            worker.kill()
    assert stopped_at < taken_at


@virtual
async def test_a_late_copy_lands_while_the_next_one_works() -> None:
    """It is left alone as long as it could come once more, and deleted then."""
    bed = Bed()
    runs = Runs()
    async with copied(bed, runs) as (_, copies):
        pass
    async with bed.queue(on_message=runs.handle) as queue:
        await queue.start_processing()
        await anyio.sleep(1)
        ((key, body),) = copies.items()
        await bed.memory.put(key, body)
        await anyio.sleep(1)
        assert await bed.keys(layout.READY) == [key]
        await eventually(lambda: clean(bed))
    assert runs.items == ["x"]


@virtual
async def test_somebody_registers_while_the_tombstone_is_written() -> None:
    """It may have looked for tombstones before: the claims stay for it, and say that all is done."""
    bed = Bed()
    runs = Runs()
    writing = bed.faults.hold("put", key=TOMBSTONES + "*")
    lane, _ = bed.lane()
    async with (
        anyio.create_task_group() as group,
        bed.queue(storage=lane, on_message=runs.handle, auto_start=False) as other,
    ):
        async with copied(bed, runs) as (leaving, copies):
            group.start_soon(leaving.drain)
            await writing.reached.wait()
            await other.start_processing()
            registered = await bed.keys(WORKERS)
            writing.open()
            await leaving.drain()
        named = await bed.keys(TOMBSTONES)
        claimed = await bed.keys(layout.CLAIMS)
        for key, body in copies.items():
            await bed.memory.put(key, body)
        await anyio.sleep(10 * QUIET.visibility_timeout)
        swept = await clean(bed)
    assert len(registered) == 2
    assert named == []
    assert len(claimed) == 1
    assert runs.items == ["x"]
    assert swept
