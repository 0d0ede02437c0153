"""What the library logs: nothing by itself, one line for each event of note, and what it is about."""

from __future__ import annotations

import logging
from typing import Any

import anyio
import pytest
import structlog

from s3queue_async import Context, Settings
from tests.unit.queue.bed import Bed, Seen, virtual


class Lines(logging.Handler):
    """The messages of the library's logger."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def about(self, event: str) -> list[str]:
        return [line for line in self.lines if line.startswith(f"event={event!r}")]


@pytest.fixture
def lines() -> Any:
    logger = logging.getLogger("s3queue_async")
    handler = Lines()
    logger.addHandler(handler)
    before = logger.level
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(before)


def test_one_line_each(lines: Lines) -> None:
    """Start, promotion, dead letter, demotion and stop: one line each, with the queue, the worker, and the message."""
    ids: list[str] = []

    @virtual
    async def run() -> None:
        bed = Bed()
        dead = Seen()

        async def handler(payload: int) -> None:
            raise ValueError("no")

        async with bed.queue(settings=Settings(), on_message=handler, on_error=dead) as queue:
            await anyio.sleep(10)
            ids.append(await queue.enqueue(1, max_attempts=1))
            await dead.count(1)
            ids.append(queue.worker_id or "")
            name = queue.name
            ids.append(name)

    run()
    message_id, worker_id, name = ids
    for event in ("worker started", "promoted to coordinator", "dead letter", "coordinator no more", "worker stopped"):
        (line,) = lines.about(event)
        assert f"worker={worker_id!r}" in line
        assert f"queue={name!r}" in line or f'queue="{name}"' in line
    assert f"message={message_id!r}" in lines.about("dead letter")[0]
    assert "attempt=1" in lines.about("dead letter")[0]


def test_quiet_by_default(capfd: pytest.CaptureFixture[str]) -> None:
    """Without any set-up of logging nothing is printed, whatever happens."""

    @virtual
    async def run() -> None:
        bed = Bed()
        dead = Seen()

        async def handler(payload: int) -> None:
            raise ValueError("no")

        async with bed.queue(on_message=handler, on_error=dead) as queue:
            await queue.enqueue(1, max_attempts=1)
            await dead.count(1)

    run()
    assert capfd.readouterr() == ("", "")


def test_context_of_a_handler() -> None:
    """While a handler runs, structlog's context names queue, worker, message and attempt; side by side, each its own."""

    @virtual
    async def run() -> None:
        bed = Bed()
        seen = Seen()

        async def handler(payload: int, context: Context) -> None:
            before = structlog.contextvars.get_contextvars()
            await anyio.sleep(1)
            assert structlog.contextvars.get_contextvars() == before
            seen((before, context.message_id, context.attempt, context.worker_id))
            if context.attempt == 1:
                raise ValueError("once more")

        settings = Settings(coordinator=False, backoff_base=0)
        async with bed.queue(settings=settings, on_message=handler) as queue:
            await queue.enqueue_many(range(20))
            for context, message_id, attempt, worker_id in await seen.count(40):
                assert context == {
                    "queue": queue.name,
                    "worker": worker_id,
                    "message": message_id,
                    "attempt": attempt,
                }

    run()


def test_context_ends_with_the_message() -> None:
    """After process_next the caller's own lines are not about the message any more; producing leaves no trace either."""

    @virtual
    async def run() -> None:
        bed = Bed()
        seen: list[Any] = []

        async def handler(payload: int) -> None:
            seen.append(structlog.contextvars.get_contextvars()["message"])

        async with bed.queue(on_message=handler, auto_start=False) as queue:
            message_id = await queue.enqueue(1)
            assert await queue.process_next()
            assert seen == [message_id]
            assert structlog.contextvars.get_contextvars() == {}

    run()
