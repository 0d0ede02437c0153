"""Lost replies, lost requests and late ones: every message is handled once, and nothing stays in the bucket."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import anyio
import pytest

from s3queue_async import Context, Settings
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.testing.clock import store_now
from tests.unit.queue.bed import QUIET, Bed, Seen, eventually, virtual


class Once:
    """Fails on the first attempt where the payload says so, and counts what ended."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.done = Seen()

    async def __call__(self, payload: str, context: Context) -> None:
        await anyio.sleep(0.2)
        if payload.startswith("flaky") and context.attempt == 1:
            raise OSError
        self.ended[payload] += 1
        self.done(payload)


PAYLOADS = [f"{kind} {number}" for kind in ("good", "flaky") for number in range(5)]


@pytest.mark.parametrize("what", ["lose_reply", "lose_request"])
@pytest.mark.parametrize(
    ("operation", "key"),
    [
        ("put", "ready/*"), ("put", "claims/*"), ("put", "plugin/workers/*"), ("put", "delayed/*"),
        ("delete", "ready/*"), ("delete_many", "ready/*"), ("delete", "delayed/*"), ("get", "ready/*"),
        ("delete_many", "claims/*"), ("delete", "claims/*"), ("delete", "plugin/workers/*"), ("list", "*"),
        ("put", "plugin/totals/*"), ("put", "plugin/dedup/*"), ("put", "queue.json"),
    ],
)  # fmt: skip
@virtual
async def test_one_kind_of_request(what: str, operation: str, key: str) -> None:
    """Any kind of request whose reply, or which itself, is lost three times: handled once, the bucket is empty after."""
    bed = Bed(latency_s=0.01)
    once = Once()
    getattr(bed.faults, what)(operation, key=key, times=3)
    async with bed.queue(on_message=once) as queue:
        await queue.enqueue_many(PAYLOADS, dedup_id=str)
        await asyncio.gather(*(queue.enqueue(f"good more {number}") for number in range(5)))
        await once.done.count(15)
        await anyio.sleep(40)
        assert await queue.enqueue("good 0", dedup_id="good 0")
        await anyio.sleep(5)
    assert set(once.ended.values()) == {1}
    assert len(once.ended) == 15
    assert [key for key in await bed.leftovers() if not key.startswith("plugin/dedup/")] == []


@pytest.mark.parametrize("seed", range(6))
@virtual
async def test_many_at_random(seed: int) -> None:
    """A tenth of all requests or replies lost, two workers: each message is handled once, nothing is left."""
    bed = Bed(seed=seed, latency_s=0.01)
    chance = Random(seed)
    once = Once()
    for _ in range(200):
        lose = chance.choice([bed.faults.lose_reply, bed.faults.lose_request])
        lose(skip=chance.randrange(1500))
    settings = Settings(coordinator=False, max_attempts=10)
    async with (
        bed.queue(settings=settings, on_message=once, concurrency=3) as one,
        bed.queue(settings=settings, on_message=once, concurrency=3),
    ):
        for part in range(5):
            await one.enqueue_many([f"{payload} {part}" for payload in PAYLOADS])
            await anyio.sleep(2)
        await once.done.count(50)
        await anyio.sleep(10)
    bed.faults.clear()
    async with bed.queue(on_message=once):
        await anyio.sleep(120)
    assert len(once.ended) == 50
    assert set(once.ended.values()) == {1}
    assert await bed.leftovers() == []


@virtual
async def test_a_void_segment_is_left_to_its_writer_at_first() -> None:
    """Workers that list a void segment delete it only once its writer has had ``segment_age`` to do so itself."""
    bed = Bed(latency_s=0.01)
    await bed.open()
    async with bed.queue(on_message=print), bed.queue(on_message=print):
        key = SegmentKey(Place.READY, layout.ulid(int(1000 * (store_now() - 60)), 7), 1, 0)
        record = segments.Record(layout.message_id(key.ulid, 0, 0), 0, 1)
        await bed.memory.put(key.text, segments.encode(segments.Index([record], 0), [b"x"]))
        landed_at = anyio.current_time()
        age_s = QUIET.segment_age
        await anyio.sleep(age_s - 1)
        assert bed.store.count(under=layout.READY)["delete"] == 0
        assert await bed.keys(layout.READY) == [key.text]

        async def gone() -> bool:
            return not await bed.keys(layout.READY)

        await eventually(gone)
        assert anyio.current_time() - landed_at < age_s + QUIET.max_poll_interval + 2
    assert await bed.leftovers() == []


