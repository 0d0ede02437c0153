"""Runs handlers: concurrency, what becomes of a message by what its handler did, and the order of a shutdown."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Callable, Coroutine, Generator
from contextvars import Context as Variables
from contextvars import copy_context
from enum import Enum, auto
from typing import Any, Protocol

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec
from anyio.abc import TaskGroup

from s3queue_async.engine.held import Held
from s3queue_async.engine.session import Session
from s3queue_async.errors import InvalidSettings
from s3queue_async.events import LoopBlocked, MessageCompleted, MessageProcessing
from s3queue_async.log import ATTEMPT, MESSAGE, log
from s3queue_async.message import Context, DeadLetter, Outcome, Release, Retry, Tracing
from s3queue_async.protocol.segment import Codec, Failure, Record
from s3queue_async.settings import whole_number

CONCURRENCY_MAX = 10_000
BLOCKED_AFTER_S = 1.0
"""A handler that keeps the event loop for longer is named: heartbeats stand still meanwhile."""
YIELD_AFTER_S = 0.005
"""Handlers that never wait let others run after this long."""
TRACEBACK_MAX = 4096
TRUST_LOOK_AFTER_S = 0.1
"""The lease was looked at as a handler started; after one that took longer it is looked at again."""

HandlerFunction = Callable[..., Any]


class Decoder(Protocol):
    """Turns a payload's bytes into what handlers get."""

    def __call__(self, body: bytes, codec: int) -> Any: ...


def payload_decoder(payload_type: Any) -> Decoder:
    """A decoder of payloads of this type."""
    decoder = msgspec.msgpack.Decoder(payload_type)

    def decode(body: bytes, codec: int) -> Any:
        return body if codec == Codec.RAW else decoder.decode(body)

    return decode


class Handler:
    """A user's handler, looked at once.

    Args:
        function: ``async (payload, context)``, ``async (payload)``, or a sync function of either shape, which runs
            in a thread.
        decode: Turns bytes into payloads.
        tracing: Follows each message into the handler.

    Raises:
        InvalidSettings: It cannot be called with a payload.
    """

    def __init__(self, function: HandlerFunction, decode: Decoder, tracing: Tracing | None = None) -> None:
        self.function = function
        self.decode = decode
        self._tracing = tracing
        self.name: str = getattr(function, "__qualname__", repr(function))
        call = getattr(function, "__call__", None)  # noqa: B004 - the method itself is looked at, not whether it exists
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
        self._takes_context = _wants_context(function, self.name)
        self.wants_context = self._takes_context or tracing is not None

    def start(self, payload: Any, context: Context | None, limiter: anyio.CapacityLimiter) -> Coroutine[Any, Any, Any]:
        """The call, not begun yet."""
        if self._tracing is not None and context is not None:
            return self._traced(self._tracing, payload, context, limiter)
        return self._call(payload, context, limiter)

    def _call(self, payload: Any, context: Context | None, limiter: anyio.CapacityLimiter) -> Coroutine[Any, Any, Any]:
        if not self.is_async:
            return self._in_thread(payload, context, limiter)
        coroutine: Coroutine[Any, Any, Any] = (
            self.function(payload, context) if self._takes_context else self.function(payload)
        )
        return coroutine

    async def _traced(self, tracing: Tracing, payload: Any, context: Context, limiter: anyio.CapacityLimiter) -> Any:
        with tracing.handling(context):
            return await self._call(payload, context, limiter)

    async def _in_thread(self, payload: Any, context: Context | None, limiter: anyio.CapacityLimiter) -> Any:
        arguments = (payload, context) if self._takes_context else (payload,)
        return await anyio.to_thread.run_sync(self.function, *arguments, abandon_on_cancel=True, limiter=limiter)


def _wants_context(function: HandlerFunction, name: str) -> bool:
    if not callable(function):
        raise InvalidSettings(f"A handler must be callable, not {function!r}.")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    star = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    required = [p for p in positional if p.default is p.empty]
    keyword = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if (not positional and not star) or len(required) > 2 or keyword:
        raise InvalidSettings(
            f"The handler {name} cannot be called with (payload) or (payload, context).",
            suggestion="Give it one parameter for the payload and, if wanted, a second for the Context.",
        )
    if len(positional) < 2:
        return False
    second = positional[1]
    return second.default is second.empty or second.name in ("context", "ctx") or "Context" in str(second.annotation)


