"""SqliteStorage: several processes, cancelled callers, bad files, and its clock."""

from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import anyio
import pytest

from s3queue_async.errors import StoreUnavailable
from s3queue_async.storage import _sqlite_clock
from s3queue_async.storage._sqlite_thread import SqliteThread, Statement
from s3queue_async.storage.base import IfAbsent, IfVersion
from s3queue_async.storage.sqlite import SqliteStorage, _end_of
from s3queue_async.testing.conformance import keys_of, read

_COUNTER = """
import asyncio, sys
from s3queue_async.storage.base import IfVersion, PreconditionFailed
from s3queue_async.storage.sqlite import SqliteStorage

async def main(path, name, steps):
    storage = SqliteStorage(path)
    await storage.open()
    for step in range(steps):
        while True:
            found = await storage.get("counter")
            try:
                await storage.put("counter", b"%d" % (int(found.body) + 1), when=IfVersion(found.version))
                break
            except PreconditionFailed:
                pass
        await storage.put(f"{name}/{step:04}", b"x" * 1000)
    await storage.close()

asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
"""


@pytest.mark.integration
async def test_processes_share_a_file(tmp_path: Path) -> None:
    """Three processes count up one number by compare-and-swap, all starting at once on one file: no step is lost."""
    path = tmp_path / "queue.db"
    storage = SqliteStorage(path)
    await storage.open()
    await storage.put("counter", b"0")
    arguments = [sys.executable, "-W", "error", "-c", _COUNTER, str(path)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    async with anyio.create_task_group() as group:
        for name in ("a", "b", "c"):
            group.start_soon(partial(anyio.run_process, [*arguments, name, "60"], env=environment))
    assert (await read(storage, "counter")).body == b"180"
    assert len(await keys_of(storage, "a/")) == 60
    await storage.close()


@pytest.mark.integration
async def test_processes_open_a_new_file_at_once(tmp_path: Path) -> None:
    """Processes that open a file at once, which does not exist yet, all succeed, and agree on the time."""
    path = tmp_path / "new.db"
    code = (
        "import asyncio, sys\n"
        "from s3queue_async.storage.sqlite import SqliteStorage\n"
        "storage = SqliteStorage(sys.argv[1])\n"
        "async def main():\n"
        "    await storage.open()\n"
        "    await storage.close()\n"
        "asyncio.run(main())\n"
        "print(storage._clock._offset_ms)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    offsets: list[bytes] = []

    async def run() -> None:
        done = await anyio.run_process([sys.executable, "-W", "error", "-c", code, str(path)], env=environment)
        offsets.append(done.stdout)

    async with anyio.create_task_group() as group:
        for _ in range(4):
            group.start_soon(run)
    assert len(set(offsets)) == 1


async def test_names_do_not_see_each_other(tmp_path: Path) -> None:
    """Two names in one file are two storages."""
    one, two = SqliteStorage(tmp_path / "q.db", "one"), SqliteStorage(tmp_path / "q.db", "two")
    await one.open()
    await two.open()
    await one.put("k", b"1")
    await two.put("k", b"2", when=IfAbsent())
    await two.delete_many(["k"])
    assert (await read(one, "k")).body == b"1"
    await one.close()
    await two.close()


async def test_versions_never_come_back(tmp_path: Path) -> None:
    """Equal bodies have different versions, also after the object was deleted."""
    storage = SqliteStorage(tmp_path / "q.db")
    await storage.open()
    versions = []
    for _ in range(3):
        versions += [(await storage.put("k", b"same")).version, (await storage.put("k", b"same")).version]
        await storage.delete("k", when=IfVersion(versions[-1]))
    assert len(set(versions)) == 6
    await storage.close()


async def test_waiting_statements_share_a_transaction(tmp_path: Path) -> None:
    """Statements that wait together are committed together, and one that fails does not take others along."""
    seen: list[str] = []

    def prepare(connection: sqlite3.Connection) -> None:
        connection.execute("CREATE TABLE t (n INTEGER UNIQUE)")
        connection.set_trace_callback(seen.append)

    thread = SqliteThread(tmp_path / "q.db", prepare=prepare, busy_timeout_s=1)
    await thread.start()
    insert = "INSERT INTO t VALUES (?) RETURNING n"
    async with anyio.create_task_group() as group:
        for number in range(50):
            group.start_soon(thread.run, Statement(insert, (number,), writes=True))
    assert 1 <= seen.count("COMMIT") < 25
    outcomes = await asyncio.gather(
        *(thread.run(Statement(insert, (number,), writes=True)) for number in (100, 7, 101)), return_exceptions=True
    )
    assert outcomes[0] == [(100,)]
    assert isinstance(outcomes[1], StoreUnavailable)
    assert outcomes[2] == [(101,)]
    assert await thread.run(Statement("SELECT count(*) FROM t", ())) == [(52,)]
    await thread.stop()


async def test_cancelled_callers(tmp_path: Path) -> None:
    """Writes whose callers gave up are done or not, the others are done, and the storage works on."""
    storage = SqliteStorage(tmp_path / "q.db")
    await storage.open()
    tasks = [asyncio.ensure_future(storage.put(f"k/{number:03}", b"x", when=IfAbsent())) for number in range(200)]
    await asyncio.wait(tasks[:1])
    for task in tasks[1::2]:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    keys = await keys_of(storage)
    for number, outcome in enumerate(outcomes):
        if not isinstance(outcome, asyncio.CancelledError):
            assert f"k/{number:03}" in keys
    await storage.put("after", b"")
    await storage.close()


async def test_open_that_is_cancelled(tmp_path: Path) -> None:
    """Opening a file that another process holds can be cancelled, and nothing stays open."""
    path = tmp_path / "q.db"
    storage = SqliteStorage(path)
    await storage.open()
    await storage.close()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    task = asyncio.ensure_future(SqliteStorage(path, busy_timeout_s=5).open())
    await asyncio.wait([task], timeout=0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    holder.execute("ROLLBACK")
    holder.close()


async def test_a_file_that_stays_locked(tmp_path: Path) -> None:
    """A write that waited for another process for too long is retriable, and was not applied."""
    path = tmp_path / "q.db"
    storage = SqliteStorage(path, busy_timeout_s=0.05)
    await storage.open()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreUnavailable, match=r"locked.*busy_timeout") as caught:
        await storage.put("k", b"1")
    assert caught.value.retriable
    holder.execute("ROLLBACK")
    holder.close()
    assert await keys_of(storage) == []
    await storage.close()


async def test_close_finishes_what_was_asked(tmp_path: Path) -> None:
    """Closing while writes wait lets them finish first."""
    storage = SqliteStorage(tmp_path / "q.db")
    await storage.open()
    tasks = [asyncio.ensure_future(storage.put(f"k/{number}", b"x")) for number in range(20)]
    await asyncio.sleep(0)
    await storage.close()
    assert len(await asyncio.gather(*tasks)) == 20
    await storage.open()
    assert len(await keys_of(storage)) == 20
    await storage.close()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing/q.db", None, "directory .*missing of the SQLite file .* does not exist.*Create the directory"),
        ("text.db", b"this is no database " * 100, "file is not a database.*Something else is at this path"),
        (".", None, "unable to open database file.*not a directory"),
        ("other.db", "CREATE TABLE objects (x)", "no such column.*other tables"),
    ],
)
async def test_bad_files(tmp_path: Path, name: str, content: bytes | str | None, message: str) -> None:
    """A file that cannot be one of ours says why, and that trying again is of no use."""
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        other = sqlite3.connect(path)
        other.execute(content)
        other.close()
    with pytest.raises(StoreUnavailable, match=message) as caught:
        await SqliteStorage(path).open()
    assert not caught.value.retriable


