"""Schedules: one message for each tick, whichever processes run, die, or stand still."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import takewhile
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

import anyio
import msgspec
import pytest

from s3queue_async import Context, Keyring, S3Queue, Schedule, Settings
from s3queue_async.errors import (
    CorruptObject,
    InvalidPayload,
    InvalidSettings,
    KeyUnavailable,
    NewerFormat,
    QueueClosed,
)
from s3queue_async.protocol import segment as segments
from s3queue_async.scheduling import HEADER_NAME, HEADER_TICK
from s3queue_async.scheduling.ticks import Cron, Every, Ticks, _cronsim
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.clock import START_S, LoopClock
from s3queue_async.testing.faults import FaultyStorage
from tests.unit.queue.bed import QUIET, Bed, Recorder, Seen, _Unclosed, eventually, virtual
from tests.unit.queue.test_cancellation import Snare

TIMETABLE = "plugin/schedules/all"
DAY_S = 24 * 3600.0


class Place(Bed):
    """A store whose clock begins at a certain time, and the ticks that were enqueued into it."""

    def __init__(self, begin: str = "2026-01-01 00:00", *, latency_s: float = 0.0) -> None:
        super().__init__(latency_s=latency_s)
        self.begin_s = datetime.fromisoformat(begin).replace(tzinfo=UTC).timestamp()
        self.memory = MemoryStorage(now=self.now_s, date_resolution_s=0.001)
        self.faults = FaultyStorage(_Unclosed(self.memory), clock=LoopClock())
        self.store = Recorder(self.faults, latency_s=latency_s)

    def now_s(self) -> float:
        return self.begin_s + anyio.current_time() - START_S

    def lane(self) -> tuple[Recorder, FaultyStorage]:
        faults = FaultyStorage(_Unclosed(self.memory), clock=LoopClock())
        return Recorder(faults, latency_s=self.store.latency_s), faults

    def scheduler(self, **options: Any) -> S3Queue[Any]:
        """A process that runs schedules, and nothing else."""
        return self.queue(**{"settings": Settings(coordinator=False), "scheduler": True, **options})

    def enqueued(self) -> Counter[tuple[str, datetime]]:
        """How many messages wait for each tick of each schedule."""
        found: Counter[tuple[str, datetime]] = Counter()
        for key, body in self.bodies().items():
            if key.startswith("ready/"):
                for record in segments.decode(key, body).index.records:
                    assert record.headers is not None
                    found[record.headers[HEADER_NAME], datetime.fromisoformat(record.headers[HEADER_TICK])] += 1
        return found

    async def wait_until(self, text: str) -> None:
        """Return at that time, by the store's clock."""
        await anyio.sleep(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() - self.now_s())


def at(text: str, zone: str = "UTC") -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).astimezone(UTC)


def between(ticks: Ticks, begin_s: float, end_s: float) -> list[datetime]:
    found = takewhile(lambda tick: tick <= end_s * 1000, ticks.after(int(begin_s * 1000)))
    return [datetime.fromtimestamp(tick / 1000, UTC) for tick in found]


