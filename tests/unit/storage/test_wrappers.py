"""MeteredStorage and ThrottledStorage."""

from __future__ import annotations

import asyncio
import logging
import math

import pytest

from s3queue_async.errors import StoreUnavailable, Throttled
from s3queue_async.storage.base import IfAbsent, IfVersion, NotFound, PreconditionFailed
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.storage.metered import MeteredStorage, OperationMetrics, Request
from s3queue_async.storage.throttle import RateLimit, ThrottledStorage
from s3queue_async.testing.faults import FaultyStorage
from tests.unit.storage.clocks import SteppingClock


async def test_counts(faulty: FaultyStorage) -> None:
    """Every attempt is counted by operation, with bytes, seconds, and how it ended."""
    clock = SteppingClock()
    slow = FaultyStorage(faulty, clock=clock)
    seen: list[Request] = []
    storage = MeteredStorage(slow, on_request=seen.append, clock=clock)
    slow.delay(2.0, "put")
    written = await storage.put("k", b"12345")
    with pytest.raises(PreconditionFailed):
        await storage.put("k", b"123", when=IfAbsent())
    await storage.get("k")
    await storage.get("k", unless=written.version)
    with pytest.raises(NotFound):
        await storage.get("missing")
    faulty.unavailable("delete", times=1)
    with pytest.raises(StoreUnavailable):
        await storage.delete("k")
    with pytest.raises(PreconditionFailed):
        await storage.delete("k", when=IfVersion("x"))
    await storage.delete_many(["k"])
    await storage.list("prefix/")
    counts = storage.snapshot()
    assert counts.put == OperationMetrics(2, 2.0, 0, 8, 0, {"PreconditionFailed": 1})
    assert counts.get == OperationMetrics(3, 0.0, 5, 0, 1, {"NotFound": 1})
    assert counts.delete.errors == {"StoreUnavailable": 1, "PreconditionFailed": 1}
    assert (counts.delete_many.attempts, counts.list.attempts) == (1, 1)
    assert (counts.attempts, counts.precondition_failed, counts.unmodified) == (9, 2, 1)
    assert len(seen) == 9
    assert seen[0] == Request("put", "k", 2.0, 0, 5, None)
    assert (seen[-1].operation, seen[-1].key) == ("list", "prefix/")


async def test_cancelled_attempts_count(faulty: FaultyStorage) -> None:
    """An attempt is counted from its beginning, and a cancelled one as such."""
    storage = MeteredStorage(faulty)
    gate = faulty.hold("get")
    task = asyncio.ensure_future(storage.get("k"))
    await gate.reached.wait()
    assert storage.snapshot().get.attempts == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert storage.snapshot().get.errors == {"CancelledError": 1}


async def test_a_failing_hook_hurts_nobody(memory: MemoryStorage, caplog: pytest.LogCaptureFixture) -> None:
    """What the hook raises is logged, and the write has its outcome."""

    def hook(request: Request) -> None:
        raise RuntimeError("hook")

    with caplog.at_level(logging.ERROR):
        await MeteredStorage(memory, on_request=hook).put("k", b"")
    assert "on_request failed" in caplog.text


def test_no_limit_without_complaint() -> None:
    """Until the store complains nobody waits."""
    limit = RateLimit()
    assert [limit.reserve(10.0) for _ in range(1000)] == [0.0] * 1000
    assert math.isinf(limit.rate(10.0))


def _requests(limit: RateLimit, begin_s: float, rate: int, seconds: float) -> None:
    for number in range(int(rate * seconds)):
        limit.reserve(begin_s + number / rate)


def test_decrease_and_recovery() -> None:
    """A complaint halves the rate that was measured; it grows steadily, and ends at twice the old rate."""
    limit = RateLimit()
    _requests(limit, 0.0, 100, 10.0)
    wait_s = limit.complain(10.0, began_s=9.99)
    assert limit.rate(10.0) == pytest.approx(50, rel=0.05)
    assert wait_s == pytest.approx(0.02, rel=0.05)
    assert limit.rate(20.0) == pytest.approx(100, rel=0.05)
    assert limit.rate(39.0) < 200
    assert math.isinf(limit.rate(41.0))


def test_requests_under_way_complain_once() -> None:
    """Requests that began before the decrease do not decrease the rate again; later ones do."""
    limit = RateLimit()
    _requests(limit, 0.0, 100, 10.0)
    limit.complain(10.0, began_s=9.9)
    for _ in range(20):
        limit.complain(10.1, began_s=9.95)
    assert limit.rate(10.1) > 45
    limit.complain(10.5, began_s=10.2)
    assert limit.rate(10.5) == pytest.approx(26, rel=0.1)


