"""What the worker and the producer processes do."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from random import Random
from typing import Any

import anyio
import msgspec

from s3queue_async import Context, DeadLetter, QueueError, Release, Retry, S3Queue, Settings
from s3queue_async.events import EnqueueAmbiguous, LeaseLostEvent, WorkerStarted
from tests.simulation.history import Job
from tests.storm.journal import Acknowledged, Ambiguous, Ended, Journal, Lost, Registered, Started, Unknown

CALLERS = 4
"""Calls of a producer that are under way at a time, so that one without a reply does not hold up the rest."""
CATCH_UP_S = 10.0
POISON_EVERY = 20_000
OPEN_AGAIN_S = 0.5


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is to do.

    Attributes:
        name: Of the process; its journal and its log are called like that.
        role: ``worker`` or ``producer``.
        directory: Where it writes.
        url: Of the queue, through the process's own link.
        environment: The store's credentials.
        settings: Those that are not at their defaults.
        seed: What jobs and pauses are drawn from.
        concurrency: Of a worker's handler.
        rate: Messages a second of a producer.
        first: The number of a producer's first job.
        poison_at: Which one of so many (``POISON_EVERY``) jobs kills its worker.
    """

    name: str
    role: str
    directory: str
    url: str
    environment: dict[str, str]
    settings: dict[str, Any]
    seed: int
    concurrency: int = 8
    rate: float = 0.0
    first: int = 0
    poison_at: int = 0


