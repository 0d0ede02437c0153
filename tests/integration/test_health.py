"""The HTTP endpoint, asked over a real connection: what it answers, when, and that nothing of it is left."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry, Gauge
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics_families
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from s3queue_async import S3Queue, Settings
from s3queue_async.health import HealthServer, serve_health
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.testing.faults import FaultyStorage

pytestmark = pytest.mark.integration

SETTINGS = Settings(coordinator=False, metrics_interval=0.1)


class Recorded:
    """Events of a queue by name, to be waited for."""

    def __init__(self, queue: S3Queue[Any], name: str) -> None:
        self._seen = asyncio.Event()
        queue.on(name, lambda event: self._seen.set())

    async def once(self) -> None:
        """Return once the next one has come."""
        self._seen.clear()
        async with asyncio.timeout(30):
            await self._seen.wait()


@asynccontextmanager
async def served(queue: S3Queue[Any], **options: Any) -> AsyncIterator[tuple[HealthServer, httpx.AsyncClient]]:
    async with (
        serve_health(queue, port=0, **options) as server,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as client,
    ):
        yield server, client


async def nothing(payload: object) -> None: ...


async def test_live_and_ready() -> None:
    """A worker that is registered and has looked for work is live and ready."""
    async with S3Queue("memory://", settings=SETTINGS) as queue, served(queue) as (_, client):
        started = Recorded(queue, "workers.started")
        queue.handler(nothing)
        await started.once()
        for path, status in (("/livez", "live"), ("/readyz", "ready")):
            while (answer := await client.get(path)).status_code != 200:
                assert answer.json()["reason"] == "the worker has not looked for work yet"
            assert answer.json() == {"status": status}


async def test_before_the_queue_is_open() -> None:
    """An endpoint around the queue's block answers from the start: live, and not ready yet, and why."""
    queue: S3Queue[Any] = S3Queue("memory://", settings=SETTINGS)
    async with served(queue) as (_, client):
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()) == (503, {"status": "not ready", "reason": "the queue is not open"})
        assert (await client.get("/livez")).status_code == 200
        async with queue:
            assert (await client.get("/readyz")).json() == {"status": "ready"}
        assert (await client.get("/readyz")).status_code == 503