@pytest.mark.parametrize(
    ("zone", "begin", "left_out", "doubled"),
    [
        ("Europe/Berlin", "2026-03-26 12:05", "2026-03-29 02:30", None),
        ("Europe/Berlin", "2026-10-22 12:05", None, "2026-10-25 02:30"),
        ("America/New_York", "2026-03-05 12:05", "2026-03-08 02:30", None),
        ("America/New_York", "2026-10-29 12:05", None, "2026-11-01 01:30"),
        ("UTC", "2026-06-01 12:05", None, None),
    ],
)
def test_two_processes_over_a_week(zone: str, begin: str, left_out: str | None, doubled: str | None) -> None:
    """Seven days, clock changes among them, two processes: each tick of each schedule is enqueued exactly once."""

    @virtual
    async def week() -> None:
        place = Place(begin, latency_s=0.05)
        crons = {
            "nightly": "30 2 * * *",
            "nightly too": "30 1 * * *",
            "often": "*/20 * * * *",
            "work": "0 9-17/4 * * 1-5",
        }
        async with place.scheduler() as one, place.scheduler() as two:
            for queue in (one, two):
                for name, cron in crons.items():
                    await queue.schedule(cron, name, name=name, timezone=zone)
                await queue.schedule(payload="x", every=timedelta(hours=5), name="every")
            made = {schedule.name: schedule.created_at.timestamp() for schedule in await one.schedules()}
            await anyio.sleep(7 * DAY_S)
            end_s = place.now_s()
        expected: dict[str, Ticks] = {name: Cron(cron, zone) for name, cron in crons.items()}
        expected["every"] = Every(5 * 3600_000, round(made["every"] * 1000))
        found = place.enqueued()
        assert set(found.values()) == {1}
        for name, ticks in expected.items():
            assert sorted(tick for key, tick in found if key == name) == between(ticks, made[name], end_s)
        assert sum(name == "nightly" for name, _ in found) == 7
        assert sum(name == "often" for name, _ in found) == 7 * 24 * 3
        if left_out is not None:
            day, _ = left_out.split()
            assert found["nightly", at(f"{day} 03:00", zone)] == 1
        if doubled is not None:
            name = "nightly" if "02:30" in doubled else "nightly too"
            first = at(doubled, zone)
            assert (found[name, first], found[name, first + timedelta(hours=1)]) == (1, 0)

    week()


@pytest.mark.parametrize("alone_for_s", [5, 250, 400, 3000])
@pytest.mark.parametrize("applied", [False, True])
def test_a_process_dies_between_tick_and_enqueue(applied: bool, alone_for_s: float) -> None:
    """Cut off for good at its n-th request after the tick: the next process that looks enqueues the tick, once.

    Even when that is long after the deduplication window is over.
    """

    @virtual
    async def at_request(number: int) -> None:
        place = Place(latency_s=0.01)
        store, faults = place.lane()
        snare = Snare(store, number, applied=applied)
        async with place.scheduler(storage=snare) as first:
            made = await first.schedule(payload="x", every=7200, name="s", grace=7000)
            assert made.next_tick is not None
            await anyio.sleep(7200 - 30)
            snare.armed = True
            with anyio.move_on_after(90):
                await snare.reached.wait()
            passed.append(not snare.reached.is_set())
            if not passed[-1]:
                faults.unavailable()
                snare.go.set()
        await anyio.sleep(max(0, 7200 + alone_for_s - (place.now_s() - made.created_at.timestamp())))
        async with place.scheduler() as second:
            await anyio.sleep(30)
            assert place.enqueued() == {("s", made.next_tick): 1}
            (left,) = await second.schedules()
            assert left.last_tick == made.next_tick

    passed: list[bool] = []
    for number in range(1, 30):
        at_request(number)
        if passed[-1]:
            break
    assert passed[-1], "the scenario must run through in the end"
    assert len(passed) >= 7, "a look, a marker, a segment, and the tick written down"


@pytest.mark.parametrize("applied", [False, True])
def test_a_process_dies_beside_another(applied: bool) -> None:
    """The other one lives: whatever the first had done by then, the tick is enqueued once, within seconds."""

    @virtual
    async def at_request(number: int) -> None:
        place = Place(latency_s=0.01)
        store, faults = place.lane()
        snare = Snare(store, number, applied=applied)
        async with place.scheduler() as other, place.scheduler(storage=snare) as first:
            made = await first.schedule(payload="x", every=600, name="s")
            assert made.next_tick is not None
            assert len(await other.schedules()) == 1
            await anyio.sleep(590)
            snare.armed = True
            with anyio.move_on_after(20):
                await snare.reached.wait()
            passed.append(not snare.reached.is_set())
            faults.unavailable()
            snare.go.set()
            await anyio.sleep(30)
            assert place.enqueued() == {("s", made.next_tick): 1}

    passed: list[bool] = []
    for number in range(1, 30):
        at_request(number)
        if passed[-1]:
            break
    assert passed[-1]


