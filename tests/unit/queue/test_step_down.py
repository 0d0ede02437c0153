"""The coordinator steps down because somebody outside asks for it: another one takes over, and no message notices."""

from __future__ import annotations

import anyio
import pytest

from s3queue_async import Settings
from s3queue_async.errors import StoreUnavailable
from s3queue_async.protocol import board as boards
from tests.unit.queue.bed import Bed, eventually, virtual
from tests.unit.queue.test_coordinator import BOARD, Workers, board_of, write


@virtual
async def test_another_one_takes_over() -> None:
    """The old one is told why it leads no more, the next one has the next term, and it comes soon."""
    bed = Bed(latency_s=0.01)
    workers = Workers(bed, Settings(), 3)
    async with anyio.create_task_group() as group, bed.queue() as operator:
        await group.start(workers.run)
        leader = await workers.elected()
        await anyio.sleep(30)
        shown = await operator.coordinator.show()
        assert shown is not None
        assert (shown.worker_id, shown.term, shown.state, shown.workers) == (leader.worker_id, 1, "leading", 3)
        began = anyio.current_time()
        asked = await operator.coordinator.step_down()
        assert asked is not None
        assert asked.worker_id == leader.worker_id

        async def followed() -> bool:
            board = await board_of(bed)
            return board.term > 1 and board.state == "leading"

        await eventually(followed)
        assert anyio.current_time() - began < 10
        await anyio.sleep(10)
        assert workers.leaders != [leader]
        assert len(workers.leaders) == 1
        assert (await board_of(bed)).leader == workers.leaders[0].worker_id
        demoted = [event for event in workers.events if event.name == "coordinator.demoted"]
        assert [event.worker_id for event in demoted] == [leader.worker_id]
        group.cancel_scope.cancel()


@virtual
async def test_under_load_nothing_is_lost_or_repeated() -> None:
    """Ten times in the middle of work: each message is handled once."""
    bed = Bed(latency_s=0.01)
    workers = Workers(bed, Settings(election_interval=1), 3, seconds=0.2)
    async with anyio.create_task_group() as group, bed.queue() as operator:
        await group.start(workers.run)
        await workers.elected()
        await operator.enqueue_many(range(3000))
        stepped = 0
        while stepped < 10:
            await anyio.sleep(2)
            stepped += await operator.coordinator.step_down() is not None
        await workers.changed.count(3000)
        await anyio.sleep(5)
        assert set(workers.handled.values()) == {1}
        assert len(workers.handled) == 3000
        assert (await board_of(bed)).term >= 5
        group.cancel_scope.cancel()


@virtual
async def test_alone_it_leads_again() -> None:
    """With nobody else there it leaves the election alone for four intervals, works on meanwhile, and leads again."""
    bed = Bed()
    workers = Workers(bed, Settings(), 1)
    async with anyio.create_task_group() as group, bed.queue() as operator:
        await group.start(workers.run)
        leader = await workers.elected()
        await operator.coordinator.step_down()
        await anyio.sleep(10)
        assert workers.leaders == []
        assert [event.reason for event in workers.events if event.name == "coordinator.demoted"] == [
            "it was asked to step down"
        ]
        await operator.enqueue_many(range(10))
        await workers.changed.count(10)
        await anyio.sleep(30)
        assert workers.leaders == [leader]
        shown = await operator.coordinator.show()
        assert shown is not None
        assert (shown.term, shown.state) == (2, "leading")
        group.cancel_scope.cancel()


@virtual
async def test_nobody_to_step_down() -> None:
    """None without a board, with a resigned one, and with one that is over or damaged; the board stays as it is."""
    bed = Bed()
    async with bed.queue() as operator:
        assert await operator.coordinator.show() is None
        assert await operator.coordinator.step_down() is None
        await write(bed, boards.Board("n", 4, "w", "resigned", 15.0))
        assert await operator.coordinator.step_down() is None
        await write(bed, boards.Board("n", 4, "w", "leading", 15.0))
        await anyio.sleep(60)
        shown = await operator.coordinator.show()
        assert shown is not None
        assert shown.state == "expired"
        assert await operator.coordinator.step_down() is None
        await bed.memory.put(BOARD, b"junk")
        assert await operator.coordinator.step_down() is None
        assert bed.bodies()[BOARD] == b"junk"


@virtual
async def test_only_the_one_that_was_seen_is_asked() -> None:
    """A coordinator that was followed by another one meanwhile has stepped down already: its successor stays."""
    bed = Bed()
    storage, faults = bed.lane()
    await bed.open()
    async with bed.queue(storage=storage) as operator, anyio.create_task_group() as group:
        await write(bed, boards.Board("n", 4, "w", "leading", 15.0))
        gate = faults.hold("put", key=BOARD)
        group.start_soon(operator.coordinator.step_down)
        await gate.reached.wait()
        await write(bed, boards.Board("m", 5, "v", "leading", 15.0))
        gate.open()
        await anyio.sleep(5)
        assert ((await board_of(bed)).term, (await board_of(bed)).state) == (5, "leading")


@virtual
async def test_a_board_that_changes_all_the_time() -> None:
    """A coordinator that publishes during every try is not stepped down; the error says to try again."""
    bed = Bed()
    storage, faults = bed.lane()
    async with bed.queue(storage=storage) as operator, anyio.create_task_group() as group:
        await write(bed, boards.Board("n", 4, "w", "leading", 15.0))
        faults.delay(0.2, "put", key=BOARD, times=None)

        async def publish() -> None:
            number = 0
            while True:
                number += 1
                await write(bed, boards.Board(f"n{number}", 4, "w", "leading", 15.0))
                await anyio.sleep(0.05)

        group.start_soon(publish)
        with pytest.raises(StoreUnavailable, match="during each of 30 tries"):
            await operator.coordinator.step_down()
        group.cancel_scope.cancel()


@virtual
async def test_a_lost_reply() -> None:
    """The write arrived, its answer did not: it is found out by reading."""
    bed = Bed()
    storage, faults = bed.lane()
    async with bed.queue(storage=storage) as operator:
        await write(bed, boards.Board("n", 4, "w", "leading", 15.0))
        faults.lose_reply("put", key=BOARD)
        assert await operator.coordinator.step_down() is not None
        assert (await board_of(bed)).state == "resigned"
