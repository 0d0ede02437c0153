"""Looks at the queue without owning anything: counts, states, dead letters, history."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import msgspec

from s3queue_async.engine.reading import Backlog, Reading, claimed_names, count, keys_of, require_some
from s3queue_async.engine.registry import Counters, Registry
from s3queue_async.engine.session import Session
from s3queue_async.engine.settler import HistoryRecord
from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.errors import CorruptObject, Unreadable
from s3queue_async.message import (
    CompletedMessage,
    DeadMessage,
    MessageStatus,
    QueueStats,
    WorkerInfo,
    moment,
)
from s3queue_async.protocol import layout
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.protocol.segment import Record
from s3queue_async.storage.base import NotFound, Stored

PLACES = (layout.READY, layout.DELAYED, layout.DEAD, layout.CLAIMS)
QUICK_PAGES = 10
QUICK_WORKERS = 100
AT_ONCE = 8
SCANNED_SEGMENTS_MAX = 10_000
DELETE_BATCH = 1000

_history_decoder = msgspec.msgpack.Decoder(list[HistoryRecord])

Decode = Callable[[bytes, int], Any]


class Inspector:
    """Read-only views of a queue; nothing here claims or changes anything.

    Args:
        shared: What all roles have.
        decode: Turns payload bytes into payloads.
        session: The session of this process, whose counters are newer than its heartbeat; None without one.
    """

    def __init__(self, shared: Shared, decode: Decode, session: Callable[[], Session | None]) -> None:
        self._shared = shared
        self._decode = decode
        self._session = session
        self._registry = Registry(shared)
        self._reading = Reading(shared)

    # -- counting ------------------------------------------------------------------------------------------------

    async def stats(self, *, exact: bool) -> QueueStats:
        """Count by key names; ``exact`` lists everything and reads the claims, too."""
        pages = None if exact else QUICK_PAGES
        listed, complete = await self._reading.listed(PLACES, pages)
        workers = await self._registry.list()
        held = claimed_names(listed[layout.CLAIMS])
        if exact:
            held -= await self._free(held)
        session = self._session()
        mine = {} if session is None else session.held
        own = {name: len(one.waiting) + one.running + len(one.departing) for name, one in mine.items()}
        now_ms = self._shared.time.now_ms()
        backlog = count([*listed[layout.READY], *listed[layout.DELAYED]], held, now_ms, own)
        dead = sum(key.count for key in keys_of(listed[layout.DEAD]))
        counters = await self._counters(list(workers), None if exact else QUICK_WORKERS)
        return stats_of(backlog, counters, dead=dead, workers=len(workers), now_ms=now_ms, complete=complete)

    async def backlog(self, *, stop_at: int) -> int:
        """Messages that wait, delayed ones included; counting ends once ``stop_at`` is reached."""
        count = 0
        for prefix in (layout.READY, layout.DELAYED):
            async for key in self._reading.each_key(prefix):
                count += key.count
                if count >= stop_at:
                    return count
        return count

    async def by_priority(self) -> Backlog:
        """What waits and what is held, by the names of up to 10,000 segments of a kind, and as many claims."""
        # Claims first: a segment that is claimed meanwhile still waits by this count, and one that is settled is gone.
        claimed, _ = await self._reading.entries(layout.CLAIMS, QUICK_PAGES)
        ready, _ = await self._reading.entries(layout.READY, QUICK_PAGES)
        delayed, _ = await self._reading.entries(layout.DELAYED, QUICK_PAGES)
        return count([*ready, *delayed], claimed_names(claimed), self._shared.time.now_ms())

    async def workers(self) -> list[WorkerInfo]:
        """Every registered worker, as its last heartbeat describes it."""
        infos: list[WorkerInfo] = []

        async def look(worker_id: str) -> None:
            peer = await self._registry.read(worker_id)
            if peer is not None:
                infos.append(self._registry.described(peer))

        await together(list(await self._registry.list()), look, at_once=AT_ONCE)
        return sorted(infos, key=lambda info: info.id)

    async def _free(self, names: Iterable[str]) -> set[str]:
        free: set[str] = set()

        async def look(name: str) -> None:
            claim = await self._reading.claim(layout.CLAIMS + name)
            if claim is None or claim.free:
                free.add(name)

        await together(list(names), look, at_once=AT_ONCE)
        return free

    async def _counters(self, workers: Sequence[str], most: int | None) -> Counters:
        session = self._session()
        total = await self._registry.counters()
        if session is not None and not session.is_over:
            total = total.plus(session.counters)
        found: list[Counters] = []

        async def look(worker_id: str) -> None:
            peer = await self._registry.read(worker_id)
            if peer is not None and peer.heartbeat.state == "alive":
                found.append(peer.heartbeat.counters)

        others = [worker for worker in workers if session is None or worker != session.worker_id]
        await together(others[:most], look, at_once=AT_ONCE)
        for counters in found:
            total = total.plus(counters)
        return total

    # -- one message ---------------------------------------------------------------------------------------------

    async def status(self, message_id: str) -> MessageStatus:
        """Where a message is. Cheap while it waits in the segment that it was enqueued in, a scan otherwise."""
        try:
            ulid, priority, index = layout.parse_message_id(message_id)
        except ValueError:
            return MessageStatus.UNKNOWN
        unread: list[Unreadable] = []
        async for place in self.places(message_id, ulid, priority, index, unread):
            state = await self.state_in(*place)
            if state is not None:
                return state
        if await self._completed(message_id, ulid, unread) is not None:
            return MessageStatus.COMPLETED
        # The claim of an ended segment lingers for a while.
        page = await self._shared.storage.list(f"{layout.CLAIMS}{ulid}-", limit=1)
        if page.entries:
            claim = await self._reading.claim(page.entries[0].key)
            if claim is not None and not any(index in move.indices for move in claim.moves):
                return MessageStatus.COMPLETED
        if unread:
            # It may be in there: to say that it is unknown would be wrong.
            raise unread[0]
        return MessageStatus.UNKNOWN

    async def places(
        self, message_id: str, ulid: str, priority: int, index: int, unread: list[Unreadable]
    ) -> AsyncIterator[tuple[SegmentKey, int]]:
        """The segments in which a message may be: the one it was enqueued in, then, by a scan, where it has moved to.

        Those that cannot be read here go into ``unread``.
        """
        page = await self._shared.storage.list(f"{layout.ready_prefix(priority)}{ulid}-", limit=1)
        if page.entries:
            yield SegmentKey.parse(page.entries[0].key), index
        found = await self._find(message_id, ulid, unread)
        if found is not None:
            yield found

    async def state_in(self, key: SegmentKey, index: int) -> MessageStatus | None:
        """The state of a message of this segment; None when it is not there any more."""
        if key.place is Place.DEAD:
            return MessageStatus.DEAD
        record = await self._record(key, index)
        if record is None:
            return None
        claim = await self._reading.claim(key.claim)
        if claim is not None:
            if index in claim.finished:
                return MessageStatus.COMPLETED
            for move in claim.moves:
                if index in move.indices:
                    moved_to = SegmentKey.parse(move.key)
                    if moved_to.place is Place.DEAD:
                        return MessageStatus.DEAD
                    return MessageStatus.RETRYING if move.attempts[move.indices.index(index)] else MessageStatus.PENDING
            if not claim.free:
                return MessageStatus.PROCESSING
        if record.attempts:
            return MessageStatus.RETRYING
        return MessageStatus.DELAYED if key.due_ms > self._shared.time.now_ms() else MessageStatus.PENDING

    async def _record(self, key: SegmentKey, index: int) -> Record | None:
        table = await self._reading.index(key)
        return None if table is None or index >= len(table.records) else table.records[index]

    async def _find(self, message_id: str, ulid: str, unread: list[Unreadable]) -> tuple[SegmentKey, int] | None:
        """Search every segment that the message may have moved to; those that cannot be read here go into ``unread``."""
        found: list[tuple[SegmentKey, int]] = []
        # Whoever moved it may have seen an earlier time than its producer did.
        earliest_ms = layout.ulid_time_ms(ulid) - self._shared.settings.lease_margin * 1000
        for prefix in (layout.DELAYED, layout.DEAD, layout.READY):
            candidates: list[SegmentKey] = []
            async for key in self._reading.each_key(prefix):
                if key.ulid == ulid:
                    return key, layout.parse_message_id(message_id)[2]
                if key.created_ms >= earliest_ms and len(candidates) < SCANNED_SEGMENTS_MAX:
                    candidates.append(key)

            async def look(key: SegmentKey) -> None:
                try:
                    table = None if found else await self._reading.index(key)
                except Unreadable as error:
                    unread.append(error)
                    return
                if table is not None:
                    for index, record in enumerate(table.records):
                        if record.id == message_id:
                            found.append((key, index))

            await together(candidates, look, at_once=AT_ONCE)
            if found:
                return found[0]
        return None

    # -- dead letters --------------------------------------------------------------------------------------------

    async def dead_letters(self, limit: int) -> list[DeadMessage]:
        """Up to ``limit`` dead letters, oldest segments first.

        Raises:
            Unreadable: There are some, and none can be read here. Where some can be, the others are logged.
        """
        found: list[DeadMessage] = []
        unread: list[Unreadable] = []
        async for key in self._reading.each_key(layout.DEAD):
            if len(found) >= limit:
                break
            try:
                segment = await self._reading.segment(key)
            except Unreadable as error:
                unread.append(error)
                continue
            claim = None if segment is None else await self._reading.claim(key.claim)
            ended = set() if claim is None else claim.ended()
            if segment is not None:
                found += [
                    self._dead_message(record, payload, segment.index.priority)
                    for i, (record, payload) in enumerate(zip(segment.index.records, segment.payloads, strict=True))
                    if i not in ended
                ]
        require_some(found, unread)
        return found[:limit]

    def _dead_message(self, record: Record, body: bytes, priority: int) -> DeadMessage:
        try:
            payload = self._decode(body, record.codec)
        except (msgspec.DecodeError, msgspec.ValidationError):
            payload = body
        failure = record.failure
        return DeadMessage(
            id=record.id,
            payload=payload,
            error="" if failure is None else failure.reason,
            traceback="" if failure is None else failure.traceback,
            attempts=record.attempts,
            enqueued_at=moment(record.enqueued_ms),
            died_at=moment(0 if failure is None else failure.at_ms),
            headers=record.headers or {},
            priority=priority,
        )

    async def dead_keys(self) -> AsyncIterator[SegmentKey]:
        """The keys of all segments of dead letters."""
        async for key in self._reading.each_key(layout.DEAD):
            yield key

    # -- history -------------------------------------------------------------------------------------------------

    async def history(self, limit: int) -> list[CompletedMessage]:
        """Up to ``limit`` completed messages, newest first; raises as ``dead_letters``."""
        keys = [entry.key async for entry in self._reading.each(layout.HISTORY)]
        found: list[CompletedMessage] = []
        unread: list[Unreadable] = []
        for key in reversed(keys):
            if len(found) >= limit:
                break
            try:
                found += reversed(await self.completed_in(key))
            except Unreadable as error:
                unread.append(error)
        require_some(found, unread)
        return found[:limit]

    async def completed_in(self, key: str) -> list[CompletedMessage]:
        """The completed messages in one object of the history, in the order of their completion."""
        return [_completed(record) for record in await self._history(key)]

    async def result(self, message_id: str) -> CompletedMessage | None:
        """A completed message's record, if the history has it; raises Unreadable when it may be where it cannot be read."""
        try:
            ulid, _, _ = layout.parse_message_id(message_id)
        except ValueError:
            return None
        unread: list[Unreadable] = []
        record = await self._completed(message_id, ulid, unread)
        if record is None and unread:
            raise unread[0]
        return None if record is None else _completed(record)

    async def _completed(self, message_id: str, ulid: str, unread: list[Unreadable]) -> HistoryRecord | None:
        after = layout.history_key(layout.ulid_time_ms(ulid) - 1000, "")
        async for entry in self._reading.each(layout.HISTORY, after=after):
            try:
                records = await self._history(entry.key)
            except Unreadable as error:
                unread.append(error)
                continue
            for record in records:
                if record.id == message_id:
                    return record
        return None

    async def _history(self, key: str) -> list[HistoryRecord]:
        try:
            stored = await self._shared.storage.get(key)
        except NotFound:
            return []
        assert isinstance(stored, Stored)
        records = self._shared.packer.unpack_history(key, stored.body)
        try:
            return _history_decoder.decode(records)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise CorruptObject(key, f"the history cannot be read ({error})") from error

    # -- purging -------------------------------------------------------------------------------------------------

    async def purge(self, *prefixes: str, on_progress: Callable[[int], None] | None = None) -> int:
        """Delete every segment under these prefixes that nobody holds; returns how many messages went.

        Args:
            on_progress: Told after each batch how many went so far.
        """
        count = 0
        for prefix in prefixes:
            batch: list[SegmentKey] = []
            async for key in self._reading.each_key(prefix):
                batch.append(key)
                if len(batch) == DELETE_BATCH:
                    count += await self._purge_batch(batch)
                    batch = []
                    if on_progress is not None:
                        on_progress(count)
            if batch:
                count += await self._purge_batch(batch)
                if on_progress is not None:
                    on_progress(count)
        return count

    async def _purge_batch(self, batch: Sequence[SegmentKey]) -> int:
        claimed = {layout.claim_name(entry.key) async for entry in self._reading.each(layout.CLAIMS)}
        free = [key for key in batch if key.name not in claimed]
        if free:
            await self._shared.storage.delete_many([key.text for key in free])
        return sum(key.count for key in free)


def stats_of(
    backlog: Backlog, counters: Counters, *, dead: int, workers: int, now_ms: int, complete: bool
) -> QueueStats:
    """What users see of a queue's counts."""
    return QueueStats(
        pending=backlog.pending,
        delayed=backlog.delayed,
        processing=backlog.held,
        completed=counters.completed,
        retried=counters.retried,
        failed=counters.failed,
        dead=dead,
        total=backlog.pending + backlog.delayed + backlog.held + counters.completed + dead,
        workers=workers,
        oldest_age=None if backlog.oldest_ms is None else max(0.0, (now_ms - backlog.oldest_ms) / 1000),
        complete=complete,
    )


def _completed(record: HistoryRecord) -> CompletedMessage:
    return CompletedMessage(
        id=record.id,
        result=msgspec.msgpack.decode(record.result),
        attempts=record.attempts,
        worker_id=record.worker_id,
        enqueued_at=moment(record.enqueued_ms),
        completed_at=moment(record.completed_ms),
        duration=record.duration_s,
    )
