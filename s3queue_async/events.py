"""What happens in a queue, as plain events, and the bus that carries them to whoever listens."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, ClassVar

import msgspec

from s3queue_async.errors import InvalidSettings
from s3queue_async.log import log
from s3queue_async.wakeup import Wakeup

EVENT_BUFFER = 10_000
"""Events kept for a slow reader of ``queue.events()`` or a slow async callback; the oldest are dropped beyond."""


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """Base of all events; ``name`` says which. Nobody changes one: all who listen get the same object."""

    name: ClassVar[str] = ""


class MessageEnqueued(Event, frozen=True):
    """A message is durable in the queue."""

    name: ClassVar[str] = "message.enqueued"
    message_id: str
    priority: int
    delayed: bool


class MessageClaimed(Event, frozen=True):
    """This worker holds the message."""

    name: ClassVar[str] = "message.claimed"
    message_id: str
    worker_id: str
    token: int


class MessageProcessing(Event, frozen=True):
    """The handler starts."""

    name: ClassVar[str] = "message.processing"
    message_id: str
    worker_id: str
    attempt: int


class MessageCompleted(Event, frozen=True):
    """The message is finished and will not be delivered again.

    Attributes:
        duration: Seconds from the handler's start, or from ``receive()``, to the end.
        latency: Seconds from the enqueue to the end, by the store's time.
    """

    name: ClassVar[str] = "message.completed"
    message_id: str
    worker_id: str
    attempt: int
    duration: float
    latency: float
    result: Any


class MessageRetry(Event, frozen=True):
    """An attempt failed; another one follows in ``delay`` seconds."""

    name: ClassVar[str] = "message.retry"
    message_id: str
    worker_id: str
    attempt: int
    delay: float
    error: str


class MessageDead(Event, frozen=True):
    """The message is a dead letter now."""

    name: ClassVar[str] = "message.dead"
    message_id: str
    worker_id: str
    attempts: int
    error: str


class WorkerStarted(Event, frozen=True):
    """A worker is registered and begins to claim."""

    name: ClassVar[str] = "workers.started"
    worker_id: str
    capacity: int


class WorkerStopped(Event, frozen=True):
    """A worker has settled what it held and is not registered any more."""

    name: ClassVar[str] = "workers.stopped"
    worker_id: str
    reason: str


class CoordinatorPromoted(Event, frozen=True):
    """This process coordinates from now on."""

    name: ClassVar[str] = "coordinator.promoted"
    worker_id: str
    term: int


class CoordinatorDemoted(Event, frozen=True):
    """This process does not coordinate any more."""

    name: ClassVar[str] = "coordinator.demoted"
    worker_id: str
    term: int
    reason: str


class LeaseLostEvent(Event, frozen=True):
    """Another worker may own these messages; their handlers are cancelled and nothing of them is settled."""

    name: ClassVar[str] = "lease.lost"
    worker_id: str
    message_ids: list[str]
    reason: str


class StoreThrottled(Event, frozen=True):
    """The store asked for fewer requests."""

    name: ClassVar[str] = "s3.throttled"
    operation: str
    wait: float


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """How long something took.

    Attributes:
        count: Messages since the counting began.
        total: Seconds of all of them together.
        p50, p95, p99: Seconds that 50, 95 and 99 % of the interval's messages did not exceed, give or take 3 %;
            None when there were none.
    """

    count: int = 0
    total: float = 0.0
    p50: float | None = None
    p95: float | None = None
    p99: float | None = None


class MetricsSnapshot(Event, frozen=True):
    """The figures of one process; those of messages count from when somebody first wanted them.

    Attributes:
        worker_id: This process's worker; None without one.
        interval: Seconds that the rates and quantiles are about.
        active_workers: Registered workers, as this process last saw them; 0 without a worker here.
        is_coordinator: Whether this process coordinates.
        term: The latest term of a coordinator that this process saw.
        tickets_available: Tickets that nobody has claimed yet, as last seen.
        tickets_claimed: Segments that this process's worker claimed by a ticket.
        tickets_stalled: Tickets that this process took back as coordinator, because nobody claimed them.
        claims_direct: Segments that this process's worker claimed without a ticket.
        claims_wasted: Claims that it tried and somebody else had made.
        poll_interval: Seconds between two of its looks for work, now.
        enqueued, processed, retried, dead: Messages that this process enqueued, completed, sent into another attempt,
            and made dead letters.
        processing_rate: Messages completed a second.
        handler_latency: From the handler's start to its end, of completed messages.
        end_to_end_latency: From the enqueue to the completion, by the store's time; delays and retries included.
        s3_requests: Requests of the store by operation, since the queue object was made.
        s3_ops_per_second: The same, a second.
        throttling_errors: Requests that the store refused for being too many.
        throttled_waits: Requests that waited before they were sent, because of such a refusal.
        throttled_wait_seconds: How long they waited, together.
        segment_bytes_before: Bytes of the segments that this process compressed or encrypted, as they would be without.
        segment_bytes_stored: Bytes of the same segments, as they were stored.
        packing_seconds: Spent on compression and encryption, both ways.
        backlog: Messages that are ready or due and held by nobody, by priority: 0 and each that was seen; None where
            this process did not count.
        delayed: Messages that are not due yet; None where this process did not count.
        held: Messages of segments that workers hold, whole segments until they are settled; None where this process did
            not count.
        cost_dollars: What ``s3_requests`` cost at S3's list prices.
        cost_per_million: Dollars for a million messages: the interval's cost over the messages that this process
            completed, or enqueued where those are more; None when there were none.
    """

    name: ClassVar[str] = "metrics"
    worker_id: str | None = None
    interval: float = 0.0
    active_workers: int = 0
    is_coordinator: bool = False
    term: int = 0
    tickets_available: int = 0
    tickets_claimed: int = 0
    tickets_stalled: int = 0
    claims_direct: int = 0
    claims_wasted: int = 0
    poll_interval: float = 0.0
    enqueued: int = 0
    processed: int = 0
    retried: int = 0
    dead: int = 0
    processing_rate: float = 0.0
    handler_latency: Latency = Latency()
    end_to_end_latency: Latency = Latency()
    s3_requests: dict[str, int] = {}
    s3_ops_per_second: dict[str, float] = {}
    throttling_errors: int = 0
    throttled_waits: int = 0
    throttled_wait_seconds: float = 0.0
    segment_bytes_before: int = 0
    segment_bytes_stored: int = 0
    packing_seconds: float = 0.0
    backlog: dict[int, int] | None = None
    delayed: int | None = None
    held: int | None = None
    cost_dollars: float = 0.0
    cost_per_million: float | None = None


class LoopBlocked(Event, frozen=True):
    """A handler kept the event loop from running; heartbeats stand still meanwhile."""

    name: ClassVar[str] = "loop.blocked"
    handler: str
    message_id: str
    seconds: float


class ObjectSetAside(Event, frozen=True):
    """An object of the queue could not be read; ``quarantined`` is where its copy is, None when it was left alone."""

    name: ClassVar[str] = "object.corrupt"
    key: str
    reason: str
    quarantined: str | None


class ObjectUnreadable(Event, frozen=True):
    """This process lacks what it takes to read an object, which is left to others; said once a minute for each lack."""

    name: ClassVar[str] = "object.unreadable"
    key: str
    reason: str
    suggestion: str


class EnqueueAmbiguous(Event, frozen=True):
    """A producer was cut off for so long that it had to write messages a second time."""

    name: ClassVar[str] = "enqueue.ambiguous"
    message_ids: list[str]


class SegmentVoided(Event, frozen=True):
    """A segment landed too late to count; its writer has written it again under another key."""

    name: ClassVar[str] = "segment.void"
    key: str


Callback = Callable[[Any], Awaitable[None] | None]

EVENTS: dict[str, type[Event]] = {
    kind.name: kind
    for kind in (
        MessageEnqueued,
        MessageClaimed,
        MessageProcessing,
        MessageCompleted,
        MessageRetry,
        MessageDead,
        WorkerStarted,
        WorkerStopped,
        CoordinatorPromoted,
        CoordinatorDemoted,
        LeaseLostEvent,
        StoreThrottled,
        MetricsSnapshot,
        LoopBlocked,
        ObjectSetAside,
        ObjectUnreadable,
        EnqueueAmbiguous,
        SegmentVoided,
    )
}
ALL = "*"


class Subscription:
    """One reader of ``queue.events()``; use it as an async context manager or iterate over it."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus
        self._events: deque[Event] = deque(maxlen=EVENT_BUFFER)
        self._arrived = Wakeup()
        self._closed = False
        self.dropped = 0

    def push(self, event: Event) -> None:
        if len(self._events) == EVENT_BUFFER:
            self.dropped += 1
        self._events.append(event)
        self._arrived.set()

    def close(self) -> None:
        self._closed = True
        self._arrived.set()

    async def next(self) -> Event | None:
        """The next event; None once the queue is closed and everything was read."""
        while not self._events:
            if self._closed:
                return None
            await self._arrived.wait()
        return self._events.popleft()