@virtual
async def test_a_process_that_stood_still() -> None:
    """It had looked, and the tick was due; for ten minutes it stands still, and another one enqueues the tick.

    Then the marker is gone, too: it looks again before it enqueues, and does not.
    """
    place = Place()
    store, faults = place.lane()
    async with place.scheduler(storage=store) as sleeper:
        made = await sleeper.schedule(payload="x", every=3600, name="s")
        assert made.next_tick is not None
        # It has asked for the tick's marker; that there is none it hears ten minutes later.
        gate = faults.hold_reply("get", key="plugin/dedup/*")
        await anyio.sleep(3605)
        assert gate.reached.is_set()
        async with place.scheduler():
            await anyio.sleep(600)
            assert place.enqueued() == {("s", made.next_tick): 1}
            await place.memory.delete_many(await place.keys("plugin/dedup/"))
            gate.open()
            await anyio.sleep(60)
    assert place.enqueued() == {("s", made.next_tick): 1}


@virtual
async def test_at_rest_it_costs_a_read_a_minute() -> None:
    """Two processes with schedules that are not due: an hour costs each 60 conditional reads, and nothing else."""
    place = Place()
    async with place.scheduler() as one, place.scheduler():
        await one.schedule("0 3 * * *", "x")
        await anyio.sleep(120)
        place.store.calls.clear()
        await anyio.sleep(3600)
        assert {(call.operation, call.keys) for call in place.store.calls} == {("get", (TIMETABLE,))}
        assert len(place.store.calls) == pytest.approx(120, abs=4)


@virtual
async def test_a_worker_without_schedules() -> None:
    """It asks once a minute whether there are any; with ``scheduler=False``, and without a handler, never."""
    place = Place()

    async def asked(**options: Any) -> int:
        async with place.queue(**options):
            place.store.calls.clear()
            await anyio.sleep(600)
            return sum(call.keys == (TIMETABLE,) for call in place.store.calls)

    async def handler(payload: object) -> None: ...

    assert await asked(on_message=handler) == pytest.approx(10, abs=1)
    assert await asked(on_message=handler, scheduler=False) == 0
    assert await asked() == 0


@virtual
async def test_the_price_of_a_tick() -> None:
    """A tick that one process enqueues costs three writes: marker, segment, and that it is done."""
    place = Place()
    async with place.scheduler() as queue:
        await queue.schedule(payload="x", every=1800, name="s")
        await anyio.sleep(60)
        place.store.calls.clear()
        await anyio.sleep(1800)
        writes = [call.keys[0].split("/")[0:2] for call in place.store.calls if call.operation == "put"]
    assert [place[:2] for place in writes] == [["plugin", "dedup"], ["ready", "255"], ["plugin", "schedules"]]


@virtual
async def test_the_price_of_a_tick_that_is_handled() -> None:
    """A worker's tick costs five writes in all: the claim, and the marker that its message is done, besides."""
    place = Place()

    async def handler(payload: str) -> None: ...

    async with place.queue(settings=QUIET, on_message=handler) as queue:
        await queue.schedule(payload="x", every=1800, name="s")
        await anyio.sleep(60)
        place.store.calls.clear()
        await anyio.sleep(1800)
        keys = [call.keys[0] for call in place.store.calls if call.operation == "put"]
    writes = Counter(key.split("/")[0 if key.count("/") == 1 else 1] for key in keys)
    del writes["workers"]
    assert writes == {"dedup": 2, "255": 1, "claims": 1, "schedules": 1}


@virtual
async def test_workers_leave_it_to_the_coordinator() -> None:
    """Three workers with a coordinator: it enqueues each tick at once, and the handlers get each one once."""
    place = Place(latency_s=0.02)
    handled = Seen()

    async def handler(payload: str, context: Context) -> None:
        handled((context.headers[HEADER_NAME], context.headers[HEADER_TICK], place.now_s()))

    async with contextlib.AsyncExitStack() as stack:
        queues = [
            await stack.enter_async_context(place.queue(settings=Settings(), on_message=handler)) for _ in range(3)
        ]
        await eventually(lambda: _true(any(queue.is_coordinator for queue in queues)))
        await anyio.sleep(10)
        for queue in queues:
            await queue.schedule(payload="x", every=60, name="s")
        place.store.calls.clear()
        await anyio.sleep(615)
        markers = [call for call in place.store.calls if call.operation == "put" and "dedup" in call.keys[0]]
        first_tries = [call for call in markers if call.error]
    ticks = [datetime.fromisoformat(tick).timestamp() for _, tick, _ in handled.items]
    assert len(ticks) == len(set(ticks)) == 10
    assert all(0 <= when - tick < 7 for tick, (_, _, when) in zip(ticks, handled.items, strict=True))
    assert first_tries == [], "nobody raced the coordinator for a tick"


