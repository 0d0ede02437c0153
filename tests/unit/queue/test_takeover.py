"""Workers that are lost: others take over in time, and a message that kills its worker is found."""

from __future__ import annotations

from collections import Counter
from random import Random
from typing import Any

import anyio
import pytest

from s3queue_async import Context, S3Queue, Settings
from s3queue_async.engine.finder import HUNGRY_AFTER_S
from s3queue_async.engine.registry import QUIET_FACTOR
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.storage.base import LIST_LIMIT_MAX, Condition, IfAbsent, Page, Storage, Written
from s3queue_async.testing.clock import LoopClock
from s3queue_async.testing.faults import FaultyStorage
from tests.unit.queue.bed import Bed, Recorder, Seen, eventually, virtual

TTL_S, MARGIN_S, POLL_S = 30.0, 2.0, 5.0


class Killable:
    """A worker that can be lost as a killed process is: from one moment on it reaches nothing, and runs nothing."""

    def __init__(self, bed: Bed, handler: Any, **options: Any) -> None:
        self.faults: FaultyStorage
        self.storage: Storage
        self.storage, self.faults = bed.lane()
        self.bed = bed
        self.options = options
        self.handler = handler
        self.dead = anyio.Event()
        self.ready = anyio.Event()
        self.queue: S3Queue[Any]

    async def run(self) -> None:
        """Work until it is killed."""
        with anyio.CancelScope() as scope:
            self.scope = scope
            async with self.bed.queue(storage=self.storage, on_message=self.handler, **self.options) as self.queue:
                await self.queue.start_processing()
                self.ready.set()
                await anyio.sleep_forever()

    def kill(self) -> None:
        """From now on nothing leaves this worker, and what it ran is over."""
        self.faults.unavailable(retriable=False)
        self.dead.set()
        self.scope.cancel()


@virtual
async def test_a_lost_worker_is_taken_over_in_time() -> None:
    """What a killed worker held runs again elsewhere within TTL + margin + one poll, and not before TTL - interval."""
    bed = Bed()
    started, taken = Seen(), Seen()

    async def hang(payload: int) -> None:
        started(payload)
        await anyio.sleep_forever()

    async def handler(payload: int, context: Context) -> None:
        taken((payload, context.attempt, context.token, anyio.current_time()))

    worker = Killable(bed, hang, concurrency=5)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await worker.ready.wait()
        async with bed.queue(on_message=handler) as queue:
            await anyio.sleep(1)
            await queue.stop_processing()
            await queue.enqueue_many(range(5))
            await started.count(5)
            await queue.start_processing()
            await anyio.sleep(3)
            killed_at = anyio.current_time()
            worker.kill()
            items = await taken.count(5)
            await anyio.sleep(10)
    assert sorted(payload for payload, *_ in items) == list(range(5))
    assert {(attempt, token) for _, attempt, token, _ in items} == {(1, 2)}
    for *_, at in items:
        assert TTL_S - 10 - MARGIN_S <= at - killed_at <= TTL_S + MARGIN_S + POLL_S + 1
    assert [key for key in await bed.leftovers() if not key.startswith("claims/")] == []


LATENCY_S = 0.02
LOOK_AND_TAKEOVER = 10
"""So many requests are made one after the other from the look to the start of what is taken over."""
AT_REST_S = 60.0
"""A worker that holds nothing for so long beats rarely, under a long lease."""