@pytest.mark.integration
@pytest.mark.parametrize(
    ("exists", "message"),
    [(False, "unable to open database file.*may open"), (True, "readonly database.*right to write")],
)
def test_unwritable_file(exists: bool, message: str) -> None:
    """Without the right to write the file or its directory: not retriable, and it says so."""
    code = (
        "import asyncio, encodings.idna, os, sys\n"
        "from s3queue_async.storage.sqlite import SqliteStorage\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "asyncio.run(SqliteStorage(sys.argv[1]).open())\n"
    )
    with tempfile.TemporaryDirectory(prefix="s3queue-readonly-") as directory:
        path = Path(directory) / "q.db"
        if exists:
            sqlite3.connect(path).close()
            path.touch()
            path.chmod(0o444)
        Path(directory).chmod(0o555)
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=False,
        )
        Path(directory).chmod(0o755)
    assert re.search(f"StoreUnavailable: SQLite failed opening .*{message}", done.stderr), done.stderr


async def test_the_clock_does_not_follow_the_wall_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a boot the offset in the file counts, however the wall clock was set meanwhile."""
    path = tmp_path / "q.db"
    storage = SqliteStorage(path)
    await storage.open()
    before = (await storage.put("k", b"")).date_s
    await storage.close()
    real = time.time_ns()
    monkeypatch.setattr(time, "time_ns", lambda: real - 3_600_000_000_000)
    storage = SqliteStorage(path)
    await storage.open()
    after = (await storage.put("k", b"")).date_s
    await storage.close()
    assert before is not None
    assert after is not None
    assert before <= after < before + 60


async def test_the_clock_never_runs_backwards_over_a_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a boot with a wall clock that is behind, time goes on from the newest object."""
    path = tmp_path / "q.db"
    storage = SqliteStorage(path)
    await storage.open()
    await storage.put("k", b"")
    before = (await read(storage, "k")).modified_s
    await storage.close()
    monkeypatch.setattr(_sqlite_clock, "boot_name", lambda: "the next boot")
    monkeypatch.setattr(_sqlite_clock, "since_boot_ms", lambda: 5)
    monkeypatch.setattr(time, "time_ns", lambda: 0)
    storage = SqliteStorage(path)
    await storage.open()
    after = (await storage.put("k2", b"")).date_s
    await storage.close()
    assert after is not None
    assert before < after < before + 1


