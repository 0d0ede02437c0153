"""A model of S3 that misbehaves the way the real one does.

Each request *arrives*, is *applied* and is *answered* at moments drawn separately, so it can get lost before or after
it was applied, land long after its sender gave up, or be applied twice. Sources: AWS's documentation of conditional
writes (409 and 412 on races, 404 on If-Match of a missing key), its error list (503 SlowDown, 500 after applying),
Cloudflare's and Google's limits of about one write a second to one key (429), and what the conformance suite showed
of SeaweedFS. What a reply looks like on the wire (a 404 or a 412 for If-Match on a missing key, an error under status
200) is below this level: the S3 adapter's own tests have it.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from random import Random
from typing import Any

import msgspec

from s3queue_async.errors import QueueError, StoreUnavailable, Throttled
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Conflict,
    Deleted,
    Entry,
    IfAbsent,
    IfVersion,
    NotFound,
    Page,
    PreconditionFailed,
    StorageAnswer,
    Stored,
    Unmodified,
    Written,
)
from tests.simulation.world import EPOCH_S, Process, World

READ_TIMEOUT_S = 10.0
LATE_MAX_S = 60.0
STORM_PART = 0.7
SERVERS_APART_S = 0.5
"""Servers' clocks differ from the true time by up to this, so from each other by twice as much."""
RACING_CONFLICT_PART = 0.3
"""How many of the conditional writes that lose a race are answered with 409 instead of 412."""


@dataclass(frozen=True)
class Profile:
    """How fast a store is: the middle of a request's way there and back, seconds."""

    name: str
    read_s: float
    write_s: float
    list_s: float
    key_writes_per_s: float = float("inf")


PROFILES = (
    Profile("standard", 0.03, 0.07, 0.08),
    Profile("express", 0.004, 0.005, 0.008),
    Profile("r2", 0.05, 0.12, 0.1, key_writes_per_s=1.0),
    Profile("minio", 0.003, 0.005, 0.01),
)


REQUEST_FAULTS = (
    "lost request",
    "lost reply",
    "late write",
    "repeated write",
    "slow reply",
    "409",
    "409 of a race",
    "429 for one key",
    "500",
    "500 after applying",
    "503 slow down",
    "storm of 503",
    "outage of a prefix",
    "error under status 200",
    "cut off",
    "cut on the way back only",
)
"""What can become of a request, as the summary names it."""


PARTITIONS = ("ready/", "delayed/", "claims/", "plugin/workers/", "plugin/dedup/")
"""Prefixes that a store may serve from machines of their own, as S3 does."""


class Wrong(Enum):
    """Stores on which no queue may be opened."""

    IGNORES_IF_NONE_MATCH = "ignores If-None-Match"
    IGNORES_IF_MATCH = "ignores If-Match"
    CREATES_NOT_ATOMICALLY = "looks whether a key is free, and writes a moment later"
    LISTS_UNORDERED = "lists in no order, without start-after, as S3 Express does"


@dataclass
class Faults:
    """How often what goes wrong, as a part of all requests; all of it ends when ``active`` is cleared."""

    active: bool = True
    lost_request: float = 0.0
    lost_reply: float = 0.0
    late: float = 0.0
    repeated: float = 0.0
    throttled: float = 0.0
    server_error: float = 0.0
    error_after_applying: float = 0.0
    conflict: float = 0.0
    slow: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    storm_until: float = 0.0
    outages: int = 0
    partitions: tuple[str, ...] = PARTITIONS
    outage_prefix: str = ""
    outage_until: float = 0.0

    @property
    def any(self) -> bool:
        """Whether requests go wrong at all."""
        return any(
            (
                self.lost_request,
                self.lost_reply,
                self.late,
                self.repeated,
                self.throttled,
                self.server_error,
                self.error_after_applying,
                self.conflict,
                self.slow,
                self.outages,
            )
        )


@dataclass(frozen=True)
class _Object:
    body: bytes
    version: str
    modified_s: float