class _Stop(Enum):
    LOST = auto()
    TIMEOUT = auto()
    DRAIN = auto()


class Slot:
    """One of the places in which a handler can run."""

    __slots__ = ("reason", "task")

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task
        self.reason: _Stop | None = None

    def stop(self, reason: _Stop) -> None:
        """Cancel the handler that runs here, not the slot."""
        if self.reason is None:
            self.reason = reason
            self.task.cancel(reason)

    def clear(self) -> _Stop | None:
        """Why the handler was stopped, if it was; the slot may go on."""
        reason, self.reason = self.reason, None
        if reason is not None:
            self.task.uncancel()
        return reason


def timed_out(cancelled: asyncio.CancelledError) -> bool:
    """Whether a handler was cancelled because it exceeded ``handler_timeout``; for those that wrap handlers."""
    return bool(cancelled.args) and cancelled.args[0] is _Stop.TIMEOUT


class _Driven:
    """A handler's call that was begun and has to wait: awaiting it goes on with it, measuring each step."""

    __slots__ = ("blocked", "coroutine", "monotonic", "variables", "yielded")

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, Any],
        variables: Variables,
        yielded: Any,
        monotonic: Callable[[], float],
        blocked: Callable[[float], None],
    ) -> None:
        self.coroutine = coroutine
        self.variables = variables
        self.yielded = yielded
        self.monotonic = monotonic
        self.blocked = blocked

    def __await__(self) -> Generator[Any, Any, Any]:
        while True:
            try:
                sent = yield self.yielded
            except GeneratorExit:
                self.coroutine.close()
                raise
            except BaseException as error:  # noqa: BLE001 - thrown into the handler, as `yield from` would
                step: Callable[[Any], Any] = self.coroutine.throw
                sent = error
            else:
                step = self.coroutine.send
            began = self.monotonic()
            try:
                self.yielded = self.variables.run(step, sent)
            except StopIteration as stop:
                return stop.value
            finally:
                took_s = self.monotonic() - began
                if took_s > BLOCKED_AFTER_S:
                    self.blocked(took_s)