@pytest.mark.parametrize("beat_lands", [False, True], ids=["before its next beat", "after it"])
@virtual
async def test_a_worker_that_was_at_rest_is_taken_over_as_soon(beat_lands: bool) -> None:
    """What it had just claimed as it was killed does not wait for the long lease, which the other one has read, too."""
    bed = Bed()
    started, taken = Seen(), Seen()

    async def hang(payload: int) -> None:
        started(payload)
        await anyio.sleep_forever()

    async def handler(payload: int) -> None:
        taken((payload, anyio.current_time()))

    worker = Killable(bed, hang)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await worker.ready.wait()
        (heartbeat,) = await bed.keys("plugin/workers/")
        lane, faults = bed.lane()
        async with bed.queue(storage=lane, on_message=handler) as other:
            await anyio.sleep(AT_REST_S)
            # Both try to claim it, and the one that is refused asks at once by whom.
            refused = faults.hold("put", key="claims/*")
            read = faults.hold_reply("get", key=heartbeat)
            beating = worker.faults.hold("put", key=heartbeat)
            await other.enqueue(1)
            await started.count(1)
            await beating.reached.wait()
            refused.open()
            await read.reached.wait()
            read.open()
            if beat_lands:
                beating.open()
                await anyio.sleep(1)
            killed_at = anyio.current_time()
            worker.kill()
            ((payload, at),) = await taken.count(1)
            await anyio.sleep(10)
    assert payload == 1
    assert at - killed_at <= TTL_S + MARGIN_S + POLL_S + 1


def hanging(started: Seen) -> Any:
    """A handler that says that it was started, and never ends."""

    async def hang(payload: int) -> None:
        started(payload)
        await anyio.sleep_forever()

    return hang


def noting_when(taken: Seen) -> Any:
    """A handler that notes when it runs."""

    async def note(payload: int) -> None:
        taken(anyio.current_time())

    return note


@pytest.mark.parametrize("lost", ["coordinator", "follower"])
@virtual
async def test_idle_workers_look_again_as_soon_as_a_lease_is_over(lost: str) -> None:
    """Whoever leads looks at that very moment, or a second later if it has just looked; not a whole poll later."""
    for seed in range(12):
        over_s = TTL_S + MARGIN_S + HUNGRY_AFTER_S + LOOK_AND_TAKEOVER * LATENCY_S
        assert await _taken_from_the_idle_after_s(seed, lost) <= over_s


async def _taken_from_the_idle_after_s(seed: int, lost: str) -> float:
    """How long after the kill something runs that a worker had been given as both were at rest."""
    random = Random(seed)
    bed = Bed(latency_s=LATENCY_S, seed=seed)
    started, taken = Seen(), Seen()
    victim = Killable(bed, hanging(started), settings=Settings())
    lane, _ = bed.lane()
    async with anyio.create_task_group() as group:
        if lost == "coordinator":
            group.start_soon(victim.run)
            await victim.ready.wait()
            await anyio.sleep(AT_REST_S)
        async with bed.queue(storage=lane, settings=Settings(), on_message=noting_when(taken)) as survivor:
            await anyio.sleep(AT_REST_S)
            if lost == "follower":
                group.start_soon(victim.run)
                await victim.ready.wait()
                await anyio.sleep(AT_REST_S)
            await victim.queue.enqueue(1)
            await started.count(1)
            await anyio.sleep(10 * random.random())
            assert survivor.health().coordinator == (lost == "follower")
            killed_at = anyio.current_time()
            victim.kill()
            (at,) = await taken.count(1)
            await anyio.sleep(10)
    return float(at) - killed_at


@pytest.mark.parametrize("poll_s", [0.1, 5.0])
@virtual
async def test_who_found_a_segment_claimed_looks_again_as_soon_as_that_lease_is_over(poll_s: float) -> None:
    """Also while the board of a coordinator that is lost still counts, which it does for longer than this lease."""
    settings = Settings(visibility_timeout=3, heartbeat_interval=0.3, poll_interval=poll_s)
    over_s = settings.visibility_timeout + settings.lease_margin
    for seed in range(40):
        after_s = await _taken_from_the_coordinator_after_s(seed, settings)
        assert after_s <= over_s + HUNGRY_AFTER_S / 2 + LOOK_AND_TAKEOVER * LATENCY_S