class Store:
    """The objects, and the servers before them.

    Args:
        conditional_delete: Whether a DELETE keeps its If-Match; many stores ignore it.
        wrong: What is wrong with it, if anything is.
    """

    def __init__(
        self,
        world: World,
        profile: Profile,
        faults: Faults,
        *,
        rng: Random,
        page_max: int = LIST_LIMIT_MAX,
        conditional_delete: bool = True,
        wrong: Wrong | None = None,
    ) -> None:
        self.world = world
        self.profile = profile
        self.faults = faults
        self.rng = rng
        self.page_max = page_max
        self.conditional_delete = conditional_delete
        self.wrong = wrong
        self.objects: dict[str, _Object] = {}
        self.fronts = [rng.uniform(-SERVERS_APART_S, SERVERS_APART_S) for _ in range(3)]
        self.requests: Counter[str] = Counter()
        self.written_at: dict[str, float] = {}
        self.takeovers = 0
        self.unlisted: tuple[str, ...] = ()
        self.landing_until = 0.0
        self.failed_at: dict[str, float] = {}
        self.on_change: list[Callable[[str], None]] = []

    def date(self, front: float) -> float:
        """What a server's clock shows in its headers: whole seconds."""
        return float(int(EPOCH_S + self.world.time() + front))

    # Each of these is atomic: it is called at the moment at which the request is applied.

    def get(self, key: str, span: tuple[int, int] | None, unless: str | None, front: float) -> Any:
        found = self.objects.get(key)
        if found is None:
            return NotFound(key, date_s=self.date(front))
        if unless == found.version:
            return Unmodified(self.date(front))
        body = found.body if span is None else found.body[span[0] : span[0] + span[1]]
        return Stored(key, body, found.version, found.modified_s, self.date(front))

    def put(self, key: str, body: bytes, when: Condition | None, front: float) -> Any:
        if not self.holds(key, when):
            return PreconditionFailed(key, date_s=self.date(front))
        found = self.objects.get(key)
        if found is not None and key.startswith("claims/"):
            self.takeovers += _owner(found.body) != _owner(body)
        version = hashlib.md5(body, usedforsecurity=False).hexdigest()
        self.objects[key] = _Object(body, version, self.date(front))
        self._changed(key)
        return Written(version, self.date(front))

    def holds(self, key: str, when: Condition | None) -> bool:
        """Whether a condition holds, as this store sees it."""
        found = self.objects.get(key)
        if isinstance(when, IfAbsent):
            return found is None or self.wrong is Wrong.IGNORES_IF_NONE_MATCH
        if isinstance(when, IfVersion):
            return (found is not None and found.version == when.version) or self.wrong is Wrong.IGNORES_IF_MATCH
        return True

    def delete(self, key: str, when: IfVersion | None, front: float) -> Any:
        if self.conditional_delete and not self.holds(key, when):
            return PreconditionFailed(key, date_s=self.date(front))
        self.remove(key)
        return Deleted(self.date(front))

    def delete_many(self, keys: Sequence[str], front: float) -> Any:
        for key in keys:
            self.remove(key)
        return Deleted(self.date(front))

    def remove(self, key: str) -> None:
        if self.objects.pop(key, None) is not None:
            self._changed(key)

    def _changed(self, key: str) -> None:
        for call in self.on_change:
            call(key)

    def list_all(self) -> None:
        """Show everything in listings again."""
        self.unlisted = ()

    def list(self, prefix: str, after: str, limit: int, front: float) -> Any:
        keys = sorted(key for key in self.objects if key.startswith(prefix) and not key.startswith(self.unlisted))
        if self.wrong is Wrong.LISTS_UNORDERED:
            after = ""
            keys.sort(key=lambda key: hashlib.md5(key.encode(), usedforsecurity=False).digest())
        start = bisect_right(keys, after) if after else 0
        page = keys[start : start + min(limit, self.page_max)]
        entries = [
            Entry(key, self.objects[key].version, len(self.objects[key].body), self.objects[key].modified_s)
            for key in page
        ]
        return Page(entries, start + len(page) < len(keys), self.date(front))


def _owner(claim: bytes) -> object:
    return msgspec.json.decode(claim, type=dict[str, object])["owner"]


