"""Does this store keep its conditions, and list in order? A queue on one that does not would lose and repeat messages."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random  # noqa: TID251 - only the type: the instance is passed in
from typing import TypeVar

import anyio

from s3queue_async.clock import Clock, SystemClock
from s3queue_async.errors import QueueError, StoreUnavailable, StoreUnsupported, Throttled
from s3queue_async.storage.base import (
    Conflict,
    IfAbsent,
    IfVersion,
    NotFound,
    PreconditionFailed,
    Storage,
    Stored,
    Written,
)
from s3queue_async.storage.plugin import PluginStorage

T = TypeVar("T")

PROBE_NAMESPACE = "probe"
_RACERS = 2
"""Creators of one key at once. SeaweedFS has each that meets another ask for its lock again a second later, so that a
second goes by for every further one; two show as well as many what a store does that looks first and writes then."""
_RACES = 8
"""Keys that are raced for at once."""
_ROUNDS_MAX = 3
_LOSERS_MIN = 6
"""Racers refused with 412 that are enough. Of others nothing is known: their reply was lost, they were throttled, or told
to try again (409), which need not mean that they met anybody (found by simulation)."""
_THROTTLED_TRIES = 5
_THROTTLED_PAUSE_S = 1.1
_UNAVAILABLE_TRIES = 5
_UNAVAILABLE_PAUSE_S = 0.05
_LISTED = 6
"""Keys whose order is looked at; a store without order shows the right one by chance once in 720 times."""
_CLEANUP_FAILURES_MAX = 10
_CLEANUP_ROUNDS_MAX = 300
_CLEANUP_PAUSE_S = 0.05


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a store can do beyond what every queue needs.

    Attributes:
        conditional_delete: Whether a DELETE with a stale If-Match is refused.
    """

    conditional_delete: bool


async def probe(storage: Storage, *, random: Random, clock: Clock | None = None) -> Capabilities:
    """Try on a few small objects whether the store keeps conditional writes, and take them away again.

    Args:
        storage: An open storage.
        random: Names the objects, so that two probes do not meet.
        clock: What the cleaning up waits with between two tries.

    Raises:
        StoreUnsupported: The store ignores a condition; names what it answered.
        StoreUnavailable: The store failed meanwhile.
    """
    view = PluginStorage(storage, PROBE_NAMESPACE)
    clock = clock or SystemClock()
    run = _Probe(view, f"{random.randbytes(8).hex()}/", random, clock)
    try:
        capabilities = await run.check()
    except BaseException as error:
        problem = await _clean_up(view, run.prefix, clock)
        if problem is not None:
            error.add_note(f"Objects of the probe may be left under plugin/probe/{run.prefix}: {problem}")
        raise
    problem = await _clean_up(view, run.prefix, clock)
    if problem is not None:
        raise problem
    return capabilities


class _Probe:
    def __init__(self, view: PluginStorage, prefix: str, random: Random, clock: Clock) -> None:
        self.prefix = prefix
        self._view = view
        self._random = random
        self._clock = clock

    async def check(self) -> Capabilities:
        stale, current = await self._check_sequence()
        await self._check_missing(stale)
        conditional_delete = await self._check_delete(stale, current)
        await self._check_races()
        await self._check_listing()
        return Capabilities(conditional_delete)

    def _body(self) -> bytes:
        return self._random.randbytes(16)

    async def _check_sequence(self) -> tuple[str, str]:
        key = f"{self.prefix}sequence"
        first = await self._put(key, IfAbsent())
        if await self._accepts(key, IfAbsent()):
            raise _unsupported("a PUT with If-None-Match: * on a key that exists", "success", "412 Precondition Failed")
        try:
            second = await self._put(key, IfVersion(first.version))
        except PreconditionFailed as error:
            raise _unsupported(
                "a PUT with the current ETag in If-Match", "412 Precondition Failed", "success"
            ) from error
        if first.version == second.version:
            raise _unsupported("two PUTs with different bodies", f"the same ETag {first.version}", "another ETag")
        if await self._accepts(key, IfVersion(first.version)):
            raise _unsupported("a PUT with a stale ETag in If-Match", "success", "412 Precondition Failed")
        return first.version, second.version

    async def _check_missing(self, version: str) -> None:
        if await self._accepts(f"{self.prefix}missing", IfVersion(version)):
            raise _unsupported("a PUT with If-Match on a key that does not exist", "success", "404 or 412")

    async def _check_delete(self, stale: str, current: str) -> bool:
        key = f"{self.prefix}sequence"
        try:
            await self._patiently(lambda: self._view.delete(key, when=IfVersion(stale)))
        except PreconditionFailed:
            pass
        except StoreUnsupported:
            return False
        else:
            return False
        try:
            await self._patiently(lambda: self._view.delete(key, when=IfVersion(current)))
        except PreconditionFailed:
            # It refuses both: as good as no conditional DELETE at all.
            return False
        return True

    async def _check_races(self) -> None:
        """Have each of some keys created by several at once, until enough of them were refused."""
        losers = 0
        for number in range(_ROUNDS_MAX):
            races = [_Race(f"{self.prefix}race-{number}-{key}") for key in range(_RACES)]
            async with anyio.create_task_group() as group:
                for race in races:
                    for _ in range(_RACERS):
                        group.start_soon(race.create, self._view, self._body())
            for race in races:
                race.judge(await self._stored(race.key))
            losers += sum(race.losers for race in races)
            if losers >= _LOSERS_MIN:
                return

    async def _stored(self, key: str) -> bytes:
        try:
            found = await self._again(lambda: self._view.get(key))
        except NotFound:
            return b""
        assert isinstance(found, Stored)  # only a read that names a version is answered otherwise
        return found.body

    async def _check_listing(self) -> None:
        prefix = f"{self.prefix}list/"
        keys = [f"{prefix}{number}" for number in range(_LISTED)]
        failures: list[QueueError] = []

        async def create(key: str) -> None:
            try:
                await self._again(lambda: self._put(key, IfAbsent()))
            except PreconditionFailed:
                # An earlier try wrote it, and its reply was lost.
                return
            except QueueError as error:
                failures.append(error)

        async with anyio.create_task_group() as group:
            for key in keys:
                group.start_soon(create, key)
        if failures:
            raise failures[0]
        listed = [entry.key for entry in (await self._again(lambda: self._view.list(prefix))).entries]
        if not listed or listed != keys[: len(listed)]:
            raise _unsorted(f"{_LISTED} keys in another order", [key.removeprefix(prefix) for key in listed])
        page = await self._again(lambda: self._view.list(prefix, after=keys[2]))
        rest = [entry.key for entry in page.entries]
        if not rest or rest != keys[3 : 3 + len(rest)]:
            raise _unsorted("start-after with other keys", [key.removeprefix(prefix) for key in rest])

    async def _put(self, key: str, when: IfAbsent | IfVersion) -> Written:
        body = self._body()
        return await self._patiently(lambda: self._view.put(key, body, when=when))

    async def _patiently(self, request: Callable[[], Awaitable[T]]) -> T:
        """Ask again when the store only wants it later: some allow one write a second to one key."""
        for _ in range(_THROTTLED_TRIES):
            try:
                return await request()
            except (Throttled, Conflict) as error:
                wait_s = error.retry_after_s if isinstance(error, Throttled) else None
                await self._clock.sleep(max(_THROTTLED_PAUSE_S, wait_s or 0.0))
        return await request()

    async def _again(self, request: Callable[[], Awaitable[T]]) -> T:
        """Repeat a request that does no harm when it is applied twice."""
        for attempt in range(_UNAVAILABLE_TRIES):
            try:
                return await request()
            except StoreUnavailable as error:
                if not error.retriable:
                    raise
                await self._clock.sleep(_UNAVAILABLE_PAUSE_S * 2.0**attempt)
        return await request()

    async def _accepts(self, key: str, when: IfAbsent | IfVersion) -> bool:
        try:
            written = await self._put(key, when)
        except (PreconditionFailed, Conflict):
            return False
        return isinstance(written, Written)


