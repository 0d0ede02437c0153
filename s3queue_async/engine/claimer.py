"""Claims segments while there is demand for messages, and takes over what nobody holds any more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

import anyio
from anyio.abc import TaskGroup

from s3queue_async.engine.dedup import Deduplicator
from s3queue_async.engine.finder import Candidate, Finder
from s3queue_async.engine.held import Held
from s3queue_async.engine.registry import Claimed, Lease, Registry
from s3queue_async.engine.scanner import Scanner
from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.errors import CorruptObject, NewerFormat, QueueError, StoreUnavailable, Throttled, Unreadable
from s3queue_async.log import log
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.claim import Claim
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.storage.base import (
    IfAbsent,
    IfVersion,
    NotFound,
    PreconditionFailed,
    Stored,
    Superseded,
)
from s3queue_async.wakeup import Latch, Wakeup

CLAIMS_AT_ONCE = 32
QUEUED_BYTES_MAX = 64 * 1024 * 1024
"""Payload bytes that may wait in memory before the next segment is claimed."""
CANDIDATES_STALE_S = 1.0
"""How long a listing is gone by before the store is asked again whether something more urgent came."""
LOOK_AGAIN_S = 1.0
REFUSED_AGAIN_S = 60.0
HEAD_GUESS_BYTES = 1024
"""Holds the head of any segment, and says what it takes to read the rest."""
FETCH_ESTIMATE_S = 0.05


class Claimer:
    """Claims segments as long as there is demand for messages.

    Args:
        shared: What all roles have.
        registry: Who is alive.
        lease: Under which the claims are made.
        finder: Knows what may be claimed, and when to look again.
        scanner: Clears away what does not count.
        demand: Messages wanted beyond those that wait already or are being claimed.
        deliver: Takes each segment that was claimed.
        known: Names of segments that this worker holds or has just ended.
        let_linger: Takes the key of a segment that is gone: its claim is to follow.
    """

    def __init__(
        self,
        shared: Shared,
        registry: Registry,
        lease: Lease,
        finder: Finder,
        scanner: Scanner,
        *,
        demand: Callable[[], int],
        queued_bytes: Callable[[], int],
        deliver: Callable[[Held], None],
        known: Callable[[str], bool],
        let_linger: Callable[[SegmentKey], None],
        release: Callable[[Held], Awaitable[None]],
    ) -> None:
        self._shared = shared
        self._registry = registry
        self._lease = lease
        self._finder = finder
        self._scanner = scanner
        self._demand = demand
        self._queued_bytes = queued_bytes
        self._deliver = deliver
        self._known = known
        self._let_linger = let_linger
        self._release = release
        self._dedup = Deduplicator(shared)
        self._candidates: list[Candidate] = []
        self._looked_at = 0.0
        self._poked = Wakeup()
        self._group: TaskGroup | None = None
        self._quiet = Wakeup()
        self._stopped = False
        self.claiming: dict[str, int] = {}
        self.last_progress = shared.clock.monotonic()
        self._fetch_s = FETCH_ESTIMATE_S
        self._wary_until = 0.0
        self.claims_by_ticket = 0
        self.claims_direct = 0
        self.claims_wasted = 0

    # -- what the others call ------------------------------------------------------------------------------------

    def poke(self) -> None:
        """Demand may have changed."""
        self._poked.set()

    def notice(self) -> None:
        """There is something new: look at once."""
        self._finder.notice()
        self.poke()

    def offer(self, key: SegmentKey, index: segments.Index, payloads: Sequence[bytes], *, shown_at: float) -> bool:
        """Claim a segment that this process has just written, if there is demand; False when it is left for a look."""
        if self._known(key.name) or key.name in self.claiming:
            # A listing was faster than the reply to its writer.
            return False
        if self._group is None or not self._may_take_at_once():
            self.notice()
            return False
        self._start(self._group, Candidate(key, shown_at), (index, list(payloads)))
        return True

    def expect(self, key: SegmentKey) -> Expected | None:
        """Claim a segment while this process writes it, if there is demand; None when it is to be offered later."""
        if self._group is None or not self._may_take_at_once():
            return None
        expected = Expected(key)
        self._begin(key)
        self._group.start_soon(self._attempt, key, partial(self._obtain_expected, expected))
        return expected

    def _may_take_at_once(self) -> bool:
        wanted = self._demand() > 0 and not self._candidates and not self._stopped and self._lease.trusted
        return wanted and len(self.claiming) < CLAIMS_AT_ONCE

    def notice_due(self, due_ms: int) -> None:
        """A delayed segment becomes due then."""
        if self._finder.notice_due(due_ms):
            self.poke()

    async def stop(self) -> None:
        """Claim no more; returns when no claim is under way."""
        self._end_looks()
        self.poke()
        while self.claiming:
            await self._quiet.wait()

    def _end_looks(self) -> None:
        self._stopped = True
        # Who waits for a look would wait in vain.
        self._quiet.set()

    async def poll_once(self) -> None:
        """One look, and every claim that comes of it; for callers that do not wait for messages."""
        before = self._finder.listed
        while self._finder.listed == before and not self._stopped and self._demand() > 0:
            self._finder.look_directly()
            self.poke()
            await self._quiet.wait()
        while self.claiming:
            await self._quiet.wait()

    @property
    def claiming_messages(self) -> int:
        return sum(self.claiming.values())

    @property
    def fetch_s(self) -> float:
        """How long it takes to have the messages of a segment that is there, in seconds: to see it, and to claim it."""
        return self._fetch_s + self._finder.ticket_wait_s

    async def run(self) -> None:
        """Claim until cancelled."""
        clock = self._shared.clock
        try:
            async with anyio.create_task_group() as self._group:
                while True:
                    self.last_progress = clock.monotonic()
                    if self._stopped or not self._wants():
                        await self._wait(1.0)
                        continue
                    if self._start_next(self._group):
                        continue
                    wait_s = self._finder.wait_s(clock.monotonic())
                    if wait_s > 0:
                        await self._wait(wait_s)
                        continue
                    try:
                        self._candidates = await self._finder.find()
                        self._candidates.reverse()
                        self._looked_at = clock.monotonic()
                    except (StoreUnavailable, Throttled) as error:
                        self._finder.failed(error)
                    self._quiet.set()
        finally:
            self._end_looks()

    # -- looking -------------------------------------------------------------------------------------------------

    def _wants(self) -> bool:
        return (
            self._demand() > 0
            and len(self.claiming) < CLAIMS_AT_ONCE
            and (self._queued_bytes() < QUEUED_BYTES_MAX)
            and self._lease.trusted
        )

    async def _wait(self, most_s: float) -> None:
        with anyio.move_on_after(max(0.0, most_s)):
            await self._poked.wait()

    # -- claiming ------------------------------------------------------------------------------------------------

    def _start_next(self, group: TaskGroup) -> bool:
        """Start the best claim; False when no candidate is left."""
        now = self._shared.clock.monotonic()
        if self._candidates and self._finder.overtaken:
            self._candidates.clear()
            self._finder.notice()
        while self._candidates:
            candidate = self._candidates.pop()
            if not self._finder.is_free(candidate.key.name, now) or now - self._looked_at > CANDIDATES_STALE_S:
                continue
            self._finder.started()
            self._start(group, candidate, None)
            return True
        return False

    def _start(
        self, group: TaskGroup, candidate: Candidate, offered: tuple[segments.Index, list[bytes]] | None
    ) -> None:
        self._begin(candidate.key)
        group.start_soon(self._attempt, candidate.key, partial(self._obtain, candidate, offered))

    def _begin(self, key: SegmentKey) -> None:
        self.claiming[key.name] = key.count
        self._lease.needed()

    async def claim_one(self, key: SegmentKey) -> Held | None:
        """Claim this segment, or take it over; None when it is gone or somebody else's.

        Until the caller holds what is returned, the heartbeat does not name it: take it without an await between.

        Raises:
            Unreadable: This process lacks what it takes to read it; it is nobody's, as before.
        """
        if self._known(key.name) or key.name in self.claiming:
            return None
        self.claiming[key.name] = 0
        self._lease.needed()
        try:
            return await self._obtain(Candidate(key), None)
        except NewerFormat as error:
            self._leave_alone(key, error)
            return None
        except CorruptObject as error:
            await self._set_aside(key, error)
            return None
        except Unreadable as error:
            self._leave_alone(key, error)
            raise
        finally:
            del self.claiming[key.name]
            self._quiet.set()

    async def _obtain(self, candidate: Candidate, offered: tuple[segments.Index, list[bytes]] | None) -> Held | None:
        name = candidate.key.name
        held = None
        # Only a claim in the way is worth a look; a segment that was refused waits until its time.
        in_the_way = self._finder.in_the_way(name)
        if not in_the_way:
            started = self._shared.clock.monotonic()
            held = await self._claim_fresh(candidate, offered)
            if held is not None:
                self._fetch_s += 0.2 * (self._shared.clock.monotonic() - started - self._fetch_s)
            in_the_way = candidate.taken
        if held is None and in_the_way:
            held = await self._inspect(candidate)
        if held is not None:
            self._finder.unblock(name)
            if candidate.ticketed:
                self.claims_by_ticket += 1
            else:
                self.claims_direct += 1
        return held

    async def _obtain_expected(self, expected: Expected) -> Held | None:
        """Claim a segment that is being written, and wait for its writer to say what became of it."""
        shared, key = self._shared, expected.key
        claim = self._fresh(key, early=True)
        version = ""
        try:
            version = await shared.swap(
                key.claim, claims.encode(claim), when=IfAbsent(), deadline_s=shared.settings.claim_trust
            )
        except (Superseded, StoreUnavailable, Throttled) as error:
            log.debug("a segment could not be claimed while it was written", segment=key.name, error=str(error))
        await expected.decided.wait()
        segment = expected.segment
        if segment is None:
            if version and expected.certainly_gone:
                self._is_gone(key)
            elif version:
                await self._release(Held(key, claim, version, segments.Index([], key.priority), [], claimed_at=0.0))
            return None
        if not version:
            return await self._obtain(Candidate(key, expected.shown_at), (segment.index, segment.payloads))
        self.claims_direct += 1
        if self._was_seen_lately(expected.shown_at, key.created_ms / 1000):
            return self._held(key, claim, version, segment)
        reading = _Reading()
        await self._read_into(key.text, reading)
        if reading.error is not None:
            raise reading.error
        return await self._admit(key, claim, version, reading.stored)

    async def _attempt(self, key: SegmentKey, obtain: Callable[[], Awaitable[Held | None]]) -> None:
        try:
            held = await obtain()
            # A lease that ran out meanwhile makes it nobody's; its next holder finds it.
            if held is not None and self._lease.trusted:
                self._deliver(held)
        except (NewerFormat, Unreadable) as error:
            self._leave_alone(key, error)
        except CorruptObject as error:
            await self._set_aside(key, error)
        except QueueError as error:
            # Among them a claim that another worker took while it was being given back.
            log.warning("claiming failed", segment=key.name, error=str(error))
            self._finder.block(key.name, LOOK_AGAIN_S)
        finally:
            del self.claiming[key.name]
            self._quiet.set()
            self.poke()

    def _fresh(self, key: SegmentKey, *, early: bool = False) -> Claim:
        return claims.fresh(
            key.text,
            owner=self._lease.worker_id,
            now_ms=self._shared.time.now_ms(),
            nonce=self._shared.nonce(),
            early=early,
            beat=self._lease.cut_short,
        )

    async def _claim_fresh(
        self, candidate: Candidate, offered: tuple[segments.Index, list[bytes]] | None
    ) -> Held | None:
        """Create the claim; the segment is read beside it. None, and blocked, when it is somebody's already."""
        shared = self._shared
        key = candidate.key
        if offered is None and shared.clock.monotonic() < self._wary_until:
            await self._look_first(key)
        claim = self._fresh(key)
        shown_at = shared.clock.monotonic() if candidate.written_at is None else candidate.written_at
        reading = _Reading()
        version = ""
        taken = False
        async with anyio.create_task_group() as group:
            if offered is None:
                group.start_soon(self._read_into, key.text, reading)
            try:
                version = await shared.swap(
                    key.claim, claims.encode(claim), when=IfAbsent(), deadline_s=shared.settings.claim_trust
                )
            except Superseded as lost:
                candidate.claim = lost.stored
                taken = True
                group.cancel_scope.cancel()
            except QueueError as error:
                reading.error = error
                group.cancel_scope.cancel()
        if taken:
            candidate.taken = True
            self.claims_wasted += 1
            self._finder.lost(key.name)
            return None
        if reading.error is not None:
            raise reading.error
        if offered is not None and self._was_seen_lately(shown_at, key.created_ms / 1000):
            held = self._held(key, claim, version, segments.Segment(*offered))
            await self._drop_duplicates(held)
            return held
        if reading.stored is None or not self._was_seen_lately(shown_at, reading.stored.date_s):
            await self._read_into(key.text, reading)
            if reading.error is not None:
                raise reading.error
        return await self._admit(key, claim, version, reading.stored)

    def _was_seen_lately(self, shown_at: float, shown_s: float | None) -> bool:
        """Whether a claim made by now is good without another look at the segment.

        Later the segment may have been run meanwhile, and its claim be gone again. The store's time is looked at, too:
        not every system has a clock that counts a machine's sleep.

        Args:
            shown_at: Local time before the request that showed the segment.
            shown_s: Store time at which it was there; None when the reply did not tell.
        """
        trust_s = self._shared.settings.claim_trust
        time = self._shared.time
        return self._shared.clock.monotonic() - shown_at < trust_s and (
            shown_s is None or time.seen() - shown_s < trust_s - time.resolution_s
        )

    async def _read_into(self, key: str, reading: _Reading) -> None:
        try:
            stored = await self._shared.storage.get(key)
        except NotFound:
            reading.stored = None
        except (StoreUnavailable, Throttled) as error:
            reading.error = error
        else:
            assert isinstance(stored, Stored)
            reading.stored = stored

    async def _look_first(self, key: SegmentKey) -> None:
        """Before a claim: can this process read the segment at all? Raises Unreadable or NewerFormat when it cannot.

        Only for a while after it met one that it cannot: otherwise a process without the key would stand in the way of
        those that have it, by claiming and giving back. A segment that is gone or damaged is found out as always.
        """
        try:
            stored = await self._shared.storage.get(key.text, span=(0, HEAD_GUESS_BYTES))
        except NotFound:
            return
        assert isinstance(stored, Stored)
        try:
            self._shared.packer.require_readable(key.text, stored.body)
        except NewerFormat:
            raise
        except CorruptObject:
            return

    def _leave_alone(self, key: SegmentKey, error: NewerFormat | Unreadable) -> None:
        """Another process may read what this one cannot: say so, and look again when a minute is over."""
        if isinstance(error, NewerFormat):
            self._scanner.report(key.text, error.reason)
        else:
            self._scanner.report_unreadable(error)
        self._finder.block(key.name, REFUSED_AGAIN_S)
        self._wary_until = self._shared.clock.monotonic() + 2 * REFUSED_AGAIN_S

    async def _admit(
        self,
        key: SegmentKey,
        claim: Claim,
        version: str,
        stored: Stored | None,
        segment: segments.Segment | None = None,
    ) -> Held | None:
        """Decide whether a claimed segment may be run; otherwise get rid of the claim.

        Args:
            key: The segment's.
            claim: Ours.
            version: Of the claim.
            stored: The segment as it was read; None when it was not there.
            segment: The same, if it was unpacked already: the claim was another worker's before.
        """
        if stored is None:
            self._is_gone(key)
            return None
        if segments.is_void(key.created_ms, stored.modified_s, self._shared.settings.segment_age):
            await self._scanner.clear_void(key)
            self._is_gone(key)
            return None
        try:
            if segment is None:
                segment = await self._shared.packer.unpack(key.text, stored.body)
            if len(segment.payloads) != key.count:
                raise CorruptObject(key.text, f"holds {len(segment.payloads)} messages, its name says {key.count}")
        except (NewerFormat, Unreadable):
            await self._release(Held(key, claim, version, segments.Index([], key.priority), [], claimed_at=0.0))
            raise
        held = self._held(key, claim, version, segment)
        if segment.index.parent is not None and not await self._parent_allows(segment.index.parent, key.text):
            await self._release(held)
            self._finder.block(key.name, LOOK_AGAIN_S)
            return None
        await self._drop_duplicates(held)
        return held

    def _is_gone(self, key: SegmentKey) -> None:
        """A segment is not there any more, and its claim is ours: it is to follow, and old tickets lead nowhere."""
        self._let_linger(key)
        self._finder.forget(key.name)

    def _held(self, key: SegmentKey, claim: Claim, version: str, segment: segments.Segment) -> Held:
        return Held(key, claim, version, segment.index, segment.payloads, claimed_at=self._shared.clock.monotonic())

    async def _parent_allows(self, parent: str, child: str) -> bool:
        """Whether a moved segment may run: all that moved with it is written, so the parent will never run it."""
        try:
            await self._shared.storage.get(parent, span=(0, 1))
        except NotFound:
            return True
        try:
            stored = await self._shared.storage.get(SegmentKey.parse(parent).claim)
        except NotFound:
            return False
        assert isinstance(stored, Stored)
        try:
            claim = claims.decode(stored.key, stored.body)
        except CorruptObject:
            return False
        return any(move.key == child and move.applied for move in claim.moves)

    async def _drop_duplicates(self, held: Held) -> None:
        """Read the markers of messages with a deduplication id; a copy that does not count is finished unrun."""
        wanted = [(i, record) for i in held.waiting if (record := held.index.records[i]).dedup_id is not None]
        if not wanted:
            return
        moved = held.index.parent is not None

        async def look(item: tuple[int, segments.Record]) -> None:
            index, record = item
            assert record.dedup_id is not None
            reservation = await self._dedup.look(record.dedup_id)
            if self._dedup.is_duplicate(reservation, message_id=record.id, key=held.key.text, moved=moved):
                held.waiting.remove(index)
                held.finished.append(index)
            elif reservation is not None:
                held.markers[index] = reservation

        await together(wanted, look, at_once=CLAIMS_AT_ONCE)

    # -- taking over ---------------------------------------------------------------------------------------------

    async def _inspect(self, candidate: Candidate) -> Held | None:
        """Look at the claim that is in the way; take the segment over if nobody holds it."""
        shared = self._shared
        key = candidate.key
        # Who was refused because of a claim has read it already.
        found, candidate.claim = candidate.claim, None
        try:
            stored = found or await shared.storage.get(key.claim)
        except NotFound:
            self._finder.unblock(key.name)
            return await self._claim_fresh(candidate, None)
        assert isinstance(stored, Stored)
        try:
            claim = claims.decode(key.claim, stored.body)
        except CorruptObject as error:
            return await self._replace_corrupt(key, stored, error)
        crashed = False
        if claim.owner == self._lease.worker_id and self._known(key.name):
            self._finder.unblock(key.name)
            return None
        if claim.owner and claim.owner != self._lease.worker_id:
            claimed = Claimed(claim.beat, stored.modified_s)
            peer = await self._registry.owner(claim.owner, claimed)
            if peer is None:
                crashed = True
            elif not self._registry.is_abandoned(peer, key.name, stored.modified_s):
                self._finder.block(key.name, self._registry.lease_left_s(peer, claimed))
                return None

        try:
            claim = shared.packer.unseal(key.claim, claim)
        except NewerFormat:
            raise
        except CorruptObject as error:
            return await self._replace_corrupt(key, stored, error)

        def take(source: segments.Index) -> Claim:
            return claims.take(
                claim,
                source=source,
                owner=self._lease.worker_id,
                now_ms=shared.time.now_ms(),
                nonce=shared.nonce(),
                crashed=crashed,
                beat=self._lease.cut_short,
            )

        return await self._take(key, stored, take)

    async def _take(self, key: SegmentKey, claim: Stored, take: Callable[[segments.Index], Claim]) -> Held | None:
        """Take a claim over by compare-and-swap, if its segment is still there."""
        reading = _Reading()
        await self._read_into(key.text, reading)
        if reading.error is not None:
            raise reading.error
        if reading.stored is None:
            self._is_gone(key)
            return None
        segment = await self._shared.packer.unpack(key.text, reading.stored.body)
        taken = take(segment.index)
        try:
            version = await self._shared.swap(
                key.claim,
                claims.encode(self._shared.packer.seal(key.claim, taken)),
                when=IfVersion(claim.version),
                deadline_s=self._shared.settings.claim_trust,
            )
        except Superseded:
            self._finder.block(key.name, LOOK_AGAIN_S)
            return None
        log.info("segment taken over", segment=key.name, owner_lost=taken.crashes > 0, token=taken.token)
        return await self._admit(key, taken, version, reading.stored, segment)

    async def _replace_corrupt(self, key: SegmentKey, stored: Stored, error: CorruptObject) -> Held | None:
        """An unreadable claim hides its owner: wait until any owner's lease would be over, then begin anew."""
        settings = self._shared.settings
        wait_s = stored.modified_s + settings.visibility_timeout + settings.lease_margin
        left_s = wait_s + self._shared.time.resolution_s - self._shared.time.certain()
        if left_s > 0:
            self._scanner.report(key.claim, error.reason)
            self._finder.block(key.name, left_s)
            return None
        await self._quarantine(key.claim, stored.body)

        def take(source: segments.Index) -> Claim:
            return claims.after_corruption(
                key.text,
                count=len(source.records),
                owner=self._lease.worker_id,
                now_ms=self._shared.time.now_ms(),
                nonce=self._shared.nonce(),
                beat=self._lease.cut_short,
            )

        return await self._take(key, stored, take)

    async def _set_aside(self, key: SegmentKey, error: CorruptObject) -> None:
        """Move an unreadable segment out of the way: copy it, then delete it; its claim (ours) lingers."""
        try:
            stored = await self._shared.storage.get(key.text)
            assert isinstance(stored, Stored)
            copy = await self._quarantine(key.text, stored.body)
            await self._shared.storage.delete(key.text)
        except NotFound:
            return
        except (StoreUnavailable, Throttled) as failure:
            log.warning("setting an object aside failed", key=key.text, error=str(failure))
            self._finder.block(key.name, LOOK_AGAIN_S)
            return
        self._is_gone(key)
        self._scanner.report(key.text, error.reason, copy)

    async def _quarantine(self, key: str, body: bytes) -> str:
        copy = layout.quarantine_key(key)
        try:
            await self._shared.storage.put(copy, body, when=IfAbsent())
        except PreconditionFailed:
            # An earlier try copied it already.
            return copy
        return copy


class Expected:
    """A segment that is claimed while its writer, in this process, writes it.

    Attributes:
        key: The segment's.
        decided: Set once it is known what became of the write.
        segment: What was written; None when it was not, as far as known.
        shown_at: Local time before the request that proves that it is there.
        certainly_gone: Whether it is certainly not there, and never will be.
    """

    __slots__ = ("certainly_gone", "decided", "key", "segment", "shown_at")

    def __init__(self, key: SegmentKey) -> None:
        self.key = key
        self.decided = Latch()
        self.segment: segments.Segment | None = None
        self.shown_at = 0.0
        self.certainly_gone = False

    def written(self, index: segments.Index, payloads: Sequence[bytes], *, shown_at: float) -> None:
        """Say that it is there."""
        self.segment = segments.Segment(index, list(payloads))
        self.shown_at = shown_at
        self.decided.set()

    def not_written(self, *, certainly: bool) -> None:
        """Say that it is not there, or may not be."""
        self.certainly_gone = certainly
        self.decided.set()


@dataclass(slots=True)
class _Reading:
    stored: Stored | None = None
    error: QueueError | None = None
