"""What users see of messages: the handler's context, explicit acknowledgement, outcomes, and reports."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Mapping
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Generic, Protocol, Self, TypeVar

import anyio
import msgspec

from s3queue_async.errors import InvalidSettings
from s3queue_async.settings import seconds

PayloadT = TypeVar("PayloadT")

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class Outcome(Exception):
    """Base of what a handler may raise to say what becomes of its message."""


class Retry(Outcome):
    """Raise it in a handler to have the message tried again.

    Args:
        delay: Seconds (or timedelta) until the next attempt; None for the usual backoff.
        reason: What the history and, after the last attempt, the dead letter say.
    """

    def __init__(self, *, delay: float | timedelta | None = None, reason: str = "") -> None:
        super().__init__(reason or "retry asked for")
        self.delay_s = None if delay is None else seconds("delay", delay)
        if self.delay_s is not None and self.delay_s < 0:
            raise InvalidSettings(f"delay={delay!r} must not be negative.")
        self.reason = reason


class DeadLetter(Outcome):
    """Raise it in a handler to move the message to the dead letters now.

    Args:
        reason: What the dead letter says.
    """

    def __init__(self, reason: str = "") -> None:
        super().__init__(reason or "dead-lettered by the handler")
        self.reason = reason or "dead-lettered by the handler"


class Release(Outcome):
    """Raise it in a handler to give the message back; the attempt does not count.

    Args:
        delay: Seconds (or timedelta) until somebody may take it again.
    """

    def __init__(self, *, delay: float | timedelta = 0.0) -> None:
        super().__init__("released")
        self.delay_s = seconds("delay", delay)
        if self.delay_s < 0:
            raise InvalidSettings(f"delay={delay!r} must not be negative.")


def moment(milliseconds: int) -> datetime:
    """Store time as an aware datetime."""
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


class Context:
    """What a handler may know about the message that it handles.

    Attributes:
        message_id: The id that ``enqueue`` returned.
        attempt: 1 for the first attempt.
        max_attempts: The attempt after which a failure makes it a dead letter.
        worker_id: Who handles it.
        enqueued_at: Store time of the enqueue.
        claimed_at: Store time at which this worker claimed it.
        headers: What the producer sent along.
        priority: 0..255.
        token: The fencing token: grows with every delivery of the message.
    """

    __slots__ = (
        "_claimed_ms",
        "_enqueued_ms",
        "_lease_lost",
        "attempt",
        "headers",
        "max_attempts",
        "message_id",
        "priority",
        "token",
        "worker_id",
    )

    def __init__(
        self,
        *,
        message_id: str,
        attempt: int,
        max_attempts: int,
        worker_id: str,
        enqueued_ms: int,
        claimed_ms: int,
        headers: Mapping[str, str] | None,
        priority: int,
        token: int,
        lease_lost: Callable[[], anyio.Event],
    ) -> None:
        self.message_id = message_id
        self.attempt = attempt
        self.max_attempts = max_attempts
        self.worker_id = worker_id
        self._enqueued_ms = enqueued_ms
        self._claimed_ms = claimed_ms
        self.headers = _NO_HEADERS if headers is None else headers
        self.priority = priority
        self.token = token
        self._lease_lost = lease_lost

    @property
    def enqueued_at(self) -> datetime:
        return moment(self._enqueued_ms)

    @property
    def claimed_at(self) -> datetime:
        return moment(self._claimed_ms)

    @property
    def lease_lost(self) -> anyio.Event:
        """Set when another worker may own the message; ``await context.lease_lost.wait()`` or ``.is_set()``."""
        return self._lease_lost()

    def __repr__(self) -> str:
        return f"Context({self.message_id!r}, attempt={self.attempt}/{self.max_attempts}, token={self.token})"


class Tracing(Protocol):
    """Follows messages from their enqueue to their handler; ``s3queue_async.otel`` has one."""

    def outgoing(self, headers: Mapping[str, str] | None) -> Mapping[str, str] | None:
        """The headers with which a message is enqueued: the producer's, and what ``handling`` wants to see again."""
        ...

    def handling(self, context: Context) -> AbstractContextManager[Any]:
        """Entered around each run of a handler, in whose context variables it runs; sees what the handler raises."""
        ...


Acknowledge = Callable[[BaseException | None], Awaitable[None]]


class Message(Generic[PayloadT]):
    """A received message, to be acknowledged explicitly.

    Each of the five verbs returns once the outcome is recorded with the store, may be called once, and raises
    LeaseLost when the message is not this receiver's any more.

    Attributes:
        payload: The decoded payload.
        context: As a handler would get it.
    """

    __slots__ = ("_settle", "context", "payload")

    def __init__(self, payload: PayloadT, context: Context, settle: Acknowledge) -> None:
        self.payload = payload
        self.context = context
        self._settle = settle

    @property
    def id(self) -> str:
        return self.context.message_id

    async def ack(self) -> None:
        """The message is done."""
        await self._settle(None)

    async def retry(self, *, delay: float | timedelta | None = None, reason: str = "") -> None:
        """Have it tried again after ``delay`` seconds (None: the usual backoff); counts as a failed attempt."""
        await self._settle(Retry(delay=delay, reason=reason))

    async def fail(self, error: BaseException) -> None:
        """Do what becomes of a message whose handler raises this error: another attempt, or a dead letter that has it."""
        await self._settle(error)

    async def dead_letter(self, reason: str = "") -> None:
        """Move it to the dead letters."""
        await self._settle(DeadLetter(reason))

    async def release(self, *, delay: float | timedelta = 0.0) -> None:
        """Give it back; the attempt does not count."""
        await self._settle(Release(delay=delay))

    def __repr__(self) -> str:
        return f"Message({self.payload!r}, {self.context!r})"


