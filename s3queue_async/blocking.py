"""The queue for programs without an event loop: Django, Flask, scripts. It enqueues and looks; handlers need S3Queue.

An event loop runs in a thread of its own, begun with the first call. A thread does not survive a fork, so a child
begins its own.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, Unpack

import anyio
from anyio.from_thread import BlockingPortal

from s3queue_async.dead_letters import LIST_LIMIT_DEFAULT
from s3queue_async.errors import BlocksEventLoop, QueueClosed
from s3queue_async.keyring import Keyring
from s3queue_async.log import log
from s3queue_async.message import CompletedMessage, DeadMessage, MessageStatus, QueueStats, Tracing, WorkerInfo
from s3queue_async.queue import PayloadT, S3Queue
from s3queue_async.scheduling import Schedule, ScheduleOptions
from s3queue_async.settings import Settings
from s3queue_async.storage.base import Storage

R = TypeVar("R")

CHUNK_SEGMENTS = 8
"""Segments' worth of payloads that ``enqueue_many`` takes before it hands them over."""
CHUNK_BYTES = 16 * 1024 * 1024


class SyncS3Queue(Generic[PayloadT]):
    """A queue whose methods block until they are done. Use it from any number of threads.

    Use it as a context manager, or make one for the whole program: it connects with the first call, again after a
    fork, and is closed at the interpreter's exit.

    Args:
        url, payload_type, settings, tracing, keyring: As for S3Queue.
        storage: Makes an object of your own that satisfies the Storage protocol; called in each process.

    Raises:
        InvalidURL, UnknownSetting, InvalidSettings: As S3Queue.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        payload_type: type[PayloadT] | Any = Any,
        settings: Settings | None = None,
        storage: Callable[[], Storage] | None = None,
        tracing: Tracing | None = None,
        keyring: Keyring | None = None,
    ) -> None:
        def make() -> S3Queue[PayloadT]:
            return S3Queue(
                url,
                payload_type=payload_type,
                settings=settings,
                storage=None if storage is None else storage(),
                tracing=tracing,
                keyring=keyring,
                scheduler=False,
            )

        self._make = make
        # What is wrong with the arguments is to be known here, not at the first call.
        first = make()
        self.url = first.url
        self.settings = first.settings
        self.dead_letters = SyncDeadLetters(self._call)
        self._lock = threading.Lock()
        self._life: _Life[PayloadT] | None = None
        self._closed = False
        _queues.add(self)

    # -- life ----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        _refuse_event_loop()
        self._closed = False
        self._living()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Finish the calls under way, and disconnect. Calling it twice is fine; entering it again opens it again."""
        _refuse_event_loop()
        self._closed = True
        with self._lock:
            self._end_life()

    def _end_life(self) -> None:
        life, self._life = self._life, None
        if life is not None:
            life.end()

    def _living(self) -> _Life[PayloadT]:
        with self._lock:
            if self._closed:
                raise QueueClosed("The queue was closed.", suggestion="Enter it again, or do not close it.")
            if self._life is None or not self._life.is_alive:
                self._life = _Life(self._make())
            return self._life

    def _call(self, function: Callable[[S3Queue[PayloadT]], Awaitable[R]]) -> R:
        _refuse_event_loop()
        return self._living().call(function)

    # -- producing -----------------------------------------------------------------------------------------------

    def enqueue(
        self,
        payload: PayloadT,
        *,
        priority: int = 0,
        delay: float | timedelta | None = None,
        deliver_at: datetime | None = None,
        dedup_id: str | None = None,
        headers: Mapping[str, str] | None = None,
        max_attempts: int | None = None,
        expires_in: float | timedelta | None = None,
    ) -> str:
        """Put a message into the queue and return its id once it is durable; see ``S3Queue.enqueue``.

        Calls of several threads at the same time share a write. An interrupted call may or may not have enqueued its
        message, unless it has a ``dedup_id``.

        Raises:
            BlocksEventLoop: An event loop runs in this thread.
        """
        return self._call(
            lambda queue: queue.enqueue(
                payload,
                priority=priority,
                delay=delay,
                deliver_at=deliver_at,
                dedup_id=dedup_id,
                headers=headers,
                max_attempts=max_attempts,
                expires_in=expires_in,
            )
        )

    def enqueue_many(
        self,
        payloads: Iterable[PayloadT],
        *,
        priority: int = 0,
        delay: float | timedelta | None = None,
        deliver_at: datetime | None = None,
        dedup_id: Callable[[PayloadT], str] | None = None,
        headers: Mapping[str, str] | None = None,
        max_attempts: int | None = None,
        expires_in: float | timedelta | None = None,
    ) -> list[str]:
        """Put many messages into the queue; see ``S3Queue.enqueue_many``. The payloads are taken in this thread."""
        ids: list[str] = []
        for chunk in self._chunks(payloads):
            try:
                ids += self._call(
                    lambda queue, chunk=chunk: queue.enqueue_many(  # type: ignore[misc]  # a default binds the chunk
                        chunk,
                        priority=priority,
                        delay=delay,
                        deliver_at=deliver_at,
                        dedup_id=dedup_id,
                        headers=headers,
                        max_attempts=max_attempts,
                        expires_in=expires_in,
                    )
                )
            except Exception as error:
                error.enqueued_ids = ids + getattr(error, "enqueued_ids", [])  # type: ignore[attr-defined]  # told to the caller
                raise
        return ids

    def _chunks(self, payloads: Iterable[PayloadT]) -> Iterator[list[PayloadT]]:
        most = CHUNK_SEGMENTS * self.settings.segment_messages_max
        chunk: list[PayloadT] = []
        size = 0
        for payload in payloads:
            chunk.append(payload)
            size += len(payload) if isinstance(payload, bytes | str) else 0
            if len(chunk) >= most or size >= CHUNK_BYTES:
                yield chunk
                chunk, size = [], 0
        if chunk:
            yield chunk

    def schedule(
        self, cron: str | None = None, payload: PayloadT | None = None, **options: Unpack[ScheduleOptions]
    ) -> Schedule:
        """Have a message enqueued at certain times by the workers; see ``S3Queue.schedule``."""
        return self._call(lambda queue: queue.schedule(cron, payload, **options))

    def schedules(self) -> list[Schedule]:
        """Every schedule of the queue, by name."""
        return self._call(lambda queue: queue.schedules())

    def unschedule(self, name: str) -> bool:
        """Remove a schedule; False when there is none of that name."""
        return self._call(lambda queue: queue.unschedule(name))

    # -- looking and operating -----------------------------------------------------------------------------------

    def stats(self, *, exact: bool = False) -> QueueStats:
        """Count the queue's messages; see ``S3Queue.stats``."""
        return self._call(lambda queue: queue.stats(exact=exact))

    def status(self, message_id: str) -> MessageStatus:
        """Where a message is."""
        return self._call(lambda queue: queue.status(message_id))

    def results(self, message_id: str) -> Any:
        """What the handler returned for a completed message. Raises MessageNotFound."""
        return self._call(lambda queue: queue.results(message_id))

    def history(self, *, limit: int = LIST_LIMIT_DEFAULT) -> list[CompletedMessage]:
        """Up to ``limit`` completed messages, newest first; empty unless ``retain_completed`` is set."""
        return self._call(lambda queue: queue.history(limit=limit))

    def workers(self) -> list[WorkerInfo]:
        """Every registered worker of the queue."""
        return self._call(lambda queue: queue.workers())

    def purge(self) -> int:
        """Delete every message that waits, delayed ones included. Returns how many."""
        return self._call(lambda queue: queue.purge())


