"""A worker process of the demo: indexes files until SIGTERM, or until it is killed."""

from __future__ import annotations

import ast
import asyncio
import hashlib
import os
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from examples.demo.files import SourceFile
from s3queue_async import Context, S3Queue, Settings
from s3queue_async.events import MessageRetry
from s3queue_async.storage.metered import OPERATIONS, StorageMetrics

SETTINGS = Settings(
    # A killed worker's messages are free again after 5.5 s, where the default is 32 s.
    visibility_timeout=5,
    heartbeat_interval=1,
    # Progress is written down twice a second, so that a kill costs little work.
    checkpoint_interval=0.5,
    # A file takes milliseconds, so 32 of them are enough to keep requests rare.
    segment_messages_max=32,
    poll_interval=0.05,
    max_poll_interval=0.5,
    backoff_base=0.2,
)
CONCURRENCY = 4
REPORT_EVERY_S = 0.2


class Report:
    """A worker's own file of JSON lines; each is on the disk before the message counts as handled."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._lock = threading.Lock()

    def write(self, **line: Any) -> None:
        with self._lock:
            os.write(self._file, msgspec.json.encode(line) + b"\n")
            os.fsync(self._file)


class ReportReader:
    """Reads what a worker has written since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def lines(self) -> Iterator[dict[str, Any]]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            # The last line of a worker that is killed may be a half one: it was not fsync'ed, so it does not count.
            *whole, _ = file.read().split(b"\n")
        for line in whole:
            self._offset += len(line) + 1
            yield msgspec.json.decode(line)


def request_counts(metrics: StorageMetrics) -> Mapping[str, int]:
    return {operation: getattr(metrics, operation).attempts for operation in OPERATIONS}


def definitions(tree: ast.Module) -> tuple[int, int]:
    """How many functions and classes a module defines, at any depth."""
    functions = classes = 0
    left: list[ast.AST] = [tree]
    while left:
        node = left.pop()
        functions += isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        classes += isinstance(node, ast.ClassDef)
        # Definitions are statements, so expressions need no look: ast.walk, which looks, takes ten times as long.
        for block in ("body", "orelse", "handlers", "finalbody", "cases"):
            left += getattr(node, block, ())
    return functions, classes


async def work(url: str, report_path: Path) -> None:
    """Index files until SIGTERM."""
    # Old test files contain escapes that Python warns of.
    warnings.simplefilter("ignore")
    report = Report(report_path)

    # A plain function: the queue runs it in a thread. It does not handle its errors: the queue does.
    def index(source: SourceFile, context: Context) -> None:
        body = Path(source.path).read_bytes()
        functions, classes = definitions(ast.parse(body, source.name))
        report.write(
            indexed=source.name,
            sha256=hashlib.sha256(body).hexdigest(),
            functions=functions,
            classes=classes,
            attempt=context.attempt,
        )

    queue = S3Queue(url, payload_type=SourceFile, settings=SETTINGS, on_message=index, concurrency=CONCURRENCY)

    def on_retry(event: MessageRetry) -> None:
        report.write(retried=event.message_id)

    queue.on("message.retry", on_retry)

    async def report_requests() -> None:
        while True:
            await asyncio.sleep(REPORT_EVERY_S)
            report.write(requests=request_counts(queue.requests()))

    async with asyncio.TaskGroup() as group:
        reporting = group.create_task(report_requests())
        async with queue:
            await queue.run()
        reporting.cancel()
    report.write(requests=request_counts(queue.requests()))
