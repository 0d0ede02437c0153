"""Looks at everything at once, for who looks again and again: few listings, and only the heartbeats that changed."""

from __future__ import annotations

from s3queue_async.engine.inspector import PLACES, QUICK_PAGES, stats_of
from s3queue_async.engine.reading import Reading, claimed_names, count, keys_of
from s3queue_async.engine.registry import Registry
from s3queue_async.engine.shared import Shared
from s3queue_async.looks import CoordinatorInfo, Overview
from s3queue_async.message import moment
from s3queue_async.protocol import layout


class Watcher:
    """Counts by key names, up to 10,000 segments of a kind.

    Args:
        shared: What all roles have.
    """

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._reading = Reading(shared)
        self._registry = Registry(shared)

    async def look(self, coordinator: CoordinatorInfo | None) -> Overview:
        """The queue now.

        Args:
            coordinator: What its board said just now.
        """
        listed, complete = await self._reading.listed(PLACES, QUICK_PAGES)
        peers = await self._registry.peers()
        counters = await self._registry.counters()
        for peer in peers.values():
            if peer.heartbeat.state == "alive":
                counters = counters.plus(peer.heartbeat.counters)
        now_ms = self._shared.time.now_ms()
        segments = [*listed[layout.READY], *listed[layout.DELAYED]]
        backlog = count(segments, claimed_names(listed[layout.CLAIMS]), now_ms)
        dead = sum(key.count for key in keys_of(listed[layout.DEAD]))
        stats = stats_of(backlog, counters, dead=dead, workers=len(peers), now_ms=now_ms, complete=complete)
        workers = [self._registry.described(peer) for _, peer in sorted(peers.items())]
        return Overview(
            at=moment(now_ms), stats=stats, waiting=backlog.waiting, workers=workers, coordinator=coordinator
        )
