"""The blocking facade: from threads, beside event loops, across forks, and at the interpreter's exit."""

from __future__ import annotations

import asyncio
import contextvars
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, assert_type

import msgspec
import pytest

from s3queue_async import Context, MessageStatus, QueueStats, S3Queue, Settings, SyncS3Queue
from s3queue_async.errors import (
    BlocksEventLoop,
    InvalidPayload,
    InvalidSettings,
    InvalidURL,
    MessageNotFound,
    QueueClosed,
    StoreUnavailable,
)
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.faults import FaultyStorage
from s3queue_async.testing.servers import Server
from tests.conftest import BUCKET

ROOT = Path(__file__).parents[2]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite://{tmp_path}/queue.db"


class Email(msgspec.Struct):
    to: str


def test_enqueue_and_look(url: str) -> None:
    """What it enqueues is there, and it answers as the async one does, with the same types."""
    with SyncS3Queue(url, payload_type=Email) as queue:
        assert_type(queue, SyncS3Queue[Any])
        message_id = queue.enqueue(Email("a"), priority=5, headers={"a": "b"}, dedup_id="x")
        assert queue.enqueue(Email("b"), dedup_id="x") == message_id
        ids = queue.enqueue_many((Email(str(n)) for n in range(10)), delay=60)
        stats = queue.stats(exact=True)
        assert_type(stats, QueueStats)
        assert (stats.pending, stats.delayed) == (1, 10)
        assert_type(queue.status(message_id), MessageStatus)
        assert queue.status(ids[0]) is MessageStatus.DELAYED
        assert queue.workers() == []
        assert queue.history() == []
        with pytest.raises(MessageNotFound):
            queue.results(message_id)
        with pytest.raises(InvalidPayload):
            queue.enqueue("no email")
        with pytest.raises(InvalidSettings, match="delay"):
            queue.enqueue(Email("a"), delay=-1)
        assert queue.purge() == 11


def test_dead_letters_results_and_schedules(url: str) -> None:
    """Dead letters are listed, redriven and purged; results and history read; schedules made and removed."""
    settings = Settings(retain_completed=3600, max_attempts=1)

    async def work(count: int) -> None:
        async def handler(payload: int, context: Context) -> int:
            if payload < 0:
                raise ValueError("negative")
            return payload * 2

        async with S3Queue(url, settings=settings, on_message=handler, auto_start=False) as queue:
            for _ in range(count):
                assert await queue.process_next()

    with SyncS3Queue(url, settings=settings) as queue:
        good, bad = queue.enqueue_many([21, -1])
        asyncio.run(work(2))
        assert queue.results(good) == 42
        assert [entry.id for entry in queue.history()] == [good]
        assert [letter.id for letter in queue.dead_letters.list()] == [bad]
        assert queue.dead_letters.redrive([bad]) == 1
        assert queue.stats(exact=True).pending == 1
        asyncio.run(work(1))
        assert queue.dead_letters.purge() == 1
        made = queue.schedule("0 3 * * *", 7, name="nightly", timezone="Europe/Berlin")
        assert queue.schedules() == [made]
        assert queue.unschedule("nightly")


def test_made_once_for_a_program(url: str) -> None:
    """Without ``with`` it connects at the first call, from whichever thread; after close it says so."""
    queue: SyncS3Queue[Any] = SyncS3Queue(url)
    assert threading.active_count() == _threads_before(lambda: None)
    with ThreadPoolExecutor(20) as pool:
        ids = list(pool.map(queue.enqueue, range(500)))
    assert len(set(ids)) == 500
    assert queue.stats(exact=True).pending == 500
    queue.close()
    queue.close()
    with pytest.raises(QueueClosed, match="was closed"):
        queue.enqueue(1)
    with queue:
        assert queue.stats(exact=True).pending == 500


def _threads_before(action: Callable[[], None]) -> int:
    action()
    return threading.active_count()


