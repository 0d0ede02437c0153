"""What the coordinator does with its term: listings become tickets, dead workers are fenced, what they held is given on.

It never owns a message. All that it knows about who holds what is a guess from its tickets, the listing of claims and
the workers' heartbeats; a wrong guess costs a try that fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container
from contextlib import suppress
from typing import NamedTuple

import anyio

from s3queue_async.engine.election import Election
from s3queue_async.engine.registry import Peer, Registry
from s3queue_async.engine.scanner import DELAYED_EVERY_S, PAGES_MAX, Scanner
from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.errors import QueueError, Throttled
from s3queue_async.log import log
from s3queue_async.protocol import layout
from s3queue_async.protocol.backoff import Polling
from s3queue_async.protocol.board import Ticket, assign
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.storage.base import LIST_LIMIT_MAX
from s3queue_async.wakeup import Wakeup

BUSY_CYCLE_CAP_S = 1.0
"""The longest cycle while segments of several messages are held, which their holders may share out."""
AT_REST_S = 2.0
"""From this interval between two cycles on, claims are listed only once there is a segment."""
NOTHING_LISTED = "~"
"""Follows every name of a segment."""
FRESH_FOR_S = 10.0
"""How far back claims are listed beside the segments, before it is known how old those are."""
LOOKS_A_SECOND = 50.0
"""How often all workers together look at the board under load, unless their fewest looks are more."""
LOOKS_FREE = 5
"""So many workers look as often as they like."""
POLL_MAX_S = 2.0
HEARTBEATS_LOOK = 1.5
"""Heartbeats are read once in so many of their intervals, by a coordinator that has work to give."""
HEARTBEATS_LOOK_AT_REST = 3.0
"""The same while there is none. Workers that hold nothing do not beat more often than once a minute, either."""
HEARTBEATS_LOOK_MIN_S = 0.5
JOINERS_EVERY_S = 1.0
"""How often workers are listed while there is work: who has just registered is to get some."""
JOINING_S = 10.0
"""For so long after a new worker was seen they are listed as often without work: others are often started with it."""
DIRECT_CLAIMS_S = 2.0
"""For so long after its election whatever ends without a ticket was probably claimed before it."""
RATE_FADES_S = 1.0
"""How long ago something was done that counts a third of what is done now, roughly."""
RATE_FORGOTTEN_S = 3.0
"""Whoever did nothing for so long begins anew."""
RATE_SEEN_MIN_S = 0.05
"""What was done in less time says no more of a second than if it had taken so long."""
TAKEN_AHEAD_MAX = 4
"""A worker gets tickets ahead for what it took in the last second, at most so many times what it handles at a time."""
FINISHED_AHEAD_LOOKS = 2.0
FINISHED_AHEAD_S = 3.0
"""One that finishes more than that in a second gets tickets for what it finishes in so many looks, or so long: more than
it needs, so that it gets up to speed in a few looks."""
AHEAD_MAX = 16384
"""Messages of tickets that a worker gets ahead, at most."""
LISTED_MIN = 64
"""Segments that are listed at least, beside those that are held."""
LISTED_FOR_ROOM = 1.25
"""As many segments are listed as would fill the workers' room so many times, by their size so far."""
DEAD_HELD_MAX = 20_000
PUBLISH_SLOWER = 2.0
PUBLISH_FASTER = 0.9
PUBLISH_EVERY_MAX_S = 5.0


class _Rate(NamedTuple):
    """How much was done lately, as of when, and when the worker began."""

    done: float
    at: float
    since: float

    def left(self, now: float) -> float:
        return self.done * math.exp((self.at - now) / RATE_FADES_S)


class Rates:
    """How much of something each worker did lately; what was longer ago counts less."""

    def __init__(self) -> None:
        self._of: dict[str, _Rate] = {}

    def add(self, worker: str, count: int, now: float, since: float = -math.inf) -> None:
        """Count what a worker did.

        Args:
            worker: Who did it.
            count: How much.
            now: Local time.
            since: When it began with that at the earliest; what somebody did who began just now is a part of a second's.
        """
        before = self._of.get(worker)
        if before is None or now - before.at > RATE_FORGOTTEN_S:
            self._of[worker] = _Rate(count, now, since)
        else:
            self._of[worker] = _Rate(before.left(now) + count, now, min(before.since, since))

    def lately(self, worker: str, now: float) -> float:
        """How much it did in the last second or so."""
        rate = self._of.get(worker)
        return 0.0 if rate is None else rate.left(now)

    def a_second(self, worker: str, now: float) -> float:
        """How much it would do in a second, by what it did in the part of it since it began."""
        rate = self._of.get(worker)
        if rate is None:
            return 0.0
        seen_s = max(RATE_SEEN_MIN_S, now - rate.since)
        return rate.left(now) / (1 - math.exp(-seen_s / RATE_FADES_S))

    def keep(self, workers: Container[str]) -> None:
        """Forget all other workers."""
        self._of = {worker: rate for worker, rate in self._of.items() if worker in workers}

    def clear(self) -> None:
        self._of.clear()


