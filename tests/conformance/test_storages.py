"""One suite, every store and every wrapper."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from s3queue_async.clock import SystemClock
from s3queue_async.storage.base import Storage
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.storage.metered import MeteredStorage
from s3queue_async.storage.plugin import PluginStorage
from s3queue_async.storage.s3 import S3Storage
from s3queue_async.storage.sqlite import SqliteStorage
from s3queue_async.storage.throttle import ThrottledStorage
from s3queue_async.testing.conformance import StorageConformance
from s3queue_async.testing.faults import FaultyStorage
from s3queue_async.testing.servers import Server


class TestMemory(StorageConformance):
    @pytest.fixture
    async def storage(self) -> AsyncIterator[Storage]:
        storage = MemoryStorage()
        await storage.open()
        yield storage
        await storage.close()


class TestSqlite(StorageConformance):
    @pytest.fixture
    async def storage(self, tmp_path: Path) -> AsyncIterator[Storage]:
        storage = SqliteStorage(tmp_path / "queue.db")
        await storage.open()
        yield storage
        await storage.close()


class TestSqliteFull(StorageConformance):
    @pytest.fixture
    async def storage(self, tmp_path: Path) -> AsyncIterator[Storage]:
        other = SqliteStorage(tmp_path / "queue.db", "other")
        await other.open()
        await other.put("k", b"of the other name")
        storage = SqliteStorage(tmp_path / "queue.db", "this", synchronous="FULL")
        await storage.open()
        yield storage
        await storage.close()
        await other.close()


@pytest.mark.integration
class TestMoto(StorageConformance):
    @pytest.fixture
    async def storage(self, moto_server: Server, s3_storage: Callable[[Server], S3Storage]) -> AsyncIterator[Storage]:
        storage = s3_storage(moto_server)
        await storage.open()
        yield storage
        await storage.close()


@pytest.mark.integration
class TestSeaweedFS(StorageConformance):
    byte_order_across_levels = False

    @pytest.fixture
    async def storage(self, seaweedfs: Server, s3_storage: Callable[[Server], S3Storage]) -> AsyncIterator[Storage]:
        storage = s3_storage(seaweedfs)
        await storage.open()
        yield storage
        await storage.close()


@pytest.mark.integration
class TestMotoByObstore(StorageConformance):
    @pytest.fixture
    async def storage(
        self, moto_server: Server, obstore_storage: Callable[[Server], S3Storage]
    ) -> AsyncIterator[Storage]:
        storage = obstore_storage(moto_server)
        await storage.open()
        yield storage
        await storage.close()


@pytest.mark.integration
class TestSeaweedFSByObstore(StorageConformance):
    byte_order_across_levels = False

    @pytest.fixture
    async def storage(
        self, seaweedfs: Server, obstore_storage: Callable[[Server], S3Storage]
    ) -> AsyncIterator[Storage]:
        storage = obstore_storage(seaweedfs)
        await storage.open()
        yield storage
        await storage.close()


_WRAPPERS: dict[str, Callable[[Storage], Storage]] = {
    "metered": MeteredStorage,
    "throttled": lambda storage: ThrottledStorage(storage, clock=SystemClock()),
    "plugin": lambda storage: PluginStorage(storage, "tests"),
    "faulty": FaultyStorage,
}


@pytest.mark.parametrize("wrapper", list(_WRAPPERS))
class TestWrappers(StorageConformance):
    @pytest.fixture
    async def storage(self, wrapper: str) -> AsyncIterator[Storage]:
        inner = MemoryStorage()
        await inner.open()
        storage = _WRAPPERS[wrapper](inner)
        await storage.open()
        yield storage
        await storage.close()
        await inner.close()
