"""The dead letters of a queue: list, redrive, purge."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager

from s3queue_async.engine.inspector import Inspector, move_dead
from s3queue_async.engine.session import Session
from s3queue_async.errors import InvalidSettings, Unreadable
from s3queue_async.message import DeadMessage
from s3queue_async.protocol import layout
from s3queue_async.settings import whole_number

LIST_LIMIT_DEFAULT = 100
LIST_LIMIT_MAX = 100_000


class DeadLetters:
    """The queue's dead letters."""

    def __init__(self, inspector: Inspector, working: Callable[[], AbstractAsyncContextManager[Session]]) -> None:
        self._inspector = inspector
        self._working = working

    async def list(self, *, limit: int = LIST_LIMIT_DEFAULT) -> list[DeadMessage]:
        """Up to ``limit`` dead letters, those that died first before the others.

        Raises:
            Unreadable: None can be read here: they are encrypted with a key that this process does not have, say. Where
                some can be, the others are logged.
        """
        return await self._inspector.dead_letters(whole_number("limit", limit, 1, LIST_LIMIT_MAX))

    async def redrive(self, ids: Iterable[str] | None = None) -> int:
        """Make dead letters ready again, with all their attempts before them.

        Args:
            ids: Which; None for all.

        Returns:
            How many were redriven.

        Raises:
            Unreadable: Some cannot be read here; all others are redriven nevertheless.
        """
        return await self._move(ids, redrive=True)

    async def purge(self, ids: Iterable[str] | None = None) -> int:
        """Delete dead letters (``ids`` None: all); returns how many."""
        if ids is None:
            return await self._inspector.purge(layout.DEAD)
        return await self._move(ids, redrive=False)

    async def _move(self, ids: Iterable[str] | None, *, redrive: bool) -> int:
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
                    count += await move_dead(session, key, wanted, redrive=redrive)
                except Unreadable as error:
                    unread = unread or error
        if unread is not None and (wanted is None or count < len(wanted)):
            unread.add_note(f"{count} dead letters that could be read were dealt with.")
            raise unread
        return count
