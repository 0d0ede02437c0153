from __future__ import annotations

import anyio

from s3queue_async.engine.writing import Pace


async def test_fewer_at_a_time_after_one_came_too_late() -> None:
    """Of eight writers that all come too late one goes on alone; each that is in time lets another one in."""
    pace = Pace(8)
    under_way: set[int] = set()
    most_after: list[int] = []
    all_named = anyio.Event()

    async def write(number: int) -> None:
        async with pace:
            under_way.add(number)
            if len(under_way) == 8:
                all_named.set()
            await all_named.wait()
            under_way.discard(number)
            await pace.too_late()
            under_way.add(number)
            most_after.append(len(under_way))
            await anyio.lowlevel.checkpoint()
            under_way.discard(number)
            pace.in_time()

    async with anyio.create_task_group() as group:
        for number in range(8):
            group.start_soon(write, number)
    assert most_after[0] == 1
    assert len(most_after) == 8
    assert pace._allowed == 8
    assert pace._under_way == 0


async def test_a_writer_that_is_cancelled_while_it_waits_leaves_its_place() -> None:
    """Cancelled in the middle of ``too_late``: the others are not kept out."""
    pace = Pace(2)
    async with anyio.create_task_group() as group:

        async def late() -> None:
            async with pace:
                await pace.too_late()

        async with pace:
            group.start_soon(late)
            await anyio.lowlevel.checkpoint()
            group.cancel_scope.cancel()
    assert pace._under_way == 0