class Worker:
    """Runs one handler in ``concurrency`` slots on what a session holds.

    Args:
        handler: What to run.
        concurrency: How many messages at a time, 1 to 10,000.
    """

    def __init__(self, handler: Handler, concurrency: int) -> None:
        self.handler = handler
        self.concurrency = whole_number("concurrency", concurrency, 1, CONCURRENCY_MAX)
        self._limiter = anyio.CapacityLimiter(concurrency)
        self._busy: set[Slot] = set()

    def start(self, session: Session, group: TaskGroup) -> None:
        """Start the slots in the group that holds this session's work."""
        for _ in range(self.concurrency):
            group.start_soon(self._slot, session)

    @property
    def threads(self) -> int:
        """How many handlers run in threads."""
        return int(self._limiter.borrowed_tokens)

    def stop_running(self) -> int:
        """Cancel the handlers that run; their messages are handed back. Returns how many."""
        running = list(self._busy)
        for slot in running:
            slot.stop(_Stop.DRAIN)
        return len(running)

    async def _slot(self, session: Session) -> None:
        task = asyncio.current_task()
        assert task is not None
        slot = Slot(task)
        feed = session.feed
        monotonic = session.shared.clock.monotonic
        lease = session.lease
        now = ran_since = monotonic()
        while True:
            taken = feed.take() if lease.trusted_at(now) else None
            if taken is None:
                await feed.wait()
                now = ran_since = monotonic()
                continue
            if await self.run_one(session, slot, *taken):
                now = ran_since = monotonic()
                continue
            now = monotonic()
            if now - ran_since > YIELD_AFTER_S:
                session.claimer.poke()
                await anyio.lowlevel.checkpoint()
                now = ran_since = monotonic()

    async def process_next(self, session: Session) -> bool:
        """Handle one message here and now, and settle it; False when there is none."""
        task = asyncio.current_task()
        assert task is not None
        session.wanted_by_receivers += 1
        try:
            taken = session.take()
            if taken is None:
                await session.claimer.poll_once()
                taken = session.take()
        finally:
            session.wanted_by_receivers -= 1
        if taken is None:
            return False
        held, index = taken
        # This is the caller's task: what it logs afterwards is not about the message.
        before = MESSAGE.set(""), ATTEMPT.set(0)
        try:
            await self.run_one(session, Slot(task), held, index)
        finally:
            MESSAGE.reset(before[0])
            ATTEMPT.reset(before[1])
        await session.settler.flush(held)
        return True

    async def run_one(self, session: Session, slot: Slot, held: Held, index: int) -> bool:
        """Run the handler on one message and settle its outcome; says whether it had to wait for anything."""
        record = held.index.records[index]
        attempts = held.attempts(index) if held.isolated else record.attempts
        failure = None
        if attempts or record.expires_ms is not None:
            failure = refused(session, held, index, attempts)
        if failure is not None:
            session.feed.done(held)
            session.dead(held, index, attempts=attempts, failure=failure)
            session.slot_free()
            return False
        if held.isolated and not await session.started_alone(held, index):
            return True
        return await self._run(session, slot, held, index, attempts + 1)

    async def _run(self, session: Session, slot: Slot, held: Held, index: int, attempt: int) -> bool:
        handler = self.handler
        record = held.index.records[index]
        monotonic = session.shared.clock.monotonic
        began = monotonic()
        waited = False
        result: Any = None
        error: BaseException | None = None
        try:
            payload = handler.decode(held.payloads[index], record.codec)
        except (msgspec.DecodeError, msgspec.ValidationError) as invalid:
            error = DeadLetter(f"InvalidPayload: {invalid}")
        else:
            context = make_context(session, held, index, attempt) if handler.wants_context else None
            if session.shared.bus.wants(MessageProcessing.name):
                session.shared.bus.emit(
                    MessageProcessing(message_id=record.id, worker_id=session.worker_id, attempt=attempt)
                )
            try:
                coroutine = handler.start(payload, context, self._limiter)
                # A call that never waits is over after this one step, without a task or a timer of its own.
                MESSAGE.set(record.id)
                ATTEMPT.set(attempt)
                variables = copy_context()
                yielded = variables.run(coroutine.send, None)
            except StopIteration as stop:
                result = stop.value
            except KeyboardInterrupt:
                session.feed.done(held)
                raise
            except BaseException as raised:  # noqa: BLE001 - whatever a handler raises decides over its message
                error = raised
            else:
                waited = True
                driven = _Driven(
                    coroutine,
                    variables,
                    yielded,
                    monotonic,
                    lambda seconds: self._blocked(session, record.id, seconds),
                )
                result, error = await self._wait(session, slot, held, index, attempt, driven)
        took_s = monotonic() - began
        if not waited and took_s > BLOCKED_AFTER_S:
            self._blocked(session, record.id, took_s)
        session.feed.done(held)
        if held.lost is None:
            self._conclude(session, held, index, attempt, took_s, result, error)
        session.slot_free()
        return waited

    async def _wait(
        self, session: Session, slot: Slot, held: Held, index: int, attempt: int, driven: _Driven
    ) -> tuple[Any, BaseException | None]:
        """Await the handler; returns its result, or what it raised."""
        timeout_s = session.shared.settings.handler_timeout
        timer = None
        if timeout_s is not None:
            timer = asyncio.get_running_loop().call_later(timeout_s, slot.stop, _Stop.TIMEOUT)
        held.cancel[index] = lambda: slot.stop(_Stop.LOST)
        self._busy.add(slot)
        # This slot is taken for a while: the next one may start. Handlers that never wait need no second slot.
        session.feed.wake_next()
        try:
            result = await driven
        except asyncio.CancelledError as cancelled:
            reason = slot.clear()
            if slot.task.cancelling():
                # Not this handler alone is cancelled, but whoever runs it: the session is over, or process_next.
                if not self.handler.is_async:
                    session.keep_registered()
                session.feed.done(held)
                if held.lost is None:
                    session.released(held, index, attempts=attempt - 1)
                raise
            return None, self._stopped(session, reason, cancelled)
        except KeyboardInterrupt:
            session.feed.done(held)
            raise
        except BaseException as raised:  # noqa: BLE001 - whatever a handler raises decides over its message
            slot.clear()
            return None, raised
        finally:
            self._busy.discard(slot)
            held.cancel.pop(index, None)
            if timer is not None:
                timer.cancel()
        slot.clear()
        return result, None

    def _stopped(self, session: Session, reason: _Stop | None, cancelled: BaseException) -> BaseException:
        """What a handler that ended by cancellation counts as."""
        if reason is _Stop.TIMEOUT:
            return TimeoutError(f"the handler exceeded handler_timeout={session.shared.settings.handler_timeout:g} s")
        if reason is _Stop.DRAIN:
            return Release()
        # Without a reason of ours the handler cancelled itself: that is a failure like any other.
        return cancelled

    def _conclude(
        self,
        session: Session,
        held: Held,
        index: int,
        attempt: int,
        duration_s: float,
        result: Any,
        error: BaseException | None,
    ) -> None:
        if error is None:
            # A handler that outlasted the lease has done its work for nothing: the message is delivered again.
            in_time = duration_s < TRUST_LOOK_AFTER_S or session.lease.trusted
            session.finished(held, index, attempt=attempt, duration_s=duration_s, result=result, counts=in_time)
            if in_time:
                announce_completed(session, held.index.records[index], attempt, duration_s, result)
            return
        settle_error(session, held, index, attempt, error)

    def _blocked(self, session: Session, message_id: str, seconds: float) -> None:
        log.warning(
            "a handler blocked the event loop; run it in a thread (a sync function) or await more often",
            handler=self.handler.name,
            message=message_id,
            seconds=round(seconds, 3),
            worker=session.worker_id,
        )
        session.shared.bus.emit(LoopBlocked(handler=self.handler.name, message_id=message_id, seconds=seconds))


