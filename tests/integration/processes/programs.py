"""A worker and a producer as programs, started by the tests with one JSON argument.

What they did is told twice, and neither way goes through the queue: one line for each thing that a handler did, in a
journal that belongs to this process alone, and one line on stdout for each event of the queue. Both are written with
one ``write`` each, so that a SIGKILL leaves whole lines only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from itertools import count
from typing import Any

import msgspec

from s3queue_async import Context, S3Queue, Settings
from s3queue_async.events import Event

LEASE_SHORT: dict[str, Any] = {"visibility_timeout": 3.0, "heartbeat_interval": 1.0}


class Task(msgspec.Struct, kw_only=True):
    """What a program is to do.

    Attributes:
        url: Of the queue.
        settings: Those that are not at their defaults.
        journal: The file that this process alone writes.
        action: What the handler does, or "produce".
        seconds: How long it takes.
        concurrency: Of the worker.
        gate: A file: handlers wait until it is there.
        halts: What the name of a file begins with that the process's number ends: once it is there, no handler of the
            process ends any more.
        opens: A file: the queue is opened once it is there. Starting Python takes seconds on a busy machine.
        poison: The payload that kills the process.
        events: Names of the events to tell, beside those of workers and leases.
        batch: How many messages each call of a producer enqueues.
    """

    url: str
    settings: dict[str, Any] = {}
    journal: str
    action: str = "count"
    seconds: float = 0.0
    concurrency: int = 10
    gate: str = ""
    halts: str = ""
    opens: str = ""
    poison: int = -1
    events: list[str] = []
    batch: int = 300


class Line(msgspec.Struct, array_like=True):
    """One thing that a handler did.

    Attributes:
        what: ``started``, ``handled`` or ``cancelled``; ``acknowledged`` by a producer.
        message_id: The message's id.
        payload: The message's payload.
        attempt, token, worker_id: As the handler's context had them.
        start, end: CLOCK_MONOTONIC, the same for all processes of the machine.
        pid: Of the process.
    """

    what: str
    message_id: str
    payload: int
    attempt: int = 0
    token: int = 0
    worker_id: str = ""
    start: float = 0.0
    end: float = 0.0
    pid: int = 0


class Told(msgspec.Struct):
    """An event of the queue as the program told it."""

    name: str
    at: float
    about: dict[str, Any] = {}


class Journal:
    """A file to which one process appends whole lines."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._encode = msgspec.json.Encoder().encode

    def write(self, *lines: Line) -> None:
        os.write(self._file, b"".join(self._encode(line) + b"\n" for line in lines))


def tell(name: str, **about: Any) -> None:
    os.write(1, msgspec.json.encode(Told(name, time.monotonic(), about)) + b"\n")


async def until_there(path: str) -> None:
    while not os.path.exists(path):  # noqa: ASYNC110, ASYNC240, PTH110 - another process makes it
        await asyncio.sleep(0.01)


class Handler:
    """Does what the task says, and writes it down."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._journal = Journal(task.journal)
        self._pid = os.getpid()
        self.queue: S3Queue[int] | None = None

    async def __call__(self, payload: int, context: Context) -> None:
        start = time.monotonic()

        def line(what: str, end: float = 0.0) -> Line:
            return Line(
                what,
                context.message_id,
                payload,
                context.attempt,
                context.token,
                context.worker_id,
                start,
                end,
                self._pid,
            )

        if self._task.action != "count":
            self._journal.write(line("started"))
        try:
            await self._act(payload)
        except asyncio.CancelledError:
            self._journal.write(line("cancelled", time.monotonic()))
            raise
        self._journal.write(line("handled", time.monotonic()))

    async def _act(self, payload: int) -> None:
        task = self._task
        match task.action:
            case "count":
                return
            case "sleep":
                await asyncio.sleep(task.seconds)
                if task.halts and os.path.exists(f"{task.halts}{self._pid}"):  # noqa: ASYNC240, PTH110 - as above
                    await asyncio.Event().wait()
            case "gate":
                await until_there(task.gate)
            case "poison":
                if payload == task.poison:
                    os._exit(66)
                await asyncio.sleep(task.seconds)
            case "block":
                if payload == task.poison:
                    await self._just_before_a_beat()
                    time.sleep(task.seconds)  # noqa: ASYNC251 - this is what the test is about
            case _:
                raise ValueError(task.action)

    async def _just_before_a_beat(self) -> None:
        """The worst moment to block: nearly a whole interval after the last beat."""
        assert self.queue is not None
        almost = 0.9 * self.queue.settings.heartbeat_interval
        while (self.queue.health().last_heartbeat or 0.0) < almost:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def work(task: Task) -> None:
    """Serve until a signal comes."""
    handler = Handler(task)
    queue: S3Queue[int] = S3Queue(
        task.url,
        payload_type=int,
        settings=Settings(**task.settings),
        on_message=handler,
        concurrency=task.concurrency,
    )
    handler.queue = queue

    def on_event(event: Event) -> None:
        tell(event.name, **msgspec.structs.asdict(event))

    for name in ("workers.started", "workers.stopped", "lease.lost", *task.events):
        queue.on(name, on_event)
    if task.opens:
        tell("waiting")
        await until_there(task.opens)
    report = await queue.run()
    tell("report", **msgspec.structs.asdict(report))


async def produce(task: Task) -> None:
    """Enqueue in several calls at a time until killed; each message is written down once it is acknowledged."""
    journal = Journal(task.journal)
    numbers = count()
    async with S3Queue[int](task.url, payload_type=int, settings=Settings(**task.settings)) as queue:

        async def in_batches() -> None:
            while True:
                payloads = [next(numbers) for _ in range(task.batch)]
                ids = await queue.enqueue_many(payloads)
                journal.write(*(Line("acknowledged", i, p) for i, p in zip(ids, payloads, strict=True)))

        async def without_end() -> None:
            await queue.enqueue_many(iter(numbers.__next__, None))

        async def one_by_one() -> None:
            while True:
                payload = next(numbers)
                journal.write(Line("acknowledged", await queue.enqueue(payload), payload))

        tell("producing")
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(in_batches())
            group.create_task(one_by_one())
            if task.seconds:
                group.create_task(without_end())


def main() -> None:
    task = msgspec.json.decode(sys.argv[1], type=Task)
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(levelname)s %(name)s %(message)s")
    asyncio.run(produce(task) if task.action == "produce" else work(task))


if __name__ == "__main__":
    main()