async def _taken_from_the_coordinator_after_s(seed: int, settings: Settings) -> float:
    """How long after the kill something runs that another worker had found in the coordinator's hands."""
    random = Random(seed)
    bed = Bed(latency_s=LATENCY_S, seed=seed)
    started, taken = Seen(), Seen()
    victim = Killable(bed, hanging(started), settings=settings)
    lane, _ = bed.lane()

    async def found_claimed() -> bool:
        return any(call.operation == "list" and call.keys == (layout.CLAIMS,) for call in lane.calls)

    async with anyio.create_task_group() as group:
        group.start_soon(victim.run)
        await victim.ready.wait()
        await anyio.sleep(AT_REST_S)
        async with bed.queue(storage=lane, settings=settings, on_message=noting_when(taken)):
            await anyio.sleep(AT_REST_S * random.random())
            await victim.queue.enqueue(1)
            await started.count(1)
            lane.calls.clear()
            await eventually(found_claimed)
            await anyio.sleep(settings.visibility_timeout * random.random())
            assert victim.queue.health().coordinator
            killed_at = anyio.current_time()
            victim.kill()
            (at,) = await taken.count(1)
    return float(at) - killed_at


@virtual
async def test_a_lease_that_is_over_hurries_nobody_while_the_store_is_away() -> None:
    """A coordinator that cannot look at that moment tries again at its pace."""
    bed = Bed()

    async def handler(payload: int) -> None: ...

    victim = Killable(bed, handler, settings=Settings())
    lane, faults = bed.lane()
    async with (
        bed.queue(storage=lane, settings=Settings(), on_message=handler) as survivor,
        anyio.create_task_group() as group,
    ):
        await anyio.sleep(AT_REST_S)
        group.start_soon(victim.run)
        await victim.ready.wait()
        await anyio.sleep(AT_REST_S)
        assert survivor.health().coordinator
        victim.kill()
        # It was at rest: its lease is over somewhere in the middle of the outage.
        await anyio.sleep(QUIET_FACTOR * TTL_S - 80)
        away = faults.unavailable(retriable=False)
        lane.calls.clear()
        await anyio.sleep(90)
        tries = len(lane.calls)
        faults.remove(away)
        await anyio.sleep(AT_REST_S)
        assert survivor.health().coordinator
    assert tries < 90


@virtual
async def test_a_beat_that_lands_while_something_is_claimed_renews_the_lease() -> None:
    """It says that the worker rests, and is no reason to trust a long lease; it is one to trust a short one."""
    bed = Bed()
    started = Seen()

    async def hang(payload: int) -> None:
        started(payload)
        await anyio.sleep_forever()

    worker = Killable(bed, hang)
    async with anyio.create_task_group() as group:
        group.start_soon(worker.run)
        await worker.ready.wait()
        beating = worker.faults.hold_reply("put", key="plugin/workers/*")
        async with bed.queue() as producer:
            await beating.reached.wait()
            await producer.enqueue(1)
            await started.count(1)
            worker.faults.hold("put", key="plugin/workers/*")
            beating.open()
            await anyio.sleep(0.1)
            assert worker.queue._session is not None
            left_s = worker.queue._session.lease.trust_left_s
            worker.kill()
    # The beat before it came ten seconds earlier.
    assert TTL_S - MARGIN_S - POLL_S < left_s <= TTL_S - MARGIN_S


@virtual
async def test_a_worker_that_left_is_taken_over_at_once() -> None:
    """A claim whose owner has no heartbeat is free for the taking, without waiting for any lease."""
    bed = Bed()
    taken = Seen()

    async def handler(payload: int) -> None:
        taken(payload)

    async with bed.queue() as producer:
        await producer.enqueue("x")
        (message,) = await producer.receive()
        (heartbeat,) = await bed.keys("plugin/workers/")
        await bed.memory.delete(heartbeat)
        async with bed.queue(on_message=handler):
            with anyio.fail_after(10):
                await taken.count(1)
        assert message.payload == "x"


