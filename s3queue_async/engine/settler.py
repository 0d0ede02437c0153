"""Ends segments: every message is finished, or moved into exactly one new segment.

All writes of a claim after it was taken go through here, one at a time for each segment.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from itertools import islice, takewhile

import anyio
import msgspec

from s3queue_async.engine.dedup import Deduplicator
from s3queue_async.engine.held import Departing, Done, Held
from s3queue_async.engine.registry import Lease
from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.engine.writing import Fate, Pace, put_segment
from s3queue_async.errors import CorruptObject, LeaseLost, QueueError, StoreUnavailable, Throttled, Unreadable
from s3queue_async.log import log
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol.claim import Claim, Departure, Move
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.protocol.segment import Segment
from s3queue_async.storage.base import IfVersion, NotFound, PreconditionFailed, Superseded
from s3queue_async.wakeup import Wakeup

LANES = 16
"""Segments that are settled at a time."""
DELETE_BATCH_MAX = 250
LINGER_BATCH_MAX = 500
MOVES_AT_ONCE = 8
FLUSH_MOVES_AFTER_S = 1.0
"""How long a retry may wait in memory so that others of its segment share its new one."""
DUE_GRAIN_S = 0.1
DUE_GRAIN_PART = 0.1
REST_S = 0.5
DISOWN_WITHIN_S = 3.0
TAKEN = "its claim was taken by another worker"


class _Lingering(msgspec.Struct, frozen=True):
    until: float
    until_s: float
    claim_key: str
    revivable: str = ""
    name: str = ""
    claim: Claim | None = None
    version: str = ""


class HistoryRecord(msgspec.Struct, frozen=True, array_like=True):
    """A completed message as the history keeps it; ``result`` is msgpack."""

    id: str
    result: msgspec.Raw
    attempts: int
    worker_id: str
    enqueued_ms: int
    completed_ms: int
    duration_s: float


_history_encoder = msgspec.msgpack.Encoder()
_result_encoder = msgspec.msgpack.Encoder(enc_hook=repr)


class Settler:
    """Records progress, moves messages, deletes segments, and later their claims.

    Args:
        shared: What all roles have.
        lease: Asked before each write of a settlement.
        on_end: Called once for each segment that is not held any more.
    """

    def __init__(self, shared: Shared, lease: Lease, *, on_end: Callable[[Held], None]) -> None:
        self._shared = shared
        self._lease = lease
        self._on_end = on_end
        self._dedup = Deduplicator(shared)
        self._pace = Pace(LANES)
        self._queue: deque[Held] = deque()
        self._arrived = Wakeup()
        self._linger: deque[_Lingering] = deque()
        self.keep_done = shared.settings.retain_completed is not None
        self.completed = 0

    # -- what the others call ------------------------------------------------------------------------------------

    def submit(self, held: Held) -> None:
        """Have a segment's news recorded soon; calling it again before that changes nothing."""
        if held.queued or held.ended or held.lost is not None:
            return
        if held.busy:
            held.again = True
            return
        held.queued = True
        self._queue.append(held)
        self._arrived.set()

    async def flush(self, held: Held) -> None:
        """Return once the store knows all that happened to a segment. Raises LeaseLost when it is not ours."""
        waiter = anyio.Event()
        held.waiters.append(waiter)
        self.submit(held)
        if held.lost is None and not held.ended:
            await waiter.wait()
        if held.lost is not None:
            raise LeaseLost(f"The lease on {held.name} is lost: {held.lost}.")

    def submit_give_back(self, held: Held) -> None:
        """Give up a claim under which nothing happened; anybody may take the segment at once."""
        held.giving_back = True
        self.submit(held)

    async def record_start(self, held: Held, index: int) -> None:
        """Record in the claim that a message is about to run alone. Raises LeaseLost when the claim is not ours."""
        async with held.lock:
            finished = tuple(held.finished)
            times = held.claim.starts.get(index, 0) + 1

            async def record() -> None:
                # Whoever takes the segment over does nothing more for what the claim says is finished.
                if held.markers:
                    await self._mark(held, finished, ())
                await self._keep_history([held])
                await self._write_claim(
                    held,
                    lambda claim: claims.start(
                        claim, index, times=times, finished=finished, nonce=self._shared.nonce()
                    ),
                )

            await self._shared.insist(record, while_true=lambda: self._lease.trusted)
            held.recorded = len(finished)

    def is_due(self, held: Held, now: float) -> bool:
        """Whether news of a segment have waited long enough to be recorded although it goes on."""
        since_s = now - held.flushed_at
        if held.departing:
            return since_s >= FLUSH_MOVES_AFTER_S
        return len(held.finished) > held.recorded and since_s >= self._shared.settings.checkpoint_interval

    async def run(self) -> None:
        """Settle what is submitted until cancelled."""
        async with anyio.create_task_group() as group:
            for _ in range(LANES):
                group.start_soon(self._lane)

    async def sweep_linger(self, *, all_of_them: bool = False) -> None:
        """Delete claims whose segments have been gone for long enough (or all: when no other worker exists)."""
        while batch := self._gone(all_of_them=all_of_them):
            # A request of its producer that came late may have brought a young segment back: it goes first.
            claim_keys = [item.claim_key for item in batch]
            await self._delete([item.revivable for item in batch if item.revivable] + claim_keys)
            # Not before: until the claims are deleted, who leaves must disown them (found by simulation, seed 4577).
            deleted = set(claim_keys)
            while self._linger and self._linger[0].claim_key in deleted:
                self._linger.popleft()

    def _gone(self, *, all_of_them: bool) -> list[_Lingering]:
        """The next batch whose segments have been gone for long enough; the oldest come first."""
        oldest = islice(self._linger, LINGER_BATCH_MAX)
        return list(oldest if all_of_them else takewhile(self._is_over, oldest))

    def _is_over(self, item: _Lingering) -> bool:
        # By the store's time, too: should the local clock jump ahead, a claim must not go too soon.
        return item.until <= self._shared.clock.monotonic() and item.until_s <= self._shared.time.certain()

    async def disown_ended(self) -> None:
        """Before this worker leaves others behind: have the claims of young ended segments say that all is done.

        Nobody names such a segment any more then, and a late copy of it would be taken for abandoned: its messages
        would be run, and what moved out of it would be written, again.
        """

        async def record(item: _Lingering) -> None:
            assert item.claim is not None
            key = SegmentKey.parse(item.claim.segment)
            claim = claims.move(item.claim, (), settled=True, finished=range(key.count), nonce=self._shared.nonce())
            try:
                body = claims.encode(self._shared.packer.seal(item.claim_key, claim))
                await self._shared.swap(item.claim_key, body, when=IfVersion(item.version), deadline_s=DISOWN_WITHIN_S)
            except Superseded:
                return
            except (StoreUnavailable, Throttled) as error:
                # It only matters should a late copy land, too: no reason to keep anybody from leaving.
                log.warning("a finished claim does not say so", claim=item.claim_key, error=str(error))

        open_ones = [item for item in self._linger if item.claim is not None]
        await together(open_ones, record, at_once=LANES)
        self._linger = deque(msgspec.structs.replace(item, claim=None) for item in self._linger)

    def let_linger(self, key: SegmentKey | str, held: Held | None = None) -> None:
        """Delete a claim later: its segment is gone since this moment or longer.

        Args:
            key: The segment's; or the claim's, when the segment was too old to come back.
            held: What was held of it, when it was run here.
        """
        linger_s = self._shared.settings.claim_linger
        until = self._shared.clock.monotonic() + linger_s
        until_s = self._shared.time.seen() + linger_s + self._shared.time.resolution_s
        if isinstance(key, str):
            self._linger.append(_Lingering(until, until_s, key))
            return
        if not self.may_come_back(key):
            self._linger.append(_Lingering(until, until_s, key.claim))
            return
        claim = None if held is None or held.claim.state == "settled" else held.claim
        version = "" if held is None else held.version
        self._linger.append(_Lingering(until, until_s, key.claim, key.text, key.name, claim, version))

    def may_come_back(self, key: SegmentKey) -> bool:
        """Whether a write that was repeated on its way may still land, and count: until the key is too old."""
        settings = self._shared.settings
        return self._shared.time.seen() - key.created_ms / 1000 < settings.segment_age + settings.lease_margin

    def revivable(self) -> list[str]:
        """Names of ended segments that a late write may bring back: nobody may take them for abandoned."""
        return [item.name for item in self._linger if item.name]

    def young(self) -> list[str]:
        """Whole keys of ended segments that a late write may still bring back."""
        keys = [item.revivable for item in self._linger if item.revivable]
        return [key for key in keys if self.may_come_back(SegmentKey.parse(key))]

    @property
    def lingering(self) -> int:
        return len(self._linger)

    # -- lanes ---------------------------------------------------------------------------------------------------

    async def _lane(self) -> None:
        while True:
            while not self._queue:
                await self._arrived.wait()
            held = self._queue.popleft()
            if held.giving_back:
                await self._try([held], self.give_back(held))
            elif _only_finished(held):
                batch = [held]
                while self._queue and len(batch) < DELETE_BATCH_MAX and _only_finished(self._queue[0]):
                    batch.append(self._queue.popleft())
                await self._try(batch, self._finish(batch))
            else:
                await self._try([held], self._settle(held))

    async def _guarded(self, batch: Sequence[Held], work: Awaitable[None]) -> None:
        """Do the work, and wake those who wait for it to be recorded."""
        waiters: list[list[anyio.Event]] = []
        for held in batch:
            held.queued = False
            held.busy = True
            waiters.append(held.waiters)
            held.waiters = []
        try:
            await work
        except BaseException:
            for held, waiting in zip(batch, waiters, strict=True):
                held.waiters[:0] = waiting
            raise
        finally:
            for held in batch:
                held.busy = False
                if held.again:
                    held.again = False
                    self.submit(held)
        for waiting in waiters:
            for waiter in waiting:
                waiter.set()

    async def _try(self, batch: Sequence[Held], work: Awaitable[None]) -> None:
        """Do the work; what another worker may own is given up, what failed is tried again while it is ours."""
        try:
            await self._guarded(batch, work)
        except Superseded:
            for held in batch:
                self.lose(held, TAKEN)
        except QueueError as error:
            if self._lease.lost is not None:
                for held in batch:
                    self.lose(held, str(error))
                return
            # That it is not trusted now may be due to a clock that jumped: until it is lost, a heartbeat may renew it
            # (found by simulation, seed 15699).
            log.warning("settling failed, trying again", segment=batch[0].name, error=str(error))
            await self._shared.clock.sleep(REST_S)
            for held in batch:
                self.submit(held)

    def lose(self, held: Held, reason: str) -> None:
        """Give a segment up without a word to the store: another worker may own it."""
        held.lose(reason)
        held.end()
        self._on_end(held)

    # -- the two ways to end a segment ---------------------------------------------------------------------------

    async def _finish(self, batch: Sequence[Held]) -> None:
        """Segments of which nothing is to be recorded: delete them, their claims follow after the linger."""
        for held in batch:
            if held.markers:
                await self._mark(held, held.finished, ())
        await self._keep_history(batch)
        self._lease.check()
        await self._shared.insist(
            lambda: self._delete([held.key.text for held in batch]), while_true=lambda: self._lease.trusted
        )
        for held in batch:
            self._ended(held)

    async def _settle(self, held: Held) -> None:
        async with held.lock:
            self._lease.check()
            held.flushed_at = self._shared.clock.monotonic()
            complete = held.complete
            finished = tuple(held.finished)
            departing = tuple(held.departing)
            if held.markers:
                await self._mark(held, finished, departing)
            await self._keep_history([held])
            settling = complete and held.claim.state != "settled"
            async with self._pace:
                if departing or settling or len(finished) > held.recorded:
                    now_ms = self._shared.time.now_ms()
                    await self._write_claim(
                        held,
                        lambda claim: claims.move(
                            claim,
                            self._groups(held, claim, departing, now_ms),
                            settled=complete,
                            finished=finished,
                            nonce=self._shared.nonce(),
                        ),
                    )
                    held.recorded = len(finished)
                    del held.departing[: len(departing)]
                keys = await self._apply_all(held)
            if keys and (not complete or self.may_come_back(held.key)):
                await self._record_applied(held, keys)
            if complete:
                self._lease.check()
                await self._shared.insist(lambda: self._delete([held.key.text]), while_true=lambda: self._lease.trusted)
                self._ended(held)
        if not complete and held.complete:
            self.submit(held)

    async def _record_applied(self, held: Held, keys: set[str]) -> None:
        """Record which moves are written: before a young segment goes, too, which a late copy may bring back.

        Whoever takes such a copy over would write its moves again, after they ran (found by simulation, seed 6812).
        """
        await self._write_claim(held, lambda claim: claims.applied(claim, keys, nonce=self._shared.nonce()))

    async def give_back(self, held: Held) -> None:
        """Give up a claim under which nothing happened; anybody may take the segment at once."""
        shared = self._shared
        async with held.lock:
            fresh = held.claim.token == 1 and held.claim.crashes == 0
            if shared.conditional_delete and fresh:
                await self._delete_own_claim(held)
            else:
                # When it is another worker's by now, an earlier try whose reply was lost gave it back.
                with suppress(Superseded):
                    await self._write_claim(held, lambda claim: claims.release(claim, nonce=shared.nonce()))
        held.end()
        self._on_end(held)

    async def _delete_own_claim(self, held: Held) -> None:
        async def attempt() -> None:
            try:
                await self._shared.storage.delete(held.key.claim, when=IfVersion(held.version))
            except PreconditionFailed:
                # Gone already by an earlier try, or somebody else's by now: not ours either way.
                return

        await self._shared.insist(attempt, while_true=lambda: self._lease.trusted)

    # -- parts ---------------------------------------------------------------------------------------------------

    async def _write_claim(self, held: Held, change: Callable[[Claim], Claim]) -> None:
        """Compare-and-swap the claim. Raises Superseded when it is another worker's."""
        while True:
            self._lease.check()
            claim = change(held.claim)
            try:
                version = await self._shared.swap(
                    held.key.claim,
                    claims.encode(self._shared.packer.seal(held.key.claim, claim)),
                    when=IfVersion(held.version),
                    deadline_s=self._lease.trust_left_s,
                )
            except Superseded as lost:
                if lost.stored is None:
                    raise
                try:
                    found = self._shared.packer.unseal(held.key.claim, claims.decode(held.key.claim, lost.stored.body))
                except (CorruptObject, Unreadable):
                    raise lost from None
                if found.owner != self._lease.worker_id or found.token != held.claim.token:
                    raise
                # An own earlier write, given up unanswered, landed after all: go on from there.
                held.claim, held.version = found, lost.stored.version
            else:
                held.claim, held.version = claim, version
                return

    def _groups(
        self, held: Held, claim: Claim, departing: Iterable[Departing], now_ms: int
    ) -> list[tuple[str, list[Departure]]]:
        """Which messages share a new segment, and its key. Messages that left already are passed over."""
        ended = claim.ended()
        settings = self._shared.settings
        by_group: dict[tuple[Place, object], list[Departing]] = defaultdict(list)
        for leaving in departing:
            if leaving.index not in ended:
                place = Place.READY if leaving.place is Place.DELAYED and leaving.due_ms <= now_ms else leaving.place
                by_group[place, leaving.group].append(leaving)
        groups: list[tuple[str, list[Departure]]] = []
        for (place, _), members in by_group.items():
            if place is Place.DELAYED:
                members.sort(key=lambda leaving: leaving.due_ms)
            part: list[Departing] = []
            size = 0
            for leaving in members:
                length = held.index.records[leaving.index].length
                if part and (
                    len(part) >= settings.segment_messages_max
                    or size + length > settings.segment_bytes_max
                    or (place is Place.DELAYED and not _due_together(part[0], leaving, now_ms))
                ):
                    groups.append(self._group(held, place, part))
                    part, size = [], 0
                part.append(leaving)
                size += length
            groups.append(self._group(held, place, part))
        return groups

    def _group(self, held: Held, place: Place, part: Sequence[Departing]) -> tuple[str, list[Departure]]:
        due_ms = max(leaving.due_ms for leaving in part) if place is Place.DELAYED else 0
        key = SegmentKey(place, self._shared.new_ulid(), len(part), held.index.priority, due_ms)
        return key.text, [Departure(leaving.index, leaving.attempts, leaving.failure) for leaving in part]

    async def _apply_all(self, held: Held) -> set[str]:
        """Write the new segment of every move that is not applied; returns their keys.

        What is still to be written is read off the claim each time: a rename whose reply was lost may have given a
        move another key than the one that was tried last.
        """
        written: set[str] = set()
        late: list[Move] = []

        async def apply(move: Move) -> None:
            if await self._apply(held, move):
                written.add(move.key)
            else:
                late.append(move)

        while pending := [move for move in held.claim.pending_moves() if move.key not in written]:
            await together(pending, apply, at_once=MOVES_AT_ONCE)
            if late:
                await self._pace.too_late()
                renamed = {move.key: self._renamed(move) for move in late}
                await self._write_claim(held, partial(_rekeyed, renamed=renamed, nonce=self._shared.nonce))
                late.clear()
        if written:
            self._pace.in_time()
        return written

    async def _apply(self, held: Held, move: Move) -> bool:
        """Write a move's new segment; False when its key is too old: certainly not written, it needs a new one."""

        def give_up(error: QueueError) -> None:
            if not self._lease.trusted:
                raise error

        self._lease.check()
        segment = Segment(
            claims.moved_index(held.claim, move, held.index), [held.payloads[index] for index in move.indices]
        )
        fate = await put_segment(
            self._shared, SegmentKey.parse(move.key), segment, give_up=give_up, may_run_at_once=False
        )
        return fate is Fate.WRITTEN or await self._is_gone(held.key)

    async def _is_gone(self, key: SegmentKey) -> bool:
        """Whether a segment that is being settled is gone: then all that moved out of it was written.

        Its last owner's DELETE, which comes after all moves, may land late: the moved segments run from then on, and
        may be gone, too, as this settlement looks for them (found by simulation: a message was written twice).
        """
        try:
            await self._shared.storage.get(key.text, span=(0, 1))
        except NotFound:
            return True
        return False

    def _renamed(self, move: Move) -> str:
        old = SegmentKey.parse(move.key)
        return SegmentKey(old.place, self._shared.new_ulid(), old.count, old.priority, old.due_ms).text

    async def _mark(self, held: Held, finished: Iterable[int], departing: Iterable[Departing]) -> None:
        """Tell the deduplication markers before the segment goes."""
        states = dict.fromkeys(finished, "finished")
        # A dead letter counts as done: its id may be used again once the window is over.
        states.update((leaving.index, "written") for leaving in departing)
        for index, state in states.items():
            reservation = held.markers.get(index)
            if reservation is None or reservation.marker.state in (state, "finished"):
                continue
            advanced = await self._dedup.advance(
                reservation, held.index.records[index].id, "finished" if state == "finished" else "written"
            )
            if advanced is None:
                del held.markers[index]
            else:
                held.markers[index] = advanced

    async def _keep_history(self, batch: Sequence[Held]) -> None:
        if self._shared.settings.retain_completed is None:
            return
        now_ms = self._shared.time.now_ms()
        records = [self._history_record(held, done, now_ms) for held in batch for done in held.done[held.kept :]]
        if not records:
            return
        key = layout.history_key(now_ms, f"{self._lease.worker_id}-{self._shared.nonce()}")
        body = self._shared.packer.pack_history(key, _history_encoder.encode(records))
        await self._shared.insist(
            lambda: self._shared.storage.put(key, body),
            while_true=lambda: self._lease.trusted,
        )
        for held in batch:
            held.kept = len(held.done)

    def _history_record(self, held: Held, done: Done, now_ms: int) -> HistoryRecord:
        record = held.index.records[done.index]
        return HistoryRecord(
            record.id,
            msgspec.Raw(_result_encoder.encode(done.result)),
            done.attempt,
            self._lease.worker_id,
            record.enqueued_ms,
            now_ms,
            done.duration_s,
        )

    async def _delete(self, keys: Sequence[str]) -> None:
        if len(keys) == 1:
            await self._shared.storage.delete(keys[0])
        else:
            await self._shared.storage.delete_many(keys)

    def _ended(self, held: Held) -> None:
        held.end()
        self.let_linger(held.key, held)
        self._on_end(held)


def _only_finished(held: Held) -> bool:
    if held.giving_back or held.departing or held.claim.pending_moves():
        return False
    return held.complete and held.claim.state == "open"


def _due_together(first: Departing, other: Departing, now_ms: int) -> bool:
    grain_ms = max(DUE_GRAIN_S * 1000, DUE_GRAIN_PART * (first.due_ms - now_ms))
    return other.due_ms - first.due_ms <= grain_ms


def _rekeyed(claim: Claim, *, renamed: dict[str, str], nonce: Callable[[], str]) -> Claim:
    for old, new in renamed.items():
        claim = claims.rekey(claim, old, new, nonce=nonce())
    return claim