async def _true(value: bool) -> bool:
    return value


@virtual
async def test_the_coordinator_dies_before_the_tick() -> None:
    """The other worker enqueues the ticks that follow, each once."""
    place = Place(latency_s=0.02)
    handled = Seen()

    async def handler(payload: str, context: Context) -> None:
        handled(context.headers[HEADER_TICK])

    store, faults = place.lane()
    async with place.queue(settings=Settings(), on_message=handler, storage=store) as one:
        await eventually(lambda: _true(one.is_coordinator))
        async with place.queue(settings=Settings(), on_message=handler) as two:
            await two.schedule(payload="x", every=60, name="s")
            await anyio.sleep(55)
            faults.unavailable()
            await anyio.sleep(250)
    assert len(handled.items) == len(set(handled.items)) == 5


@virtual
async def test_seen_by_all_and_kept() -> None:
    """Another process lists what one has scheduled, and removes it; what is in the store outlives them all."""
    place = Place("2026-01-05 10:00")
    async with place.queue(settings=QUIET) as one, place.queue(settings=QUIET) as two:
        made = await one.schedule("0 3 * * *", {"job": 1}, name="nightly", timezone="Europe/Berlin", priority=9)
        assert made == Schedule(
            name="nightly",
            cron="0 3 * * *",
            every=None,
            timezone="Europe/Berlin",
            payload={"job": 1},
            priority=9,
            grace=3600,
            catch_up=False,
            created_at=made.created_at,
            last_tick=None,
            next_tick=at("2026-01-06 02:00"),
        )
        assert await two.schedules() == [made]
        await two.schedule(payload=b"raw", every=60, name="every")
        assert [(entry.name, entry.payload) for entry in await one.schedules()] == [
            ("every", b"raw"),
            ("nightly", {"job": 1}),
        ]
    async with place.queue(settings=QUIET) as later:
        assert await later.unschedule("every") is True
        assert await later.unschedule("every") is False
        assert await later.schedules() == [made]


@virtual
async def test_scheduled_again_and_changed() -> None:
    """The same again writes nothing; another payload keeps the times; other times begin anew, without the past."""
    place = Place()
    async with place.scheduler() as queue:
        first = await queue.schedule(payload=1, every=3600, name="s")
        await anyio.sleep(1790)
        place.store.calls.clear()
        assert await queue.schedule(payload=1, every=3600, name="s") == first
        assert [call.operation for call in place.store.calls] == ["get"]
        other = await queue.schedule(payload=2, every=3600, name="s", priority=7)
        assert (other.payload, other.created_at, other.next_tick) == (2, first.created_at, first.next_tick)
        await anyio.sleep(1910)
        assert list(place.enqueued()) == [("s", first.next_tick)]
        (key,) = [key for key in place.bodies() if key.startswith("ready/248/")]
        assert msgspec.msgpack.decode((await place.segment(key)).payloads[0]) == 2
        slower = await queue.schedule(payload=2, every=7200, name="s")
        assert slower.last_tick is None
        assert slower.next_tick == slower.created_at + timedelta(seconds=7200)
        await anyio.sleep(7100)
        assert len(place.enqueued()) == 1
        await anyio.sleep(200)
        assert len(place.enqueued()) == 2


@virtual
async def test_without_a_name() -> None:
    """Its name is made of what it says: the same once more is the same schedule, anything else another one."""
    place = Place()
    async with place.queue(settings=QUIET) as queue:
        names = {
            (await queue.schedule("0 3 * * *", "a")).name,
            (await queue.schedule("0 3 * * *", "a")).name,
            (await queue.schedule("0 3 * * *", "b")).name,
            (await queue.schedule("0 4 * * *", "a")).name,
        }
        assert len(names) == len(await queue.schedules()) == 3


