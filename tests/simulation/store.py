"""A model of S3 that misbehaves the way the real one does.

Each request *arrives*, is *applied* and is *answered* at moments drawn separately, so it can get lost before or after
it was applied, land long after its sender gave up, or be applied twice. Sources: AWS's documentation of conditional
writes (409 and 412 on races, 404 on If-Match of a missing key), its error list (503 SlowDown, 500 after applying),
Cloudflare's and Google's limits of about one write a second to one key (429), and what the conformance suite showed
of SeaweedFS.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import msgspec

from s3queue_async.errors import StoreUnavailable, Throttled
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


@dataclass(frozen=True)
class _Object:
    body: bytes
    version: str
    modified_s: float


class Store:
    """The objects, and the servers before them."""

    def __init__(self, world: World, profile: Profile, faults: Faults, *, rng: Random, page_max: int) -> None:
        self.world = world
        self.profile = profile
        self.faults = faults
        self.rng = rng
        self.page_max = page_max
        self.objects: dict[str, _Object] = {}
        self.fronts = [rng.uniform(-0.4, 0.4) for _ in range(3)]
        self.requests: Counter[str] = Counter()
        self.written_at: dict[str, float] = {}
        self.takeovers = 0
        self.ignores_if_match = False
        self.ignores_if_none_match = False

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
        found = self.objects.get(key)
        refused = (isinstance(when, IfAbsent) and found is not None and not self.ignores_if_none_match) or (
            isinstance(when, IfVersion)
            and (found is None or found.version != when.version)
            and not self.ignores_if_match
        )
        if refused:
            return PreconditionFailed(key, date_s=self.date(front))
        if found is not None and key.startswith("claims/"):
            self.takeovers += _owner(found.body) != _owner(body)
        version = hashlib.md5(body, usedforsecurity=False).hexdigest()
        self.objects[key] = _Object(body, version, self.date(front))
        return Written(version, self.date(front))

    def delete(self, key: str, when: IfVersion | None, front: float) -> Any:
        found = self.objects.get(key)
        if when is not None and (found is None or found.version != when.version) and not self.ignores_if_match:
            return PreconditionFailed(key, date_s=self.date(front))
        self.objects.pop(key, None)
        return Deleted(self.date(front))

    def delete_many(self, keys: Sequence[str], front: float) -> Any:
        for key in keys:
            self.objects.pop(key, None)
        return Deleted(self.date(front))

    def list(self, prefix: str, after: str, limit: int, front: float) -> Any:
        keys = sorted(key for key in self.objects if key.startswith(prefix))
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
            "get", key, self._store.profile.read_s, lambda front: self._store.get(key, span, unless, front)
        )
        return reply

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        reply: Written = await self._call(
            "put", key, self._store.profile.write_s, lambda front: self._store.put(key, body, when, front), when
        )
        return reply

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        reply: Deleted = await self._call(
            "delete", key, self._store.profile.write_s, lambda front: self._store.delete(key, when, front), when
        )
        return reply

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        reply: Deleted = await self._call(
            "delete_many", f"{len(keys)} keys", self._store.profile.write_s,
            lambda front: self._store.delete_many(keys, front),
        )  # fmt: skip
        return reply

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        reply: Page = await self._call(
            "list", prefix, self._store.profile.list_s, lambda front: self._store.list(prefix, after, limit, front)
        )
        return reply

    async def _call(
        self,
        operation: str,
        key: str,
        middle_s: float,
        apply: Callable[[float], Any],
        when: Condition | None = None,
    ) -> Any:
        store, process = self._store, self._process
        if not process.alive:
            raise StoreUnavailable("the process is gone", retriable=False)
        store.requests[operation] += 1
        request = _Request(self, operation, key, apply, when, middle_s)
        if process.cut_off:
            request.count("cut off")
        else:
            request.send()
        store.world.later(READ_TIMEOUT_S * store.rng.uniform(0.9, 1.1), lambda: request.fail("no reply"))
        return await request.reply

    def _may_write(self, key: str) -> bool:
        store = self._store
        if store.profile.key_writes_per_s == float("inf"):
            return True
        now = store.world.time()
        if now - store.written_at.get(key, -1.0) < 1 / store.profile.key_writes_per_s:
            return False
        store.written_at[key] = now
        return True


class _Request:
    """One request on its way: arrives, is applied, is answered, each at its own time if at all."""

    def __init__(
        self,
        client: Client,
        operation: str,
        key: str,
        apply: Callable[[float], Any],
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
        rng = self.store.rng
        self.front = rng.choice(self.store.fronts)
        self.way_there = middle_s * rng.lognormvariate(0, 0.5) / 2
        self.way_back = middle_s * rng.lognormvariate(0, 0.5) / 2

    def send(self) -> None:
        """Draw what becomes of it."""
        faults, rng = self.store.faults, self.store.rng
        if not faults.active:
            self._later(self.way_there, self.arrive)
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
        outcome = self._apply()
        if outcome is not None:
            self._later(self.way_back, lambda: self.answer(outcome))

    def _apply(self) -> Any:
        if self.is_write and not self.client._may_write(self.key):
            self.store.faults.counts["429"] += 1
            self.answer(Throttled(f"{self.operation} {self.key}: too many writes of one key."))
            return None
        outcome = self.apply(self.front)
        shown = type(outcome).__name__ if isinstance(outcome, StorageAnswer) else "ok"
        condition = "" if self.when is None else self.when
        self.world.note(f"{self.process} {self.operation} {self.key} {condition} {shown}")
        return outcome

    def answer(self, outcome: Any) -> None:
        if self.process.alive and not self.process.cut_off and not self.reply.done():
            if isinstance(outcome, Exception):
                self.reply.set_exception(outcome)
            else:
                self.reply.set_result(outcome)

    def fail(self, text: str) -> None:
        """What the sender's own machine finds out reaches it however the network is."""
        if self.process.alive and not self.reply.done():
            self.reply.set_exception(StoreUnavailable(f"{self.operation} {self.key}: {text}."))

    def count(self, name: str) -> None:
        self.store.faults.counts[name] += 1
        self.world.note(f"{self.process} {self.operation} {self.key}: {name}")

    def _later(self, delay_s: float, call: Callable[[], Any]) -> None:
        self.world.later(delay_s, call)

    def _lose_request(self) -> None:
        self.count("lost request")

    def _lose_reply(self) -> None:
        self.count("lost reply")
        self._later(self.way_there, self._apply)
        if self.store.rng.random() < 0.5:
            self._later(self.way_there + self.way_back, lambda: self.fail("the connection was reset"))

    def _come_late(self) -> None:
        self.count("late write")
        self._later(self.store.rng.uniform(READ_TIMEOUT_S / 4, LATE_MAX_S), self.arrive)

    def _come_twice(self) -> None:
        self.count("repeated write")
        self._later(self.way_there, self.arrive)
        self._later(self.way_there + self.store.rng.uniform(0.01, LATE_MAX_S), self._apply)

    def _be_throttled(self) -> None:
        self.count("503")
        error = Throttled(f"{self.operation} {self.key}: slow down.")
        self._later(self.way_there + self.way_back, lambda: self.answer(error))

    def _fail_before(self) -> None:
        self.count("500")
        self._later(self.way_there + self.way_back, lambda: self.fail("500"))

    def _fail_after(self) -> None:
        self.count("500 after applying")
        self._later(self.way_there, self._apply)
        self._later(self.way_there + self.way_back, lambda: self.fail("500"))

    def _conflict(self) -> None:
        self.count("409")
        error = Conflict(self.key, date_s=self.store.date(self.front))
        self._later(self.way_there + self.way_back, lambda: self.answer(error))

    def _be_slow(self) -> None:
        self.count("slow")
        self._later(self.store.rng.uniform(0.5, READ_TIMEOUT_S), self.arrive)
