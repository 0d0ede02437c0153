"""Finds segments that may be claimed: by the coordinator's tickets, or directly from listings.

A live board spares most workers the listings. Nobody relies on it: a worker with nothing to do that sees no ticket for
a while lists for itself, rarely, although the board looks live.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from s3queue_async.engine.election import Election
from s3queue_async.engine.registry import Lease, Registry
from s3queue_async.engine.scanner import DELAYED_EVERY_S, PAGES_MAX, Scanner
from s3queue_async.engine.shared import Shared
from s3queue_async.errors import StoreUnavailable, Throttled
from s3queue_async.log import log
from s3queue_async.protocol.backoff import Polling
from s3queue_async.protocol.board import Ticket
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.protocol.ranking import falls_to, weight
from s3queue_async.storage.base import LIST_LIMIT_MAX, Stored

LIST_LIMIT_MIN = 32
BLOCKED_MAX = 20_000
GONE_LINGERS = 3
"""For so many times as long as claims linger a segment that was gone is not tried again."""
OTHERS_AFTER_S = 0.5
"""How long a segment is left to the worker that ranking gives it to."""
OWN_MIN = 8
PAGE_LONGER = 4
"""With fewer segments than that for this worker on a page of a long backlog, one that is so many times longer is listed."""
HELPED_AT_ONCE = 32
"""So many segments that ranking gives to others are tried before the next look."""
OTHER_ORDER_S = 10.0
"""How often a worker tries them in another order."""
PASSED_OVER_S = 5.0
PASSED_OVER_MAX = 8
"""What its worker has left unclaimed for so long, others try before their own: so many at a look."""
TICKETS_OF_OTHERS_AFTER_S = 2.0
"""How long a ticket is left to its worker, or two of its looks at the board if that is longer."""
BUSY_POLL_CAP_S = 1.0
"""The longest wait between looks while others hold segments of several messages, which they may hand back."""
NEGLECTED_AFTER_S = 1.5
"""A segment that nobody claimed for so long, or for three looks at the board if that is longer, is neglected."""
COORDINATED_S = 30.0
"""How often the coordinator's own worker looks though there are no tickets at all."""
MISSED_BOARD_AFTER_S = 0.5
"""How often a worker that knows of others, but of no board, looks whether there is one by now."""
HUNGRY_AFTER_S = 1.0
"""A worker with nothing to do that sees no ticket for so long lists for itself."""
HUNGRY_LOOKS_A_SECOND = 10.0
"""How often all workers together list for themselves, at most."""
HUNGRY_MAX_S = 300.0
"""Each such look that finds nothing doubles the time until the next, up to this: nine idle workers then cost $1.05 a
month in listings of their own."""


@dataclass(slots=True)
class Candidate:
    """A segment that may be claimed.

    Attributes:
        key: The segment's key.
        written_at: Local time before this process wrote it, if it did.
        taken: Whether the try to claim it found somebody else's claim.
        claim: That claim, until somebody looks at it.
        ticketed: Whether the coordinator named it.
    """

    key: SegmentKey
    written_at: float | None = None
    taken: bool = False
    claim: Stored | None = None
    ticketed: bool = False


_Ranked = tuple[int, int, int, str, Candidate]


