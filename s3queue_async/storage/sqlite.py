"""A store in one SQLite file that several processes of a machine share: the embedded default."""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from s3queue_async.errors import StoreUnavailable
from s3queue_async.storage._sqlite_clock import StoreClock
from s3queue_async.storage._sqlite_thread import SqliteThread, Statement
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Deleted,
    Entry,
    IfAbsent,
    IfVersion,
    NotFound,
    Page,
    PreconditionFailed,
    Stored,
    Unmodified,
    Written,
)

# The body comes last, so that a listing never reads the pages that a large body overflows into.
_SCHEMA = """
CREATE TABLE IF NOT EXISTS objects (
    id INTEGER PRIMARY KEY,
    space TEXT NOT NULL,
    key TEXT NOT NULL,
    version TEXT NOT NULL,
    modified_ms INTEGER NOT NULL,
    body BLOB NOT NULL,
    UNIQUE (space, key)
) STRICT
"""

# Not written out in the class, where "list" is the method.
_Rows = list[Any]

_GET = "SELECT version, modified_ms, body FROM objects WHERE space = ?1 AND key = ?2"
_GET_SPAN = "SELECT version, modified_ms, substr(body, ?3 + 1, ?4) FROM objects WHERE space = ?1 AND key = ?2"
_GET_UNLESS = """
SELECT version, modified_ms, CASE WHEN version = ?5 THEN NULL WHEN ?3 IS NULL THEN body
ELSE substr(body, ?3 + 1, ?4) END FROM objects WHERE space = ?1 AND key = ?2
"""
# Versions are random, not a hash of the body and not a count of the row's writes: none ever comes back.
# store_ms() is StoreClock.now_ms, called by the statement once it has the file's lock: a write that had to wait
# carries the time at which it landed, not the time at which it was asked for.
_CREATE = """
INSERT INTO objects (space, key, body, modified_ms, version) VALUES (?1, ?2, ?3, store_ms(), lower(hex(randomblob(12))))
ON CONFLICT (space, key) DO NOTHING RETURNING version
"""
_UPDATE = """
UPDATE objects SET body = ?3, modified_ms = store_ms(), version = lower(hex(randomblob(12)))
WHERE space = ?1 AND key = ?2 AND version = ?4 RETURNING version
"""
_PUT = """
INSERT INTO objects (space, key, body, modified_ms, version) VALUES (?1, ?2, ?3, store_ms(), lower(hex(randomblob(12))))
ON CONFLICT (space, key) DO UPDATE
SET body = excluded.body, modified_ms = excluded.modified_ms, version = excluded.version RETURNING version
"""
_DELETE = "DELETE FROM objects WHERE space = ?1 AND key = ?2"
_DELETE_IF = "DELETE FROM objects WHERE space = ?1 AND key = ?2 AND version = ?3 RETURNING id"
_DELETE_MANY = "DELETE FROM objects WHERE space = ?1 AND key IN (SELECT value FROM json_each(?2))"
_LIST = """
SELECT key, version, modified_ms, length(body) FROM objects
WHERE space = ?1 AND key > ?2 AND key >= ?3 AND (?4 IS NULL OR key < ?4) ORDER BY key LIMIT ?5
"""