async def test_before_the_worker_is_registered() -> None:
    """While the registration waits for the store, the worker is not ready; after it, it is."""
    faults = FaultyStorage(MemoryStorage(None))
    async with S3Queue(storage=faults, settings=SETTINGS) as queue, served(queue) as (_, client):
        gate = faults.hold("put", key="plugin/workers/*")
        started = Recorded(queue, "workers.started")
        queue.handler(nothing)
        answer = await client.get("/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "the worker is not registered yet")
        gate.open()
        await started.once()
        while (answer := await client.get("/readyz")).status_code != 200:
            assert answer.json()["reason"] == "the worker has not looked for work yet"


async def test_while_it_drains() -> None:
    """A queue that drains is live and not ready, so that it gets no more traffic and is not killed."""
    began, release = asyncio.Event(), asyncio.Event()

    async def handler(payload: object) -> None:
        began.set()
        await release.wait()

    async with S3Queue("memory://", settings=SETTINGS, on_message=handler) as queue, served(queue) as (_, client):
        await queue.enqueue(1)
        async with asyncio.timeout(30):
            await began.wait()
        async with asyncio.TaskGroup() as group:
            draining = group.create_task(queue.drain())
            while (answer := await client.get("/readyz")).status_code == 200:
                assert not draining.done()
            assert answer.json() == {"status": "not ready", "reason": "the queue drains"}
            assert (await client.get("/livez")).status_code == 200
            release.set()


async def test_a_claim_loop_that_stands_still() -> None:
    """A worker whose clock moves on while its claim loop does not is not live, and the answer says for how long."""

    class Ahead:
        def __init__(self) -> None:
            self.by = 0.0

        def monotonic(self) -> float:
            return asyncio.get_running_loop().time() + self.by

        async def sleep(self, seconds: float) -> None:
            await asyncio.sleep(max(0.0, seconds))

    clock = Ahead()
    faults = FaultyStorage(MemoryStorage(None))
    # A lease so long that the worker is not lost over it.
    settings = Settings(coordinator=False, visibility_timeout=7200)
    queue: S3Queue[Any] = S3Queue(storage=faults, settings=settings, clock=clock)
    async with queue, served(queue) as (_, client):
        gate = faults.hold("list", key="ready/*")
        queue.handler(nothing)
        async with asyncio.timeout(30):
            await gate.reached.wait()
        clock.by = 3600.0
        answer = await client.get("/livez")
        assert answer.status_code == 503
        assert answer.json()["status"] == "not live"
        assert answer.json()["reason"].startswith("the claim loop has not moved for 36")
        clock.by = 0.0
        gate.open()


async def test_metrics() -> None:
    """The first scrape begins the counting; later ones have the figures, in both formats of Prometheus."""
    done: asyncio.Queue[Any] = asyncio.Queue()
    queue: S3Queue[Any] = S3Queue("memory://", settings=SETTINGS, on_message=nothing, on_complete=done.put_nowait)
    async with queue, served(queue) as (_, client):
        assert (await client.get("/metrics")).status_code == 200
        await queue.enqueue_many(range(5))
        async with asyncio.timeout(30):
            for _ in range(5):
                await done.get()
        await Recorded(queue, "metrics").once()
        await Recorded(queue, "metrics").once()
        answer = await client.get("/metrics")
        assert answer.headers["content-type"].startswith("text/plain")
        families = {family.name: family for family in text_string_to_metric_families(answer.text)}
        (sample,) = families["s3queue_messages_processed"].samples
        assert sample.value == 5
        answer = await client.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert answer.headers["content-type"].startswith("application/openmetrics-text")
        assert "s3queue_messages_processed" in {
            family.name
            for family in openmetrics_families(answer.text)  # type: ignore[no-untyped-call]  # it has no types
        }


async def test_a_registry_and_routes_of_the_application() -> None:
    """/metrics shows the registry that it is given, and the application's own routes are there beside the three."""
    registry = CollectorRegistry()
    Gauge("mine", "Of the application.", registry=registry).set(7)

    async def hello(request: Request) -> PlainTextResponse:
        return PlainTextResponse("hello")

    async with (
        S3Queue("memory://", settings=SETTINGS) as queue,
        served(queue, registry=registry, routes=[Route("/hello", hello)]) as (_, client),
    ):
        assert "mine 7.0" in (await client.get("/metrics")).text
        assert (await client.get("/hello")).text == "hello"
        assert (await client.get("/nowhere")).status_code == 404


async def test_it_ends_with_its_block() -> None:
    """After the block, whether it ends well or not, no task is left, nobody listens, and the signals are untouched."""
    before = asyncio.all_tasks()
    handlers = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)]
    ports = []

    async def fail() -> None:
        async with S3Queue("memory://", settings=SETTINGS) as queue, served(queue) as (server, client):
            ports.append(server.port)
            assert (await client.get("/livez")).status_code == 200
            assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)] == handlers
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await fail()
    assert asyncio.all_tasks() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", ports[0]), timeout=5).close()


async def test_it_ends_when_it_is_cancelled() -> None:
    """Whoever cancels the block gets it back with everything closed."""
    before = asyncio.all_tasks()
    queue: S3Queue[Any] = S3Queue("memory://", settings=SETTINGS)
    serving: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def serve() -> None:
        async with queue, served(queue) as (server, client):
            assert (await client.get("/livez")).status_code == 200
            serving.set_result(server.port)
            await asyncio.Event().wait()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(serve())
        port = await serving
        task.cancel()
    assert asyncio.all_tasks() == before
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()


async def test_an_address_that_is_taken() -> None:
    """An address in use is an OSError that names it, and the queue goes on."""
    async with S3Queue("memory://", settings=SETTINGS) as queue, served(queue) as (server, _):
        with pytest.raises(OSError, match="in use"):
            async with serve_health(queue, port=server.port):
                pass
        await queue.enqueue(1)


async def test_sigterm_is_the_queues() -> None:
    """With run() in the block SIGTERM drains the queue: run() returns its report, and the endpoint ends after it."""
    async with S3Queue("memory://", settings=SETTINGS, on_message=nothing) as queue, served(queue) as (_, client):
        async with asyncio.TaskGroup() as group:
            running = group.create_task(queue.run())
            while (await client.get("/readyz")).status_code != 200:
                pass
            os.kill(os.getpid(), signal.SIGTERM)
            async with asyncio.timeout(30):
                report = await running
        assert report.clean
        assert (await client.get("/readyz")).json()["reason"] == "the queue drains"