def make_context(session: Session, held: Held, index: int, attempt: int) -> Context:
    """What a handler may know of a held message."""
    record = held.index.records[index]
    return Context(
        message_id=record.id,
        attempt=attempt,
        max_attempts=record.max_attempts or session.shared.settings.max_attempts,
        worker_id=session.worker_id,
        enqueued_ms=record.enqueued_ms,
        claimed_ms=held.claim.claimed_ms,
        headers=record.headers,
        priority=held.index.priority,
        token=held.token(record),
        lease_lost=held.lost_event,
    )


def announce_completed(session: Session, record: Record, attempt: int, duration_s: float, result: Any) -> None:
    """Tell who listens that a message is done."""
    shared = session.shared
    if not shared.bus.wants(MessageCompleted.name):
        return
    shared.bus.emit(
        MessageCompleted(
            message_id=record.id,
            worker_id=session.worker_id,
            attempt=attempt,
            duration=duration_s,
            latency=max(0.0, (shared.time.now_ms() - record.enqueued_ms) / 1000),
            result=result,
        )
    )


def refused(session: Session, held: Held, index: int, attempts: int) -> Failure | None:
    """Why a message is not to be started at all, if so."""
    record = held.index.records[index]
    if attempts >= (record.max_attempts or session.shared.settings.max_attempts):
        lost = "WorkerLost: the worker was lost each time it handled this message"
        return record.failure or Failure(lost, "", session.shared.time.now_ms())
    if record.expires_ms is not None and record.expires_ms < session.shared.time.now_ms():
        return Failure("Expired: it was not started before expires_in was over", "", session.shared.time.now_ms())
    return None


def settle_error(session: Session, held: Held, index: int, attempt: int, error: BaseException) -> None:
    """Retry, dead letter or release, by what was raised."""
    record = held.index.records[index]
    now_ms = session.shared.time.now_ms()
    max_attempts = record.max_attempts or session.shared.settings.max_attempts
    match error:
        case Release():
            session.released(held, index, attempts=attempt - 1, delay_s=error.delay_s)
        case DeadLetter():
            session.dead(held, index, attempts=attempt, failure=Failure(error.reason, "", now_ms))
        case Retry():
            session.retry(
                held,
                index,
                attempt=attempt,
                max_attempts=max_attempts,
                delay_s=error.delay_s,
                failure=Failure(f"Retry: {error}", "", now_ms),
            )
        case _:
            session.retry(
                held,
                index,
                attempt=attempt,
                max_attempts=max_attempts,
                delay_s=None,
                failure=Failure(_one_line(error), _traceback(error), now_ms),
            )


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    name = type(error).__name__
    return f"{name}: {text}"[:500] if text else name


def _traceback(error: BaseException) -> str:
    if isinstance(error, Outcome):
        return ""
    return "".join(traceback.format_exception(error))[-TRACEBACK_MAX:]
