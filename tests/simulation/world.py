"""The world of a simulation: virtual time, seeded scheduling, processes that crash and pause, clocks that drift.

One loop runs every process of a cluster. Each callback belongs to the process whose context it carries; those of a
crashed process never run again (not even their clean-up), those of a paused one wait until it is resumed. Ready
callbacks run in an order drawn from the seed.

looptime and aiotools give virtual time but neither scheduling from a seed nor processes; simloop patches asyncio's
internals more deeply than the thirty lines below.
"""

from __future__ import annotations

import asyncio
import contextvars
import heapq
import itertools
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any

import anyio
from anyio._backends import _asyncio as anyio_asyncio

from s3queue_async.testing.clock import Stuck

EPOCH_S = 1_700_000_000.0

PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


class _Task(asyncio.Task[Any]):
    """A task whose place in a set does not depend on its address, so that a seed replays."""

    _numbers = itertools.count()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._number = next(self._numbers)
        super().__init__(*args, **kwargs)

    def __hash__(self) -> int:
        return self._number


class World(asyncio.SelectorEventLoop):
    """The loop of a simulated cluster."""

    def __init__(self, seed: int) -> None:
        self.rng = Random(f"world {seed}")
        self._virtual_s = 1000.0
        super().__init__()
        _Task._numbers = itertools.count()
        self.set_task_factory(lambda loop, coro, **kwargs: _Task(coro, loop=loop, **kwargs))
        self.trace: list[str] = []
        self.graveyard: list[Any] = []
        self.outside = contextvars.copy_context()

    def time(self) -> float:
        return self._virtual_s

    def note(self, text: str) -> None:
        """Add a line to the trace."""
        self.trace.append(f"{self._virtual_s - 1000.0:10.4f} {text}")

    def later(self, delay_s: float, call: Callable[[], None]) -> None:
        """Have the world itself do something after a while, whatever becomes of the caller."""
        self.call_later(max(0.0, delay_s), call, context=self.outside)

    def _run_once(self) -> None:
        ready = self._due()
        if len(ready) == 1:
            handle = ready.popleft()
            if self._may_run(handle):
                handle._run()
            return
        runnable = list(ready)
        ready.clear()
        self.rng.shuffle(runnable)
        for handle in runnable:
            # One that ran before may have cancelled this one, or ended or paused its process.
            if self._may_run(handle):
                handle._run()

    def _due(self) -> Any:
        """Everything that is ready now; the time goes on to the next timer when nothing else is."""
        ready: Any = self._ready  # type: ignore[attr-defined] # what makes a seeded order possible
        scheduled: list[asyncio.TimerHandle] = self._scheduled  # type: ignore[attr-defined]
        while scheduled and scheduled[0].cancelled():
            heapq.heappop(scheduled)._scheduled = False  # type: ignore[attr-defined]
        if not ready and not self._stopping:  # type: ignore[attr-defined]
            if not scheduled:
                raise Stuck("nothing can happen any more: every task waits, and no timer is set")
            self._virtual_s = max(self._virtual_s, scheduled[0].when())
        while scheduled and scheduled[0].when() <= self._virtual_s:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False  # type: ignore[attr-defined]
            ready.append(handle)
        return ready

    def _may_run(self, handle: Any) -> bool:
        """Whether a callback runs now; those of a paused process are kept for later, those of a dead one for ever."""
        if handle._cancelled:
            return False
        process = handle._context.get(PROCESS)
        if process is None or (process.alive and not process.paused):
            return True
        (process.held_back if process.alive else self.graveyard).append(handle)
        return False


class Process:
    """One process of the cluster: crashes, pauses, and keeps its own time."""

    def __init__(self, world: World, name: str, *, drift: float = 0.0) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.paused = False
        self.cut_off = False
        self.suspended_at: float | None = None
        self.slept_s = 0.0
        self.held_back: list[Any] = []
        self.drift = drift
        self.offset_s = 0.0
        self.tasks: list[asyncio.Task[Any]] = []
        self.stop = anyio.Event()
        self.deaf = False

    def __repr__(self) -> str:
        return self.name

    @property
    def runs(self) -> bool:
        return self.alive and not self.paused

    def start(self, main: Callable[[], Coroutine[Any, Any, None]]) -> asyncio.Task[Any]:
        """Run ``main`` as this process."""
        context = self.world.outside.copy()
        context.run(PROCESS.set, self)
        task = self.world.create_task(main(), context=context)
        self.tasks.append(task)
        return task

    def crash(self) -> None:
        """End at this very moment: no task of it runs again."""
        if self.alive:
            self.alive = False
            self.world.note(f"{self} crashes")
            self.held_back.clear()

    def pause(self, *, clock_stands: bool = False) -> None:
        """Stand still, as after SIGSTOP; or with the clock, as a machine that was suspended."""
        if not self.paused:
            self.paused = True
            self.suspended_at = self.world.time() if clock_stands else None
            self.world.note(f"{self} is {'suspended' if clock_stands else 'paused'}")

    def resume(self) -> None:
        if self.paused:
            self.paused = False
            if self.suspended_at is not None:
                slept_s = self.world.time() - self.suspended_at
                self.slept_s += slept_s
                self.offset_s -= slept_s * (1 + self.drift)
                self.suspended_at = None
            self.world.note(f"{self} is resumed")
            if self.alive:
                held, self.held_back = self.held_back, []
                self.world._ready.extend(held)  # type: ignore[attr-defined]


class ProcessClock:
    """A process's monotonic clock: drifts, and may jump ahead."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def monotonic(self) -> float:
        process = self._process
        return process.world.time() * (1 + process.drift) + process.offset_s

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(max(0.0, seconds) / (1 + self._process.drift))


class _ScopeNumbers:
    """Hashes for anyio's cancel scopes that replay: they are kept in sets, in the order of which they are cancelled."""

    def __init__(self) -> None:
        self.next = 0
        self.by_address: dict[int, int] = {}

    def install(self) -> None:
        kind = anyio_asyncio.CancelScope
        original = kind.__new__

        def make(cls: Any, *args: Any, **kwargs: Any) -> Any:
            scope = original(cls)
            self.next += 1
            self.by_address[id(scope)] = self.next
            return scope

        kind.__new__ = staticmethod(make)  # type: ignore[method-assign]
        kind.__hash__ = lambda scope: self.by_address.get(id(scope), 0)  # type: ignore[method-assign, assignment]


_scope_numbers = _ScopeNumbers()


def deterministic_scopes() -> None:
    """Begin the numbering of cancel scopes anew; the first call makes them numbered."""
    if not _scope_numbers.next:
        _scope_numbers.install()
    _scope_numbers.next = 1
