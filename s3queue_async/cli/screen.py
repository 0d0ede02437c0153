"""What the commands print: for people by default, one JSON document a line with ``--json``."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from datetime import UTC, datetime
from typing import Any, Protocol

import anyio
import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from s3queue_async.cli.exits import Exit, Failed, Unread
from s3queue_async.clock import SystemClock
from s3queue_async.queue import S3Queue

PREVIEW = 100
PLAIN_WIDTH = 180
WHOLE = ("id", "for example", "worker")
TOLD_EVERY_S = 10.0
DRAWN_EVERY_S = 0.2
_CLOCK = SystemClock()


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise Unread


class Told(Protocol):
    """What takes the count of a progress, and a note."""

    def __call__(self, done: int, note: str = "") -> None: ...


class Screen:
    """Where a command's output goes: results to stdout, everything else to stderr.

    Args:
        json: Whether results are JSON.
    """

    def __init__(self, *, json: bool) -> None:
        self.json = json
        # What goes into a file or a pipe is not folded to the width of a terminal that is not there.
        folds = sys.stdout.isatty() or "COLUMNS" in os.environ
        self.out = _Console(highlight=False, width=None if folds else PLAIN_WIDTH)
        self.errors = Console(stderr=True, highlight=False)

    def emit(self, value: Any) -> None:
        """One JSON document on a line of its own."""
        sys.stdout.buffer.write(msgspec.json.encode(value, enc_hook=str) + b"\n")
        sys.stdout.buffer.flush()

    def say(self, *parts: Any) -> None:
        """Something for people: a text without markup, or a table."""
        for part in parts:
            self.out.print(Text(part) if isinstance(part, str) else part, soft_wrap=isinstance(part, str))

    def note(self, text: str) -> None:
        """Something beside the result."""
        self.errors.print(Text(text), soft_wrap=True)

    def table(self, title: str, *columns: str, right: tuple[str, ...] = ()) -> Table:
        """A table for people."""
        table = Table(title=title or None, title_justify="left", title_style="bold", header_style="bold")
        for column in columns:
            # Ids and figures are to be copied, and so are never broken.
            whole = column in right or column in WHOLE
            table.add_column(column, justify="right" if column in right else "left", overflow="fold", no_wrap=whole)
        return table

    def confirm(self, question: str, *, yes: bool) -> None:
        """Ask before something that cannot be taken back. Raises Failed when the answer is no, or nobody can answer."""
        if yes:
            return
        if self.json or not sys.stdin.isatty():
            raise Failed(Exit.DECLINED, f"Not done: {question}", "Pass --yes to say so.")
        if not click.confirm(question, err=True):
            raise Failed(Exit.DECLINED, "Not done.")

    @contextmanager
    def progress(self, title: str, total: int | None = None) -> Iterator[Told]:
        """Show how far something is: a bar on a terminal, a line every ten seconds elsewhere."""
        if self.errors.is_terminal:
            total_columns = (BarColumn(), MofNCompleteColumn()) if total else (TextColumn("{task.completed:,}"),)
            with Progress(
                SpinnerColumn(), TextColumn("{task.description}"), *total_columns, TextColumn("{task.fields[note]}"),
                TimeElapsedColumn(), console=self.errors, transient=True,
            ) as bar:  # fmt: skip
                task = bar.add_task(title, total=total, note="")
                yield lambda done, note="": bar.update(task, completed=done, note=note)
            return
        told_at = _CLOCK.monotonic()

        def tell(done: int, note: str = "") -> None:
            nonlocal told_at
            if _CLOCK.monotonic() - told_at >= TOLD_EVERY_S:
                told_at = _CLOCK.monotonic()
                of = f" of {total:,}" if total else ""
                self.note(f"{title}: {done:,}{of}{' ' if note else ''}{note}")

        yield tell

    @asynccontextmanager
    async def waiting(self, queue: S3Queue[Any], title: str) -> AsyncIterator[None]:
        """Show that something is under way, by the requests that it has made so far."""

        async def watch() -> None:
            with self.progress(f"{title}, requests") as tell:
                while True:
                    tell(queue.requests().attempts)
                    await _CLOCK.sleep(DRAWN_EVERY_S)

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            try:
                yield
            finally:
                group.cancel_scope.cancel()


def payload_fields(payload: Any) -> dict[str, Any]:
    """A payload as JSON can say it, without loss.

    ``payload`` where JSON has it; ``payload_base64`` for bytes; ``payload_msgpack`` (msgpack in base64) for what holds
    bytes, dates or the like inside.
    """
    if isinstance(payload, bytes):
        return {"payload_base64": base64.b64encode(payload).decode()}
    if _is_json(payload):
        return {"payload": payload}
    return {"payload_msgpack": base64.b64encode(msgspec.msgpack.encode(payload)).decode()}


def payload_of(fields: Mapping[str, Any]) -> Any:
    """The payload that ``payload_fields`` made these of. Raises ValueError when there is none."""
    if "payload" in fields:
        return fields["payload"]
    if "payload_base64" in fields:
        return base64.b64decode(fields["payload_base64"], validate=True)
    if "payload_msgpack" in fields:
        return msgspec.msgpack.decode(base64.b64decode(fields["payload_msgpack"], validate=True))
    raise ValueError("there is no payload, payload_base64 or payload_msgpack")


def _is_json(value: Any) -> bool:
    if value is None or isinstance(value, bool | str):
        return True
    if isinstance(value, int):
        return -(2**63) <= value < 2**64
    if isinstance(value, float):
        return value - value == 0.0
    if isinstance(value, list):
        return all(_is_json(part) for part in value)
    return isinstance(value, dict) and all(isinstance(key, str) and _is_json(part) for key, part in value.items())


def preview(payload: Any, length: int = PREVIEW) -> str:
    """A payload in one line."""
    if isinstance(payload, bytes):
        text = f"{len(payload):,} bytes: {payload[:length]!r}"
    elif isinstance(payload, str):
        text = payload
    else:
        text = msgspec.json.encode(payload, enc_hook=str).decode() if _is_json(payload) else repr(payload)
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def fields_of(value: msgspec.Struct) -> dict[str, Any]:
    """A result's fields for JSON, its payload among them as JSON can say it."""
    fields: dict[str, Any] = {}
    for name in value.__struct_fields__:
        part = getattr(value, name)
        if name == "payload":
            fields |= payload_fields(part)
        else:
            fields[name] = repr(part) if name == "result" and not _is_json(part) else part
    return fields


def clock_time(moment: datetime | None) -> str:
    """A moment for people, in UTC."""
    return "" if moment is None else moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")


def span(seconds: float | None) -> str:
    """A duration for people."""
    if seconds is None:
        return "-"
    for limit, unit, size in ((1.0, "ms", 0.001), (120.0, "s", 1.0), (7200.0, "min", 60.0), (172800.0, "h", 3600.0)):
        if abs(seconds) < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:,.1f} d"


def number(value: float) -> str:
    """A count or a rate for people."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