def test_threads_share_a_write() -> None:
    """A hundred threads that enqueue at the same moment cost far fewer writes than a hundred."""
    writes: list[str] = []

    class Counted(MemoryStorage):
        async def put(self, key: str, body: bytes, **when: Any) -> Any:
            if key.startswith("ready/"):
                writes.append(key)
                await asyncio.sleep(0.05)
            return await super().put(key, body, **when)

    barrier = threading.Barrier(100)
    with SyncS3Queue(storage=Counted) as queue:

        def enqueue(number: int) -> str:
            barrier.wait()
            return queue.enqueue(number)

        with ThreadPoolExecutor(100) as pool:
            assert len(set(pool.map(enqueue, range(100)))) == 100
    assert len(writes) < 50


def test_payloads_are_taken_in_the_callers_thread(url: str) -> None:
    """An iterable is read where enqueue_many was called, with no event loop running, and in pieces."""
    places = set()
    taken = 0

    def payloads() -> Iterator[int]:
        nonlocal taken
        for number in range(10_000):
            with pytest.raises(RuntimeError):
                asyncio.get_running_loop()
            places.add(threading.get_ident())
            taken += 1
            yield number

    with SyncS3Queue(url) as queue:
        ids = queue.enqueue_many(payloads())
        assert len(set(ids)) == taken == 10_000
        assert places == {threading.get_ident()}
        assert queue.stats(exact=True).pending == 10_000


def test_ids_of_what_was_enqueued_before_a_failure(url: str) -> None:
    """An error names the ids of all that is in the queue, pieces before included."""

    def payloads() -> Iterator[Any]:
        yield from range(5000)
        yield object()

    with SyncS3Queue(url) as queue:
        with pytest.raises(InvalidPayload) as caught:
            queue.enqueue_many(payloads())
        ids: list[str] = caught.value.enqueued_ids  # type: ignore[attr-defined]  # what the error tells
        assert len(set(ids)) == queue.stats(exact=True).pending > 4000


def test_beside_an_event_loop(url: str) -> None:
    """Where an event loop runs it refuses, and says what to do; in a thread it works."""
    queue: SyncS3Queue[Any] = SyncS3Queue(url)

    async def main() -> None:
        for call in (lambda: queue.enqueue(1), queue.stats, queue.close, queue.__enter__):
            with pytest.raises(BlocksEventLoop, match=r"asyncio\.to_thread"):
                call()
        assert await asyncio.to_thread(queue.enqueue, 1)

    asyncio.run(main())
    assert queue.stats(exact=True).pending == 1
    queue.close()


def test_it_cannot_be_opened(tmp_path: Path) -> None:
    """The error of the store comes out of ``with`` and of calls; when it is mended, the next call works."""
    path = tmp_path / "queue.db"
    path.mkdir()
    queue: SyncS3Queue[Any] = SyncS3Queue(f"sqlite://{path}")
    with pytest.raises(StoreUnavailable, match=r"queue\.db"), queue:
        pass
    queue = SyncS3Queue(f"sqlite://{path}")
    with pytest.raises(StoreUnavailable):
        queue.enqueue(1)
    path.rmdir()
    assert queue.enqueue(1)
    queue.close()


def test_bad_arguments() -> None:
    """They are refused at once, not at the first call."""
    with pytest.raises(InvalidURL):
        SyncS3Queue("ftp://somewhere")
    with pytest.raises(InvalidSettings, match="max_attempts"):
        SyncS3Queue("memory://", settings=Settings(max_attempts=0))


def test_variables_of_the_caller() -> None:
    """What follows traces sees the caller's context variables."""
    current: contextvars.ContextVar[str] = contextvars.ContextVar("current")

    class Spans:
        def outgoing(self, headers: Any) -> Any:
            return {"span": current.get("none")}

        @contextmanager
        def handling(self, context: Context) -> Iterator[None]:
            yield

    storage = MemoryStorage()
    with SyncS3Queue(storage=lambda: storage, tracing=Spans()) as queue:
        current.set("checkout")
        queue.enqueue("x")
        ((_, found),) = [item for item in storage._space.objects.items() if item[0].startswith("ready/")]
        assert b"checkout" in found.body