@pytest.mark.parametrize("max_attempts", [2, 3])
@virtual
async def test_poison(max_attempts: int) -> None:
    """A message that kills its worker is alone a dead letter after max_attempts; its neighbours pay no attempt.

    The first death is charged to nobody, because the messages ran side by side; from then on they run alone, and the
    message that dies again pays for both.
    """
    bed = Bed()
    handled: Counter[int] = Counter()
    attempts: dict[int, list[int]] = {}
    deaths = 0
    settings = Settings(coordinator=False, max_attempts=max_attempts)
    poisoned = anyio.Event()
    current: list[Killable] = []

    async def handler(payload: int, context: Context) -> None:
        await anyio.sleep(0.1)
        attempts.setdefault(payload, []).append(context.attempt)
        if payload == 7:
            poisoned.set()
            current[-1].kill()
            await anyio.sleep_forever()
        handled[payload] += 1

    async with bed.queue(settings=settings) as producer:
        await producer.enqueue_many(range(20))
        async with anyio.create_task_group() as group:
            for _ in range(max_attempts + 1):
                poisoned = anyio.Event()
                worker = Killable(bed, handler, settings=settings, concurrency=4)
                current.append(worker)
                group.start_soon(worker.run)
                with anyio.move_on_after(150):
                    await worker.dead.wait()
                if not worker.dead.is_set():
                    break
                deaths += 1
            letters = await eventually(producer.dead_letters.list)
            worker.scope.cancel()
    assert deaths == max_attempts
    (letter,) = letters
    assert (letter.payload, letter.attempts) == (7, max_attempts)
    assert letter.error.startswith("WorkerLost")
    assert set(handled) == set(range(20)) - {7}
    assert {attempt for payload, seen in attempts.items() if payload != 7 for attempt in seen} == {1}
    # Only what the first worker ran and had not recorded when it died may have been handled twice.
    assert {payload for payload, times in handled.items() if times > 1} <= set(range(7 + 4))
    assert max(handled.values()) <= 2


@virtual
async def test_what_ended_before_a_recorded_start_is_done_for_its_deduplication_id() -> None:
    """A worker dies in a message that ran alone after another: the other one's id and its result are still known."""
    bed = Bed()
    settings = Settings(coordinator=False, dedup_window=600, retain_completed=600)
    killers = [Seen(), Seen()]
    ended = Seen()

    def handler(number: int) -> Any:
        async def handle(payload: str) -> str:
            if number == 0 or (number == 1 and payload == "b"):
                killers[number](payload)
                await anyio.sleep_forever()
            ended(payload)
            return payload

        return handle

    async with bed.queue(settings=settings) as queue, anyio.create_task_group() as group:
        ids: dict[str, str] = {}

        async def enqueue(payload: str, dedup_id: str | None) -> None:
            ids[payload] = await queue.enqueue(payload, dedup_id=dedup_id)

        async with anyio.create_task_group() as producers:
            producers.start_soon(enqueue, "a", "x")
            producers.start_soon(enqueue, "b", None)
        for number in (0, 1):
            worker = Killable(bed, handler(number), concurrency=1, settings=settings)
            group.start_soon(worker.run)
            await killers[number].count(1)
            worker.kill()
        assert ended.items == ["a"]
        async with bed.queue(settings=settings, on_message=handler(2)):
            await ended.count(2)
            await anyio.sleep(60)
            assert await queue.enqueue("a", dedup_id="x") == ids["a"]
            assert await queue.results(ids["a"]) == "a"
            await anyio.sleep(30)
    assert ended.items == ["a", "b"]


@virtual
async def test_a_process_that_stood_still_over_a_recorded_start_does_not_begin_it() -> None:
    """Stopped after the start of an isolated message was recorded: when it goes on, its lease is over (a storm's find)."""
    bed = Bed()
    clock = LoopClock()
    stood_still = Seen()
    trusted: list[bool] = []

    class Stopping(Recorder):
        async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
            written = await super().put(key, body, when=when)
            if key.startswith("claims/") and b'"starts":{"' in body and not stood_still.items:
                clock.offset_s += 2 * TTL_S
                stood_still(key)
            return written

    async def handler(payload: str) -> None:
        assert queue._session is not None
        trusted.append(queue._session.lease.trusted)

    async with bed.queue() as producer:
        await producer.enqueue("x")
    (ready,) = await bed.keys("ready/")
    key = SegmentKey.parse(ready)
    orphan = claims.fresh(key.text, owner="lost", now_ms=0, nonce="n")
    await bed.memory.put(key.claim, claims.encode(orphan), when=IfAbsent())
    queue: S3Queue[Any] = S3Queue(
        storage=Stopping(bed.faults), settings=Settings(coordinator=False), clock=clock, on_message=handler
    )
    async with queue:
        await stood_still.count(1)

        async def handled() -> bool:
            return bool(trusted)

        await eventually(handled)
    assert trusted == [True]