class Client:
    """One process's way to the store; satisfies Storage."""

    date_resolution_s = 1.0

    def __init__(self, store: Store, process: Process) -> None:
        self._store = store
        self._process = process

    async def open(self) -> None:
        await self.list("", limit=1)

    async def close(self) -> None:
        return None

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        reply: Stored | Unmodified = await self._call(
            "get", key, self._store.profile.read_s, lambda request: self._store.get(key, span, unless, request.front)
        )
        return reply

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        reply: Written = await self._call(
            "put", key, self._store.profile.write_s,
            lambda request: self._store.put(key, body, request.when, request.front), when,
        )  # fmt: skip
        return reply

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        reply: Deleted = await self._call(
            "delete", key, self._store.profile.write_s,
            lambda request: self._store.delete(key, when, request.front), when,
        )  # fmt: skip
        return reply

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        reply: Deleted = await self._call(
            "delete_many", f"{len(keys)} keys", self._store.profile.write_s,
            lambda request: self._store.delete_many(keys[: round(len(keys) * request.part)], request.front),
        )  # fmt: skip
        return reply

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        reply: Page = await self._call(
            "list", prefix, self._store.profile.list_s,
            lambda request: self._store.list(prefix, after, limit, request.front),
        )  # fmt: skip
        return reply

    async def _call(
        self,
        operation: str,
        key: str,
        middle_s: float,
        apply: Callable[[_Request], Any],
        when: Condition | None = None,
    ) -> Any:
        store, process = self._store, self._process
        if not process.alive:
            raise StoreUnavailable("the process is gone", retriable=False)
        store.requests[operation] += 1
        request = _Request(self, operation, key, apply, when, middle_s)
        if process.cut_off:
            request.count("cut off")
            request.time_out()
        else:
            request.send()
        return await request.reply

    def _may_write(self, key: str) -> bool:
        store = self._store
        apart_s = 1 / store.profile.key_writes_per_s
        return store.world.time() - store.written_at.get(key, float("-inf")) >= apart_s


