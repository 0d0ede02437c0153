"""A queue that encrypts: no payload is ever in the store in plaintext, keys change meanwhile, and who lacks one waits."""

from __future__ import annotations

import asyncio
import base64
import builtins
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio
import pytest

from s3queue_async import (
    Context,
    DeadLetter,
    DecryptionFailed,
    Keyring,
    KeyUnavailable,
    PlaintextRefused,
    S3Queue,
    Settings,
)
from s3queue_async.events import ObjectUnreadable
from s3queue_async.message import MessageStatus
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Deleted,
    IfVersion,
    Page,
    Storage,
    Stored,
    Unmodified,
    Written,
)
from s3queue_async.storage.sqlite import SqliteStorage
from tests.unit.queue.bed import Bed, Seen, eventually, virtual
from tests.unit.queue.test_sqlite import SETTINGS as SQLITE_SETTINGS
from tests.unit.queue.test_takeover import Killable
from tests.unit.test_keyring import without

OLD, NEW = bytes(range(32)), bytes(32)
MARKER = "xyzzy-plugh"
LIFE = Settings(coordinator=False, max_attempts=2, backoff_base=0.2, retain_completed=3600, segment_messages_max=8)
WRITTEN_TO = ("ready", "delayed", "dead", "claims", "history", "plugin", "queue.json")


def old() -> Keyring:
    return Keyring({"old": OLD})


def new() -> Keyring:
    return Keyring({"old": OLD, "new": NEW}, current="new")