class SqliteStorage:
    """A storage in one SQLite file, shared safely by several processes of one machine.

    Each call is one SQL statement; calls that wait together share one transaction. The file is in WAL mode, and every
    transaction is synced to the disk (``synchronous="FULL"``), so that what was acknowledged survives a power failure.
    With ``"NORMAL"`` a killed or crashed process loses nothing either, but a power failure (or a crash of the
    operating system) can take back the last writes before it, newest first; the file stays whole.
    (Source: sqlite.org/pragma.html#pragma_synchronous.)

    The file must be on a local disk: WAL needs memory that all processes share, which network file systems lack.

    Args:
        path: The file; it is created, but its directory must exist.
        name: Which of the file's name spaces to use.
        synchronous: "NORMAL" or "FULL", see above.
        busy_timeout_s: How long to wait for another process's transaction before StoreUnavailable, in seconds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        name: str = "default",
        *,
        synchronous: Literal["NORMAL", "FULL"] = "FULL",
        busy_timeout_s: float = 10.0,
    ) -> None:
        if synchronous not in ("NORMAL", "FULL"):
            raise ValueError(f"synchronous must be NORMAL or FULL, not {synchronous!r}")
        self.path = Path(path)
        self.name = name
        self._synchronous = synchronous
        self._busy_timeout_s = busy_timeout_s
        self._thread: SqliteThread | None = None
        self._clock = StoreClock()

    def __repr__(self) -> str:
        return f"SqliteStorage({str(self.path)!r}, {self.name!r})"

    @property
    def date_resolution_s(self) -> float:
        """Dates are whole milliseconds."""
        return 0.001

    async def open(self) -> None:
        """Open the file and make its tables; see Storage.open."""
        if self._thread is not None:
            return
        # Looked at before SQLite, whose "unable to open database file" does not say which of the reasons it is.
        if not self.path.parent.is_dir():
            raise StoreUnavailable(
                f"The directory {self.path.parent} of the SQLite file {self.path} does not exist.",
                retriable=False,
                suggestion="Create the directory, or correct the path in the url.",
            )
        thread = SqliteThread(self.path, prepare=self._prepare, busy_timeout_s=self._busy_timeout_s)
        await thread.start()
        self._thread = thread

    async def close(self) -> None:
        """Finish what waits and close the file. Calling it twice is fine."""
        thread, self._thread = self._thread, None
        if thread is not None:
            await thread.stop()

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        """Read an object; see Storage.get."""
        where = (self.name, key)
        if unless is not None:
            statement = Statement(_GET_UNLESS, (*where, *(span or (None, None)), unless))
        elif span is not None:
            statement = Statement(_GET_SPAN, (*where, *span))
        else:
            statement = Statement(_GET, where)
        rows, date_s = await self._run(statement)
        if not rows:
            raise NotFound(key, date_s=date_s)
        version, modified_ms, body = rows[0]
        if body is None:
            return Unmodified(date_s)
        return Stored(key, body, version, modified_ms / 1000, date_s)

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        """Write an object whole; see Storage.put."""
        values: tuple[Any, ...] = (self.name, key, bytes(body))
        match when:
            case IfAbsent():
                statement = Statement(_CREATE, values, writes=True)
            case IfVersion(version):
                statement = Statement(_UPDATE, (*values, version), writes=True)
            case None:
                statement = Statement(_PUT, values, writes=True)
        rows, date_s = await self._run(statement)
        if not rows:
            raise PreconditionFailed(key, date_s=date_s)
        return Written(rows[0][0], date_s)

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        """Delete an object; see Storage.delete."""
        if when is None:
            _, date_s = await self._run(Statement(_DELETE, (self.name, key), writes=True))
            return Deleted(date_s)
        rows, date_s = await self._run(Statement(_DELETE_IF, (self.name, key, when.version), writes=True))
        if not rows:
            raise PreconditionFailed(key, date_s=date_s)
        return Deleted(date_s)

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        """Delete up to 1,000 objects at once; see Storage.delete_many."""
        names = json.dumps([*keys], ensure_ascii=False)
        _, date_s = await self._run(Statement(_DELETE_MANY, (self.name, names), writes=True))
        return Deleted(date_s)

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        """List keys in order; see Storage.list."""
        values = (self.name, after, prefix, _end_of(prefix), limit + 1)
        rows, date_s = await self._run(Statement(_LIST, values))
        entries = [Entry(key, version, size, ms / 1000) for key, version, ms, size in rows[:limit]]
        return Page(entries, len(rows) > limit, date_s)

    async def _run(self, statement: Statement) -> tuple[_Rows, float]:
        if self._thread is None:
            raise StoreUnavailable(
                f"{self!r} is not open.", retriable=False, suggestion="Call open() first, and no more after close()."
            )
        rows = await self._thread.run(statement)
        return rows, self._clock.now_ms() / 1000

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA synchronous = {self._synchronous}")
        # A burst leaves a large WAL file behind; cut it down to this when it is next reset.
        connection.execute("PRAGMA journal_size_limit = 67108864")
        connection.create_function("store_ms", 0, self._clock.now_ms)
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(_SCHEMA)
        self._clock.prepare(connection)
        connection.execute("COMMIT")


def _end_of(prefix: str) -> str | None:
    """The smallest string greater than every string with the prefix; None when there is none."""
    while prefix:
        code = ord(prefix[-1])
        if code < 0x10FFFF:
            # Surrogates have no UTF-8 form; the next character after U+D7FF is U+E000.
            return prefix[:-1] + chr(0xE000 if code == 0xD7FF else code + 1)
        prefix = prefix[:-1]
    return None
