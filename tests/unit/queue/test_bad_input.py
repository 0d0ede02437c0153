"""Bad input and damaged objects: each has an error or an event of its own, and hurts nobody else."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import msgspec
import pytest

from s3queue_async import S3Queue, Settings
from s3queue_async.errors import (
    CorruptObject,
    InvalidPayload,
    InvalidPriority,
    InvalidSettings,
    InvalidURL,
    MessageTooLarge,
    NewerFormat,
    QueueError,
    UnknownSetting,
)
from s3queue_async.events import ObjectSetAside
from s3queue_async.protocol import segment as segments
from tests.unit.queue.bed import Bed, Seen, eventually, virtual


class Email(msgspec.Struct):
    to: str


LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("kind", "payload", "text"),
    [
        (Email, {"to": "a"}, "is a dict, not a Email"),
        (Email, Email(5), "cannot be enqueued"),  # type: ignore[arg-type]  # the mistake under test
        (int, "5", "a str, not a int|got `str`"),
        (list[int], ["x"], "cannot be enqueued"),
        (bytes, "text", "a str, not a bytes|got `str`"),
        (Any, object(), "cannot be enqueued"),
        (Any, {1, object()}, "cannot be enqueued"),
        (Any, 2**100, "cannot be enqueued"),
        (Any, LOOP, "cannot be enqueued"),
    ],
)  # fmt: skip
@virtual
async def test_wrong_payloads(kind: Any, payload: Any, text: str) -> None:
    """A payload that is not of the type, or not encodable, is refused before anything is written."""
    bed = Bed()
    async with bed.queue(payload_type=kind) as queue:
        bed.store.calls.clear()
        with pytest.raises(InvalidPayload, match=text) as caught:
            await queue.enqueue(payload)
        assert not caught.value.retriable
        assert caught.value.suggestion
        assert bed.store.calls == []


@virtual
async def test_too_large() -> None:
    """A payload above message_bytes_max is refused with both sizes; the largest allowed one goes through."""
    bed = Bed()
    async with bed.queue(settings=Settings(coordinator=False, message_bytes_max=1000)) as queue:
        with pytest.raises(MessageTooLarge, match="1,001 bytes; message_bytes_max allows 1,000"):
            await queue.enqueue(b"x" * 1001)
        await queue.enqueue(b"x" * 1000)
        assert (await queue.stats()).pending == 1


@virtual
async def test_larger_than_a_segment() -> None:
    """A message larger than segment_bytes_max has a segment of its own, and arrives."""
    bed = Bed()
    seen = Seen()

    async def handler(payload: bytes) -> None:
        seen(len(payload))

    settings = Settings(coordinator=False, segment_bytes_max=2048)
    async with bed.queue(settings=settings, on_message=handler) as queue:
        await queue.enqueue_many([b"x" * size for size in (10, 100_000, 10, 1500, 1500, 10)])
        assert sorted(await seen.count(6)) == [10, 10, 10, 1500, 1500, 100_000]


@pytest.mark.parametrize("priority", [-1, 256, 1.0, "5", None, True])
@virtual
async def test_priorities_out_of_range(priority: Any) -> None:
    """Only whole numbers from 0 to 255 are priorities."""
    bed = Bed()
    async with bed.queue() as queue:
        with pytest.raises(InvalidPriority, match=r"0 \(last\) to 255"):
            await queue.enqueue(1, priority=priority)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"deliver_at": datetime(2030, 1, 1)}, "naive"),  # noqa: DTZ001 - the mistake under test
        ({"deliver_at": 5}, "aware datetime"),
        ({"delay": 1, "deliver_at": datetime.max.replace(tzinfo=UTC)}, "exclude each other"),
        ({"delay": -1}, "out of range"),
        ({"delay": "5"}, "delay must be seconds"),
        ({"delay": float("nan")}, "finite"),
        ({"delay": timedelta(days=5000)}, "out of range"),
        ({"expires_in": 0}, "expires_in"),
        ({"max_attempts": 0}, "max_attempts"),
        ({"max_attempts": 1.5}, "max_attempts"),
        ({"dedup_id": ""}, "dedup_id"),
        ({"dedup_id": "x" * 1025}, "dedup_id"),
        ({"headers": {"a": 1}}, "headers"),
        ({"headers": {"a": "x" * 20_000}}, "headers"),
    ],
)  # fmt: skip
@virtual
async def test_options(options: dict[str, Any], text: str) -> None:
    """Every option out of its range is refused by name, and nothing is written."""
    bed = Bed()
    async with bed.queue() as queue:
        bed.store.calls.clear()
        with pytest.raises(InvalidSettings, match=text):
            await queue.enqueue(1, **options)
        dedup_id = options.get("dedup_id")
        many = options if dedup_id is None else {"dedup_id": lambda payload: dedup_id}
        with pytest.raises(InvalidSettings, match=text):
            await queue.enqueue_many([1], **many)
        assert [call for call in bed.store.calls if call.operation == "put"] == []


def test_settings() -> None:
    """Unknown names, values out of range, and pairs that do not fit are refused with what is allowed."""
    with pytest.raises(UnknownSetting, match="'visibility_timeout'"):
        Settings(visibility_timout=5)  # type: ignore[call-arg]  # the mistake under test
    with pytest.raises(InvalidSettings, match="heartbeat_interval=20 is not well below visibility_timeout=30"):
        Settings(heartbeat_interval=20)
    with pytest.raises(InvalidSettings, match="max_attempts=0"):
        Settings(max_attempts=0)
    with pytest.raises(InvalidSettings, match="backoff_base"):
        Settings(backoff_base=500)
    with pytest.raises(InvalidSettings, match="poll_interval"):
        Settings(poll_interval=10)
    with pytest.raises(InvalidSettings, match="segment_messages_max"):
        Settings(segment_messages_max=2.5)  # type: ignore[arg-type]  # the mistake under test


@pytest.mark.parametrize("url", ["ftp://x/y", "no url", "s3://", "sqlite://"])
def test_urls(url: str) -> None:
    """A url that cannot be understood is refused with the forms that can be."""
    with pytest.raises(InvalidURL):
        S3Queue(url)


@virtual
async def test_a_corrupt_segment_is_set_aside() -> None:
    """It is copied to quarantine/, an event names it, and every other message is handled."""
    bed = Bed()
    seen, corrupt = Seen(), Seen()

    async def handler(payload: int) -> None:
        seen(payload)

    async with bed.queue() as producer:
        for number in range(5):
            await producer.enqueue(number)
    keys = await bed.keys("ready/")
    bodies = {keys[0]: b"", keys[1]: b"rubbish", keys[2]: bed.bodies()[keys[2]][:-1] + b"\x00"}
    for key, body in bodies.items():
        await bed.memory.put(key, body)
    async with bed.queue(on_message=handler) as queue:
        queue.on("object.corrupt", corrupt)
        await seen.count(2)
        await corrupt.count(3)
        await anyio.sleep(60)
    assert all(isinstance(event, ObjectSetAside) for event in corrupt.items)
    assert {event.key: event.quarantined for event in corrupt.items} == {key: f"quarantine/{key}" for key in bodies}
    assert {key: bed.bodies()[f"quarantine/{key}"] for key in bodies} == bodies
    assert [key for key in await bed.leftovers() if not key.startswith("quarantine/")] == []


@virtual
async def test_a_corrupt_claim() -> None:
    """An unreadable claim is reported and blocks its segment for a lease at most; then the messages run alone."""
    bed = Bed()
    seen, corrupt = Seen(), Seen()

    async def handler(payload: int) -> None:
        seen(payload)

    async with bed.queue() as producer:
        await producer.enqueue_many(range(3))
    (key,) = await bed.keys("ready/")
    await bed.memory.open()
    await bed.memory.put(segments_claim(key), b"{}")
    began = anyio.current_time()
    async with bed.queue(on_message=handler) as queue:
        queue.on("object.corrupt", corrupt)
        await queue.enqueue(99)
        assert sorted(await seen.count(4)) == [0, 1, 2, 99]
        assert 29 < anyio.current_time() - began < 40
    assert seen.items[0] == 99
    assert corrupt.items[0].key == segments_claim(key)


def segments_claim(key: str) -> str:
    return "claims/" + key.rpartition("/")[2]


@virtual
async def test_a_corrupt_claim_does_not_break_looking() -> None:
    """stats(exact=True), status and the dead-letter list work beside an unreadable claim, and beside foreign objects."""
    bed = Bed()
    async with bed.queue() as queue:
        message_id = await queue.enqueue(1)
        (key,) = await bed.keys("ready/")
        await bed.memory.put(segments_claim(key), b"{}")
        await bed.memory.put("ready/foreign", b"x")
        await bed.memory.put("dead/foreign", b"x")
        await bed.memory.put(f"dead/{message_id[:26]}-1", b"x")
        stats = await queue.stats(exact=True)
        assert stats.pending + stats.processing == 1
        await queue.status(message_id)
        assert await queue.dead_letters.list() == []


@virtual
async def test_a_foreign_object_under_ready() -> None:
    """An object whose name is no segment's is reported and left alone."""
    bed = Bed()
    seen, corrupt = Seen(), Seen()

    async def handler(payload: int) -> None:
        seen(payload)

    async with bed.queue() as producer:
        await producer.enqueue(1)
    await bed.memory.put("ready/255/readme.txt", b"hello")
    async with bed.queue(on_message=handler) as queue:
        queue.on("object.corrupt", corrupt)
        await seen.count(1)
        await corrupt.count(1)
        await anyio.sleep(30)
    assert [(event.key, event.quarantined) for event in corrupt.items] == [("ready/255/readme.txt", None)]
    assert await bed.leftovers() == ["ready/255/readme.txt"]


