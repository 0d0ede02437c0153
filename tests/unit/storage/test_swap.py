"""A conditional write whose outcome is decided, whatever becomes of its replies."""

from __future__ import annotations

import asyncio
import random

import pytest

from s3queue_async.errors import StoreUnavailable
from s3queue_async.storage.base import Condition, Conflict, IfAbsent, IfVersion, Storage, Superseded, Written
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.storage.swap import swap
from s3queue_async.testing.conformance import keys_of, read
from s3queue_async.testing.faults import FaultyStorage
from tests.unit.storage.clocks import SteppingClock


async def _swap(
    storage: Storage,
    body: bytes,
    when: Condition,
    *,
    clock: SteppingClock | None = None,
    deadline_s: float = 20.0,
) -> Written:
    clock = clock or SteppingClock()
    return await swap(storage, "k", body, when=when, clock=clock, random=random.Random(1), deadline_s=deadline_s)


async def test_without_faults(memory: MemoryStorage) -> None:
    """A create and an update go through at the first try; a stale update is superseded by what is there."""
    first = await _swap(memory, b"1", IfAbsent())
    second = await _swap(memory, b"2", IfVersion(first.version))
    with pytest.raises(Superseded) as caught:
        await _swap(memory, b"3", IfVersion(first.version))
    assert caught.value.stored is not None
    assert (caught.value.stored.version, caught.value.stored.body) == (second.version, b"2")
    assert caught.value.date_s is not None
    await memory.delete("k")
    with pytest.raises(Superseded) as caught:
        await _swap(memory, b"3", IfVersion(second.version))
    assert caught.value.stored is None


@pytest.mark.parametrize("lost", ["lose_reply", "lose_request", "throttle"])
@pytest.mark.parametrize("creates", [True, False])
async def test_faults_are_decided_by_reading(
    memory: MemoryStorage, faulty: FaultyStorage, lost: str, creates: bool
) -> None:
    """Whether the reply or the request was lost, twice: the body is there in the end, written once."""
    when: Condition = IfAbsent()
    if not creates:
        when = IfVersion((await memory.put("k", b"old")).version)
    getattr(faulty, lost)("put", times=2)
    faulty.lose_request("get")
    written = await _swap(faulty, b"new", when)
    found = await read(memory, "k")
    assert (found.body, found.version) == (b"new", written.version)


async def test_a_412_to_an_own_earlier_write(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """A first try lands late, and makes the second one fail: the equal body shows that it was ours."""
    late = faulty.land_late("put")
    clock = SteppingClock()
    gate = faulty.hold("put")
    task = asyncio.ensure_future(_swap(faulty, b"new", IfAbsent(), clock=clock))
    await gate.reached.wait()
    (landed,) = await late.land()
    gate.open()
    written = await task
    assert isinstance(landed, Written)
    assert written.version == landed.version


async def test_a_rival_between_the_tries(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """After a lost request somebody else writes: superseded, with the rival's body."""
    faulty.lose_request("put")
    gate = faulty.hold("get")
    task = asyncio.ensure_future(_swap(faulty, b"new", IfAbsent()))
    await gate.reached.wait()
    await memory.put("k", b"rival")
    gate.open()
    with pytest.raises(Superseded) as caught:
        await task
    assert caught.value.stored is not None
    assert caught.value.stored.body == b"rival"


async def test_conflicts(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """409: a create is tried again without reading, an update is read first."""
    faulty.fail(Conflict("k"), "put", times=2)
    reads = faulty.unavailable("get", retriable=False)
    written = await _swap(faulty, b"1", IfAbsent())
    faulty.remove(reads)
    faulty.fail(Conflict("k"), "put")
    gate = faulty.hold("get")
    task = asyncio.ensure_future(_swap(faulty, b"2", IfVersion(written.version)))
    await gate.reached.wait()
    gate.open()
    await task
    assert (await read(memory, "k")).body == b"2"


async def test_deadline_with_an_unknown_outcome(faulty: FaultyStorage) -> None:
    """A store that stays away: the pauses grow, the deadline holds, and the outcome is said to be unknown."""
    faulty.unavailable("put", "get")
    clock = SteppingClock()
    with pytest.raises(StoreUnavailable, match=r"unknown.*store is away") as caught:
        await _swap(faulty, b"1", IfAbsent(), clock=clock, deadline_s=10.0)
    assert caught.value.retriable
    assert 5.0 < clock.now_s - 1000.0 <= 10.0
    assert 0.025 <= clock.slept[0] <= 0.05
    assert max(clock.slept) <= 2.0


async def test_deadline_with_conflicts_only(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """A store that answers 409 all the time: it was not written, and that is known."""
    faulty.fail(Conflict("k"), "put", times=None)
    with pytest.raises(StoreUnavailable, match="was not written"):
        await _swap(faulty, b"1", IfAbsent(), deadline_s=3.0)
    assert await keys_of(memory) == []


async def test_retry_after_is_kept(faulty: FaultyStorage) -> None:
    """A store that names a time gets it."""
    faulty.throttle("put", retry_after_s=5.0)
    clock = SteppingClock()
    await _swap(faulty, b"1", IfAbsent(), clock=clock)
    assert clock.slept == [5.0]


async def test_a_refusal_is_raised_at_once(faulty: FaultyStorage) -> None:
    """What is not retriable is not tried again, neither at the write nor at the read."""
    clock = SteppingClock()
    faulty.unavailable("put", retriable=False, times=1)
    with pytest.raises(StoreUnavailable, match="store is away"):
        await _swap(faulty, b"1", IfAbsent(), clock=clock)
    assert clock.slept == []
    faulty.lose_request("put")
    faulty.unavailable("get", retriable=False, times=1)
    with pytest.raises(StoreUnavailable, match="store is away"):
        await _swap(faulty, b"1", IfAbsent(), clock=clock)


async def test_cancellation_is_not_swallowed(faulty: FaultyStorage) -> None:
    """A swap that is cancelled in its write or its read ends at once."""
    faulty.lose_request("put")
    for operation in ("get", "put"):
        gate = faulty.hold(operation)
        task = asyncio.ensure_future(_swap(faulty, b"1", IfAbsent()))
        await gate.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
