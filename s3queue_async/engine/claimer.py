"""Finds segments and claims them: directly from listings, taking over what nobody holds any more."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import anyio
from anyio.abc import TaskGroup

from s3queue_async.engine.dedup import Deduplicator
from s3queue_async.engine.held import Held
from s3queue_async.engine.registry import Lease, Registry
from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.errors import CorruptObject, NewerFormat, QueueError, StoreUnavailable, Throttled
from s3queue_async.events import ObjectSetAside, SegmentVoided
from s3queue_async.log import log
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.backoff import Polling
from s3queue_async.protocol.claim import Claim
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.protocol.ranking import falls_to
from s3queue_async.storage.base import (
    Entry,
    IfAbsent,
    IfVersion,
    NotFound,
    PreconditionFailed,
    Stored,
    Superseded,
)
from s3queue_async.wakeup import Wakeup

CLAIMS_AT_ONCE = 32
LIST_LIMIT_MIN = 32
LIST_LIMIT_MAX = 1000
PAGES_MAX = 10
BLOCKED_MAX = 20_000
QUEUED_BYTES_MAX = 64 * 1024 * 1024
"""Payload bytes that may wait in memory before the next segment is claimed."""
CANDIDATES_STALE_S = 1.0
"""How long a listing is gone by before the store is asked again whether something more urgent came."""
OTHERS_AFTER_S = 0.5
"""How long a segment is left to the worker that ranking gives it to."""
DELAYED_EVERY_S = 1.0
"""How often delayed segments are listed while none is known to become due."""
LOOK_AGAIN_S = 1.0
REFUSED_AGAIN_S = 60.0
BUSY_POLL_CAP_S = 1.0
"""The longest wait between looks while others hold segments of several messages, which they may hand back."""
FETCH_ESTIMATE_S = 0.05


@dataclass(slots=True)
class Candidate:
    """A segment that was seen and may be claimed; ``written_at``: local time before this process wrote it, if it did."""

    key: SegmentKey
    written_at: float | None = None
    taken: bool = False


@dataclass(slots=True)
class Blocked:
    """A segment that is somebody else's as far as known, and when to look again."""

    look_at: float


