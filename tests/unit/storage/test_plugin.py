"""PluginStorage: names, times to live, and the compare-and-swap loop."""

from __future__ import annotations

import anyio
import pytest

from s3queue_async.errors import StoreUnavailable
from s3queue_async.storage.base import IfAbsent, NotFound, PreconditionFailed
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.storage.plugin import PluginStorage
from s3queue_async.testing.conformance import keys_of, read
from s3queue_async.testing.faults import FaultyStorage


async def test_keys_are_relative(memory: MemoryStorage) -> None:
    """What is written is under plugin/<namespace>/, and answers name the relative key."""
    one, two = PluginStorage(memory, "one"), PluginStorage(memory, "two")
    await one.put("a/k", b"1", when=IfAbsent())
    assert await keys_of(memory) == ["plugin/one/a/k"]
    assert await keys_of(one) == ["a/k"]
    assert await keys_of(two) == []
    with pytest.raises(NotFound) as missing:
        await two.get("a/k")
    with pytest.raises(PreconditionFailed) as refused:
        await one.put("a/k", b"2", when=IfAbsent())
    assert missing.value.key == refused.value.key == "a/k"


@pytest.mark.parametrize("namespace", ["", "a/b"])
def test_a_namespace_is_one_part(memory: MemoryStorage, namespace: str) -> None:
    """A namespace with a slash, or none, could reach into another one."""
    with pytest.raises(ValueError, match="one part of a key"):
        PluginStorage(memory, namespace)


def test_expired() -> None:
    """The coarseness of the dates counts against expiry; without a TTL nothing expires."""
    storage = PluginStorage(MemoryStorage(date_resolution_s=1.0), "n", ttl_s=10.0)
    assert not storage.expired(100.0, 110.9)
    assert storage.expired(100.0, 111.0)
    assert not PluginStorage(MemoryStorage(), "n").expired(0.0, 1e9)


async def test_update_races(memory: MemoryStorage) -> None:
    """Concurrent updates of one key are all in the result."""
    storage = PluginStorage(memory, "n")

    async def add(name: bytes) -> None:
        await storage.update("k", lambda body: (body or b"") + name)

    async with anyio.create_task_group() as group:
        for name in (b"a", b"b", b"c", b"d"):
            group.start_soon(add, name)
    assert sorted((await read(storage, "k")).body) == sorted(b"abcd")


async def test_update_is_bounded(memory: MemoryStorage) -> None:
    """When others are always faster, the loop ends, and says so."""
    storage = PluginStorage(memory, "n")
    calls = 0

    def change(body: bytes | None) -> bytes:
        nonlocal calls
        calls += 1
        return b"mine %d" % calls

    faulty = PluginStorage(_AlwaysLate(memory), "n")
    with pytest.raises(StoreUnavailable, match="plugin/n/k was changed by others during each of 3 tries") as caught:
        await faulty.update("k", change, attempts_max=3)
    assert calls == 3
    assert caught.value.retriable
    assert await keys_of(storage) == []


class _AlwaysLate(FaultyStorage):
    def __init__(self, storage: MemoryStorage) -> None:
        super().__init__(storage)
        self.fail(PreconditionFailed("k"), "put", times=None)


async def test_update_knows_its_own_write(memory: MemoryStorage) -> None:
    """A 412 after an own write that was applied: the equal body is a success, and change is not called again."""
    storage = PluginStorage(memory, "n")
    bodies = iter([b"nonce 1"])

    def change(body: bytes | None) -> bytes:
        return next(bodies)

    class Repeats(FaultyStorage):
        """Sends each PUT twice, as a proxy may, and hands on the second reply."""

        async def put(self, *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
            await super().put(*args, **kwargs)  # type: ignore[arg-type]
            return await super().put(*args, **kwargs)  # type: ignore[arg-type]

    written = await PluginStorage(Repeats(memory), "n").update("k", change)
    assert (await read(storage, "k")).version == written.version
