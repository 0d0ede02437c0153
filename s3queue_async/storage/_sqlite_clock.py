"""The time of a SQLite store: one clock for all processes of the machine that no one can set."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

_SCHEMA = "CREATE TABLE IF NOT EXISTS clock (boot TEXT PRIMARY KEY, offset_ms INTEGER NOT NULL) STRICT"

# The offset is worked out once for a boot, by whoever comes first: the wall clock then, or the newest time in the
# file if that is later, so that the store's time never runs backwards over a reboot.
_CREATE = """
INSERT INTO clock (boot, offset_ms)
SELECT ?1, max(?2, (SELECT coalesce(max(modified_ms), 0) + 1 FROM objects)) - ?3
WHERE NOT EXISTS (SELECT 1 FROM clock WHERE boot = ?1)
"""
_READ = "SELECT offset_ms FROM clock WHERE boot = ?1"


def since_boot_ms() -> int:
    """Milliseconds since the machine started, suspends included where the system can say so."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    return time.monotonic_ns() // 1_000_000


def boot_name() -> str:
    """What names the running boot; equal in all processes of the machine.

    Processes in another time namespace count from another zero, so the namespace is part of the name. Where the
    system does not name its boots, the estimated time of the boot in ten-minute steps has to do; processes on
    two sides of a step then agree as well as the wall clock did when each of them came.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return f"about-{round((time.time() * 1000 - since_boot_ms()) / 600_000)}"
    try:
        namespace = Path("/proc/self/ns/time").stat().st_ino
    except OSError:
        return boot
    return f"{boot}-{namespace}"


class StoreClock:
    """The time since boot plus an offset that the file keeps for each boot."""

    def __init__(self) -> None:
        self._offset_ms = 0

    def prepare(self, connection: sqlite3.Connection) -> None:
        """Read this boot's offset from the file, or write it there first."""
        connection.execute(_SCHEMA)
        boot = boot_name()
        row = connection.execute(_READ, (boot,)).fetchone()
        if row is None:
            connection.execute(_CREATE, (boot, time.time_ns() // 1_000_000, since_boot_ms()))
            row = connection.execute(_READ, (boot,)).fetchone()
        self._offset_ms = row[0]

    def now_ms(self) -> int:
        """The store's time in milliseconds since the epoch."""
        return since_boot_ms() + self._offset_ms
