"""A small HTTP endpoint for probes and scrapes; needs the extra ``http``."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Generator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import uvicorn
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from s3queue_async.prometheus import PrometheusMetrics
from s3queue_async.queue import S3Queue

GRACE_S = 2
"""How long an answer under way may take when the block ends."""


class HealthServer(msgspec.Struct, frozen=True):
    """Where the endpoint listens.

    Attributes:
        host: The address.
        port: The port; the one that the system chose when 0 was asked for.
    """

    host: str
    port: int


@asynccontextmanager
async def serve_health(
    queue: S3Queue[Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    registry: CollectorRegistry | None = None,
    routes: Sequence[BaseRoute] = (),
) -> AsyncIterator[HealthServer]:
    """Answer ``/livez``, ``/readyz`` and ``/metrics`` as long as the block lasts.

    The probes say 200 or 503, with a short JSON body that says why. It handles no signals.

    Args:
        queue: Whose health it is.
        host: The address to listen on; "0.0.0.0" for probes from outside of the machine.
        port: The port; 0: any that is free.
        registry: What ``/metrics`` shows; None: this queue's figures, counted from the first scrape on.
        routes: More of yours, Starlette's.

    Raises:
        OSError: The address cannot be used.
    """
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        config = uvicorn.Config(
            Starlette(routes=[*_routes(queue, registry), *routes]),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE_S,
        )
        server = _Server(config)

        async def serve() -> None:
            # It ends by being told, so that it closes its connections; that takes GRACE_S at most.
            with anyio.CancelScope(shield=True):
                await server.serve(sockets=[listener])

        raised: Exception | None = None
        async with anyio.create_task_group() as group:
            group.start_soon(serve)
            try:
                yield HealthServer(host, listener.getsockname()[1])
            except Exception as error:  # noqa: BLE001 - what the block raised goes on as it is, not as the group's
                raised = error
            finally:
                server.should_exit = True
        if raised is not None:
            raise raised


class _Server(uvicorn.Server):
    """Leaves signals to the queue and the application."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


def _routes(queue: S3Queue[Any], registry: CollectorRegistry | None) -> list[Route]:
    async def livez(request: Request) -> Response:
        health = queue.health()
        return _answer(health.live, "live", health.reason)

    async def readyz(request: Request) -> Response:
        health = queue.health()
        return _answer(health.live and health.ready, "ready", health.reason)

    async def metrics(request: Request) -> Response:
        nonlocal registry
        if registry is None:
            registry = CollectorRegistry()
            PrometheusMetrics(queue, registry=registry)
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(registry), headers={"Content-Type": content_type})

    return [Route("/livez", livez), Route("/readyz", readyz), Route("/metrics", metrics)]


def _answer(well: bool, what: str, reason: str) -> Response:
    if well:
        return JSONResponse({"status": what})
    return JSONResponse({"status": f"not {what}", "reason": reason}, status_code=503)
