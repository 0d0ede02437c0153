"""The probe accepts the stores that keep their conditions, refuses those that do not, and leaves nothing behind."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
import pytest
from anyio.lowlevel import checkpoint

from s3queue_async.errors import StoreUnavailable, StoreUnsupported, Throttled
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Conflict,
    Deleted,
    IfAbsent,
    IfVersion,
    Page,
    PreconditionFailed,
    Written,
)
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.storage.probe import probe
from s3queue_async.storage.s3 import S3Storage
from s3queue_async.storage.sqlite import SqliteStorage
from s3queue_async.testing.conformance import keys_of
from s3queue_async.testing.faults import FaultyStorage
from s3queue_async.testing.servers import Server
from tests.conftest import BUCKET

MakeS3 = Callable[[Server], S3Storage]


@pytest.fixture
async def memory() -> AsyncIterator[MemoryStorage]:
    storage = MemoryStorage()
    await storage.open()
    yield storage
    await storage.close()


async def test_accepts_memory(memory: MemoryStorage) -> None:
    """Memory keeps all conditions, and nothing of the probe stays."""
    assert (await probe(memory, random=random.Random(1))).conditional_delete
    assert await keys_of(memory) == []


async def test_accepts_sqlite(tmp_path: Path) -> None:
    """SQLite keeps all conditions, and nothing of the probe stays."""
    storage = SqliteStorage(tmp_path / "queue.db")
    await storage.open()
    assert (await probe(storage, random=random.Random(1))).conditional_delete
    assert await keys_of(storage) == []
    await storage.close()


@pytest.mark.integration
@pytest.mark.parametrize("client", ["s3_storage", "obstore_storage"])
@pytest.mark.parametrize("name", ["moto_server", "seaweedfs"])
async def test_accepts_s3(name: str, client: str, request: pytest.FixtureRequest) -> None:
    """Moto and SeaweedFS keep all conditions, whoever asks, and nothing of the probe stays."""
    make: MakeS3 = request.getfixturevalue(client)
    storage = make(request.getfixturevalue(name))
    await storage.open()
    assert (await probe(storage, random=random.Random(1))).conditional_delete
    assert await keys_of(storage) == []
    await storage.close()


@pytest.mark.integration
@pytest.mark.parametrize("client", ["s3_storage", "obstore_storage"])
async def test_refuses_rclone(rclone_server: Server, client: str, request: pytest.FixtureRequest) -> None:
    """Rclone's S3 server ignores conditions: refused with its answer and the fix, and no object stays."""
    make: MakeS3 = request.getfixturevalue(client)
    storage = make(rclone_server)
    await storage.open()
    with pytest.raises(StoreUnsupported, match=r"If-None-Match: \* on a key that exists with success.*SeaweedFS"):
        await probe(storage, random=random.Random(1))
    await storage.close()
    assert rclone_server.keys(BUCKET, storage.prefix) == []


class _Ignores(MemoryStorage):
    """A store that ignores some conditions."""

    def __init__(self, ignored: str) -> None:
        super().__init__()
        self._ignored = ignored

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        match when:
            case IfAbsent() if self._ignored == "If-None-Match":
                when = None
            case IfAbsent() if self._ignored == "races" and key not in self._space.objects:
                # It looks first and writes then, as SeaweedFS did before 4.17 (seaweedfs/seaweedfs#8800).
                await checkpoint()
                when = None
            case IfVersion() if self._ignored == "If-Match" and key.endswith("sequence"):
                when = None
            case IfVersion() if self._ignored == "missing" and key.endswith("missing"):
                when = None
        return await super().put(key, body, when=when)

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        return await super().delete(key, when=None if self._ignored == "DELETE" else when)


@pytest.mark.parametrize(
    ("ignored", "message"),
    [
        ("If-None-Match", "on a key that exists with success"),
        ("If-Match", "stale ETag in If-Match with success"),
        ("missing", "key that does not exist with success"),
        ("races", "concurrent PUTs .* with success to 2"),
    ],
)
async def test_refuses_what_ignores_a_condition(ignored: str, message: str) -> None:
    """Each condition that a store ignores is found, named, and nothing stays."""
    storage = _Ignores(ignored)
    await storage.open()
    with pytest.raises(StoreUnsupported, match=message):
        await probe(storage, random=random.Random(1))
    assert await keys_of(storage) == []


class _Unordered(MemoryStorage):
    """A store that lists as S3 Express directory buckets do: in no order, or without a place to start after."""

    def __init__(self, *, shuffles: bool) -> None:
        super().__init__()
        self._shuffles = shuffles

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        if not self._shuffles:
            return await super().list(prefix, limit=limit)
        page = await super().list(prefix, after=after, limit=limit)
        return Page(page.entries[::-1], page.more, page.date_s)


