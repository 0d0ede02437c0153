"""The pytest plugin of s3queue_async: fixtures for the tests of handlers; see docs/testing_your_handlers.md.

It is a module beside the package, as Hypothesis' plugin is, because pytest imports it in every run: the package would
take a quarter of a second each time, and be imported before coverage begins to measure.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from s3queue_async.testing import FaultyMemory, MemoryQueue, VirtualTime

_VIRTUAL = "s3queue_time"


class _Bench:
    """What one test has: its time, its store, and the queues that were made for it before it began."""

    def __init__(self) -> None:
        from s3queue_async.testing import FaultyMemory, VirtualTime

        self.time: VirtualTime = VirtualTime()
        self.store: FaultyMemory = FaultyMemory(now=self.time.store_now_s)
        self.queues: list[MemoryQueue[Any]] = []

    def make(self, **options: Any) -> MemoryQueue[Any]:
        from s3queue_async.testing import MemoryQueue

        queue: MemoryQueue[Any] = MemoryQueue(**{"store": self.store, **options})
        self.queues.append(queue)
        return queue


@pytest.fixture
def _s3queue_bench() -> _Bench:
    return _Bench()


@pytest.fixture
def s3queue_time(_s3queue_bench: _Bench) -> VirtualTime:
    """Virtual time: an async test that has this fixture, or one of the others, waits for nothing."""
    return _s3queue_bench.time


@pytest.fixture
def s3queue_store(s3queue_time: VirtualTime, _s3queue_bench: _Bench) -> FaultyMemory:
    """The store in memory that this test's queues are on; it fails when told to."""
    return _s3queue_bench.store


@pytest.fixture
def s3queue_factory(s3queue_store: FaultyMemory, _s3queue_bench: _Bench) -> Callable[..., MemoryQueue[Any]]:
    """Makes queues in memory; it takes what MemoryQueue takes.

    All of a test's queues are on one store, unless they are given another. What is made before the test begins, in
    fixtures, is open in the test; what the test makes, it opens itself with ``async with``.
    """
    return _s3queue_bench.make


@pytest.fixture
def s3queue(s3queue_factory: Callable[..., MemoryQueue[Any]]) -> MemoryQueue[Any]:
    """A queue in memory, open while an async test runs."""
    return s3queue_factory()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Run async tests on virtual time that ask for it, whichever plugin runs the others."""
    __tracebackhide__ = True
    if _VIRTUAL not in pyfuncitem.fixturenames:
        return (yield)
    original = pyfuncitem.obj
    # pytest-asyncio has put a sync function around it by now.
    test = inspect.unwrap(original, stop=inspect.iscoroutinefunction)
    if not inspect.iscoroutinefunction(test):
        return (yield)
    bench = pyfuncitem.funcargs["_s3queue_bench"]
    assert isinstance(bench, _Bench)

    def run(**arguments: Any) -> None:
        __tracebackhide__ = True
        from s3queue_async.testing.runner import run_test

        run_test(lambda: test(**arguments), bench.time, bench.queues)

    pyfuncitem.obj = run
    try:
        return (yield)
    finally:
        pyfuncitem.obj = original
