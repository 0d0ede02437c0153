"""One simulated cluster: the scenario of a seed, run to its end, with everything recorded for the checker."""

from __future__ import annotations

import asyncio
import gc
import logging
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from random import Random
from typing import Any

import anyio
import msgspec

from s3queue_async import Context, DeadLetter, Keyring, QueueError, Release, Retry, S3Queue
from s3queue_async.engine.config import FORMAT_VERSION, QueueConfig
from s3queue_async.engine.recovery import PROBE_OVER_S
from s3queue_async.events import EnqueueAmbiguous, LeaseLostEvent, WorkerStarted, WorkerStopped
from s3queue_async.protocol import board as boards
from s3queue_async.protocol import layout
from s3queue_async.protocol.board import Ticket
from tests.simulation.history import Disturbance, History, Job, Loss, Run, Sent
from tests.simulation.scenario import BOARD_FAULTS, FAULTY_FOR_S, Scenario
from tests.simulation.store import Client, Store
from tests.simulation.watch import BOARD, HEARTBEATS, KEYS, Watch
from tests.simulation.world import Process, ProcessClock, World, deterministic_scopes

STUTTER_S = 0.4
"""How long a process that stutters stands still at a time, on average; less than the smallest margin of a lease."""
LULL_S = 15.0
"""How long producers sometimes wait: workers that hold nothing beat rarely then."""
RESIGNING_S = 30.0
"""What happened to a process or to the board longer ago than this does not keep a worker that leaves from resigning."""
RECOVERY_REQUESTS_MAX = 20_000
"""What the rest of the messages may take once the faults are over; some five times what any seed needs."""
COLLECT_EVERY = 8
"""Seeds between two collections of garbage."""
TOMBSTONES = f"plugin/{layout.TOMBSTONES}/"
LEFT_ALONE = (layout.CONFIG, "plugin/totals/", BOARD, "plugin/dedup/", layout.DEAD, layout.HISTORY)
"""What may be left at the end."""


@dataclass
class Outcome:
    """A run's history, and what else is to be told of it."""

    history: History
    scenario: Scenario
    simulated_s: float = 0.0
    takeovers: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    trace: list[str] = field(default_factory=list)