class _Request:
    """One request on its way: arrives, is applied, is answered, each at its own time if at all."""

    def __init__(
        self,
        client: Client,
        operation: str,
        key: str,
        apply: Callable[[_Request], Any],
        when: Condition | None,
        middle_s: float,
    ) -> None:
        self.client = client
        self.store = client._store
        self.world = self.store.world
        self.process = client._process
        self.operation = operation
        self.key = key
        self.apply = apply
        self.when = when
        self.is_write = operation in ("put", "delete", "delete_many")
        self.reply = self.world.create_future()
        self.sent_s = self.world.time()
        self.timed_out = False
        self.reply_is_lost = False
        self.error_instead: QueueError | None = None
        rng = self.store.rng
        self.front = rng.choice(self.store.fronts)
        self.way_there = middle_s * rng.lognormvariate(0, 0.5) / 2
        self.part = 1.0
        self.way_back = middle_s * rng.lognormvariate(0, 0.5) / 2

    def send(self) -> None:
        """Draw what becomes of it."""
        faults, rng = self.store.faults, self.store.rng
        if not faults.active:
            self._later(self.way_there, self.arrive)
            return
        if self.world.time() < faults.outage_until and self.key.startswith(faults.outage_prefix):
            rng.choice((self._fail_before, self._fail_after))()
            return
        throttled = STORM_PART if self.world.time() < faults.storm_until else faults.throttled
        fates: tuple[tuple[float, Callable[[], None]], ...] = (
            (faults.lost_request, self._lose_request),
            (faults.lost_reply, self._lose_reply),
            (faults.late if self.is_write else 0.0, self._come_late),
            (faults.repeated if self.is_write else 0.0, self._come_twice),
            (throttled, self._be_throttled),
            (faults.server_error, self._fail_before),
            (faults.error_after_applying, self._fail_after),
            (faults.server_error if self.operation == "delete_many" else 0.0, self._do_part),
            (faults.conflict if self.when is not None else 0.0, self._conflict),
            (faults.slow, self._be_slow),
        )
        for chance, fate in fates:
            if chance and rng.random() < chance:
                fate()
                return
        self._later(self.way_there, self.arrive)

    def arrive(self) -> None:
        """Be applied, and answered."""
        if self.store.wrong is Wrong.CREATES_NOT_ATOMICALLY and isinstance(self.when, IfAbsent):
            self._create_slowly()
            return
        outcome = self._apply()
        if outcome is not None:
            self._later(self.way_back, lambda: self.answer(outcome))

    def _create_slowly(self) -> None:
        """Look whether the key is free now, and write later."""
        if self.store.holds(self.key, self.when):
            self.when = None
            self._later(self.store.profile.write_s, self.arrive)
        else:
            self.answer(PreconditionFailed(self.key, date_s=self.store.date(self.front)))

    def _apply(self) -> Any:
        store = self.store
        if self.operation in ("put", "delete") and not self.client._may_write(self.key):
            store.faults.counts["429 for one key"] += 1
            store.failed_at[self.key] = self.world.time()
            self.answer(Throttled(f"{self.operation} {self.key}: too many writes of one key."))
            return None
        outcome = self.apply(self)
        if isinstance(outcome, PreconditionFailed):
            raced = store.written_at.get(self.key, float("-inf")) > self.sent_s
            if raced and store.rng.random() < RACING_CONFLICT_PART:
                store.faults.counts["409 of a race"] += 1
                outcome = Conflict(self.key, date_s=outcome.date_s)
        elif self.is_write:
            store.written_at[self.key] = self.world.time()
        shown = type(outcome).__name__ if isinstance(outcome, StorageAnswer) else "ok"
        condition = "" if self.when is None else self.when
        self.world.note(f"{self.process} {self.operation} {self.key} {condition} {shown}")
        return outcome

    def answer(self, outcome: Any) -> None:
        if not self.process.alive or self.reply.done() or self.reply_is_lost:
            return
        if self.error_instead is not None:
            outcome = self.error_instead
        if self.process.cut_off or self.process.deaf:
            self.time_out()
        elif isinstance(outcome, Exception):
            self.reply.set_exception(outcome)
        else:
            self.reply.set_result(outcome)

    def time_out(self) -> None:
        """Unless it is answered before: its sender gives up after the client's read timeout."""
        if not self.timed_out:
            self.timed_out = True
            left_s = self.sent_s + READ_TIMEOUT_S * self.store.rng.uniform(0.9, 1.1) - self.world.time()
            self._later(left_s, lambda: self.fail("no reply"))

    def fail(self, text: str) -> None:
        """What the sender's own machine finds out reaches it however the network is."""
        if self.process.alive and not self.reply.done():
            self.reply.set_exception(self._unavailable(text))

    def count(self, name: str) -> None:
        self.store.faults.counts[name] += 1
        self.store.failed_at[self.key] = self.world.time()
        self.world.note(f"{self.process} {self.operation} {self.key}: {name}")

    def _later(self, delay_s: float, call: Callable[[], Any]) -> None:
        self.world.later(delay_s, call)

    def _land(self, delay_s: float, call: Callable[[], Any]) -> None:
        """A write is applied later, whatever its sender does meanwhile."""
        self.store.landing_until = max(self.store.landing_until, self.world.time() + delay_s)
        self._later(delay_s, call)

    def _late_s(self) -> float:
        """Mostly seconds: what comes later than every margin is all alike."""
        return self.store.rng.uniform(0.01, self.store.rng.choice((2.0, 15.0, 15.0, LATE_MAX_S)))

    def _lose_request(self) -> None:
        self.count("lost request")
        self.time_out()

    def _lose_reply(self) -> None:
        self.count("lost reply")
        self.reply_is_lost = True
        self._later(self.way_there, self.arrive)
        if self.store.rng.random() < 0.5:
            self._later(self.way_there + self.way_back, lambda: self.fail("the connection was reset"))
        else:
            self.time_out()

    def _come_late(self) -> None:
        self.count("late write")
        self._land(self._late_s(), self.arrive)
        self.time_out()

    def _come_twice(self) -> None:
        self.count("repeated write")
        self._later(self.way_there, self.arrive)
        self._land(self.way_there + self._late_s(), self._apply)

    def _be_throttled(self) -> None:
        self.count("503 slow down")
        error = Throttled(f"{self.operation} {self.key}: slow down.")
        self._later(self.way_there + self.way_back, lambda: self.answer(error))

    def _fail_before(self) -> None:
        self.count("500")
        error = self._unavailable("500")
        self._later(self.way_there + self.way_back, lambda: self.answer(error))

    def _fail_after(self) -> None:
        self.count("500 after applying")
        self.error_instead = self._unavailable("500")
        self._later(self.way_there, self.arrive)

    def _do_part(self) -> None:
        """Delete some of the keys, and name the others in an error under status 200."""
        self.count("error under status 200")
        self.part = self.store.rng.random()
        self.error_instead = self._unavailable("some keys were not deleted")
        self._later(self.way_there, self.arrive)

    def _unavailable(self, text: str) -> StoreUnavailable:
        return StoreUnavailable(f"{self.operation} {self.key}: {text}.")

    def _conflict(self) -> None:
        self.count("409")
        error = Conflict(self.key, date_s=self.store.date(self.front))
        self._later(self.way_there + self.way_back, lambda: self.answer(error))

    def _be_slow(self) -> None:
        self.count("slow reply")
        self._land(self.store.rng.uniform(0.5, READ_TIMEOUT_S), self.arrive)
        self.time_out()
