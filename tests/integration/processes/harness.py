"""Starts, stops and kills the programs, reads what they wrote, and looks into the store behind the queue's back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from s3queue_async.engine.registry import Heartbeat
from s3queue_async.engine.together import together
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.claim import Claim
from s3queue_async.storage.base import NotFound, Storage, Stored
from s3queue_async.storage.open import storage_from_url
from s3queue_async.testing.servers import Server
from tests.integration.processes import programs
from tests.integration.processes.programs import Line, Task, Told

BOARD = f"plugin/{layout.COORDINATOR}/{layout.BOARD}"
PAUSE_S = 0.02
READS_AT_ONCE = 16
STARTS_WITHIN_S = 30.0
ENDS_WITHIN_S = 30.0
SOON_S = 60.0
"""For what has no figure of its own: long enough for a busy machine."""

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Where a test's queue lives."""

    kind: str
    url: str
    directory: Path
    server: Server | None = None


async def until(what: str, condition: Callable[[], Any], *, within_s: float = SOON_S) -> None:
    """Return once the condition holds; fail, naming it, when it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        await asyncio.sleep(PAUSE_S)


class Tail(Generic[T]):
    """The lines of a file that grows, decoded; reads what is new only."""

    def __init__(self, path: Path, kind: type[T]) -> None:
        self._path = path
        self._decoder = msgspec.json.Decoder(kind)
        self._offset = 0
        self._lines: list[T] = []

    def read(self) -> list[T]:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                whole = file.read().rpartition(b"\n")[0]
            if whole:
                self._offset += len(whole) + 1
                self._lines += [self._decoder.decode(line) for line in whole.split(b"\n")]
        return self._lines


class Program:
    """One process."""

    def __init__(self, name: str, task: Task, directory: Path, environment: dict[str, str]) -> None:
        self.name = name
        self.task = task
        self.log = directory / f"{name}.err"
        self._told = Tail(directory / f"{name}.out", Told)
        self._journal = Tail(Path(task.journal), Line)
        # -P: the directory of the program is not where modules come from.
        command = [sys.executable, "-P", programs.__file__, msgspec.json.encode(task).decode()]
        with (directory / f"{name}.out").open("wb") as output, self.log.open("wb") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment, cwd=directory
            )
        self.pid = self.process.pid

    # -- what it says --------------------------------------------------------------------------------------------

    def told(self, name: str) -> list[Told]:
        return [event for event in self._told.read() if event.name == name]

    @property
    def worker_ids(self) -> list[str]:
        """The ids under which it was registered so far, one for each life."""
        return [event.about["worker_id"] for event in self.told("workers.started")]

    @property
    def worker_id(self) -> str:
        return self.worker_ids[-1]

    @property
    def lines(self) -> list[Line]:
        return self._journal.read()

    def of(self, what: str) -> list[Line]:
        return [line for line in self.lines if line.what == what]

    @property
    def started(self) -> list[Line]:
        return self.of("started")

    @property
    def handled(self) -> list[Line]:
        return self.of("handled")

    async def ready(self, lives: int = 1) -> None:
        """Return once it is registered (for the ``lives``-th time)."""
        await until(
            f"{self.name} is registered", lambda: len(self.worker_ids) >= lives or self.ended, within_s=STARTS_WITHIN_S
        )
        assert not self.ended, f"{self.name} ended with {self.process.returncode}:\n{self.log_tail()}"

    def log_tail(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")[-3000:]

    # -- what is done to it --------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def signal(self, number: signal.Signals) -> float:
        """Send a signal; returns when (CLOCK_MONOTONIC)."""
        at = time.monotonic()
        self.process.send_signal(number)
        return at

    def kill(self) -> float:
        """SIGKILL it and see it gone; returns when it was sent."""
        at = self.signal(signal.SIGKILL)
        assert self.process.wait(ENDS_WITHIN_S) == -signal.SIGKILL
        return at

    async def stop(self, *, within_s: float = ENDS_WITHIN_S) -> None:
        """SIGTERM it: it must end with exit code 0, and leave nothing behind that asyncio complains about."""
        self.signal(signal.SIGTERM)
        await self.ends_well(within_s=within_s)

    async def ends_well(self, *, within_s: float = ENDS_WITHIN_S) -> None:
        await until(f"{self.name} ends", lambda: self.ended, within_s=within_s)
        assert self.process.returncode == 0, f"{self.name} ended with {self.process.returncode}:\n{self.log_tail()}"
        written = self.log.read_text(encoding="utf-8", errors="replace")
        for complaint in ("Traceback", "was never awaited", "was destroyed but it is pending", "Warning:"):
            assert complaint not in written, f"{self.name} wrote:\n{written[-3000:]}"


@dataclass
class Fleet:
    """All programs of one test."""

    place: Place
    settings: dict[str, Any] = field(default_factory=dict)
    programs: list[Program] = field(default_factory=list)

    def start(self, name: str, action: str = "count", **options: Any) -> Program:
        """Start a program; ``options`` are those of its Task."""
        name = f"{name}-{len(self.programs)}"
        options["settings"] = {**self.settings, **options.get("settings", {})}
        journal = str(self.place.directory / f"{name}.journal")
        task = Task(url=self.place.url, journal=journal, action=action, **options)
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("S3QUEUE_", "COV_"))}
        if self.place.server is not None:
            environment.update(self.place.server.environment())
        program = Program(name, task, self.place.directory, environment)
        self.programs.append(program)
        return program

    async def start_workers(self, number: int, action: str = "count", **options: Any) -> list[Program]:
        """Start workers and return once all of them are registered."""
        workers = [self.start("worker", action, **options) for _ in range(number)]
        for worker in workers:
            await worker.ready()
        return workers

    def lines(self, what: str) -> list[Line]:
        return [line for program in self.programs for line in program.of(what)]

    @property
    def handled(self) -> list[Line]:
        return self.lines("handled")

    async def handles(self, ids: Iterable[str], *, within_s: float = SOON_S) -> None:
        """Return once each of these messages was handled at least once."""
        wanted = set(ids)
        await until(
            f"{len(wanted)} messages are handled",
            lambda: wanted <= {line.message_id for line in self.handled},
            within_s=within_s,
        )

    def times_handled(self) -> Counter[str]:
        return Counter(line.message_id for line in self.handled)

    async def stop(self) -> None:
        """SIGTERM all that run; each must end well."""
        running = [program for program in self.programs if not program.ended]
        for program in running:
            program.signal(signal.SIGTERM)
        for program in running:
            await program.ends_well()

    def end(self, *, show: bool) -> None:
        """Whatever happened: no process stays behind."""
        for program in self.programs:
            if not program.ended:
                program.signal(signal.SIGKILL)
                program.process.wait(ENDS_WITHIN_S)
            if show:
                print(f"--- {program.name} (exit code {program.process.returncode})\n{program.log_tail()}")


class Look:
    """The queue's objects, read without the queue."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage

    async def keys(self, prefix: str) -> list[str]:
        found: list[str] = []
        while True:
            page = await self.storage.list(prefix, after=found[-1] if found else "")
            found += [entry.key for entry in page.entries]
            if not page.more:
                return found

    async def messages(self) -> dict[str, list[str]]:
        """How many keys of each kind there are for messages: empty when nothing is left of any."""
        kinds = {prefix: await self.keys(prefix) for prefix in (layout.READY, layout.DELAYED, layout.DEAD)}
        return {prefix: keys for prefix, keys in kinds.items() if keys}

    async def gone(self, *, within_s: float = SOON_S) -> None:
        """Return once no message is left, dead letters apart."""
        deadline = time.monotonic() + within_s
        while left := [*await self.keys(layout.READY), *await self.keys(layout.DELAYED)]:
            assert time.monotonic() < deadline, f"not settled within {within_s:g} s: {left}"
            await asyncio.sleep(PAUSE_S)

    async def body(self, key: str) -> bytes | None:
        try:
            stored = await self.storage.get(key)
        except NotFound:
            return None
        assert isinstance(stored, Stored)
        return stored.body

    async def claims(self) -> dict[str, Claim]:
        """Every claim by the segment's whole key, that of ended segments, too."""
        found = {}

        async def read(key: str) -> None:
            body = await self.body(key)
            if body is not None:
                claim = claims.decode(key, body)
                found[claim.segment] = claim

        await together(await self.keys(layout.CLAIMS), read, at_once=READS_AT_ONCE)
        return found

    async def held_by(self, worker_id: str) -> dict[str, list[str]]:
        """The segments on which this worker has the claim, with the ids of the messages that are not ended in it."""
        held = {}
        for key, claim in (await self.claims()).items():
            body = await self.body(key) if claim.owner == worker_id else None
            if body is not None:
                records = segments.decode(key, body).index.records
                ended = claim.ended()
                held[key] = [record.id for index, record in enumerate(records) if index not in ended]
        return held

    async def workers(self) -> dict[str, Heartbeat]:
        """Every registry entry by the worker's id."""
        prefix = f"plugin/{layout.WORKERS}/"
        found = {}
        for key in await self.keys(prefix):
            body = await self.body(key)
            if body is not None:
                found[key.removeprefix(prefix)] = msgspec.json.decode(body, type=Heartbeat)
        return found


@contextlib.asynccontextmanager
async def looking(place: Place) -> AsyncIterator[Look]:
    """Open the queue's store."""
    storage = storage_from_url(place.url)
    await storage.open()
    try:
        yield Look(storage)
    finally:
        await storage.close()


@contextlib.contextmanager
def fleet(place: Place, **settings: Any) -> Iterator[Fleet]:
    """The programs of one test; all of them are gone at its end."""
    started = Fleet(place, settings)
    show = True
    try:
        yield started
        show = False
    finally:
        started.end(show=show)
