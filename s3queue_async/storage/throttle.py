"""Slows down when the store asks for it: additive increase, multiplicative decrease of the request rate."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from typing import Literal, ParamSpec, TypeVar

from s3queue_async.clock import Clock
from s3queue_async.errors import Throttled
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

_Args = ParamSpec("_Args")
_Reply = TypeVar("_Reply")

REWRITE_S = 1.5
COMPLAINTS_TOGETHER_S = 1.0
"""The store slows down a client, not the writes of one key, when it refuses two keys within this time."""

# Writes and reads have separate limits on S3 (3,500 and 5,500 a second and prefix); listings are charged apart, too.
_Kind = Literal["reads", "writes", "lists"]


class RateLimit:
    """How fast requests of one kind may start: without limit until the store complains. Pure arithmetic.

    At a complaint the rate becomes half of what it was (measured, or allowed). Then it grows by a twentieth of
    the rate at the complaint each second, and twice that rate without another complaint ends the limit.

    Args:
        rate_min: The rate never falls below this many requests a second.
        decrease: What the rate is multiplied with at a complaint.
        increase_part: The growth in a second, as a part of the rate at the complaint.
        recovered_factor: At this multiple of the rate at the complaint the limit ends.
    """

    def __init__(
        self,
        *,
        rate_min: float = 2.0,
        decrease: float = 0.5,
        increase_part: float = 0.05,
        recovered_factor: float = 2.0,
    ) -> None:
        self._rate_min = rate_min
        self._decrease = decrease
        self._increase_part = increase_part
        self._recovered_factor = recovered_factor
        self._measured = 0.0
        self._measured_at_s = -math.inf
        self._rate_then = math.inf
        self._rate_at_complaint = math.inf
        self._complaint_at_s = -math.inf
        self._free_at_s = -math.inf

    def rate(self, now_s: float) -> float:
        """The allowed requests a second; infinite while there is no limit."""
        if math.isinf(self._rate_then):
            return math.inf
        grown = self._rate_then + self._increase_part * self._rate_at_complaint * (now_s - self._complaint_at_s)
        if grown >= self._recovered_factor * self._rate_at_complaint:
            self._rate_then = math.inf
            return math.inf
        return grown

    def reserve(self, now_s: float) -> float:
        """Take the next free place and return how long to wait for it, in seconds."""
        self._measure(now_s)
        start_s = max(now_s, self._free_at_s)
        rate = self.rate(now_s)
        if not math.isinf(rate):
            self._free_at_s = start_s + 1.0 / rate
        return start_s - now_s

    def complain(self, now_s: float, *, began_s: float, retry_after_s: float | None = None) -> float:
        """Take note that the store throttled a request, and return how long the next one has to wait, in seconds.

        Args:
            now_s: Local time.
            began_s: When the request began; those begun before the last decrease do not count again.
            retry_after_s: What the store asked for, if it did.
        """
        if began_s >= self._complaint_at_s:
            self._rate_at_complaint = max(self._rate_min, min(self.rate(now_s), self._measured))
            self._rate_then = max(self._rate_min, self._rate_at_complaint * self._decrease)
            self._complaint_at_s = now_s
            self._free_at_s = max(self._free_at_s, now_s + 1.0 / self._rate_then)
        if retry_after_s is not None:
            self._free_at_s = max(self._free_at_s, now_s + retry_after_s)
        return max(0.0, self._free_at_s - now_s)

    def _measure(self, now_s: float) -> None:
        # Requests of the last second or so: each counts as one and fades with a time constant of a second.
        self._measured = 1.0 + self._measured * math.exp(min(0.0, self._measured_at_s - now_s))
        self._measured_at_s = now_s


class ThrottledStorage:
    """A storage that asks the one below no faster than the store likes.

    Reads and listings that were throttled are tried again a few times. Writes never are: what a throttled write
    did is for the caller to find out, so its Throttled passes through.

    Args:
        storage: The storage below.
        clock: Local time, and what waits on it.
        on_throttled: Called with the operation's name and the seconds that the next request has to wait.
        urgent: Tells by its key whether a request may never be made to wait: a worker that slows down must still be
            able to say that it lives.
        read_retries_max: How often a throttled read or listing is tried again.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        clock: Clock,
        on_throttled: Callable[[str, float], None] | None = None,
        urgent: Callable[[str], bool] = lambda key: False,
        read_retries_max: int = 3,
    ) -> None:
        self._storage = storage
        self._clock = clock
        self._on_throttled = on_throttled
        self._urgent = urgent
        self._read_retries_max = read_retries_max
        self._written: OrderedDict[str, float] = OrderedDict()
        self._complaint = ("", -math.inf)
        self._limits: dict[_Kind, RateLimit] = {
            "reads": RateLimit(),
            "writes": RateLimit(),
            "lists": RateLimit(),
        }
        self.waits = 0
        """Requests that waited before they were sent."""
        self.waited_s = 0.0

    def __repr__(self) -> str:
        return f"ThrottledStorage({self._storage!r})"

    @property
    def date_resolution_s(self) -> float:
        """As of the storage below."""
        return self._storage.date_resolution_s

    def rates(self) -> dict[str, float]:
        """The allowed requests a second of reads, writes and lists; infinite while there is no limit."""
        now_s = self._clock.monotonic()
        return {kind: limit.rate(now_s) for kind, limit in self._limits.items()}

    async def open(self) -> None:
        """Open the storage below."""
        await self._storage.open()

    async def close(self) -> None:
        """Close the storage below."""
        await self._storage.close()

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        """Read an object; see Storage.get."""
        tries = 1 + self._read_retries_max
        return await self._ask("reads", "get", key, tries, self._storage.get, key, span=span, unless=unless)

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        """Write an object whole; see Storage.put."""
        return await self._ask("writes", "put", key, 1, self._storage.put, key, body, when=when)

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        """Delete an object; see Storage.delete."""
        return await self._ask("writes", "delete", key, 1, self._storage.delete, key, when=when)

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        """Delete up to 1,000 objects; see Storage.delete_many."""
        return await self._ask("writes", "delete_many", "", 1, self._storage.delete_many, keys)

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        """List keys in order; see Storage.list."""
        tries = 1 + self._read_retries_max
        return await self._ask("lists", "list", prefix, tries, self._storage.list, prefix, after=after, limit=limit)

    async def _ask(
        self,
        kind: _Kind,
        operation: str,
        key: str,
        tries: int,
        call: Callable[_Args, Awaitable[_Reply]],
        *args: _Args.args,
        **kwargs: _Args.kwargs,
    ) -> _Reply:
        limit = self._limits[kind]
        urgent = self._urgent(key)
        while True:
            wait_s = limit.reserve(self._clock.monotonic())
            if wait_s > 0 and not urgent:
                self.waits += 1
                self.waited_s += wait_s
                await self._clock.sleep(wait_s)
            began_s = self._clock.monotonic()
            rewrite = kind == "writes" and self._is_rewrite(key, began_s)
            try:
                return await call(*args, **kwargs)
            except Throttled as error:
                self._complain(kind, operation, key, error, began_s=began_s, urgent=urgent, rewrite=rewrite)
                tries -= 1
                if tries == 0:
                    raise
                # The next try waits as long as the limit says.

    def _complain(
        self, kind: _Kind, operation: str, key: str, error: Throttled, *, began_s: float, urgent: bool, rewrite: bool
    ) -> None:
        wait_s = 0.0
        now_s = self._clock.monotonic()
        about_the_key = kind == "writes" and (rewrite or self._is_first_complaint(key, now_s))
        # What went out without regard to the rate says nothing about it.
        if error.retry_after_s is not None or not (urgent or about_the_key):
            wait_s = self._limits[kind].complain(now_s, began_s=began_s, retry_after_s=error.retry_after_s)
        if self._on_throttled is not None:
            self._on_throttled(operation, wait_s)

    def _is_first_complaint(self, key: str, now_s: float) -> bool:
        """Whether no other key was complained about a moment ago: another process may just have written this one."""
        before, self._complaint = self._complaint, (key, now_s)
        return before[0] == key or now_s - before[1] > COMPLAINTS_TOGETHER_S

    def _is_rewrite(self, key: str, now_s: float) -> bool:
        """Whether this client wrote the key a moment ago.

        Some stores allow about one write a second to one key; their complaint is about that key, not about the rate
        of everything else.
        """
        while self._written and next(iter(self._written.values())) < now_s - REWRITE_S:
            self._written.popitem(last=False)
        before = self._written.pop(key, None)
        self._written[key] = now_s
        return before is not None