class MessageStatus(StrEnum):
    """Where a message is."""

    PENDING = "pending"
    DELAYED = "delayed"
    PROCESSING = "processing"
    COMPLETED = "completed"
    RETRYING = "retrying"
    DEAD = "dead"
    UNKNOWN = "unknown"


class QueueStats(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of the queue, counted in messages.

    Attributes:
        pending: Claimable now and held by nobody.
        delayed: Not due yet, retries that wait for their backoff among them.
        processing: In segments that a worker holds.
        completed: Handled to the end, since the queue was created.
        retried: Attempts that led to another attempt, since the queue was created.
        failed: Attempts that failed, since the queue was created.
        dead: Dead letters now.
        total: pending + delayed + processing + completed + dead.
        workers: Registered workers.
        oldest_age: Seconds since the creation of the oldest pending segment; None when nothing is pending.
        complete: False when there were more keys than a quick look lists: the counts are lower bounds.
    """

    pending: int = 0
    delayed: int = 0
    processing: int = 0
    completed: int = 0
    retried: int = 0
    failed: int = 0
    dead: int = 0
    total: int = 0
    workers: int = 0
    oldest_age: float | None = None
    complete: bool = True


class DeadMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A dead letter.

    Attributes:
        id: The message's id.
        payload: Decoded; the raw bytes when they do not decode.
        error: One line: the exception's class and text, or the reason given.
        traceback: The end of the last traceback; "" when there was no exception.
        attempts: How many attempts were made.
        enqueued_at: Store time.
        died_at: Store time.
        headers: What the producer sent along.
        priority: 0..255.
    """

    id: str
    payload: Any
    error: str
    traceback: str
    attempts: int
    enqueued_at: datetime
    died_at: datetime
    headers: Mapping[str, str]
    priority: int


class CompletedMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A finished message in the history, kept while ``retain_completed`` says so.

    Attributes:
        id: The message's id.
        result: What the handler returned.
        attempts: Attempts it took.
        worker_id: Who handled it.
        enqueued_at: Store time.
        completed_at: Store time.
        duration: Seconds that the handler ran.
    """

    id: str
    result: Any
    attempts: int
    worker_id: str
    enqueued_at: datetime
    completed_at: datetime
    duration: float


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A registered worker as its last heartbeat describes it.

    Attributes:
        id: The worker's id, new for every start.
        capacity: Messages that it handles at a time.
        in_flight: Messages that it was handling.
        segments: Segments that it held or was trying to claim.
        completed: Messages completed since its start.
        heartbeat_age: Seconds since its last heartbeat.
        alive: False once its lease has run out.
        retried, failed, dead: Attempts that led to another one, attempts that failed, and dead letters since its start.
        handler_seconds: Seconds that the handlers of the completed messages ran, together.
        latency_seconds: Seconds from the enqueues of the completed messages to their ends, together.
        requests: Requests that its process made of the store, by operation.
        throttled: How many of them the store refused for being too many.
        reported_at: Store time of all these figures; None when no heartbeat told it.
    """

    id: str
    capacity: int
    in_flight: int
    segments: int
    completed: int
    heartbeat_age: float
    alive: bool
    retried: int = 0
    failed: int = 0
    dead: int = 0
    handler_seconds: float = 0.0
    latency_seconds: float = 0.0
    requests: Mapping[str, int] = {}
    throttled: int = 0
    reported_at: datetime | None = None


class DrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a drain did.

    Attributes:
        finished: Messages whose handlers ended during the drain.
        handed_back: Messages given back to the queue unstarted or cancelled.
        cancelled: Handlers that were cancelled because the timeout ran out.
        flushed: Messages of ``enqueue`` calls under way that were written.
        clean: True when everything was settled before the lease or the store went away.
        elapsed: Seconds that it took.
    """

    finished: int = 0
    handed_back: int = 0
    cancelled: int = 0
    flushed: int = 0
    clean: bool = True
    elapsed: float = 0.0


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Is this process well? Cheap and local; ``queue.health()`` may be awaited or not.

    Attributes:
        live: The claim loop moved lately (True where there is nothing to claim for).
        ready: Open, and where there is a worker: registered, with a lease that is trusted, and with a way to its work,
            which is a coordinator's board that is live or a look of its own.
        coordinator: Whether this process coordinates.
        worker_id: The id, or None without a worker.
        last_heartbeat: Seconds since the last heartbeat; None without one.
        last_progress: Seconds since the claim loop last moved; None without one.
        reason: Why it is not live, or else not ready; "" when it is both.
    """

    live: bool
    ready: bool
    coordinator: bool
    worker_id: str | None
    last_heartbeat: float | None
    last_progress: float | None
    reason: str = ""

    def __await__(self) -> Generator[Any, None, Self]:
        yield from ()
        return self