@virtual
async def test_scheduled_while_the_schedules_are_looked_at() -> None:
    """A look whose reply comes late does not undo what this process wrote meanwhile: the first tick is enqueued in time."""
    place = Place()
    async with place.scheduler() as queue:
        gate = place.faults.hold_reply("get", key=TIMETABLE)
        await gate.reached.wait()
        await queue.schedule(every=1, payload="tick")
        gate.open()
        await anyio.sleep(3)
        assert (await queue.stats()).pending >= 2


@virtual
async def test_noticed_within_a_minute() -> None:
    """A schedule made elsewhere is run by a process that knew nothing of it; removed, it is run no more."""
    place = Place()
    async with place.scheduler(), place.queue(settings=QUIET) as elsewhere:
        await anyio.sleep(10)
        await elsewhere.schedule(payload="x", every=70, name="s")
        await anyio.sleep(75)
        assert len(place.enqueued()) == 1
        await elsewhere.unschedule("s")
        await anyio.sleep(600)
        assert len(place.enqueued()) == 1


@pytest.mark.parametrize(
    ("catch_up", "grace", "down_s", "expected"),
    [
        (False, 3600, 1000, [16]),
        (True, 3600, 1000, list(range(1, 17))),
        (True, 300, 1000, [12, 13, 14, 15, 16]),
        (False, 10, 1030, []),
        (True, 86_400, 60 * 250, list(range(1, 251))),
    ],
)  # fmt: skip
@virtual
async def test_missed_ticks(catch_up: bool, grace: float, down_s: float, expected: list[int]) -> None:
    """Nobody was there: the last tick is made up for, or each one, in order; what is older than grace is dropped."""
    place = Place()
    async with place.queue(settings=QUIET) as queue:
        made = await queue.schedule(payload="x", every=60, name="s", grace=grace, catch_up=catch_up)
    await anyio.sleep(down_s)
    async with place.scheduler():
        await anyio.sleep(15)
    base = made.created_at
    assert [(tick - base).total_seconds() / 60 for _, tick in sorted(place.enqueued())] == expected
    assert set(place.enqueued().values()) <= {1}


@virtual
async def test_what_the_handler_gets() -> None:
    """Payload, priority, own headers and those that name schedule and tick; expires_in counts from the enqueue."""
    place = Place()
    got = Seen()

    async def handler(payload: object, context: Context) -> None:
        got((payload, context.priority, dict(context.headers), context.max_attempts))

    async with place.queue(settings=QUIET, on_message=handler) as queue:
        made = await queue.schedule(
            payload=[1], every=60, name="s", priority=3, headers={"a": "b"}, max_attempts=7, expires_in=30
        )
        assert made.next_tick is not None
        await got.count(1)
    tick = made.next_tick.isoformat()
    assert got.items == [([1], 3, {"a": "b", "s3queue-schedule": "s", "s3queue-tick": tick}, 7)]


@virtual
async def test_stopped_and_started_again() -> None:
    """While its handler is stopped a worker runs no schedule; then it goes on with what is due."""
    place = Place()

    async def handler(payload: object) -> None: ...

    async with place.queue(settings=QUIET, on_message=handler) as queue:
        await queue.schedule(payload="x", every=60, name="s")
        await queue.stop_processing()
        await anyio.sleep(200)
        (known,) = await queue.schedules()
        assert known.last_tick is None
        await queue.start_processing()
        await anyio.sleep(10)
        (known,) = await queue.schedules()
        assert known.last_tick == known.created_at + timedelta(seconds=180)


@virtual
async def test_drained_over_a_tick() -> None:
    """A drain that begins with the tick leaves nothing half done: enqueued and written down, or neither."""
    for delay_ms in range(0, 1000, 20):
        place = Place(latency_s=0.05)
        async with place.scheduler() as queue:
            made = await queue.schedule(payload="x", every=60, name="s")
            await anyio.sleep(60 + delay_ms / 1000)
        async with place.queue(settings=QUIET) as after:
            (known,) = await after.schedules()
        assert (known.last_tick is not None) == bool(place.enqueued()), delay_ms
        assert set(place.enqueued().values()) <= {1}
        assert made.name == known.name


