"""The last worker to leave names what it had just ended: a late copy of it is not run by whoever comes next."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest

from s3queue_async import S3Queue, Settings
from s3queue_async.engine import tombstones
from s3queue_async.engine.tombstones import Tombstone
from s3queue_async.protocol import board as boards
from s3queue_async.protocol import layout
from tests.unit.queue.bed import QUIET, Bed, Seen, eventually, virtual

BOARD = f"plugin/{layout.COORDINATOR}/{layout.BOARD}"
TOMBSTONES = f"plugin/{layout.TOMBSTONES}/"
WORKERS = f"plugin/{layout.WORKERS}/"


class Runs(Seen):
    """What was handled."""

    async def handle(self, payload: Any) -> None:
        self(payload)


@asynccontextmanager
async def copied(bed: Bed, runs: Runs) -> AsyncIterator[tuple[S3Queue[Any], dict[str, bytes]]]:
    """A worker alone that has just ended a message as it leaves; with the segment as a late write would bring it back."""
    ending = bed.faults.hold("delete", key="ready/*")
    async with bed.queue(on_message=runs.handle) as queue:
        await queue.enqueue("x")
        await runs.count(1)
        await ending.reached.wait()
        (key,) = await bed.keys(layout.READY)
        copies = {key: bed.bodies()[key]}
        ending.open()
        await eventually(lambda: gone(bed))
        yield queue, copies


async def left_with_a_copy(bed: Bed, runs: Runs) -> dict[str, bytes]:
    """The same, once it has left and the late write has landed; returns what landed."""
    async with copied(bed, runs) as (_, copies):
        pass
    for key, body in copies.items():
        await bed.memory.put(key, body)
    return copies


async def gone(bed: Bed) -> bool:
    return not await bed.keys(layout.READY)


async def clean(bed: Bed) -> bool:
    """Whether nothing is left but the heartbeats of those who are there."""
    left = [*await bed.keys(TOMBSTONES), *await bed.leftovers()]
    return not [key for key in left if not key.startswith(WORKERS)]


@pytest.mark.parametrize("comes_after_s", [0.0, 3.0, 3600.0])
@virtual
async def test_a_late_copy_is_not_run_by_who_comes_next(comes_after_s: float) -> None:
    """Whenever the next worker comes: it runs nothing of it, and leaves neither the copy nor the tombstone behind."""
    bed = Bed()
    runs = Runs()
    await left_with_a_copy(bed, runs)
    assert len(await bed.keys(TOMBSTONES)) == 1
    assert await bed.keys(layout.CLAIMS) == []
    await anyio.sleep(comes_after_s)
    async with bed.queue(on_message=runs.handle) as queue:
        await queue.enqueue("y")
        await runs.count(2)
        await anyio.sleep(3 * QUIET.claim_linger)
        assert await clean(bed)
    assert runs.items == ["x", "y"]
    assert await bed.keys(TOMBSTONES) == []


@virtual
async def test_a_coordinator_gives_no_ticket_for_a_late_copy() -> None:
    """It would go to nobody, and with few tickets nothing else would be given away meanwhile."""
    bed = Bed()
    runs = Runs()
    copies = await left_with_a_copy(bed, runs)
    settings = Settings(ticket_batch=1)
    tickets: set[str] = set()
    async with (
        bed.queue(settings=settings, on_message=runs.handle) as one,
        bed.queue(settings=settings, on_message=runs.handle) as other,
        bed.queue(settings=settings) as producer,
    ):
        await one.start_processing()
        await other.start_processing()
        await eventually(lambda: _leads(one, other))
        await producer.enqueue("y")
        while await bed.keys(TOMBSTONES):
            board = bed.bodies().get(BOARD)
            if board is not None:
                tickets.update(ticket.key for ticket in boards.decode(BOARD, board).tickets)
            await anyio.sleep(0.05)
        await runs.count(2)
    assert runs.items == ["x", "y"]
    assert tickets.isdisjoint(copies)


async def _leads(*queues: S3Queue[Any]) -> bool:
    sessions = [queue._session for queue in queues if queue.is_coordinator]
    return any(session is not None and session.coordination.active_workers > 1 for session in sessions)


@virtual
async def test_what_is_old_needs_no_tombstone() -> None:
    """A worker whose last message ended long ago, or that ended none, or that stays, writes none."""
    bed = Bed()
    runs = Runs()
    async with bed.queue(on_message=runs.handle) as queue:
        await queue.enqueue("x")
        await runs.count(1)
        await anyio.sleep(QUIET.segment_age + QUIET.lease_margin + 1)
    async with bed.queue(on_message=runs.handle):
        pass
    async with bed.queue() as queue:
        await queue.enqueue("y")
    assert not [call for call in bed.store.calls if call.operation == "put" and call.keys[0].startswith(TOMBSTONES)]


@virtual
async def test_beside_others_no_tombstone_is_written() -> None:
    """The claims say what ended, as always."""
    bed = Bed()
    runs = Runs()
    async with bed.queue(on_message=runs.handle) as staying:
        await staying.start_processing()
        async with copied(bed, runs):
            pass
        assert await bed.keys(TOMBSTONES) == []
        assert len(await bed.keys(layout.CLAIMS)) == 1


@virtual
async def test_a_tombstone_that_cannot_be_written() -> None:
    """The claims stay for the next worker, and say that all is done."""
    bed = Bed()
    runs = Runs()
    refused = bed.faults.unavailable("put", key=TOMBSTONES + "*")
    await left_with_a_copy(bed, runs)
    bed.faults.remove(refused)
    assert len(await bed.keys(layout.CLAIMS)) == 1
    async with bed.queue(on_message=runs.handle) as queue:
        await queue.start_processing()
        await anyio.sleep(10 * QUIET.visibility_timeout)
        assert await clean(bed)
    assert runs.items == ["x"]


@pytest.mark.parametrize("retriable", [True, False])
@virtual
async def test_nothing_is_claimed_before_tombstones_are_read(retriable: bool) -> None:
    """They cannot be read for a while: the worker beats, and begins once it knows what must not be run."""
    bed = Bed()
    runs = Runs()
    await left_with_a_copy(bed, runs)
    away = bed.faults.unavailable("list", key=TOMBSTONES + "*", retriable=retriable)
    async with bed.queue(on_message=runs.handle) as queue:
        await queue.enqueue("y")
        await anyio.sleep(3 * QUIET.visibility_timeout)
        assert await bed.keys(WORKERS)
        assert await bed.keys(layout.CLAIMS) == []
        assert runs.items == ["x"]
        bed.faults.remove(away)
        await runs.count(2)
        await eventually(lambda: clean(bed))
    assert runs.items == ["x", "y"]


@virtual
async def test_a_drain_while_tombstones_cannot_be_read() -> None:
    """The worker leaves as always; nothing was claimed."""
    bed = Bed()
    runs = Runs()
    bed.faults.unavailable("list", key=TOMBSTONES + "*")
    async with bed.queue(on_message=runs.handle) as queue:
        await queue.enqueue("x")
        await eventually(lambda: bed.keys(WORKERS))
        with anyio.fail_after(10):
            await queue.drain()
    assert runs.items == []
    assert await bed.keys(WORKERS) == []
    assert len(await bed.keys(layout.READY)) == 1


@pytest.mark.parametrize("body", [b"", b"{", b'{"ended":["no key"]}', b'{"ended":3}'])
@virtual
async def test_a_damaged_tombstone(body: bytes) -> None:
    """It tells nobody anything: said once, and deleted; the worker works."""
    bed = Bed()
    runs = Runs()
    async with bed.queue(on_message=runs.handle) as queue:
        await queue.enqueue("x")
        await runs.count(1)
    await bed.memory.put(TOMBSTONES + "worker", body)
    async with bed.queue(on_message=runs.handle) as queue:
        await queue.enqueue("y")
        await runs.count(2)
        await eventually(lambda: clean(bed))


@virtual
async def test_many_short_lives_leave_few_tombstones() -> None:
    """A script that runs one message a minute, or one a second, finds those that are over deleted."""
    bed = Bed()
    runs = Runs()
    for number in range(20):
        async with bed.queue(on_message=runs.handle) as queue:
            await queue.enqueue(number)
            await runs.count(number + 1)
        await anyio.sleep(60)
    assert len(await bed.keys(TOMBSTONES)) == 1
    most = 0
    for number in range(20, 60):
        async with bed.queue(on_message=runs.handle) as queue:
            await queue.enqueue(number)
            await runs.count(number + 1)
        await anyio.sleep(1)
        most = max(most, len(await bed.keys(TOMBSTONES)))
    assert most <= QUIET.segment_age + QUIET.lease_margin + 2


@virtual
async def test_many_segments_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named in one object, and deleted in several requests."""
    monkeypatch.setattr(tombstones, "DELETE_BATCH_MAX", 7)
    bed = Bed()
    runs = Runs()
    settings = Settings(coordinator=False, segment_messages_max=1)
    async with bed.queue(settings=settings, on_message=runs.handle) as queue:
        await queue.enqueue_many(range(30))
        await runs.count(30)
    (key,) = await bed.keys(TOMBSTONES)
    named = msgspec.json.decode(bed.bodies()[key], type=Tombstone).ended
    assert len(named) == 30
    for late in named:
        await bed.memory.put(late, b"a copy")
    async with bed.queue(settings=settings, on_message=runs.handle) as queue:
        await queue.start_processing()
        await eventually(lambda: clean(bed))
    assert sorted(runs.items) == list(range(30))