class Finder:
    """Knows where to look next, and when.

    Args:
        shared: What all roles have.
        registry: Who is alive.
        lease: Under which the claims are made.
        scanner: Lists what is there.
        election: Sees the coordinator's board.
        known: Names of segments that this worker holds, has just ended, or is claiming.
        idle: Whether places for handlers stand empty.
        alone: Whether no other worker is known to the coordinator in this process.
    """

    def __init__(
        self,
        shared: Shared,
        registry: Registry,
        lease: Lease,
        scanner: Scanner,
        election: Election,
        *,
        known: Callable[[str], bool],
        idle: Callable[[], bool],
        alone: Callable[[], bool],
    ) -> None:
        self._shared = shared
        self._registry = registry
        self._lease = lease
        self._scanner = scanner
        self._election = election
        self._known = known
        self._idle = idle
        self._alone = alone
        settings = shared.settings
        self._polling = Polling(min_s=settings.poll_interval, max_s=settings.max_poll_interval)
        self._next_look = 0.0
        self._next_delayed = 0.0
        self._next_peers = 0.0
        self._due_ms: int | None = None
        self._peers: list[str] = []
        self._blocked: dict[str, float] = {}
        self._gone: dict[str, float] = {}
        self._limit = LIST_LIMIT_MIN
        self._more = False
        self._started = 0
        self._directly = False
        self._uncoordinated = False
        self._left: dict[str, float] = {}
        self._hungry_s = HUNGRY_AFTER_S
        self._hungry_at = 0.0
        self._looked_hungrily_at = -math.inf
        self._free_at = math.inf
        self._tickets: list[Ticket] = []
        self._has_tickets = False
        self.listed = 0

    # -- what the claim loop says --------------------------------------------------------------------------------

    def notice(self) -> None:
        """There is something new: look at once."""
        self._polling.found()
        self._next_look = min(self._next_look, self._shared.clock.monotonic())

    def look_directly(self) -> None:
        """List at the next look, whatever the board shows, and look at once."""
        self._directly = True
        self.notice()

    def notice_due(self, due_ms: int) -> bool:
        """A delayed segment becomes due then; whether that is earlier than what was known."""
        if self._due_ms is not None and due_ms >= self._due_ms:
            return False
        self._due_ms = due_ms
        return True

    def notice_tickets(self, tickets: list[Ticket]) -> bool:
        """The coordinator in this process has new tickets; whether there are some for this worker."""
        self._tickets = tickets
        self._has_tickets = any(ticket.worker == self._lease.worker_id for ticket in tickets)
        if self._has_tickets:
            self.notice()
        return self._has_tickets

    def failed(self, error: StoreUnavailable | Throttled) -> None:
        """The last look failed: wait longer before the next."""
        log.warning("looking for messages failed", error=str(error))
        self._polling.empty()
        wait_s = self._polling.delay_s(self._shared.random.random())
        if isinstance(error, Throttled) and error.retry_after_s is not None:
            wait_s = max(wait_s, error.retry_after_s)
        self._next_look = self._shared.clock.monotonic() + wait_s
        self._due_ms = None
        self.listed += 1

    def started(self) -> None:
        """A claim is being tried."""
        self._started += 1

    def lost(self, name: str) -> None:
        """Somebody else has a segment: there may be workers that are not known yet."""
        self.block(name, 0.0)
        self._next_peers = 0.0

    # -- what is somebody else's ---------------------------------------------------------------------------------

    def block(self, name: str, for_s: float) -> None:
        """Leave a segment alone for a while; a claim is known to be in its way."""
        free_at = self._blocked[name] = self._shared.clock.monotonic() + max(0.0, for_s)
        if for_s > 0:
            self._may_be_free(free_at)

    def unblock(self, name: str) -> None:
        """There is no claim in the way any more."""
        self._blocked.pop(name, None)

    def in_the_way(self, name: str) -> bool:
        """Whether a claim was seen on a segment."""
        return name in self._blocked

    def is_free(self, name: str, now: float) -> bool:
        """Whether a segment may be tried, as far as known."""
        return self._blocked.get(name, now) <= now and not self._known(name) and self._gone.get(name, now) <= now

    def forget(self, name: str) -> None:
        """A segment is gone: whoever names it for a while yet is behind the times."""
        self._gone[name] = self._shared.clock.monotonic() + GONE_LINGERS * self._shared.settings.claim_linger

    def _prune(self, now: float) -> None:
        if len(self._gone) > BLOCKED_MAX:
            self._gone = dict(list(self._gone.items())[BLOCKED_MAX // 2 :])
        if len(self._blocked) > BLOCKED_MAX:
            self._blocked = {name: look_at for name, look_at in self._blocked.items() if look_at > now}
        if len(self._blocked) > BLOCKED_MAX:
            self._blocked.clear()

    # -- when ----------------------------------------------------------------------------------------------------

    @property
    def interval_s(self) -> float:
        """Seconds between two looks, now."""
        board = self._election.board
        least_s = board.poll_s if board is not None and self._election.live else 0.0
        return max(least_s, self._polling.interval_s)

    @property
    def ticket_wait_s(self) -> float:
        """Seconds that a ticket waits on the board until it is seen, on average; 0 without a board."""
        board = self._election.board
        if board is None or not self._election.live or self._election.leading:
            return 0.0
        return self.interval_s / 2

    def wait_s(self, now: float) -> float:
        """Seconds until the next look."""
        wait_s = self._next_look - now
        if not self._is_coordinated:
            wait_s = min(wait_s, self._due_in_s())
        elif self._election.leading and not self._directly and not self._has_tickets:
            # The coordinator in this process tells when there is something for it; the others' tickets can wait.
            wait_s = max(wait_s, BUSY_POLL_CAP_S if self._tickets else COORDINATED_S)
        return max(0.0, wait_s)

    @property
    def _is_coordinated(self) -> bool:
        """Whether tickets are to be expected. A coordinator whose worker is the only one leaves the looking to it."""
        return self._election.live and not (self._election.leading and self._alone())

    @property
    def overtaken(self) -> bool:
        """Whether a coordinator has begun to give away what was found for want of one."""
        return self._uncoordinated and self._is_coordinated

    @property
    def _may_have_missed_board(self) -> bool:
        """Whether there are others, who may have elected a coordinator since this worker looked."""
        return bool(self._peers) and self._election.unseen_for_s >= MISSED_BOARD_AFTER_S

    def _due_in_s(self) -> float:
        return float("inf") if self._due_ms is None else self._due_ms / 1000 - self._shared.time.earliest()

    # -- looking -------------------------------------------------------------------------------------------------

    async def find(self) -> list[Candidate]:
        """Look, and return what may be claimed, best first.

        Raises:
            StoreUnavailable, Throttled: The look failed.
        """
        now = self._shared.clock.monotonic()
        self._prune(now)
        election = self._election
        if not election.leading and (election.board is not None or self._may_have_missed_board):
            await election.look()
        directly, self._directly = self._directly, False
        uncoordinated, self._uncoordinated = self._uncoordinated, not directly and not self._is_coordinated
        if uncoordinated and self._is_coordinated:
            # The first tickets are under way.
            self._hungry_at = max(self._hungry_at, now + self._patience_s)
        if directly or self._uncoordinated:
            if election.live:
                self._peers = self._others()
            return await self._scan(now, leave_to_others=not directly)
        found = self._by_tickets()
        if found or election.leading or not self._idle() or self._shared.clock.monotonic() < self._hungry_at:
            self._plan(found=bool(found), busy=election.board is not None and election.board.busy)
            return found
        self._peers = self._others()
        found = await self._scan(now, wanted=self._is_neglected)
        self._hungry_s = self._patience_s if found else min(HUNGRY_MAX_S, 2 * max(self._hungry_s, self._patience_s))
        looked_at, now = now, self._shared.clock.monotonic()
        wait_s = max(self._patience_s, self._hungry_s * (1 - 0.5 * self._shared.random.random()))
        self._looked_hungrily_at, self._hungry_at = now, now + wait_s
        self._free_at = math.inf
        self._may_be_free(min((at for at in self._blocked.values() if at > looked_at), default=math.inf))
        return found

    def _plan(self, *, found: bool, busy: bool) -> None:
        shared = self._shared
        now = shared.clock.monotonic()
        board = self._election.board
        least_s = 0.0 if board is None else board.poll_s
        if found:
            self._polling.found()
            self._hungry_s = self._patience_s
            self._hungry_at = now + self._hungry_s
        else:
            self._polling.empty(cap_s=BUSY_POLL_CAP_S if busy else None)
        chance = shared.random.random()
        self._next_look = now + max(least_s * (1 - 0.25 * chance), self._polling.delay_s(chance))
        if now < self._free_at:
            # A look that comes a little too early would leave it to the next.
            self._next_look = min(self._next_look, self._free_at)

    def _may_be_free(self, at: float) -> None:
        """What is somebody else's now may be nobody's by then: list again at that time."""
        at = max(at, self._looked_hungrily_at + self._patience_s / 2)
        if at < self._free_at and self._is_coordinated:
            self._free_at = at
            self._hungry_at = min(self._hungry_at, at)
            self._next_look = min(self._next_look, at)

    @property
    def _patience_s(self) -> float:
        """How long a worker with nothing to do waits for a ticket before it lists for itself."""
        board = self._election.board
        if board is None:
            return HUNGRY_AFTER_S
        return max(HUNGRY_AFTER_S, 3 * board.poll_s, len(board.workers) / HUNGRY_LOOKS_A_SECOND)

    # -- by tickets ----------------------------------------------------------------------------------------------

    def _by_tickets(self) -> list[Candidate]:
        """One's own tickets, behind more urgent ones that others leave unused; without any, all that others leave.

        An urgent segment must not wait for a busy worker while another takes less urgent ones (found by simulation).
        """
        now = self._shared.clock.monotonic()
        board = self._election.board
        assert board is not None
        # The coordinator's own worker need not wait for the publication.
        tickets = self._tickets if self._election.leading else board.tickets
        own = self._lease.worker_id
        found = self._candidates((ticket for ticket in tickets if ticket.worker == own), now)
        if not self._idle():
            return found
        others = self._candidates((ticket for ticket in tickets if self._is_left(ticket)), now)
        if found:
            others = [candidate for candidate in others if candidate.key.priority > found[0].key.priority]
        return others + found

    def _is_left(self, ticket: Ticket) -> bool:
        """Whether another worker has had time enough for its ticket, and this one is to use it."""
        board, own = self._election.board, self._lease.worker_id
        assert board is not None
        if ticket.worker == own:
            return False
        if ticket.stalled:
            return True
        after_ms = 1000 * max(TICKETS_OF_OTHERS_AFTER_S, 2 * board.poll_s)
        waited_ms = self._shared.time.now_ms() - ticket.issued_ms
        rivals = (worker for worker in board.workers if worker not in (own, ticket.worker))
        return waited_ms > after_ms and (waited_ms > 2 * after_ms or falls_to(own, ticket.key, rivals))

    def _candidates(self, tickets: Iterable[Ticket], now: float) -> list[Candidate]:
        found = []
        for ticket in tickets:
            try:
                key = SegmentKey.parse(ticket.key)
            except ValueError:
                self._scanner.report(ticket.key, "a ticket names it, but its name is no segment's")
                continue
            if not self.is_free(key.name, now) or not self._is_claimable(key):
                continue
            if ticket.orphan:
                self.block(key.name, 0.0)
            found.append(Candidate(key, ticketed=True))
        return found

    def _is_claimable(self, key: SegmentKey) -> bool:
        """Whether its key allows it: a ticket may be wrong, and makes nothing due."""
        if key.place is Place.DELAYED:
            return key.due_ms / 1000 <= self._shared.time.certain()
        return key.place is Place.READY

    def _others(self) -> list[str]:
        board = self._election.board
        if board is None or not board.workers:
            # A new coordinator has not looked around yet.
            return self._peers
        return [worker for worker in board.workers if worker != self._lease.worker_id]

    def _is_neglected(self, candidate: Candidate) -> bool:
        """Whether the coordinator, or the worker that it chose, had time enough for a segment."""
        board = self._election.board
        if board is None:
            return True
        key = candidate.key
        after_ms = self._shared.time.now_ms() - 1000 * max(NEGLECTED_AFTER_S, 3 * board.poll_s)
        issued_ms = (ticket.issued_ms for ticket in board.tickets if ticket.key == key.text)
        return max(key.created_ms, key.due_ms, *issued_ms) < after_ms

    # -- by listings ---------------------------------------------------------------------------------------------

    async def _scan(
        self, now: float, *, leave_to_others: bool = True, wanted: Callable[[Candidate], bool] | None = None
    ) -> list[Candidate]:
        """List what may be claimable and is wanted, best first; without what is left to others, unless told so."""
        shared = self._shared
        if now >= self._next_peers and not self._election.live:
            await self._list_peers(now)
        found: list[Candidate] = []
        others_busy = False
        for listed in (self._list_ready, self._list_delayed):
            candidates, busy = await listed()
            found += candidates if wanted is None else filter(wanted, candidates)
            others_busy = others_busy or busy
        ranked = self._ranked(found, leave_to_others=leave_to_others)
        self.listed += 1
        if found:
            self._polling.found()
        else:
            self._polling.empty(cap_s=BUSY_POLL_CAP_S if others_busy else None)
        self._next_look = shared.clock.monotonic() + self._polling.delay_s(shared.random.random())
        if ranked and self._more:
            self._next_look = 0.0
        return ranked

    async def _list_peers(self, now: float) -> None:
        own = self._lease.worker_id
        self._peers = sorted(worker for worker in await self._registry.list() if worker != own)
        self._next_peers = now + self._shared.settings.heartbeat_interval

    async def _list_ready(self) -> tuple[list[Candidate], bool]:
        # No more than will be claimed before the next look, here and by others: a long listing is slow, and stale before
        # its end is reached.
        self._limit = min(LIST_LIMIT_MAX, max(LIST_LIMIT_MIN, 2 * self._started) * (1 + len(self._peers)))
        self._started = 0
        found, busy = await self._list_first()
        too_few = bool(self._peers) and sum(map(self._is_own, found)) < OWN_MIN
        if too_few and self._more and self._limit < LIST_LIMIT_MAX:
            # What is one's own may follow; trying for what is others' costs more than to look for it.
            self._limit = min(LIST_LIMIT_MAX, PAGE_LONGER * self._limit)
            found, busy = await self._list_first()
        return found, busy

    async def _list_first(self) -> tuple[list[Candidate], bool]:
        """The first page with anything that may be claimed."""
        after = ""
        found: list[Candidate] = []
        busy = False
        for _ in range(PAGES_MAX):
            page = await self._scanner.ready(after=after, limit=self._limit)
            usable, held_by_others = await self._usable(page.keys)
            found += usable
            busy = busy or held_by_others
            self._more = page.more
            if found or not page.more:
                break
            after = page.last
        return found, busy

    def _is_own(self, candidate: Candidate) -> bool:
        """Whether ranking gives a segment to this worker."""
        return falls_to(self._lease.worker_id, candidate.key.name, self._peers)

    async def _list_delayed(self) -> tuple[list[Candidate], bool]:
        now = self._shared.clock.monotonic()
        if now < self._next_delayed and self._due_in_s() > 0:
            return [], False
        # What is written here meanwhile may not be on the page.
        self._due_ms = None
        page = await self._scanner.due(limit=self._limit)
        if page.next_due_ms is not None:
            self.notice_due(page.next_due_ms)
        found, busy = await self._usable(page.keys)
        self._next_delayed = 0.0 if found and page.more else now + DELAYED_EVERY_S
        return found, busy

    async def _usable(self, keys: list[SegmentKey]) -> tuple[list[Candidate], bool]:
        """Which of the listed segments may be claimed; and whether others hold segments of several messages."""
        now = self._shared.clock.monotonic()
        found: list[Candidate] = []
        busy = False
        for key in keys:
            if self._known(key.name) or self._gone.get(key.name, now) > now:
                continue
            if self._blocked.get(key.name, now) > now:
                busy = busy or key.count > 1
                continue
            found.append(Candidate(key))
        if found and self._peers:
            found, taken = await self._without_claimed(found, now)
            busy = busy or taken
        return found, busy

    async def _without_claimed(self, found: list[Candidate], now: float) -> tuple[list[Candidate], bool]:
        """Leave out what others hold by the listing of claims: a listing costs less than the tries that would fail."""
        first = min(candidate.key.ulid for candidate in found)
        last = max(candidate.key.name for candidate in found)
        claimed = await self._scanner.claims(first, last)
        free: list[Candidate] = []
        busy = False
        for candidate in found:
            name = candidate.key.name
            if name in claimed and name not in self._blocked:
                # Nobody asks for a claim's owner before its lease can be over: half a timeout after it was written.
                age_s = self._shared.time.earliest() - claimed[name]
                self.block(name, self._shared.settings.visibility_timeout / 2 - age_s)
                if self._blocked[name] > now:
                    busy = busy or candidate.key.count > 1
                    continue
            free.append(candidate)
        return free, busy

    def _ranked(self, found: list[Candidate], *, leave_to_others: bool) -> list[Candidate]:
        """Highest priority first; of these, what falls to this worker, oldest first, before what falls to others.

        Unless told otherwise that is left to them: for a moment, and in a backlog that is longer than the listing as long
        as there is some of one's own. What they pass over comes first, a little of it at a time.
        """
        if not self._peers:
            return sorted(found, key=lambda candidate: (-candidate.key.priority, candidate.key.ulid))
        now = self._shared.clock.monotonic()
        now_s = self._shared.time.now_ms() / 1000
        own: list[_Ranked] = []
        others: list[_Ranked] = []
        left: dict[str, float] = {}
        for candidate in found:
            key = candidate.key
            if self._is_own(candidate):
                own.append((-key.priority, 1, 0, key.ulid, candidate))
                continue
            if key.place is Place.READY:
                left[key.name] = self._left.get(key.name, now)
                if leave_to_others and now_s - key.created_ms / 1000 <= OTHERS_AFTER_S:
                    continue
            # All who help out would try the same ones first; and always the same ones last.
            apart = -weight(self._lease.worker_id, f"{key.name}/{now_s // OTHER_ORDER_S}")
            others.append((-key.priority, 2, apart, key.ulid, candidate))
        self._left = left
        if leave_to_others:
            own, others = self._worth_a_try(own, others, now)
        return [item[4] for item in sorted(own + others, key=lambda item: item[:4])]

    def _worth_a_try(
        self, own: list[_Ranked], others: list[_Ranked], now: float
    ) -> tuple[list[_Ranked], list[_Ranked]]:
        """Others are at theirs meanwhile: another look costs less than tries that fail."""
        most_urgent_own = min((item[0] for item in own), default=math.inf)
        passed_over = [item for item in others if now - self._left.get(item[4].key.name, -math.inf) >= PASSED_OVER_S]
        oldest = heapq.nsmallest(
            PASSED_OVER_MAX * (1 + len(self._peers)), passed_over, key=lambda item: (item[0], item[3])
        )
        first = {item[3] for item in heapq.nsmallest(PASSED_OVER_MAX, oldest, key=lambda item: (item[0], item[2]))}
        tried: list[_Ranked] = []
        most_urgent_left = math.inf
        for item in sorted(others, key=lambda item: item[:4]):
            if item[3] in first:
                tried.append((item[0], 0, *item[2:]))
            elif (not self._more or item[0] < most_urgent_own) and len(tried) < HELPED_AT_ONCE:
                tried.append(item)
            else:
                most_urgent_left = min(most_urgent_left, item[0])
                if item[4].key.place is Place.DELAYED:
                    self._next_delayed = 0.0
        if most_urgent_left < math.inf:
            self._more = True
        # What is left to others is not to be overtaken by what is less urgent.
        return [item for item in own if item[0] <= most_urgent_left], tried
