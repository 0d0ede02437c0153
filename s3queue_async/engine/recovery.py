"""Clears up after those who cannot: orphaned claims, dead registry entries, expired markers and history.

The coordinator does it. Without one every worker does, rarely and with jitter; rendezvous ranking leaves most of each
look to one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol

from s3queue_async.engine.election import Election
from s3queue_async.engine.registry import Claimed, Lease, Registry
from s3queue_async.engine.shared import Shared
from s3queue_async.errors import CorruptObject, QueueError
from s3queue_async.log import log
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.protocol.ranking import falls_to
from s3queue_async.storage.base import Entry, NotFound, Stored
from s3queue_async.storage.plugin import PluginStorage
from s3queue_async.storage.probe import PROBE_NAMESPACE

CLAIMS_PER_SWEEP_MAX = 10_000
LOOKS_PER_SWEEP_MAX = 500
PROBE_OVER_S = 120.0


class Takeover(Protocol):
    """Finishes a settlement on a segment that no claim loop looks at."""

    async def finish_orphan(self, key: SegmentKey) -> None:
        """Take over the claim on this segment if nobody holds it, and settle it."""


class Recovery:
    """Sweeps the queue for what was left behind.

    Args:
        shared: What all roles have.
        registry: Who is alive.
        lease: Under which this worker acts.
        election: Who coordinates.
        known: Names of segments that this worker holds or has just ended.
        let_linger: Takes the key of a claim whose segment is gone.
        takeover: Finishes settlements of dead letters, which no claim loop lists.
    """

    def __init__(
        self,
        shared: Shared,
        registry: Registry,
        lease: Lease,
        election: Election,
        *,
        known: Callable[[str], bool],
        let_linger: Callable[[str], None],
        takeover: Takeover,
    ) -> None:
        self._shared = shared
        self._registry = registry
        self._lease = lease
        self._election = election
        self._known = known
        self._let_linger = let_linger
        self._takeover = takeover
        self._lingering: dict[str, float] = {}
        self._probes = PluginStorage(shared.storage, PROBE_NAMESPACE, ttl_s=PROBE_OVER_S)
        self._probes_swept = False
        self._next_markers = -math.inf

    async def run(self) -> None:
        """Sweep until cancelled."""
        shared = self._shared
        every_s = shared.settings.visibility_timeout
        await shared.clock.sleep(every_s * shared.random.random() / 2)
        while True:
            try:
                if self._election.leading or not self._election.live:
                    await self.sweep()
            except QueueError as error:
                log.warning("the sweep failed", error=str(error))
            await shared.clock.sleep(every_s * (0.75 + 0.5 * shared.random.random()))

    async def sweep(self) -> None:
        """One look at everything that may be left behind."""
        workers: dict[str, float] = {}
        if not self._election.leading:
            # The coordinator has read the heartbeats already, and nobody else sweeps beside it.
            workers = await self._registry.list()
            await self._sweep_workers(workers)
        await self._sweep_claims(workers)
        now = self._shared.clock.monotonic()
        if now >= self._next_markers:
            await self._sweep_markers()
            self._next_markers = now + self._shared.settings.dedup_window / 4
        await self._sweep_probes()
        if self._shared.settings.retain_completed is not None:
            await self._sweep_history(self._shared.settings.retain_completed)

    async def _sweep_workers(self, workers: dict[str, float]) -> None:
        """Fence workers whose lease is over, although nobody asks for what they held."""
        settings = self._shared.settings
        for worker, modified_s in workers.items():
            age_s = self._shared.time.earliest() - modified_s
            if worker != self._lease.worker_id and age_s > settings.visibility_timeout + settings.lease_margin:
                await self._registry.owner(worker)

    async def _sweep_claims(self, workers: Iterable[str]) -> None:
        """Claims whose segment is gone and whose owner cannot delete them, and orphans that no listing shows."""
        # Only until it should be gone: a claim of that name may land once more.
        now = self._shared.clock.monotonic()
        self._lingering = {key: until for key, until in self._lingering.items() if until > now}
        settings = self._shared.settings
        old_s = max(settings.visibility_timeout, settings.claim_linger) + settings.lease_margin
        after, seen, looks = layout.CLAIMS, 0, 0
        while seen < CLAIMS_PER_SWEEP_MAX and looks < LOOKS_PER_SWEEP_MAX:
            page = await self._shared.storage.list(layout.CLAIMS, after=after)
            for entry in page.entries:
                seen += 1
                name = layout.claim_name(entry.key)
                is_old = self._shared.time.earliest() - entry.modified_s > old_s
                if (
                    is_old
                    and falls_to(self._lease.worker_id, name, workers)
                    and not self._known(name)
                    and entry.key not in self._lingering
                ):
                    looks += 1
                    await self._look_at_claim(entry)
            if not page.more:
                return
            after = page.entries[-1].key

    async def _look_at_claim(self, entry: Entry) -> None:
        try:
            stored = await self._shared.storage.get(entry.key)
        except NotFound:
            return
        assert isinstance(stored, Stored)
        try:
            claim = claims.decode(entry.key, stored.body)
            key = SegmentKey.parse(claim.segment)
        except (CorruptObject, ValueError):
            # The claim loop replaces it when its segment is still there; here only its owner would tell more.
            return
        if claim.owner and claim.owner != self._lease.worker_id:
            peer = await self._registry.owner(claim.owner, Claimed(claim.beat, stored.modified_s))
            name = layout.claim_name(entry.key)
            if peer is not None and not self._registry.is_abandoned(peer, name, entry.modified_s):
                return
        try:
            await self._shared.storage.get(key.text, span=(0, 1))
        except NotFound:
            self._lingering[entry.key] = self._shared.clock.monotonic() + 2 * self._shared.settings.claim_linger
            self._let_linger(entry.key)
            return
        if key.place is Place.DEAD:
            await self._takeover.finish_orphan(key)

    async def _sweep_markers(self) -> None:
        after = ""
        while True:
            page = await self._shared.dedup.list("", after=after)
            now_s = self._shared.time.earliest()
            expired = [entry.key for entry in page.entries if self._shared.dedup.expired(entry.modified_s, now_s)]
            if expired:
                await self._shared.dedup.delete_many(expired)
            if not page.more:
                return
            after = page.entries[-1].key

    async def _sweep_probes(self) -> None:
        """Objects of a probe that was killed; looked for once in a worker's life, since probes are rare."""
        if self._probes_swept:
            return
        while True:
            page = await self._probes.list("")
            now_s = self._shared.time.earliest()
            old = [entry.key for entry in page.entries if self._probes.expired(entry.modified_s, now_s)]
            if old:
                await self._probes.delete_many(old)
            if len(old) < len(page.entries) or not page.more:
                break
        self._probes_swept = not page.entries

    async def _sweep_history(self, retain_s: float) -> None:
        while True:
            page = await self._shared.storage.list(layout.HISTORY)
            oldest_ms = (self._shared.time.earliest() - retain_s) * 1000
            expired = [entry.key for entry in page.entries if _is_before(entry.key, oldest_ms)]
            if expired:
                await self._shared.storage.delete_many(expired)
            if len(expired) < len(page.entries) or not page.more:
                return


def _is_before(key: str, time_ms: float) -> bool:
    try:
        return layout.history_time_ms(key) < time_ms
    except ValueError:
        return False
