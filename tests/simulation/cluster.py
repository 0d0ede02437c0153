"""One simulated cluster: a scenario drawn from a seed, run to its end, with everything recorded for the checker."""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

import anyio
import msgspec

from s3queue_async import Context, DeadLetter, QueueError, Release, Retry, S3Queue, Settings
from s3queue_async.events import EnqueueAmbiguous, LeaseLostEvent, WorkerStarted
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.layout import SegmentKey
from tests.simulation.store import LATE_MAX_S, PROFILES, Client, Faults, Profile, Store
from tests.simulation.world import Process, ProcessClock, World, deterministic_scopes

FAULTY_FOR_S = 240.0
SCAN_EVERY_S = 5.0


class Job(msgspec.Struct, frozen=True):
    """A message's payload: what its handler is to do, drawn before."""

    number: int
    kind: str
    duration_s: float
    failures: int = 0


@dataclass
class Run:
    """One time that a handler ran on a message."""

    message_id: str
    number: int
    process: Process
    worker_id: str
    attempt: int
    token: int
    started_s: float
    ended_s: float | None = None
    outcome: str = ""


@dataclass
class Sent:
    """One enqueue that was acknowledged."""

    message_id: str
    job: Job
    acknowledged_s: float
    due_s: float
    dedup_id: str | None


@dataclass(frozen=True)
class Scenario:
    """What a seed means."""

    seed: int
    profile: Profile
    settings: Settings
    workers: int
    producers: int
    jobs: tuple[Job, ...]
    faults: Faults
    crashes: int
    pauses: int
    cuts: int
    jumps: int
    terminations: int
    drift: float
    page_max: int
    concurrency: int

    @property
    def faultless(self) -> bool:
        return not (self.crashes or self.pauses or self.cuts or self.jumps or self.terminations)


