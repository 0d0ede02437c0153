"""What a worker had just ended as it left nobody behind, for those who come after it.

A write of a segment that was repeated on its way may land after the segment's end, as long as the segment is young.
Among several workers the claim stays and shows that all is done. The last one to leave deletes its claims, and leaves
one object that names those segments instead: whoever comes next reads it before it claims anything, runs none of
them, and deletes them once they are too old to come back.
"""

from __future__ import annotations

from contextlib import suppress

import msgspec

from s3queue_async.engine.registry import Lease, Registry
from s3queue_async.engine.settler import Settler
from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.errors import StoreUnavailable, Throttled
from s3queue_async.log import log
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.storage.base import NotFound, Stored

READS_AT_ONCE = 8
DELETE_BATCH_MAX = 500
REST_S = 0.5


class Tombstone(msgspec.Struct, frozen=True):
    """Whole keys of the segments that ended."""

    ended: list[str]


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Tombstone)


class Tombstones:
    """Those that were there as this worker came, and the one that it leaves.

    Args:
        shared: What all roles have.
        registry: Who else is there.
        lease: Under which this worker works.
        settler: Knows which segments may come back.
    """

    def __init__(self, shared: Shared, registry: Registry, lease: Lease, settler: Settler) -> None:
        self._shared = shared
        self._registry = registry
        self._lease = lease
        self._settler = settler
        self._found: dict[str, list[SegmentKey]] = {}
        self._ended: set[str] = set()

    def names(self, name: str) -> bool:
        """Whether a segment ended before this worker came."""
        return name in self._ended

    async def read(self) -> None:
        """Read what others left, until it is read; nothing may be claimed before."""
        while True:
            try:
                await self._shared.insist(self._read, while_true=lambda: self._lease.trusted)
            except (StoreUnavailable, Throttled) as error:
                log.warning("what the last worker left cannot be read, trying again", error=str(error))
                await self._shared.clock.sleep(REST_S)
            else:
                return

    async def _read(self) -> None:
        after, more = "", True
        while more:
            page = await self._shared.tombstones.list("", after=after)
            await together([entry.key for entry in page.entries], self._read_one, at_once=READS_AT_ONCE)
            more = page.more
            after = page.entries[-1].key if more else ""
        await self.sweep()

    async def _read_one(self, tombstone: str) -> None:
        try:
            stored = await self._shared.tombstones.get(tombstone)
        except NotFound:
            # Swept meanwhile: nothing of it can come back.
            return
        assert isinstance(stored, Stored)
        try:
            keys = [SegmentKey.parse(key) for key in _decoder.decode(stored.body).ended]
        except (msgspec.DecodeError, msgspec.ValidationError, ValueError):
            log.warning("what the last worker left is damaged; a late copy of its messages may run", key=tombstone)
            keys = []
        self._found[tombstone] = keys
        self._ended.update(key.name for key in keys)

    async def sweep(self) -> None:
        """Delete what came back of the segments that cannot do so any more, and then the tombstones."""
        for tombstone, keys in list(self._found.items()):
            if any(map(self._settler.may_come_back, keys)):
                continue
            for first in range(0, len(keys), DELETE_BATCH_MAX):
                some = keys[first : first + DELETE_BATCH_MAX]
                await self._shared.storage.delete_many([key.text for key in some])
            await self._shared.tombstones.delete(tombstone)
            del self._found[tombstone]
            self._ended.difference_update(key.name for key in keys)

    async def leave(self) -> bool:
        """Whether nobody else is there, and those who come will know what this worker ended a moment ago.

        Whoever registers after the last listing reads the tombstone, which was written before.
        """
        if not await self._alone():
            return False
        young = self._settler.young()
        if not young:
            return True
        try:
            await self._shared.tombstones.put(self._lease.worker_id, _encoder.encode(Tombstone(young)))
        except (StoreUnavailable, Throttled) as error:
            log.warning("the last worker's claims stay for the next one", error=str(error))
            return False
        if await self._alone():
            return True
        with suppress(StoreUnavailable, Throttled):
            # Its claims tell what ended; whoever comes next deletes this.
            await self._shared.tombstones.delete(self._lease.worker_id)
        return False

    async def _alone(self) -> bool:
        # A listing that does not show this worker may hide others, too (found by simulation).
        return list(await self._registry.list()) == [self._lease.worker_id]
