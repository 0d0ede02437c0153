"""The worker's lease and everybody else's: heartbeats, fencing, who is alive.

One heartbeat object is the lease of everything that its worker holds. It is written by compare-and-swap alone, so a
worker that was fenced finds out at its next beat; and it trusts the lease by its own monotonic clock for less long
than others wait before they fence it, so it stops before anybody starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import anyio
import msgspec

from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.errors import LeaseLost, StoreUnavailable, Throttled
from s3queue_async.log import log
from s3queue_async.message import WorkerInfo, moment
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Conflict,
    IfAbsent,
    IfVersion,
    NotFound,
    PreconditionFailed,
    Stored,
    Superseded,
)
from s3queue_async.wakeup import Wakeup

LISTED_WORKERS_MAX = 10_000
FENCE_WITHIN_S = 10.0
READS_AT_ONCE = 16
COUNT_WITHIN_S = 3.0
LIVENESS_CACHE_S = 1.0
COUNTERS = "all"
QUIET_FACTOR = 6
"""A worker that holds nothing beats this many times more rarely, under a lease that lasts as many times longer: ten idle
workers then cost $2.20 a month in heartbeats instead of $13."""
NOT_RENEWED = "not renewed in time"
FENCED = "fenced by another worker"


class Counters(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a worker did since its start, in messages.

    Attributes:
        handler_s: Seconds that the handlers of completed messages ran, together.
        latency_s: Seconds from the enqueues of completed messages to their ends, together.
    """

    completed: int = 0
    retried: int = 0
    failed: int = 0
    dead: int = 0
    handler_s: float = 0.0
    latency_s: float = 0.0

    def plus(self, other: Counters) -> Counters:
        return Counters(
            *(a + b for a, b in zip(msgspec.structs.astuple(self), msgspec.structs.astuple(other), strict=True))
        )


class Sums(msgspec.Struct, frozen=True):
    """What all workers that left did; the nonce keeps two writers of equal sums apart."""

    nonce: str
    counters: Counters


class Heartbeat(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker's heartbeat.

    Attributes:
        nonce: Fresh in every beat.
        state: ``fenced`` once somebody decided that the worker is lost; final.
        composed_ms: A store time that was over as the list below was made.
        ttl_s: How long the lease lasts from the object's LastModified.
        claims_ttl_s: How long it lasts, if that is over sooner, from the LastModified of a claim that names this beat; 0
            when none does.
        capacity: Messages that it handles at a time.
        in_flight: Messages that it handles now.
        held: Names of every segment that it holds or tries to claim.
        counters: What it did.
        requests: Requests that its process made of the store, by operation.
        throttled: How many of them the store refused for being too many.
    """

    nonce: str
    state: Literal["alive", "fenced"]
    composed_ms: int
    ttl_s: float
    capacity: int = 0
    in_flight: int = 0
    held: list[str] = []
    counters: Counters = Counters()
    requests: dict[str, int] = {}
    throttled: int = 0
    claims_ttl_s: float = 0.0


class Peer(msgspec.Struct, frozen=True):
    """Another worker's heartbeat as it was read."""

    worker_id: str
    heartbeat: Heartbeat
    version: str
    modified_s: float


class Claimed(NamedTuple):
    """What a claim says of its owner's lease: the nonce of the beat that it cuts short, or "", and its LastModified."""

    beat: str
    modified_s: float


class Vitals(msgspec.Struct, frozen=True):
    """What a beat says of its worker."""

    capacity: int
    in_flight: int
    held: list[str]
    counters: Counters
    requests: dict[str, int] = {}
    throttled: int = 0


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Heartbeat)
_sums_decoder = msgspec.json.Decoder(Sums)