def main(encoded: bytes) -> None:
    """Begin of a process that the fork server made."""
    task = msgspec.json.decode(encoded, type=Task)
    directory = Path(task.directory)
    log = os.open(directory / f"{task.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for name in [name for name in os.environ if name.startswith("S3QUEUE_")]:
        del os.environ[name]
    os.environ.update(task.environment)
    # The time is that of the journals.
    logging.Formatter.formatTime = _monotonic  # type: ignore[method-assign, assignment]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    anyio.run(_run, task, Journal(directory / f"{task.name}.journal"))


def _monotonic(*_: Any) -> str:
    return f"{time.monotonic():.3f}"


async def _run(task: Task, journal: Journal) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(_end_with_parent)
        if task.role == "worker":
            await Worker(task, journal).run()
        else:
            await Producer(task, journal).run()
        group.cancel_scope.cancel()


async def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    await anyio.wait_readable(parent.sentinel)
    os.kill(os.getpid(), signal.SIGKILL)


def _queue(task: Task, journal: Journal, **options: Any) -> S3Queue[Job]:
    queue: S3Queue[Job] = S3Queue(task.url, payload_type=Job, settings=Settings(**task.settings), **options)

    def on_lost(event: LeaseLostEvent) -> None:
        journal.write(Lost(worker_id=event.worker_id, message_ids=event.message_ids, reason=event.reason))

    queue.on(LeaseLostEvent.name, on_lost)
    queue.on(WorkerStarted.name, lambda event: journal.write(Registered(worker_id=event.worker_id)))
    queue.on(EnqueueAmbiguous.name, lambda event: journal.write(Ambiguous(message_ids=event.message_ids)))
    return queue


class Worker:
    """Serves until SIGTERM, and writes down each run of its handler."""

    def __init__(self, task: Task, journal: Journal) -> None:
        self._task = task
        self._journal = journal
        self._runs = count()

    async def run(self) -> None:
        while True:
            queue = _queue(self._task, self._journal, on_message=self.handle, concurrency=self._task.concurrency)
            try:
                await queue.run()
            except QueueError as error:
                logging.warning("cannot open: %s", error)
                await anyio.sleep(OPEN_AGAIN_S)
            else:
                return

    async def handle(self, job: Job, context: Context) -> None:
        run = next(self._runs)
        self._journal.write(
            Started(
                run=run,
                message_id=context.message_id,
                number=job.number,
                worker_id=context.worker_id,
                attempt=context.attempt,
                token=context.token,
            )
        )
        outcome = "cancelled"
        try:
            if job.duration_s:
                await anyio.sleep(job.duration_s)
            outcome = job.kind
            self._act(job, context)
            outcome = "returned"
        except (DeadLetter, Release, Retry, ValueError) as error:
            outcome = type(error).__name__
            raise
        finally:
            self._journal.write(Ended(run=run, outcome=outcome))
            if outcome == "poison":
                os.kill(os.getpid(), signal.SIGKILL)

    @staticmethod
    def _act(job: Job, context: Context) -> None:
        """What becomes of the job is decided by what the message carries: no process knows what others did."""
        match job.kind:
            case "poison":
                raise RuntimeError("this process ends now")
            case "dead":
                raise DeadLetter("as asked")
            case "release" if context.token == 1:
                raise Release()
            case "fails" if context.attempt <= job.failures:
                raise ValueError("as asked")
            case "retry" if context.attempt <= job.failures:
                raise Retry(delay=0.5)


def draw_jobs(task: Task) -> Iterator[Job]:
    """The jobs of a producer, without end."""
    settings = Settings(**task.settings)
    # Long enough to be running still when another worker takes over from one that was cut off.
    slow_s = 2 * settings.visibility_timeout
    for number in count(task.first):
        rng = Random(f"job {task.seed} {number}")
        # Each that leaves its segment costs eight requests or so, as many as a whole segment that all goes well with.
        kind = rng.choices(("ok", "fails", "retry", "dead", "release"), (95, 2, 1.5, 0.5, 1))[0]
        if number % POISON_EVERY == task.poison_at:
            kind = "poison"
        duration_s = rng.choices(
            (0.0, rng.uniform(0, 0.05), rng.uniform(0, 0.3), rng.uniform(2, slow_s)), (50, 30, 19.9, 0.1)
        )[0]
        yield Job(number, kind, round(duration_s, 4), rng.randint(1, settings.max_attempts - 1))


class Producer:
    """Enqueues at a steady rate until SIGTERM, and writes down what was acknowledged."""

    def __init__(self, task: Task, journal: Journal) -> None:
        self._task = task
        self._journal = journal
        self._jobs = draw_jobs(task)
        self._rng = Random(f"producer {task.seed} {task.first}")
        self._next_at = 0.0
        self._told = anyio.Event()

    async def run(self) -> None:
        async with anyio.create_task_group() as group:
            group.start_soon(self._until_told)
            while not self._told.is_set():
                try:
                    async with _queue(self._task, self._journal) as queue:
                        self._journal.write(Registered(worker_id=""))
                        await self._produce(queue)
                except QueueError as error:
                    logging.warning("cannot open: %s", error)
                    await anyio.sleep(OPEN_AGAIN_S)
            group.cancel_scope.cancel()

    async def _until_told(self) -> None:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                self._told.set()

    async def _produce(self, queue: S3Queue[Job]) -> None:
        self._next_at = time.monotonic()
        async with anyio.create_task_group() as group:
            for _ in range(CALLERS):
                group.start_soon(self._caller, queue)

    async def _caller(self, queue: S3Queue[Job]) -> None:
        rng = self._rng
        while not self._told.is_set():
            size = rng.choice((1, 10, 100, 100, 200))
            now = time.monotonic()
            turn_at = self._next_at = max(self._next_at, now - CATCH_UP_S)
            self._next_at += size / self._task.rate
            with anyio.move_on_after(max(0.0, turn_at - now)):
                await self._told.wait()
            options: dict[str, Any] = {"priority": rng.choice((0, 0, 9))}
            if rng.random() < 0.05:
                options["delay"] = rng.choice((0.5, 3.0, 10.0))
            jobs = list(islice(self._jobs, size))
            if size > 20 or rng.random() < 0.5:
                await self._enqueue_many(queue, jobs, options)
            else:
                dedup = rng.random() < 0.5
                async with anyio.create_task_group() as group:
                    for job in jobs:
                        group.start_soon(self._enqueue, queue, job, options, f"job {job.number}" if dedup else None)

    async def _enqueue_many(self, queue: S3Queue[Job], jobs: list[Job], options: dict[str, Any]) -> None:
        due_s = time.monotonic() + options.get("delay", 0.0)
        try:
            ids = await queue.enqueue_many(jobs, **options)
        except QueueError as error:
            known: list[str] = getattr(error, "enqueued_ids", [])
            self._journal.write(
                Unknown(numbers=[job.number for job in jobs], error=str(error)),
                *(Acknowledged(message_id=message_id, job=None, due_s=due_s) for message_id in known),
            )
        else:
            pairs = zip(ids, jobs, strict=True)
            self._journal.write(*(Acknowledged(message_id=i, job=job, due_s=due_s) for i, job in pairs))

    async def _enqueue(self, queue: S3Queue[Job], job: Job, options: dict[str, Any], dedup_id: str | None) -> None:
        due_s = time.monotonic() + options.get("delay", 0.0)
        for attempt in range(3):
            try:
                message_id = await queue.enqueue(job, dedup_id=dedup_id, **options)
            except QueueError as error:
                if dedup_id is None or attempt == 2:
                    self._journal.write(Unknown(numbers=[job.number], error=str(error)))
                    return
            else:
                self._journal.write(Acknowledged(message_id=message_id, job=job, due_s=due_s, dedup_id=dedup_id))
                return
