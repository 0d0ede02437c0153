"""S3Queue: the front door. It wires the parts together and holds no algorithm."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import datetime, timedelta
from random import Random, SystemRandom  # noqa: TID251 - the one place where chance comes from
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, Unpack, overload

import anyio
import msgspec
from anyio.abc import TaskGroup

from s3queue_async.clock import Clock, SystemClock
from s3queue_async.coordinator import Coordinator
from s3queue_async.dead_letters import LIST_LIMIT_DEFAULT, LIST_LIMIT_MAX, DeadLetters
from s3queue_async.engine.browser import Browser
from s3queue_async.engine.config import open_queue
from s3queue_async.engine.follower import Follower
from s3queue_async.engine.inspector import Inspector
from s3queue_async.engine.overview import Watcher
from s3queue_async.engine.packing import Packer
from s3queue_async.engine.producer import BulkWriter, Expected, Producer
from s3queue_async.engine.session import Session
from s3queue_async.engine.shared import Shared, TimedStorage
from s3queue_async.errors import (
    InvalidSettings,
    InvalidURL,
    MessageNotFound,
    QueueClosed,
    QueueFull,
    StoreUnavailable,
    Throttled,
)
from s3queue_async.events import (
    Event,
    EventBus,
    MessageCompleted,
    MessageDead,
    MessageRetry,
    MetricsSnapshot,
    StoreThrottled,
)
from s3queue_async.intake import Intake
from s3queue_async.keyring import Keyring, keyring_from_environment
from s3queue_async.log import bind, bound, log
from s3queue_async.looks import MessageInfo, Overview
from s3queue_async.message import (
    CompletedMessage,
    DrainReport,
    Health,
    Message,
    MessageStatus,
    QueueStats,
    Tracing,
    WorkerInfo,
)
from s3queue_async.metrics import Meter
from s3queue_async.middleware.chain import Middleware, checked_middleware, make_handler
from s3queue_async.protocol import layout
from s3queue_async.receiver import Receiver, checked_ack_within, checked_receive
from s3queue_async.scheduling import Schedule, ScheduleOptions, Scheduler
from s3queue_async.settings import Settings, seconds, whole_number
from s3queue_async.storage.base import Storage
from s3queue_async.storage.metered import MeteredStorage, StorageMetrics
from s3queue_async.storage.open import storage_from_url
from s3queue_async.storage.plugin import PluginStorage, plugin_prefix
from s3queue_async.storage.probe import PROBE_NAMESPACE
from s3queue_async.storage.throttle import ThrottledStorage
from s3queue_async.worker import Handler, HandlerFunction, Worker, payload_decoder

URL_VARIABLE = "S3QUEUE_URL"
BACKLOG_LOOK_S = 1.0
RESTART_PAUSE_MAX_S = 30.0
LIVE_WITHIN_S = 30.0
NAME_LENGTH_MAX = 100

if TYPE_CHECKING:
    import typing_extensions

    PayloadT = typing_extensions.TypeVar("PayloadT", default=Any)
else:
    PayloadT = TypeVar("PayloadT")
HandlerT = TypeVar("HandlerT", bound=HandlerFunction)
MiddlewareT = TypeVar("MiddlewareT", bound=Middleware)


class _Begun:
    """What was begun already may be awaited to see it end."""

    def __init__(self, wait: Callable[[], Awaitable[None]]) -> None:
        self._wait = wait

    def __await__(self) -> Generator[Any, Any, None]:
        return self._wait().__await__()


class S3Queue(Generic[PayloadT]):
    """A job queue in a bucket, a file, or memory.

    Use it as an async context manager; leaving it drains. A queue object that has no handler and does not receive
    registers no worker: producing costs nothing but its writes.

    Args:
        url: ``s3://bucket/prefix?endpoint_url=...&region=...``, ``sqlite:///path/queue.db?name=...`` or
            ``memory://name``; by default what S3QUEUE_URL says.
        payload_type: What payloads are; checked before anything is written, and decoded to.
        settings: See Settings; every S3QUEUE_<NAME> of the environment replaces a setting left at its default.
        storage: An object of your own that satisfies the Storage protocol, instead of a url.
        on_message: A handler, as if registered with ``handler()``.
        on_error: Called with each MessageRetry and MessageDead event.
        on_complete: Called with each MessageCompleted event.
        auto_start: Start processing as soon as the queue is open and a handler is there.
        concurrency: Of ``on_message``.
        middleware: Called around the handler, the first one outermost; see ``middleware()``.
        tracing: Follows messages from their enqueue to their handler, such as OpenTelemetryTracing.
        count_backlog: Whether the ``metrics`` event carries the backlog, which takes three listings or more; None:
            in the process that coordinates, and in a worker that sees no coordinator.
        keyring: Encrypts what is written, and decrypts what is read (extra ``encryption``); None: the keys of
            S3QUEUE_ENCRYPTION_KEYS, and no encryption where that is not set.
        scheduler: Whether this process enqueues what is scheduled; None: while its handler runs.
        clock, rng: Local time and chance, for tests and simulation.

    Raises:
        InvalidURL: The url cannot be understood.
        UnknownSetting, InvalidSettings: An S3QUEUE_ variable is wrong, or an extra that a setting needs is missing.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        payload_type: type[PayloadT] | Any = Any,
        settings: Settings | None = None,
        storage: Storage | None = None,
        on_message: HandlerFunction | None = None,
        on_error: Callable[[Any], Any] | None = None,
        on_complete: Callable[[Any], Any] | None = None,
        auto_start: bool = True,
        concurrency: int = 10,
        middleware: Iterable[Middleware] = (),
        tracing: Tracing | None = None,
        count_backlog: bool | None = None,
        keyring: Keyring | None = None,
        scheduler: bool | None = None,
        clock: Clock | None = None,
        rng: Random | None = None,
    ) -> None:
        self.settings = (Settings() if settings is None else settings).with_environment()
        if storage is None:
            url = url or os.environ.get(URL_VARIABLE)
            if not url:
                raise InvalidURL(f"No url was given, and {URL_VARIABLE} is not set.")
            storage = storage_from_url(url)
        self.url = url
        self._name = repr(storage)[:NAME_LENGTH_MAX] if url is None else url.partition("?")[0]
        self._decode = payload_decoder(payload_type)
        self._bus = EventBus()
        self._clock = SystemClock() if clock is None else clock
        self._random = SystemRandom() if rng is None else rng
        self._metered = MeteredStorage(storage, clock=self._clock)
        self._timed = TimedStorage(self._metered, self._clock)
        # A lease must not end because the store throttles, and requests that are spread out race with nobody.
        urgent = (plugin_prefix(layout.WORKERS), plugin_prefix(PROBE_NAMESPACE))
        self._storage = ThrottledStorage(
            self._timed,
            clock=self._clock,
            on_throttled=self._throttled,
            urgent=lambda key: key.startswith(urgent),
        )
        packer = Packer(
            compression=self.settings.compression,
            keyring=keyring_from_environment() if keyring is None else keyring,
            payload_bytes_max=self.settings.segment_bytes_max + self.settings.message_bytes_max,
            monotonic=self._clock.monotonic,
        )
        self._shared = Shared(
            self._storage,
            self._timed.time,
            self._clock,
            self._random,
            self.settings,
            self._bus,
            packer=packer,
            requests=self._metered.totals,
        )
        self._intake = Intake(payload_type, self._decode, self._timed.time, self.settings.message_bytes_max)
        self._producer = Producer(self._shared, hand_over=self)
        self._scheduler = Scheduler(
            self._shared,
            self._producer,
            self._intake,
            self._decode,
            leading=lambda: self.is_coordinator,
            led=lambda: self._session is not None and self._session.election.live,
            active=lambda: self._processing if scheduler is None else scheduler,
        )
        self._may_schedule = scheduler is not False
        self._inspector = Inspector(self._shared, self._decode, lambda: self._session)
        self._browser = Browser(self._shared, self._inspector, self._decode)
        self._watcher = Watcher(self._shared)
        self._meter = Meter(
            self._shared,
            self._metered,
            self._storage,
            lambda: self._session,
            self._inspector.by_priority,
            backlog=count_backlog,
        )
        self._tracing = tracing
        self._middleware = [checked_middleware(layer) for layer in middleware]
        self.dead_letters = DeadLetters(self._inspector, self._browser, self._working)
        self.coordinator = Coordinator(self._shared)
        self._auto_start = auto_start
        self._worker: Worker | None = None
        self._session: Session | None = None
        self._receiver: Receiver | None = None
        self._serving: anyio.Event | None = None
        self._visitors = 0
        self._stop_serving = self._serve_again = self._stays = self._processing = False
        self._stack: AsyncExitStack | None = None
        self._group: TaskGroup | None = None
        self._draining = False
        self._report: DrainReport | None = None
        self._drained = anyio.Event()
        self._backlog = (-BACKLOG_LOOK_S, 0)
        if on_error is not None:
            self._bus.on(MessageRetry.name, on_error)
            self._bus.on(MessageDead.name, on_error)
        if on_complete is not None:
            self._bus.on(MessageCompleted.name, on_complete)
        if on_message is not None:
            self._worker = Worker(self._wrapped(on_message), concurrency)

    # -- life ----------------------------------------------------------------------------------------------------

    async def __aenter__(self) -> Self:
        if self._stack is not None or self._report is not None:
            raise QueueClosed("This queue object was opened before.", suggestion="Make a new S3Queue to open it again.")
        async with AsyncExitStack() as stack:
            await self._storage.open()
            stack.push_async_callback(self._close_storage)
            await open_queue(self._shared)
            self.settings = self._shared.settings
            self._group = await stack.enter_async_context(anyio.create_task_group())
            with bound(queue=self.name):
                await self._group.start(self._producer.run)
                self._group.start_soon(self._bus.run)
                self._group.start_soon(self._meter.run)
                if self._may_schedule:
                    self._group.start_soon(self._scheduler.run)
            self._stack = stack.pop_all()
        if self._auto_start and self._worker is not None:
            self._process()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        stack = self._require_stack()
        assert self._group is not None
        try:
            with anyio.CancelScope(shield=True):
                await self.drain()
        finally:
            # Also when a second cancellation broke the drain off: no task outlives the block.
            # What the body raised goes on as it is; only a background task's failure comes as the group's.
            failed = self._group.cancel_scope.cancel_called
            self._bus.close()
            self._group.cancel_scope.cancel()
            self._stack = None
            await (stack.__aexit__(kind, error, trace) if failed else stack.aclose())

    async def _close_storage(self) -> None:
        with anyio.CancelScope(shield=True):
            await self._storage.close()

    def _require_stack(self) -> AsyncExitStack:
        if self._stack is None:
            raise QueueClosed("The queue is not open.")
        return self._stack

    def _require_open(self) -> TaskGroup:
        if self._stack is None or self._group is None:
            raise QueueClosed("The queue is not open.")
        if self._draining:
            raise QueueClosed("The queue drains or is drained.")
        return self._group

    async def drain(self, timeout: float | timedelta | None = None) -> DrainReport:
        """Stop claiming, let running handlers end, hand back the rest, flush enqueues under way, deregister.

        Args:
            timeout: Seconds for which running handlers may go on; then they are cancelled and their messages
                handed back. None: ``drain_timeout``. Heartbeats go on until everything is settled.

        Returns:
            What was done. Calling it again returns the same report. A caller that is cancelled stops waiting only.

        Raises:
            QueueClosed: The queue was never opened.
        """
        if self._report is not None:
            return self._report
        self._require_stack()
        timeout_s = self.settings.drain_timeout if timeout is None else seconds("timeout", timeout)
        if not self._draining:
            assert self._group is not None
            self._draining = True
            # In the queue's own group: a caller that is cancelled stops waiting, and the drain goes on.
            with bound(queue=self.name):
                self._group.start_soon(self._drain, timeout_s)
        return await self._end_of_drain()

    async def _drain(self, timeout_s: float) -> None:
        began = self._clock.monotonic()
        flushed = 0
        stopped = _Stopped(clean=False)

        async def flush() -> None:
            nonlocal flushed
            flushed = await self._producer.close()

        try:
            async with anyio.create_task_group() as group:
                group.start_soon(flush)
                if self._may_schedule:
                    group.start_soon(self._scheduler.stop)
                stopped = await self._stop(timeout_s)
        finally:
            self._report = DrainReport(
                finished=stopped.finished,
                handed_back=stopped.handed_back,
                cancelled=stopped.cancelled,
                flushed=flushed,
                clean=stopped.clean,
                elapsed=self._clock.monotonic() - began,
            )
            self._drained.set()

    async def _end_of_drain(self) -> DrainReport:
        await self._drained.wait()
        assert self._report is not None
        return self._report

    async def run(self) -> DrainReport:
        """Serve until SIGTERM or SIGINT arrives, or the queue is drained elsewhere; then drain.

        Opens the queue first where that is not done yet. A second signal cancels running handlers at once.
        """
        if self._stack is None:
            async with self:
                return await self.run()
        self._require_open()
        if self._worker is not None:
            self._process()
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with anyio.create_task_group() as group:

                async def on_signal() -> None:
                    async for signum in signals:
                        log.info("signal received, draining", signal=signal.Signals(signum).name, queue=self.name)
                        if self._draining:
                            self._cancel_running()
                        else:
                            group.start_soon(self.drain)

                group.start_soon(on_signal)
                report = await self._end_of_drain()
                group.cancel_scope.cancel()
        return report

    # -- producing -----------------------------------------------------------------------------------------------

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
        """Put a message into the queue and return its id once it is durable.

        Args:
            payload: What msgspec encodes, or ``bytes`` as they are.
            priority: 0 (last) to 255 (first).
            delay: Seconds (or timedelta) until it may be delivered; up to ten years.
            deliver_at: The same as a point in time, an aware datetime; not together with ``delay``.
            dedup_id: A second message with the same id within ``dedup_window`` is not enqueued; the id of the first
                one is returned.
            headers: Text that goes along with the message, at most 16 KiB in all.
            max_attempts: 1 to 10,000, instead of the queue's ``max_attempts``.
            expires_in: Seconds (or timedelta) after which it is not started any more, but becomes a dead letter.

        Returns:
            The message's id.

        Raises:
            InvalidPayload, InvalidPriority, InvalidSettings, MessageTooLarge: Nothing was written.
            QueueFull: The backlog reached ``max_pending``; nothing was written.
            QueueClosed: The queue is not open, or drains.
            StoreUnavailable: The store did not confirm the write; its text says whether it may have been written.
        """
        self._require_open()
        due_ms = self._intake.due_ms(delay, deliver_at)
        options = self._intake.options(priority, self._outgoing(headers), max_attempts, expires_in)
        entry = self._intake.entry(payload, options, dedup_id)
        if self.settings.max_pending is not None:
            await self._check_room(1)
        return await self._producer.enqueue(entry, priority, due_ms)

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
        """Put many messages into the queue; the payloads are taken as they are written, in bounded memory.

        Args:
            payloads: A (lazy, if you like) iterable or async iterable.
            dedup_id: A function from payload to deduplication id.
            priority, delay, deliver_at, headers, max_attempts, expires_in: Of every message, as in ``enqueue``.

        Returns:
            The ids in the order of the payloads.

        Raises:
            As ``enqueue``. Messages of segments written before the failure stay in the queue; the error's
            ``enqueued_ids`` has their ids.
        """
        self._require_open()
        if isinstance(dedup_id, str):
            raise InvalidSettings("dedup_id of enqueue_many must be a function from payload to id, not one id for all.")
        due_ms = self._intake.due_ms(delay, deliver_at)
        options = self._intake.options(priority, self._outgoing(headers), max_attempts, expires_in)
        make = self._intake.entry
        writes = BulkWriter(self._producer, priority, due_ms)
        limited = self.settings.max_pending is not None

        async def add(payload: PayloadT) -> None:
            entry = make(payload, options, None if dedup_id is None else dedup_id(payload))
            if limited:
                await self._check_room(1)
            if dedup_id is not None:
                await writes.append_once(entry)
            elif writes.append(entry):
                await writes.turn()

        try:
            if isinstance(payloads, AsyncIterable):
                async for payload in payloads:
                    await add(payload)
            elif limited or dedup_id is not None:
                for payload in payloads:
                    await add(payload)
            else:
                await writes.extend(make(payload, options) for payload in payloads)
            return await writes.finish()
        except Exception as error:
            with anyio.CancelScope(shield=True):
                error.enqueued_ids = await writes.ids_written()  # type: ignore[attr-defined]  # told to the caller
            raise

    async def schedule(
        self, cron: str | None = None, payload: PayloadT | None = None, **options: Unpack[ScheduleOptions]
    ) -> Schedule:
        """Have a message enqueued at certain times, once each, whichever processes run; kept in the store.

        Call it at every start: what is there already stays as it is, and a new definition of the same name replaces
        the old one.

        Args:
            cron: Five fields as for cron, or six with seconds first; needs the extra ``schedule``. Or instead:
            every: Seconds (or timedelta), from 1 second to 366 days, counted from the first definition.
            payload: As for ``enqueue``.
            name: What tells schedules apart, up to 200 characters; by default made of everything else.
            timezone: In which cron is meant, a name of the IANA database; by default "UTC".
            priority, headers, max_attempts, expires_in: Of each message, as in ``enqueue``.
            grace: Seconds (or timedelta), from 1 second to 30 days, by default an hour: a tick that nobody enqueued for
                so long is dropped.
            catch_up: Whether of several missed ticks each is enqueued, or only the last (the default).

        Returns:
            The schedule; its ``next_tick`` says when it is due.

        Raises:
            InvalidSettings: An argument is out of its range, or cron or timezone cannot be understood.
            InvalidPayload, InvalidPriority, MessageTooLarge: As ``enqueue``.
            StoreUnavailable: The store did not confirm it.
        """
        self._require_open()
        return await self._scheduler.add(cron, payload, options)

    async def schedules(self) -> list[Schedule]:
        """Every schedule of the queue, by name."""
        self._require_stack()
        return await self._scheduler.list()

    async def unschedule(self, name: str) -> bool:
        """Remove a schedule; False when there is none of that name. What was enqueued stays."""
        self._require_open()
        return await self._scheduler.remove(name)

    def _outgoing(self, headers: Mapping[str, str] | None) -> Mapping[str, str] | None:
        return headers if self._tracing is None else self._tracing.outgoing(headers)

    async def _check_room(self, count: int) -> None:
        most = self.settings.max_pending
        assert most is not None
        looked_at, known = self._backlog
        now = self._clock.monotonic()
        if now - looked_at >= BACKLOG_LOOK_S:
            known = await self._inspector.backlog(stop_at=most) + self._producer.unwritten
            looked_at = now
        if known + count > most:
            self._backlog = (looked_at, known)
            raise QueueFull(f"The backlog has reached max_pending={most}.")
        self._backlog = (looked_at, known + count)

    # -- hand-over: what the producer tells this process's worker ------------------------------------------------

    def expect(self, key: layout.SegmentKey) -> Expected | None:
        """A segment is about to be written here; an idle worker of this process claims it meanwhile."""
        return None if self._session is None else self._session.claimer.expect(key)

    def offer(self, key: layout.SegmentKey, index: Any, payloads: Sequence[bytes], *, shown_at: float) -> None:
        """A segment was written here; an idle worker of this process takes it from memory."""
        if self._session is not None:
            self._session.claimer.offer(key, index, payloads, shown_at=shown_at)

    def notice_due(self, due_ms: int) -> None:
        """A delayed segment was written here."""
        if self._session is not None:
            self._session.claimer.notice_due(due_ms)

    # -- consuming -----------------------------------------------------------------------------------------------

    @overload
    def handler(self, function: HandlerT) -> HandlerT: ...

    @overload
    def handler(self, *, concurrency: int = 10) -> Callable[[HandlerT], HandlerT]: ...

    def handler(
        self, function: HandlerT | None = None, *, concurrency: int = 10
    ) -> HandlerT | Callable[[HandlerT], HandlerT]:
        """Register the function below as the queue's handler, and start processing (unless auto_start is False).

        Args:
            concurrency: How many messages it handles at a time, 1 to 10,000.

        Raises:
            InvalidSettings: It cannot be called with a payload, or there is a handler already.
        """

        def register(function: HandlerT) -> HandlerT:
            self._set_worker(function, concurrency)
            if self._auto_start and self._stack is not None:
                self._process()
            return function

        return register if function is None else register(function)

    def middleware(self, layer: MiddlewareT) -> MiddlewareT:
        """Call the function below around the handler, inside those that were registered before.

        It is ``async (message, call_next)``, sees the payload and the context in ``message``, returns what
        ``await call_next(message)`` returns or something else, and may raise whatever a handler may. What is received
        with ``receive`` or ``consume`` does not pass it.

        Raises:
            InvalidSettings: It cannot be called like that, or the handler runs already.
        """
        checked = checked_middleware(layer)
        if self._processing:
            raise InvalidSettings(
                "The handler runs already.", suggestion="Register middleware before the handler, or stop_processing()."
            )
        self._middleware.append(checked)
        if self._worker is not None:
            self._worker = Worker(self._wrapped(self._worker.handler.function), self._worker.concurrency)
        return layer

    def start_processing(self, handler: HandlerFunction | None = None, *, concurrency: int = 10) -> Awaitable[None]:
        """Start processing with this handler, or the one that is registered.

        Returns:
            Await it to go on once the worker is registered; it starts either way.
        """
        self._require_open()
        if handler is not None:
            self._set_worker(handler, concurrency)
        if self._worker is None:
            raise InvalidSettings("There is no handler.", suggestion="Pass one, or register it with @queue.handler().")
        self._process()
        return _Begun(self._until_registered)

    def stop_processing(self) -> Awaitable[None]:
        """Stop claiming, let running handlers end, hand back the rest, deregister; enqueueing goes on.

        Returns:
            Await it to go on once that is done; it begins either way.
        """
        group = self._require_open()
        done = anyio.Event()
        stopping = self._begin_to_stop()

        async def stop() -> None:
            try:
                await self._end_of(stopping, self.settings.drain_timeout)
            finally:
                done.set()

        group.start_soon(stop)
        return _Begun(done.wait)

    async def receive(
        self,
        max_messages: int = 10,
        *,
        wait: float | timedelta = 20,
        ack_within: float | timedelta | None = None,
    ) -> list[Message[PayloadT]]:
        """Take up to ``max_messages`` messages, to be acknowledged explicitly.

        Args:
            max_messages: 1 to 1,000.
            wait: Seconds (or timedelta) to wait for the first one, 0 to 3,600; 0 looks once.
            ack_within: Seconds (or timedelta) after which a message that is not acknowledged is delivered again, up
                to 30 days; None: ``visibility_timeout``. As long as this process lives, that is: when it is lost, its
                messages go to others after ``visibility_timeout`` in any case.

        Returns:
            The messages; an empty list when there were none.
        """
        wait_s = checked_receive(max_messages, wait)
        ack_within_s = self.settings.visibility_timeout if ack_within is None else checked_ack_within(ack_within)
        self._require_open()
        self._stays = True
        receiver = await self._receiving()
        return await receiver.receive(max_messages, wait_s, ack_within_s)

    async def consume(self) -> AsyncIterator[Message[PayloadT]]:
        """Every message as it comes, one at a time, until the queue drains; acknowledge each."""
        while not self._draining and self._stack is not None:
            for message in await self.receive(1, wait=1.0):
                yield message

    async def process_next(self) -> bool:
        """Handle one message with the registered handler, and settle it before returning; False when there is none.

        For Lambda functions and scripts; make the queue with ``auto_start=False`` then.
        """
        self._require_open()
        if self._worker is None:
            raise InvalidSettings("There is no handler.", suggestion="Register one with @queue.handler().")
        self._stays = True
        await self._receiving()
        session = self._session
        if session is None:
            return False
        return await self._worker.process_next(session)

    def _set_worker(self, function: HandlerFunction, concurrency: int) -> None:
        if self._worker is not None and self._processing:
            raise InvalidSettings(
                f"The queue has the handler {self._worker.handler.name} already.",
                suggestion="Call stop_processing() first, or tell messages apart inside one handler.",
            )
        self._worker = Worker(self._wrapped(function), concurrency)

    def _wrapped(self, function: HandlerFunction) -> Handler:
        return make_handler(function, self._decode, self._tracing, self._middleware, self._shared)

    async def _receiving(self) -> Receiver:
        self._serve()
        while self._stop_serving or self._session is None or not self._session.at_work or self._receiver is None:
            await self._until_registered()
            self._serve()
        return self._receiver

    async def _until_registered(self) -> None:
        """Return once a worker is registered, or nobody wants one any more."""
        while self._serving is not None:
            session = self._session
            # One that cannot register is followed by another.
            if not self._stop_serving and session is not None and not session.is_over and await session.registered():
                return
            self._require_open()
            await self._clock.sleep(0.01)

    @asynccontextmanager
    async def _working(self) -> AsyncIterator[Session]:
        """A session for work that is no handler's; one made for such work alone ends with the last of it."""
        self._require_open()
        self._visitors += 1
        try:
            await self._receiving()
            assert self._session is not None
            yield self._session
        finally:
            self._visitors -= 1
            if not self._visitors and not self._stays and not self._draining:
                with anyio.CancelScope(shield=True):
                    await self._stop(self.settings.drain_timeout)

    def _serve(self) -> None:
        """Have one session at a time from now on, until stopped."""
        group = self._require_open()
        if self._serving is None:
            self._stop_serving = False
            self._serving = anyio.Event()
            group.start_soon(self._run_sessions, self._serving)
        elif self._stop_serving:
            self._serve_again = True

    def _process(self) -> None:
        """Have the registered handler run, in the session that is there or the one that is begun for it."""
        assert self._worker is not None
        if self._processing:
            return
        self._processing = self._stays = True
        self._scheduler.wake()
        self._serve()
        # One that is being stopped is followed by another, which begins with the handler.
        if self._session is not None and not self._stop_serving:
            self._session.start_worker(self._worker.concurrency, self._worker.start)

    async def _run_sessions(self, over: anyio.Event) -> None:
        bind(queue=self.name)
        tries = 0
        try:
            while not self._stop_serving:
                session = Session(self._shared, self._new_worker_id(), capacity=0)
                self._session = session
                self._receiver = Receiver(session, self._decode)
                if self._worker is not None and self._processing:
                    session.start_worker(self._worker.concurrency, self._worker.start)
                began = self._clock.monotonic()
                try:
                    await session.run()
                except (StoreUnavailable, Throttled) as error:
                    log.error("the worker cannot register, trying again", error=str(error))
                    tries = 0 if self._clock.monotonic() - began > RESTART_PAUSE_MAX_S else tries + 1
                    if not self._stop_serving:
                        await self._clock.sleep(min(RESTART_PAUSE_MAX_S, 0.2 * 2.0 ** min(tries, 10)))
        finally:
            self._session = None
            self._receiver = None
            self._serving = None
            over.set()
        if self._serve_again and not self._draining:
            self._serve_again = False
            self._serve()

    async def _stop(self, timeout_s: float) -> _Stopped:
        """End the session for good; what runs may go on for so long."""
        return await self._end_of(self._begin_to_stop(), timeout_s)

    def _begin_to_stop(self) -> tuple[anyio.Event | None, Session | None]:
        """Want no session any more; whoever wants one from now on gets the next. Returns what is to end."""
        self._stop_serving = True
        self._serve_again = self._stays = self._processing = False
        return self._serving, self._session

    async def _end_of(self, stopping: tuple[anyio.Event | None, Session | None], timeout_s: float) -> _Stopped:
        over, session = stopping
        if over is None or session is None:
            return _Stopped()
        finished_before, handed_back_before = session.feed.finished, session.handed_back
        cancelled = 0

        def stop_running() -> int:
            nonlocal cancelled
            cancelled = self._cancel_running()
            return cancelled

        clean = await session.drain(stop_running=stop_running, timeout_s=timeout_s)
        await over.wait()
        finished = max(0, session.feed.finished - finished_before - cancelled)
        return _Stopped(finished, session.handed_back - handed_back_before, cancelled, clean)

    def _cancel_running(self) -> int:
        if self._session is not None:
            self._session.start_no_more()
        count = 0 if self._worker is None else self._worker.stop_running()
        return count + (0 if self._receiver is None else self._receiver.stop())

    def _new_worker_id(self) -> str:
        host = "".join(c if c.isalnum() or c == "-" else "-" for c in socket.gethostname())[:40] or "host"
        return f"{host}-{os.getpid()}-{self._random.getrandbits(40):010x}"

    # -- looking and operating -----------------------------------------------------------------------------------

    async def stats(self, *, exact: bool = False) -> QueueStats:
        """Count the queue's messages.

        Args:
            exact: List everything and read every claim; otherwise at most 10,000 segments of each kind are looked at.
        """
        self._require_stack()
        return await self._inspector.stats(exact=exact)

    async def status(self, message_id: str) -> MessageStatus:
        """Where a message is; completed ones are known while ``retain_completed`` keeps them, and briefly without."""
        self._require_stack()
        return await self._inspector.status(message_id)

    async def results(self, message_id: str) -> Any:
        """What the handler returned for a completed message.

        Raises:
            MessageNotFound: It is not completed, not known, or not kept (see ``retain_completed``).
        """
        self._require_stack()
        completed = await self._inspector.result(message_id)
        if completed is None:
            raise MessageNotFound(f"There is no result of {message_id!r}.")
        return completed.result

    async def history(self, *, limit: int = LIST_LIMIT_DEFAULT) -> list[CompletedMessage]:
        """Up to ``limit`` completed messages, newest first; empty unless ``retain_completed`` is set."""
        self._require_stack()
        return await self._inspector.history(whole_number("limit", limit, 1, LIST_LIMIT_MAX))

    async def purge(self, *, on_progress: Callable[[int], None] | None = None) -> int:
        """Delete every message that waits, delayed ones included; those that are being handled stay. Returns how many.

        Args:
            on_progress: Told now and then how many went so far.
        """
        self._require_stack()
        return await self._inspector.purge(layout.READY, layout.DELAYED, on_progress=on_progress)

    async def show(self, message_id: str) -> MessageInfo:
        """Everything that is stored about a message; as cheap as ``status``.

        Raises:
            MessageNotFound: It is not in the queue, and not in the history.
        """
        self._require_stack()
        return await self._browser.show(message_id)

    async def browse(
        self, *places: str, priority: int | None = None, limit: int | None = None
    ) -> AsyncIterator[MessageInfo]:
        """Messages as they are stored, in the order of their delivery, roughly; nothing is claimed.

        Args:
            places: ``ready``, ``delayed`` and ``dead``, in the order in which they are to come; none: the first two.
            priority: Only messages of this priority, 0 to 255; None for all.
            limit: So many at most; None for all, in bounded memory however many there are.
        """
        self._require_stack()
        async for info in self._browser.up_to(limit, places, priority):
            yield info

    def follow(self) -> Follower:
        """What comes into the queue from now on, however many processes put it there: ask it again and again."""
        self._require_stack()
        return Follower(self._shared, self._browser, self._inspector)

    async def overview(self) -> Overview:
        """Counts, backlog by priority, workers and coordinator in one look, for who looks again and again.

        Takes four listings or more, and reads the heartbeats that changed since this object's last look.
        """
        self._require_stack()
        return await self._watcher.look(await self.coordinator.show())

    def plugin_storage(self, namespace: str, *, ttl: float | timedelta | None = None) -> PluginStorage:
        """A storage of your own beside the queue's messages, under ``plugin/<namespace>/``; usable while it is open.

        Args:
            namespace: One part of a key; not one of the library's own (docs/object_layout.md).
            ttl: Seconds (or timedelta) for which ``PluginStorage.expired`` takes an object for good; None: for ever.
        """
        return PluginStorage(self._storage, namespace, ttl_s=None if ttl is None else seconds("ttl", ttl))

    @property
    def packer(self) -> Packer:
        """What compresses and encrypts; for what adapters keep in a ``plugin_storage``, once the queue is open."""
        return self._shared.packer

    async def workers(self) -> list[WorkerInfo]:
        """Every registered worker of the queue."""
        self._require_stack()
        return await self._inspector.workers()

    def on(self, name: str, callback: Callable[[Any], Any]) -> Callable[[], None]:
        """Call ``callback`` with every event of that name ("*": all). It may be async; if it fails, that is logged.

        Returns:
            A function that ends it.
        """
        return self._bus.on(name, callback)

    def events(self) -> AsyncIterator[Event]:
        """Every event from now on; the oldest are dropped when the reader is more than 10,000 behind."""
        return self._bus.subscribe()

    def health(self) -> Health:
        """Is this process well? Looks at nothing but this process; may be awaited or not."""
        session = self._session
        now = self._clock.monotonic()
        last_beat = None if session is None else session.lease.last_beat
        progress = None if session is None else now - session.claimer.last_progress
        live = progress is None or progress < max(LIVE_WITHIN_S, 3 * self.settings.max_poll_interval)
        lacking = self._lacking()
        return Health(
            live=live,
            ready=not lacking,
            coordinator=self.is_coordinator,
            worker_id=self.worker_id,
            last_heartbeat=None if last_beat is None else now - last_beat,
            last_progress=progress,
            reason=lacking if live else f"the claim loop has not moved for {progress:.0f} s",
        )

    def _lacking(self) -> str:
        """What this process lacks to be ready; "" when it is."""
        session = self._session
        if self._stack is None:
            return "the queue is not open"
        if self._draining:
            return "the queue drains"
        if self._serving is None:
            return ""
        if session is None or session.lease.last_beat is None:
            return "the worker is not registered yet"
        if not session.lease.trusted:
            return "the worker's lease is over"
        known = session.coordination
        # Without a live board a worker lists for itself; it has decided so once it has looked, or found work anyhow.
        decided = known.board_live or session.finder.listed > 0 or known.claims_direct > 0
        return "" if decided or session.capacity == 0 else "the worker has not looked for work yet"

    def metrics(self) -> MetricsSnapshot:
        """This process's figures now; asks nothing of the store.

        Messages are counted from the first call on, or as long as somebody listens for the ``metrics`` event. The
        backlog is what the last of those events said.
        """
        return self._meter.look()

    def requests(self) -> StorageMetrics:
        """The requests that this process made of the store, by operation."""
        return self._metered.snapshot()

    @property
    def name(self) -> str:
        """What names the queue in logs: its url without parameters, or what its storage says."""
        return self._name

    @property
    def is_coordinator(self) -> bool:
        """Whether this process coordinates the queue's workers."""
        return self._session is not None and self._session.election.leading

    @property
    def worker_id(self) -> str | None:
        """The id of this process's worker; None while it has none."""
        return None if self._session is None or self._session.is_over else self._session.worker_id

    def _throttled(self, operation: str, wait_s: float) -> None:
        self._bus.emit(StoreThrottled(operation=operation, wait=wait_s))


class _Stopped(msgspec.Struct, frozen=True):
    finished: int = 0
    handed_back: int = 0
    cancelled: int = 0
    clean: bool = True