@virtual
async def test_many_at_once() -> None:
    """Two processes change the schedules at the same time: none is lost."""
    place = Place(latency_s=0.02)
    async with place.queue(settings=QUIET) as one, place.queue(settings=QUIET) as two:
        async with anyio.create_task_group() as group:
            for queue, letter in ((one, "a"), (two, "b")):
                for number in range(5):
                    group.start_soon(_schedule, queue, f"{letter}{number}")
        assert [entry.name for entry in await one.schedules()] == [f"{x}{n}" for x in "ab" for n in range(5)]


async def _schedule(queue: S3Queue[Any], name: str) -> None:
    await queue.schedule(payload=name, every=60, name=name)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({}, "either a cron expression or every="),
        ({"cron": "* * * * *", "every": 60}, "either a cron expression or every="),
        ({"cron": "61 * * * *"}, "Bad minute"),
        ({"cron": 5}, "must be text"),
        ({"cron": "* * * * *", "timezone": "Mars/Olympus"}, "Mars/Olympus"),
        ({"cron": "* * */20 * 1L"}, "matches no day"),
        ({"every": 0.5}, "1 to 31,622,400 seconds"),
        ({"every": True}, "every"),
        ({"every": 60, "grace": 0}, "grace=0 is out of range"),
        ({"every": 60, "catch_up": "yes"}, "catch_up='yes'"),
        ({"every": 60, "name": ""}, "name=''"),
        ({"every": 60, "name": "x" * 201}, "1 to 200 characters"),
        ({"every": 60, "max_attempts": 0}, "max_attempts"),
        ({"every": 60, "expires_in": -1}, "expires_in"),
    ],
)
@virtual
async def test_bad_arguments(arguments: dict[str, Any], named: str) -> None:
    """The error names the argument and what is allowed; nothing is written."""
    place = Place()
    async with place.queue(settings=QUIET) as queue:
        with pytest.raises(InvalidSettings, match=named):
            await queue.schedule(**{"payload": "x", **arguments})
        assert TIMETABLE not in await place.keys()


@virtual
async def test_limits() -> None:
    """A thousand schedules, a MiB in all, a payload of the queue's type, and a deduplication window that suffices."""
    place = Place()
    async with place.queue(settings=QUIET, payload_type=str) as queue:
        with pytest.raises(InvalidPayload):
            await queue.schedule(payload=5, every=60)
        with pytest.raises(InvalidSettings, match=r"at most 1,048,576 are allowed"):
            await queue.schedule(payload="x" * 1_000_000, every=60)
    with pytest.raises(QueueClosed):
        await queue.schedule(payload="x", every=60)
    async with place.queue(settings=Settings(coordinator=False, dedup_window=100)) as queue:
        with pytest.raises(InvalidSettings, match=r"dedup_window=100 .* at least 120"):
            await queue.schedule(payload="x", every=60)


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"{", CorruptObject),
        (b'{"nonce": "1", "format": 1}', CorruptObject),
        (b'{"nonce": "1", "format": 2, "schedules": {}}', NewerFormat),
    ],
)
@virtual
async def test_an_object_that_cannot_be_read(body: bytes, kind: type[CorruptObject]) -> None:
    """The error names the key; it is left as it is, and the queue goes on. Once it is gone, schedules run again."""
    place = Place()
    await place.open()
    await place.memory.put(TIMETABLE, body)
    handled = Seen()

    async def handler(payload: object) -> None:
        handled(payload)

    async with place.queue(settings=QUIET, on_message=handler) as queue:
        with pytest.raises(kind, match=TIMETABLE):
            await queue.schedules()
        with pytest.raises(kind, match=TIMETABLE):
            await queue.schedule(payload="x", every=60)
        await queue.enqueue("message")
        await handled.count(1)
        assert place.bodies()[TIMETABLE] == body
        await place.memory.delete(TIMETABLE)
        await queue.schedule(payload="tick", every=60)
        await handled.until(lambda items: "tick" in items)