def test_interrupted() -> None:
    """Ctrl-C ends a call that waits; the message, sent already, may be there, and the queue works on."""
    sent = threading.Event()

    class Slow(FaultyStorage):
        async def put(self, key: str, body: bytes, **when: Any) -> Any:
            if key.startswith("ready/"):
                sent.set()
            return await super().put(key, body, **when)

    def interrupt() -> None:
        sent.wait()
        os.kill(os.getpid(), signal.SIGINT)

    storage = Slow(MemoryStorage())
    with SyncS3Queue(storage=lambda: storage) as queue:
        gate = storage.hold("put", key="ready/*")
        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            queue.enqueue("x")
        thread.join()
        gate.open()
        queue.enqueue("y")
        assert queue.stats(exact=True).pending == 2


FORKING = """
import os, sys, threading, traceback
from s3queue_async import SyncS3Queue

queue = SyncS3Queue(sys.argv[1])
queue.enqueue("before")
stop = threading.Event()
count = [0]

def go_on():
    while not stop.is_set():
        queue.enqueue("thread")
        count[0] += 1

threads = [threading.Thread(target=go_on) for _ in range(3)]
for thread in threads:
    thread.start()
children = []
for number in range(4):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for n in range(10):
                queue.enqueue(f"child {number} {n}")
            with SyncS3Queue(sys.argv[1]) as other:
                other.enqueue_many(f"child {number} again {n}" for n in range(5))
            if number % 2:
                sys.exit(0)  # the long way, with everything that is registered for the exit
            queue.close()
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            if not number % 2:
                os._exit(code)
    children.append(pid)
    queue.enqueue(f"parent {number}")
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
stop.set()
for thread in threads:
    thread.join()
queue.enqueue("after")
stats = queue.stats(exact=True)
print(codes, stats.pending - count[0])
"""


def run(program: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("S3QUEUE_")}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *arguments],
        env={**environment, "PYTHONPATH": str(ROOT), **more},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def check_forked(ended: subprocess.CompletedProcess[str]) -> None:
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == ["[0, 0, 0, 0] 66"]
    assert ended.returncode == 0


@pytest.mark.integration
def test_forks_on_sqlite(url: str) -> None:
    """A program forks four times while three threads enqueue: children and parent go on, and nothing is missing."""
    check_forked(run(FORKING, url))


@pytest.mark.integration
def test_forks_on_s3(seaweedfs: Server) -> None:
    """The same on S3: a child does not touch its parent's connections."""
    url = seaweedfs.queue_url(BUCKET, f"forks-{uuid.uuid4().hex}")
    check_forked(run(FORKING, url, **seaweedfs.environment()))


EXITING = """
import sys, threading
from s3queue_async import SyncS3Queue

queue = SyncS3Queue(sys.argv[1])
started = threading.Event()

def go_on():
    while True:
        queue.enqueue("from a daemon")
        started.set()

if sys.argv[2] == "thread":
    threading.Thread(target=go_on, daemon=True).start()
    started.wait()
print(queue.enqueue("x"))
if sys.argv[2] == "error":
    raise SystemExit("an error")
"""


@pytest.mark.integration
@pytest.mark.parametrize("how", ["plain", "error", "thread"])
def test_the_interpreter_ends(url: str, how: str) -> None:
    """A program that closes nothing ends at once and without a warning; what it was told to be enqueued is there."""
    ended = run(EXITING, url, how)
    assert ended.returncode == (1 if how == "error" else 0)
    if how != "thread":
        # Python ends daemon threads where they stand; what they say of it is not ours.
        assert ended.stderr == ("an error\n" if how == "error" else "")
    with SyncS3Queue(url) as queue:
        assert queue.status(ended.stdout.strip()) is MessageStatus.PENDING


PROCESSES = """
import multiprocessing, sys
from s3queue_async import SyncS3Queue

queue = SyncS3Queue(sys.argv[1])

def work(number):
    return queue.enqueue(number)

if __name__ == "__main__":
    queue.enqueue("first")
    with multiprocessing.get_context("fork").Pool(3) as pool:
        ids = pool.map(work, range(30))
    print(len(set(ids)), queue.stats(exact=True).pending)
"""


@pytest.mark.integration
def test_multiprocessing(url: str) -> None:
    """A pool of forked processes uses the queue that was made before it."""
    ended = run(PROCESSES, url)
    assert (ended.stdout, ended.stderr) == ("30 31\n", "")