@pytest.mark.parametrize(("shuffles", "message"), [(True, "in another order"), (False, "start-after with other keys")])
async def test_refuses_what_lists_without_order(shuffles: bool, message: str) -> None:
    """A store without order in its listings is refused with what it answered, and nothing stays."""
    storage = _Unordered(shuffles=shuffles)
    await storage.open()
    with pytest.raises(StoreUnsupported, match=message):
        await probe(storage, random=random.Random(1))
    assert await keys_of(storage) == []


@pytest.mark.parametrize(
    ("error", "racers"), [(Throttled("slow down"), 1), (Conflict("key"), 1), (Conflict("key"), 2)], ids=str
)
async def test_a_race_of_which_nothing_is_known_is_held_again(error: Exception, racers: int) -> None:
    """Requests that were not tried race with nobody: another race is held, and shows the store's fault."""
    storage = _Ignores("races")
    await storage.open()
    faulty = FaultyStorage(storage)
    for race in range(8):
        faulty.fail(error, "put", key=f"*race-0-{race}", times=racers)
    with pytest.raises(StoreUnsupported, match="concurrent PUTs"):
        await probe(faulty, random=random.Random(1))
    assert faulty.pending == []
    assert await keys_of(storage) == []


async def test_accepts_without_conditional_delete() -> None:
    """A store that only ignores conditions on DELETE is usable, and said to be so."""
    storage = _Ignores("DELETE")
    await storage.open()
    assert not (await probe(storage, random=random.Random(1))).conditional_delete
    assert await keys_of(storage) == []


async def test_a_failing_store_is_not_an_unsupported_one(memory: MemoryStorage) -> None:
    """A store that fails meanwhile is unavailable, not unsupported, and nothing stays."""
    faulty = FaultyStorage(memory)
    faulty.lose_reply("put", skip=2)
    faulty.unavailable("delete", times=2)
    with pytest.raises(StoreUnavailable, match="reply was lost"):
        await probe(faulty, random=random.Random(1))
    assert await keys_of(memory) == []
    assert faulty.pending == []


async def test_lost_replies_in_a_race_are_no_verdict(memory: MemoryStorage) -> None:
    """The winner of a race may lose its reply: then a read decides."""
    faulty = FaultyStorage(memory)
    faulty.lose_reply("put", key="*race*", times=3)
    assert (await probe(faulty, random=random.Random(1))).conditional_delete
    assert await keys_of(memory) == []


async def test_cancelled_probe_leaves_nothing(memory: MemoryStorage) -> None:
    """A probe that is cancelled in the middle takes its objects away first."""
    faulty = FaultyStorage(memory)
    gate = faulty.hold("delete")
    async with anyio.create_task_group() as group:

        async def run() -> None:
            await probe(faulty, random=random.Random(1))

        group.start_soon(run)
        await gate.reached.wait()
        assert await keys_of(memory) != []
        group.cancel_scope.cancel()
    assert await keys_of(memory) == []


async def test_says_what_it_could_not_remove(memory: MemoryStorage) -> None:
    """When cleaning up fails for good, the error says where objects may be left."""
    faulty = FaultyStorage(memory)
    faulty.fail(PreconditionFailed("k"), "delete", times=1)
    faulty.unavailable("delete")
    with pytest.raises(StoreUnavailable, match="store is away"):
        await probe(faulty, random=random.Random(1), clock=_NoWait())
    faulty.clear()
    faulty.lose_request("put")
    faulty.unavailable("list")
    with pytest.raises(StoreUnavailable, match="request was lost") as caught:
        await probe(faulty, random=random.Random(1), clock=_NoWait())
    assert "may be left under plugin/probe/" in caught.value.__notes__[0]


async def test_a_store_that_often_refuses_is_cleaned_up(memory: MemoryStorage) -> None:
    """Refusals do not keep the probe from deleting its objects as long as one goes now and then."""
    faulty = FaultyStorage(memory)
    for race in range(8):
        faulty.throttle("delete", key=f"*/race-0-{race}", times=2)
    assert (await probe(faulty, random=random.Random(1), clock=_NoWait())).conditional_delete
    assert faulty.pending == []
    assert await keys_of(memory) == []


async def test_reads_after_a_race_are_tried_again(memory: MemoryStorage) -> None:
    """A read whose reply is lost says nothing about a store."""
    faulty = FaultyStorage(memory)
    faulty.lose_reply("get", key="*/race-*", times=3)
    assert (await probe(faulty, random=random.Random(1), clock=_NoWait())).conditional_delete
    assert faulty.pending == []


class _NoWait:
    def monotonic(self) -> float:
        return 0.0

    async def sleep(self, seconds: float) -> None:
        assert seconds > 0
