"""A storage that fails when a test says so: a script of faults, each for chosen calls, in a fixed order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TypeVar, cast

import anyio

from s3queue_async.clock import Clock, SystemClock
from s3queue_async.errors import QueueError, StoreUnavailable, Throttled
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

_Reply = TypeVar("_Reply")
_Call = Callable[[], Awaitable[object]]

OPERATIONS = frozenset({"get", "put", "delete", "delete_many", "list"})


@dataclass(eq=False, slots=True)
class Fault:
    """One entry of the script, and what became of it.

    Attributes:
        hits: How many calls it was applied to.
        times: To how many calls it applies; None for all.
    """

    name: str
    operations: frozenset[str]
    key: str
    times: int | None
    skip: int
    hits: int = 0
    _act: Callable[[_Call], Awaitable[object]] = field(repr=False, kw_only=True)

    @property
    def spent(self) -> bool:
        """Whether it applies to no further call."""
        return self.times is not None and self.hits >= self.times

    def _takes(self, operation: str, keys: Iterable[str]) -> bool:
        if self.spent or operation not in self.operations or not any(fnmatchcase(key, self.key) for key in keys):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.hits += 1
        return True


class Gate:
    """Where calls wait until the test lets them on.

    Attributes:
        reached: Set when the first call waits here.
    """

    def __init__(self) -> None:
        self.reached = anyio.Event()
        self._opened = anyio.Event()
        self._late: list[_Call] = []

    def open(self) -> None:
        """Let everybody on, also those that come later."""
        self._opened.set()

    async def land(self) -> list[object]:
        """Let the requests of ``land_late`` arrive now, in their order; returns the replies or the errors."""
        late, self._late = self._late, []
        outcomes: list[object] = []
        for call in late:
            try:
                outcomes.append(await call())
            except QueueError as error:
                outcomes.append(error)
        return outcomes


class FaultyStorage:
    """A storage that fails on demand, and otherwise is the one below.

    Each of the methods below adds a fault to the script. A call goes through the first fault that takes it; a
    fault takes a call when the operation is among ``operations`` ("get", "put", "delete", "delete_many", "list"),
    the key (a listing's prefix; any of several keys) matches the pattern ``key`` as in ``fnmatch``, ``skip``
    matching calls went by, and fewer than ``times`` were taken (None: no limit).

    Args:
        storage: The storage below.
        clock: What ``delay`` waits with.
    """

    def __init__(self, storage: Storage, *, clock: Clock | None = None) -> None:
        self._storage = storage
        self._clock = SystemClock() if clock is None else clock
        self._script: list[Fault] = []

    def __repr__(self) -> str:
        return f"FaultyStorage({self._storage!r})"

    @property
    def pending(self) -> list[Fault]:
        """The faults that have not been applied as often as the script says."""
        return [fault for fault in self._script if not fault.spent]

    def clear(self) -> None:
        """Forget all faults."""
        self._script.clear()

    def lose_request(self, *operations: str, key: str = "*", times: int | None = 1, skip: int = 0) -> Fault:
        """The request never arrives: nothing is applied, and the caller gets StoreUnavailable."""

        async def act(call: _Call) -> object:
            raise StoreUnavailable("The request was lost (a fault of the test).")

        return self._add("lose_request", operations, key, times, skip, act)

    def lose_reply(self, *operations: str, key: str = "*", times: int | None = 1, skip: int = 0) -> Fault:
        """The request is applied, whatever it answers, and the caller gets StoreUnavailable."""

        async def act(call: _Call) -> object:
            outcome: QueueError | None = None
            try:
                await call()
            except QueueError as error:
                outcome = error
            raise StoreUnavailable("The reply was lost (a fault of the test).") from outcome

        return self._add("lose_reply", operations, key, times, skip, act)

    def land_late(self, *operations: str, key: str = "*", times: int | None = 1, skip: int = 0) -> Gate:
        """The caller gets StoreUnavailable at once, and the request arrives when ``Gate.land`` is called."""
        gate = Gate()

        async def act(call: _Call) -> object:
            gate._late.append(call)
            gate.reached.set()
            raise StoreUnavailable("The request is late (a fault of the test).")

        self._add("land_late", operations, key, times, skip, act)
        return gate

    def hold(self, *operations: str, key: str = "*", times: int | None = 1, skip: int = 0) -> Gate:
        """The request waits until ``Gate.open`` is called, and then goes on its way."""
        gate = Gate()

        async def act(call: _Call) -> object:
            gate.reached.set()
            await gate._opened.wait()
            return await call()

        self._add("hold", operations, key, times, skip, act)
        return gate

    def hold_reply(self, *operations: str, key: str = "*", times: int | None = 1, skip: int = 0) -> Gate:
        """The request is applied at once, and its reply waits until ``Gate.open`` is called."""
        gate = Gate()

        async def act(call: _Call) -> object:
            try:
                return await call()
            finally:
                gate.reached.set()
                await gate._opened.wait()

        self._add("hold_reply", operations, key, times, skip, act)
        return gate

    def delay(self, seconds: float, *operations: str, key: str = "*", times: int | None = 1, skip: int = 0) -> Fault:
        """The request sets out after a while."""

        async def act(call: _Call) -> object:
            await self._clock.sleep(seconds)
            return await call()

        return self._add("delay", operations, key, times, skip, act)

    def throttle(
        self,
        *operations: str,
        key: str = "*",
        times: int | None = 1,
        skip: int = 0,
        retry_after_s: float | None = None,
    ) -> Fault:
        """Nothing is applied, and the caller gets Throttled."""

        async def act(call: _Call) -> object:
            raise Throttled("The store asks for fewer requests (a fault of the test).", retry_after_s=retry_after_s)

        return self._add("throttle", operations, key, times, skip, act)

    def unavailable(
        self, *operations: str, key: str = "*", times: int | None = None, skip: int = 0, retriable: bool = True
    ) -> Fault:
        """Nothing is applied, and the caller gets StoreUnavailable; by default until ``clear`` or ``remove``."""

        async def act(call: _Call) -> object:
            raise StoreUnavailable("The store is away (a fault of the test).", retriable=retriable)

        return self._add("unavailable", operations, key, times, skip, act)

    def fail(self, error: Exception, *operations: str, key: str = "*", times: int | None = 1, skip: int = 0) -> Fault:
        """Nothing is applied, and the caller gets this very error."""

        async def act(call: _Call) -> object:
            raise error

        return self._add("fail", operations, key, times, skip, act)

    def remove(self, fault: Fault) -> None:
        """Take a fault out of the script."""
        self._script.remove(fault)

    @property
    def date_resolution_s(self) -> float:
        """As of the storage below."""
        return self._storage.date_resolution_s

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
        return await self._run("get", (key,), lambda: self._storage.get(key, span=span, unless=unless))

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        """Write an object whole; see Storage.put."""
        return await self._run("put", (key,), lambda: self._storage.put(key, body, when=when))

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        """Delete an object; see Storage.delete."""
        return await self._run("delete", (key,), lambda: self._storage.delete(key, when=when))

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        """Delete up to 1,000 objects; see Storage.delete_many."""
        return await self._run("delete_many", keys, lambda: self._storage.delete_many(keys))

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        """List keys in order; see Storage.list."""
        return await self._run("list", (prefix,), lambda: self._storage.list(prefix, after=after, limit=limit))

    async def _run(self, operation: str, keys: Iterable[str], call: Callable[[], Awaitable[_Reply]]) -> _Reply:
        for fault in self._script:
            if fault._takes(operation, keys):
                # An action returns what the call returned, or raises.
                return cast(_Reply, await fault._act(call))
        return await call()

    def _add(
        self,
        name: str,
        operations: Iterable[str],
        key: str,
        times: int | None,
        skip: int,
        act: Callable[[_Call], Awaitable[object]],
    ) -> Fault:
        chosen = frozenset(operations) or OPERATIONS
        if unknown := chosen - OPERATIONS:
            raise ValueError(f"unknown operations {sorted(unknown)}; they must be among {sorted(OPERATIONS)}")
        fault = Fault(name, chosen, key, times, skip, _act=act)
        self._script.append(fault)
        return fault