class SyncDeadLetters:
    """The queue's dead letters, for programs that block."""

    def __init__(self, call: Callable[[Callable[[S3Queue[Any]], Awaitable[Any]]], Any]) -> None:
        self._call = call

    def list(self, *, limit: int = LIST_LIMIT_DEFAULT) -> list[DeadMessage]:
        """Up to ``limit`` dead letters, those that died first before the others."""
        letters: list[DeadMessage] = self._call(lambda queue: queue.dead_letters.list(limit=limit))
        return letters

    def redrive(self, ids: Iterable[str] | None = None) -> int:
        """Make dead letters ready again (``ids`` None: all); returns how many."""
        count: int = self._call(lambda queue: queue.dead_letters.redrive(ids))
        return count

    def purge(self, ids: Iterable[str] | None = None) -> int:
        """Delete dead letters (``ids`` None: all); returns how many."""
        count: int = self._call(lambda queue: queue.dead_letters.purge(ids))
        return count


class _Life(Generic[PayloadT]):
    """An open queue, and the thread whose event loop it is on.

    Raises:
        QueueError: What opening it raised.
    """

    def __init__(self, queue: S3Queue[PayloadT]) -> None:
        self._queue = queue
        started: Future[BlockingPortal] = Future()
        # A daemon: the interpreter joins other threads before it runs what is registered for its exit.
        self._thread = threading.Thread(target=self._main, args=(started,), name=f"s3queue {queue.url}", daemon=True)
        self._thread.start()
        try:
            self._portal = started.result()
        except BaseException:
            # Ctrl-C while it connects: then it closes again by itself.
            started.cancel()
            raise
        _lives.add(self)

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def may_be_forked(self) -> bool:
        """SQLite keeps its locks in memory, too, which a child would take for its own; of others nothing is known."""
        return (self._queue.url or "").startswith(("s3:", "memory:"))

    def call(self, function: Callable[[S3Queue[PayloadT]], Awaitable[R]]) -> R:
        """Run it on the loop, and wait for what it comes to."""
        try:
            future: Future[R] = self._portal.start_task_soon(function, self._queue)
        except RuntimeError as error:
            raise QueueClosed("The queue was closed meanwhile.", suggestion="Call it again.") from error
        try:
            return future.result()
        except CancelledError:
            raise QueueClosed("The queue was closed meanwhile.", suggestion="Call it again.") from None
        except BaseException:
            # Ctrl-C while waiting: whatever can be taken back is. Of a call that failed there is nothing left.
            future.cancel()
            raise

    def end(self) -> None:
        """Finish the calls under way, close the queue, and wait for the end of the thread."""
        _lives.discard(self)
        if self._thread.is_alive():
            try:
                self._portal.call(self._portal.stop)
            except RuntimeError:
                log.debug("the thread of a queue was ending already", url=self._queue.url)
        self._thread.join()

    def _main(self, started: Future[BlockingPortal]) -> None:
        try:
            anyio.run(self._serve, started)
        except BaseException as error:  # noqa: BLE001 - a thread has nobody above it; its caller is told
            if started.done():
                log.error("a queue ended by itself", url=self._queue.url, error=str(error))
            else:
                started.set_exception(error)

    async def _serve(self, started: Future[BlockingPortal]) -> None:
        async with self._queue, BlockingPortal() as portal:
            if not started.set_running_or_notify_cancel():
                return
            started.set_result(portal)
            await portal.sleep_until_stopped()


_queues: weakref.WeakSet[SyncS3Queue[Any]] = weakref.WeakSet()
_lives: set[_Life[Any]] = set()
_inherited: list[_Life[Any]] = []
"""Of the parent process. They must not be collected here: their connections are the parent's."""
_forking = threading.Lock()
_held: list[threading.Lock] = []


def _refuse_event_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise BlocksEventLoop("SyncS3Queue was called in a thread in which an event loop runs.")


def _before_fork() -> None:
    _forking.acquire()
    for queue in list(_queues):
        # Held until the fork is over, so that no other thread opens it meanwhile.
        queue._lock.acquire()
        _held.append(queue._lock)
        if queue._life is not None and not queue._life.may_be_forked:
            queue._end_life()


def _after_fork() -> None:
    while _held:
        _held.pop().release()
    _forking.release()


def _after_fork_in_child() -> None:
    _inherited.extend(_lives)
    _lives.clear()
    for queue in list(_queues):
        queue._life = None
    _after_fork()


def _at_exit() -> None:
    for life in list(_lives):
        life.end()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
atexit.register(_at_exit)
