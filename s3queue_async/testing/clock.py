"""Virtual time: an event loop whose clock jumps to the next timer, so that hours of waiting take no time.

looptime (PyPI) does much the same, but it waits for ever where nothing can happen any more, which for a queue is the
finding that matters most; it idles through dozens of empty rounds before each jump, and a queue jumps ten times in each
of its seconds; and the test kit is part of the package, so it would become everybody's dependency.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, TypeVarTuple

import anyio

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

EPOCH_S = 1_700_000_000.0
START_S = 1000.0


class Stuck(RuntimeError):
    """Every task waits for something, no timer is set, and no reply of the network is outstanding."""


class _Selector(selectors.DefaultSelector):
    """Looks what is ready, and moves the time on instead of waiting."""

    loop: VirtualLoop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout != 0 and self.loop.has_threads_at_work:
            # Nobody knows what a thread will come to: as long as it works, time goes as it does outside.
            began = time.monotonic()
            ready = super().select(timeout)
            self.loop.advance(time.monotonic() - began)
            return ready
        if not ready and timeout is None:
            raise Stuck("nothing can happen any more: every task waits, and no timer is set")
        if not ready and timeout is not None and timeout > 0:
            self.loop.advance(timeout)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio event loop on virtual time. Deterministic as long as no threads and no sockets are used.

    While a thread works for the loop (an executor's, or what was given to ``watch_threads``), time goes at its real
    pace. It does not wait for sockets: a timeout on one is over at once.
    """

    _clock_resolution: float

    def __init__(self) -> None:
        self._now_s = START_S
        self._in_executors = 0
        self._threads: list[Callable[[], bool]] = []
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """Virtual seconds; timers of asyncio and anyio go by them."""
        return self._now_s

    def advance(self, seconds: float) -> None:
        """Move the time on while nothing else runs, as code does that blocks the event loop."""
        self._now_s += seconds
        # A timer goes off less than this before its time. After some months a nanosecond is less than the difference of
        # two neighbouring floats, and none would go off any more.
        self._clock_resolution = max(self._clock_resolution, 2 * math.ulp(self._now_s))

    @property
    def has_threads_at_work(self) -> bool:
        """Whether a thread is at work whose end the loop waits for."""
        return self._in_executors > 0 or any(at_work() for at_work in self._threads)

    def watch_threads(self, at_work: Callable[[], bool]) -> Callable[[], None]:
        """Ask this, too, whether threads are at work; returns a function that ends it."""
        self._threads.append(at_work)
        return lambda: self._threads.remove(at_work)

    def run_in_executor(self, executor: Executor | None, func: Callable[[*Ts], T], *args: *Ts) -> asyncio.Future[T]:
        """Run a function in a thread; see asyncio's."""
        future = super().run_in_executor(executor, func, *args)
        self._in_executors += 1
        future.add_done_callback(self._out_of_executor)
        return future

    async def shutdown_default_executor(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the threads of the default executor; see asyncio's."""
        self._in_executors += 1
        try:
            await super().shutdown_default_executor(*args, **kwargs)
        finally:
            self._in_executors -= 1

    def _out_of_executor(self, _: object) -> None:
        self._in_executors -= 1


class LoopClock:
    """Local time is the running loop's; give it to a queue as ``clock=``.

    Args:
        offset_s: How far this clock is ahead of the loop's.
    """

    def __init__(self, offset_s: float = 0.0) -> None:
        self.offset_s = offset_s

    def monotonic(self) -> float:
        """Seconds since some moment."""
        return asyncio.get_running_loop().time() + self.offset_s

    async def sleep(self, seconds: float) -> None:
        """Return after that many seconds."""
        await anyio.sleep(max(0.0, seconds))


def store_now() -> float:
    """A store's wall clock on the running loop's time; give it to MemoryStorage as ``now=``."""
    return EPOCH_S + asyncio.get_running_loop().time()


def advance(seconds: float) -> None:
    """Block the running virtual loop for that long."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    loop.advance(seconds)


def run_virtual(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run ``main()`` on virtual time; its failure, and any task that it leaves behind, fails the call.

    Raises:
        AssertionError: A task was left.
        Stuck: Nothing could happen any more.
    """

    async def checked() -> T:
        result = await main()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks are left: {left}"
        return result

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(checked())