class Sniffer:
    """A storage that keeps every body that was ever written to it."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.bodies: defaultdict[str, list[bytes]] = defaultdict(list)

    @property
    def date_resolution_s(self) -> float:
        return self.inner.date_resolution_s

    async def open(self) -> None:
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        return await self.inner.get(key, span=span, unless=unless)

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        self.bodies[key.partition("/")[0]].append(body)
        return await self.inner.put(key, body, when=when)

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        return await self.inner.delete(key, when=when)

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        return await self.inner.delete_many(keys)

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        return await self.inner.list(prefix, after=after, limit=limit)

    def places_of(self, text: str) -> builtins.list[str]:
        """Where the text, or its base64 at any of the three offsets, was ever written."""
        raw = text.encode()
        forms = [raw, *(base64.b64encode(bytes(shift) + raw)[4:-4] for shift in range(3))]
        return sorted(
            place for place, bodies in self.bodies.items() if any(form in body for form in forms for body in bodies)
        )


def file_contains(directory: Path, text: str) -> bool:
    files = list(directory.iterdir())
    assert files
    return any(text.encode() in file.read_bytes() for file in files)


async def live(make: Any, rings: Sequence[Keyring | None]) -> None:
    """Everything that can happen to a message: each queue on the store is made with the next of the keyrings.

    Args:
        make: Makes a queue from options.
        rings: Of the producer, the first worker, who redrives, and the second worker.
    """
    first, second, third, fourth = rings
    ended = Seen()

    async def handler(payload: dict[str, Any], context: Context) -> str:
        number = payload["number"]
        if number == 1 and context.attempt == 1:
            raise OSError(f"{MARKER} will be tried again")
        if number == 2:
            raise DeadLetter(f"{MARKER} is of no use")
        if number == 3:
            raise ValueError(MARKER)
        return f"result of {MARKER}"

    def message(number: int) -> dict[str, Any]:
        return {"number": number, "text": MARKER}

    headers = {"h": MARKER}
    async with make(keyring=first) as producer:
        ids = await producer.enqueue_many([message(number) for number in range(6)], headers=headers)
        ids.append(await producer.enqueue(message(6), dedup_id=MARKER, headers=headers))
        ids.append(await producer.enqueue(message(7), delay=0.3, headers=headers))
        assert await producer.status(ids[0]) is MessageStatus.PENDING
    async with make(keyring=second, on_message=handler) as worker:
        worker.on("message.completed", ended)
        worker.on("message.dead", ended)
        await ended.count(8)
    async with make(keyring=third, auto_start=False) as operator:
        letters = await operator.dead_letters.list()
        assert {letter.payload["number"] for letter in letters} == {2, 3}
        assert all(MARKER in letter.error and letter.headers == headers for letter in letters)
        assert await operator.dead_letters.redrive([letters[0].id]) == 1
        assert await operator.dead_letters.purge([letters[1].id]) == 1
        assert await operator.results(ids[1]) == f"result of {MARKER}"
        assert len(await operator.history()) == 6
    again = Seen()

    async def mild(payload: dict[str, Any]) -> None:
        again(payload)

    async with make(keyring=fourth, on_message=mild) as worker:
        await again.count(1)
        assert again.items[0]["text"] == MARKER


@pytest.mark.parametrize(
    "rings",
    [
        pytest.param((old, old, old, old), id="one-key"),
        pytest.param((old, new, new, new), id="rotated"),
        pytest.param((new, new, old_and_new := lambda: Keyring({"old": OLD, "new": NEW}, current="old"), new),
                     id="mixed"),
    ],
)  # fmt: skip
@virtual
async def test_a_whole_life_without_plaintext(rings: Sequence[Any]) -> None:
    """Enqueue, delay, retry, dead letter, redrive, results, deduplication, change of keys: the marker is nowhere, ever."""
    bed = Bed()
    sniffer = Sniffer(bed.store)
    made = [ring() for ring in rings]
    await live(lambda **options: bed.queue(storage=sniffer, settings=LIFE, **options), made)
    assert set(sniffer.bodies) >= set(WRITTEN_TO), "the life did not go everywhere"
    assert sniffer.places_of(MARKER) == []
    assert all(MARKER.encode() not in body for body in bed.bodies().values())
    assert all(MARKER not in key for key in bed.bodies())


@virtual
async def test_the_same_life_in_plaintext() -> None:
    """Without a keyring the same life writes the marker to each of these places: the test above looks where it should."""
    bed = Bed()
    sniffer = Sniffer(bed.store)
    await live(lambda **options: bed.queue(storage=sniffer, settings=LIFE, **options), [None] * 4)
    assert sniffer.places_of(MARKER) == ["claims", "dead", "delayed", "history", "ready"]


@pytest.mark.parametrize("compression", [None, "zstd"])
async def test_a_whole_life_on_a_file(tmp_path: Path, compression: str | None) -> None:
    """The same on SQLite, in real time, compressed or not; the file itself does not hold the marker either."""
    sniffers: list[Sniffer] = []
    settings = Settings(
        coordinator=False, poll_interval=0.02, max_poll_interval=0.1, max_attempts=2, backoff_base=0.05,
        retain_completed=3600, segment_messages_max=8, compression=compression,
    )  # fmt: skip

    def make(**options: Any) -> S3Queue[Any]:
        sniffers.append(Sniffer(SqliteStorage(str(tmp_path / "queue.db"))))
        return S3Queue(storage=sniffers[-1], settings=settings, **options)

    await live(make, [old(), new(), new(), new()])
    assert {place for sniffer in sniffers for place in sniffer.bodies} >= set(WRITTEN_TO)
    assert [sniffer.places_of(MARKER) for sniffer in sniffers] == [[]] * 4
    assert not file_contains(tmp_path, MARKER)


@virtual
async def test_failures_in_a_lost_workers_claim() -> None:
    """Moves that a lost worker decided and did not write: their reasons are encrypted in its claim, and move on."""
    bed = Bed()

    async def handler(payload: int) -> None:
        raise DeadLetter(f"{MARKER} {payload}")

    async with bed.queue(keyring=old()) as producer:
        await producer.enqueue_many(range(3))
    lost = Killable(bed, handler, keyring=old())
    gate = lost.faults.hold("put", key="dead/*", times=None)
    sniffer = lost.storage = Sniffer(lost.storage)
    async with anyio.create_task_group() as group:
        group.start_soon(lost.run)
        await gate.reached.wait()
        lost.kill()
    (claim,) = [body for key, body in bed.bodies().items() if key.startswith("claims/")]
    assert b'"state":"settled"' in claim
    assert b'"sealed_failures"' in claim
    assert sniffer.places_of(MARKER) == []
    async with bed.queue(keyring=new(), on_message=handler) as queue:
        letters = await eventually(queue.dead_letters.list, every_s=1.0)
        assert sorted(letter.error for letter in letters) == [f"{MARKER} {number}" for number in range(3)]


# -- who lacks what it takes -----------------------------------------------------------------------------------------


LACKS = [
    pytest.param(lambda: None, KeyUnavailable, "this process has no keyring", id="no keyring"),
    pytest.param(lambda: Keyring({"other": NEW}), KeyUnavailable, "the keyring has 'other'", id="another id"),
    pytest.param(lambda: Keyring({"old": NEW}), DecryptionFailed, "was not encrypted with the key", id="another key"),
]


@pytest.mark.parametrize(("lacking", "kind", "text"), LACKS)
@virtual
async def test_a_worker_without_the_key(lacking: Any, kind: type[Exception], text: str) -> None:
    """It says so, leaves the encrypted segments byte for byte and without a claim, and goes on with what it can read.

    What it looks at is bounded: segments that it cannot read cost it a read a minute each.
    """
    bed = Bed()
    seen, unreadable, corrupt = Seen(), Seen(), Seen()

    async def handler(payload: str) -> None:
        seen(payload)

    async with bed.queue(keyring=old()) as producer:
        for number in range(20):
            await producer.enqueue(f"encrypted {number}")
    before = {key: body for key, body in bed.bodies().items() if key.startswith("ready/")}
    async with bed.queue(keyring=lacking(), on_message=handler) as queue:
        queue.on("object.unreadable", unreadable)
        queue.on("object.corrupt", corrupt)
        await unreadable.count(1)
        await anyio.sleep(30)
        bed.store.calls.clear()
        async with bed.queue(keyring=lacking()) as other:
            await other.enqueue("readable")
        assert await seen.count(1) == ["readable"]
        await anyio.sleep(600)
        counted = bed.store.count(under="ready/") + bed.store.count(under="claims/")
        assert counted["get"] <= 2 * 20 * 11 + 10
        assert counted["put"] <= 4, "no claims on what it cannot read"
    assert {key: body for key, body in bed.bodies().items() if key.startswith("ready/")} == before
    assert [key for key in await bed.leftovers() if not key.startswith("ready/")] == []
    assert corrupt.items == []
    assert all(isinstance(event, ObjectUnreadable) and text in event.reason for event in unreadable.items)
    assert 1 <= len(unreadable.items) <= 12, "said once a minute, not once for each segment"
    async with bed.queue(keyring=old(), on_message=handler):
        await seen.count(21)


@virtual
async def test_beside_a_worker_with_the_key() -> None:
    """Of two workers one has the new key: it handles what is encrypted with it, soon, although the other one looks, too."""
    bed = Bed()
    by: dict[str, list[str]] = {"with": [], "without": []}
    seen = Seen()

    def handler(name: str) -> Any:
        async def handle(payload: str) -> None:
            by[name].append(payload)
            seen(payload)

        return handle

    settings = Settings(max_poll_interval=1)
    async with (
        bed.queue(settings=settings, keyring=old(), on_message=handler("without"), concurrency=5),
        bed.queue(settings=settings, keyring=new(), on_message=handler("with"), concurrency=5),
        bed.queue(settings=settings, keyring=new()) as producer,
    ):
        await anyio.sleep(30)
        began = anyio.current_time()
        for number in range(50):
            await producer.enqueue(f"new {number}")
            await anyio.sleep(0.1)
        await seen.count(50)
        took_s = anyio.current_time() - began
    assert sorted(by["with"]) == sorted(f"new {number}" for number in range(50))
    assert by["without"] == []
    assert took_s < 20


@pytest.mark.parametrize(("lacking", "kind", "text"), LACKS)
@virtual
async def test_looking_without_the_key(lacking: Any, kind: type[Exception], text: str) -> None:
    """Lists, states, results and redrive raise the error instead of answering wrongly; counting needs no key."""
    bed = Bed()
    dead, done = Seen(), Seen()
    settings = Settings(coordinator=False, retain_completed=3600)

    async def handler(payload: str) -> str:
        if payload == "bad":
            raise DeadLetter("no")
        return payload

    async with bed.queue(settings=settings, keyring=old()) as producer:
        done_id = await producer.enqueue("good")
        dead_id = await producer.enqueue("bad")
    async with bed.queue(settings=settings, keyring=old(), on_message=handler) as queue:
        queue.on("message.dead", dead)
        queue.on("message.completed", done)
        await dead.count(1)
        await done.count(1)
    async with bed.queue(settings=settings, keyring=old()) as producer:
        waiting_id = await producer.enqueue("waits")
    before = bed.bodies()
    async with bed.queue(settings=settings, keyring=lacking(), auto_start=False) as queue:
        assert ((await queue.stats()).pending, (await queue.stats()).dead) == (1, 1)
        for look in (
            queue.dead_letters.list,
            queue.dead_letters.redrive,
            queue.history,
            lambda: queue.results(done_id),
            lambda: queue.status(done_id),
            lambda: queue.status(dead_id),
            lambda: queue.status(waiting_id),
            lambda: queue.dead_letters.redrive([dead_id]),
        ):
            with pytest.raises(kind, match=text):
                await look()
    messages = ("ready/", "dead/", "history/")
    after = bed.bodies()
    assert {key: body for key, body in after.items() if key.startswith(messages)} == {
        key: body for key, body in before.items() if key.startswith(messages)
    }
    async with bed.queue(settings=settings, keyring=old(), auto_start=False) as queue:
        assert await queue.status(dead_id) is MessageStatus.DEAD
        assert await queue.dead_letters.redrive([dead_id]) == 1


@virtual
async def test_redrive_with_some_keys() -> None:
    """What can be read is listed and redriven; then the error says that some could not."""
    bed = Bed()
    dead = Seen()

    async def handler(payload: str) -> None:
        raise DeadLetter(payload)

    for ring in (old(), Keyring({"lost": NEW})):
        async with bed.queue(keyring=ring, on_message=handler) as queue:
            queue.on("message.dead", dead)
            await queue.enqueue(ring.current)
            await dead.count(len(dead.items) + 1)
    async with bed.queue(keyring=old(), auto_start=False) as queue:
        assert [letter.payload for letter in await queue.dead_letters.list()] == ["old"]
        with pytest.raises(KeyUnavailable, match="'lost'") as caught:
            await queue.dead_letters.redrive()
        assert caught.value.__notes__ == ["1 dead letters that could be read were dealt with."]
        stats = await queue.stats()
        assert (stats.pending, stats.dead) == (1, 1)


@virtual
async def test_another_workers_claim_without_the_key() -> None:
    """A lost worker's encrypted segment is not taken over by one without the key: segment and claim stay as they are."""
    bed = Bed()
    started, seen, unreadable = Seen(), Seen(), Seen()

    async def hang(payload: str) -> None:
        started(payload)
        await anyio.sleep_forever()

    async def handler(payload: str) -> None:
        seen(payload)

    async with bed.queue(keyring=old()) as producer:
        await producer.enqueue("encrypted")
    lost = Killable(bed, hang, keyring=old())
    async with anyio.create_task_group() as group:
        group.start_soon(lost.run)
        await started.count(1)
        lost.kill()
    before = {key: body for key, body in bed.bodies().items() if key.startswith(("ready/", "claims/"))}
    assert len(before) == 2
    async with bed.queue(on_message=handler) as queue:
        queue.on("object.unreadable", unreadable)
        await unreadable.count(1)
        await anyio.sleep(300)
    assert {key: body for key, body in bed.bodies().items() if key.startswith(("ready/", "claims/"))} == before
    async with bed.queue(keyring=old(), on_message=handler):
        assert await seen.count(1) == ["encrypted"]


