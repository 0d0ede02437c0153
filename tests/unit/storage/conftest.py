from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.faults import FaultyStorage


@pytest.fixture
async def memory() -> AsyncIterator[MemoryStorage]:
    storage = MemoryStorage()
    await storage.open()
    yield storage
    await storage.close()


@pytest.fixture
def faulty(memory: MemoryStorage) -> FaultyStorage:
    return FaultyStorage(memory)
