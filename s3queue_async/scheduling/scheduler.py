"""Enqueues messages at certain times: one message for one tick, however many processes look at the schedules.

All schedules of a queue are in one object, written by compare-and-swap, with the last tick of each that was enqueued.
Whoever finds a tick due enqueues its message with a deduplication id made of the schedule and the tick, and then writes
that it is done. A process that dies in between leaves the tick to the next one that looks, which finds the
deduplication marker, or nothing. docs/scheduling.md says what that guarantees.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import anyio
import msgspec

from s3queue_async.engine.dedup import Deduplicator
from s3queue_async.engine.producer import Entry, Options, Producer
from s3queue_async.engine.shared import Shared
from s3queue_async.errors import InvalidSettings, QueueClosed, QueueError
from s3queue_async.intake import Intake
from s3queue_async.log import log
from s3queue_async.message import moment
from s3queue_async.scheduling import ticks
from s3queue_async.scheduling.store import TimetableStore
from s3queue_async.scheduling.timetable import Definition, Schedule, ScheduleOptions, checked_name, define, shown
from s3queue_async.wakeup import Wakeup
from s3queue_async.worker import Decoder

LOOK_EVERY_S = 60.0
"""How often a process asks whether the schedules changed: at $0.40 for a million, 1.7 cents in 30 days."""
DEDUP_WINDOW_MIN_S = 2 * LOOK_EVERY_S
"""Less would not last from one look to the next."""
BACKUP_FIRST_S, BACKUP_LAST_S = 2.0, 5.0
"""How long after a tick a worker looks whether the coordinator has enqueued it."""
ALONE_LAST_S = 0.5
"""How far processes without a coordinator are spread out, so that they need not race for each tick."""
RETRY_FIRST_S = 0.5
CATCH_UP_AT_ONCE = 100
FRESH_S = DEDUP_WINDOW_MIN_S / 4
"""How old the look may be on which a tick is enqueued: within the window of whoever enqueued it since."""
WAIT_MIN_S = 0.001
STOP_WITHIN_S = 5.0
"""How long a drain waits for a tick under way; cut off there, it is left to the next process that looks."""

HEADER_NAME = "s3queue-schedule"
HEADER_TICK = "s3queue-tick"


class Scheduler:
    """Keeps the queue's schedules, and enqueues their messages while ``run`` runs.

    Args:
        shared: What all roles have.
        producer, intake, decode: Of the queue.
        leading: Whether this process coordinates: it is the first to look at a tick.
        led: Whether it sees somebody else coordinate.
        active: Whether this process is to enqueue what is due.
    """

    def __init__(
        self,
        shared: Shared,
        producer: Producer,
        intake: Intake,
        decode: Decoder,
        *,
        leading: Callable[[], bool],
        led: Callable[[], bool],
        active: Callable[[], bool],
    ) -> None:
        self._shared = shared
        self._store = TimetableStore(shared)
        self._producer = producer
        self._intake = intake
        self._decode = decode
        self._dedup = Deduplicator(shared)
        self._leading = leading
        self._led = led
        self._active = active
        self._changed = Wakeup()
        self._plans: dict[str, Plan] = {}
        self._stopped = False
        self._idle = anyio.Event()
        self._idle.set()

    # -- definitions ---------------------------------------------------------------------------------------------

    async def add(self, cron: str | None, payload: Any, options: ScheduleOptions) -> Schedule:
        """Write a schedule, unless it is there as it is; see ``S3Queue.schedule``."""
        window_s = self._shared.settings.dedup_window
        if window_s < DEDUP_WINDOW_MIN_S:
            raise InvalidSettings(
                f"dedup_window={window_s:g} is too short for schedules: a tick that two processes enqueue is one "
                f"message only within that time. It must be at least {DEDUP_WINDOW_MIN_S:g} seconds.",
                suggestion="Leave dedup_window at its default.",
            )
        key, definition = define(self._intake, self._shared.time.now_ms(), cron, payload, **options)

        def change(schedules: dict[str, Definition]) -> bool:
            old = schedules.get(key)
            schedules[key] = new = definition.since(old) if old and definition.same_times(old) else definition
            return new != old

        schedules = await self._store.update(change)
        self._changed.set()
        return self._shown(key, schedules[key])

    async def remove(self, name: str) -> bool:
        """Remove a schedule; False when there was none of this name."""
        key = checked_name(name)
        removed = False

        def change(schedules: dict[str, Definition]) -> bool:
            nonlocal removed
            removed = schedules.pop(key, None) is not None
            return removed

        await self._store.update(change)
        return removed

    async def list(self) -> list[Schedule]:
        """Every schedule of the queue, by name."""
        return [self._shown(name, definition) for name, definition in sorted((await self._store.look()).items())]

    def _shown(self, name: str, definition: Definition) -> Schedule:
        next_ms = self._plan_of(name, definition).next_ms(max(definition.done_ms, self._shared.time.now_ms()))
        return shown(name, definition, None if math.isinf(next_ms) else int(next_ms), self._decode)

    # -- firing --------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Enqueue what is due, until cancelled or stopped."""
        shared = self._shared
        tries = 0
        while not self._stopped:
            if not self._active():
                await self._changed.wait()
                continue
            try:
                wait_s = await self._round()
                tries = 0
            except QueueClosed:
                return
            except QueueError as error:
                if tries == 0:
                    log.warning("the schedules cannot be looked at, trying again", error=str(error))
                wait_s = min(LOOK_EVERY_S, RETRY_FIRST_S * 2.0**tries) * (0.5 + shared.random.random())
                tries = min(tries + 1, 10)
            if wait_s > 0:
                await self._wait(wait_s)

    def wake(self) -> None:
        """Whether this process is to enqueue what is due may have changed."""
        self._changed.set()

    async def stop(self) -> None:
        """Begin nothing more, and return when what is under way is done, or hangs."""
        self._stopped = True
        self._changed.set()
        with anyio.move_on_after(STOP_WITHIN_S):
            await self._idle.wait()

    async def _round(self) -> float:
        """Look if it is time to, and enqueue what is due; returns for how many seconds there is nothing to do."""
        clock, store = self._shared.clock, self._store
        if clock.monotonic() >= store.looked_at + LOOK_EVERY_S:
            await store.look()
        until_tick_s = self._next_ms() / 1000 - self._shared.time.earliest()
        if until_tick_s > 0:
            until_look_s = store.looked_at + LOOK_EVERY_S - clock.monotonic()
            return max(WAIT_MIN_S, min(until_tick_s, until_look_s))
        await self._wait(self._hold_back_s())
        if self._stopped:
            return 0.0
        self._idle = anyio.Event()
        try:
            for name in sorted(await store.look()):
                await self._fire(name)
        finally:
            self._idle.set()
        return 0.0

    async def _wait(self, wait_s: float) -> None:
        if not self._stopped and wait_s > 0:
            with anyio.move_on_after(wait_s):
                await self._changed.wait()

    def _hold_back_s(self) -> float:
        """How long the others are given to enqueue a tick first."""
        chance = self._shared.random.random()
        if self._leading():
            return 0.0
        if self._led():
            return BACKUP_FIRST_S + (BACKUP_LAST_S - BACKUP_FIRST_S) * chance
        return ALONE_LAST_S * chance

    def _next_ms(self) -> float:
        """The earliest tick that is not done; infinity when there is none."""
        schedules = self._store.schedules
        self._plans = {name: plan for name, plan in self._plans.items() if name in schedules}
        nexts = (
            self._plan_of(name, definition).next_ms(self._open_from_ms(definition))
            for name, definition in schedules.items()
        )
        return min(nexts, default=math.inf)

    def _open_from_ms(self, definition: Definition) -> int:
        """Ticks later than this are still to be enqueued."""
        return max(definition.done_ms, int(self._shared.time.earliest() * 1000) - definition.grace_ms)

    def _plan_of(self, name: str, definition: Definition) -> Plan:
        plan = self._plans.get(name)
        if plan is None or not plan.is_of(definition):
            plan = self._plans[name] = Plan(name, definition)
        return plan

    async def _fire(self, name: str) -> None:
        """Enqueue what is due of one schedule, and write down that it is."""
        while not self._stopped:
            definition = self._store.schedules.get(name)
            if definition is None:
                return
            plan = self._plan_of(name, definition)
            now_ms = int(self._shared.time.earliest() * 1000)
            due = plan.due(self._open_from_ms(definition), now_ms, every=definition.catch_up)
            if not due:
                return
            if plan.next_ms(definition.done_ms) < now_ms - definition.grace_ms:
                log.warning("ticks that were missed for longer than grace are dropped", schedule=name)
            done_ms = 0
            for tick_ms in due:
                if not await self._enqueue_once(name, definition, tick_ms):
                    break
                done_ms = tick_ms
            if done_ms:
                await self._advance(name, definition, done_ms)
            if done_ms != due[-1]:
                return

    async def _enqueue_once(self, name: str, definition: Definition, tick_ms: int) -> bool:
        """Enqueue the message of a tick, unless it was; False when it is to be looked at again before."""
        dedup_id = f"schedule:{name}:{tick_ms}"
        if await self._dedup.was_enqueued(dedup_id):
            return True
        # Others may have enqueued it since, and their marker be gone: a process that stood still must not go on.
        if self._shared.clock.monotonic() - self._store.looked_at > FRESH_S:
            return False
        expires_ms = None
        if definition.expires_ms is not None:
            expires_ms = self._shared.time.now_ms() + definition.expires_ms
        headers = {**(definition.headers or {}), HEADER_NAME: name, HEADER_TICK: moment(tick_ms).isoformat()}
        options = Options(definition.max_attempts, expires_ms, headers)
        entry = Entry(definition.payload, definition.codec, options, dedup_id)
        message_id = await self._producer.enqueue(entry, definition.priority, 0)
        log.debug("tick enqueued", schedule=name, tick=headers[HEADER_TICK], message=message_id)
        return True

    async def _advance(self, name: str, definition: Definition, tick_ms: int) -> None:
        def change(schedules: dict[str, Definition]) -> bool:
            now = schedules.get(name)
            if now is None or now.created_ms != definition.created_ms or now.last_ms >= tick_ms:
                return False
            schedules[name] = msgspec.structs.replace(now, last_ms=tick_ms)
            return True

        await self._store.update(change)