# -- into encryption, and out of a missing extra ---------------------------------------------------------------------


@virtual
async def test_into_encryption() -> None:
    """A queue that gets a keyring reads what was there before, and everything that it writes from then on is encrypted."""
    bed = Bed()
    sniffer = Sniffer(bed.store)
    seen = Seen()
    attempts: list[int] = []

    async def handler(payload: str, context: Context) -> None:
        attempts.append(context.attempt)
        if context.attempt == 1:
            raise OSError(MARKER)
        seen(payload)

    async with bed.queue() as producer:
        await producer.enqueue(MARKER)
    async with bed.queue(storage=sniffer, keyring=old(), on_message=handler):
        assert await seen.count(1) == [MARKER]
    assert attempts == [1, 2]
    assert sniffer.places_of(MARKER) == []


@virtual
async def test_plaintext_refused() -> None:
    """With accept_plaintext=False an unencrypted segment is left alone, as one without its key would be."""
    bed = Bed()
    seen, unreadable = Seen(), Seen()

    async def handler(payload: str) -> None:
        seen(payload)

    async with bed.queue() as producer:
        await producer.enqueue("forged")
    before = bed.bodies()
    strict = Keyring({"old": OLD}, accept_plaintext=False)
    async with bed.queue(keyring=strict, on_message=handler) as queue:
        queue.on("object.unreadable", unreadable)
        await queue.enqueue("real")
        assert await seen.count(1) == ["real"]
        await unreadable.count(1)
        await anyio.sleep(120)
    assert seen.items == ["real"]
    assert unreadable.items[0].reason == "is not encrypted"
    assert unreadable.items[0].suggestion == PlaintextRefused.default_suggestion
    assert {key: body for key, body in bed.bodies().items() if key.startswith("ready/")} == {
        key: body for key, body in before.items() if key.startswith("ready/")
    }


