"""A queue for the tests of who uses the library: in memory, worked off when the test says so, with a record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from random import Random
from types import TracebackType
from typing import Any, Self, Unpack

import anyio
import anyio.to_thread
import msgspec

from s3queue_async.errors import InvalidSettings
from s3queue_async.events import MessageCompleted, MessageDead, MessageRetry
from s3queue_async.message import Context, Tracing
from s3queue_async.protocol import layout
from s3queue_async.queue import PayloadT, S3Queue
from s3queue_async.settings import Settings, seconds, whole_number
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.clock import LoopClock, VirtualLoop
from s3queue_async.testing.enqueued import Enqueued, Fields, explanation, matching, normal, unwanted
from s3queue_async.testing.faults import FaultyStorage

LOOK_AGAIN_MIN_S = 0.01
LOOK_AGAIN_MAX_S = 1.0
RUNS_MAX = 1_000_000
PATIENCE_S = 3600.0


class NotIdle(AssertionError):
    """Raised by ``run_until_idle`` when the queue does not come to rest; says what it waits for."""


class IdleReport(msgspec.Struct, frozen=True, kw_only=True):
    """What ``run_until_idle`` saw.

    Attributes:
        completed: Messages handled to the end.
        retried: Attempts that led to another attempt.
        dead: Messages that became dead letters.
        elapsed: Seconds that went by on the event loop's clock.
        errors: What handlers raised, in that order, Retry, DeadLetter and Release included.
    """

    completed: int
    retried: int
    dead: int
    elapsed: float
    errors: list[BaseException]


class StoreTime:
    """A store's wall clock: it starts at the machine's, and goes with the running event loop's."""

    def __init__(self) -> None:
        self._ahead_s: float | None = None

    def __call__(self) -> float:
        loop_s = asyncio.get_running_loop().time()
        if self._ahead_s is None:
            self._ahead_s = time.time() - loop_s
        return self._ahead_s + loop_s


class FaultyMemory(FaultyStorage):
    """A store in memory that fails when the test says so; see FaultyStorage for how.

    Several queues may be on it, and it outlives them.

    Args:
        now: The store's clock in seconds since the epoch; None: it starts at the machine's and goes with the event loop.
    """

    def __init__(self, *, now: Callable[[], float] | None = None) -> None:
        self.now_s = StoreTime() if now is None else now
        self.memory = MemoryStorage(now=self.now_s)
        super().__init__(self.memory, clock=LoopClock())

    def __repr__(self) -> str:
        return f"FaultyMemory({self.memory!r})"

    async def close(self) -> None:
        """Do nothing: other queues may be on it, and its objects are there as long as it is."""


class VirtualTime:
    """What time it is in a test that runs on virtual time; for use inside of the event loop."""

    def __init__(self) -> None:
        self.store_now_s = StoreTime()
        self._began: float | None = None

    def begin(self) -> None:
        """Count from now on."""
        self._began = asyncio.get_running_loop().time()

    @property
    def elapsed(self) -> float:
        """Seconds since the test began."""
        now = asyncio.get_running_loop().time()
        return 0.0 if self._began is None else now - self._began

    def now(self) -> datetime:
        """The time of the stores of this test's queues."""
        return datetime.fromtimestamp(self.store_now_s(), UTC)

    async def advance(self, delta: float | timedelta) -> None:
        """Let so many seconds (or timedelta) go by, with everything that happens in them."""
        await anyio.sleep(max(0.0, seconds("delta", delta)))


class _Runs:
    """Watches handlers as they run; passes them on to the tracing that the test gave, if any."""

    def __init__(self, inner: Tracing | None) -> None:
        self._inner = inner
        self.running: dict[tuple[str, int], float] = {}
        self.ended = 0
        self.errors: list[BaseException] = []
        self.changed = anyio.Event()

    def outgoing(self, headers: Mapping[str, str] | None) -> Mapping[str, str] | None:
        return headers if self._inner is None else self._inner.outgoing(headers)

    @contextmanager
    def handling(self, context: Context) -> Iterator[None]:
        run = (context.message_id, context.attempt)
        self.running[run] = asyncio.get_running_loop().time()
        with ExitStack() as stack:
            if self._inner is not None:
                inner: AbstractContextManager[Any] = self._inner.handling(context)
                stack.enter_context(inner)
            try:
                yield
            except BaseException as error:
                self.errors.append(error)
                raise
            finally:
                self.running.pop(run, None)
                self.ended += 1
                self.changed.set()
                self.changed = anyio.Event()


