"""Messages as they are stored: browse, show, follow, overview; and dead letters by filter. Nothing is claimed."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from s3queue_async import Context, MessageInfo, S3Queue, Settings
from s3queue_async.dead_letters import KINDS_MAX, OTHERS, error_kind
from s3queue_async.errors import InvalidSettings, MessageNotFound
from s3queue_async.message import MessageStatus
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.layout import SegmentKey
from tests.unit.queue.bed import Bed, Seen, eventually, virtual


async def browsed(queue: S3Queue[Any], *places: str, **named: Any) -> list[MessageInfo]:
    return [info async for info in queue.browse(*places, **named)]


@virtual
async def test_browse_in_order_of_delivery() -> None:
    """Higher priorities first, then by age, then delayed ones; with what was given to enqueue; nothing is changed."""
    bed = Bed()
    async with bed.queue() as queue:
        await queue.enqueue_many(["a", "b"])
        await queue.enqueue({"x": 1}, priority=9, headers={"k": "v"}, max_attempts=5, expires_in=60, dedup_id="d")
        await queue.enqueue(b"raw", delay=3600)
        before = await bed.keys()
        found = await browsed(queue)
        assert [info.payload for info in found] == [{"x": 1}, "a", "b", b"raw"]
        assert [info.state for info in found] == ["pending", "pending", "pending", "delayed"]
        first = found[0]
        assert (first.priority, first.headers, first.max_attempts, first.dedup_id) == (9, {"k": "v"}, 5, "d")
        assert first.expires_at is not None
        assert (first.expires_at - first.enqueued_at).total_seconds() == pytest.approx(60, abs=0.1)
        assert found[3].due_at is not None
        assert [info.payload for info in await browsed(queue, limit=2)] == [{"x": 1}, "a"]
        assert [info.payload for info in await browsed(queue, priority=0)] == ["a", "b", b"raw"]
        assert [info.payload for info in await browsed(queue, "delayed")] == [b"raw"]
        assert await browsed(queue, "dead") == []
        assert await bed.keys() == before


@pytest.mark.parametrize(
    ("places", "named"), [(["claims"], {}), ([], {"limit": 0}), ([], {"priority": 256}), ([], {"limit": True})]
)
def test_browse_refuses(places: list[str], named: dict[str, Any]) -> None:
    """What cannot be is named before anything is asked of the store."""

    @virtual
    async def run() -> None:
        bed = Bed()
        async with bed.queue() as queue:
            with pytest.raises(InvalidSettings):
                await browsed(queue, *places, **named)

    run()


@virtual
async def test_browse_many_segments() -> None:
    """Hundreds of segments, read several at a time, come complete and in order."""
    bed = Bed(latency_s=0.01)
    async with bed.queue() as queue:
        for number in range(300):
            await queue.enqueue(number)
            await anyio.sleep(0.002)
        found = [info.payload for info in await browsed(queue)]
        assert found == list(range(300))


@virtual
async def test_browse_shows_a_message_once_while_it_moves() -> None:
    """Between the write of a retry's new segment and the claim that says so, the message is shown once."""
    bed = Bed()
    fail = Seen()

    async def handler(payload: int, context: Context) -> None:
        fail(payload)
        raise OSError("no")

    settings = Settings(coordinator=False, backoff_base=500, backoff_max=500, backoff_jitter=0)
    storage, faults = bed.lane()
    async with bed.queue() as watcher, bed.queue(settings=settings, storage=storage, on_message=handler) as queue:
        # The claim that records that the move is applied never arrives while the gate is shut.
        gate = faults.hold("put", key="claims/*", skip=2)
        message_id = await queue.enqueue(7)
        await fail.count(1)

        async def moved() -> bool:
            return bool(await bed.keys("delayed/"))

        await eventually(moved)
        before = await bed.keys("ready/")
        shown = [info.id for info in await browsed(watcher)]
        gate.open()
        assert before != []
        assert shown == [message_id]
        await anyio.sleep(5)
        (info,) = await browsed(watcher)
        assert (info.id, info.state, info.attempts, info.error) == (message_id, "retrying", 1, "OSError: no")


@virtual
async def test_show_through_a_life() -> None:
    """Who holds a message and since when; its last error; its result, as long as the history has it; then not found."""
    bed = Bed()
    started = Seen()
    go_on = anyio.Event()

    async def handler(payload: str, context: Context) -> str:
        started(payload)
        await go_on.wait()
        if context.attempt == 1:
            raise ValueError("once")
        return "result"

    settings = Settings(coordinator=False, backoff_base=20, backoff_jitter=0, retain_completed=100)
    async with bed.queue(settings=settings, on_message=handler, auto_start=False) as queue:
        message_id = await queue.enqueue({"a": 1}, priority=3)
        waiting = await queue.show(message_id)
        assert (waiting.state, waiting.payload, waiting.worker_id) == ("pending", {"a": 1}, None)
        await queue.start_processing()
        await started.count(1)
        held = await queue.show(message_id)
        assert (held.state, held.worker_id, held.priority) == ("processing", queue.worker_id, 3)
        assert held.claimed_at is not None
        assert held.claimed_at >= held.enqueued_at
        go_on.set()
        await anyio.sleep(10)
        failed = await queue.show(message_id)
        assert (failed.state, failed.attempts, failed.error) == ("retrying", 1, "ValueError: once")
        assert "Traceback" in failed.traceback
        assert failed.due_at is not None
        await started.count(2)
        await anyio.sleep(20)
        done = await queue.show(message_id)
        assert (done.state, done.result, done.attempts, done.payload) == ("completed", "result", 2, None)
        assert done.completed_at is not None
        for unknown in ("", "x", message_id[:-1], f"{message_id[:26]}-000001"):
            with pytest.raises(MessageNotFound):
                await queue.show(unknown)


