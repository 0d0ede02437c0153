"""The suite that every storage must pass; subclass it with a ``storage`` fixture to try one of your own.

    class TestMyStorage(StorageConformance):
        @pytest.fixture
        async def storage(self):
            storage = MyStorage(...)
            await storage.open()
            yield storage
            await storage.close()

The storage must be open and empty. The tests need pytest-asyncio in its auto mode.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Sequence

import anyio
import pytest
from anyio.lowlevel import checkpoint

from s3queue_async.errors import QueueError
from s3queue_async.storage.base import (
    Conflict,
    IfAbsent,
    IfVersion,
    NotFound,
    PreconditionFailed,
    Storage,
    Stored,
    Unmodified,
    Written,
)

_RACERS = 16
_MIB = 1024 * 1024


async def read(storage: Storage, key: str) -> Stored:
    """Read an object that must be there."""
    found = await storage.get(key)
    assert isinstance(found, Stored)
    return found


async def keys_of(storage: Storage, prefix: str = "", *, limit: int = 1000) -> list[str]:
    """All keys that start with the prefix, in the order of the pages."""
    keys: list[str] = []
    while True:
        page = await storage.list(prefix, after=keys[-1] if keys else "", limit=limit)
        keys += [entry.key for entry in page.entries]
        if not page.more:
            return keys


async def put_all(storage: Storage, keys: Sequence[str], body: bytes = b"x") -> None:
    """Write many objects, some at a time."""
    limiter = anyio.CapacityLimiter(32)

    async def put(key: str) -> None:
        async with limiter:
            await storage.put(key, body)

    async with anyio.create_task_group() as group:
        for key in keys:
            group.start_soon(put, key)


async def race(calls: Sequence[Awaitable[Written]]) -> tuple[list[Written], list[QueueError]]:
    """Await all at once; returns the replies and the refusals."""
    written: list[Written] = []
    refused: list[QueueError] = []

    async def one(call: Awaitable[Written]) -> None:
        try:
            written.append(await call)
        except (PreconditionFailed, Conflict) as error:
            refused.append(error)

    async with anyio.create_task_group() as group:
        for call in calls:
            group.start_soon(one, call)
    return written, refused


class StorageConformance:
    """What a queue relies on, one test for each rule."""

    conditional_delete = True
    """False for a store whose DELETE ignores If-Match; such a store is usable, too."""

    byte_order_across_levels = True
    """False for a store that keeps directories, and so lists "a/1" before "a-1"; a queue's keys do not mix these."""

    large_body_bytes = 8 * _MIB
    """The size of the largest body that is tried."""

    clock_tolerance_s = 300.0
    """How far the store's clock may be from this machine's; its dates only have to be plausible."""

    async def test_satisfies_the_protocol(self, storage: Storage) -> None:
        """The object has every method of Storage."""
        assert isinstance(storage, Storage)
        assert 0 < storage.date_resolution_s <= 1.0

    @pytest.mark.parametrize("body", [b"", b"text", bytes(range(256)) * 5, b"\r\n\0\r\n"], ids=repr)
    async def test_round_trip(self, storage: Storage, body: bytes) -> None:
        """A body comes back byte for byte, with the version of its PUT."""
        written = await storage.put("some/key", body)
        found = await read(storage, "some/key")
        assert (found.key, found.body, found.version) == ("some/key", body, written.version)

    async def test_large_body(self, storage: Storage) -> None:
        """A large body comes back whole."""
        body = bytes(range(256)) * (self.large_body_bytes // 256)
        await storage.put("large", body)
        assert (await read(storage, "large")).body == body
        (entry,) = (await storage.list("large")).entries
        assert entry.size == len(body)

    @pytest.mark.parametrize(
        "key",
        [
            "with space",
            "plus+and&and=and?and#",
            "per%cent/%20/%2F",
            "ünïcödé/日本語/🎉",
            "quotes'\"<>/(!*)",
            "dots.../.hidden",
            "a/" + "/".join(["k" * 100] * 7),
            "colon:semi;comma,at@tilde~",
        ],
    )
    async def test_odd_keys(self, storage: Storage, key: str) -> None:
        """Keys with all kinds of characters are written, read, listed and deleted as they are."""
        await storage.put(key, b"1", when=IfAbsent())
        found = await read(storage, key)
        assert found.key == key
        assert await keys_of(storage) == [key]
        assert await keys_of(storage, key) == [key]
        assert await keys_of(storage, key[:3]) == [key]
        await storage.put(key, b"2", when=IfVersion(found.version))
        await storage.delete_many([key])
        assert await keys_of(storage) == []

    async def test_missing_key(self, storage: Storage) -> None:
        """A GET of a key that nobody wrote raises NotFound with the key."""
        with pytest.raises(NotFound) as caught:
            await storage.get("missing")
        assert caught.value.key == "missing"
        with pytest.raises(NotFound):
            await storage.get("missing", unless='"0"', span=(0, 5))

    async def test_overwrite(self, storage: Storage) -> None:
        """A PUT without a condition replaces whatever is there, and the version changes."""
        first = await storage.put("k", b"1")
        second = await storage.put("k", b"2")
        assert first.version != second.version
        assert (await read(storage, "k")).body == b"2"

    async def test_if_absent(self, storage: Storage) -> None:
        """IfAbsent creates, and then refuses until the object is deleted."""
        await storage.put("k", b"1", when=IfAbsent())
        with pytest.raises(PreconditionFailed) as caught:
            await storage.put("k", b"2", when=IfAbsent())
        assert caught.value.key == "k"
        assert (await read(storage, "k")).body == b"1"
        await storage.delete("k")
        await storage.put("k", b"3", when=IfAbsent())

    async def test_if_version(self, storage: Storage) -> None:
        """IfVersion replaces the named version, and refuses once it is stale."""
        first = await storage.put("k", b"1")
        second = await storage.put("k", b"2", when=IfVersion(first.version))
        with pytest.raises(PreconditionFailed):
            await storage.put("k", b"3", when=IfVersion(first.version))
        assert (await read(storage, "k")).body == b"2"
        await storage.put("k", b"4", when=IfVersion(second.version))

    async def test_if_version_on_a_missing_key(self, storage: Storage) -> None:
        """IfVersion on a key that does not exist raises PreconditionFailed, and writes nothing."""
        written = await storage.put("k", b"1")
        await storage.delete("k")
        with pytest.raises(PreconditionFailed):
            await storage.put("k", b"2", when=IfVersion(written.version))
        with pytest.raises(NotFound):
            await storage.get("k")

    async def test_racing_creates(self, storage: Storage) -> None:
        """Many create one key at once: exactly one wins, and its body is what is there."""
        bodies = [f"racer {number}".encode() for number in range(_RACERS)]
        written, refused = await race([storage.put("k", body, when=IfAbsent()) for body in bodies])
        assert (len(written), len(refused)) == (1, _RACERS - 1)
        found = await read(storage, "k")
        assert found.version == written[0].version
        assert found.body in bodies

    async def test_racing_updates(self, storage: Storage) -> None:
        """Many replace one version at once: exactly one wins, and its body is what is there."""
        start = await storage.put("k", b"start")
        bodies = [f"racer {number}".encode() for number in range(_RACERS)]
        written, refused = await race([storage.put("k", body, when=IfVersion(start.version)) for body in bodies])
        assert (len(written), len(refused)) == (1, _RACERS - 1)
        found = await read(storage, "k")
        assert found.version == written[0].version
        assert found.body in bodies

    async def test_no_update_is_lost(self, storage: Storage) -> None:
        """Several count up one number by compare-and-swap: every step is in the result."""
        await storage.put("counter", b"0")

        async def count(name: str) -> None:
            for step in range(5):
                while True:
                    found = await read(storage, "counter")
                    number = int(found.body.split()[0]) + 1
                    try:
                        # The name and step make each body unlike every other: no version comes back.
                        await storage.put("counter", f"{number} {name}{step}".encode(), when=IfVersion(found.version))
                    except (PreconditionFailed, Conflict):
                        continue
                    break

        async with anyio.create_task_group() as group:
            for name in "abcd":
                group.start_soon(count, name)
        assert (await read(storage, "counter")).body.split()[0] == b"20"

    async def test_equal_bodies(self, storage: Storage) -> None:
        """A body that comes back (A, B, A) has the old version or a new one, never the other body's."""
        first = await storage.put("k", b"A")
        between = await storage.put("k", b"B", when=IfVersion(first.version))
        again = await storage.put("k", b"A", when=IfVersion(between.version))
        assert again.version != between.version
        # Stores whose versions are hashes let a stale version pass here; that is why bodies carry a nonce.
        try:
            await storage.put("k", b"C", when=IfVersion(first.version))
            assert again.version == first.version
        except PreconditionFailed:
            assert again.version != first.version

    async def test_span(self, storage: Storage) -> None:
        """A span reads just these bytes; one that passes the end is cut short, or empty."""
        written = await storage.put("k", b"0123456789")
        for span, body in [((0, 1), b"0"), ((3, 4), b"3456"), ((8, 100), b"89"), ((10, 5), b""), ((50, 5), b"")]:
            found = await storage.get("k", span=span)
            assert isinstance(found, Stored)
            assert (found.body, found.version) == (body, written.version)

    async def test_unless(self, storage: Storage) -> None:
        """A GET that names the current version is answered Unmodified, and any other one with the body."""
        first = await storage.put("k", b"1")
        assert isinstance(await storage.get("k", unless=first.version), Unmodified)
        second = await storage.put("k", b"2")
        found = await storage.get("k", unless=first.version)
        assert isinstance(found, Stored)
        assert (found.body, found.version) == (b"2", second.version)
        assert isinstance(await storage.get("k", unless=second.version, span=(0, 1)), Unmodified)

    async def test_delete(self, storage: Storage) -> None:
        """DELETE removes an object, and a missing one is fine."""
        await storage.put("k", b"1")
        await storage.delete("k")
        with pytest.raises(NotFound):
            await storage.get("k")
        await storage.delete("k")

    async def test_conditional_delete(self, storage: Storage) -> None:
        """DELETE with a stale version is refused, as it is for a missing key."""
        if not self.conditional_delete:
            pytest.skip("this store has no conditional DELETE")
        first = await storage.put("k", b"1")
        second = await storage.put("k", b"2")
        with pytest.raises(PreconditionFailed):
            await storage.delete("k", when=IfVersion(first.version))
        assert (await read(storage, "k")).body == b"2"
        await storage.delete("k", when=IfVersion(second.version))
        with pytest.raises(NotFound):
            await storage.get("k")
        with pytest.raises(PreconditionFailed):
            await storage.delete("k", when=IfVersion(second.version))

    async def test_delete_many(self, storage: Storage) -> None:
        """delete_many removes what is named and nothing else; missing keys and none at all are fine."""
        await put_all(storage, ["a", "b", "c", "c d/é+%"])
        await storage.delete_many(["a", "c d/é+%", "missing"])
        assert await keys_of(storage) == ["b", "c"]
        await storage.delete_many([])
        assert await keys_of(storage) == ["b", "c"]

    async def test_list_is_in_byte_order(self, storage: Storage) -> None:
        """Keys come in the order of their UTF-8 bytes, each with version, size and date."""
        keys = ["A/1", "a/10", "a/2", "b", "é", "日", "🎉"]
        if self.byte_order_across_levels:
            keys.append("a-1")
        await put_all(storage, keys)
        written = await storage.put("a/2", b"four")
        page = await storage.list("")
        assert [entry.key for entry in page.entries] == sorted(keys, key=str.encode)
        assert not page.more
        (entry,) = (await storage.list("a/2")).entries
        found = await read(storage, "a/2")
        assert (entry.version, entry.size) == (written.version, 4)
        assert abs(entry.modified_s - found.modified_s) <= 1.0

    async def test_list_prefix(self, storage: Storage) -> None:
        """A prefix is a string, not a directory; nothing is found under one that nobody uses."""
        await put_all(storage, ["job/1", "job/2", "jobs", "other"])
        assert await keys_of(storage, "job") == ["job/1", "job/2", "jobs"]
        assert await keys_of(storage, "job/") == ["job/1", "job/2"]
        assert await keys_of(storage, "none/") == []

    async def test_list_after(self, storage: Storage) -> None:
        """``after`` leaves out its own key and all before it, whether or not it exists or has the prefix."""
        await put_all(storage, ["a/1", "a/2", "a/3", "b/1"])

        async def listed(prefix: str, after: str) -> list[str]:
            return [entry.key for entry in (await storage.list(prefix, after=after)).entries]

        assert await listed("a/", "a/1") == ["a/2", "a/3"]
        assert await listed("a/", "a/1x") == ["a/2", "a/3"]
        assert await listed("a/", "a/3") == []
        assert await listed("b/", "a/2") == ["b/1"]
        assert await listed("a/", "b/1") == []
        assert await listed("", "a/2") == ["a/3", "b/1"]

    async def test_list_limit(self, storage: Storage) -> None:
        """A page holds up to ``limit`` entries and says whether more follow."""
        keys = [f"k/{number}" for number in range(5)]
        await put_all(storage, keys)
        page = await storage.list("k/", limit=2)
        assert ([entry.key for entry in page.entries], page.more) == (keys[:2], True)
        page = await storage.list("k/", limit=5)
        assert ([entry.key for entry in page.entries], page.more) == (keys, False)
        assert await keys_of(storage, "k/", limit=2) == keys

    async def test_more_than_one_full_page(self, storage: Storage) -> None:
        """1,003 keys take two pages of up to 1,000, and none is missing or double."""
        keys = [f"page/{number:05}" for number in range(1003)]
        await put_all(storage, keys)
        first = await storage.list("page/")
        assert (len(first.entries), first.more) == (1000, True)
        assert await keys_of(storage, "page/") == keys
        await storage.delete_many(keys[:1000])
        assert await keys_of(storage, "page/") == keys[1000:]

    async def test_reads_its_own_writes(self, storage: Storage) -> None:
        """A write is in the next read and the next listing, and a delete is, too."""
        for number in range(10):
            await storage.put("k", str(number).encode())
            assert (await read(storage, "k")).body == str(number).encode()
            assert await keys_of(storage) == ["k"]
            await storage.delete("k")
            assert await keys_of(storage) == []

    async def test_dates(self, storage: Storage) -> None:
        """Every reply and answer carries the store's time; it is plausible and does not run backwards."""
        written = await storage.put("k", b"1")
        found = await read(storage, "k")
        unmodified = await storage.get("k", unless=written.version)
        page = await storage.list("")
        with pytest.raises(PreconditionFailed) as refused:
            await storage.put("k", b"2", when=IfAbsent())
        deleted = await storage.delete("k")
        with pytest.raises(NotFound) as missing:
            await storage.get("k")
        dates = [reply.date_s for reply in (written, found, unmodified, page, refused.value, deleted, missing.value)]
        known = [date for date in dates if date is not None]
        assert known == dates
        assert known == sorted(known)
        assert abs(known[0] - time.time()) < self.clock_tolerance_s
        assert abs(found.modified_s - known[0]) <= 1.0 + storage.date_resolution_s
        assert page.entries[0].modified_s <= known[-1] + 1.0

    async def test_cancelled_calls_leave_it_usable(self, storage: Storage) -> None:
        """Calls that are cancelled wherever they are were done or not, and everything works afterwards."""
        body = b"x" * 100_000
        await storage.put("known", body)
        for turns in range(12):
            calls: list[Awaitable[object]] = [
                storage.put(f"cancelled/{turns}", body, when=IfAbsent()),
                storage.get("known"),
                storage.list(""),
                storage.delete_many([f"cancelled/{turns - 1}"]),
            ]
            tasks = [asyncio.ensure_future(call) for call in calls]
            # A different number of turns of the loop catches the calls in different states.
            for _ in range(turns * 3):
                await checkpoint()
            for task in tasks:
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert not isinstance(outcome, Exception), outcome
        for key in await keys_of(storage, "cancelled/"):
            # A delete whose caller gave up may still land between the listing and the read.
            with contextlib.suppress(NotFound):
                assert (await read(storage, key)).body == body
        assert (await read(storage, "known")).body == body
        await storage.put("k", b"1", when=IfAbsent())

    async def test_many_at_once(self, storage: Storage) -> None:
        """More calls at once than there are connections all get their answers."""
        keys = [f"many/{number:03}" for number in range(150)]
        async with anyio.create_task_group() as group:
            for key in keys:
                group.start_soon(storage.put, key, key.encode())
        bodies: dict[str, bytes] = {}

        async def get(key: str) -> None:
            bodies[key] = (await read(storage, key)).body

        async with anyio.create_task_group() as group:
            for key in keys:
                group.start_soon(get, key)
        assert bodies == {key: key.encode() for key in keys}

    async def test_close_twice(self, storage: Storage) -> None:
        """Closing an open storage twice is fine, and opening it again finds what was written."""
        await storage.put("k", b"1")
        await storage.close()
        await storage.close()
        await storage.open()
        assert (await read(storage, "k")).body == b"1"