@virtual
async def test_tampered_segments_are_set_aside() -> None:
    """One copied over another's key, checksums and all, is set aside as it is, and the others are handled."""
    bed = Bed()
    seen, corrupt = Seen(), Seen()

    async def handler(payload: str) -> None:
        seen(payload)

    async with bed.queue(keyring=old()) as producer:
        await producer.enqueue("pay 1", priority=9)
        await producer.enqueue("pay 2")
    one, other = await bed.keys("ready/")
    copied = bed.bodies()[one]
    await bed.memory.put(other, copied)
    async with bed.queue(keyring=old(), on_message=handler) as queue:
        queue.on("object.corrupt", corrupt)
        await corrupt.count(1)
        assert await seen.count(1) == ["pay 1"]
    assert seen.items == ["pay 1"]
    assert bed.bodies()[f"quarantine/{other}"] == copied


async def test_without_zstandard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A worker without the extra leaves compressed segments to others, names what to install, and loses nothing."""
    url = f"sqlite:///{tmp_path}/queue.db"
    seen, unreadable = Seen(), Seen()

    async def handler(payload: str) -> None:
        seen(payload)

    compressing = Settings(coordinator=False, poll_interval=0.02, max_poll_interval=0.1, compression="zstd")
    async with S3Queue(url, settings=compressing) as producer:
        await producer.enqueue("compressed " * 1000)
    with monkeypatch.context() as patch:
        without(patch, "zstandard", "compression")
        async with S3Queue(url, settings=SQLITE_SETTINGS, on_message=handler) as queue:
            queue.on("object.unreadable", unreadable)
            (event,) = await unreadable.count(1)
            await queue.enqueue("plain")
            assert await seen.count(1) == ["plain"]
    assert "s3queue-async[zstd]" in event.suggestion
    async with S3Queue(url, settings=SQLITE_SETTINGS, on_message=handler):
        assert (await seen.count(2))[1] == "compressed " * 1000


@pytest.mark.parametrize("current", [None, "old"])
@virtual
async def test_a_move_that_another_worker_wrote(current: str | None) -> None:
    """A retry's segment that was written, and its writer lost: who finishes the move knows it and leaves it there."""
    bed = Bed()
    settings = Settings(coordinator=False, backoff_base=100, max_attempts=2)
    ring = (lambda: None) if current is None else old
    failed, voided = Seen(), Seen()

    async def fails(payload: str) -> None:
        failed(payload)
        raise OSError("no")

    async with bed.queue(settings=settings, keyring=ring()) as producer:
        await producer.enqueue("x")
    lost = Killable(bed, fails, settings=settings, keyring=ring())
    # The segment moves, and the reply that says so never comes; nor does the old one go.
    gate = lost.faults.hold_reply("put", key="delayed/*")
    async with anyio.create_task_group() as group:
        group.start_soon(lost.run)
        await gate.reached.wait()
        (moved,) = await bed.keys("delayed/")
        body = bed.bodies()[moved]
        lost.kill()
    async with bed.queue(settings=settings, keyring=ring(), on_message=fails) as queue:
        queue.on("segment.void", voided)

        async def is_over() -> bool:
            return await bed.keys("ready/") == []

        await eventually(is_over, every_s=1.0)
        keys = await bed.keys("delayed/")
    assert keys == [moved]
    assert bed.bodies()[moved] == body
    assert voided.items == []


async def test_in_parallel_on_one_loop() -> None:
    """Large segments in threads do not mix: 20 messages of 300 KB each come out as they went in."""
    seen = Seen()
    settings = Settings(coordinator=False, poll_interval=0.02, max_poll_interval=0.1, compression="zstd")

    async def handler(payload: bytes) -> None:
        seen(payload)

    wanted = [bytes([number]) * 300_000 for number in range(20)]
    async with S3Queue("memory://", settings=settings, keyring=old(), on_message=handler) as queue:
        await asyncio.gather(*(queue.enqueue(payload) for payload in wanted))
        assert sorted(await seen.count(20)) == wanted
