"""What these tests stand on: virtual time, a store in memory that keeps a record, and scans of what is in it."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any, ParamSpec, TypeVar

import anyio

from s3queue_async import S3Queue, Settings
from s3queue_async.errors import CorruptObject
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Deleted,
    IfVersion,
    Page,
    Storage,
    Stored,
    Unmodified,
    Written,
)
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.clock import LoopClock, run_virtual, store_now
from s3queue_async.testing.faults import FaultyStorage

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE_S = 600.0
QUIET = Settings(coordinator=False)


def virtual(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Run an async test on virtual time; it fails when it leaves a task behind, or takes ten virtual minutes."""

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        run_virtual(lambda: test(*args, **kwargs))

    return run


@dataclass
class Call:
    """One request: what was asked, and what it came to ("" when it worked)."""

    operation: str
    keys: tuple[str, ...]
    error: str = ""


@dataclass
class Recorder:
    """A storage that remembers every request."""

    inner: Storage
    calls: list[Call] = field(default_factory=list)
    latency_s: float = 0.0

    @property
    def date_resolution_s(self) -> float:
        return self.inner.date_resolution_s

    async def open(self) -> None:
        await self.inner.open()

    async def close(self) -> None:
        await self.inner.close()

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        return await self._run("get", (key,), lambda: self.inner.get(key, span=span, unless=unless))

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        return await self._run("put", (key,), lambda: self.inner.put(key, body, when=when))

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        return await self._run("delete", (key,), lambda: self.inner.delete(key, when=when))

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        return await self._run("delete", tuple(keys), lambda: self.inner.delete_many(keys))

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        return await self._run("list", (prefix,), lambda: self.inner.list(prefix, after=after, limit=limit))

    async def _run(self, operation: str, keys: tuple[str, ...], request: Callable[[], Awaitable[R]]) -> R:
        call = Call(operation, keys)
        self.calls.append(call)
        if self.latency_s:
            await anyio.sleep(self.latency_s / 2)
        try:
            reply = await request()
        except BaseException as error:
            call.error = type(error).__name__
            raise
        if self.latency_s:
            await anyio.sleep(self.latency_s / 2)
        return reply

    def count(self, *, under: str = "", beside: tuple[str, ...] = ("plugin/", layout.CONFIG)) -> Counter[str]:
        """Requests by operation, listings and what is ``beside`` the messages left out."""
        return Counter(
            call.operation
            for call in self.calls
            if call.operation != "list" and not call.keys[0].startswith(beside) and call.keys[0].startswith(under)
        )


class Bed:
    """One store, and queues on it.

    Attributes:
        memory: The store itself.
        store: What every queue of this bed goes through unless it is given a storage of its own: a record of requests
            above a script of faults.
    """

    def __init__(self, *, latency_s: float = 0.0, date_resolution_s: float = 0.001, seed: int = 1) -> None:
        self.memory = MemoryStorage(now=store_now, date_resolution_s=date_resolution_s)
        self.faults = FaultyStorage(_Unclosed(self.memory), clock=LoopClock())
        self.store = Recorder(self.faults, latency_s=latency_s)
        self._rng = Random(seed)

    def lane(self) -> tuple[Recorder, FaultyStorage]:
        """Another way to the same store, for one queue alone: it can be cut without hurting the others."""
        faults = FaultyStorage(_Unclosed(self.memory), clock=LoopClock())
        return Recorder(faults, latency_s=self.store.latency_s), faults

    def queue(self, *, settings: Settings = QUIET, storage: Storage | None = None, **options: Any) -> S3Queue[Any]:
        return S3Queue(
            storage=self.store if storage is None else storage,
            settings=settings,
            clock=LoopClock(),
            rng=Random(self._rng.getrandbits(64)),
            **options,
        )

    async def open(self) -> None:
        """Make the store usable without a queue."""
        await self.memory.open()

    async def keys(self, prefix: str = "") -> list[str]:
        """Every key in the store."""
        await self.memory.open()
        return [entry.key for entry in (await self.memory.list(prefix)).entries]

    async def leftovers(self) -> list[str]:
        """Keys that should not be there once everything is done and every worker has left.

        What the last one had just ended is named for the next one, who deletes that (see test_tombstones.py).
        """
        kept = (layout.CONFIG, "plugin/totals/all", *await self.keys(f"plugin/{layout.TOMBSTONES}/"))
        return [key for key in await self.keys() if key not in kept]

    def bodies(self) -> dict[str, bytes]:
        """What is in the store at this very moment."""
        return {key: found.body for key, found in self.memory._space.objects.items()}

    async def segment(self, key: str) -> segments.Segment:
        return segments.decode(key, self.bodies()[key])

    async def live(self) -> dict[str, list[str]]:
        """Message ids, with the segments in which they may still be run.

        A moved segment counts once its parent's segment is gone, or the parent's claim says that the move is applied;
        a message counts in its segment until the claim says that it is finished or has moved.
        """
        bodies = self.bodies()
        held: dict[str, claims.Claim] = {}
        for key, body in bodies.items():
            if key.startswith(layout.CLAIMS):
                with contextlib.suppress(CorruptObject):
                    held[key] = claims.decode(key, body)
        places: dict[str, list[str]] = {}
        for key, body in bodies.items():
            if not key.startswith((layout.READY, layout.DELAYED, layout.DEAD)):
                continue
            try:
                index = segments.decode(key, body).index
            except CorruptObject:
                continue
            if index.parent is not None and index.parent in bodies:
                parent = held.get(SegmentKey.parse(index.parent).claim)
                if parent is None or not any(move.key == key and move.applied for move in parent.moves):
                    continue
            own = held.get(SegmentKey.parse(key).claim)
            ended = set() if own is None else own.ended()
            for place, record in enumerate(index.records):
                if place not in ended:
                    places.setdefault(record.id, []).append(key)
        return places


class _Unclosed:
    """The store below outlives the queues on it."""

    def __init__(self, inner: Storage) -> None:
        self.inner = inner
        self.open = inner.open
        self.get = inner.get
        self.put = inner.put
        self.delete = inner.delete
        self.delete_many = inner.delete_many
        self.list = inner.list

    @property
    def date_resolution_s(self) -> float:
        return self.inner.date_resolution_s

    async def close(self) -> None:
        pass


class Seen:
    """Collects what happens, and wakes who waits for it."""

    def __init__(self) -> None:
        self.items: list[Any] = []
        self._changed = anyio.Event()

    def __call__(self, item: Any) -> None:
        self.items.append(item)
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, condition: Callable[[list[Any]], bool]) -> list[Any]:
        with anyio.fail_after(PATIENCE_S):
            while not condition(self.items):
                await self._changed.wait()
        return self.items

    async def count(self, number: int) -> list[Any]:
        """Return once so many were seen."""
        return await self.until(lambda items: len(items) >= number)


async def eventually(condition: Callable[[], Awaitable[Any]], *, every_s: float = 0.1) -> Any:
    """Return what the condition gives once it is true, on virtual time."""
    with anyio.fail_after(PATIENCE_S):
        while True:
            result = await condition()
            if result:
                return result
            await anyio.sleep(every_s)
