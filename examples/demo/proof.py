"""Was every file indexed? The index is compared with a walk of its own over the directory."""

from __future__ import annotations

import ast
import hashlib
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from examples.demo.files import NOT_STANDARD, standard_library
from s3queue_async import DeadMessage, QueueStats


@dataclass
class Indexed:
    """What the workers' files say, taken together."""

    digests: dict[str, str] = field(default_factory=dict)
    handled_by: defaultdict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    functions: int = 0
    classes: int = 0
    contradictions: list[str] = field(default_factory=list)

    def add(self, worker: int, name: str, digest: str, functions: int, classes: int) -> None:
        self.handled_by[name].append(worker)
        if name not in self.digests:
            self.digests[name] = digest
            self.functions += functions
            self.classes += classes
        elif self.digests[name] != digest:
            self.contradictions.append(name)

    def by(self, worker: int) -> int:
        """How many files this worker handled."""
        return sum(worker in workers for workers in self.handled_by.values())

    def twice(self) -> dict[str, list[int]]:
        """Files that were handled more than once, and by whom."""
        return {name: workers for name, workers in self.handled_by.items() if len(workers) > 1}


@dataclass
class Proof:
    """What was compared, and what does not fit."""

    walked: int
    walk_hash: str
    index_hash: str
    twice_by_kill: int
    twice_otherwise: int
    problems: list[str]

    @property
    def holds(self) -> bool:
        return not self.problems


def prove(
    indexed: Indexed,
    dead: Sequence[DeadMessage],
    stats: QueueStats,
    *,
    killed: int,
    extra: Path,
    limit: int | None,
) -> Proof:
    """Compare the index with the directory, and explain every file that is not in it or was handled twice."""
    problems: list[str] = []
    on_disk = _walk(limit)
    on_disk[extra.name] = extra
    unparsable = {letter.payload.name for letter in dead}
    missing = on_disk.keys() - indexed.digests.keys() - unparsable
    if missing:
        problems.append(f"neither indexed nor a dead letter: {_some(missing)}")
    unknown = (indexed.digests.keys() | unparsable) - on_disk.keys()
    if unknown:
        problems.append(f"not in the directory: {_some(unknown)}")
    if both := indexed.digests.keys() & unparsable:
        problems.append(f"indexed and a dead letter: {_some(both)}")
    if len(dead) != len(unparsable):
        problems.append("a file has two dead letters")
    if wrong := [name for name in unparsable & on_disk.keys() if _parses(on_disk[name])]:
        problems.append(f"dead letters that can be parsed: {_some(wrong)}")
    if indexed.contradictions:
        problems.append(f"indexed twice with different hashes: {_some(indexed.contradictions)}")
    if left := stats.pending + stats.delayed + stats.processing:
        problems.append(f"{left} messages are left in the queue")

    twice = indexed.twice()
    # The first line is the killed worker's, whose settlement never came; the second is the survivor's. Or it is a bug.
    by_kill = [name for name, workers in twice.items() if len(workers) == 2 and workers.count(killed) == 1]
    unexplained = twice.keys() - set(by_kill)
    if unexplained:
        problems.append(f"handled twice, and not because of the kill: {_some(unexplained)}")

    walk_hash = _combined((name, _digest(path)) for name, path in on_disk.items() if name not in unparsable)
    index_hash = _combined(indexed.digests.items())
    if walk_hash != index_hash:
        problems.append("the combined hashes differ")
    return Proof(len(on_disk), walk_hash, index_hash, len(by_kill), len(unexplained), problems)


def _walk(limit: int | None) -> dict[str, Path]:
    # Not by the function that the producer uses: a file that it overlooks would be missing on both sides.
    root = standard_library()
    found = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    names = sorted(name for name in found if not set(NOT_STANDARD) & set(name.split("/")))
    return {name: found[name] for name in names[:limit]}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _combined(digests: Iterable[tuple[str, str]]) -> str:
    return hashlib.sha256("".join(f"{name} {digest}\n" for name, digest in sorted(digests)).encode()).hexdigest()


def _parses(path: Path) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "")