class _Race:
    """One key that several create at once."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.losers = 0
        self._winners: list[bytes] = []
        self._told_to_repeat = False
        self._unknown: dict[bytes, QueueError] = {}

    async def create(self, view: PluginStorage, body: bytes) -> None:
        try:
            await view.put(self.key, body, when=IfAbsent())
        except PreconditionFailed:
            self.losers += 1
        except Conflict:
            self._told_to_repeat = True
        except QueueError as error:
            self._unknown[body] = error
        else:
            self._winners.append(body)

    def judge(self, stored: bytes) -> None:
        """Raises StoreUnsupported unless just one won, and the key has what it wrote."""
        if len(self._winners) > 1:
            raise _unsupported(
                f"{_RACERS} concurrent PUTs of one key with If-None-Match: *",
                f"success to {len(self._winners)}",
                "success to one",
            )
        if self._winners and stored != self._winners[0]:
            raise _unsupported("a read of what the winner of a race wrote", "something else", "the winner's body")
        if not self._winners and not self._told_to_repeat and stored not in self._unknown:
            for error in self._unknown.values():
                raise error
            raise _unsupported(f"{_RACERS} concurrent PUTs with If-None-Match: *", "412 to all", "success to one")


def _unsupported(request: str, answer: str, right: str) -> StoreUnsupported:
    return StoreUnsupported(
        f"The store does not keep conditional writes: it answered {request} with {answer}, not {right}."
    )


def _unsorted(answer: str, keys: list[str]) -> StoreUnsupported:
    return StoreUnsupported(
        f"The store does not list in the order of keys: it answered a listing of {answer} ({', '.join(keys) or 'none'}). "
        "S3 Express directory buckets are of this kind.",
    )


async def _clean_up(view: PluginStorage, prefix: str, clock: Clock) -> QueueError | None:
    """Delete whatever is under the prefix; returns what is in the way when it cannot be done."""
    problem: QueueError = StoreUnavailable("The probe's objects keep coming back.")
    seen: list[str] = []
    failures = rounds = 0
    # Shielded: a probe that is cancelled still takes its objects away. Bounded: by rounds without progress, as a store may
    # refuse every other request, and by rounds altogether, as one may list what is gone.
    with anyio.CancelScope(shield=True):
        while failures < _CLEANUP_FAILURES_MAX and rounds < _CLEANUP_ROUNDS_MAX:
            rounds += 1
            pause_s = 0.0
            try:
                page = await view.list(prefix)
                if not page.entries:
                    return None
                keys = [entry.key for entry in page.entries]
                failures = failures + 1 if keys == seen else 0
                seen = keys
                await _delete_each(view, keys)
            except QueueError as error:
                problem = error
                failures += 1
                pause_s = _CLEANUP_PAUSE_S * 2.0**failures
                if isinstance(error, Throttled):
                    pause_s = max(pause_s, _THROTTLED_PAUSE_S)
            if pause_s:
                await clock.sleep(pause_s)
    return problem


async def _delete_each(view: PluginStorage, keys: Sequence[str]) -> None:
    # One by one: a store that fails in one thing may well fail in DeleteObjects, too.
    for key in keys:
        await view.delete(key)