class Registry:
    """Looks at every worker's heartbeat, and fences those whose lease ran out."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._workers = shared.workers
        self._seen: dict[str, tuple[float, Peer | None]] = {}
        self._peers: dict[str, Peer] = {}

    async def read(self, worker_id: str) -> Peer | None:
        """A worker's heartbeat; None when there is none, so that nobody of that name holds anything."""
        try:
            stored = await self._workers.get(worker_id)
        except NotFound:
            return None
        assert isinstance(stored, Stored)
        try:
            heartbeat = _decoder.decode(stored.body)
        except (msgspec.DecodeError, msgspec.ValidationError):
            # A damaged heartbeat proves nothing but its own age; its worker finds out at its next beat.
            log.warning("a heartbeat cannot be read", worker=worker_id)
            heartbeat = Heartbeat("", "alive", 0, self._shared.settings.visibility_timeout)
        return Peer(worker_id, heartbeat, stored.version, stored.modified_s)

    async def list(self) -> dict[str, float]:
        """All registered workers with the LastModified of their heartbeats."""
        found: dict[str, float] = {}
        after = ""
        while len(found) < LISTED_WORKERS_MAX:
            page = await self._workers.list("", after=after, limit=LIST_LIMIT_MAX)
            found.update((entry.key, entry.modified_s) for entry in page.entries)
            if not page.more:
                break
            after = page.entries[-1].key
        return found

    async def peers(self, *, changed_too: bool = True) -> dict[str, Peer]:
        """Every registered worker's heartbeat; only those that are new are read, and, if asked for, those that changed."""
        found: dict[str, Peer] = {}
        unread: list[str] = []
        after = ""
        while True:
            page = await self._workers.list("", after=after, limit=LIST_LIMIT_MAX)
            for entry in page.entries:
                known = self._peers.get(entry.key)
                if known is not None and (known.version == entry.version or not changed_too):
                    found[entry.key] = known
                else:
                    unread.append(entry.key)
            if not page.more or len(found) + len(unread) >= LISTED_WORKERS_MAX:
                break
            after = page.entries[-1].key

        async def read(worker_id: str) -> None:
            peer = await self.read(worker_id)
            if peer is not None:
                found[worker_id] = peer

        await together(unread, read, at_once=READS_AT_ONCE)
        self._peers = found
        return found

    async def owner(self, worker_id: str, claimed: Claimed | None = None) -> Peer | None:
        """As ``read``, but asks the store at most once a second for each worker, and fences one whose lease is over.

        Args:
            worker_id: Whose heartbeat.
            claimed: A claim of this worker.

        Returns None when the worker is gone: it has no heartbeat, or is fenced.
        """
        now = self._shared.clock.monotonic()
        known = self._seen.get(worker_id)
        if known is not None and now - known[0] < LIVENESS_CACHE_S:
            peer = known[1]
        else:
            peer = await self.read(worker_id)
        if peer is not None and await self._is_over(peer, claimed):
            peer = None
        if len(self._seen) > LISTED_WORKERS_MAX:
            self._seen.clear()
        self._seen[worker_id] = (now, peer)
        return peer

    def lease_left_s(self, peer: Peer, claimed: Claimed | None = None) -> float:
        """Seconds until anybody may fence this worker, unless it beats again.

        Args:
            peer: The worker's heartbeat.
            claimed: A claim of this worker, after which it should have beaten again soon.
        """
        beat = peer.heartbeat
        ends_s = peer.modified_s + beat.ttl_s
        if claimed is not None and claimed.beat == beat.nonce and beat.claims_ttl_s:
            ends_s = min(ends_s, claimed.modified_s + beat.claims_ttl_s)
        margin_s = self._shared.time.resolution_s + self._shared.settings.lease_margin
        return ends_s + margin_s - self._shared.time.certain()

    def described(self, peer: Peer) -> WorkerInfo:
        """A worker as its last heartbeat describes it."""
        beat = peer.heartbeat
        return WorkerInfo(
            id=peer.worker_id,
            capacity=beat.capacity,
            in_flight=beat.in_flight,
            segments=len(beat.held),
            completed=beat.counters.completed,
            heartbeat_age=max(0.0, self._shared.time.now_ms() / 1000 - peer.modified_s),
            alive=beat.state == "alive" and self.lease_left_s(peer) > 0,
            retried=beat.counters.retried,
            failed=beat.counters.failed,
            dead=beat.counters.dead,
            handler_seconds=beat.counters.handler_s,
            latency_seconds=beat.counters.latency_s,
            requests=beat.requests,
            throttled=beat.throttled,
            reported_at=moment(beat.composed_ms) if beat.composed_ms else None,
        )

    def is_abandoned(self, peer: Peer, name: str, claim_modified_s: float) -> bool:
        """Whether a living worker's claim is held by nobody: it landed before a beat that does not name it."""
        landed_s = claim_modified_s + self._shared.time.resolution_s + self._shared.settings.lease_margin
        return landed_s < peer.heartbeat.composed_ms / 1000 and name not in peer.heartbeat.held

    async def _is_over(self, peer: Peer, claimed: Claimed | None) -> bool:
        if peer.heartbeat.state == "fenced":
            await self._bury(peer)
            return True
        if self.lease_left_s(peer, claimed) > 0:
            return False
        return await self._fence(peer)

    async def _fence(self, peer: Peer) -> bool:
        """Make sure by compare-and-swap that the worker cannot beat again; False when it just did."""
        fenced = msgspec.structs.replace(peer.heartbeat, nonce=self._shared.nonce(), state="fenced")
        try:
            await self._shared.swap(
                peer.worker_id,
                _encoder.encode(fenced),
                when=IfVersion(peer.version),
                deadline_s=FENCE_WITHIN_S,
                storage=self._workers,
            )
        except Superseded as lost:
            if lost.stored is None:
                return True
            now = await self.read(peer.worker_id)
            return now is None or now.heartbeat.state == "fenced"
        log.info("worker fenced: its lease ran out", worker=peer.worker_id)
        await self.add_counters(peer.heartbeat.counters)
        await self._bury(peer)
        return True

    async def _bury(self, peer: Peer) -> None:
        # Fenced is final and ids are never used again, so no condition is needed.
        await self._workers.delete(peer.worker_id)

    async def add_counters(self, counters: Counters) -> None:
        """Add a leaving worker's counters to the queue's sums."""
        if counters == Counters():
            return

        def change(body: bytes | None) -> bytes:
            before = Counters() if body is None else _decode_counters(body)
            return _encoder.encode(Sums(self._shared.nonce(), before.plus(counters)))

        give_up_at = self._shared.clock.monotonic() + COUNT_WITHIN_S
        try:
            await self._shared.insist(
                lambda: self._shared.totals.update(COUNTERS, change),
                while_true=lambda: self._shared.clock.monotonic() < give_up_at,
            )
        except (StoreUnavailable, Throttled) as error:
            # The sums are for people to read; nobody waits for a store that is out of reach because of them.
            log.warning("a worker's counters are not in the sums", error=str(error))

    async def counters(self) -> Counters:
        """What workers that left did, summed up."""
        try:
            stored = await self._shared.totals.get(COUNTERS)
        except NotFound:
            return Counters()
        assert isinstance(stored, Stored)
        return _decode_counters(stored.body)