class MemoryQueue(S3Queue[PayloadT]):
    """An S3Queue in memory for tests: it handles messages when ``run_until_idle`` is called, and keeps a record.

    It is an S3Queue in everything else: give it to the code under test in its place.

    Args:
        store: What the queue is on, for several queues on one; None makes one of its own.
        settings: As in production; None: the defaults, without a coordinator.
        auto_start: Whether messages are handled at any time, as in production, and not in ``run_until_idle`` alone.
        tracing: As in production.
        seed: Of the chance that jitter comes from.
        payload_type: What payloads are.
        options: What else S3Queue takes: ``on_message``, ``concurrency``, ``on_error``, and so on.

    Attributes:
        store: Fails on demand: ``queue.store.unavailable("put")``.
        enqueued: What ``enqueue`` and ``enqueue_many`` were given, in that order, without duplicates by ``dedup_id``.
    """

    def __init__(
        self,
        *,
        store: FaultyMemory | None = None,
        settings: Settings | None = None,
        auto_start: bool = False,
        tracing: Tracing | None = None,
        seed: int = 0,
        payload_type: type[PayloadT] | Any = Any,
        **options: Any,
    ) -> None:
        self.store = FaultyMemory() if store is None else store
        self.enqueued: list[Enqueued] = []
        self._seen_ids: set[str] = set()
        self._runs = _Runs(tracing)
        self._threads: list[Callable[[], None]] = []
        super().__init__(
            storage=self.store,
            payload_type=payload_type,
            settings=Settings(coordinator=False) if settings is None else settings,
            auto_start=auto_start,
            tracing=self._runs,
            clock=LoopClock(),
            rng=Random(seed),
            **options,
        )

    async def __aenter__(self) -> Self:
        loop = asyncio.get_running_loop()
        if isinstance(loop, VirtualLoop):
            # Those of sync handlers, and those of whoever else uses anyio.
            limiter = anyio.to_thread.current_default_thread_limiter()
            self._threads += [
                loop.watch_threads(lambda: self._worker is not None and self._worker.threads > 0),
                loop.watch_threads(lambda: limiter.borrowed_tokens > 0),
            ]
        return await super().__aenter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(kind, error, trace)
        finally:
            while self._threads:
                self._threads.pop()()

    def now(self) -> datetime:
        """The store's time; inside of the event loop only."""
        return datetime.fromtimestamp(self.store.now_s(), UTC)

    # -- the record ----------------------------------------------------------------------------------------------

    async def enqueue(
        self,
        payload: PayloadT,
        *,
        priority: int = 0,
        delay: float | timedelta | None = None,
        deliver_at: datetime | None = None,
        dedup_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        max_attempts: int | None = None,
        expires_in: float | timedelta | None = None,
    ) -> str:
        """Put a message into the queue and into the record; see S3Queue.enqueue."""
        options: dict[str, Any] = {
            "priority": priority,
            "delay": delay,
            "deliver_at": deliver_at,
            "headers": headers,
            "max_attempts": max_attempts,
            "expires_in": expires_in,
        }
        message_id = await super().enqueue(payload, dedup_id=dedup_id, **options)
        self._note(message_id, payload, dedup_id, options)
        return message_id

    async def enqueue_many(
        self,
        payloads: Iterable[PayloadT] | AsyncIterable[PayloadT],
        *,
        priority: int = 0,
        delay: float | timedelta | None = None,
        deliver_at: datetime | None = None,
        dedup_id: Callable[[PayloadT], str] | None = None,
        headers: Mapping[str, str] | None = None,
        max_attempts: int | None = None,
        expires_in: float | timedelta | None = None,
    ) -> list[str]:
        """Put messages into the queue and, unless that fails, into the record; see S3Queue.enqueue_many."""
        options: dict[str, Any] = {
            "priority": priority,
            "delay": delay,
            "deliver_at": deliver_at,
            "headers": headers,
            "max_attempts": max_attempts,
            "expires_in": expires_in,
        }
        taken: list[PayloadT] = []
        source = _noted(payloads, taken) if isinstance(payloads, AsyncIterable) else _noting(payloads, taken)
        ids = await super().enqueue_many(source, dedup_id=dedup_id, **options)
        for message_id, payload in zip(ids, taken, strict=True):
            self._note(message_id, payload, None if dedup_id is None else dedup_id(payload), options)
        return ids

    def _note(self, message_id: str, payload: Any, dedup_id: str | None, options: Mapping[str, Any]) -> None:
        if message_id in self._seen_ids:
            return
        self._seen_ids.add(message_id)
        delay, expires_in, headers = options["delay"], options["expires_in"], options["headers"]
        self.enqueued.append(
            Enqueued(
                id=message_id,
                payload=payload,
                priority=options["priority"],
                delay=None if delay is None else seconds("delay", delay),
                deliver_at=options["deliver_at"],
                dedup_id=dedup_id,
                headers=dict(headers or {}),
                max_attempts=options["max_attempts"],
                expires_in=None if expires_in is None else seconds("expires_in", expires_in),
            )
        )

    def assert_enqueued(self, *, times: int | None = None, **expected: Unpack[Fields]) -> Enqueued:
        """Fail unless a message was enqueued that is as expected.

        Args:
            times: How many such messages there must be; None: one or more.
            expected: ``payload``, ``priority``, ``delay``, ``deliver_at``, ``dedup_id``, ``headers``, ``max_attempts``,
                ``expires_in``: compared with ``==``. What is not named may be anything, and so may what is
                ``unittest.mock.ANY``.

        Returns:
            The first such message.

        Raises:
            AssertionError: There is none, or another number; its text shows the nearest messages, field by field.
        """
        __tracebackhide__ = True
        wanted = normal(expected)
        found = matching(self.enqueued, wanted)
        if times is not None:
            whole_number("times", times, 1, RUNS_MAX)
        if found and times in (None, len(found)):
            return found[0]
        headline = f"{len(found)} and not {times} enqueued with" if found else "No message was enqueued with"
        raise AssertionError(explanation(self.enqueued, wanted, headline))

    def assert_not_enqueued(self, **expected: Unpack[Fields]) -> None:
        """Fail if a message was enqueued that is as described; without arguments: if any was.

        Args:
            expected: As in ``assert_enqueued``.

        Raises:
            AssertionError: There is one; its text shows it.
        """
        __tracebackhide__ = True
        found = matching(self.enqueued, wanted := normal(expected))
        if found:
            raise AssertionError(unwanted(found, wanted))

    # -- working it off ------------------------------------------------------------------------------------------

    async def run_until_idle(
        self,
        *,
        raise_errors: bool = False,
        runs_max: int = 10_000,
        patience: float | timedelta = PATIENCE_S,
    ) -> IdleReport:
        """Handle everything that is due and that becomes due, retries and delayed messages included, until nothing waits.

        On virtual time, delays take none; on an ordinary event loop they are waited for.

        Args:
            raise_errors: Raise what handlers raised, as an exception group, once the queue is idle.
            runs_max: How many runs of handlers there may be, 1 to 1,000,000.
            patience: Seconds (or timedelta) that a message may be due without any handler ending.

        Raises:
            InvalidSettings: A message waits, and there is no handler.
            NotIdle: There were more than ``runs_max`` runs, or ``patience`` is over.
            BaseExceptionGroup: What handlers raised, with ``raise_errors``.
        """
        __tracebackhide__ = True
        self._require_open()
        whole_number("runs_max", runs_max, 1, RUNS_MAX)
        patience_s = seconds("patience", patience)
        if patience_s <= 0:
            raise InvalidSettings(f"patience={patience!r} must be above 0 seconds.")
        began = self._clock.monotonic()
        runs_before, errors_before = self._runs.ended, len(self._runs.errors)
        counts = dict.fromkeys((MessageCompleted.name, MessageRetry.name, MessageDead.name), 0)

        def count(event: Any) -> None:
            counts[event.name] += 1

        with ExitStack() as stack:
            for name in counts:
                stack.callback(self.on(name, count))
            while (due_s := await self._next_due()) is not None:
                if due_s > 0:
                    await self._clock.sleep(due_s)
                else:
                    await self._work_off(runs_before, runs_max, patience_s)
        report = IdleReport(
            completed=counts[MessageCompleted.name],
            retried=counts[MessageRetry.name],
            dead=counts[MessageDead.name],
            elapsed=self._clock.monotonic() - began,
            errors=self._runs.errors[errors_before:],
        )
        if raise_errors and report.errors:
            raise BaseExceptionGroup("handlers failed", report.errors)
        return report

    async def _work_off(self, runs_before: int, runs_max: int, patience_s: float) -> None:
        """Handle messages until none is due."""
        if self._worker is None:
            raise InvalidSettings(
                "A message waits, and there is no handler.",
                suggestion="Register one with @queue.handler(), or pass on_message=.",
            )
        # What runs by itself (start_processing, auto_start) goes on afterwards.
        ours = not self._processing
        if ours:
            self._process()
        try:
            await self._until_nothing_is_due(runs_before, runs_max, patience_s)
        finally:
            if ours and not self._draining:
                with anyio.CancelScope(shield=True):
                    await self.stop_processing()

    async def _until_nothing_is_due(self, runs_before: int, runs_max: int, patience_s: float) -> None:
        pause_s = LOOK_AGAIN_MIN_S
        ended, since = self._runs.ended, self._clock.monotonic()
        while (due_s := await self._next_due()) is not None and due_s <= 0:
            changed = self._runs.changed
            if self._runs.ended > ended:
                ended, since, pause_s = self._runs.ended, self._clock.monotonic(), LOOK_AGAIN_MIN_S
            if ended - runs_before > runs_max:
                raise NotIdle(
                    f"Handlers ran more than {runs_max:,} times, and messages are still due. "
                    "Does a handler enqueue for ever? Otherwise raise runs_max."
                )
            if self._clock.monotonic() - since > patience_s:
                raise NotIdle(await self._what_is_due(patience_s))
            with anyio.move_on_after(pause_s):
                await changed.wait()
            pause_s = min(LOOK_AGAIN_MAX_S, 2 * pause_s)

    async def _next_due(self) -> float | None:
        """Seconds until a message is due, 0 when one is (it may be running); None when there is none."""
        if self._producer.unwritten or (await self.store.memory.list(layout.READY, limit=1)).entries:
            return 0.0
        delayed = (await self.store.memory.list(layout.DELAYED, limit=1)).entries
        if not delayed:
            return None
        return max(0.0, layout.SegmentKey.parse(delayed[0].key).due_ms / 1000 - self.store.now_s())

    async def _what_is_due(self, patience_s: float) -> str:
        now = asyncio.get_running_loop().time()
        running = [
            f"message {message_id} (attempt {attempt}) has been running for {now - began:,.0f} s"
            for (message_id, attempt), began in self._runs.running.items()
        ]
        stats = await self.stats(exact=True)
        return (
            f"Nothing ended within patience={patience_s:g} seconds: "
            f"{stats.pending} messages wait, {stats.processing} are held. "
            + ("; ".join(running) if running else "No handler is running")
            + "."
        )


async def _noted(payloads: AsyncIterable[PayloadT], taken: list[PayloadT]) -> AsyncIterator[PayloadT]:
    async for payload in payloads:
        taken.append(payload)
        yield payload


def _noting(payloads: Iterable[PayloadT], taken: list[PayloadT]) -> Iterator[PayloadT]:
    for payload in payloads:
        taken.append(payload)
        yield payload