@virtual
async def test_show_without_history() -> None:
    """A completed message is shown as such while its claim lingers, and is not found later."""
    bed = Bed()
    seen = Seen()
    async with bed.queue(on_message=seen) as queue, bed.queue(on_message=seen):
        message_id = await queue.enqueue("a")
        await seen.count(1)
        await anyio.sleep(1)
        assert (await queue.show(message_id)).state is MessageStatus.COMPLETED
        await anyio.sleep(600)
        with pytest.raises(MessageNotFound):
            await queue.show(message_id)


@virtual
async def test_unreadable_segment_is_left_out() -> None:
    """A damaged segment hides itself only."""
    bed = Bed()
    async with bed.queue() as queue:
        await queue.enqueue("a")
        await queue.enqueue("b", priority=1)
        (key,) = await bed.keys("ready/254/")
        await bed.memory.put(key, b"junk")
        assert [info.payload for info in await browsed(queue)] == ["a"]


@virtual
async def test_follow() -> None:
    """Each look tells what came since the last one, once, in whatever priority; more than the limit is counted."""
    bed = Bed()
    async with bed.queue() as queue, bed.queue() as watcher:
        await queue.enqueue("before")
        await anyio.sleep(20)
        follower = watcher.follow()
        assert (await follower.look(limit=10)).messages == []
        await queue.enqueue("a", priority=4)
        await anyio.sleep(0.01)
        await queue.enqueue("b")
        await anyio.sleep(0.01)
        await queue.enqueue("c", delay=3600)
        news = await follower.look(limit=10)
        assert [info.payload for info in news.messages if isinstance(info, MessageInfo)] == ["a", "b", "c"]
        assert await follower.look(limit=10) == type(news)([], 0)
        await queue.enqueue_many(range(30))
        news = await follower.look(limit=10)
        assert (len(news.messages), news.skipped) == (10, 20)
        await anyio.sleep(60)
        assert (await follower.look(limit=10)).messages == []


@virtual
async def test_follow_sees_a_segment_that_lands_late() -> None:
    """One whose key is older than the last look is still told, and told once."""
    bed = Bed()
    async with bed.queue() as watcher:
        follower = watcher.follow()
        await anyio.sleep(1)
        ulid = watcher._shared.new_ulid()
        await anyio.sleep(2)
        assert (await follower.look(limit=10)).messages == []
        key = SegmentKey.parse(f"ready/255/{ulid}-1")
        index = segments.Index([segments.Record(f"{ulid}-000000", key.created_ms, 2, segments.Codec.RAW)], 0)
        await bed.memory.put(key.text, segments.encode(index, [b"hi"]))
        (late,) = (await follower.look(limit=10)).messages
        assert isinstance(late, MessageInfo)
        assert late.payload == b"hi"
        assert (await follower.look(limit=10)).messages == []


@virtual
async def test_follow_completed_and_dead() -> None:
    """With a history, completed messages are told, and dead letters without one."""
    bed = Bed()

    async def handler(payload: str) -> None:
        if payload == "bad":
            raise ValueError("no")

    settings = Settings(coordinator=False, retain_completed=3600)
    async with bed.queue(settings=settings, on_message=handler) as queue, bed.queue() as watcher:
        follower = watcher.follow()
        good = await queue.enqueue("good")
        bad = await queue.enqueue("bad", max_attempts=1)
        told: dict[str, str] = {}

        async def both() -> bool:
            for message in (await follower.look(limit=100)).messages:
                told[message.id] = message.state if isinstance(message, MessageInfo) else "completed"
            return told.get(good) == "completed" and told.get(bad) == "dead"

        await eventually(both)


