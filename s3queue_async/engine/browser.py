"""Shows messages as they are stored, without claiming anything."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec

from s3queue_async.engine.inspector import AT_ONCE, Decode, Inspector
from s3queue_async.engine.reading import Reading, require_some
from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.errors import InvalidSettings, MessageNotFound, Unreadable
from s3queue_async.looks import MessageInfo
from s3queue_async.message import MessageStatus, moment
from s3queue_async.protocol import layout
from s3queue_async.protocol.claim import Claim
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.protocol.segment import Codec, Record, Segment
from s3queue_async.settings import whole_number

WAITING = (Place.READY, Place.DELAYED)
CLAIMS_PAGES = 100
"""Names of claims that are remembered while messages are shown: a hundred thousand held segments."""


class Browser:
    """Reads messages, one by one or in the order in which they are delivered, roughly.

    Args:
        shared: What all roles have.
        inspector: Finds a message by its id.
        decode: Turns payload bytes into payloads.
    """

    def __init__(self, shared: Shared, inspector: Inspector, decode: Decode) -> None:
        self._shared = shared
        self._inspector = inspector
        self._decode = decode
        self._reading = Reading(shared)

    async def up_to(self, limit: int | None, places: Sequence[str], priority: int | None) -> AsyncIterator[MessageInfo]:
        """As ``browse``, with places by name (none: ready and delayed), and a limit; both are checked."""
        if limit is not None:
            whole_number("limit", limit, 1, 10**12)
        if priority is not None:
            whole_number("priority", priority, 0, layout.PRIORITY_MAX)
        for name in places:
            if name not in set(Place):
                raise InvalidSettings(f"There is no place {name!r}: it must be one of {', '.join(Place)}.")
        shown = 0
        async for info in self.browse([Place(name) for name in places or WAITING], priority=priority):
            yield info
            shown += 1
            if shown == limit:
                return

    async def browse(self, places: Sequence[Place], *, priority: int | None = None) -> AsyncIterator[MessageInfo]:
        """Every message of these places that is not ended, held ones included.

        It is no snapshot: a message that moves meanwhile may be missed, or shown where it was.

        Args:
            places: Shown in this order.
            priority: Only messages of this one; None for all.

        Raises:
            Unreadable: There are some, and none can be read here. Where some can be, the others are logged.
        """
        unread: list[Unreadable] = []
        shown: list[str] = []
        async for info in self._browse(places, priority, unread):
            shown = shown or [info.id]
            yield info
        require_some(shown, unread)

    async def _browse(
        self, places: Sequence[Place], priority: int | None, unread: list[Unreadable]
    ) -> AsyncIterator[MessageInfo]:
        for place in places:
            prefix = f"{place}/"
            if place is Place.READY and priority is not None:
                prefix = layout.ready_prefix(priority)
            batch: list[SegmentKey] = []
            claimed: set[str] | None = None
            # The first batches are small: who wants the next ten messages should not wait for a thousand.
            size = 1
            async for key in self._reading.each_key(prefix):
                if priority is not None and key.place is Place.DELAYED and key.priority != priority:
                    continue
                batch.append(key)
                if len(batch) >= size:
                    if claimed is None:
                        claimed = await self._claimed()
                    async for info in self._infos(batch, claimed, priority, unread):
                        yield info
                    batch, size = [], min(AT_ONCE, 2 * size)
            if batch:
                claimed = await self._claimed() if claimed is None else claimed
                async for info in self._infos(batch, claimed, priority, unread):
                    yield info

    async def segment(self, key: SegmentKey) -> list[MessageInfo]:
        """The messages of one segment that are not ended; none when it is gone.

        Raises:
            Unreadable: It cannot be read here.
        """
        unread: list[Unreadable] = []
        infos = [info async for info in self._infos([key], {key.name}, None, unread)]
        require_some(infos, unread)
        return infos

    async def show(self, message_id: str) -> MessageInfo:
        """Everything that is stored about a message.

        Raises:
            MessageNotFound: It is not in the queue, and not in the history.
            Unreadable: It is, or may be, in an object that cannot be read here.
        """
        try:
            ulid, priority, index = layout.parse_message_id(message_id)
        except ValueError as error:
            raise MessageNotFound(f"{message_id!r} is not a message id.") from error
        unread: list[Unreadable] = []
        async for key, place in self._inspector.places(message_id, ulid, priority, index, unread):
            state = await self._inspector.state_in(key, place)
            segment = await self._reading.segment(key)
            if state is None or segment is None or place >= len(segment.index.records):
                continue
            if state is MessageStatus.COMPLETED:
                break
            claim = await self._reading.claim(key.claim)
            info = self._info(key, segment, place, claim)
            # What its claim says of it is newer than the segment.
            return msgspec.structs.replace(info, state=state)
        completed = await self._inspector.result(message_id)
        if completed is not None:
            return MessageInfo(
                id=message_id,
                state=MessageStatus.COMPLETED,
                priority=priority,
                enqueued_at=completed.enqueued_at,
                attempts=completed.attempts,
                worker_id=completed.worker_id,
                completed_at=completed.completed_at,
                duration=completed.duration,
                result=completed.result,
            )
        if await self._inspector.status(message_id) is MessageStatus.COMPLETED:
            return MessageInfo(
                id=message_id,
                state=MessageStatus.COMPLETED,
                priority=priority,
                enqueued_at=moment(layout.ulid_time_ms(ulid)),
            )
        if unread:
            raise unread[0]
        raise MessageNotFound(f"There is no message {message_id!r} in the queue.")

    # -- reading -------------------------------------------------------------------------------------------------

    async def _claimed(self) -> set[str]:
        entries, _ = await self._reading.entries(layout.CLAIMS, CLAIMS_PAGES)
        return {layout.claim_name(entry.key) for entry in entries}

    async def _infos(
        self, keys: Sequence[SegmentKey], claimed: set[str], priority: int | None, unread: list[Unreadable]
    ) -> AsyncIterator[MessageInfo]:
        found: dict[SegmentKey, tuple[Segment, Claim | None, set[int]]] = {}

        async def read(key: SegmentKey) -> None:
            try:
                segment = await self._reading.segment(key)
                if segment is None or not await self._counts(key, segment.index.parent):
                    return
                claim = await self._reading.claim(key.claim) if key.name in claimed else None
                found[key] = segment, claim, set() if claim is None else await self._gone(claim)
            except Unreadable as error:
                unread.append(error)

        await together(keys, read, at_once=AT_ONCE)
        for key in keys:
            if key not in found:
                continue
            segment, claim, gone = found[key]
            if priority is not None and segment.index.priority != priority:
                continue
            for index in range(len(segment.index.records)):
                if index not in gone:
                    yield self._info(key, segment, index, claim)

    async def _gone(self, claim: Claim) -> set[int]:
        """The messages that are shown elsewhere, or nowhere: finished, or in the segment that they were moved to."""
        gone = set(claim.finished)
        for move in claim.moves:
            # A move is recorded before its segment is written; until then the old segment is where the messages are.
            if move.applied or await self._reading.index(SegmentKey.parse(move.key)) is not None:
                gone.update(move.indices)
        return gone

    async def _counts(self, key: SegmentKey, parent: str | None) -> bool:
        """Whether the messages of a segment are in it: not where the claim on their old one tells of another move."""
        if parent is None:
            return True
        try:
            before = SegmentKey.parse(parent)
        except ValueError:
            return True
        claim = await self._reading.claim(before.claim)
        if claim is not None and any(move.key == key.text for move in claim.moves):
            return True
        return await self._reading.index(before) is None

    def _info(self, key: SegmentKey, segment: Segment, index: int, claim: Claim | None) -> MessageInfo:
        record = segment.index.records[index]
        failure = record.failure
        held = claim is not None and not claim.free and key.place is not Place.DEAD
        return MessageInfo(
            id=record.id,
            state=self._state(key, record, held=held),
            payload=self._payload(segment.payloads[index], record.codec),
            priority=segment.index.priority,
            enqueued_at=moment(record.enqueued_ms),
            due_at=moment(key.due_ms) if key.place is Place.DELAYED else None,
            attempts=record.attempts,
            max_attempts=record.max_attempts,
            expires_at=None if record.expires_ms is None else moment(record.expires_ms),
            dedup_id=record.dedup_id,
            headers=record.headers or {},
            error="" if failure is None else failure.reason,
            traceback="" if failure is None else failure.traceback,
            failed_at=None if failure is None else moment(failure.at_ms),
            worker_id=claim.owner if claim is not None and held else None,
            claimed_at=moment(claim.claimed_ms) if claim is not None and held else None,
            segment=key.text,
        )

    def _state(self, key: SegmentKey, record: Record, *, held: bool) -> MessageStatus:
        if key.place is Place.DEAD:
            return MessageStatus.DEAD
        if held:
            return MessageStatus.PROCESSING
        if record.attempts:
            return MessageStatus.RETRYING
        return MessageStatus.DELAYED if key.due_ms > self._shared.time.now_ms() else MessageStatus.PENDING

    def _payload(self, body: bytes, codec: int) -> object:
        if codec == Codec.RAW:
            return body
        try:
            return self._decode(body, codec)
        except (msgspec.DecodeError, msgspec.ValidationError):
            # Not of the queue's type: shown as what it is, so that nothing is hidden from who looks for the reason.
            return _plain(body)


def _plain(body: bytes) -> object:
    try:
        return msgspec.msgpack.decode(body)
    except msgspec.DecodeError:
        return body
