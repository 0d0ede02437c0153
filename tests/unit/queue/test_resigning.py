"""A coordinator that leaves while its board is being written: the next one must not wait until the board's time is over."""

from __future__ import annotations

import anyio
import pytest

from s3queue_async import S3Queue, Settings
from tests.unit.queue.bed import Bed, eventually, virtual
from tests.unit.queue.test_coordinator import BOARD, TTL_S, WORKERS, Workers, board_of


async def followed(bed: Bed, before: str | None) -> None:
    """Return once somebody else's board is there."""

    async def other() -> bool:
        board = await board_of(bed)
        return board.state == "leading" and board.leader != before

    await eventually(other)


@virtual
async def test_a_publication_lands_as_its_coordinator_drains() -> None:
    """The resignation loses against the coordinator's own last publication: it is made again, over that one."""
    bed = Bed(latency_s=0.01)
    workers = Workers(bed, Settings(), 3)
    async with anyio.create_task_group() as group, bed.queue() as producer:
        await group.start(workers.run)
        leader = await workers.elected()
        await anyio.sleep(30)
        gate = bed.faults.hold_reply("put", key=BOARD)
        await producer.enqueue_many(range(10))
        await gate.reached.wait()
        began = anyio.current_time()
        leader_id = leader.worker_id
        await leader.drain()
        await followed(bed, leader_id)
        assert anyio.current_time() - began < TTL_S / 2
        assert (await board_of(bed)).term == 2
        group.cancel_scope.cancel()


@virtual
async def test_the_reply_to_the_last_publication_comes_after_the_resignation() -> None:
    """What that publication wrote is not taken for the board that is there."""
    bed = Bed()
    workers = Workers(bed, Settings(), 1, seconds=60)
    async with anyio.create_task_group() as group, bed.queue() as producer:
        await group.start(workers.run)
        leader = await workers.elected()
        await producer.enqueue(0)
        await anyio.sleep(5)
        assert leader._session is not None
        election = leader._session.election
        gate = bed.faults.hold_reply("put", key=BOARD)
        await gate.reached.wait()
        group.start_soon(leader.drain)
        await anyio.sleep(1)
        assert (await board_of(bed)).state == "resigned"
        gate.open()
        await anyio.sleep(1)
        assert election.board is not None
        assert election.board.state == "resigned"
        assert not election.live
        group.cancel_scope.cancel()


@virtual
@pytest.mark.parametrize("drains", [True, False], ids=["drained", "cancelled"])
async def test_a_worker_that_leaves_while_it_is_elected(drains: bool) -> None:
    """Its first board lands, and it does not know yet: that board is resigned, too."""
    bed = Bed(latency_s=0.01)
    first = Workers(bed, Settings(), 1)
    others = Workers(bed, Settings(), 2)
    gate = bed.faults.hold_reply("put", key=BOARD)
    async with anyio.create_task_group() as group:
        leaves = await group.start(_cancellable, first)
        await gate.reached.wait()
        leader: S3Queue[object] = first.queues[0]
        worker_id = (await board_of(bed)).leader
        assert worker_id == leader.worker_id
        assert not leader.is_coordinator
        await group.start(others.run)
        began = anyio.current_time()
        if drains:
            await leader.drain()
        else:
            leaves.cancel()
        await followed(bed, worker_id)
        assert anyio.current_time() - began < TTL_S / 2
        group.cancel_scope.cancel()


async def _cancellable(
    workers: Workers, *, task_status: anyio.abc.TaskStatus[anyio.CancelScope] = anyio.TASK_STATUS_IGNORED
) -> None:
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:
            await group.start(workers.run)
            task_status.started(scope)


@virtual
async def test_a_resignation_that_fails_is_made_when_the_worker_ends() -> None:
    """The board could not be written as it began to drain; it can as the last handler ends."""
    bed = Bed(latency_s=0.01)
    workers = Workers(bed, Settings(election_interval=60), 3, seconds=30)
    async with anyio.create_task_group() as group, bed.queue() as producer:
        await group.start(workers.run)
        leader = await workers.elected()
        await producer.enqueue_many(range(300))

        async def at_work() -> bool:
            return leader._session is not None and leader._session.feed.running > 0

        await eventually(at_work)
        fault = bed.faults.unavailable("put", key=BOARD)
        began = anyio.current_time()
        leader_id = leader.worker_id
        group.start_soon(leader.drain)
        await anyio.sleep(10)
        bed.faults.remove(fault)
        assert (await board_of(bed)).leader == leader_id
        await followed(bed, leader_id)
        # The handlers' thirty seconds, and a look at the board of the others.
        assert anyio.current_time() - began < 30 + 60 + 5
        group.cancel_scope.cancel()


@virtual
async def test_the_heartbeat_goes_although_the_board_does_not_answer() -> None:
    """Nobody waits for the lease of a worker that left, whatever became of its term."""
    bed = Bed(latency_s=0.01)
    workers = Workers(bed, Settings(), 1)
    async with anyio.create_task_group() as group:
        await group.start(workers.run)
        leader = await workers.elected()
        worker_id = leader.worker_id
        bed.faults.hold("get", "put", key=BOARD, times=None)
        await leader.drain()
        assert (await board_of(bed)).leader == worker_id
        assert await bed.keys(WORKERS) == []
        group.cancel_scope.cancel()


@virtual
async def test_a_coordinator_that_leaves_resigns_nobody_elses_board() -> None:
    """Its election was answered too late: another one leads, and stays."""
    bed = Bed(latency_s=0.01)
    storage, faults = bed.lane()
    others = Workers(bed, Settings(), 1)
    await bed.open()
    async with anyio.create_task_group() as group:
        gate = faults.hold("put", key=BOARD)
        async with bed.queue(storage=storage, settings=Settings(), on_message=_nothing) as late:
            await late.start_processing()
            await gate.reached.wait()
            await group.start(others.run)
            leader = await others.elected()
            await anyio.sleep(1)
            before = await board_of(bed)
        assert await board_of(bed) == before
        assert leader.is_coordinator
        group.cancel_scope.cancel()


async def _nothing(payload: object) -> None:
    pass