class Claimer:
    """Claims segments as long as there is demand for messages.

    Args:
        shared: What all roles have.
        registry: Who is alive.
        lease: Under which the claims are made.
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
        self._demand = demand
        self._queued_bytes = queued_bytes
        self._deliver = deliver
        self._known = known
        self._let_linger = let_linger
        self._release = release
        self._dedup = Deduplicator(shared)
        settings = shared.settings
        self._polling = Polling(min_s=settings.poll_interval, max_s=settings.max_poll_interval)
        self._next_poll = 0.0
        self._next_delayed = 0.0
        self._next_peers = 0.0
        self._due_ms: int | None = None
        self._peers: list[str] = []
        self._candidates: list[Candidate] = []
        self._looked_at = 0.0
        self._started = 0
        self._blocked: dict[str, Blocked] = {}
        self._limit = LIST_LIMIT_MIN
        self._more = False
        self._poked = Wakeup()
        self._group: TaskGroup | None = None
        self._quiet = Wakeup()
        self._stopped = False
        self._reported: set[str] = set()
        self.claiming: dict[str, int] = {}
        self.last_progress = shared.clock.monotonic()
        self.polled = 0
        self.fetch_s = FETCH_ESTIMATE_S

    # -- what the others call ------------------------------------------------------------------------------------

    def poke(self) -> None:
        """Demand may have changed."""
        self._poked.set()

    def notice(self) -> None:
        """There is something new: look at once."""
        self._polling.found()
        self._next_poll = min(self._next_poll, self._shared.clock.monotonic())
        self.poke()

    def offer(self, key: SegmentKey, index: segments.Index, payloads: Sequence[bytes], *, shown_at: float) -> bool:
        """Claim a segment that this process has just written, if there is demand; False when it is left for a look."""
        if self._known(key.name) or key.name in self.claiming:
            # A listing was faster than the reply to its writer.
            return False
        wanted = self._demand() > 0 and not self._candidates and not self._stopped and self._lease.trusted
        if self._group is None or not wanted or len(self.claiming) >= CLAIMS_AT_ONCE:
            self.notice()
            return False
        self._start(self._group, Candidate(key, shown_at), (index, list(payloads)))
        return True

    def notice_due(self, due_ms: int) -> None:
        """A delayed segment becomes due then."""
        if self._due_ms is None or due_ms < self._due_ms:
            self._due_ms = due_ms
            self.poke()

    async def stop(self) -> None:
        """Claim no more; returns when no claim is under way."""
        self._stopped = True
        self.poke()
        while self.claiming:
            await self._quiet.wait()

    async def poll_once(self) -> None:
        """One look, and every claim that comes of it; for callers that do not wait for messages."""
        before = self.polled
        while self.polled == before and not self._stopped and self._demand() > 0:
            self.notice()
            await self._quiet.wait()
        while self.claiming:
            await self._quiet.wait()

    @property
    def claiming_messages(self) -> int:
        return sum(self.claiming.values())

    async def run(self) -> None:
        """Claim until cancelled."""
        clock = self._shared.clock
        async with anyio.create_task_group() as self._group:
            while True:
                self.last_progress = clock.monotonic()
                if self._stopped or not self._wants():
                    await self._wait(1.0)
                    continue
                if self._start_next(self._group):
                    continue
                now = clock.monotonic()
                due_in_s = self._due_in_s()
                if now < self._next_poll and due_in_s > 0:
                    await self._wait(min(self._next_poll - now, due_in_s))
                    continue
                try:
                    await self._poll()
                except (StoreUnavailable, Throttled) as error:
                    log.warning("looking for messages failed", error=str(error))
                    self._polling.empty()
                    wait_s = self._polling.delay_s(self._shared.random.random())
                    if isinstance(error, Throttled) and error.retry_after_s is not None:
                        wait_s = max(wait_s, error.retry_after_s)
                    self._next_poll = clock.monotonic() + wait_s
                    self._due_ms = None
                self.polled += 1
                self._quiet.set()

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

    def _due_in_s(self) -> float:
        return float("inf") if self._due_ms is None else self._due_ms / 1000 - self._shared.time.earliest()

    async def _poll(self) -> None:
        """List what may be claimable, best first."""
        shared = self._shared
        now = shared.clock.monotonic()
        self._prune(now)
        if now >= self._next_peers:
            await self._list_peers(now)
        found: list[Candidate] = []
        others_busy = False
        for listed in (self._list_ready, self._list_delayed):
            candidates, busy = await listed()
            found += candidates
            others_busy = others_busy or busy
        self._candidates = self._ranked(found)
        self._candidates.reverse()
        self._looked_at = shared.clock.monotonic()
        if found:
            self._polling.found()
        else:
            self._polling.empty(cap_s=BUSY_POLL_CAP_S if others_busy else None)
        self._next_poll = shared.clock.monotonic() + self._polling.delay_s(shared.random.random())
        if found and self._more:
            self._next_poll = 0.0

    async def _list_peers(self, now: float) -> None:
        own = self._lease.worker_id
        self._peers = sorted(worker for worker in await self._registry.list() if worker != own)
        self._next_peers = now + self._shared.settings.heartbeat_interval

    async def _list_ready(self) -> tuple[list[Candidate], bool]:
        after = ""
        found: list[Candidate] = []
        busy = False
        # No more than will be claimed before the next look: a long listing is slow, and stale before its end is reached.
        self._limit = max(LIST_LIMIT_MIN, min(LIST_LIMIT_MAX, 2 * self._started))
        self._started = 0
        for _ in range(PAGES_MAX):
            page = await self._shared.storage.list(layout.READY, after=after, limit=self._limit)
            usable, held_by_others = await self._usable(page.entries)
            found += usable
            busy = busy or held_by_others
            self._more = page.more
            if found or not page.more:
                break
            after = page.entries[-1].key
        return found, busy

    async def _list_delayed(self) -> tuple[list[Candidate], bool]:
        now = self._shared.clock.monotonic()
        if now < self._next_delayed and self._due_in_s() > 0:
            return [], False
        bound = layout.due_bound(int(self._shared.time.earliest() * 1000))
        page = await self._shared.storage.list(layout.DELAYED, limit=self._limit)
        due = [entry for entry in page.entries if entry.key < bound]
        self._due_ms = None
        for entry in page.entries[len(due) :]:
            try:
                self._due_ms = SegmentKey.parse(entry.key).due_ms
            except ValueError:
                continue
            break
        found, busy = await self._usable(due)
        self._next_delayed = 0.0 if found and page.more else now + DELAYED_EVERY_S
        return found, busy

    async def _usable(self, entries: Sequence[Entry]) -> tuple[list[Candidate], bool]:
        """Which of the listed segments may be claimed; and whether others hold segments of several messages."""
        now = self._shared.clock.monotonic()
        found: list[Candidate] = []
        busy = False
        for entry in entries:
            try:
                key = SegmentKey.parse(entry.key)
            except ValueError:
                self._report(entry.key, "its name is no segment's")
                continue
            if self._known(key.name) or key.name in self.claiming:
                continue
            if segments.is_void(key.created_ms, entry.modified_s, self._shared.settings.segment_age):
                await self._clear_left_void(key, entry.modified_s)
                continue
            blocked = self._blocked.get(key.name)
            if blocked is not None and blocked.look_at > now:
                busy = busy or key.count > 1
                continue
            found.append(Candidate(key))
        if found and self._peers:
            found, taken = await self._without_claimed(found, now)
            busy = busy or taken
        return found, busy

    async def _clear_left_void(self, key: SegmentKey, modified_s: float) -> None:
        """Delete a void segment that its writer left behind.

        At first it is left alone: its writer deletes it in a moment, and several who do would, on a store that allows
        one write a second to one key, be refused until they slow down all that they write (found by simulation).
        """
        if self._shared.time.earliest() - modified_s > self._shared.settings.segment_age:
            await self._clear_void(key)

    async def _clear_void(self, key: SegmentKey) -> None:
        self._shared.bus.emit(SegmentVoided(key=key.text))
        await self._shared.storage.delete(key.text)

    async def _without_claimed(self, found: list[Candidate], now: float) -> tuple[list[Candidate], bool]:
        """Leave out what others hold by the listing of claims: a listing costs less than the tries that would fail."""
        first = min(candidate.key.ulid for candidate in found)
        last = max(candidate.key.name for candidate in found)
        claimed: dict[str, float] = {}
        after = layout.CLAIMS + first
        for _ in range(PAGES_MAX):
            page = await self._shared.storage.list(layout.CLAIMS, after=after)
            claimed.update((layout.claim_name(entry.key), entry.modified_s) for entry in page.entries)
            if not page.more or layout.claim_name(page.entries[-1].key) > last:
                break
            after = page.entries[-1].key
        free: list[Candidate] = []
        busy = False
        for candidate in found:
            name = candidate.key.name
            if name in claimed and name not in self._blocked:
                # Nobody asks for a claim's owner before its lease can be over: half a timeout after it was written.
                age_s = self._shared.time.earliest() - claimed[name]
                self._block(name, self._shared.settings.visibility_timeout / 2 - age_s)
                if self._blocked[name].look_at > now:
                    busy = busy or candidate.key.count > 1
                    continue
            free.append(candidate)
        return free, busy

    def _ranked(self, found: list[Candidate]) -> list[Candidate]:
        """Highest priority and then oldest first; of these, what falls to this worker before what falls to others."""
        if not self._peers:
            return sorted(found, key=lambda candidate: (-candidate.key.priority, candidate.key.ulid))
        now_s = self._shared.time.now_ms() / 1000
        ranked: list[tuple[int, bool, str, Candidate]] = []
        for candidate in found:
            key = candidate.key
            mine = falls_to(self._lease.worker_id, key.name, self._peers)
            if mine or key.place is Place.DELAYED or now_s - key.created_ms / 1000 > OTHERS_AFTER_S:
                ranked.append((-key.priority, not mine, key.ulid, candidate))
        ranked.sort(key=lambda item: item[:3])
        return [item[3] for item in ranked]

    def _prune(self, now: float) -> None:
        if len(self._blocked) > BLOCKED_MAX:
            self._blocked = {name: block for name, block in self._blocked.items() if block.look_at > now}
        if len(self._blocked) > BLOCKED_MAX:
            self._blocked.clear()

    def _block(self, name: str, for_s: float) -> None:
        self._blocked[name] = Blocked(self._shared.clock.monotonic() + max(0.0, for_s))

    def _report(self, key: str, reason: str, quarantined: str | None = None) -> None:
        if key in self._reported:
            return
        if len(self._reported) > BLOCKED_MAX:
            self._reported.clear()
        self._reported.add(key)
        log.error("an object of the queue cannot be used", key=key, reason=reason, quarantined=quarantined)
        self._shared.bus.emit(ObjectSetAside(key=key, reason=reason, quarantined=quarantined))

    # -- claiming ------------------------------------------------------------------------------------------------

    def _start_next(self, group: TaskGroup) -> bool:
        """Start the best claim; False when no candidate is left."""
        now = self._shared.clock.monotonic()
        while self._candidates:
            candidate = self._candidates.pop()
            name = candidate.key.name
            blocked = self._blocked.get(name)
            if self._known(name) or name in self.claiming or (blocked is not None and blocked.look_at > now):
                continue
            if now - self._looked_at > CANDIDATES_STALE_S:
                continue
            self._started += 1
            self._start(group, candidate, None)
            return True
        return False

    def _start(
        self, group: TaskGroup, candidate: Candidate, offered: tuple[segments.Index, list[bytes]] | None
    ) -> None:
        self.claiming[candidate.key.name] = candidate.key.count
        group.start_soon(self._attempt, candidate, offered)

    async def claim_one(self, key: SegmentKey) -> Held | None:
        """Claim this segment, or take it over; None when it is gone or somebody else's.

        Until the caller holds what is returned, the heartbeat does not name it: take it without an await between.
        """
        if self._known(key.name) or key.name in self.claiming:
            return None
        self.claiming[key.name] = 0
        try:
            return await self._obtain(Candidate(key), None)
        except CorruptObject as error:
            await self._set_aside(key, error)
            return None
        finally:
            del self.claiming[key.name]
            self._quiet.set()

    async def _obtain(self, candidate: Candidate, offered: tuple[segments.Index, list[bytes]] | None) -> Held | None:
        name = candidate.key.name
        held = None
        # Only a claim in the way is worth a look; a segment that was refused waits until its time.
        in_the_way = name in self._blocked
        if not in_the_way:
            started = self._shared.clock.monotonic()
            held = await self._claim_fresh(candidate, offered)
            if held is not None:
                self.fetch_s += 0.2 * (self._shared.clock.monotonic() - started - self.fetch_s)
            in_the_way = candidate.taken
        if held is None and in_the_way:
            held = await self._inspect(candidate.key)
        if held is not None:
            self._blocked.pop(name, None)
        return held

    async def _attempt(self, candidate: Candidate, offered: tuple[segments.Index, list[bytes]] | None) -> None:
        key = candidate.key
        try:
            held = await self._obtain(candidate, offered)
            # A lease that ran out meanwhile makes it nobody's; its next holder finds it.
            if held is not None and self._lease.trusted:
                self._deliver(held)
        except CorruptObject as error:
            await self._set_aside(key, error)
        except QueueError as error:
            # Among them a claim that another worker took while it was being given back.
            log.warning("claiming failed", segment=key.name, error=str(error))
            self._block(key.name, LOOK_AGAIN_S)
        finally:
            del self.claiming[key.name]
            self._quiet.set()
            self.poke()

    async def _claim_fresh(
        self, candidate: Candidate, offered: tuple[segments.Index, list[bytes]] | None
    ) -> Held | None:
        """Create the claim; the segment is read beside it. None, and blocked, when it is somebody's already."""
        shared = self._shared
        key = candidate.key
        claim = claims.fresh(key.text, owner=self._lease.worker_id, now_ms=shared.time.now_ms(), nonce=shared.nonce())
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
            except Superseded:
                taken = True
                group.cancel_scope.cancel()
            except QueueError as error:
                reading.error = error
                group.cancel_scope.cancel()
        if taken:
            candidate.taken = True
            self._block(key.name, 0.0)
            self._next_peers = 0.0
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

    async def _admit(self, key: SegmentKey, claim: Claim, version: str, stored: Stored | None) -> Held | None:
        """Decide whether a claimed segment may be run; otherwise get rid of the claim."""
        if stored is None:
            self._let_linger(key)
            return None
        if segments.is_void(key.created_ms, stored.modified_s, self._shared.settings.segment_age):
            await self._clear_void(key)
            self._let_linger(key)
            return None
        try:
            segment = segments.decode(key.text, stored.body)
            if len(segment.payloads) != key.count:
                raise CorruptObject(key.text, f"holds {len(segment.payloads)} messages, its name says {key.count}")
        except NewerFormat as error:
            self._report(key.text, error.reason)
            await self._release(Held(key, claim, version, segments.Index([], key.priority), [], claimed_at=0.0))
            self._block(key.name, REFUSED_AGAIN_S)
            return None
        held = self._held(key, claim, version, segment)
        if segment.index.parent is not None and not await self._parent_allows(segment.index.parent, key.text):
            await self._release(held)
            self._block(key.name, LOOK_AGAIN_S)
            return None
        await self._drop_duplicates(held)
        return held

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

    async def _inspect(self, key: SegmentKey) -> Held | None:
        """Look at the claim that is in the way; take the segment over if nobody holds it."""
        shared = self._shared
        try:
            stored = await shared.storage.get(key.claim)
        except NotFound:
            self._blocked.pop(key.name, None)
            self.notice()
            return None
        assert isinstance(stored, Stored)
        try:
            claim = claims.decode(key.claim, stored.body)
        except CorruptObject as error:
            return await self._replace_corrupt(key, stored, error)
        crashed = False
        if claim.owner == self._lease.worker_id and self._known(key.name):
            self._blocked.pop(key.name, None)
            return None
        if claim.owner and claim.owner != self._lease.worker_id:
            peer = await self._registry.owner(claim.owner)
            if peer is None:
                crashed = True
            elif not self._registry.is_abandoned(peer, key.name, stored.modified_s):
                self._block(key.name, self._registry.lease_left_s(peer))
                return None

        def take(source: segments.Index) -> Claim:
            return claims.take(
                claim,
                source=source,
                owner=self._lease.worker_id,
                now_ms=shared.time.now_ms(),
                nonce=shared.nonce(),
                crashed=crashed,
            )

        return await self._take(key, stored, take)

    async def _take(self, key: SegmentKey, claim: Stored, take: Callable[[segments.Index], Claim]) -> Held | None:
        """Take a claim over by compare-and-swap, if its segment is still there."""
        reading = _Reading()
        await self._read_into(key.text, reading)
        if reading.error is not None:
            raise reading.error
        if reading.stored is None:
            self._let_linger(key)
            return None
        segment = segments.decode(key.text, reading.stored.body)
        taken = take(segment.index)
        try:
            version = await self._shared.swap(
                key.claim,
                claims.encode(taken),
                when=IfVersion(claim.version),
                deadline_s=self._shared.settings.claim_trust,
            )
        except Superseded:
            self._block(key.name, LOOK_AGAIN_S)
            return None
        log.info("segment taken over", segment=key.name, owner_lost=taken.crashes > 0, token=taken.token)
        return await self._admit(key, taken, version, reading.stored)

    async def _replace_corrupt(self, key: SegmentKey, stored: Stored, error: CorruptObject) -> Held | None:
        """An unreadable claim hides its owner: wait until any owner's lease would be over, then begin anew."""
        settings = self._shared.settings
        wait_s = stored.modified_s + settings.visibility_timeout + settings.lease_margin
        left_s = wait_s + self._shared.time.resolution_s - self._shared.time.certain()
        if left_s > 0:
            self._report(key.claim, error.reason)
            self._block(key.name, left_s)
            return None
        await self._quarantine(key.claim, stored.body)

        def take(source: segments.Index) -> Claim:
            return claims.after_corruption(
                key.text,
                count=len(source.records),
                owner=self._lease.worker_id,
                now_ms=self._shared.time.now_ms(),
                nonce=self._shared.nonce(),
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
            self._block(key.name, LOOK_AGAIN_S)
            return
        self._let_linger(key)
        self._report(key.text, error.reason, copy)

    async def _quarantine(self, key: str, body: bytes) -> str:
        copy = layout.quarantine_key(key)
        try:
            await self._shared.storage.put(copy, body, when=IfAbsent())
        except PreconditionFailed:
            # An earlier try copied it already.
            return copy
        return copy


@dataclass(slots=True)
class _Reading:
    stored: Stored | None = None
    error: QueueError | None = None
