"""The board's term: who leads, how everybody else sees it, and how the next one takes over.

Lease, fence and publication are one object. A leader that was deposed finds out at its next publication, because that
is a compare-and-swap; until then it believed something wrong, and nothing came of it: tickets are hints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import anyio
import msgspec

from s3queue_async.engine.shared import Shared
from s3queue_async.errors import CorruptObject, QueueError, StoreUnavailable, Throttled
from s3queue_async.events import CoordinatorDemoted, CoordinatorPromoted
from s3queue_async.log import log
from s3queue_async.protocol import board as boards
from s3queue_async.protocol import layout
from s3queue_async.protocol.board import Board, Ticket
from s3queue_async.storage.base import Condition, IfAbsent, IfVersion, NotFound, Stored, Superseded, Unmodified, Written
from s3queue_async.storage.plugin import PluginStorage
from s3queue_async.wakeup import Wakeup

TTL_ELECTIONS = 3
"""A board counts for this many election intervals: two renewals may fail."""
HOLD_OFF_ELECTIONS = 4
"""For so many election intervals after a voluntary hand-over its old leader leaves the election to others."""


class Election:
    """One process's view of the board, and its part in the election.

    Args:
        shared: What all roles have.
        worker_id: Under which it leads.
        stands: Whether it stands for election.
    """

    def __init__(self, shared: Shared, worker_id: str, *, stands: bool, on_demoted: Callable[[], None]) -> None:
        self._shared = shared
        self._worker_id = worker_id
        self._stands = stands
        self._on_demoted = on_demoted
        self._store = _Watched(shared.storage, layout.COORDINATOR)
        self.board: Board | None = None
        self._version: str | None = None
        self._modified_s = -math.inf
        self._looking = anyio.Lock()
        self._looked_at = -math.inf
        self._changed = Wakeup()
        self._hold_off_until = -math.inf
        self._published_at = -math.inf
        self._since = -math.inf
        self._gone = False
        self._unresigned: Board | None = None
        self._elected = Wakeup()
        self.leading = False
        self.refused = False
        self.term = 0

    # -- what it is ----------------------------------------------------------------------------------------------

    @property
    def ttl_s(self) -> float:
        """How long a board counts from its LastModified."""
        return TTL_ELECTIONS * self._shared.settings.election_interval

    @property
    def live(self) -> bool:
        """Whether the last board that was seen has a leader whose time is not over."""
        return self.leading or (self.board is not None and self.board.state == "leading" and self._left_s > 0)

    @property
    def _left_s(self) -> float:
        """Seconds until anybody may take over, unless the leader renews its board."""
        assert self.board is not None
        ends_s = (
            self._modified_s + self._shared.time.resolution_s + self.board.ttl_s + self._shared.settings.lease_margin
        )
        return ends_s - self._shared.time.certain()

    @property
    def unseen_for_s(self) -> float:
        """Seconds since this process last looked at the board."""
        return self._shared.clock.monotonic() - self._looked_at

    @property
    def led_for_s(self) -> float:
        """Seconds since this process was elected; infinite while it does not lead."""
        return self._shared.clock.monotonic() - self._since

    async def elected(self) -> None:
        """Return once this process leads."""
        while not self.leading:
            await self._elected.wait()

    @property
    def renewal_is_due(self) -> bool:
        """Whether the leader should publish, although nothing changed."""
        return self._shared.clock.monotonic() - self._published_at >= self._shared.settings.election_interval

    # -- looking -------------------------------------------------------------------------------------------------

    async def look(self) -> None:
        """Read the board unless it is as it was."""
        looked_already = self._looking.locked()
        async with self._looking:
            if not looked_already:
                await self._read()

    async def _read(self) -> None:
        self._looked_at = self._shared.clock.monotonic()
        before = self._version
        stored: Stored | Unmodified | None
        try:
            stored = await self._store.get(layout.BOARD, unless=before)
        except NotFound:
            stored = None
        if self._version != before:
            # Written here meanwhile: the reply may be older.
            return
        if not isinstance(stored, Unmodified):
            self._see(stored)
        elif not self.live:
            self._changed.set()

    def _see(self, stored: Stored | None) -> None:
        if stored is None:
            self.board, self._version, self._modified_s = None, None, -math.inf
            self._changed.set()
            return
        try:
            self.board = boards.decode(stored.key, stored.body)
        except CorruptObject as error:
            # As if it were resigned: whoever stands replaces it by compare-and-swap.
            log.error("the coordinator's board cannot be read", error=str(error))
            self.board = Board("", self.term, "", "resigned", self.ttl_s)
        self._version, self._modified_s = stored.version, stored.modified_s
        self.term = max(self.term, self.board.term)
        if self._unresigned is not None and self.board.term >= self._unresigned.term:
            own = self.board.leader == self._worker_id and self.board.state == "leading"
            self._unresigned = self.board if own else None
        if not self.live:
            self._changed.set()

    # -- standing ------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Look at the board now and then, and stand for election when it has no leader, until cancelled."""
        shared = self._shared
        every_s = shared.settings.election_interval
        while True:
            try:
                if not self.leading and self.unseen_for_s >= every_s:
                    await self.look()
                if self._may_stand:
                    # Whoever waits least stands first; the others see its board.
                    await shared.clock.sleep(shared.random.random() * min(1.0, every_s / 5))
                    await self.look()
                    if self._may_stand:
                        await self._stand()
            except QueueError as error:
                log.warning("the election failed", error=str(error))
                await shared.clock.sleep(every_s * shared.random.random())
            with anyio.move_on_after(every_s * (0.75 + 0.25 * shared.random.random())):
                await self._changed.wait()

    @property
    def _may_stand(self) -> bool:
        held_off = self._shared.clock.monotonic() < self._hold_off_until
        return self._stands and not self.live and not self._gone and not held_off

    async def _stand(self) -> None:
        before = self.board
        began = self._shared.clock.monotonic()
        board = Board(
            self._shared.nonce(),
            self.term + 1,
            self._worker_id,
            "leading",
            self.ttl_s,
            0.0 if before is None else before.poll_s,
            False if before is None else before.busy,
            [] if before is None else before.tickets,
            {} if before is None else before.workers,
        )
        # It may land although its reply is never seen here.
        self._unresigned = board
        if not await self._swap(board):
            return
        if self._gone:
            await self._resign()
            return
        self.leading = True
        self._since = began
        log.info("promoted to coordinator", worker=self._worker_id, term=board.term)
        self._shared.bus.emit(CoordinatorPromoted(worker_id=self._worker_id, term=board.term))
        self._elected.set()

    async def _swap(self, board: Board) -> bool:
        """Write the board over the one that was seen last; whether it is there now."""
        began = self._shared.clock.monotonic()
        body = boards.encode(board)
        before = self._version
        when = IfAbsent() if before is None else IfVersion(before)
        self._store.throttled = False
        try:
            version = await self._shared.swap(
                layout.BOARD, body, when=when, deadline_s=self.ttl_s / 2, storage=self._store
            )
        except Superseded as lost:
            if self._version == before:
                self._see(lost.stored)
            return False
        finally:
            self.refused = self._store.throttled
        self._published_at = began
        if self._version == before:
            # Dated by what a reply said before it was written: others see a later date.
            self.board, self._version, self._modified_s = board, version, self._shared.time.seen()
            self.term = board.term
            self._unresigned = board if board.state == "leading" else None
        return True

    # -- leading -------------------------------------------------------------------------------------------------

    async def publish(
        self, tickets: Sequence[Ticket], workers: Mapping[str, int], *, poll_s: float, busy: bool
    ) -> bool:
        """Write a new board under one's own term; False when this process does not lead any more.

        Raises:
            StoreUnavailable, Throttled: It may have been written or not; the next publication finds out.
        """
        if not self.leading or self.board is None:
            return False
        board = msgspec.structs.replace(
            self.board,
            nonce=self._shared.nonce(),
            tickets=list(tickets),
            workers=dict(workers),
            poll_s=poll_s,
            busy=busy,
        )
        try:
            written = await self._swap(board)
        except (StoreUnavailable, Throttled):
            if self._shared.clock.monotonic() - self._published_at > self.ttl_s:
                # Another one may lead by now.
                self.demote("the board could not be renewed in time")
            raise
        if written:
            return True
        if self._is_own and self.board.state == "resigned":
            # Somebody has resigned for it: an operator asked for another coordinator.
            self._hold_off()
            self.demote("it was asked to step down")
            return False
        if self._is_own:
            # An earlier publication of this term that was given up unanswered landed after all.
            return await self.publish(tickets, workers, poll_s=poll_s, busy=busy)
        self.demote("the board was deleted" if self._version is None else "another coordinator's board is there")
        return False

    @property
    def _is_own(self) -> bool:
        return self.board is not None and self.board.leader == self._worker_id and self.board.term == self.term

    def demote(self, reason: str) -> None:
        """Lead no more."""
        if not self.leading:
            return
        self.leading = False
        self._since = math.inf
        log.info("coordinator no more", worker=self._worker_id, term=self.term, reason=reason)
        self._shared.bus.emit(CoordinatorDemoted(worker_id=self._worker_id, term=self.term, reason=reason))
        self._changed.set()
        self._on_demoted()

    async def hand_over(self) -> None:
        """Resign in favour of any other worker, as the term has lasted long enough."""
        self._hold_off()
        self.demote("its term is over")
        await self._resign()

    def _hold_off(self) -> None:
        elections = HOLD_OFF_ELECTIONS * self._shared.settings.election_interval
        self._hold_off_until = self._shared.clock.monotonic() + elections

    async def leave(self) -> None:
        """Stand no more, and resign if this process leads, so that the next one takes over at once."""
        self._gone = True
        self.demote("it leaves")
        await self._resign()

    async def _resign(self) -> None:
        """End the term on the board, also when a write of this process comes first whose reply it has not seen."""
        try:
            while (board := self._unresigned) is not None:
                await self._swap(msgspec.structs.replace(board, nonce=self._shared.nonce(), state="resigned"))
        except (StoreUnavailable, Throttled) as error:
            log.warning("the board stays until its time is over", error=str(error))


class _Watched(PluginStorage):
    """Notices whether a write was refused because there were too many of its key."""

    throttled = False

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        try:
            return await super().put(key, body, when=when)
        except Throttled:
            self.throttled = True
            raise
