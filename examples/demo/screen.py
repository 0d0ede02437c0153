"""What the demo shows: a live bar on a terminal, plain lines elsewhere, and the tables at the end."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.demo.proof import Indexed, Proof
from s3queue_async import DeadMessage

PLAIN_EVERY_S = 2.0
KINDS = {"put": "PUT", "get": "GET", "list": "LIST", "delete": "DELETE", "delete_many": "DELETE (many keys)"}


class Screen:
    """Shows how far it is."""

    def __init__(self, total: int) -> None:
        self._console = Console(highlight=False)
        if not self._console.is_terminal:
            self._console = Console(highlight=False, width=100)
        self._progress = Progress(
            TextColumn("indexed"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._total = total
        self._task = self._progress.add_task("", total=total)
        self._plain_at = 0.0

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, what: str | Table) -> None:
        self._console.print(what)

    def show(self, indexed: int, doing: str) -> None:
        self._progress.update(self._task, completed=indexed, description=doing)
        if not self._console.is_terminal and time.monotonic() - self._plain_at >= PLAIN_EVERY_S:
            self._plain_at = time.monotonic()
            self.say(f"  {indexed:,} of {self._total:,} indexed; {doing}")


@dataclass
class Figures:
    """What a run is summed up to."""

    store: str
    files: int
    killed: int
    killed_after: int
    enqueue_s: float
    handle_s: float
    enqueue_requests: Counter[str]
    worker_requests: Counter[str]
    retries: int
    worker_files: dict[int, int] = field(default_factory=dict)


def print_end(screen: Screen, figures: Figures, indexed: Indexed, dead: Sequence[DeadMessage], proof: Proof) -> None:
    """The tables at the end, and the proof."""
    title = f"{figures.files:,} files through a queue on {figures.store}"
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    files = figures.files
    table.add_row("files", f"{files:,}: {indexed.functions:,} functions, {indexed.classes:,} classes")
    for worker, count in figures.worker_files.items():
        killed = f", killed when {figures.killed_after:,} files were done" if worker == figures.killed else ""
        table.add_row(f"worker {worker}", f"indexed {count:,}{killed}")
    table.add_row("enqueued in", f"{figures.enqueue_s:.2f} s: {files / figures.enqueue_s:,.0f} messages a second")
    table.add_row("handled in", f"{figures.handle_s:.1f} s: {files / figures.handle_s:,.0f} messages a second")
    table.add_row("requests to enqueue", _requests(figures.enqueue_requests, files))
    table.add_row("requests of the workers", _requests(figures.worker_requests, files))
    table.add_row("retries", f"{figures.retries:,}")
    table.add_row("dead letters", f"{len(dead):,}")
    screen.say("")
    screen.say(table)

    letters = Table(title="Dead letters: files that cannot be parsed", title_justify="left")
    for name in ("file", "attempts", "error"):
        letters.add_column(name, overflow="fold")
    for letter in sorted(dead, key=lambda letter: letter.payload.name):
        letters.add_row(escape(letter.payload.name), str(letter.attempts), escape(letter.error))
    screen.say(letters)

    screen.say(f"The directory, walked once more: {proof.walked:,} files, {len(dead):,} of them dead letters.")
    screen.say(f"Hash of the {proof.walked - len(dead):,} others, their names and their contents:")
    screen.say(f"  on disk:      {proof.walk_hash}")
    screen.say(f"  in the index: {proof.index_hash}")
    screen.say(f"Handled twice because of the kill: {proof.twice_by_kill}; otherwise: {proof.twice_otherwise}.")
    for problem in proof.problems:
        screen.say(f"[red]wrong:[/red] {escape(problem)}")
    screen.say("[green]Every file was indexed.[/green]" if proof.holds else "[red]The proof does not hold.[/red]")


def _requests(counts: Counter[str], messages: int) -> str:
    total = counts.total()
    kinds = ", ".join(f"{counts[kind]:,} {name}" for kind, name in KINDS.items() if counts[kind])
    return f"{total:,}, {total / messages:.2f} a message ({kinds})"
