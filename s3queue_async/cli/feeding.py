"""Puts long inputs into a queue: in order, in bounded memory, and so that a second run goes on where the first ended."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import datetime
from typing import Any

import click
import msgspec

from s3queue_async.cli.exits import Exit, Failed, code_of
from s3queue_async.cli.screen import Told
from s3queue_async.engine.together import together
from s3queue_async.errors import QueueError
from s3queue_async.queue import S3Queue
from s3queue_async.storage.base import NotFound, Storage, Stored
from s3queue_async.storage.plugin import PluginStorage

NAMESPACE = "imports"
CHUNK = 5000
GROUPS_AT_ONCE = 32
RESUME_WINDOW_S = 7 * 24 * 3600.0


class Options(msgspec.Struct, frozen=True):
    """How a message is enqueued; messages of equal options travel together."""

    priority: int = 0
    delay: float | None = None
    deliver_at: datetime | None = None
    headers: tuple[tuple[str, str], ...] = ()
    max_attempts: int | None = None
    expires_in: float | None = None


class Item(msgspec.Struct, frozen=True):
    """A message to be enqueued.

    Attributes:
        line: Of the input, from 1.
        payload: What to enqueue.
        options: How.
        dedup_id: Its deduplication id; None for none.
    """

    line: int
    payload: Any
    options: Options
    dedup_id: str | None = None


class Mark(msgspec.Struct, frozen=True):
    """How far a named input was enqueued: every line up to this one is certainly in the queue."""

    lines: int
    done: bool


class Fed(msgspec.Struct, frozen=True):
    """What came of it.

    Attributes:
        enqueued: Messages that were handed over in this run and are in the queue, those that were there before included.
        skipped: Lines that an earlier run has enqueued.
        ids: Of the messages; empty unless they were asked for.
    """

    enqueued: int
    skipped: int
    ids: list[str]


class Feeder:
    """Enqueues chunk by chunk.

    Args:
        queue: Where to.
        storage: The queue's, for the mark.
        name: Names the input, so that it can be resumed; None when it cannot.
    """

    def __init__(self, queue: S3Queue[Any], storage: Storage, name: str | None) -> None:
        self._queue = queue
        self._marks = PluginStorage(storage, NAMESPACE)
        self._name = name
        self.enqueued = 0
        self.skipped = 0

    async def feed(self, batches: AsyncIterator[list[Item]], tell: Told, *, keep_ids: bool) -> Fed:
        """Enqueue everything.

        Args:
            batches: The messages, as many at a time as there are.
            tell: Told how many messages are enqueued, after each chunk.
            keep_ids: Whether the ids are wanted.

        Raises:
            Failed: The queue or the store failed, or the input did; what was enqueued before stays.
        """
        mark = await self._mark()
        ids: list[str] = []
        line = 0
        try:
            async for batch in batches:
                new = [item for item in batch if item.line > mark.lines]
                self.skipped += len(batch) - len(new)
                line = max(line, batch[-1].line if batch else 0)
                for start in range(0, len(new), CHUNK):
                    chunk = new[start : start + CHUNK]
                    got = await self._enqueue(chunk)
                    ids += got if keep_ids else ()
                    await self._set_mark(Mark(chunk[-1].line, done=False))
                    tell(self.skipped + self.enqueued)
        except (QueueError, click.ClickException, Failed) as error:
            if not self.enqueued:
                raise
            raise self._in_part(error) from error
        await self._set_mark(Mark(max(line, mark.lines), done=True))
        return Fed(self.enqueued, self.skipped, ids)

    async def _enqueue(self, chunk: Sequence[Item]) -> list[str]:
        groups: dict[tuple[Options, bool], list[int]] = {}
        for place, item in enumerate(chunk):
            groups.setdefault((item.options, item.dedup_id is not None), []).append(place)
        ids = [""] * len(chunk)

        async def enqueue(group: tuple[tuple[Options, bool], list[int]]) -> None:
            (options, deduplicated), places = group
            dedup_ids: Iterator[str] = iter([chunk[place].dedup_id or "" for place in places])
            try:
                got = await self._queue.enqueue_many(
                    [chunk[place].payload for place in places],
                    priority=options.priority,
                    delay=options.delay,
                    deliver_at=options.deliver_at,
                    headers=dict(options.headers) or None,
                    max_attempts=options.max_attempts,
                    expires_in=options.expires_in,
                    dedup_id=(lambda _: next(dedup_ids)) if deduplicated else None,
                )
            except QueueError as error:
                self.enqueued += len(getattr(error, "enqueued_ids", ()))
                raise
            self.enqueued += len(got)
            for place, message_id in zip(places, got, strict=True):
                ids[place] = message_id

        await together(groups.items(), enqueue, at_once=GROUPS_AT_ONCE)
        return ids

    def _in_part(self, error: QueueError | click.ClickException | Failed) -> Failed:
        again = (
            f"Run the same command again: --resume {self._name} goes on where this ended."
            if self._name
            else "With --resume NAME from the start, the same command could go on where it ended."
        )
        code = Exit.USAGE
        if isinstance(error, QueueError):
            code = Exit.FULL if code_of(error) is Exit.FULL else Exit.PARTLY
        return Failed(code, f"{self.enqueued:,} messages are enqueued; then: {error}", again)

    async def _mark(self) -> Mark:
        if self._name is None:
            return Mark(0, done=False)
        try:
            stored = await self._marks.get(self._name)
        except NotFound:
            return Mark(0, done=False)
        assert isinstance(stored, Stored)
        try:
            return msgspec.json.decode(stored.body, type=Mark)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise Failed(
                Exit.STORE, f"plugin/{NAMESPACE}/{self._name} cannot be read ({error}).", "Use another name."
            ) from error

    async def _set_mark(self, mark: Mark) -> None:
        if self._name is not None:
            await self._marks.put(self._name, msgspec.json.encode(mark))