@virtual
async def test_the_store_is_away_over_a_tick() -> None:
    """Ticks that come while the store cannot be reached are made up for when it is back."""
    place = Place()
    async with place.scheduler() as queue:
        made = await queue.schedule(payload="x", every=100, name="s", catch_up=True)
        await anyio.sleep(50)
        place.faults.unavailable()
        await anyio.sleep(300)
        place.faults.clear()
        await anyio.sleep(100)
    ticks = sorted((tick - made.created_at).total_seconds() for _, tick in place.enqueued())
    assert ticks == [100, 200, 300, 400]
    assert set(place.enqueued().values()) == {1}


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Where cronsim is missing, cron is refused with the extra's name; such a process runs what it can, and says so."""

    @virtual
    async def run() -> None:
        place = Place()
        async with place.queue(settings=QUIET) as with_it:
            cron = await with_it.schedule("* * * * *", "cron", name="cron")
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "cronsim", None)
            _cronsim.cache_clear()
            async with place.scheduler() as without:
                with pytest.raises(InvalidSettings, match="cronsim") as caught:
                    await without.schedule("0 3 * * *", "x")
                assert "s3queue-async[schedule]" in caught.value.suggestion
                await without.schedule(payload="x", every=60, name="every")
                shown = {schedule.name: schedule.next_tick is None for schedule in await without.schedules()}
                await anyio.sleep(200)
        _cronsim.cache_clear()
        assert shown == {"cron": True, "every": False}
        assert {name for name, _ in place.enqueued()} == {"every"}
        async with place.scheduler():
            await anyio.sleep(20)
        assert {name for name, _ in place.enqueued()} == {"cron", "every"}
        assert cron.next_tick is not None

    caplog.set_level("WARNING", logger="s3queue_async")
    run()
    assert sum("cannot run a schedule" in record.message for record in caplog.records) == 1


@virtual
async def test_encrypted() -> None:
    """With a keyring nothing of a schedule can be read in the store, nor without the key; with it the ticks go on."""
    place = Place()
    keyring = Keyring({"k": Keyring.new_key()})
    handled = Seen()

    async def handler(payload: str, context: Context) -> None:
        handled((payload, context.headers["tenant"], context.headers[HEADER_NAME]))

    async with place.queue(settings=QUIET, keyring=keyring) as maker:
        made = await maker.schedule(payload="secret-a", every=60, name="secret-b", headers={"tenant": "secret-c"})
    async with place.queue(settings=QUIET, on_message=handler) as keyless:
        with pytest.raises(KeyUnavailable, match=TIMETABLE):
            await keyless.schedules()
        with pytest.raises(KeyUnavailable):
            await keyless.schedule(payload="x", every=60)
        await anyio.sleep(130)
        assert handled.items == []
    async with place.queue(settings=QUIET, keyring=keyring, on_message=handler, auto_start=False) as queue:
        assert (await queue.schedules())[0].created_at == made.created_at
        await queue.enqueue("x", delay=600, headers={"tenant": "t"})
        await queue.start_processing()
        await handled.count(1)
        assert all(b"secret" not in body for body in place.bodies().values())
    assert handled.items == [("secret-a", "secret-c", "secret-b")]


@pytest.mark.parametrize("seed", range(8))
@virtual
async def test_processes_come_and_go(seed: int) -> None:
    """Three processes that are cut off, come back, and are late at random: each tick once, for six hours."""
    place = Place(latency_s=0.03)
    chance = Random(seed)
    async with place.queue(settings=QUIET) as queue:
        made = await queue.schedule("*/5 * * * *", "x", name="s", catch_up=True, grace=7200)

    async def process() -> None:
        while place.now_s() < made.created_at.timestamp() + 6 * 3600:
            store, faults = place.lane()
            async with place.scheduler(storage=store):
                await anyio.sleep(chance.uniform(10, 900))
                faults.delay(chance.uniform(0.1, 2), times=None)
                await anyio.sleep(chance.uniform(0, 400))
                faults.unavailable()
                await anyio.sleep(chance.uniform(0, 60))
            await anyio.sleep(chance.uniform(0, 300))

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(process)
    async with place.scheduler():
        await anyio.sleep(60)
    end_s = place.now_s() - 10
    found = place.enqueued()
    assert sorted(tick for _, tick in found if tick.timestamp() <= end_s) == between(
        Cron("*/5 * * * *", "UTC"), made.created_at.timestamp(), end_s
    )
    assert set(found.values()) == {1}
