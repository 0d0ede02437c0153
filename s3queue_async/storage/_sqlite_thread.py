"""One thread that owns a SQLite connection and runs the statements that waited together in one transaction."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from s3queue_async.errors import QueueError, StoreUnavailable

# More statements than this in one transaction gain nothing, and keep other processes waiting for the file.
_BATCH_MAX = 256
# Bodies of a batch stay under this unless one alone is larger, for the same reason.
_BATCH_BYTES_MAX = 16 * 1024 * 1024

# Nothing that time cures; see sqlite.org/rescode.html.
_LASTING = {
    sqlite3.SQLITE_CANTOPEN: "Check that the path is a file (not a directory) that this user may open.",
    sqlite3.SQLITE_NOTADB: "Something else is at this path: use another one, or move the file away.",
    sqlite3.SQLITE_READONLY: "Give this user the right to write the file and its directory.",
    sqlite3.SQLITE_PERM: "Give this user the right to write the file and its directory.",
    sqlite3.SQLITE_CORRUPT: "Restore the file from a backup, or move it away.",
    sqlite3.SQLITE_ERROR: "The file has other tables than this version of s3queue_async: use another file.",
    sqlite3.SQLITE_TOOBIG: "SQLite takes objects of up to 1 GB: make the messages smaller.",
}
_PASSING = {
    sqlite3.SQLITE_BUSY: "Another process held the file for too long; try again, or raise busy_timeout.",
    sqlite3.SQLITE_FULL: "Make room on the disk, then try again.",
}


@dataclass(frozen=True, slots=True)
class Statement:
    """One SQL statement with its values."""

    sql: str
    values: tuple[Any, ...]
    writes: bool = False


@dataclass(slots=True)
class _Request:
    statement: Statement
    future: asyncio.Future[list[Any]]
    size: int = field(init=False)
    rows: list[Any] | None = None
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.size = sum(len(value) for value in self.statement.values if isinstance(value, bytes))


class SqliteThread:
    """Runs statements on a thread of its own, in the order of their coming, several in one transaction.

    Every statement of a batch is answered after the batch was committed. When a statement fails, the batch is
    rolled back and its statements run one by one, so that only the one at fault pays. A caller that gives up
    before its statement was begun takes it along; after that it is done, unseen.

    Args:
        path: The file of the connection.
        prepare: Called on the thread before the first statement.
        busy_timeout_s: How long SQLite waits for other processes, in seconds.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, prepare: Callable[[sqlite3.Connection], None], busy_timeout_s: float
    ) -> None:
        self._path = os.fspath(path)
        self._prepare = prepare
        self._busy_timeout_s = busy_timeout_s
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._opened: asyncio.Future[None] = self._loop.create_future()
        # A daemon, so that a program that forgot to close does not hang at its end; transactions are atomic anyway.
        self._thread = threading.Thread(target=self._main, name=f"s3queue-sqlite {self._path}", daemon=True)

    async def start(self) -> None:
        """Start the thread and open the file. Raises StoreUnavailable."""
        self._thread.start()
        try:
            await asyncio.shield(self._opened)
        except asyncio.CancelledError:
            # The thread may be waiting for another process; it ends by itself once it has seen this.
            self._requests.put(None)
            self._opened.add_done_callback(_look)
            raise

    async def stop(self) -> None:
        """Let the thread finish what was asked before, and wait for its end."""
        self._requests.put(None)
        await asyncio.shield(self._ended)
        self._thread.join()

    async def run(self, statement: Statement) -> list[Any]:
        """Run a statement and return its rows. Raises StoreUnavailable."""
        request = _Request(statement, self._loop.create_future())
        self._requests.put(request)
        return await request.future

    def _main(self) -> None:
        try:
            try:
                connection = self._connect()
            except Exception as error:  # noqa: BLE001 - the caller of start() gets it, whatever it is
                self._deliver(partial(self._opened.set_exception, self._translate(error, "opening")))
                return
            with closing(connection):
                self._deliver(partial(self._opened.set_result, None))
                more = True
                while more:
                    batch, more = self._next_batch()
                    if batch:
                        self._run_batch(connection, batch)
                        self._deliver(partial(_answer, batch))
        finally:
            self._deliver(partial(self._ended.set_result, None))

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=self._busy_timeout_s, isolation_level=None)
        try:
            self._use_wal(connection)
            self._prepare(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _use_wal(self, connection: sqlite3.Connection) -> None:
        # SQLite does not wait for others when it changes the mode of a new file, whatever the busy timeout is
        # (two processes that open it at once collide), so the waiting is done here.
        wait_s = 0.02
        for _ in range(max(1, int(self._busy_timeout_s / wait_s))):
            try:
                (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            except sqlite3.OperationalError as error:
                if _code(error) != sqlite3.SQLITE_BUSY:
                    raise
                threading.Event().wait(wait_s)
                continue
            if mode != "wal":
                raise StoreUnavailable(
                    f"The SQLite file {self._path} cannot use a write-ahead log (its mode is {mode}).",
                    retriable=False,
                    suggestion="Put the file on a local disk.",
                )
            return
        raise StoreUnavailable(f"The SQLite file {self._path} is held by another process.")

    def _next_batch(self) -> tuple[list[_Request], bool]:
        batch: list[_Request] = []
        size = 0
        request = self._requests.get()
        while request is not None:
            if not request.future.cancelled():
                batch.append(request)
                size += request.size
            if len(batch) >= _BATCH_MAX or size >= _BATCH_BYTES_MAX:
                return batch, True
            try:
                request = self._requests.get_nowait()
            except Empty:
                return batch, True
        return batch, False

    def _run_batch(self, connection: sqlite3.Connection, batch: list[_Request]) -> None:
        try:
            self._transact(connection, batch)
        except Exception as error:  # noqa: BLE001 - the callers of run() get it, whatever it is
            if len(batch) == 1 or _code(error) in _PASSING:
                for request in batch:
                    request.error = self._translate(error, "running a statement on")
                return
            for request in batch:
                self._run_batch(connection, [request])

    @staticmethod
    def _transact(connection: sqlite3.Connection, batch: list[_Request]) -> None:
        writes = any(request.statement.writes for request in batch)
        alone = len(batch) == 1
        try:
            if not alone:
                # Taking the lock at once avoids the upgrade from reader to writer, which SQLite refuses to wait for.
                connection.execute("BEGIN IMMEDIATE" if writes else "BEGIN")
            for request in batch:
                request.rows = connection.execute(request.statement.sql, request.statement.values).fetchall()
            if not alone:
                connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def _translate(self, error: Exception, doing: str) -> QueueError:
        if isinstance(error, QueueError):
            return error
        code = _code(error)
        text = f"SQLite failed {doing} {self._path}: {error}."
        if code in _PASSING:
            return StoreUnavailable(text, suggestion=_PASSING[code])
        if code in _LASTING:
            return StoreUnavailable(text, retriable=False, suggestion=_LASTING[code])
        return StoreUnavailable(text, retriable=isinstance(error, sqlite3.Error), suggestion="Look at the disk.")

    def _deliver(self, callback: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:
            # The loop is closed: nobody waits for an answer any more, and the work itself is committed.
            if not self._loop.is_closed():
                raise


def _answer(batch: list[_Request]) -> None:
    for request in batch:
        if request.future.done():
            continue
        if request.error is not None:
            request.future.set_exception(request.error)
        else:
            request.future.set_result(request.rows or [])


def _look(future: asyncio.Future[None]) -> None:
    """Take the error of a future that nobody waits for any more."""
    if not future.cancelled():
        future.exception()


def _code(error: Exception) -> int:
    # The low byte is the primary code; the rest refines it.
    return getattr(error, "sqlite_errorcode", -1) & 0xFF
