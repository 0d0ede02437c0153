"""The dead letters of a queue: list, count by error, redrive, purge."""

from __future__ import annotations

import builtins
import re
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager

from s3queue_async.engine.browser import Browser
from s3queue_async.engine.inspector import Inspector
from s3queue_async.engine.redriving import move_dead
from s3queue_async.engine.session import Session
from s3queue_async.errors import InvalidSettings, Unreadable
from s3queue_async.looks import ErrorCount, MessageInfo
from s3queue_async.message import DeadMessage
from s3queue_async.protocol import layout
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.settings import whole_number

LIST_LIMIT_DEFAULT = 100
LIST_LIMIT_MAX = 100_000
KINDS_MAX = 1000
OTHERS = "(others)"

Where = Callable[[DeadMessage], bool]
Progress = Callable[[int], None]

_VARYING = (
    (re.compile(r"'[^']*'|\"[^\"]*\""), "'…'"),
    (
        re.compile(
            r"\b0x[0-9a-fA-F]+\b|\b[0-9a-fA-F]{8}-[0-9a-fA-F-]{27}\b|\b[0-9A-HJKMNP-TV-Z]{26}(?:-[0-9a-f]{6,})?\b"
        ),
        "…",
    ),
    (re.compile(r"\d+(?:[.,]\d+)*"), "N"),
)


class DeadLetters:
    """The queue's dead letters."""

    def __init__(
        self, inspector: Inspector, browser: Browser, working: Callable[[], AbstractAsyncContextManager[Session]]
    ) -> None:
        self._inspector = inspector
        self._browser = browser
        self._working = working

    async def list(self, *, limit: int = LIST_LIMIT_DEFAULT) -> list[DeadMessage]:
        """Up to ``limit`` dead letters, those that died first before the others.

        Raises:
            Unreadable: None can be read here: they are encrypted with a key that this process does not have, say. Where
                some can be, the others are logged.
        """
        return await self._inspector.dead_letters(whole_number("limit", limit, 1, LIST_LIMIT_MAX))

    async def each(self) -> AsyncIterator[DeadMessage]:
        """Every dead letter, those that died first before the others, however many there are; raises as ``list``."""
        async for info in self._browser.browse([Place.DEAD]):
            yield _dead(info)

    async def summary(
        self, *, where: Where | None = None, on_progress: Progress | None = None
    ) -> builtins.list[ErrorCount]:
        """How many dead letters died of what, the most frequent first.

        Errors count as one when they differ in numbers, ids and quoted text only. Beyond 1,000 kinds the rest is one.

        Args:
            where: Which dead letters to count; None for all.
            on_progress: Told now and then how many were looked at.
        """
        kinds: dict[str, ErrorCount] = {}
        looked_at = 0
        async for letter in self.each():
            looked_at += 1
            if on_progress is not None and looked_at % 1000 == 0:
                on_progress(looked_at)
            if where is not None and not where(letter):
                continue
            kind = error_kind(letter.error)
            if kind not in kinds and len(kinds) >= KINDS_MAX:
                kind = OTHERS
            before = kinds.get(kind)
            kinds[kind] = ErrorCount(
                error=kind,
                count=1 if before is None else before.count + 1,
                first=letter.died_at if before is None else min(before.first, letter.died_at),
                last=letter.died_at if before is None else max(before.last, letter.died_at),
                example=letter.id if before is None else before.example,
            )
        return sorted(kinds.values(), key=lambda kind: (-kind.count, kind.error))

    async def redrive(
        self, ids: Iterable[str] | None = None, *, where: Where | None = None, on_progress: Progress | None = None
    ) -> int:
        """Make dead letters ready again, with all their attempts before them.

        Args:
            ids: Which; None for all.
            where: Which of these; it sees each of them first. None for all of them.
            on_progress: Told after each segment how many were redriven so far.

        Returns:
            How many were redriven.

        Raises:
            Unreadable: Some cannot be read here; all others are redriven nevertheless.
        """
        return await self._move(ids, where, on_progress, redrive=True)

    async def purge(
        self, ids: Iterable[str] | None = None, *, where: Where | None = None, on_progress: Progress | None = None
    ) -> int:
        """Delete dead letters (``ids`` None: all); returns how many. The arguments are those of ``redrive``."""
        if ids is None and where is None:
            return await self._inspector.purge(layout.DEAD, on_progress=on_progress)
        return await self._move(ids, where, on_progress, redrive=False)

    async def _move(
        self, ids: Iterable[str] | None, where: Where | None, on_progress: Progress | None, *, redrive: bool
    ) -> int:
        if isinstance(ids, str):
            raise InvalidSettings(f"ids must be a list of ids, not the text {ids!r}.", suggestion=f"Pass [{ids!r}].")
        wanted = None if ids is None else frozenset(ids)
        async with self._working() as session:
            keys = [key async for key in self._inspector.dead_keys()]
            count = 0
            unread: Unreadable | None = None
            for key in keys:
                if wanted is not None and count >= len(wanted):
                    break
                try:
                    chosen = await self._chosen(key, wanted, where)
                    if chosen is None or chosen:
                        count += await move_dead(session, key, chosen, redrive=redrive)
                except Unreadable as error:
                    unread = unread or error
                if on_progress is not None:
                    on_progress(count)
        if unread is not None and (wanted is None or count < len(wanted)):
            unread.add_note(f"{count} dead letters that could be read were dealt with.")
            raise unread
        return count

    async def _chosen(
        self, key: SegmentKey, wanted: frozenset[str] | None, where: Where | None
    ) -> frozenset[str] | None:
        """Which of a segment to move; None for all of it."""
        if wanted is None and where is None:
            return None
        # A look is one request; claiming a segment in vain is four.
        infos = await self._browser.segment(key)
        return frozenset(
            info.id for info in infos if (wanted is None or info.id in wanted) and (where is None or where(_dead(info)))
        )


def error_kind(error: str) -> str:
    """An error's line without what differs from one message to the next: numbers, ids, quoted text."""
    for pattern, instead in _VARYING:
        error = pattern.sub(instead, error)
    return error


def _dead(info: MessageInfo) -> DeadMessage:
    return DeadMessage(
        id=info.id,
        payload=info.payload,
        error=info.error,
        traceback=info.traceback,
        attempts=info.attempts,
        enqueued_at=info.enqueued_at,
        died_at=info.enqueued_at if info.failed_at is None else info.failed_at,
        headers=info.headers,
        priority=info.priority,
    )
