"""Writes a segment and decides whether it counts: one mechanism for enqueues and for moves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto

from s3queue_async.engine.shared import Shared
from s3queue_async.errors import CorruptObject, QueueError, StoreUnavailable, Throttled
from s3queue_async.events import SegmentVoided
from s3queue_async.log import log
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.protocol.segment import Segment
from s3queue_async.protocol.wrapping import Kind, is_wrapped
from s3queue_async.storage.base import Conflict, IfAbsent, NotFound, PreconditionFailed, Stored
from s3queue_async.wakeup import Wakeup

CLOCK_MARGIN_S = 1.0
CLOCK_MARGIN_PART = 0.2
LOOK_AGAIN_S = 0.1


class Fate(Enum):
    """What became of a write."""

    WRITTEN = auto()
    NOT_WRITTEN = auto()
    UNKNOWN = auto()


class Pace:
    """How many writers may be between naming a segment and having it written: fewer after one came too late.

    When requests have to queue (the store throttles, or is slow), too many at a time would all take longer than
    ``segment_age``, be void, and begin anew, for ever (found by simulation).

    Args:
        most: Writers at a time while all is well.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._allowed = most
        self._under_way = 0
        self._changed = Wakeup()

    async def __aenter__(self) -> None:
        while self._under_way >= self._allowed:
            await self._changed.wait()
        self._under_way += 1

    async def __aexit__(self, *error: object) -> None:
        self._under_way -= 1
        self._changed.set()

    def in_time(self) -> None:
        """A segment was written in time: one more may be under way."""
        if self._allowed < self._most:
            self._allowed += 1
            self._changed.set()

    async def too_late(self) -> None:
        """A segment was not written in time: half as many may be under way. Waits for the next turn to try again."""
        self._allowed = max(1, min(self._allowed, self._under_way) // 2)
        self._under_way -= 1
        self._changed.set()
        try:
            while self._under_way >= self._allowed:
                await self._changed.wait()
        finally:
            self._under_way += 1


GiveUp = Callable[[QueueError], None]
"""Called after each failure; raises when there is no point in another try."""


@dataclass(slots=True)
class _Look:
    """When a look was answered: store time, at the latest, and local time."""

    answered_s: float = 0.0
    at: float = 0.0

    def answered(self, shared: Shared) -> None:
        self.answered_s, self.at = shared.time.latest(), shared.clock.monotonic()


async def look(
    shared: Shared, key: SegmentKey, body: bytes, *, segment: Segment, may_run_at_once: bool, seen: _Look
) -> Fate | None:
    """What the store shows of a segment that may have been written; None: neither it nor a claim on it.

    A void segment is deleted: nobody runs it, and anybody may delete it. So is one that is not what was written:
    SeaweedFS keeps an empty object of a request that was cut off between its headers and its body. Neither says that an
    earlier request did not land in time, was run, and is gone: its claim does (found by simulation).
    """
    try:
        stored = await shared.storage.get(key.text)
    except NotFound:
        claimed = await _is_claimed(shared, key)
        seen.answered(shared)
        return Fate.WRITTEN if claimed else None
    assert isinstance(stored, Stored)
    void = segments.is_void(key.created_ms, stored.modified_s, shared.settings.segment_age)
    if not void and (stored.body == body or await _is_the_same(shared, key, stored.body, body, segment)):
        return Fate.WRITTEN
    ran = may_run_at_once and await _is_claimed(shared, key)
    # Before the DELETE, which may have to wait for its turn until a claim would not linger any more (found by simulation).
    seen.answered(shared)
    shared.bus.emit(SegmentVoided(key=key.text))
    try:
        await shared.storage.delete(key.text)
    except (StoreUnavailable, Throttled) as error:
        if not void:
            raise
        # It stays void, and whoever lists it deletes it.
        log.debug("a void segment could not be deleted", segment=key.name, error=str(error))
    if ran:
        return Fate.WRITTEN
    # An earlier request may still land in time, unless time is over.
    return Fate.NOT_WRITTEN if void else None


async def _is_the_same(shared: Shared, key: SegmentKey, stored: bytes, body: bytes, segment: Segment) -> bool:
    """Whether other bytes are the same segment: two writers of one move encrypt and compress it each in its own way."""
    if not (is_wrapped(Kind.SEGMENT, stored) or is_wrapped(Kind.SEGMENT, body)):
        return False
    return await shared.packer.is_same(key.text, stored, segment)


async def _is_claimed(shared: Shared, key: SegmentKey) -> bool:
    """Whether there is a claim that nobody could have made without having seen the segment."""
    try:
        stored = await shared.storage.get(key.claim)
    except NotFound:
        return False
    assert isinstance(stored, Stored)
    try:
        return not claims.decode(key.claim, stored.body).early
    except CorruptObject:
        return True


async def put_segment(
    shared: Shared, key: SegmentKey, segment: Segment, *, give_up: GiveUp, may_run_at_once: bool
) -> Fate:
    """Write a segment under a new key, and decide by reading when the reply is missing.

    Args:
        key: Made a moment ago: a segment counts only if it lands within ``segment_age`` of its key's time.
        segment: What to write.
        give_up: Called after each failure; raises to end it.
        may_run_at_once: Whether somebody may run it before this call returns. Its absence is then proof only while
            a claim on it would still linger.

    Returns:
        WRITTEN; NOT_WRITTEN: certainly not, take a new key; UNKNOWN: the store was out of reach for too long.
    """
    settings = shared.settings
    body = await shared.packer.pack(key.text, segment)
    margin_s = min(CLOCK_MARGIN_S, CLOCK_MARGIN_PART * settings.segment_age)
    created_s = key.created_ms / 1000
    resend_until_s = created_s + settings.segment_age - margin_s
    decide_after_s = created_s + settings.segment_age + margin_s
    decide_until_s = created_s + settings.claim_linger - margin_s
    # A key that was made while the local clock was ahead, before any reply said so, bears a time that is yet to come.
    # So the time since then counts, too: the segment may have been run at once, and its claim be gone (found by simulation).
    began_at = shared.clock.monotonic()
    resend_for_s = settings.segment_age - margin_s
    decide_within_s = settings.claim_linger - margin_s
    tries = 0
    seen = _Look()
    while True:
        young = shared.clock.monotonic() - began_at < resend_for_s
        if tries == 0 or (young and shared.time.latest() < resend_until_s):
            try:
                written = await shared.storage.put(key.text, body, when=IfAbsent())
            except (PreconditionFailed, Conflict):
                pass
            except (StoreUnavailable, Throttled) as error:
                await _wait(shared, tries, error, give_up)
            else:
                date_s = written.date_s
                if date_s is not None and not segments.is_void(key.created_ms, date_s, settings.segment_age):
                    return Fate.WRITTEN
        tries += 1
        began_s = shared.time.seen()
        try:
            fate = await look(shared, key, body, segment=segment, may_run_at_once=may_run_at_once, seen=seen)
        except (StoreUnavailable, Throttled) as error:
            await _wait(shared, tries, error, give_up)
            continue
        if fate is Fate.WRITTEN:
            return fate
        if fate is Fate.NOT_WRITTEN or began_s > decide_after_s:
            certain = seen.answered_s < decide_until_s and seen.at - began_at < decide_within_s
            return Fate.NOT_WRITTEN if certain or not may_run_at_once else Fate.UNKNOWN
        if shared.time.latest() >= resend_until_s or shared.clock.monotonic() - began_at >= resend_for_s:
            await shared.clock.sleep(max(LOOK_AGAIN_S, decide_after_s - shared.time.earliest()))


async def _wait(shared: Shared, tries: int, error: QueueError, give_up: GiveUp) -> None:
    if not error.retriable:
        raise error
    give_up(error)
    await shared.pause(tries, error)