class Plan:
    """When a schedule is due, as far as this process can tell; remembers what it computed last."""

    __slots__ = ("_definition", "_from_ms", "_next_ms", "_ticks")

    def __init__(self, name: str, definition: Definition) -> None:
        self._definition = definition
        self._ticks: ticks.Ticks | None = None
        self._from_ms, self._next_ms = 0.0, 0.0
        try:
            self._ticks = definition.ticks()
        except InvalidSettings as error:
            log.warning("this process cannot run a schedule", schedule=name, error=str(error))

    def is_of(self, definition: Definition) -> bool:
        own = self._definition
        return own.same_times(definition) and own.created_ms == definition.created_ms

    def next_ms(self, after_ms: int) -> float:
        """The first tick later than this; infinity when there is none."""
        if self._ticks is None:
            return math.inf
        if not self._from_ms <= after_ms < self._next_ms:
            self._from_ms, self._next_ms = after_ms, next(self._ticks.after(after_ms), math.inf)
        return self._next_ms

    def due(self, after_ms: int, until_ms: int, *, every: bool) -> list[int]:
        """The ticks between, the first ones first and not too many at once; or only the last of all."""
        if self._ticks is None or self.next_ms(after_ms) > until_ms:
            return []
        if every:
            upcoming = itertools.islice(self._ticks.after(after_ms), CATCH_UP_AT_ONCE)
            return list(itertools.takewhile(lambda tick_ms: tick_ms <= until_ms, upcoming))
        last = ticks.latest(self._ticks, after_ms=after_ms, until_ms=until_ms)
        return [] if last is None else [last]
