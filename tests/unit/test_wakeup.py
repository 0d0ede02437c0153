"""What tasks wait on: the next change, and what happens once."""

from __future__ import annotations

import anyio
from anyio import wait_all_tasks_blocked
from anyio.lowlevel import checkpoint

from s3queue_async.wakeup import Latch, Wakeup


async def test_a_latch_wakes_all_who_wait_and_stays_set() -> None:
    latch, woken = Latch(), list[int]()

    async def waits(number: int) -> None:
        await latch.wait()
        woken.append(number)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(waits, 1)
        tasks.start_soon(waits, 2)
        await wait_all_tasks_blocked()
        assert not woken
        assert not latch.is_set()
        latch.set()
    assert sorted(woken) == [1, 2]
    assert latch.is_set()
    await latch.wait()


async def test_waiting_for_a_set_latch_lets_others_run_and_can_be_cancelled() -> None:
    latch, ran = Latch(), list[str]()
    latch.set()

    async def other() -> None:
        ran.append("other")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(other)
        await latch.wait()
        assert ran == ["other"]
    with anyio.CancelScope() as scope:
        scope.cancel()
        await latch.wait()
    assert scope.cancelled_caught


async def test_a_wakeup_is_for_the_next_change_alone() -> None:
    wakeup, woken = Wakeup(), list[str]()
    wakeup.set()

    async def waits() -> None:
        await wakeup.wait()
        woken.append("woken")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(waits)
        await wait_all_tasks_blocked()
        await checkpoint()
        assert not woken
        wakeup.set()
    assert woken == ["woken"]