@virtual
async def test_overview() -> None:
    """It counts what stats counts, by priority, and has the workers' figures and the coordinator."""
    bed = Bed(latency_s=0.01)
    started = Seen()

    async def handler(payload: int) -> None:
        started(payload)
        await anyio.sleep(2.0)

    settings = Settings(heartbeat_interval=1, visibility_timeout=10)
    async with bed.queue() as watcher:
        empty = await watcher.overview()
        assert (empty.workers, empty.coordinator, empty.waiting) == ([], None, {})
        async with bed.queue(settings=settings, on_message=handler, concurrency=2) as queue:
            await queue.enqueue_many(range(2))
            await started.count(2)
            await queue.enqueue_many(range(10), priority=6)
            await queue.enqueue_many(range(4), delay=3600)
            await anyio.sleep(1.5)
            seen = await watcher.overview()
            stats = await watcher.stats(exact=True)
            assert (seen.stats.pending, seen.stats.delayed) == (stats.pending, stats.delayed)
            assert sum(seen.waiting.values()) == stats.pending
            assert seen.coordinator is not None
            assert (seen.coordinator.worker_id, seen.coordinator.state) == (queue.worker_id, "leading")
            await started.count(12)
            await anyio.sleep(5)
            (worker,) = (await watcher.overview()).workers
            assert (worker.id, worker.completed, worker.alive) == (queue.worker_id, 12, True)
            assert worker.handler_seconds == pytest.approx(24, abs=0.5)
            assert worker.latency_seconds >= worker.handler_seconds
            assert worker.requests["put"] > 0
            assert worker.throttled == 0
            assert worker.reported_at is not None
        gone = await watcher.overview()
        assert (gone.workers, gone.stats.completed) == ([], 12)
        assert gone.coordinator is not None
        assert gone.coordinator.state == "resigned"


async def dead(queue: S3Queue[Any], number: int) -> None:
    await queue.enqueue_many(range(number), max_attempts=1)

    async def all_dead() -> bool:
        return (await queue.stats(exact=True)).dead == number

    await eventually(all_dead)


async def refuse(payload: int) -> None:
    raise ValueError(f"refused {payload} of 'mail-{payload}'") if payload % 3 else KeyError(payload)


@virtual
async def test_dead_letters_by_filter() -> None:
    """redrive and purge take what the filter takes, tell their progress, and leave the others as they are."""
    bed = Bed()
    async with bed.queue(on_message=refuse) as queue:
        await dead(queue, 12)
        await queue.stop_processing()
        assert sorted([letter.payload async for letter in queue.dead_letters.each()]) == list(range(12))
        told: list[int] = []
        count = await queue.dead_letters.redrive(where=lambda letter: letter.payload < 4, on_progress=told.append)
        assert (count, told[-1]) == (4, 4)
        assert await queue.dead_letters.purge(where=lambda letter: letter.error.startswith("KeyError")) == 2
        assert await queue.dead_letters.purge(where=lambda letter: False) == 0
        left = sorted(letter.payload for letter in await queue.dead_letters.list())
        assert left == [4, 5, 7, 8, 10, 11]
        ids = [letter.id for letter in await queue.dead_letters.list() if letter.payload in (4, 5)]
        assert await queue.dead_letters.redrive(ids, where=lambda letter: letter.payload == 5) == 1
        assert sorted([info.payload async for info in queue.browse()]) == [0, 1, 2, 3, 5]


@virtual
async def test_purge_tells_its_progress() -> None:
    """purge says how far it is; its count is what went."""
    bed = Bed()
    async with bed.queue(settings=Settings(coordinator=False, segment_messages_max=1)) as queue:
        await queue.enqueue_many(range(2500))
        told: list[int] = []
        assert await queue.purge(on_progress=told.append) == 2500
        assert told == [1000, 2000, 2500]


@virtual
async def test_dead_letters_summary() -> None:
    """Errors that differ in numbers and names only are one kind; the most frequent comes first."""
    bed = Bed()
    async with bed.queue(on_message=refuse) as queue:
        await dead(queue, 12)
        many, few = await queue.dead_letters.summary()
        assert (many.error, many.count) == ("ValueError: refused N of '…'", 8)
        assert (few.error, few.count) == ("KeyError: N", 4)
        assert many.first <= many.last
        assert (await queue.show(many.example)).error.startswith("ValueError")
        (only,) = await queue.dead_letters.summary(where=lambda letter: letter.payload == 7)
        assert only.count == 1


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (
            "OSError: [Errno 111] Connect call failed ('10.0.0.1', 443)",
            "OSError: [Errno N] Connect call failed ('…', N)",
        ),
        ("ValueError: user 6f1c2c0e-93b7-4f0e-8d6c-1f4e2c7a9b10 is gone", "ValueError: user … is gone"),
        ("X: 01M89GQT8ZAVG984HADBBF2FWZ-000001 at 0x7f65dbd93160", "X: … at …"),
        ('KeyError: "name"', "KeyError: '…'"),
        ("HTTP 503 after 1.25 s", "HTTP N after N s"),
        ("TimeoutError", "TimeoutError"),
    ],
)
def test_kinds_of_errors(error: str, kind: str) -> None:
    """What varies between messages goes, what tells errors apart stays."""
    assert error_kind(error) == kind


@virtual
async def test_summary_is_bounded() -> None:
    """Errors of ever new kinds do not fill the memory: beyond the limit they are counted together."""
    bed = Bed()

    async def handler(payload: int) -> None:
        raise ValueError("".join(chr(ord("a") + int(digit)) for digit in str(payload)))

    async with bed.queue(on_message=handler, concurrency=100) as queue:
        await dead(queue, KINDS_MAX + 25)
        kinds = await queue.dead_letters.summary()
        assert len(kinds) == KINDS_MAX + 1
        assert (kinds[0].error, kinds[0].count) == (OTHERS, 25)
