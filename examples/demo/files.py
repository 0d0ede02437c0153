"""Which files there are to index."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path

import msgspec

NOT_STANDARD = ("site-packages", "dist-packages")
BROKEN = "broken_on_purpose.py"


class SourceFile(msgspec.Struct):
    """The payload of a message: one file to index.

    Attributes:
        path: Where it is.
        name: Its path below the standard library, which is how the index names it.
    """

    path: str
    name: str


def standard_library() -> Path:
    """The directory of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def source_files(limit: int | None = None) -> list[SourceFile]:
    """Every .py file of the standard library, its tests included, in the order of their names."""
    root = standard_library()
    found: list[SourceFile] = []
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if name not in NOT_STANDARD]
        for name in names:
            if name.endswith(".py"):
                path = Path(directory, name)
                found.append(SourceFile(str(path), path.relative_to(root).as_posix()))
    found.sort(key=lambda source: source.name)
    return found[:limit]


def broken_file(directory: Path) -> SourceFile:
    """Write a file that no Python can parse."""
    path = directory / BROKEN
    path.write_text("def this is no Python:\n", encoding="utf-8")
    return SourceFile(str(path), BROKEN)