async def test_a_write_that_waited_carries_the_time_of_its_landing(tmp_path: Path) -> None:
    """The date of an object is when it was written, not when that was asked for."""
    path = tmp_path / "q.db"
    storage = SqliteStorage(path, busy_timeout_s=30)
    await storage.open()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    task = asyncio.ensure_future(storage.put("k", b""))
    await asyncio.wait([task], timeout=0.2)
    released_ms = storage._clock.now_ms()
    holder.execute("ROLLBACK")
    holder.close()
    await task
    assert (await read(storage, "k")).modified_s >= released_ms / 1000
    await storage.close()


@pytest.mark.parametrize(
    ("prefix", "end"),
    [("", None), ("a", "b"), ("a/", "a0"), ("x\U0010ffff", "y"), ("\U0010ffff", None), ("\ud7ff", "\ue000")],
)
def test_end_of_prefix(prefix: str, end: str | None) -> None:
    """The end of a prefix is the smallest string behind everything that starts with it."""
    assert _end_of(prefix) == end


async def test_must_be_open(tmp_path: Path) -> None:
    """Before open and after close every call says so; opening twice is fine."""
    storage = SqliteStorage(tmp_path / "q.db")
    with pytest.raises(StoreUnavailable, match="is not open"):
        await storage.get("k")
    await storage.open()
    await storage.open()
    await storage.close()
    with pytest.raises(StoreUnavailable, match="is not open"):
        await storage.list("")


def test_synchronous_is_checked(tmp_path: Path) -> None:
    """Only NORMAL and FULL keep the promise; OFF is refused."""
    with pytest.raises(ValueError, match="NORMAL or FULL"):
        SqliteStorage(tmp_path / "q.db", synchronous="OFF")  # type: ignore[arg-type]