class Cluster:
    """Runs a scenario."""

    def __init__(self, scenario: Scenario, world: World) -> None:
        self.scenario = scenario
        self.world = world
        self.rng = Random(f"cluster {scenario.seed}")
        self.hint_rng = Random(f"hints of the cluster {scenario.seed}")
        self.outage_rng = Random(f"outages of the cluster {scenario.seed}")
        self.store = Store(
            world,
            scenario.profile,
            scenario.faults,
            rng=Random(f"store {scenario.seed}"),
            page_max=scenario.page_max,
            conditional_delete=scenario.conditional_delete,
        )
        self.history = History(scenario.settings, faultless=scenario.faultless)
        self.watch = Watch(self.store, self.history)
        if not scenario.is_new:
            fixed = scenario.settings
            config = QueueConfig("", FORMAT_VERSION, scenario.conditional_delete, fixed.segment_age, fixed.claim_linger)
            self.store.put(layout.CONFIG, msgspec.json.encode(config), None, 0.0)
        self.processes: list[Process] = []
        self.living: dict[str, str] = {}
        self.ending = False
        self.nameless: list[tuple[str, float]] = []
        self.deduplicated: set[int] = set()
        self.due_s: dict[str, float] = {}
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
        settings, keyring = self.scenario.settings, None
        if self.scenario.encrypted:
            chance = Random(f"keys {process} {self.scenario.seed}")
            keyring = Keyring(KEYS, current=chance.choice(list(KEYS)))
            settings = msgspec.structs.replace(settings, compression=chance.choice((None, "zstd")))
        queue: S3Queue[Job] = S3Queue(
            storage=Client(self.store, process),
            payload_type=Job,
            settings=settings,
            keyring=keyring,
            scheduler=False,
            clock=ProcessClock(process),
            rng=Random(f"process {process} {self.scenario.seed}"),
        )
        # Host name and process id would make a seed's ranking depend on the machine.
        names = Random(f"names {process} {self.scenario.seed}")
        queue._new_worker_id = lambda: f"{process}-{names.getrandbits(40):010x}"  # type: ignore[method-assign]

        def on_lost(event: LeaseLostEvent) -> None:
            self.world.note(f"{process} lost {event.worker_id}: {event.reason} {event.message_ids}")
            now = self.world.time()
            failed_at = self.store.failed_at.get(HEARTBEATS + event.worker_id, float("-inf"))
            failed = failed_at > now - self.scenario.settings.visibility_timeout
            lost = Loss(now, str(process), event.worker_id, event.reason, failed, tuple(event.message_ids))
            self.history.lost.append(lost)
            if lost.of_the_worker:
                self.living.pop(str(process), None)

        queue.on("lease.lost", on_lost)
        queue.on(WorkerStopped.name, partial(self._stopped, process))
        queue.on(WorkerStarted.name, lambda event: self.living.update({str(process): event.worker_id}))
        queue.on(EnqueueAmbiguous.name, lambda event: self.history.ambiguous.update(event.message_ids))
        return queue

    def _stopped(self, process: Process, event: WorkerStopped) -> None:
        """A coordinator that drains undisturbed leaves no board behind that others must wait for."""
        since_s = self.world.time() - RESIGNING_S
        disturbed = any(done.process == str(process) and done.until_s > since_s for done in self.history.disturbed)
        found = self.store.objects.get(BOARD)
        if found is None or event.reason != "drained" or disturbed or self.store.failed_at.get(BOARD, 0.0) > since_s:
            return
        board = boards.decode(BOARD, found.body)
        if board.leader == event.worker_id and board.state == "leading":
            self.history.problems.append(f"left without resigning: {event.worker_id} at {self.world.time() - 1000:.2f}")

    async def worker(self, process: Process) -> None:
        while not process.stop.is_set():
            try:
                async with self.queue(process) as queue:
                    self._work(queue, process)
                    await process.stop.wait()
                    self.world.note(f"{process} drains")
            except QueueError as error:
                self.world.note(f"{process} cannot open: {error}")
                await anyio.sleep(1.0)
        self.world.note(f"{process} ends")

    def _work(self, queue: S3Queue[Job], process: Process) -> None:
        @queue.handler(concurrency=self.scenario.concurrency)
        async def handle(job: Job, context: Context) -> str:
            return await self.handle(process, job, context)

    async def handle(self, process: Process, job: Job, context: Context) -> str:
        run = Run(
            context.message_id,
            job.number,
            str(process),
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
                    if self.scenario.producers_work:
                        self._work(queue, process)
                    await self._produce(queue, jobs, process)
                return
            except QueueError as error:
                self.world.note(f"{process} cannot produce: {error}")
                await anyio.sleep(1.0)

    async def _produce(self, queue: S3Queue[Job], jobs: list[Job], process: Process) -> None:
        rng = self.rng
        while jobs:
            await anyio.sleep(rng.choice((0.0, 0.0, 0.1, 5.0)))
            if self.hint_rng.random() < self.scenario.lulls:
                await anyio.sleep(LULL_S)
            together = [jobs.pop(0) for _ in range(min(len(jobs), rng.choice((1, 1, 5, 20))))]
            options: dict[str, Any] = {"priority": rng.choice((0, 0, 9))}
            if rng.random() < 0.2:
                options["delay"] = rng.choice((0.5, 3.0, 20.0))
            # A producer's delays count from the store's time as it knows it: too early once its machine was suspended.
            due_s = self.world.time() + options.get("delay", 0.0) - process.slept_s
            plain = not any(job.number in self.deduplicated for job in together)
            if len(together) > 1 and rng.random() < 0.5 and plain:
                try:
                    ids = await queue.enqueue_many(together, **options)
                except QueueError as error:
                    self.world.note(f"enqueue_many failed: {error}")
                    # Which ones of them are durable, it does not say: their runs will.
                    self.nameless += [(message_id, due_s) for message_id in getattr(error, "enqueued_ids", [])]
                    continue
                for job, message_id in zip(together, ids, strict=True):
                    self._acknowledged(job, message_id, due_s, None)
                continue
            async with anyio.create_task_group() as group:
                for job in together:
                    dedup_id = f"job {job.number}" if job.number in self.deduplicated else None
                    group.start_soon(self._enqueue, queue, job, options, due_s, dedup_id)
                    if dedup_id is not None and rng.random() < 0.5:
                        # The same once more: at the same time, or when it waits, runs, has moved, or is done.
                        again_s = rng.choice((0.0, 0.1, 2.0, 8.0, 20.0))
                        group.start_soon(self._enqueue, queue, job, options, due_s, dedup_id, again_s)

    async def _enqueue(
        self,
        queue: S3Queue[Job],
        job: Job,
        options: dict[str, Any],
        due_s: float,
        dedup_id: str | None,
        after_s: float = 0.0,
    ) -> None:
        await anyio.sleep(after_s)
        if dedup_id is not None:
            # Whichever try comes first counts, an unanswered one, too; which that was only the store knows.
            self.due_s[dedup_id] = min(due_s, self.due_s.get(dedup_id, due_s))
        for attempt in range(3):
            try:
                message_id = await queue.enqueue(job, dedup_id=dedup_id, **options)
            except QueueError as error:
                self.world.note(f"enqueue of {job.number} failed: {error}")
                if dedup_id is None or attempt == 2:
                    return
            else:
                self._acknowledged(job, message_id, due_s, dedup_id)
                return

    def _acknowledged(self, job: Job, message_id: str, due_s: float, dedup_id: str | None) -> None:
        self.world.note(f"acknowledged {job.number} {job.kind} as {message_id}")
        if dedup_id is not None and any(sent.message_id == message_id for sent in self.history.sent):
            return
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
        if self.ending:
            return
        self.spawn("worker", self.worker)

    async def disturb(self) -> None:
        """Everything that happens to processes, at times drawn before; over once there is nothing left to do."""
        scenario, rng = self.scenario, self.rng
        deeds: list[tuple[float, str]] = []
        for deed, count in scenario.deeds.items():
            deeds += [(rng.uniform(0.5, scenario.deeds_within_s), deed) for _ in range(count)]
        if scenario.faults.throttled and rng.random() < 0.5:
            deeds.append((rng.uniform(1, FAULTY_FOR_S / 2), "storm"))
        hints = self.hint_rng
        for deed, count in scenario.hints.items():
            deeds += [(hints.uniform(0.5, scenario.deeds_within_s), deed) for _ in range(count)]
        deeds += [(self.outage_rng.uniform(1, FAULTY_FOR_S / 2), "outage") for _ in range(scenario.faults.outages)]
        deeds.sort()
        began = self.world.time()
        for at_s, deed in deeds:
            await anyio.sleep(max(0.0, began + at_s - self.world.time()))
            self._do(deed)
        while self.world.time() < began + FAULTY_FOR_S and not self._is_done():
            await self._second()

    def _do(self, deed: str) -> None:
        rng, faults = self.rng, self.scenario.faults
        alive = [process for process in self.processes if process.runs and not process.stop.is_set()]
        if deed == "storm":
            faults.counts["storm of 503"] += 1
            faults.storm_until = self.world.time() + rng.uniform(5, 40)
            return
        if deed == "outage":
            faults.counts["outage of a prefix"] += 1
            faults.outage_prefix = self.outage_rng.choice(faults.partitions)
            faults.outage_until = self.world.time() + self.outage_rng.uniform(2, 30)
            self.world.note(f"outage of {faults.outage_prefix} until {faults.outage_until - 1000:.2f}")
            return
        if deed in BOARD_FAULTS:
            self._spoil(deed)
            return
        workers = [process for process in alive if process.name.startswith("worker")]
        if not workers or (deed == "terminate" and len(workers) < 2):
            return
        faults.counts[deed] += 1
        process = rng.choice(workers if deed == "terminate" or rng.random() < 0.8 else alive)
        visibility_s = self.scenario.settings.visibility_timeout
        for_s = rng.choice((1.0, visibility_s, rng.uniform(1.0, 3 * visibility_s)))
        now = self.world.time()
        if deed not in ("crash", "terminate"):
            self.history.disturbed.append(Disturbance(now, now + for_s, str(process), deed))
            self.world.note(f"{process}: {deed} for {for_s:.1f} s")
        if deed == "crash":
            self.crash(process)
        elif deed == "terminate":
            self.world.note(f"{process} is told to end")
            process.stop.set()
            self.world.later(rng.uniform(0.1, 20.0), self._restart)
        elif deed == "jump":
            process.offset_s += for_s
        elif deed in ("pause", "suspend"):
            process.pause(clock_stands=deed == "suspend")
            self.world.later(for_s, process.resume)
        elif deed == "stutter":
            self._stutter(process, now + for_s)
        elif deed == "cut":
            self._cut(process, for_s)

    def _spoil(self, deed: str) -> None:
        """Take hints away, or make them wrong, as somebody who writes to the bucket by hand could."""
        rng, store = self.hint_rng, self.store
        if deed == "heartbeats not listed":
            self.scenario.faults.counts[deed] += 1
            store.unlisted = (HEARTBEATS,)
            self.world.later(rng.uniform(1.0, 20.0), store.list_all)
            return
        found = store.objects.get(BOARD)
        if found is None:
            return
        self.scenario.faults.counts[deed] += 1
        self.world.note(f"{deed}")
        if deed == "board deleted":
            store.remove(BOARD)
            return
        board = boards.decode(BOARD, found.body)
        tickets = []
        if deed == "tickets mixed up":
            # Only what a listing could have shown to a coordinator: a void segment never gets a ticket.
            keys = [key for key in store.objects if key.startswith((layout.READY, layout.DELAYED))]
            keys = [key for key in keys if not self.watch.is_void(key)]
            keys += [ticket.key for ticket in board.tickets]
            rng.shuffle(keys)
            workers = [*self.living.values(), "nobody"]
            tickets = [Ticket(key, rng.choice(workers), rng.randint(0, 2**41), rng.random() < 0.5) for key in keys[:20]]
            self.watch.spoil(tickets)
        spoiled = msgspec.structs.replace(board, nonce=f"{rng.getrandbits(64):x}", tickets=tickets)
        store.put(BOARD, boards.encode(spoiled), None, 0.0)

    def _stutter(self, process: Process, until_s: float) -> None:
        """Stand still again and again, as on a machine with too much to do."""
        if self.world.time() >= until_s or not process.runs:
            return
        process.paused = True
        stands_s = STUTTER_S * self.rng.uniform(0.2, 1.8)
        self.world.later(stands_s, process.resume)
        self.world.later(stands_s + self.rng.uniform(0.0, 0.5), lambda: self._stutter(process, until_s))

    def _cut(self, process: Process, for_s: float) -> None:
        """Cut a process off from the store, both ways or only on the way back."""
        if self.rng.random() < 0.5:
            process.cut_off = True
        else:
            process.deaf = True
            self.scenario.faults.counts["cut on the way back only"] += 1

        def mend() -> None:
            process.cut_off = process.deaf = False

        self.world.later(for_s, mend)

    # -- the whole -----------------------------------------------------------------------------------------------

    async def run(self) -> History:
        scenario = self.scenario
        per_producer: list[list[Job]] = [[] for _ in range(scenario.producers)]
        for job in scenario.jobs:
            if self.rng.random() < 0.3:
                self.deduplicated.add(job.number)
                if self.rng.random() < 0.5:
                    for jobs in per_producer:
                        jobs.append(job)
                    continue
            self.rng.choice(per_producer).append(job)
        for jobs in per_producer:
            self.spawn("producer", partial(self.producer, jobs=jobs))
        for _ in range(scenario.workers):
            self.spawn("worker", self.worker)
        await self.disturb()
        await self._recover()
        await self._end()
        return self.history

    async def _recover(self) -> None:
        """The faults are over: everything must become empty in bounded time."""
        scenario = self.scenario
        scenario.faults.active = False
        ended_s = self.world.time()
        for process in self.processes:
            process.cut_off = process.deaf = False
            process.resume()
        self.history.disturbed = [replace(done, until_s=min(done.until_s, ended_s)) for done in self.history.disturbed]
        self.world.note("the faults are over")
        settings = scenario.settings
        longest_s = max(job.duration_s for job in scenario.jobs)
        bound_s = (
            8 * settings.visibility_timeout
            + settings.max_attempts * 20.0
            + (longest_s + 5.0) * len(scenario.jobs)
            + 120.0
        )
        requests_max = self.store.requests.total() + RECOVERY_REQUESTS_MAX
        while not self._is_done():
            now = self.world.time()
            if now > ended_s + bound_s or self.store.requests.total() > requests_max:
                after_s = now - ended_s
                self.history.problems.append(
                    f"not empty {after_s:.0f} s after the faults ended: {self._live_keys()[:5]}"
                )
                return
            await self._second()

    async def _second(self) -> None:
        await anyio.sleep(1.0)

    def _is_done(self) -> bool:
        """Whether everything was enqueued, and nothing is left to handle."""
        producing = any(process.name.startswith("producer") for process in self._running())
        return not producing and not self._live_keys()

    def _live_keys(self) -> list[str]:
        return [key for key in self.store.objects if key.startswith((layout.READY, layout.DELAYED))]

    async def _end(self) -> None:
        """Let sweeps do their work, end every process in order, and look at what is left."""
        settings = self.scenario.settings
        # Who has just lost its lease, or is just being fenced, is to find out first.
        await anyio.sleep(settings.heartbeat_interval)
        swept = await self._swept()
        self._collect_dead()
        self.ending = True
        ends_s = self.world.time()
        await self._stop_all()
        if swept and self._left_for_the_next(ends_s):
            # They left at once, each with others beside it, or just after it had ended something.
            self.spawn("worker", self.worker)
            await self._swept()
            await self._stop_all()
        for process in self.processes:
            if process.alive and process.tasks[0].done() and process.tasks[0].exception() is not None:
                failure = process.tasks[0].exception()
                while isinstance(failure, BaseExceptionGroup):
                    failure = failure.exceptions[0]
                where = "".join(traceback.format_exception(failure)[-3:])
                self.history.problems.append(f"{process} failed: {failure!r} {where}")
        self.history.leftovers = self._leftovers()
        self.history.doubted = {key for key in self.store.failed_at if key.startswith(layout.CLAIMS)}
        for sent in self.history.sent:
            if sent.dedup_id is not None:
                sent.due_s = self.due_s[sent.dedup_id]
        numbers = {run.message_id: run.number for run in self.history.runs}
        jobs = {job.number: job for job in self.scenario.jobs}
        for message_id, due_s in self.nameless:
            job = jobs.get(numbers.get(message_id, -1), Job(-1, "never ran", 0.0))
            self.history.sent.append(Sent(message_id, job, self.world.time(), due_s, None))

    async def _swept(self) -> bool:
        """Return once nothing is left behind; False when something is for too long."""
        settings = self.scenario.settings
        bound_s = PROBE_OVER_S + 4 * settings.visibility_timeout + 2 * settings.claim_linger
        give_up_at = max(self.world.time(), self.store.landing_until) + bound_s
        while self.world.time() < give_up_at and not self._is_swept():
            await self._second()
        return self._is_swept()

    async def _stop_all(self) -> None:
        for process in self.processes:
            process.stop.set()
        if running := [process.tasks[0] for process in self._running()]:
            await asyncio.wait(running, timeout=120.0)
        if stuck := self._running():
            self.history.problems.append(f"processes did not end: {stuck}")

    def _left_for_the_next(self, since_s: float) -> bool:
        """Whether all that is left was left by those who were leaving.

        Claims and tombstones, written after they were told to; or the heartbeat of one that lost its lease then, on a
        store without conditional deletes (found by seed 5781).
        """
        lost = {
            HEARTBEATS + loss.worker_id for loss in self.history.lost if loss.of_the_worker and loss.at_s >= since_s
        }

        def left_now(key: str) -> bool:
            written = key.startswith((layout.CLAIMS, TOMBSTONES)) and self.store.objects[key].modified_s > since_s
            return written or key in lost

        left = self._leftovers()
        return bool(left) and all(map(left_now, left))

    def _running(self) -> list[Process]:
        return [process for process in self.processes if process.alive and not process.tasks[0].done()]

    def _is_swept(self) -> bool:
        """Whether no write is under way any more, and nothing is left but the heartbeats of those who live."""
        staying = [process for process in self._running() if not process.stop.is_set()]
        living = {f"{HEARTBEATS}{self.living.get(str(process))}" for process in staying}
        left = set(self._leftovers()) - living
        return self.world.time() > self.store.landing_until and not left

    def _leftovers(self) -> list[str]:
        allowed: tuple[str, ...] = LEFT_ALONE
        counts = self.scenario.faults.counts
        if counts["late write"] or counts["repeated write"] or counts["slow reply"]:
            # A write of the probe that lands after the probe cleaned up.
            allowed = (*allowed, "plugin/probe/")
        return [key for key in self.store.objects if not key.startswith(allowed)]

    def _collect_dead(self) -> None:
        for record in self.watch.records(layout.DEAD):
            reason = record.failure.reason if record.failure else ""
            self.history.dead[record.id] = (reason, record.attempts)


def simulate(scenario: Scenario) -> Outcome:
    """Run a scenario."""
    seed = scenario.seed
    logging.disable(logging.CRITICAL)
    deterministic_scopes()
    world = World(seed)
    cluster = Cluster(scenario, world)
    # Collected at the end, not in the middle of a run, where it would finish tasks of crashed processes.
    gc.disable()
    if not gc.get_freeze_count():
        gc.freeze()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            asyncio.set_event_loop(world)
            history = world.run_until_complete(cluster.run())
        finally:
            for task in asyncio.all_tasks(world):
                task._log_destroy_pending = False  # type: ignore[attr-defined]
            world.set_exception_handler(lambda loop, context: None)
            # What a crashed process left half-done must not reach the store when it is thrown away.
            for process in cluster.processes:
                process.alive = False
            world.graveyard.clear()
            world.close()
            if seed % COLLECT_EVERY == 0:
                gc.collect()
            gc.enable()
            asyncio.set_event_loop(None)
    store = cluster.store
    return Outcome(history, scenario, world.time() - 1000.0, store.takeovers, store.requests, world.trace)