@virtual
async def test_an_enqueue_that_lands_late_is_void() -> None:
    """A write that arrives after its sender gave it up and wrote another one never runs, and is deleted."""
    bed = Bed()
    once = Once()
    voided = Seen()
    gate = bed.faults.land_late("put", key="ready/*", times=None)
    async with bed.queue(on_message=once) as queue:
        queue.on("segment.void", voided)
        async with anyio.create_task_group() as group:
            group.start_soon(queue.enqueue, "good")
            await anyio.sleep(5)
            bed.faults.clear()
        await once.done.count(1)
        await gate.land()
        await anyio.sleep(60)
    assert once.ended == {"good": 1}
    assert voided.items
    assert await bed.leftovers() == []


@virtual
async def test_a_void_segment_that_cannot_be_deleted_now_makes_no_enqueue_ambiguous() -> None:
    """It is void whether or not its writer has deleted it: the message is written anew at once (seed 10694)."""
    bed = Bed()
    once = Once()
    lane, faults = bed.lane()
    faults.delay(QUIET.segment_age + 1, "put", key="ready/*")
    faults.throttle("delete", key="ready/*", times=None)
    ambiguous = Seen()
    async with bed.queue(storage=lane) as producer, bed.queue(on_message=once):
        producer.on("enqueue.ambiguous", ambiguous)
        began_at = anyio.current_time()
        await producer.enqueue("good")
        assert anyio.current_time() - began_at < QUIET.segment_age + 2
        await once.done.count(1)
        await anyio.sleep(30)
    assert once.ended == {"good": 1}
    assert ambiguous.items == []
    assert await bed.leftovers() == []


@virtual
async def test_a_first_try_that_lands_after_the_second_was_handled() -> None:
    """The request is late, the same key is written again, handled and deleted, and then the first one arrives.

    It lands within segment_age, so it is not void; the message must not run a second time all the same.
    """
    bed = Bed()
    once = Once()
    gate = bed.faults.land_late("put", key="ready/*")
    async with bed.queue(on_message=once) as queue:
        await queue.enqueue("good")
        await once.done.count(1)
        await anyio.sleep(0.5)
        await gate.land()
        await anyio.sleep(60)
    assert once.ended == {"good": 1}
    assert await bed.leftovers() == []


@virtual
async def test_a_second_try_that_lands_too_late_hides_no_first_one() -> None:
    """The first write was handled, its reply was lost, and a second one landed too late: no third one follows."""
    bed = Bed()
    once = Once()
    away, faults = bed.lane()
    async with bed.queue(on_message=once), bed.queue(storage=away) as producer:
        faults.lose_reply("put", key="ready/*")
        gate = faults.land_late("put", key="ready/*", times=None)
        unseen = faults.unavailable("get", key="ready/*")
        async with anyio.create_task_group() as group:
            group.start_soon(producer.enqueue, "good")
            await once.done.count(1)
            await anyio.sleep(6)
            await gate.land()
            assert len(await bed.keys("ready/")) == 1, "what landed too late is there"
            faults.remove(unseen)
        await anyio.sleep(60)
    assert once.ended == {"good": 1}
    assert await bed.leftovers() == []


@virtual
async def test_an_enqueue_that_lands_while_it_is_decided() -> None:
    """A write that arrives within segment_age although its reply was lost counts, and is not written again."""
    bed = Bed()
    gate = bed.faults.land_late("put", key="ready/*")
    held = bed.faults.hold("get", key="ready/*")
    async with bed.queue() as queue:
        async with anyio.create_task_group() as group:
            group.start_soon(queue.enqueue, "x")
            await held.reached.wait()
            await gate.land()
            held.open()
        assert (await queue.stats()).pending == 1
    assert len(await bed.keys("ready/")) == 1


@virtual
async def test_a_claim_that_lands_after_it_was_given_up() -> None:
    """Such a claim blocks nobody for long: its owner's heartbeat does not name it, so it is taken over while it lives."""
    bed = Bed()
    once = Once()
    store, faults = bed.lane()
    async with bed.queue() as producer:
        await producer.enqueue("good")
    gate = faults.land_late("put", key="claims/*")
    faults.unavailable("get", "put", key="claims/*")
    async with bed.queue(storage=store, on_message=once) as first:
        await gate.reached.wait()
        await anyio.sleep(9)
        await gate.land()
        assert len(await bed.keys("claims/")) == 1
        began = anyio.current_time()
        async with bed.queue(on_message=once):
            await once.done.count(1)
        assert anyio.current_time() - began < 45
        assert first.worker_id is not None
    assert once.ended == {"good": 1}


@virtual
async def test_a_throttled_store_loses_nothing() -> None:
    """Every other request refused for a while: slower, nothing lost, nothing twice."""
    bed = Bed(latency_s=0.01)
    once = Once()
    for skip in range(0, 100, 2):
        bed.faults.throttle(skip=skip)
    async with bed.queue(settings=QUIET, on_message=once) as queue:
        await queue.enqueue_many(PAYLOADS)
        await once.done.count(10)
        await anyio.sleep(30)
    assert set(once.ended.values()) == {1}
