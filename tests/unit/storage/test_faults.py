"""FaultyStorage does what its script says, and nothing else."""

from __future__ import annotations

import asyncio

import pytest

from s3queue_async.errors import StoreUnavailable, Throttled
from s3queue_async.storage.base import Conflict, IfAbsent, NotFound, PreconditionFailed, Written
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.conformance import keys_of
from s3queue_async.testing.faults import FaultyStorage
from tests.unit.storage.clocks import SteppingClock


async def test_lost_requests_and_replies(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """A lost request is not applied, a lost reply is; both look the same to the caller."""
    faulty.lose_request("put", key="a")
    faulty.lose_reply("put", key="b")
    for key in ("a", "b"):
        with pytest.raises(StoreUnavailable, match="lost") as caught:
            await faulty.put(key, b"1", when=IfAbsent())
        assert caught.value.retriable
    assert await keys_of(memory) == ["b"]
    assert faulty.pending == []


async def test_a_lost_reply_may_have_been_a_refusal(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """What the lost reply said is in the error's cause, for the reader of a failed test."""
    faulty.lose_reply("get")
    with pytest.raises(StoreUnavailable) as caught:
        await faulty.get("missing")
    assert isinstance(caught.value.__cause__, NotFound)


async def test_choosing_calls(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """A fault takes its operations, keys and numbers of calls, in the order of the script."""
    fault = faulty.fail(Conflict("k"), "put", key="claims/*", times=2, skip=1)
    faulty.throttle("put", key="claims/*", retry_after_s=3.0)
    await faulty.put("other", b"")
    with pytest.raises(Throttled) as caught:
        await faulty.put("claims/1", b"")
    assert caught.value.retry_after_s == 3.0
    for _ in range(2):
        with pytest.raises(Conflict):
            await faulty.put("claims/1", b"")
    await faulty.put("claims/1", b"")
    assert fault.spent
    assert fault.hits == 2
    faulty.unavailable(key="claims/1")
    with pytest.raises(StoreUnavailable):
        await faulty.delete_many(["x", "claims/1"])
    faulty.clear()
    await faulty.delete_many(["x", "claims/1"])
    with pytest.raises(ValueError, match=r"unknown operations \['head'\]"):
        faulty.throttle("head")


async def test_late_writes(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """A late request fails at once, and is applied when the test lets it land."""
    gate = faulty.land_late("put", times=2)
    for _ in range(2):
        with pytest.raises(StoreUnavailable):
            await faulty.put("k", b"late", when=IfAbsent())
    assert await keys_of(memory) == []
    written, refused = await gate.land()
    assert isinstance(written, Written)
    assert isinstance(refused, PreconditionFailed)
    assert await gate.land() == []


async def test_holding(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """Held requests have not arrived, held replies have."""
    requests, replies = faulty.hold("put", key="a"), faulty.hold_reply("put", key="b")
    tasks = [asyncio.ensure_future(faulty.put(key, b"")) for key in ("a", "b")]
    await requests.reached.wait()
    await replies.reached.wait()
    assert await keys_of(memory) == ["b"]
    assert not any(task.done() for task in tasks)
    requests.open()
    replies.open()
    await asyncio.gather(*tasks)
    assert await keys_of(memory) == ["a", "b"]


async def test_delay(memory: MemoryStorage) -> None:
    """A delayed request waits on the given clock."""
    clock = SteppingClock()
    faulty = FaultyStorage(memory, clock=clock)
    fault = faulty.delay(5.0, "put")
    assert faulty.pending == [fault]
    await faulty.put("k", b"")
    assert clock.slept == [5.0]
    faulty.remove(fault)