@virtual
async def test_a_segment_of_a_newer_version() -> None:
    """It is refused with an event, left as it is without a claim, and the others are handled."""
    bed = Bed()
    seen, corrupt = Seen(), Seen()

    async def handler(payload: int) -> None:
        seen(payload)

    async with bed.queue() as producer:
        await asyncio.gather(producer.enqueue(1), producer.enqueue(2, priority=9))
    newer = next(key for key in await bed.keys("ready/") if "/246/" in key)
    body = bytearray(bed.bodies()[newer])
    body[4] = segments.FORMAT_VERSION + 1
    await bed.memory.put(newer, bytes(body))
    async with bed.queue(on_message=handler) as queue:
        queue.on("object.corrupt", corrupt)
        assert await seen.count(1) == [1]
        await anyio.sleep(30)
        assert len(bed.store.calls) < 150, "it is not asked for again and again"
        assert segments_claim(newer) not in await bed.keys("claims/")
    assert bed.bodies()[newer] == bytes(body)
    assert [(event.key, event.quarantined) for event in corrupt.items] == [(newer, None)]
    assert "version 2" in corrupt.items[0].reason


@pytest.mark.parametrize("body", [b"", b"{}", b"not json", b'{"nonce":"a","format":"1","conditional_delete":true}'])
@virtual
async def test_a_corrupt_configuration(body: bytes) -> None:
    """A queue.json that is none is refused by its key; nothing is changed, and no task is left."""
    bed = Bed()
    await bed.memory.open()
    await bed.memory.put("queue.json", body)
    with pytest.raises(CorruptObject, match=r"queue\.json") as caught:
        async with bed.queue():
            pass
    assert caught.value.key == "queue.json"
    assert "another program may own this prefix" in caught.value.suggestion
    assert bed.bodies() == {"queue.json": body}


