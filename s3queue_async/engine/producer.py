"""Group commit: concurrent enqueues share a segment, and return when it is durable."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Protocol

import anyio
import msgspec
from anyio.abc import TaskGroup, TaskStatus

from s3queue_async.engine.dedup import Deduplicator, Reservation
from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.engine.writing import Fate, GiveUp, Pace, put_segment
from s3queue_async.errors import QueueClosed, QueueError, StoreUnavailable
from s3queue_async.events import EnqueueAmbiguous, MessageEnqueued
from s3queue_async.log import log
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.wakeup import Latch, Wakeup

LANE_WRITES_MAX = 16
"""Segments of one lane that are written at a time."""
WRITES_MAX = 32
"""Segments of all lanes that are written at a time."""
LANE_BACKLOG_MAX = 16
"""Full batches that wait for a write before ``enqueue`` waits for room: when all writes end at once, as many can begin."""
BULK_BATCHES_MAX = 64
"""Segments of one ``enqueue_many`` that are undecided, or wait for one that is, before more payloads are taken."""
BULK_BYTES_MAX = 32 * 1024 * 1024
"""The same in bytes of payloads, unless it is a single segment."""
DECIDE_WITHIN_S = 60.0
"""How long an enqueue goes on trying while the store does not answer."""
MARKERS_REST_S = 1.5
RECORD_OVERHEAD_BYTES = 96


class Options(msgspec.Struct, frozen=True, gc=False):
    """What several messages have in common."""

    max_attempts: int | None = None
    expires_ms: int | None = None
    headers: dict[str, str] | None = None


# Without gc: none of these can be part of a cycle, and hundreds of thousands of them would keep the collector busy.
class Entry(msgspec.Struct, gc=False, eq=False):
    """A message on its way into a segment; ``sharers``: other callers that enqueue it, too, by its deduplication id."""

    payload: bytes
    codec: int
    options: Options
    dedup_id: str | None = None
    id: str = ""
    reservation: Reservation | None = None
    sharers: int = 0


class Batch:
    """Messages that become one segment."""

    __slots__ = ("done", "entries", "error", "ids", "priority", "due_ms", "sent", "size")

    def __init__(self, priority: int, due_ms: int) -> None:
        self.priority = priority
        self.due_ms = due_ms
        self.entries: list[Entry] = []
        self.size = 0
        self.sent = False
        self.error: QueueError | None = None
        self.done = Latch()


class _Lane:
    __slots__ = ("full", "open", "pumps", "room")

    def __init__(self, priority: int, due_ms: int) -> None:
        self.open = Batch(priority, due_ms)
        self.full: deque[Batch] = deque()
        self.pumps = 0
        self.room = Wakeup()

    def take(self) -> Batch | None:
        if self.full:
            batch = self.full.popleft()
            self.room.set()
            return batch
        batch = self.open
        if not batch.entries:
            return None
        self.open = Batch(batch.priority, batch.due_ms)
        return batch


class BulkWriter:
    """Writes many messages of one lane in whole segments; ids come in the order of the messages.

    Args:
        producer: What writes.
        priority, due_ms: The lane.
    """

    def __init__(self, producer: Producer, priority: int, due_ms: int) -> None:
        self._producer = producer
        self._priority = priority
        self._due_ms = due_ms
        self._messages_max = producer.segment_messages_max
        self._bytes_max = producer.segment_bytes_max
        self._batch = Batch(priority, due_ms)
        self._open: deque[tuple[Sequence[Entry], Batch, int]] = deque()
        self._open_bytes = 0
        self._ids: list[str] = []

    def append(self, entry: Entry) -> bool:
        """Take one more message; True when it is time to ``turn``. For messages without a deduplication id."""
        batch = self._batch
        batch.entries.append(entry)
        batch.size += len(entry.payload) + RECORD_OVERHEAD_BYTES
        return len(batch.entries) >= self._messages_max or batch.size >= self._bytes_max

    async def extend(self, entries: Iterable[Entry]) -> None:
        """Take messages without deduplication ids as fast as they can be written."""
        count = size = 0
        add = self._batch.entries.append
        for entry in entries:
            add(entry)
            count += 1
            size += len(entry.payload) + RECORD_OVERHEAD_BYTES
            if count >= self._messages_max or size >= self._bytes_max:
                self._batch.size = size
                await self.turn()
                count = size = 0
                add = self._batch.entries.append
        self._batch.size = size

    async def append_once(self, entry: Entry) -> None:
        """Take a message with a deduplication id: it goes its own way, in its turn."""
        await self.turn()
        entry, batch = await self._producer.add(entry, self._priority, self._due_ms)
        self._keep((entry,), batch, len(entry.payload))

    async def turn(self) -> None:
        """Send what is complete; waits while too much is undecided. Raises what an earlier segment failed with."""
        batch = self._batch
        if batch.entries:
            self._batch = Batch(self._priority, self._due_ms)
            await self._producer.submit(batch)
            self._keep(batch.entries, batch, batch.size)
        await self._settle(BULK_BATCHES_MAX)

    async def finish(self) -> list[str]:
        """All ids, once everything is durable."""
        await self.turn()
        await self._settle(0)
        return self._ids

    async def ids_written(self) -> list[str]:
        """The ids of what is durable, once everything is decided, failures included."""
        for entries, batch, _ in self._open:
            await batch.done.wait()
            if batch.error is None:
                self._ids += [entry.id for entry in entries]
        self._open.clear()
        return self._ids

    def _keep(self, entries: Sequence[Entry], batch: Batch, size: int) -> None:
        self._open.append((entries, batch, size))
        self._open_bytes += size

    async def _settle(self, keep: int) -> None:
        while self._open and (self._is_much(keep) or self._open[0][1].done.is_set()):
            entries, batch, size = self._open[0]
            await batch.done.wait()
            if batch.error is not None:
                raise batch.error
            self._ids += [entry.id for entry in entries]
            self._open.popleft()
            self._open_bytes -= size

    def _is_much(self, keep: int) -> bool:
        return len(self._open) > keep or (self._open_bytes > BULK_BYTES_MAX and len(self._open) > 1)


class Expected(Protocol):
    """A segment that this process's worker claims while it is being written."""

    def written(self, index: segments.Index, payloads: Sequence[bytes], *, shown_at: float) -> None:
        """It is there; ``shown_at``: local time before the request that proves it."""

    def not_written(self, *, certainly: bool) -> None:
        """It is not there, or may not be."""