class EventBus:
    """Carries events to callbacks and readers; costs nothing where nobody listens."""

    def __init__(self) -> None:
        self._callbacks: dict[str, list[Callback]] = {}
        self._subscriptions: list[Subscription] = []
        self._wanted: frozenset[str] = frozenset()
        self._later: deque[tuple[Callback, Awaitable[None], Event]] = deque()
        self._more = Wakeup()
        self._closed = False
        self.changed = Wakeup()
        """Set when somebody begins or ceases to listen."""
        self.dropped = 0

    def on(self, name: str, callback: Callback) -> Callable[[], None]:
        """Call ``callback`` with every event of that name ("*": all); returns a function that ends it."""
        if name != ALL and name not in EVENTS:
            raise InvalidSettings(
                f"There is no event {name!r}.", suggestion=f"There are: {', '.join(EVENTS)} and '*' for all of them."
            )
        self._callbacks.setdefault(name, []).append(callback)
        self._update()

        def off() -> None:
            if callback in self._callbacks.get(name, ()):
                self._callbacks[name].remove(callback)
                self._update()

        return off

    def wants(self, name: str) -> bool:
        """Whether anybody listens; events of the hot path are not even made otherwise."""
        return name in self._wanted

    def emit(self, event: Event) -> None:
        """Hand an event to all who listen. Never raises: a failing callback is logged."""
        if event.name not in self._wanted:
            return
        for subscription in self._subscriptions:
            subscription.push(event)
        for key in (event.name, ALL):
            for callback in tuple(self._callbacks.get(key, ())):
                self._call(callback, event)

    async def subscribe(self) -> AsyncIterator[Event]:
        """Every event from now on, until the queue is closed."""
        if self._closed:
            return
        subscription = Subscription(self)
        self._subscriptions.append(subscription)
        self._update()
        try:
            while True:
                event = await subscription.next()
                if event is None:
                    return
                yield event
        finally:
            self._subscriptions.remove(subscription)
            self._update()

    async def run(self) -> None:
        """Await what async callbacks returned, one after the other; ends after ``close``."""
        while True:
            while self._later:
                callback, waiting, event = self._later.popleft()
                try:
                    await waiting
                except Exception:  # noqa: BLE001 - a failing callback must hurt nobody; it is logged
                    log.exception("event callback failed", callback=_name(callback), event_name=event.name)
            if self._closed:
                return
            await self._more.wait()

    def close(self) -> None:
        """No more events: readers end after what they have, ``run`` after what is under way."""
        self._closed = True
        for subscription in self._subscriptions:
            subscription.close()
        self._more.set()

    def _call(self, callback: Callback, event: Event) -> None:
        try:
            returned = callback(event)
        except Exception:  # noqa: BLE001 - a failing callback must hurt nobody; it is logged
            log.exception("event callback failed", callback=_name(callback), event_name=event.name)
            return
        if returned is None or not inspect.isawaitable(returned):
            return
        if len(self._later) >= EVENT_BUFFER:
            _, waiting, _ = self._later.popleft()
            if inspect.iscoroutine(waiting):
                waiting.close()
            self.dropped += 1
        self._later.append((callback, returned, event))
        self._more.set()

    def _update(self) -> None:
        names = {name for name, callbacks in self._callbacks.items() if callbacks}
        self._wanted = frozenset(EVENTS) if self._subscriptions or ALL in names else frozenset(names)
        self.changed.set()


def _name(callback: Callback) -> str:
    return getattr(callback, "__qualname__", repr(callback))