@virtual
async def test_a_queue_of_a_newer_version() -> None:
    """A queue.json of a newer format is refused and left alone."""
    bed = Bed()
    async with bed.queue():
        pass
    body = bed.bodies()["queue.json"].replace(b'"format":1', b'"format":2')
    await bed.memory.put("queue.json", body)
    with pytest.raises(NewerFormat, match="format 2"):
        async with bed.queue():
            pass
    assert bed.bodies()["queue.json"] == body


@virtual
async def test_a_dead_letter_that_does_not_decode() -> None:
    """The list shows its raw bytes instead of failing."""
    bed = Bed()
    dead = Seen()

    async def handler(email: Email) -> None: ...

    async with bed.queue() as producer:
        await producer.enqueue([1, 2])
    async with bed.queue(payload_type=Email, on_message=handler, on_error=dead) as queue:
        await dead.count(1)
        await eventually(lambda: bed.keys("dead/"))
        (letter,) = await queue.dead_letters.list()
    assert letter.payload == msgspec.msgpack.encode([1, 2])
    assert letter.error.startswith("InvalidPayload: ")


def test_every_error_prescribes() -> None:
    """Every public error says what to do."""

    def kinds(kind: type[QueueError]) -> list[type[QueueError]]:
        return [kind, *(deeper for below in kind.__subclasses__() for deeper in kinds(below))]

    for kind in kinds(QueueError):
        assert kind.default_suggestion
        assert kind.__doc__
