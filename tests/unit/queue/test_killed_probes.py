"""What a killed probe left behind goes."""

from __future__ import annotations

import anyio

from s3queue_async.engine.recovery import PROBE_OVER_S
from s3queue_async.storage.base import LIST_LIMIT_MAX, Page
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.clock import store_now
from tests.unit.queue.bed import QUIET, Bed, virtual

PROBES = "plugin/probe/"


class _ShortPages(MemoryStorage):
    """A store that lists two keys at a time."""

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        return await super().list(prefix, after=after, limit=min(limit, 2))


@virtual
async def test_one_sweep_deletes_all_of_it() -> None:
    """However many objects a killed probe left, one sweep takes them, and leaves those of a probe that may live."""
    bed, store = Bed(), _ShortPages(now=store_now)
    await store.open()
    for number in range(7):
        await store.put(f"{PROBES}killed/race-0-{number}", b"x")
    async with bed.queue(storage=store) as queue:
        await queue.start_processing(print)
        await anyio.sleep(PROBE_OVER_S - 5)
        await store.put(f"{PROBES}living/sequence", b"x")
        assert len((await MemoryStorage.list(store, PROBES)).entries) == 8
        await anyio.sleep(5 + 2 * QUIET.visibility_timeout)
        assert [entry.key for entry in (await store.list(PROBES)).entries] == [f"{PROBES}living/sequence"]