def _decode_counters(body: bytes) -> Counters:
    try:
        return _sums_decoder.decode(body).counters
    except (msgspec.DecodeError, msgspec.ValidationError):
        log.warning("the queue's sums cannot be read; counting begins anew")
        return Counters()


class Lease:
    """This worker's own heartbeat, from registration to farewell."""

    def __init__(self, shared: Shared, registry: Registry, worker_id: str, vitals: Callable[[], Vitals]) -> None:
        self._shared = shared
        self._registry = registry
        self.worker_id = worker_id
        self._vitals = vitals
        self._version = ""
        self._nonce = ""
        self._cut_short = ""
        self._trusted_until = -math.inf
        self._last_beat = -math.inf
        self._beating = anyio.Lock()
        self._unanswered: list[bytes] = []
        self._quiet = False
        self._held_last = True
        self._wake = Wakeup()
        self.lost: str | None = None

    @property
    def trusted(self) -> bool:
        """Whether this worker may start handlers and write settlements at this very moment."""
        return self.lost is None and self._shared.clock.monotonic() < self._trusted_until

    def trusted_at(self, now: float) -> bool:
        """As ``trusted``, for those who know the local time already."""
        return self.lost is None and now < self._trusted_until

    @property
    def trust_left_s(self) -> float:
        """Seconds for which the lease is trusted from now on, unless renewed."""
        return max(0.0, self._trusted_until - self._shared.clock.monotonic())

    @property
    def registered(self) -> bool:
        return self._version != "" and self.lost is None

    @property
    def last_beat(self) -> float | None:
        """Local time of the last successful beat."""
        return None if self._last_beat == -math.inf else self._last_beat

    def needed(self) -> None:
        """Something is about to be held: beat often from now on, and trust no longer what was said at rest."""
        if self._quiet:
            self._quiet = False
            self._cut_short = self._nonce
            settings = self._shared.settings
            until = self._shared.clock.monotonic() + settings.visibility_timeout - settings.lease_margin
            self._trusted_until = min(self._trusted_until, until)
            self.hurry()

    @property
    def cut_short(self) -> str:
        """What claims say until the next beat has landed: whose long lease is trusted no longer because of them.

        Whoever finds such a claim waits for no more than a worker at work is given.
        """
        return self._cut_short

    def hurry(self) -> None:
        """Beat at once: what the last beat said is not true any more."""
        self._wake.set()

    def check(self) -> None:
        """Raise LeaseLost unless the lease is trusted."""
        if not self.trusted:
            raise LeaseLost(f"The lease of worker {self.worker_id} is over: {self.lost or NOT_RENEWED}.")

    async def register(self) -> None:
        """Create the heartbeat; nothing may be claimed before."""
        await self._beat(IfAbsent())

    async def run(self) -> None:
        """Beat until the lease is lost; returns then. Cancel it to end it otherwise."""
        settings = self._shared.settings
        clock = self._shared.clock
        next_at = self._last_beat + self._interval_s
        while self.lost is None:
            now = clock.monotonic()
            if now >= self._trusted_until:
                self.lose(NOT_RENEWED)
                return
            if now < next_at:
                with anyio.move_on_after(min(next_at, self._trusted_until) - now):
                    await self._wake.wait()
                    next_at = clock.monotonic()
                continue
            try:
                await self._beat(IfVersion(self._version))
            except Superseded:
                self.lose(FENCED)
                return
            except (StoreUnavailable, Throttled) as error:
                log.warning("heartbeat failed", worker=self.worker_id, error=str(error))
                next_at = clock.monotonic() + min(1.0, settings.heartbeat_interval / 4)
                if not error.retriable:
                    next_at = clock.monotonic() + settings.heartbeat_interval / 2
            else:
                next_at = self._last_beat + self._interval_s

    @property
    def _interval_s(self) -> float:
        return self._shared.settings.heartbeat_interval * (QUIET_FACTOR if self._quiet else 1)

    def lose(self, reason: str) -> None:
        """Trust the lease no more; final."""
        if self.lost is None:
            self.lost = reason

    async def leave(self) -> None:
        """Delete the heartbeat, once nothing is held any more and every handler has ended.

        Raises:
            StoreUnavailable, Throttled: It could not be deleted; it runs out by itself.
        """
        async with self._beating:
            if not self._version:
                return
            await self._shared.insist(
                lambda: self._shared.workers.delete(self.worker_id), while_true=lambda: self.trusted
            )
            self.lose("left")
        await self._registry.add_counters(self._vitals().counters)

    async def give_up(self) -> None:
        """Delete the heartbeat although it was not renewed in time, so that others need not wait for it to run out.

        Only for a worker whose handlers have ended; one try, and only of the heartbeat that this worker wrote last.
        """
        async with self._beating:
            if not self._shared.conditional_delete or not self._version:
                return
            try:
                await self._shared.workers.delete(self.worker_id, when=IfVersion(self._version))
            except (PreconditionFailed, Conflict):
                # Fenced by somebody, who has counted it, too; or about to be.
                return
            await self._registry.add_counters(self._vitals().counters)

    async def _beat(self, when: IfAbsent | IfVersion) -> None:
        async with self._beating:
            shared = self._shared
            settings = shared.settings
            sent_at = shared.clock.monotonic()
            composed_ms = int(shared.time.seen() * 1000)
            vitals = self._vitals()
            # Only when nothing was held at the last beat either: a worker between two jobs is not at rest.
            quiet = self._quiet = not vitals.held and not self._held_last
            self._held_last = bool(vitals.held)
            ttl_s = settings.visibility_timeout * (QUIET_FACTOR if quiet else 1)
            trusted_until = sent_at + ttl_s - settings.lease_margin
            # It may land whether or not its reply comes, and others go by what they read.
            self._trusted_until = min(self._trusted_until, trusted_until) if self._version else self._trusted_until
            nonce = shared.nonce()
            body = _encoder.encode(
                Heartbeat(
                    nonce,
                    "alive",
                    composed_ms,
                    ttl_s,
                    vitals.capacity,
                    vitals.in_flight,
                    vitals.held,
                    vitals.counters,
                    vitals.requests,
                    vitals.throttled,
                    settings.visibility_timeout if quiet else 0.0,
                )
            )
            patience_s = min(FENCE_WITHIN_S, settings.visibility_timeout / 2)
            if isinstance(when, IfVersion):
                patience_s = max(0.0, min(patience_s, self._trusted_until - sent_at))
            self._unanswered.append(body)
            version = None
            with anyio.move_on_after(patience_s):
                try:
                    version = await shared.swap(
                        self.worker_id, body, when=when, deadline_s=patience_s, storage=shared.workers
                    )
                except Superseded as lost:
                    if lost.stored is None or lost.stored.body not in self._unanswered:
                        raise
                    # An own earlier beat, given up unanswered, landed after all: go on from there.
                    self._version = lost.stored.version
            if version is None:
                raise StoreUnavailable("The heartbeat was not confirmed in time.")
            self._version = version
            self._unanswered.clear()
            self._last_beat = sent_at
            self._nonce = nonce
            claimed_meanwhile = quiet and not self._quiet
            self._cut_short = nonce if claimed_meanwhile else ""
            if claimed_meanwhile:
                # This beat says nothing of that. What claims name it cut short ends later than this, all the same.
                short = sent_at + settings.visibility_timeout - settings.lease_margin
                self._trusted_until = max(self._trusted_until, short)
            else:
                self._trusted_until = trusted_until
