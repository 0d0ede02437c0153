"""The feed: in which order messages start, and how one that may have killed a worker runs alone."""

from __future__ import annotations

import anyio

from s3queue_async.engine.feed import Feed
from s3queue_async.engine.held import Held
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.protocol.segment import Index, Record
from s3queue_async.testing.clock import LoopClock, advance
from tests.unit.queue.bed import virtual

PATIENCE_S = 2.0


def held(time_ms: int, count: int, *, priority: int = 0, isolated: bool = False) -> Held:
    key = SegmentKey(Place.READY, layout.ulid(time_ms, 0), count, priority)
    index = Index([Record(f"{time_ms}-{n}", 0, 1) for n in range(count)], priority)
    claim = claims.fresh(key.text, owner="w", now_ms=0, nonce="n")
    if isolated:
        claim = claims.take(claim, source=index, owner="w", now_ms=0, nonce="m", crashed=True)
    return Held(key, claim, "v", index, [b"x"] * count, claimed_at=0.0)


def feed() -> Feed:
    return Feed(LoopClock(), patience_s=PATIENCE_S, on_hungry=lambda: None)


def names(feed: Feed, most: int) -> list[str]:
    taken = (feed.take() for _ in range(most))
    return [one[0].index.records[one[1]].id for one in taken if one is not None]


@virtual
async def test_order() -> None:
    """Higher priority first, then the older segment, then the order in the segment."""
    queue = feed()
    for one in (held(5, 2), held(3, 2), held(9, 1, priority=7)):
        queue.add(one)
    assert queue.queued == 5
    assert names(queue, 10) == ["9-0", "3-0", "3-1", "5-0", "5-1"]
    assert (queue.running, queue.queued) == (5, 0)


@virtual
async def test_isolated_messages_run_alone() -> None:
    """Nothing runs beside a message of an isolated segment, and its messages run one after the other."""
    queue = feed()
    suspect, other = held(1, 2, isolated=True), held(2, 1)
    queue.add(suspect)
    queue.add(other)
    assert names(queue, 5) == ["1-0"]
    queue.done(suspect)
    assert names(queue, 5) == ["1-1"]
    queue.done(suspect)
    assert names(queue, 5) == ["2-0"]


@virtual
async def test_it_waits_for_running_handlers_but_not_for_ever() -> None:
    """An isolated message starts once nothing else runs, or once what runs has run for longer than the patience."""
    queue = feed()
    other, suspect = held(2, 1), held(1, 1, isolated=True)
    queue.add(other)
    assert names(queue, 1) == ["2-0"]
    queue.add(suspect)
    assert names(queue, 1) == []
    advance(PATIENCE_S / 2)
    assert names(queue, 1) == []
    advance(PATIENCE_S / 2)
    assert names(queue, 1) == ["1-0"]


@virtual
async def test_patience_begins_anew_for_the_next() -> None:
    """Patience that was spent on a segment that was lost meanwhile is not spent on the next one."""
    queue = feed()
    other, lost, suspect = held(2, 1), held(1, 1, isolated=True), held(3, 1, isolated=True)
    queue.add(other)
    assert names(queue, 1) == ["2-0"]
    queue.add(lost)
    assert names(queue, 1) == []
    queue.remove(lost)
    advance(PATIENCE_S)
    queue.add(suspect)
    assert names(queue, 1) == []
    queue.done(other)
    assert names(queue, 1) == ["3-0"]


@virtual
async def test_a_lost_segment_leaves() -> None:
    """Once removed nothing of a segment starts, and others may start beside what of it still runs no more."""
    queue = feed()
    suspect, other = held(1, 2, isolated=True), held(2, 1)
    queue.add(suspect)
    queue.add(other)
    assert names(queue, 1) == ["1-0"]
    suspect.lose("test")
    queue.remove(suspect)
    assert names(queue, 1) == []
    queue.done(suspect)
    assert names(queue, 2) == ["2-0"]


@virtual
async def test_takers_are_woken_once_each() -> None:
    """A segment wakes one of three takers; when that one is busy it wakes the next; the third waits on."""
    queue = feed()
    woken: list[int] = []

    async def taker(number: int) -> None:
        await queue.wait()
        woken.append(number)

    async with anyio.create_task_group() as group:
        for number in range(3):
            group.start_soon(taker, number)
        await anyio.sleep(1)
        assert queue.idle == 3
        queue.add(held(1, 2))
        await anyio.sleep(1)
        assert woken == [0]
        queue.wake_next()
        await anyio.sleep(1)
        assert woken == [0, 1]
        assert queue.idle == 1
        group.cancel_scope.cancel()
    assert queue.idle == 0