@virtual
async def test_a_slow_listing_of_a_long_backlog_does_not_stop_a_worker() -> None:
    """When one look takes longer than a listing stays fresh, what it showed is claimed all the same (a storm's find)."""
    bed = Bed()
    handled = Seen()

    class SlowList(Recorder):
        async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
            page = await super().list(prefix, after=after, limit=limit)
            await anyio.sleep(0.0011 * len(page.entries))
            return page

    settings = Settings(coordinator=False, segment_messages_max=2)
    async with bed.queue(settings=settings) as producer:
        await producer.enqueue_many(range(3000))

    async def handler(payload: int) -> None:
        await anyio.sleep(0.02)
        handled(payload)

    async with bed.queue(settings=settings, storage=SlowList(bed.faults), on_message=handler, concurrency=8):
        with anyio.fail_after(60):
            await handled.count(3000)


@virtual
async def test_a_worker_that_was_cut_off_comes_back_under_a_new_id() -> None:
    """Cut off past its lease: handlers are cancelled and told, another worker finishes, the first one starts anew."""
    bed = Bed()
    events = Seen()
    told, done = Seen(), Seen()

    async def long(payload: int, context: Context) -> None:
        try:
            await anyio.sleep(200)
        except anyio.get_cancelled_exc_class():
            told(context.lease_lost.is_set())
            raise

    async def quick(payload: int, context: Context) -> None:
        done(context.token)

    store, faults = bed.lane()
    async with bed.queue(storage=store, on_message=long) as queue:
        queue.on("lease.lost", events)
        await anyio.sleep(1)
        first = queue.worker_id
        message_id = await queue.enqueue(1)
        await anyio.sleep(1)
        fault = faults.unavailable()
        await told.count(1)
        async with bed.queue(on_message=quick):
            await done.count(1)
        faults.remove(fault)
        await anyio.sleep(40)
        assert queue.worker_id not in (None, first)
        assert queue.health().ready
    assert told.items == [True]
    assert done.items == [2]
    assert message_id in {one for event in events.items for one in event.message_ids}
    assert await bed.live() == {}


@virtual
async def test_a_settlement_left_half_done_is_finished() -> None:
    """A worker lost after it decided its moves and before it wrote them: whoever comes writes them, exactly once."""
    bed = Bed()
    done = Seen()

    async def fail(payload: int) -> None:
        raise OSError(f"no {payload}")

    async def handler(payload: int, context: Context) -> None:
        done((payload, context.attempt))

    worker = Killable(bed, fail, concurrency=10)
    gate = worker.faults.hold("put", key="delayed/*", times=None)
    async with bed.queue() as producer, anyio.create_task_group() as group:
        await producer.enqueue_many(range(10))
        group.start_soon(worker.run)
        await gate.reached.wait()
        worker.kill()
        async with bed.queue(on_message=handler):
            items = await done.count(10)
            await anyio.sleep(5)
    assert sorted(items) == [(number, 2) for number in range(10)]
    assert await bed.live() == {}


@virtual
async def test_a_slow_batch_spreads() -> None:
    """64 jobs of 1 s in one segment, four workers of concurrency 4: done within 7 s of the first start."""
    bed = Bed(latency_s=0.02)
    times = Seen()
    who: Counter[str] = Counter()

    async def job(payload: int, context: Context) -> None:
        who[context.worker_id] += 1
        times(anyio.current_time())
        await anyio.sleep(1)
        times(anyio.current_time())

    async with (
        bed.queue(on_message=job, concurrency=4) as queue,
        bed.queue(on_message=job, concurrency=4),
        bed.queue(on_message=job, concurrency=4),
        bed.queue(on_message=job, concurrency=4),
    ):
        await anyio.sleep(5)
        await queue.enqueue_many(range(64))
        seen = await times.count(128)
        await anyio.sleep(5)
    assert max(seen) - min(seen) <= 7
    assert sum(who.values()) == 64
    assert len(who) == 4