@dataclass
class History:
    """What happened."""

    scenario: Scenario
    sent: list[Sent] = field(default_factory=list)
    unknown: list[Job] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    crashed_at: dict[str, float] = field(default_factory=dict)
    disturbed: list[tuple[float, float, str, str]] = field(default_factory=list)
    lost: list[tuple[float, str, str]] = field(default_factory=list)
    ambiguous: set[str] = field(default_factory=set)
    dead: dict[str, tuple[str, int]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    requests: Counter[str] = field(default_factory=Counter)
    started_workers: Counter[str] = field(default_factory=Counter)
    faults_end_s: float = 0.0
    empty_s: float | None = None
    leftovers: list[str] = field(default_factory=list)
    simulated_s: float = 0.0
    takeovers: int = 0
    trace: list[str] = field(default_factory=list)


def draw(seed: int) -> Scenario:
    """The scenario of a seed."""
    rng = Random(f"scenario {seed}")
    severity = rng.choice((0.0, 0.0, 0.3, 1.0, 3.0))

    def chance(most: float) -> float:
        return rng.uniform(0, most) * severity if rng.random() < 0.7 else 0.0

    faults = Faults(
        lost_request=chance(0.03),
        lost_reply=chance(0.03),
        late=chance(0.03),
        repeated=chance(0.03),
        throttled=chance(0.03),
        server_error=chance(0.02),
        error_after_applying=chance(0.02),
        conflict=chance(0.05),
        slow=chance(0.02),
    )
    visibility_s = rng.choice((6.0, 10.0, 30.0))
    settings = Settings(
        visibility_timeout=visibility_s,
        heartbeat_interval=visibility_s / 3,
        max_poll_interval=rng.choice((1.0, 5.0)),
        segment_messages_max=rng.choice((1, 4, 16, 256)),
        split_after=rng.choice((None, 0.5, 2.0)),
        checkpoint_interval=rng.choice((0.5, 5.0)),
        backoff_base=rng.choice((0.2, 1.0)),
        max_attempts=rng.choice((2, 3, 5)),
        drain_timeout=rng.choice((1.0, 10.0)),
        retain_completed=rng.choice((None, None, 3600.0)),
    )
    process_faults = rng.random() < 0.7
    jobs = []
    for number in range(rng.randint(3, 40)):
        kind = rng.choices(
            ("ok", "fails", "retry", "dead", "release", "poison"), (70, 10, 5, 3, 4, 2 if process_faults else 0)
        )[0]
        duration_s = rng.choice((0.0, 0.01, 0.3, 2.0, rng.uniform(0, 12.0)))
        jobs.append(Job(number, kind, duration_s, rng.randint(1, settings.max_attempts - 1)))
    return Scenario(
        seed=seed,
        profile=rng.choice(PROFILES),
        settings=settings,
        workers=rng.randint(1, 4),
        producers=rng.randint(1, 2),
        jobs=tuple(jobs),
        faults=faults,
        crashes=rng.randint(0, 4) if process_faults else 0,
        pauses=rng.randint(0, 3) if process_faults else 0,
        cuts=rng.randint(0, 2) if process_faults else 0,
        jumps=rng.randint(0, 1) if process_faults else 0,
        terminations=rng.randint(0, 2) if process_faults else 0,
        drift=rng.uniform(-4e-4, 4e-4),
        page_max=rng.choice((2, 7, 1000)),
        concurrency=rng.choice((1, 3, 8)),
    )


class Cluster:
    """Runs a scenario."""

    def __init__(self, scenario: Scenario, world: World) -> None:
        self.scenario = scenario
        self.world = world
        self.rng = Random(f"cluster {scenario.seed}")
        self.store = Store(
            world,
            scenario.profile,
            scenario.faults,
            rng=Random(f"store {scenario.seed}"),
            page_max=scenario.page_max,
        )
        self.history = History(scenario)
        self.processes: list[Process] = []
        self.released: Counter[int] = Counter()
        self.failed: Counter[int] = Counter()

    # -- processes -----------------------------------------------------------------------------------------------

    def spawn(self, name: str, main: Callable[[Process], Any]) -> Process:
        process = Process(
            self.world, f"{name}.{len(self.processes)}", drift=self.scenario.drift * self.rng.uniform(-1, 1)
        )
        process.offset_s = self.rng.uniform(0, 1e5)
        self.processes.append(process)
        _ = process.start(lambda: main(process))
        return process

    def queue(self, process: Process) -> S3Queue[Job]:
        queue: S3Queue[Job] = S3Queue(
            storage=Client(self.store, process),
            payload_type=Job,
            settings=self.scenario.settings,
            clock=ProcessClock(process),
            rng=Random(f"process {process} {self.scenario.seed}"),
        )
        # Host name and process id would make a seed's ranking depend on the machine.
        names = Random(f"names {process} {self.scenario.seed}")
        queue._new_worker_id = lambda: f"{process}-{names.getrandbits(40):010x}"  # type: ignore[method-assign]

        def on_lost(event: LeaseLostEvent) -> None:
            self.world.note(f"{process} lost {event.worker_id}: {event.reason} {event.message_ids}")
            self.history.lost.append((self.world.time(), str(process), event.worker_id))

        queue.on("lease.lost", on_lost)
        queue.on(WorkerStarted.name, lambda event: self.history.started_workers.update([event.worker_id]))
        queue.on(EnqueueAmbiguous.name, lambda event: self.history.ambiguous.update(event.message_ids))
        return queue

    async def worker(self, process: Process) -> None:
        while not process.stop.is_set():
            try:
                async with self.queue(process) as queue:

                    @queue.handler(concurrency=self.scenario.concurrency)
                    async def handle(job: Job, context: Context) -> str:
                        return await self.handle(process, job, context)

                    await process.stop.wait()
                    self.world.note(f"{process} drains")
            except QueueError as error:
                self.world.note(f"{process} cannot open: {error}")
                await anyio.sleep(1.0)
        self.world.note(f"{process} ends")

    async def handle(self, process: Process, job: Job, context: Context) -> str:
        run = Run(
            context.message_id,
            job.number,
            process,
            context.worker_id,
            context.attempt,
            context.token,
            self.world.time(),
        )
        self.history.runs.append(run)
        self.world.note(f"{process} starts {job.number} {context.message_id} attempt {context.attempt} {context.token}")
        try:
            await anyio.sleep(job.duration_s)
            if job.kind == "poison":
                run.outcome = "poison"
                self.crash(process)
                await anyio.sleep_forever()
            if job.kind == "dead":
                raise DeadLetter("as asked")
            if job.kind == "release" and not self.released[job.number]:
                self.released[job.number] += 1
                raise Release()
            if job.kind in ("fails", "retry") and self.failed[job.number] < job.failures:
                self.failed[job.number] += 1
                raise ValueError("as asked") if job.kind == "fails" else Retry(delay=0.5)
            run.outcome = "returned"
            return f"result {job.number}"
        except (DeadLetter, Release, Retry, ValueError) as error:
            run.outcome = type(error).__name__
            raise
        except BaseException:
            run.outcome = "cancelled"
            raise
        finally:
            run.ended_s = self.world.time()
            self.world.note(f"{process} ended {job.number}: {run.outcome}")

    async def producer(self, process: Process, jobs: list[Job]) -> None:
        while True:
            try:
                async with self.queue(process) as queue:
                    await self._produce(queue, jobs)
                return
            except QueueError as error:
                self.world.note(f"{process} cannot produce: {error}")
                await anyio.sleep(1.0)

    async def _produce(self, queue: S3Queue[Job], jobs: list[Job]) -> None:
        rng = self.rng
        while jobs:
            await anyio.sleep(rng.choice((0.0, 0.0, 0.1, 5.0)))
            together = [jobs.pop(0) for _ in range(min(len(jobs), rng.choice((1, 1, 5, 20))))]
            options: dict[str, Any] = {"priority": rng.choice((0, 0, 9))}
            if rng.random() < 0.2:
                options["delay"] = rng.choice((0.5, 3.0, 20.0))
            dedup = rng.random() < 0.3
            due_s = self.world.time() + options.get("delay", 0.0)
            if len(together) > 1 and rng.random() < 0.5 and not dedup:
                try:
                    ids = await queue.enqueue_many(together, **options)
                except QueueError as error:
                    self.world.note(f"enqueue_many failed: {error}")
                    known: list[str] = getattr(error, "enqueued_ids", [])
                    self.history.unknown.extend(together[len(known) :])
                    ids = known
                for job, message_id in zip(together, ids, strict=False):
                    self._acknowledged(job, message_id, due_s, None)
                continue
            async with anyio.create_task_group() as group:
                for job in together:
                    group.start_soon(self._enqueue, queue, job, options, due_s, f"job {job.number}" if dedup else None)

    async def _enqueue(
        self, queue: S3Queue[Job], job: Job, options: dict[str, Any], due_s: float, dedup_id: str | None
    ) -> None:
        for attempt in range(3):
            try:
                message_id = await queue.enqueue(job, dedup_id=dedup_id, **options)
            except QueueError as error:
                self.world.note(f"enqueue of {job.number} failed: {error}")
                if dedup_id is None or attempt == 2:
                    self.history.unknown.append(job)
                    return
            else:
                self._acknowledged(job, message_id, due_s, dedup_id)
                return

    def _acknowledged(self, job: Job, message_id: str, due_s: float, dedup_id: str | None) -> None:
        self.world.note(f"acknowledged {job.number} {job.kind} as {message_id}")
        self.history.sent.append(Sent(message_id, job, self.world.time(), due_s, dedup_id))

    # -- what goes wrong -----------------------------------------------------------------------------------------

    def crash(self, process: Process) -> None:
        if not process.alive:
            return
        process.crash()
        self.history.crashed_at[str(process)] = self.world.time()
        if process.name.startswith("worker"):
            self.world.later(self.rng.uniform(0.1, 10.0), self._restart)

    def _restart(self) -> None:
        self.spawn("worker", self.worker)

    async def disturb(self) -> None:
        """Everything that happens to processes, at times drawn before."""
        scenario, rng = self.scenario, self.rng
        deeds: list[tuple[float, str]] = []
        for deed, count in (
            ("crash", scenario.crashes),
            ("pause", scenario.pauses),
            ("cut", scenario.cuts),
            ("jump", scenario.jumps),
            ("terminate", scenario.terminations),
        ):
            deeds += [(rng.uniform(0.5, FAULTY_FOR_S * rng.random()), deed) for _ in range(count)]
        if scenario.faults.throttled and rng.random() < 0.5:
            deeds.append((rng.uniform(1, FAULTY_FOR_S / 2), "storm"))
        deeds.sort()
        began = self.world.time()
        for at_s, deed in deeds:
            await anyio.sleep(max(0.0, began + at_s - self.world.time()))
            await self._do(deed)
        await anyio.sleep(max(0.0, began + FAULTY_FOR_S - self.world.time()))

    async def _do(self, deed: str) -> None:
        rng, faults = self.rng, self.scenario.faults
        alive = [process for process in self.processes if process.runs and not process.stop.is_set()]
        if deed == "storm":
            faults.counts[deed] += 1
            faults.storm_until = self.world.time() + rng.uniform(5, 40)
            return
        workers = [process for process in alive if process.name.startswith("worker")]
        if not workers or (deed == "terminate" and len(workers) < 2):
            return
        faults.counts[deed] += 1
        process = rng.choice(workers if deed == "terminate" or rng.random() < 0.8 else alive)
        for_s = rng.choice((1.0, self.scenario.settings.visibility_timeout, rng.uniform(1, 100.0)))
        now = self.world.time()
        if deed == "crash":
            self.crash(process)
        elif deed == "terminate":
            self.world.note(f"{process} is told to end")
            process.stop.set()
            self.world.later(rng.uniform(0.1, 20.0), self._restart)
        elif deed == "jump":
            self.world.note(f"{process}'s clock jumps by {for_s:.1f} s")
            process.offset_s += for_s
            self.history.disturbed.append((now, now, str(process), deed))
        elif deed == "pause":
            process.pause()
            self.history.disturbed.append((now, now + for_s, str(process), deed))
            self.world.later(for_s, process.resume)
        elif deed == "cut":
            process.cut_off = True
            self.world.note(f"{process} is cut off for {for_s:.1f} s")
            self.history.disturbed.append((now, now + for_s, str(process), deed))

            def mend() -> None:
                process.cut_off = False

            self.world.later(for_s, mend)

    # -- the whole -----------------------------------------------------------------------------------------------

    async def run(self) -> History:
        scenario = self.scenario
        per_producer: list[list[Job]] = [[] for _ in range(scenario.producers)]
        for job in scenario.jobs:
            self.rng.choice(per_producer).append(job)
        for jobs in per_producer:
            self.spawn("producer", partial(self.producer, jobs=jobs))
        for _ in range(scenario.workers):
            self.spawn("worker", self.worker)
        async with anyio.create_task_group() as group:
            group.start_soon(self._scan)
            await self.disturb()
            await self._recover()
            group.cancel_scope.cancel()
        await self._end()
        return self.history

    async def _recover(self) -> None:
        """The faults are over: everything must become empty in bounded time."""
        scenario, history = self.scenario, self.history
        scenario.faults.active = False
        history.faults_end_s = self.world.time()
        for process in self.processes:
            process.cut_off = False
            process.resume()
        self.world.note("the faults are over")
        settings = scenario.settings
        longest_s = max(job.duration_s for job in scenario.jobs)
        bound_s = (
            8 * settings.visibility_timeout
            + settings.max_attempts * 20.0
            + (longest_s + 5.0) * len(scenario.jobs)
            + 120.0
        )
        while self.world.time() < history.faults_end_s + bound_s:
            await anyio.sleep(2.0)
            producing = any(p.alive and p.name.startswith("producer") and not p.tasks[0].done() for p in self.processes)
            if not producing and not self._live_keys():
                history.empty_s = self.world.time()
                return
        history.problems.append(f"not empty {bound_s:.0f} s after the faults ended: {self._live_keys()[:5]}")

    def _live_keys(self) -> list[str]:
        return [key for key in self.store.objects if key.startswith((layout.READY, layout.DELAYED))]

    async def _end(self) -> None:
        """Let sweeps do their work, end every process in order, and look at what is left."""
        settings = self.scenario.settings
        await anyio.sleep(LATE_MAX_S + 4 * settings.visibility_timeout + 2 * settings.claim_linger)
        self._collect_dead()
        for process in self.processes:
            process.stop.set()
        running = [p.tasks[0] for p in self.processes if p.alive]
        await asyncio.wait(running, timeout=120.0)
        stuck = [str(p) for p in self.processes if p.alive and not p.tasks[0].done()]
        if stuck:
            self.history.problems.append(f"processes did not end: {stuck}")
        for process in self.processes:
            if process.alive and process.tasks[0].done() and process.tasks[0].exception() is not None:
                failure = process.tasks[0].exception()
                while isinstance(failure, BaseExceptionGroup):
                    failure = failure.exceptions[0]
                where = "".join(traceback.format_exception(failure)[-3:])
                self.history.problems.append(f"{process} failed: {failure!r} {where}")
        allowed: tuple[str, ...] = (layout.CONFIG, "plugin/totals/", "plugin/dedup/", layout.DEAD, layout.HISTORY)
        if self.scenario.faults.counts["late write"] or self.scenario.faults.counts["repeated write"]:
            # A write of the probe that lands after the probe cleaned up.
            allowed = (*allowed, "plugin/probe/")
        self.history.leftovers = [key for key in self.store.objects if not key.startswith(allowed)]
        self.history.requests = self.store.requests
        self.history.takeovers = self.store.takeovers

    def _collect_dead(self) -> None:
        for key, found in list(self.store.objects.items()):
            if key.startswith(layout.DEAD):
                for record in segments.decode(key, found.body).index.records:
                    reason = record.failure.reason if record.failure else ""
                    self.history.dead[record.id] = (reason, record.attempts)

    async def _scan(self) -> None:
        """One live copy of each message at each look (invariant 3)."""
        while True:
            await anyio.sleep(SCAN_EVERY_S)
            copies: dict[str, list[str]] = {}
            for key, found in self.store.objects.items():
                if key.startswith((layout.READY, layout.DELAYED, layout.DEAD)):
                    for message_id in self._live_in(key, found.body, found.modified_s):
                        copies.setdefault(message_id, []).append(key)
            for message_id, keys in copies.items():
                if len(keys) > 1 and message_id not in self.history.ambiguous:
                    self.history.problems.append(f"{message_id} is live in {keys} at {self.world.time() - 1000:.1f}")

    def _live_in(self, key: str, body: bytes, modified_s: float) -> list[str]:
        parsed = SegmentKey.parse(key)
        if segments.is_void(parsed.created_ms, modified_s, self.scenario.settings.segment_age):
            return []
        index = segments.decode(key, body).index
        ended: set[int] = set()
        own = self.store.objects.get(parsed.claim)
        if own is not None:
            ended = claims.decode(parsed.claim, own.body).ended()
        if index.parent is not None and index.parent in self.store.objects:
            parent = self.store.objects.get(SegmentKey.parse(index.parent).claim)
            moves = [] if parent is None else claims.decode(index.parent, parent.body).moves
            # While its parent is there, a moved copy lives from the moment at which the parent's claim gave its
            # messages away; a key that the claim does not name any more never will.
            if not any(move.key == key for move in moves):
                return []
        return [
            record.id for number, record in enumerate(index.records) if number not in ended and record.dedup_id is None
        ]


def simulate(seed: int, *, prepare: Callable[[Cluster], None] | None = None) -> History:
    """Run the scenario of a seed."""
    logging.disable(logging.CRITICAL)
    deterministic_scopes()
    scenario = draw(seed)
    world = World(seed)
    history: History
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            asyncio.set_event_loop(world)
            cluster = Cluster(scenario, world)
            if prepare is not None:
                prepare(cluster)
            history = world.run_until_complete(cluster.run())
            history.simulated_s = world.time() - 1000.0
            history.trace = world.trace
        finally:
            for task in asyncio.all_tasks(world):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            world.set_exception_handler(lambda loop, context: None)
            # What a crashed process left half-done must not reach the store when it is thrown away.
            for process in cluster.processes:
                process.alive = False
            world.graveyard.clear()
            world.close()
            gc.collect()
            asyncio.set_event_loop(None)
    return history
