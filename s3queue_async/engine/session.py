"""One registered life of a worker: its lease, what it holds, and the roles that work under that lease.

A lease that is lost ends the life; whoever runs the session starts another one under a new id.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress

import anyio
from anyio.abc import TaskGroup

from s3queue_async.engine.claimer import Claimer
from s3queue_async.engine.coordination import Coordination
from s3queue_async.engine.coordinator import Coordinator
from s3queue_async.engine.election import Election
from s3queue_async.engine.feed import Feed
from s3queue_async.engine.finder import Finder
from s3queue_async.engine.held import Departing, Done, Held
from s3queue_async.engine.recovery import Recovery
from s3queue_async.engine.registry import FENCED, NOT_RENEWED, Counters, Lease, Registry, Vitals
from s3queue_async.engine.scanner import Scanner
from s3queue_async.engine.settler import Settler
from s3queue_async.engine.shared import Shared
from s3queue_async.engine.together import together
from s3queue_async.engine.tombstones import Tombstones
from s3queue_async.errors import LeaseLost, QueueError, StoreUnavailable, Throttled, Unreadable
from s3queue_async.events import (
    LeaseLostEvent,
    MessageClaimed,
    MessageDead,
    MessageRetry,
    WorkerStarted,
    WorkerStopped,
)
from s3queue_async.log import bind, log
from s3queue_async.protocol.backoff import retry_delay_s
from s3queue_async.protocol.board import Ticket
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.protocol.segment import Failure
from s3queue_async.wakeup import Wakeup

TICK_S = 0.1
LINGER_SWEEP_S = 2.0
RATE_WINDOW_S = 0.2
RATE_SAMPLE = 512
"""So many messages tell the rate in less time, and without those before: a fast worker is to get up to speed at once."""
PREFETCH_ROUNDS = 2.0
"""Messages are fetched ahead for this many times as long as a claim takes."""
PREFETCH_MAX = 4096
SPLIT_PIECES_MAX = 16
SPLIT_EARLY_PART = 0.25
"""The part of ``split_after`` after which a segment is shared out early when it would clearly take longer."""
ENDED_MAX = 20_000
KNOWN_LINGERS = 3
FAREWELL_S = 5.0
OVER = "its session is over"


class Tally:
    """Counts as it goes."""

    __slots__ = ("completed", "dead", "failed", "handler_s", "latency_s", "retried")

    def __init__(self) -> None:
        self.completed = self.retried = self.failed = self.dead = 0
        self.handler_s = self.latency_s = 0.0


class Session:
    """Holds segments under one lease until it is drained, or the lease is lost.

    Args:
        shared: What all roles have.
        worker_id: New for every life.
        capacity: Messages that its worker handles at a time.
    """

    def __init__(self, shared: Shared, worker_id: str, *, capacity: int) -> None:
        self.shared = shared
        self.worker_id = worker_id
        self.capacity = capacity
        self._alone = True
        self.registry = Registry(shared)
        self.lease = Lease(shared, self.registry, worker_id, self._vitals)
        self.settler = Settler(shared, self.lease, on_end=self._on_end)
        self.tombstones = Tombstones(shared, self.registry, self.lease, self.settler)
        self.election = Election(
            shared, worker_id, stands=shared.settings.coordinator, on_demoted=self._look_like_the_others
        )
        self.scanner = Scanner(shared)
        self.finder = Finder(
            shared,
            self.registry,
            self.lease,
            self.scanner,
            self.election,
            known=lambda name: self._known(name) or name in self.claimer.claiming,
            idle=self._idle,
            alone=lambda: self.coordinator.active_workers == 1,
        )
        self.claimer = Claimer(
            shared,
            self.registry,
            self.lease,
            self.finder,
            self.scanner,
            demand=self.demand,
            queued_bytes=lambda: self.feed.queued_bytes if len(self.held) > 1 else 0,
            deliver=self._deliver,
            known=self._known,
            let_linger=self.settler.let_linger,
            release=self.settler.give_back,
        )
        patience_s = shared.settings.split_after or shared.settings.visibility_timeout
        self.feed = Feed(shared.clock, patience_s=patience_s, on_hungry=self.claimer.poke)
        self.coordinator = Coordinator(
            shared,
            self.registry,
            self.scanner,
            self.election,
            worker_id,
            capacity=self._capacity_now,
            is_at_work=lambda: bool(self.held),
            on_tickets=self._take_tickets,
            ended=self.tombstones.names,
        )
        self.recovery = Recovery(
            shared,
            self.registry,
            self.lease,
            self.election,
            known=self._known,
            let_linger=self.settler.let_linger,
            takeover=self,
        )
        self.held: dict[str, Held] = {}
        self._tally = Tally()
        # Store time a moment ago; asking for it anew with each message would cost more than a figure is worth.
        self._now_ms = 0
        self.wanted_by_receivers = 0
        self.on_tick: list[Callable[[float], None]] = []
        self._ended: dict[str, float] = {}
        self._rate = 0.0
        self._rate_at = shared.clock.monotonic()
        self._rate_done = 0
        self._changed = Wakeup()
        self._delivered = Wakeup()
        self._decided = anyio.Event()
        self._over = anyio.Event()
        self._scope = anyio.CancelScope()
        self._working: TaskGroup | None = None
        self._starters: list[Callable[[Session, TaskGroup], None]] = []
        self._may_leave = True
        self._draining = False
        self._starts_no_more = False
        self.handed_back = 0

    # -- life ----------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Register, work, and stay until ``end`` or the loss of the lease.

        Raises:
            StoreUnavailable, Throttled: The worker could not register.
        """
        bind(worker=self.worker_id)
        try:
            await self.lease.register()
        except BaseException:
            self.lease.lose("not registered")
            self._notify()
            self._decided.set()
            raise
        log.info("worker started", worker=self.worker_id, capacity=self.capacity)
        self.shared.bus.emit(WorkerStarted(worker_id=self.worker_id, capacity=self.capacity))
        try:
            with self._scope:
                async with anyio.create_task_group() as beating:
                    beating.start_soon(self._beat)
                    async with anyio.create_task_group() as working:
                        working.start_soon(self._start, working)
                        try:
                            await self._over.wait()
                        finally:
                            # What is started in a group that is ending may never be cancelled.
                            self._working = None
                        working.cancel_scope.cancel()
                    beating.cancel_scope.cancel()
        finally:
            with anyio.CancelScope(shield=True):
                await self._farewell()
            self._decided.set()

    async def _start(self, working: TaskGroup) -> None:
        """Start the roles, once it is known what must not be run."""
        await self.tombstones.read()
        if self._over.is_set():
            return
        for job in (
            self.settler.run,
            self.claimer.run,
            self._tick,
            self._sweep_linger,
            self.recovery.run,
            self.election.run,
            self.coordinator.run,
        ):
            working.start_soon(job)
        self._working = working
        for start in self._starters:
            start(self, working)
        self._decided.set()

    def start_worker(self, capacity: int, start: Callable[[Session, TaskGroup], None]) -> None:
        """Have a worker's tasks run under this lease, from now on or from the registration on.

        Args:
            capacity: Messages that it handles at a time.
            start: Starts the tasks in the group, which ends before the heartbeat does.
        """
        self.capacity += capacity
        self._starters.append(start)
        if self._working is not None:
            start(self, self._working)

    def end(self) -> None:
        """Leave; nothing may be held any more."""
        self._over.set()

    def keep_registered(self) -> None:
        """Something that cannot be cancelled goes on: the lease must run out by itself."""
        self._may_leave = False

    async def _beat(self) -> None:
        await self.lease.run()
        reason = self.lease.lost or "ended"
        lost = [held for held in self.held.values() if held.lost is None]
        ids = [message_id for held in lost for message_id in held.message_ids()]
        log.warning("lease lost", worker=self.worker_id, reason=reason, messages=len(ids))
        for held in lost:
            held.lose(reason)
        self.shared.bus.emit(LeaseLostEvent(worker_id=self.worker_id, message_ids=ids, reason=reason))
        self._scope.cancel()

    async def _farewell(self) -> None:
        for held in self.held.values():
            held.lose(self.lease.lost or OVER)
            # Who waits for what the settler was recording as it was cancelled is not woken by the loss, which may have
            # come before.
            held.notify_waiters()
        reason = self.lease.lost
        if reason is None and self.held:
            # Cancelled with messages in hand: nobody runs them here any more, so others need not wait for the lease.
            reason = "cancelled"
        if self._may_leave:
            with anyio.move_on_after(FAREWELL_S):
                try:
                    if reason == FENCED:
                        pass
                    elif reason == NOT_RENEWED:
                        await self.lease.give_up()
                    else:
                        # The heartbeat is to go even when there are more claims than time, or the board does not answer.
                        with anyio.move_on_after(FAREWELL_S / 2):
                            last_words = (self.election.leave, self.settler.disown_ended)
                            await together(last_words, lambda say: say(), at_once=len(last_words))
                        await self.lease.leave()
                except (StoreUnavailable, Throttled) as error:
                    log.warning("the heartbeat stays until it runs out", worker=self.worker_id, error=str(error))
        self.election.demote("its worker stopped")
        self.lease.lose(reason or "ended")
        self._over.set()
        self._notify()
        log.info("worker stopped", worker=self.worker_id, reason=reason or "drained")
        self.shared.bus.emit(WorkerStopped(worker_id=self.worker_id, reason=reason or "drained"))

    @property
    def counters(self) -> Counters:
        """What this session's worker did so far."""
        tally = self._tally
        return Counters(
            tally.completed,
            tally.retried,
            tally.failed,
            tally.dead,
            round(tally.handler_s, 3),
            round(tally.latency_s, 3),
        )

    @property
    def coordination(self) -> Coordination:
        """What this process knows of the queue's coordination."""
        election, claimer = self.election, self.claimer
        board = election.board
        leads = election.leading
        return Coordination(
            is_coordinator=leads,
            term=election.term,
            board_live=election.live,
            active_workers=self.coordinator.active_workers if leads else max(1, len(board.workers) if board else 1),
            tickets_available=self.coordinator.available if leads else len(board.tickets) if board else 0,
            tickets_claimed=claimer.claims_by_ticket,
            tickets_stalled=self.coordinator.stalled,
            claims_direct=claimer.claims_direct,
            claims_wasted=claimer.claims_wasted,
            poll_interval_s=self.finder.interval_s,
        )

    @property
    def is_over(self) -> bool:
        return self.lease.lost is not None

    @property
    def at_work(self) -> bool:
        """Whether it is known that the worker is registered, and still is."""
        return self._decided.is_set() and not self.is_over

    async def registered(self) -> bool:
        """Return once the worker is registered, and at work; False when it is not, or not any more."""
        await self._decided.wait()
        return not self.is_over

    # -- demand --------------------------------------------------------------------------------------------------

    def demand(self) -> int:
        """Messages wanted beyond those that wait already or are being claimed."""
        if self._draining:
            return 0
        now = self.shared.clock.monotonic()
        since_s = now - self._rate_at
        done = self.feed.finished - self._rate_done
        if since_s >= RATE_WINDOW_S or (done >= RATE_SAMPLE and since_s > 0):
            rate = done / since_s
            self._rate = rate if self._rate == 0.0 or done >= RATE_SAMPLE else (self._rate + rate) / 2
            self._rate_at, self._rate_done = now, self.feed.finished
        ahead = min(PREFETCH_MAX, int(self._rate * self.claimer.fetch_s * PREFETCH_ROUNDS))
        wanted = self.feed.idle + self.wanted_by_receivers + ahead
        return wanted - self.feed.queued - self.claimer.claiming_messages

    def _idle(self) -> bool:
        return self.feed.idle + self.wanted_by_receivers > self.feed.queued + self.claimer.claiming_messages

    def _capacity_now(self) -> int:
        return 0 if self._draining else max(self.capacity, self.wanted_by_receivers)

    def _look_like_the_others(self) -> None:
        """The coordinator here does not tell its worker any more (found by simulation: it waited for that)."""
        self.claimer.notice()

    def _take_tickets(self, tickets: list[Ticket]) -> None:
        was_alone, self._alone = self._alone, self.coordinator.active_workers == 1
        # Who has just become the only worker waits for nobody's tickets any more.
        has_tickets = self.finder.notice_tickets(tickets)
        if self._alone and not was_alone:
            # What the last of the others held may be free.
            self.claimer.notice()
        elif has_tickets or self._alone:
            self.claimer.poke()

    # -- starting ------------------------------------------------------------------------------------------------

    def take(self) -> tuple[Held, int] | None:
        """The next message to start, now counted as running; None when none may start."""
        return self.feed.take() if self.lease.trusted else None

    def start_no_more(self) -> None:
        """What runs is being cancelled: what is only about to start must not."""
        self._starts_no_more = True

    async def started_alone(self, held: Held, index: int) -> bool:
        """Record that a taken message runs alone now; False when it is not to be started after all."""
        attempts = held.attempts(index)
        try:
            await self.settler.record_start(held, index)
        except QueueError as error:
            self.feed.done(held)
            self.settler.lose(held, str(error))
            self.slot_free()
            return False
        except BaseException:
            # Whoever asked for it is cancelled: it was taken, nobody will run it, and it is not done.
            self.feed.done(held)
            if held.lost is None:
                self.released(held, index, attempts=held.attempts(index))
            self.slot_free()
            raise
        if not self.lease.trusted:
            # This process stood still over the record's reply: another worker may run the message by now.
            self.feed.done(held)
            self.settler.lose(held, self.lease.lost or NOT_RENEWED)
            self.slot_free()
            return False
        if self._starts_no_more:
            self.feed.done(held)
            self.released(held, index, attempts=attempts)
            self.slot_free()
            return False
        return True

    # -- what becomes of messages --------------------------------------------------------------------------------

    def finished(
        self, held: Held, index: int, *, attempt: int, duration_s: float, result: object, counts: bool = True
    ) -> None:
        """The message is done; it counts as completed unless the lease was over by then."""
        held.finished.append(index)
        if self.settler.keep_done:
            held.done.append(Done(index, attempt, duration_s, result))
        if counts:
            tally = self._tally
            tally.completed += 1
            tally.handler_s += duration_s
            latency_s = (self._now_ms - held.index.records[index].enqueued_ms) / 1000
            tally.latency_s += latency_s if latency_s > duration_s else duration_s
        self._after(held)

    def retry(
        self, held: Held, index: int, *, attempt: int, max_attempts: int, delay_s: float | None, failure: Failure
    ) -> None:
        """The attempt failed: another one after the backoff, or a dead letter after the last."""
        settings = self.shared.settings
        self._tally.failed += 1
        if attempt >= max_attempts:
            self.dead(held, index, attempts=attempt, failure=failure)
            return
        if delay_s is None:
            delay_s = retry_delay_s(
                attempt,
                base_s=settings.backoff_base,
                max_s=settings.backoff_max,
                jitter=settings.backoff_jitter,
                chance=self.shared.random.random(),
            )
        self._tally.retried += 1
        record = held.index.records[index]
        self.shared.bus.emit(
            MessageRetry(
                message_id=record.id, worker_id=self.worker_id, attempt=attempt, delay=delay_s, error=failure.reason
            )
        )
        self._depart(held, index, attempt, failure, delay_s)

    def dead(self, held: Held, index: int, *, attempts: int, failure: Failure) -> None:
        """The message becomes a dead letter."""
        record = held.index.records[index]
        self._tally.dead += 1
        log.info("dead letter", message=record.id, attempt=attempts, error=failure.reason, worker=self.worker_id)
        self.shared.bus.emit(
            MessageDead(message_id=record.id, worker_id=self.worker_id, attempts=attempts, error=failure.reason)
        )
        held.departing.append(Departing(index, attempts, failure, Place.DEAD))
        self._after(held)

    def released(self, held: Held, index: int, *, attempts: int, delay_s: float = 0.0) -> None:
        """The message goes back unhandled; the attempt does not count."""
        self.handed_back += 1
        self._depart(held, index, attempts, None, delay_s)

    def _depart(self, held: Held, index: int, attempts: int, failure: Failure | None, delay_s: float) -> None:
        due_ms = self.shared.time.now_ms() + 1 + math.ceil(delay_s * 1000) if delay_s > 0 else 0
        place = Place.DELAYED if due_ms else Place.READY
        held.departing.append(Departing(index, attempts, failure, place, due_ms))
        if due_ms:
            self.claimer.notice_due(due_ms)
        self._after(held)

    def _after(self, held: Held) -> None:
        if held.lost is None and held.complete:
            self.settler.submit(held)

    # -- what is held --------------------------------------------------------------------------------------------

    def _deliver(self, held: Held) -> None:
        self._now_ms = self.shared.time.now_ms()
        self._hold(held)
        if self.shared.bus.wants(MessageClaimed.name):
            for index in held.waiting:
                record = held.index.records[index]
                self.shared.bus.emit(
                    MessageClaimed(message_id=record.id, worker_id=self.worker_id, token=held.token(record))
                )
        if self._draining:
            self._hand_back(held)
        elif held.complete or held.claim.pending_moves():
            self.settler.submit(held)
        if held.waiting:
            self.feed.add(held)

    def _hold(self, held: Held) -> None:
        self.held[held.name] = held
        self._delivered.set()
        self.coordinator.notice_work()

    def _on_end(self, held: Held) -> None:
        self.feed.remove(held)
        if self.held.pop(held.name, None) is None:
            return
        if len(self._ended) > ENDED_MAX:
            self._ended = dict(list(self._ended.items())[ENDED_MAX // 2 :])
        if held.lost is None:
            if not held.giving_back:
                self._ended[held.name] = self.shared.clock.monotonic()
        else:
            ids = held.message_ids()
            self.shared.bus.emit(LeaseLostEvent(worker_id=self.worker_id, message_ids=ids, reason=held.lost))
        self._notify()

    def _known(self, name: str) -> bool:
        if name in self.held or self.tombstones.names(name):
            return True
        ended_at = self._ended.get(name)
        # Longer than its claim lingers: until the sweep that deletes the claim, a late write may bring it back.
        known_for_s = KNOWN_LINGERS * self.shared.settings.claim_linger
        return ended_at is not None and self.shared.clock.monotonic() - ended_at < known_for_s

    def _vitals(self) -> Vitals:
        names = {*self.held, *self.claimer.claiming, *self.settler.revivable()}
        requests, throttled = self.shared.requests()
        return Vitals(self._capacity_now(), self.feed.running, sorted(names), self.counters, requests, throttled)

    async def finish_orphan(self, key: SegmentKey) -> None:
        """Take over a dead letter's claim that nobody holds, and settle what its holder left undone."""
        try:
            held = await self.claimer.claim_one(key)
        except Unreadable:
            # Reported already; the sweep goes on with the others.
            return
        if held is None:
            return
        self._hold(held)
        if held.complete:
            self.settler.submit(held)
        else:
            self.settler.submit_give_back(held)

    async def claim_one(self, key: SegmentKey) -> Held | None:
        """Claim one segment for work that is no handler's (redrive, purge); None when it is somebody else's.

        Raises:
            Unreadable: This process lacks what it takes to read it.
            LeaseLost: The session is over: nobody would settle what it claims.
        """
        self._require_settler()
        held = await self.claimer.claim_one(key)
        if held is not None:
            self._require_settler()
            self._hold(held)
        return held

    def _require_settler(self) -> None:
        self.lease.check()
        if self._working is None:
            raise LeaseLost(f"Worker {self.worker_id} has left: {OVER}.")

    # -- upkeep --------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        clock = self.shared.clock
        while True:
            while not self.held:
                await self._delivered.wait()
            now = clock.monotonic()
            self._now_ms = self.shared.time.now_ms()
            for held in list(self.held.values()):
                if held.lost is None:
                    self._split(held, now)
                    if self.settler.is_due(held, now):
                        self.settler.submit(held)
            for callback in self.on_tick:
                callback(now)
            if self.feed.queued:
                # One that may run alone by now, or that waited for the lease to be renewed.
                self.feed.wake(1)
            await clock.sleep(TICK_S)

    def _split(self, held: Held, now: float) -> None:
        """Share out what this worker cannot start soon, so that slow jobs spread over the idle workers."""
        split_after_s = self.shared.settings.split_after
        if split_after_s is None or held.queued or not held.waiting:
            return
        since_s = now - held.claimed_at
        keep = max(1, self.capacity if self.wanted_by_receivers == 0 else self.wanted_by_receivers)
        if held.isolated:
            keep = 1
        waiting = len(held.waiting)
        if since_s < split_after_s * SPLIT_EARLY_PART or (waiting <= keep and since_s < 2 * split_after_s):
            return
        done = len(held.index.records) - waiting - held.running
        per_second = max(done, held.running / 2, 0.01) / since_s
        if since_s < split_after_s and waiting / per_second <= split_after_s:
            return
        if waiting / per_second <= split_after_s / 2:
            return
        if waiting <= keep:
            keep = 0
        size = max(1 if held.isolated else max(1, self.capacity), math.ceil((waiting - keep) / SPLIT_PIECES_MAX))
        for place in range(waiting - keep):
            index = held.waiting.pop()
            held.departing.append(Departing(index, held.attempts(index), None, Place.READY, group=place // size))
        self.handed_back += waiting - keep
        self.settler.submit(held)

    async def _sweep_linger(self) -> None:
        while True:
            await self.shared.clock.sleep(LINGER_SWEEP_S)
            try:
                await self.settler.sweep_linger()
                await self.tombstones.sweep()
            except (StoreUnavailable, Throttled) as error:
                log.warning("deleting finished claims failed, trying again", error=str(error))

    # -- the end -------------------------------------------------------------------------------------------------

    async def drain(self, *, stop_running: Callable[[], int], timeout_s: float) -> bool:
        """Claim no more, hand back what was not started, let the rest end, settle everything, leave.

        Args:
            stop_running: Cancels what still runs when the time is over; returns how many that were.
            timeout_s: How long handlers may go on.

        Returns:
            True when everything was settled.
        """
        self._draining = True
        self.claimer.poke()
        # So that the coordinator has no more work for this worker.
        self.lease.hurry()
        with anyio.move_on_after(FAREWELL_S):
            await self.election.leave()
        with anyio.move_on_after(timeout_s + self.lease.trust_left_s):
            await self.claimer.stop()
        for held in list(self.held.values()):
            self._hand_back(held)
        with anyio.move_on_after(timeout_s):
            await self._until(lambda: self.feed.running == 0)
        if self.feed.running:
            stop_running()
        await self._until(lambda: not self.held or self.is_over)
        clean = not self.is_over
        if clean:
            with suppress(StoreUnavailable, Throttled):
                await self._clear_linger()
        self.end()
        return clean

    def _hand_back(self, held: Held) -> None:
        if held.lost is not None:
            return
        if held.untouched and held.waiting and held.claim.state == "open":
            self.handed_back += len(held.waiting)
            held.waiting.clear()
            self.settler.submit_give_back(held)
            return
        while held.waiting:
            index = held.waiting.popleft()
            held.departing.append(Departing(index, held.attempts(index), None, Place.READY))
            self.handed_back += 1
        self._after(held)

    async def _clear_linger(self) -> None:
        """Delete the claims of ended segments: all of them when nobody else is there who could have seen one.

        A worker that registers later learns from a tombstone which of these segments may come back.
        """
        if self.settler.lingering:
            alone = await self.tombstones.leave()
            if not alone:
                await self.settler.disown_ended()
            await self.settler.sweep_linger(all_of_them=alone)

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()

    def slot_free(self) -> None:
        """A running message ended: somebody may be waiting for the last one."""
        if self._draining:
            self._notify()