def test_waiting_in_line() -> None:
    """Under a limit, places are handed out at its rate; Retry-After moves all of them."""
    limit = RateLimit()
    _requests(limit, 0.0, 100, 10.0)
    limit.complain(10.0, began_s=10.0)
    waits = [limit.reserve(10.0) for _ in range(4)]
    assert waits == pytest.approx([0.02, 0.04, 0.06, 0.08], rel=0.05)
    assert limit.complain(10.0, began_s=9.0, retry_after_s=5.0) == 5.0
    assert limit.reserve(10.0) == 5.0


def test_the_rate_has_a_floor() -> None:
    """However often the store complains, two requests a second get through."""
    limit = RateLimit()
    now_s = 0.0
    for _ in range(100):
        now_s += limit.reserve(now_s) + 0.001
        limit.complain(now_s, began_s=now_s)
    assert limit.rate(now_s) == 2.0
    assert limit.reserve(now_s) <= 0.5


async def test_writes_pass_the_complaint_on(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """A throttled write is raised, not tried again; the next one waits, reads and listings do not."""
    clock = SteppingClock()
    told: list[tuple[str, float]] = []
    storage = ThrottledStorage(
        faulty, clock=clock, on_throttled=lambda operation, wait_s: told.append((operation, wait_s))
    )
    faulty.throttle("put", times=2)
    for key in ("k", "l"):
        with pytest.raises(Throttled):
            await storage.put(key, b"", when=IfAbsent())
    assert clock.slept == []
    (_, first_s), (operation, wait_s) = told
    assert first_s == 0
    assert operation == "put"
    assert wait_s > 0
    assert math.isinf(storage.rates()["reads"])
    assert not math.isinf(storage.rates()["writes"])
    await storage.list("")
    assert clock.slept == []
    await storage.put("k", b"", when=IfAbsent())
    assert clock.slept == [pytest.approx(wait_s)]


async def test_a_complaint_about_one_key_slows_down_nothing_else(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """Some stores allow one write a second to one key, and another process may just have written it."""
    clock = SteppingClock()
    storage = ThrottledStorage(faulty, clock=clock)
    faulty.throttle("put", times=3)
    for _ in range(3):
        with pytest.raises(Throttled):
            await storage.put("k", b"")
    assert math.isinf(storage.rates()["writes"])


async def test_complaints_about_keys_just_written_slow_down_nothing_else(
    memory: MemoryStorage, faulty: FaultyStorage
) -> None:
    """Such a store complains about several keys, each of which this client wrote a moment ago: nothing else waits."""
    clock = SteppingClock()
    storage = ThrottledStorage(faulty, clock=clock)
    for key in ("k", "l", "m"):
        await storage.put(key, b"1")
    faulty.throttle("put", times=3)
    for key in ("k", "l", "m"):
        with pytest.raises(Throttled):
            await storage.put(key, b"2")
    assert math.isinf(storage.rates()["writes"])
    await storage.put("n", b"")
    assert clock.slept == []


async def test_urgent_requests_neither_wait_nor_complain(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """What goes out without regard to the rate says nothing about it."""
    clock = SteppingClock()
    storage = ThrottledStorage(faulty, clock=clock, urgent=lambda key: key.startswith("urgent"))
    faulty.throttle("put", times=2)
    for key in ("urgent-1", "urgent-2"):
        with pytest.raises(Throttled):
            await storage.put(key, b"")
    assert math.isinf(storage.rates()["writes"])
    faulty.throttle("put", times=2)
    for key in ("k", "l"):
        with pytest.raises(Throttled):
            await storage.put(key, b"")
    assert not math.isinf(storage.rates()["writes"])
    slept = list(clock.slept)
    await storage.put("urgent-3", b"")
    assert clock.slept == slept


async def test_reads_are_tried_again(memory: MemoryStorage, faulty: FaultyStorage) -> None:
    """Throttled reads and listings are tried a few times more, with the pauses of the limit, and then raised."""
    clock = SteppingClock()
    storage = ThrottledStorage(faulty, clock=clock)
    await memory.put("k", b"1")
    faulty.throttle("get", times=3, retry_after_s=1.0)
    await storage.get("k")
    assert len(clock.slept) == 3
    assert min(clock.slept) >= 1.0
    faulty.throttle("list", times=4)
    with pytest.raises(Throttled):
        await storage.list("")
    assert faulty.pending == []


async def test_other_errors_pass_through(faulty: FaultyStorage) -> None:
    """What is no complaint changes no rate."""
    storage = ThrottledStorage(faulty, clock=SteppingClock())
    faulty.unavailable("put", times=1)
    with pytest.raises(StoreUnavailable):
        await storage.put("k", b"")
    assert all(math.isinf(rate) for rate in storage.rates().values())
