"""Looks at everything at once, for who looks again and again: few listings, and only the heartbeats that changed."""

from __future__ import annotations

from s3queue_async.engine.inspector import QUICK_PAGES
from s3queue_async.engine.reading import Reading, keys_of
from s3queue_async.engine.registry import Registry
from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.looks import CoordinatorInfo, Overview
from s3queue_async.message import QueueStats, moment
from s3queue_async.protocol import layout
from s3queue_async.storage.base import Entry


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
        listed: dict[str, list[Entry]] = {}
        complete = True

        async def list_into(prefix: str) -> None:
            nonlocal complete
            listed[prefix], whole = await self._reading.entries(prefix, QUICK_PAGES)
            complete = complete and whole

        prefixes = (layout.READY, layout.DELAYED, layout.DEAD, layout.CLAIMS)
        await together(prefixes, list_into, at_once=len(prefixes))
        peers = await self._registry.peers()
        counters = await self._registry.counters()
        for peer in peers.values():
            if peer.heartbeat.state == "alive":
                counters = counters.plus(peer.heartbeat.counters)
        claimed = {layout.claim_name(entry.key) for entry in listed[layout.CLAIMS]}
        now_ms = self._shared.time.now_ms()
        waiting: dict[int, int] = {}
        delayed = held = 0
        oldest_ms: int | None = None
        for key in keys_of([*listed[layout.READY], *listed[layout.DELAYED]]):
            if key.name in claimed:
                held += key.count
            elif key.due_ms > now_ms:
                delayed += key.count
            else:
                waiting[key.priority] = waiting.get(key.priority, 0) + key.count
                since_ms = key.due_ms or key.created_ms
                oldest_ms = since_ms if oldest_ms is None else min(oldest_ms, since_ms)
        dead = sum(key.count for key in keys_of(listed[layout.DEAD]))
        pending = sum(waiting.values())
        stats = QueueStats(
            pending=pending,
            delayed=delayed,
            processing=held,
            completed=counters.completed,
            retried=counters.retried,
            failed=counters.failed,
            dead=dead,
            total=pending + delayed + held + counters.completed + dead,
            workers=len(peers),
            oldest_age=None if oldest_ms is None else max(0.0, (now_ms - oldest_ms) / 1000),
            complete=complete,
        )
        workers = [self._registry.described(peer) for _, peer in sorted(peers.items())]
        return Overview(at=moment(now_ms), stats=stats, waiting=waiting, workers=workers, coordinator=coordinator)