class HandOver(Protocol):
    """Where a fresh segment may go without a detour over the store."""

    def expect(self, key: SegmentKey) -> Expected | None:
        """A segment is about to be written by this process; None: ``offer`` it once it is."""

    def offer(self, key: SegmentKey, index: segments.Index, payloads: Sequence[bytes], *, shown_at: float) -> None:
        """A segment was written by this process; ``shown_at``: local time before the request that proves it."""

    def notice_due(self, due_ms: int) -> None:
        """A delayed segment was written by this process."""


class Producer:
    """Writes messages in batches; ``run`` must be running while it is used."""

    def __init__(self, shared: Shared, *, hand_over: HandOver | None = None) -> None:
        self._shared = shared
        self._dedup = Deduplicator(shared)
        self.hand_over = hand_over
        self._lanes: dict[tuple[int, int], _Lane] = {}
        self._pace = Pace(WRITES_MAX)
        self._group: TaskGroup | None = None
        self._closed = False
        self._unwritten = 0
        self._idle = Wakeup()
        self._by_dedup_id: dict[str, tuple[Entry, Batch]] = {}

    async def run(self, *, task_status: TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled; batches under way are written within."""
        try:
            async with anyio.create_task_group() as self._group:
                task_status.started()
                await anyio.sleep_forever()
        finally:
            self._abandon()

    def _abandon(self) -> None:
        """Nothing is written any more: tell those who wait."""
        self._closed = True
        for lane in self._lanes.values():
            for batch in (*lane.full, lane.open):
                if batch.entries and not batch.sent:
                    batch.error = QueueClosed("The queue was closed before the message was written.")
                    self._forget(batch.entries, len(batch.entries))
                    batch.done.set()
            lane.room.set()
        self._lanes.clear()

    @property
    def segment_messages_max(self) -> int:
        return self._shared.settings.segment_messages_max

    @property
    def segment_bytes_max(self) -> int:
        return self._shared.settings.segment_bytes_max

    @property
    def unwritten(self) -> int:
        """Messages that wait for their segment to be durable."""
        return self._unwritten

    async def close(self) -> int:
        """Take no more messages; return how many were flushed once all are decided."""
        self._closed = True
        waiting = self._unwritten
        while self._unwritten:
            await self._idle.wait()
        return waiting

    async def enqueue(self, entry: Entry, priority: int, due_ms: int) -> str:
        """Return the message's id once it is durable.

        A caller that is cancelled before its batch is sent takes the message out of it; later, the outcome is
        awaited before the cancellation goes on.
        """
        entry, batch = await self.add(entry, priority, due_ms)
        try:
            await batch.done.wait()
        except anyio.get_cancelled_exc_class():
            if batch.sent:
                with anyio.CancelScope(shield=True):
                    await batch.done.wait()
            elif entry.sharers:
                entry.sharers -= 1
            else:
                self._take_out(entry, batch)
            raise
        if batch.error is not None:
            raise _copy(batch.error)
        return entry.id

    async def add(self, entry: Entry, priority: int, due_ms: int) -> tuple[Entry, Batch]:
        """Put a message into the open batch of its lane; its ``done`` is set when the outcome is known.

        A message with the same deduplication id that is on its way is returned instead.
        """
        while True:
            group = self._require_open()
            known = None if entry.dedup_id is None else self._by_dedup_id.get(entry.dedup_id)
            if known is not None:
                known[0].sharers += 1
                return known
            lane = self._lane(priority, due_ms)
            if len(lane.full) < LANE_BACKLOG_MAX:
                break
            await lane.room.wait()
        settings = self._shared.settings
        size = len(entry.payload) + RECORD_OVERHEAD_BYTES
        batch = lane.open
        if batch.entries and batch.size + size > settings.segment_bytes_max:
            batch = self._seal(lane)
        batch.entries.append(entry)
        batch.size += size
        self._unwritten += 1
        if entry.dedup_id is not None:
            self._by_dedup_id[entry.dedup_id] = (entry, batch)
        if len(batch.entries) >= settings.segment_messages_max or batch.size >= settings.segment_bytes_max:
            self._seal(lane)
        self._see_to(lane, group, (priority, due_ms))
        return entry, batch

    async def submit(self, batch: Batch) -> None:
        """Have a whole batch written; waits for room. Its messages have no deduplication ids."""
        place = batch.priority, batch.due_ms
        lane = self._lane(*place)
        while len(lane.full) >= LANE_BACKLOG_MAX:
            await lane.room.wait()
            lane = self._lane(*place)
        group = self._require_open()
        self._unwritten += len(batch.entries)
        lane.full.append(batch)
        self._see_to(lane, group, place)

    def _see_to(self, lane: _Lane, group: TaskGroup, place: tuple[int, int]) -> None:
        """Have somebody write what waits in a lane: one for the open batch, more for full ones."""
        if lane.pumps == 0 or (lane.full and lane.pumps < LANE_WRITES_MAX):
            lane.pumps += 1
            group.start_soon(self._pump, lane, place)

    def _require_open(self) -> TaskGroup:
        if self._closed or self._group is None:
            raise QueueClosed("The queue takes no more messages: it is not open, drains, or is closed.")
        return self._group

    def _lane(self, priority: int, due_ms: int) -> _Lane:
        self._require_open()
        lane = self._lanes.get((priority, due_ms))
        if lane is None:
            lane = self._lanes[priority, due_ms] = _Lane(priority, due_ms)
        return lane

    @staticmethod
    def _seal(lane: _Lane) -> Batch:
        lane.full.append(lane.open)
        lane.open = Batch(lane.open.priority, lane.open.due_ms)
        return lane.open

    def _take_out(self, entry: Entry, batch: Batch) -> None:
        batch.entries.remove(entry)
        batch.size -= len(entry.payload) + RECORD_OVERHEAD_BYTES
        self._forget([entry], 1)

    def _forget(self, entries: Sequence[Entry], count: int) -> None:
        for entry in entries:
            if entry.dedup_id is not None:
                known = self._by_dedup_id.get(entry.dedup_id)
                if known is not None and known[0] is entry:
                    del self._by_dedup_id[entry.dedup_id]
        self._unwritten -= count
        if self._unwritten == 0:
            self._idle.set()

    async def _pump(self, lane: _Lane, place: tuple[int, int]) -> None:
        try:
            while True:
                async with self._pace:
                    batch = lane.take()
                    if batch is None:
                        return
                    if batch.entries:
                        await self._commit(batch)
        finally:
            lane.pumps -= 1
            if lane.pumps == 0 and not lane.full and not lane.open.entries and self._lanes.get(place) is lane:
                del self._lanes[place]

    async def _commit(self, batch: Batch) -> None:
        batch.sent = True
        count = len(batch.entries)
        entries = list(batch.entries)
        batch.error = StoreUnavailable(
            "The write was broken off; whether the message is in the queue is not known.",
            suggestion="Enqueue it again; give a dedup_id to be sure that it runs once.",
        )
        try:
            await self._write(batch)
        except QueueError as error:
            batch.error = error
        else:
            batch.error = None
        finally:
            self._forget(entries, count)
            batch.done.set()

    def _new_key(self, batch: Batch) -> SegmentKey:
        place = Place.DELAYED if batch.due_ms else Place.READY
        return SegmentKey(place, self._shared.new_ulid(), len(batch.entries), batch.priority, batch.due_ms)

    async def _write(self, batch: Batch) -> None:
        shared = self._shared
        give_up_at = shared.clock.monotonic() + DECIDE_WITHIN_S
        give_up = self._give_up_at(give_up_at)
        key = self._new_key(batch)
        made_at = shared.clock.monotonic()
        enqueued_ms = key.created_ms
        for position, entry in enumerate(batch.entries):
            entry.id = layout.message_id(key.ulid, batch.priority, position)
        while True:
            await self._reserve(batch, key)
            if not batch.entries:
                return
            took_s = shared.clock.monotonic() - made_at
            late = took_s > shared.settings.segment_age / 2
            if late or key.count != len(batch.entries):
                # The markers name the segment, and its name tells its count: name another one.
                reserved = any(entry.reservation is not None for entry in batch.entries)
                if late and reserved:
                    await self._rest(batch, give_up_at)
                key, made_at = self._new_key(batch), shared.clock.monotonic()
                if reserved:
                    continue
            fate = await self._put(batch, key, enqueued_ms, give_up)
            if fate is Fate.WRITTEN:
                self._pace.in_time()
                break
            if fate is Fate.UNKNOWN:
                log.warning("messages are written a second time: the store was out of reach for too long", key=key.text)
                shared.bus.emit(EnqueueAmbiguous(message_ids=[entry.id for entry in batch.entries]))
            await self._pace.too_late()
            key, made_at = self._new_key(batch), shared.clock.monotonic()
        self._announce(batch)

    async def _put(self, batch: Batch, key: SegmentKey, enqueued_ms: int, give_up: GiveUp) -> Fate:
        """Write a batch's segment, and give it to this process's worker if that wants it."""
        index = segments.Index(_records(batch.entries, enqueued_ms), batch.priority)
        payloads = [entry.payload for entry in batch.entries]
        sent_at = self._shared.clock.monotonic()
        expected = self._expect(batch, key)
        fate = Fate.UNKNOWN
        try:
            segment = segments.Segment(index, payloads)
            fate = await put_segment(self._shared, key, segment, give_up=give_up, may_run_at_once=True)
        finally:
            if expected is not None and fate is Fate.WRITTEN:
                expected.written(index, payloads, shown_at=sent_at)
            elif expected is not None:
                expected.not_written(certainly=fate is Fate.NOT_WRITTEN)
        if fate is Fate.WRITTEN and self.hand_over is not None:
            if batch.due_ms:
                self.hand_over.notice_due(batch.due_ms)
            elif expected is None:
                self.hand_over.offer(key, index, payloads, shown_at=sent_at)
        return fate

    def _expect(self, batch: Batch, key: SegmentKey) -> Expected | None:
        """Have this process's worker claim a segment while it is written, so that it starts a round trip earlier."""
        # Another producer of the same deduplication id takes any claim for a proof that the segment was written.
        if self.hand_over is None or batch.due_ms or any(entry.dedup_id is not None for entry in batch.entries):
            return None
        return self.hand_over.expect(key)

    def _announce(self, batch: Batch) -> None:
        if self._shared.bus.wants(MessageEnqueued.name):
            delayed = batch.due_ms > 0
            for entry in batch.entries:
                self._shared.bus.emit(MessageEnqueued(message_id=entry.id, priority=batch.priority, delayed=delayed))

    async def _reserve(self, batch: Batch, key: SegmentKey) -> None:
        """Reserve the deduplication ids; messages that are in the queue already leave the batch with their old id."""
        wanted = [entry for entry in batch.entries if entry.dedup_id is not None]
        if not wanted:
            return
        gone: list[Entry] = []

        async def reserve(entry: Entry) -> None:
            assert entry.dedup_id is not None
            if entry.reservation is None:
                got = await self._dedup.reserve(entry.dedup_id, entry.id, key)
            else:
                got = await self._dedup.rename(entry.reservation, key)
            if isinstance(got, str):
                entry.id = got
                gone.append(entry)
            else:
                entry.reservation = got

        await together(wanted, reserve, at_once=WRITES_MAX)
        for entry in gone:
            batch.entries.remove(entry)

    async def _rest(self, batch: Batch, give_up_at: float) -> None:
        """Leave the markers alone before they are written again.

        Otherwise, on a store that allows one write a second to one key, the next name would be as old before they
        name it, and so would every name after it (found by simulation).
        """
        clock = self._shared.clock
        if clock.monotonic() > give_up_at:
            raise StoreUnavailable(
                f"The deduplication ids of {len(batch.entries)} messages could not be reserved fast enough within "
                f"{DECIDE_WITHIN_S:g} s: nothing was enqueued.",
                suggestion="Enqueue them again later.",
            )
        await clock.sleep(MARKERS_REST_S)

    def _give_up_at(self, local_time: float) -> GiveUp:
        def give_up(error: QueueError) -> None:
            if self._shared.clock.monotonic() > local_time:
                raise StoreUnavailable(
                    f"The store did not confirm the write within {DECIDE_WITHIN_S:g} s ({error}); "
                    "whether the message is in the queue is not known.",
                    suggestion="Enqueue it again later; give a dedup_id to be sure that it runs once.",
                ) from error

        return give_up


def _records(entries: Sequence[Entry], enqueued_ms: int) -> list[segments.Record]:
    records = []
    for entry in entries:
        options = entry.options
        records.append(
            segments.Record(
                entry.id,
                enqueued_ms,
                len(entry.payload),
                entry.codec,
                0,
                0,
                options.max_attempts,
                options.expires_ms,
                entry.dedup_id,
                options.headers,
            )
        )
    return records


def _copy(error: QueueError) -> QueueError:
    """The same error for one of several callers; raising one object in many tasks would tangle its traceback."""
    copy = error.__class__.__new__(error.__class__)
    copy.args = error.args
    copy.__dict__.update(error.__dict__)
    copy.__cause__ = error.__cause__
    return copy
