"""What every role of the engine is given: the store, its time, local time, chance, settings, events."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random  # noqa: TID251 - only the type: the instance is passed in
from typing import TypeVar

from s3queue_async.clock import Clock
from s3queue_async.engine.packing import Packer
from s3queue_async.errors import QueueError, StoreUnavailable, Throttled
from s3queue_async.events import EventBus
from s3queue_async.protocol import layout
from s3queue_async.protocol.clock import StoreClock
from s3queue_async.settings import Settings
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Conflict,
    Deleted,
    IfVersion,
    Page,
    Storage,
    StorageAnswer,
    Stored,
    Unmodified,
    Written,
)
from s3queue_async.storage.plugin import PluginStorage
from s3queue_async.storage.swap import swap

T = TypeVar("T")

RETRY_PAUSE_MAX_S = 2.0
RETRY_PAUSE_BASE_S = 0.05


class StoreTime:
    """The store's time, as far as its replies tell."""

    def __init__(self, clock: Clock, resolution_s: float) -> None:
        self._clock = clock
        self._store_clock = StoreClock()
        self._seen_s = float("-inf")
        self.resolution_s = resolution_s

    def observe(self, date_s: float | None, sent: float) -> None:
        """Take in a reply's date; ``sent`` is the local time before its request."""
        if date_s is not None:
            self._seen_s = max(self._seen_s, date_s)
            self._store_clock.observe(
                date_s, sent=sent, received=self._clock.monotonic(), resolution_s=self.resolution_s
            )

    def seen(self) -> float:
        """The latest date that any reply carried: store time is later by now, whatever the local clock did since."""
        return self._seen_s

    def certain(self) -> float:
        """As ``earliest``, for decisions that another worker's lease depends on.

        A local clock that jumps ahead takes ``earliest`` with it until the next reply; this goes along for no more
        than the resolution of a date.
        """
        return min(self.earliest(), self._seen_s + self.resolution_s)

    def earliest(self) -> float:
        """The earliest that the store's clock can show now, seconds since the epoch."""
        return self._store_clock.earliest(self._clock.monotonic())

    def latest(self) -> float:
        """The latest that the store's clock can show now."""
        return self._store_clock.latest(self._clock.monotonic())

    def now_ms(self) -> int:
        """The best guess of what the store's clock shows now, milliseconds since the epoch."""
        return int(self._store_clock.estimate(self._clock.monotonic()) * 1000)


class TimedStorage:
    """Passes every request on, and lets the store's time learn from every reply."""

    def __init__(self, inner: Storage, clock: Clock) -> None:
        self._inner = inner
        self._clock = clock
        self.time = StoreTime(clock, inner.date_resolution_s)

    @property
    def date_resolution_s(self) -> float:
        return self._inner.date_resolution_s

    async def open(self) -> None:
        await self._inner.open()
        self.time.resolution_s = self._inner.date_resolution_s

    async def close(self) -> None:
        await self._inner.close()

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        sent = self._clock.monotonic()
        try:
            reply = await self._inner.get(key, span=span, unless=unless)
        except StorageAnswer as answer:
            self.time.observe(answer.date_s, sent)
            raise
        self.time.observe(reply.date_s, sent)
        return reply

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        sent = self._clock.monotonic()
        try:
            reply = await self._inner.put(key, body, when=when)
        except StorageAnswer as answer:
            self.time.observe(answer.date_s, sent)
            raise
        self.time.observe(reply.date_s, sent)
        return reply

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        sent = self._clock.monotonic()
        try:
            reply = await self._inner.delete(key, when=when)
        except StorageAnswer as answer:
            self.time.observe(answer.date_s, sent)
            raise
        self.time.observe(reply.date_s, sent)
        return reply

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        sent = self._clock.monotonic()
        reply = await self._inner.delete_many(keys)
        self.time.observe(reply.date_s, sent)
        return reply

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        sent = self._clock.monotonic()
        reply = await self._inner.list(prefix, after=after, limit=limit)
        self.time.observe(reply.date_s, sent)
        return reply


@dataclass(slots=True)
class Shared:
    """What the roles of one queue object have in common.

    Attributes:
        storage: The queue's store, as wrapped for this process.
        time: The store's time.
        clock: Local time.
        random: Chance.
        settings: The queue's settings.
        bus: Where events go.
        conditional_delete: Whether the store keeps If-Match on DELETE.
        packer: Compresses and encrypts what is written.
        requests: The requests that this process made of the store so far, by operation, and how many were throttled.
        workers, dedup, totals, tombstones: Views of the store for heartbeats, deduplication markers, summed counters, and
            what workers that left nobody behind had just ended.
    """

    storage: Storage
    time: StoreTime
    clock: Clock
    random: Random
    settings: Settings
    bus: EventBus
    conditional_delete: bool = True
    packer: Packer = field(default_factory=Packer)
    requests: Callable[[], tuple[dict[str, int], int]] = lambda: ({}, 0)
    workers: PluginStorage = field(init=False)
    dedup: PluginStorage = field(init=False)
    totals: PluginStorage = field(init=False)
    tombstones: PluginStorage = field(init=False)

    def __post_init__(self) -> None:
        self.workers = PluginStorage(self.storage, layout.WORKERS, ttl_s=self.settings.visibility_timeout)
        self.dedup = PluginStorage(self.storage, layout.DEDUP, ttl_s=self.settings.dedup_window)
        self.totals = PluginStorage(self.storage, layout.TOTALS)
        self.tombstones = PluginStorage(self.storage, layout.TOMBSTONES)

    def nonce(self) -> str:
        """Different in every body that is written by compare-and-swap."""
        return f"{self.random.getrandbits(64):016x}"

    def new_ulid(self) -> str:
        """A ULID at the store's time."""
        return layout.ulid(self.time.now_ms(), self.random.getrandbits(80))

    async def pause(self, tries: int, error: QueueError | None = None) -> None:
        """Wait before another try: longer each time, jittered, at least what the store asked for."""
        wait = min(RETRY_PAUSE_MAX_S, RETRY_PAUSE_BASE_S * 2.0 ** min(tries, 10)) * (0.5 + self.random.random())
        if isinstance(error, Throttled) and error.retry_after_s is not None:
            wait = max(wait, error.retry_after_s)
        await self.clock.sleep(wait)

    async def swap(
        self, key: str, body: bytes, *, when: Condition, deadline_s: float, storage: Storage | None = None
    ) -> str:
        """A compare-and-swap whose outcome is decided; returns the new version (see ``storage.swap``)."""
        written = await swap(
            self.storage if storage is None else storage,
            key,
            body,
            when=when,
            clock=self.clock,
            random=self.random,
            deadline_s=deadline_s,
        )
        return written.version

    async def insist(self, request: Callable[[], Awaitable[T]], *, while_true: Callable[[], bool]) -> T:
        """Repeat a request that is safe to repeat until it is answered.

        Args:
            request: Starts the request anew each time.
            while_true: Whether there is still a point in trying; asked after every failure.

        Raises:
            StoreUnavailable, Throttled, Conflict: The last failure, when it is not retriable or there is no point any more.
        """
        tries = 0
        while True:
            try:
                return await request()
            except (StoreUnavailable, Throttled, Conflict) as error:
                if not (error.retriable or isinstance(error, Conflict)) or not while_true():
                    raise
                await self.pause(tries, error)
                if not while_true():
                    raise
                tries += 1
