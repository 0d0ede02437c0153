"""Runs one async test on virtual time, with its queues open."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AsyncExitStack
from typing import Any

from s3queue_async.testing.clock import VirtualLoop
from s3queue_async.testing.queues import MemoryQueue, VirtualTime


def run_test(
    test: Callable[[], Coroutine[Any, Any, Any]], virtual_time: VirtualTime, queues: Iterable[MemoryQueue[Any]]
) -> None:
    """Run ``test()`` to its end, and close the queues after it.

    Args:
        test: Makes the test's coroutine.
        virtual_time: Begins with the test.
        queues: Those to have open meanwhile; the last is closed first.
    """
    __tracebackhide__ = True

    async def main() -> None:
        __tracebackhide__ = True
        async with AsyncExitStack() as stack:
            for queue in list(queues):
                await stack.enter_async_context(queue)
            virtual_time.begin()
            await test()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        runner.run(main())
