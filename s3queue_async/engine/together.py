"""Does the same with many things at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import anyio

T = TypeVar("T")


async def together(items: Iterable[T], do: Callable[[T], Awaitable[None]], *, at_once: int) -> None:
    """Await ``do`` for each item, so many at a time.

    Raises:
        Exception: The first failure as it is, not in a group; the others are cancelled.
    """
    failures: list[Exception] = []
    waiting = iter(items)

    async def run() -> None:
        for item in waiting:
            try:
                await do(item)
            except Exception as error:  # noqa: BLE001 - raised again below, for the caller who knows what to expect
                failures.append(error)
                group.cancel_scope.cancel()
                return

    async with anyio.create_task_group() as group:
        for _ in range(at_once):
            group.start_soon(run)
    if failures:
        raise failures[0]