class _Holding(NamedTuple):
    """Who probably holds a segment ("" when that is not known), and since when as far as this coordinator saw."""

    worker: str
    since: float


class Coordinator:
    """Leads as long as its election lets it.

    Args:
        shared: What all roles have.
        registry: Who is alive.
        scanner: Lists what is there.
        election: The board.
        worker_id: Of the worker in this process.
        capacity: How many messages that worker handles at a time, now.
        is_at_work: Whether it holds anything.
        on_tickets: Takes the tickets for the worker in this process, from memory.
        ended: Whether a segment is a late copy, which nobody runs.
    """

    def __init__(
        self,
        shared: Shared,
        registry: Registry,
        scanner: Scanner,
        election: Election,
        worker_id: str,
        *,
        capacity: Callable[[], int],
        is_at_work: Callable[[], bool],
        on_tickets: Callable[[list[Ticket]], None],
        ended: Callable[[str], bool],
    ) -> None:
        self._shared = shared
        self._registry = registry
        self._scanner = scanner
        self._election = election
        self._worker_id = worker_id
        self._capacity = capacity
        self._is_at_work = is_at_work
        self._on_tickets = on_tickets
        self._ended = ended
        settings = shared.settings
        self._pace = Polling(
            min_s=settings.dispatch_interval, max_s=max(settings.dispatch_interval, settings.max_poll_interval)
        )
        self._tickets: dict[str, Ticket] = {}
        self._published: tuple[tuple[Ticket, ...], tuple[str, ...], float, bool] | None = None
        self._publish_at = -math.inf
        self._publish_every_s = 0.0
        self._woken = Wakeup()
        self._workers: dict[str, Peer] = {}
        self._known: set[str] = set()
        self._next_workers = -math.inf
        self._lease_ends = math.inf
        self._next_joiners = -math.inf
        self._joined_at = -math.inf
        self._next_delayed = -math.inf
        self._due_ms: int | None = None
        self._first_seen = ""
        self._listed: dict[str, SegmentKey] = {}
        self._listed_to = ""
        self._room = 0
        self._holders: dict[str, _Holding] = {}
        self._listing_at = self._listed_at = self._began_at = -math.inf
        self._taken = Rates()
        self._finished = Rates()
        self._orphans: dict[str, float] = {}
        self._dead_held: set[str] = set()
        self.stalled = 0
        self.available = 0
        self.busy = False

    @property
    def active_workers(self) -> int:
        """Registered workers, this one included."""
        return len({*self._workers, self._worker_id})

    async def run(self) -> None:
        """Lead whenever elected, until cancelled."""
        while True:
            if not self._election.leading:
                await self._election.elected()
                self._begin()
            try:
                changed = await self.cycle()
            except QueueError as error:
                log.warning("a cycle of the coordinator failed", error=str(error))
                changed = False
                if isinstance(error, Throttled):
                    self._pace.empty()
            if changed:
                self._pace.found()
            else:
                self._pace.empty(cap_s=BUSY_CYCLE_CAP_S if self.busy else None)
            with anyio.move_on_after(self._wait_s()):
                await self._woken.wait()

    def notice_work(self) -> None:
        """The worker here has something to do: if it was idle and alone so far, somebody may have joined."""
        if self._election.leading and self.active_workers == 1 and not self.busy:
            self._woken.set()

    def _begin(self) -> None:
        board = self._election.board
        self._tickets = {}
        for ticket in board.tickets if board else []:
            with suppress(ValueError):
                # What somebody else wrote there is of no use; the listings say what is there.
                self._tickets[SegmentKey.parse(ticket.key).name] = ticket
        # Who is on the last coordinator's board has not just joined.
        self._known = set(board.workers) if board else set()
        self._published = None
        self._began_at = self._listed_at = self._shared.clock.monotonic()
        self._next_workers = self._next_delayed = -math.inf
        self._lease_ends = math.inf
        self._holders.clear()
        self._listed.clear()
        self._taken.clear()
        self._finished.clear()
        self._orphans.clear()
        self._dead_held.clear()
        self._pace.found()
        if board is not None and not board.tickets and not board.busy:
            # A new term over a queue at rest is no reason for many looks.
            self._pace.interval_s = max(self._pace.interval_s, AT_REST_S)

    def _wait_s(self) -> float:
        wait_s = self._pace.delay_s(self._shared.random.random())
        if self._due_ms is not None:
            wait_s = min(wait_s, self._due_ms / 1000 - self._shared.time.earliest())
        lease_left_s = self._lease_ends - self._shared.clock.monotonic()
        if lease_left_s > 0:
            wait_s = min(wait_s, lease_left_s)
        # Tickets need not be there sooner than they are seen.
        return max(self._shared.settings.dispatch_interval / 2, self._poll_s / 4, wait_s)

    @property
    def _poll_s(self) -> float:
        return min(POLL_MAX_S, max(0.0, (self.active_workers - LOOKS_FREE) / LOOKS_A_SECOND))

    @property
    def _at_rest(self) -> bool:
        return not self._first_seen and self._pace.interval_s >= AT_REST_S

    # -- a cycle -------------------------------------------------------------------------------------------------

    async def cycle(self) -> bool:
        """List, assign, publish; whether there was anything to give away, or given away before."""
        shared = self._shared
        now = shared.clock.monotonic()
        if self._election.led_for_s > shared.settings.term_duration and self.active_workers > 1:
            await self._election.hand_over()
            return False
        if now >= self._next_workers:
            await self._look_at_workers(changed_too=True)
            # Whoever does not renew its lease is looked at again as soon as that is over.
            lefts = (self._registry.lease_left_s(peer) for peer in self._workers.values())
            looked_at = shared.clock.monotonic()
            self._lease_ends = looked_at + max(HEARTBEATS_LOOK_MIN_S, min(lefts, default=math.inf))
            intervals = HEARTBEATS_LOOK_AT_REST if self._at_rest and not self.busy else HEARTBEATS_LOOK
            self._next_workers = min(self._lease_ends, looked_at + intervals * shared.settings.heartbeat_interval)
        elif now >= self._next_joiners and (
            self._tickets or self.busy or self.active_workers == 1 or now - self._joined_at < JOINING_S
        ):
            await self._look_at_workers(changed_too=False)
        if self.active_workers == 1:
            return await self._lead_alone()
        segments, claims = await self._list(now)
        claimable = self._account(segments, claims)
        rooms, ahead = self._rooms(segments)
        self._room = sum(rooms.values())
        assignment = assign(
            claimable,
            rooms,
            self._tickets,
            orphans=frozenset(self._orphans),
            now_ms=shared.time.now_ms(),
            ttl_ms=int(1000 * shared.settings.ticket_ttl),
            limit=shared.settings.ticket_batch,
            ahead=ahead,
        )
        self.stalled += len(assignment.stalled)
        had = bool(self._tickets)
        self._tickets = {SegmentKey.parse(ticket.key).name: ticket for ticket in assignment.tickets}
        self.available = len(claimable)
        self._on_tickets(assignment.tickets)
        await self._publish(assignment.tickets, busy=self.busy)
        return bool(claimable) or had

    async def _lead_alone(self) -> bool:
        """The only worker looks for itself: its claim loop knows best what it needs, and when."""
        self._tickets.clear()
        self._listed.clear()
        self._listed_at = self._shared.clock.monotonic()
        self._holders.clear()
        self._first_seen = ""
        self.available = 0
        self.busy = self._is_at_work()
        self._on_tickets([])
        # That it is busy concerns nobody else, and would have the board written twice for each message.
        await self._publish([], busy=False)
        return False

    async def _publish(self, tickets: list[Ticket], *, busy: bool) -> None:
        """Write the board if it says anything new, as often as the store allows one key to be written."""
        election = self._election
        workers = {worker: peer.heartbeat.capacity for worker, peer in self._workers.items()}
        workers[self._worker_id] = self._capacity()
        poll_s = self._poll_s
        content = tuple(tickets), tuple(sorted(workers)), poll_s, busy
        now = self._shared.clock.monotonic()
        if not election.renewal_is_due and (content == self._published or now < self._publish_at):
            return
        began = now
        try:
            written = await election.publish(tickets, workers, poll_s=poll_s, busy=busy)
        finally:
            took_s = self._shared.clock.monotonic() - began
            if election.refused:
                self._publish_every_s = min(PUBLISH_EVERY_MAX_S, max(1.0, PUBLISH_SLOWER * self._publish_every_s))
            else:
                self._publish_every_s *= PUBLISH_FASTER
            self._publish_at = began + max(took_s, self._publish_every_s)
        if written:
            self._published = content

    async def _list(self, now: float) -> tuple[list[SegmentKey], dict[str, float]]:
        """What is ready or due, most urgent first, and the claims of that age."""
        self._listing_at = now
        floor = self._first_seen or layout.ulid(max(0, self._shared.time.now_ms() - int(1000 * FRESH_FOR_S)), 0)
        claims: dict[str, float] = {}
        segments: list[SegmentKey] = []

        async def list_claims() -> None:
            claims.update(await self._scanner.claims(floor))

        async def list_ready() -> None:
            segments.extend(await self._list_ready())

        async def list_due() -> None:
            segments.extend(await self._list_due())

        due_now = self._due_ms is not None and self._due_ms / 1000 <= self._shared.time.earliest()
        listings = [list_ready]
        at_rest = self._at_rest
        if at_rest:
            # There is probably nothing to claim.
            floor = NOTHING_LISTED
        else:
            listings.append(list_claims)
        if now >= self._next_delayed or due_now:
            listings.append(list_due)
        await together(listings, lambda listing: listing(), at_once=len(listings))
        first = min((key.ulid for key in segments), default="")
        if first and first < floor:
            claims.update(await self._scanner.claims(first, None if at_rest else floor))
        self._first_seen = first
        segments.sort(key=lambda key: (-key.priority, key.ulid))
        return segments, claims

    async def _list_ready(self) -> list[SegmentKey]:
        # No more than can be given away: a page of a thousand keys is the dearest request that there is.
        messages = sum(key.count for key in self._listed.values())
        segment = messages / len(self._listed) if self._listed else 1.0
        free = max(LISTED_MIN, math.ceil(LISTED_FOR_ROOM * self._room / segment))
        wanted = min(self._shared.settings.ticket_batch, free) + len(self._holders)
        keys: list[SegmentKey] = []
        after = ""
        for _ in range(PAGES_MAX):
            page = await self._scanner.ready(after=after, limit=min(LIST_LIMIT_MAX, wanted - len(keys)))
            keys += page.keys
            after = page.last if page.more else ""
            if not page.more or len(keys) >= wanted:
                break
        self._listed_to = after
        return keys

    async def _list_due(self) -> list[SegmentKey]:
        page = await self._scanner.due(limit=LIST_LIMIT_MAX)
        self._due_ms = page.next_due_ms
        # What is due stays on the list until it is claimed and gone.
        self._next_delayed = -math.inf if page.keys else self._shared.clock.monotonic() + DELAYED_EVERY_S
        return page.keys

    def _account(self, segments: list[SegmentKey], claims: dict[str, float]) -> list[SegmentKey]:
        """Tell what is claimable from what is held, and remember who took what."""
        now = self._shared.clock.monotonic()
        self._note_finished(segments, now)
        claimable: list[SegmentKey] = []
        orphans: dict[str, float] = {}
        holders: dict[str, _Holding] = {}
        self.busy = False
        for key in segments:
            name = key.name
            if self._ended(name):
                continue
            landed_s = claims.get(name)
            if landed_s is None:
                claimable.append(key)
            elif self._orphans.get(name) == landed_s or self._is_orphan(name, landed_s):
                orphans[name] = landed_s
                claimable.append(key)
            else:
                self.busy = self.busy or key.count > 1
                holding = holders[name] = self._holding(name)
                if holding.worker and name not in self._holders:
                    self._taken.add(holding.worker, key.count, now)
        self._orphans, self._holders = orphans, holders
        self._listed_at = self._listing_at
        return claimable

    def _holding(self, name: str) -> _Holding:
        """Who probably holds a segment, or held it."""
        before = self._holders.get(name, _Holding("", self._listed_at))
        ticket = self._tickets.get(name)
        if before.worker or ticket is None:
            return before
        return _Holding(ticket.worker, before.since)

    def _note_finished(self, segments: list[SegmentKey], now: float) -> None:
        """Learn how fast workers are from the segments that were listed before and are gone.

        What was claimed before the first tickets is taken to be everybody's in equal shares. Later only those claim without
        a ticket who wrote a segment themselves, and need none.
        """
        before, self._listed = self._listed, {key.name: key for key in segments}
        unknown, unknown_since = 0, now
        for name, key in before.items():
            beyond = key.place is Place.READY and self._listed_to and key.text > self._listed_to
            if name in self._listed or beyond:
                continue
            worker, since = self._holding(name)
            if worker:
                self._finished.add(worker, key.count, now, since)
            elif since <= self._began_at + DIRECT_CLAIMS_S:
                unknown += key.count
                unknown_since = min(unknown_since, since)
        share = unknown // self.active_workers
        if share:
            for worker in {*self._workers, self._worker_id}:
                self._finished.add(worker, share, now, unknown_since)

    def _is_orphan(self, name: str, landed_s: float) -> bool:
        """Whether a claim is probably nobody's: its holder died, or no heartbeat that was written later names it."""
        if name in self._dead_held:
            self._dead_held.discard(name)
            return True
        settings = self._shared.settings
        margin_s = settings.lease_margin + self._shared.time.resolution_s
        if self._shared.time.earliest() - landed_s < settings.heartbeat_interval + margin_s:
            return False
        if any(name in peer.heartbeat.held for peer in self._workers.values()):
            return False
        old = self._shared.time.earliest() - landed_s > settings.visibility_timeout + margin_s
        own = name in self._holders and self._holders[name].worker == self._worker_id
        return (old and not own) or all(
            landed_s + margin_s < peer.heartbeat.composed_ms / 1000 for peer in self._workers.values()
        )

    def _rooms(self, segments: list[SegmentKey]) -> tuple[dict[str, int], dict[str, int]]:
        """For how many messages each worker should have tickets: what it can start, and a little ahead of its pace.

        Returns:
            Both together by worker; and what is ahead of the pace of those that are fast, which is to be shared evenly.
        """
        now = self._shared.clock.monotonic()
        in_hand: dict[str, int] = {}
        for key in segments:
            holding = self._holders.get(key.name)
            if holding is not None and holding.worker:
                in_hand[holding.worker] = in_hand.get(holding.worker, 0) + key.count
        looks_s = max(FINISHED_AHEAD_S, FINISHED_AHEAD_LOOKS * (self._pace.interval_s + self._poll_s))
        rooms: dict[str, int] = {}
        ahead: dict[str, int] = {}
        for worker in {*self._workers, self._worker_id}:
            capacity = self._capacity() if worker == self._worker_id else self._workers[worker].heartbeat.capacity
            room = max(0, capacity - in_hand.get(worker, 0))
            if self._finished.lately(worker, now) > TAKEN_AHEAD_MAX * capacity:
                ahead[worker] = math.ceil(min(AHEAD_MAX, self._finished.a_second(worker, now) * looks_s))
                rooms[worker] = room + ahead[worker]
            else:
                # Counts as room like any other: a few messages are cheapest with whoever is awake and ends many together.
                taken = min(TAKEN_AHEAD_MAX * capacity, self._taken.lately(worker, now))
                rooms[worker] = room + round(taken)
        return rooms, ahead

    # -- workers -------------------------------------------------------------------------------------------------

    async def _look_at_workers(self, *, changed_too: bool) -> None:
        """Read the heartbeats that are new, or changed; fence whose lease is over, and give on what they held."""
        peers = await self._registry.peers(changed_too=changed_too)
        self._next_joiners = self._shared.clock.monotonic() + JOINERS_EVERY_S
        alive: dict[str, Peer] = {}
        for worker, peer in peers.items():
            if worker == self._worker_id:
                alive[worker] = peer
                continue
            if self._registry.lease_left_s(peer) <= 0 or peer.heartbeat.state == "fenced":
                current = await self._registry.owner(worker)
                if current is None:
                    self._dead_held.update(peer.heartbeat.held)
                    continue
                peer = current
            alive[worker] = peer
        gone = {name for worker, peer in self._workers.items() if worker not in alive for name in peer.heartbeat.held}
        if len(self._dead_held) > DEAD_HELD_MAX:
            # Segments that were gone already; an orphan that is forgotten is found by its age.
            self._dead_held.clear()
        self._dead_held.update(gone)
        if not alive.keys() <= self._known:
            self._joined_at = self._shared.clock.monotonic()
        self._workers = alive
        self._known = set(alive)
        self._taken.keep(alive)
        self._finished.keep(alive)
        held_by = {name: worker for worker, peer in alive.items() for name in peer.heartbeat.held}
        for name, holding in self._holders.items():
            if name in held_by:
                self._holders[name] = _Holding(held_by[name], holding.since)
