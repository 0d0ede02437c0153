"""The pytest plugin: its fixtures under each plugin that runs async tests, and that it costs nobody anything."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

# By its module's name, so that it is found whether or not the package's entry points are installed.
PLUGIN = ("-p", "pytest_s3queue", "-p", "no:cacheprovider", "-W", "error")
OTHERS = {
    "alone": ("-p", "no:asyncio", "-p", "no:anyio"),
    "asyncio-strict": ("-o", "asyncio_mode=strict", "-o", "asyncio_default_fixture_loop_scope=function"),
    "asyncio-auto": ("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"),
    "anyio-auto": ("-p", "no:asyncio", "-o", "anyio_mode=auto"),
}

FIXTURES = """
    import asyncio
    import time
    from datetime import timedelta

    import pytest
    from s3queue_async import Settings, StoreUnavailable
    from s3queue_async.testing import VirtualLoop


    @pytest.fixture
    def handled():
        return []


    @pytest.fixture
    def strict(s3queue_factory, handled):
        return s3queue_factory(settings=Settings(max_attempts=1), on_message=handled.append)


    async def test_open(s3queue, s3queue_time):
        assert isinstance(asyncio.get_running_loop(), VirtualLoop)
        began = time.monotonic()

        @s3queue.handler
        async def handle(payload):
            await asyncio.sleep(3600)

        await s3queue.enqueue("x", delay=timedelta(days=1))
        assert (await s3queue.run_until_idle()).completed == 1
        assert s3queue_time.elapsed > 86400 + 3600
        assert time.monotonic() - began < 60


    async def test_fixtures_on_the_factory(strict, handled):
        await strict.enqueue(1)
        await strict.run_until_idle()
        assert handled == [1]
        assert strict.settings.max_attempts == 1


    async def test_one_store(s3queue, strict, s3queue_factory, s3queue_store, handled):
        assert s3queue.store is strict.store is s3queue_store
        await s3queue.enqueue("x")
        await strict.run_until_idle()
        assert handled == ["x"]
        async with s3queue_factory() as third:
            assert third.store is s3queue_store
            await third.enqueue("y")
        s3queue_store.unavailable("put", retriable=False)
        with pytest.raises(StoreUnavailable):
            await s3queue.enqueue("z")


    async def test_time(s3queue_time):
        began = s3queue_time.now()
        await s3queue_time.advance(timedelta(days=365))
        await asyncio.sleep(5)
        assert s3queue_time.elapsed == 365 * 86400 + 5
        assert s3queue_time.now() - began >= timedelta(days=365)


    class TestMethods:
        @pytest.mark.parametrize("number", [1, 2])
        async def test_method(self, s3queue, number):
            assert isinstance(self, TestMethods)
            await s3queue.enqueue(number)
            s3queue.assert_enqueued(payload=number)


    def test_sync(s3queue):
        assert s3queue.enqueued == []
"""


@pytest.mark.parametrize("others", OTHERS)
def test_fixtures(pytester: pytest.Pytester, others: str) -> None:
    """They work with no other plugin, and with each of the others, whatever its mode."""
    pytester.makepyfile(FIXTURES)
    pytester.runpytest_inprocess(*PLUGIN, *OTHERS[others]).assert_outcomes(passed=7)


def test_marked_tests_and_async_fixtures(pytester: pytest.Pytester) -> None:
    """pytest-asyncio's mark changes nothing, its fixtures are there, and its own tests stay on its own loop."""
    pytester.makepyfile("""
        import asyncio

        import pytest
        import pytest_asyncio
        from s3queue_async.testing import VirtualLoop


        @pytest_asyncio.fixture
        async def fake():
            await asyncio.sleep(0)
            yield "fake"
            await asyncio.sleep(0)


        @pytest.mark.asyncio
        async def test_ours(s3queue, fake):
            assert isinstance(asyncio.get_running_loop(), VirtualLoop)
            await s3queue.enqueue(fake)


        @pytest.mark.asyncio
        async def test_theirs(fake):
            assert not isinstance(asyncio.get_running_loop(), VirtualLoop)
    """)
    pytester.runpytest_inprocess(*PLUGIN, *OTHERS["asyncio-strict"]).assert_outcomes(passed=2)


def test_the_pages_tests(pytester: pytest.Pytester) -> None:
    """The tests in docs/testing_your_handlers.md pass."""
    page = (Path(__file__).parents[3] / "docs" / "testing_your_handlers.md").read_text(encoding="utf-8")
    programs = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    pytester.makepyfile("\n".join(programs))
    pytester.runpytest_inprocess(*PLUGIN, *OTHERS["alone"]).assert_outcomes(passed=3)


def test_failures_point_at_the_test(pytester: pytest.Pytester) -> None:
    """A failed assertion shows the test's own line and what is different, and none of the plugin's frames."""
    pytester.makepyfile("""
        async def test_it(s3queue):
            await s3queue.enqueue({"to": "b"}, priority=1)
            s3queue.assert_enqueued(payload={"to": "a"}, priority=1)
    """)
    result = pytester.runpytest_inprocess(*PLUGIN, *OTHERS["asyncio-auto"])
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            ">       s3queue.assert_enqueued(*",
            "E       AssertionError: No message was enqueued with",
            "E         payload = {'to': 'a'}",
            "E           payload['to']: 'b', expected 'a'",
            "test_failures_point_at_the_test.py:3: AssertionError",
        ]
    )
    result.stdout.no_fnmatch_line("*pytest_s3queue.py:*")
    result.stdout.no_fnmatch_line("*runner.py:*")


def test_stuck_tests_fail(pytester: pytest.Pytester) -> None:
    """A test without an open queue that waits for what nobody will do fails at once instead of hanging."""
    pytester.makepyfile("""
        import asyncio


        async def test_it(s3queue_time):
            await asyncio.Event().wait()
    """)
    result = pytester.runpytest_inprocess(*PLUGIN, *OTHERS["alone"])
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["E*Stuck: nothing can happen any more*"])


@pytest.mark.integration
def test_runs_that_do_not_use_it(pytester: pytest.Pytester) -> None:
    """Without a fixture of its own nothing of the library is imported, pytest warns of nothing, and all is as usual."""
    pytester.makepyfile("""
        import sys

        def test_it(pytestconfig):
            assert pytestconfig.pluginmanager.has_plugin("pytest_s3queue")
            assert not [name for name in sys.modules if name.partition(".")[0] in ("s3queue_async", "msgspec", "structlog")]
    """)
    result = pytester.runpytest_subprocess(*PLUGIN, *OTHERS["alone"])
    result.assert_outcomes(passed=1)


@pytest.mark.integration
def test_coverage(pytester: pytest.Pytester) -> None:
    """The package is imported after coverage began: lines that run at its import are measured, and nothing is warned of."""
    pytester.makepyfile("""
        async def test_it(s3queue):
            await s3queue.enqueue(1)
    """)
    result = pytester.runpytest_subprocess(
        *PLUGIN, *OTHERS["alone"], "--cov=s3queue_async", "--cov-report=json:cover.json"
    )
    result.assert_outcomes(passed=1)
    result.stdout.no_fnmatch_line("*previously imported*")
    files = json.loads((pytester.path / "cover.json").read_text())["files"]
    (enqueued,) = (found for name, found in files.items() if name.endswith("testing/enqueued.py"))
    assert 1 in enqueued["executed_lines"] or 3 in enqueued["executed_lines"]
