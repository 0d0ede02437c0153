"""Results of taskiq's tasks, kept in the queue's store."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar
from urllib.parse import quote

from taskiq import AsyncResultBackend, TaskiqResult
from taskiq.abc.serializer import TaskiqSerializer
from taskiq.depends.progress_tracker import TaskProgress
from taskiq.exceptions import ResultSetError
from taskiq.serializers.json_serializer import JSONSerializer

from s3queue_async.clock import Clock, SystemClock
from s3queue_async.errors import InvalidSettings, MessageNotFound, QueueClosed, StoreUnavailable, Throttled
from s3queue_async.log import log
from s3queue_async.queue import S3Queue
from s3queue_async.settings import seconds
from s3queue_async.storage.base import NotFound, Storage, Stored
from s3queue_async.storage.open import storage_from_url
from s3queue_async.storage.plugin import PluginStorage

NAMESPACE = "taskiq"
RESULTS = "results/"
PROGRESS = "progress/"
RESULT_TTL_S = 24 * 3600.0
TTL_MAX_S = 10 * 365 * 24 * 3600.0
TRIES = 5
PAUSE_S = 0.2
WRITES_PER_LOOK = 100
"""Every so many writes, one listing of up to 1,000 results looks for those that have outlived their time."""
PLAIN_ID_MAX = 200

_T = TypeVar("_T")


class S3QueueResultBackend(AsyncResultBackend[Any]):
    """Keeps results and progress in a bucket, an SQLite file, or memory, as JSON.

    An S3QueueBroker has one by itself. Given to ``with_result_backend`` without a url it uses the broker's store; with a url
    of its own it works with any broker.

    Args:
        url: As for S3Queue; None: the store of the S3QueueBroker that it belongs to.
        storage: An object that satisfies the Storage protocol, instead of a url.
        ttl: Seconds (or timedelta) for which results are kept, above 0, up to ten years.
        keep_results: False to delete a result when it is fetched.
        serializer: Turns a result into bytes; None: JSON. Pickle would let everybody run code who may write to the bucket.
        clock: For tests.

    Raises:
        InvalidSettings: ``ttl`` is out of range.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        storage: Storage | None = None,
        ttl: float | timedelta = RESULT_TTL_S,
        keep_results: bool = True,
        serializer: TaskiqSerializer | None = None,
        clock: Clock | None = None,
    ) -> None:
        self._ttl_s = seconds("ttl", ttl)
        if not 0 < self._ttl_s <= TTL_MAX_S:
            raise InvalidSettings(f"ttl={ttl!r} is out of range: above 0 seconds, up to ten years.")
        self._own = storage_from_url(url) if storage is None and url is not None else storage
        self._keep_results = keep_results
        self._serializer: TaskiqSerializer = JSONSerializer() if serializer is None else serializer
        self._clock = SystemClock() if clock is None else clock
        self._store: PluginStorage | None = None
        self._writes = 0
        self._looked_to = ""

    def attach(self, queue: S3Queue[Any]) -> None:
        """Use the store of this queue, unless there is one of its own."""
        if self._own is None:
            self._store = queue.plugin_storage(NAMESPACE, ttl=self._ttl_s)

    async def startup(self) -> None:
        """Open the store, if it is its own."""
        if self._own is not None and self._store is None:
            await self._own.open()
            self._store = PluginStorage(self._own, NAMESPACE, ttl_s=self._ttl_s)
        await super().startup()

    async def shutdown(self) -> None:
        """Close the store, if it is its own."""
        self._store = None
        if self._own is not None:
            await self._own.close()
        await super().shutdown()

    # -- taskiq's side -------------------------------------------------------------------------------------------

    async def set_result(self, task_id: str, result: TaskiqResult[Any]) -> None:
        """Keep a result.

        Raises:
            ResultSetError: It cannot be turned into JSON; an error that says so is kept in its place.
        """
        try:
            body = self._serializer.dumpb(result.model_dump(mode="json"))
        except Exception as error:
            # Whoever waits for the result is to learn of it, too.
            instead = TypeError(f"the result of the task cannot be stored: {error}")
            lacking: TaskiqResult[Any] = TaskiqResult(
                is_err=True, return_value=None, execution_time=result.execution_time, error=instead
            )
            await self._write(RESULTS, task_id, self._serializer.dumpb(lacking.model_dump(mode="json")))
            raise ResultSetError from error
        await self._write(RESULTS, task_id, body)

    async def is_result_ready(self, task_id: str) -> bool:
        """Whether there is a result."""
        return await self._read(RESULTS, task_id, span=(0, 1)) is not None

    async def get_result(self, task_id: str, with_logs: bool = False) -> TaskiqResult[Any]:
        """The result of a task.

        Raises:
            MessageNotFound: There is none: the task is not done, or its result has outlived its time.
        """
        body = await self._read(RESULTS, task_id)
        if body is None:
            raise MessageNotFound(
                f"There is no result of the task {task_id!r}.",
                suggestion="It is not done yet, or its result was kept for long enough (result_ttl).",
            )
        result: TaskiqResult[Any] = TaskiqResult.model_validate(self._serializer.loadb(body))
        if not with_logs:
            result.log = None
        if not self._keep_results:
            store = self._opened()
            await self._insist(lambda: store.delete(_key(RESULTS, task_id)))
        return result

    async def set_progress(self, task_id: str, progress: TaskProgress[Any]) -> None:
        """Keep how far a task is."""
        await self._write(PROGRESS, task_id, self._serializer.dumpb(progress.model_dump(mode="json")))

    async def get_progress(self, task_id: str) -> TaskProgress[Any] | None:
        """How far a task is, if it said so."""
        body = await self._read(PROGRESS, task_id)
        return None if body is None else TaskProgress.model_validate(self._serializer.loadb(body))

    # -- the store's side ----------------------------------------------------------------------------------------

    def _opened(self) -> PluginStorage:
        if self._store is None:
            raise QueueClosed(
                "The result backend has no open store.",
                suggestion="Call `await broker.startup()` first; with another broker than S3QueueBroker, pass it a url.",
            )
        return self._store

    async def _write(self, kind: str, task_id: str, body: bytes) -> None:
        store = self._opened()
        await self._insist(lambda: store.put(_key(kind, task_id), body))
        self._writes += 1
        if self._writes % WRITES_PER_LOOK == 0:
            await self._delete_expired(store)

    async def _read(self, kind: str, task_id: str, *, span: tuple[int, int] | None = None) -> bytes | None:
        store = self._opened()
        try:
            found = await self._insist(lambda: store.get(_key(kind, task_id), span=span))
        except NotFound:
            return None
        assert isinstance(found, Stored)  # only a read that names a version is answered otherwise
        if found.date_s is not None and store.expired(found.modified_s, found.date_s):
            return None
        return found.body

    async def _delete_expired(self, store: PluginStorage) -> None:
        """Look at the next thousand results, in a circle; whoever writes many looks often."""
        try:
            page = await store.list("", after=self._looked_to)
            self._looked_to = page.entries[-1].key if page.more else ""
            if page.date_s is None:
                return
            now_s = page.date_s
            if old := [entry.key for entry in page.entries if store.expired(entry.modified_s, now_s)]:
                await store.delete_many(old)
        except (StoreUnavailable, Throttled) as error:
            # The result is written; the next look deletes what this one left.
            log.warning("deleting old results failed", error=str(error))

    async def _insist(self, request: Callable[[], Awaitable[_T]]) -> _T:
        """The store's reply; reads, and writes that may be repeated."""
        pause_s = PAUSE_S
        for _ in range(TRIES - 1):
            try:
                return await request()
            except (StoreUnavailable, Throttled) as error:
                if not error.retriable:
                    raise
                await self._clock.sleep(pause_s)
                pause_s *= 2
        return await request()


def _key(kind: str, task_id: str) -> str:
    plain = quote(task_id, safe="")
    return kind + (plain if len(plain) <= PLAIN_ID_MAX else hashlib.sha256(task_id.encode()).hexdigest())
