"""Says how long the queue is while no worker runs, so that KEDA or Prometheus can tell when one is needed.

    python -m examples.backlog_exporter
    curl localhost:9108/metrics         for Prometheus
    curl localhost:9108/backlog         for KEDA's metrics-api scaler

It has no handler, so it registers no worker; every metrics_interval it makes three listings. One of it is enough.
docs/kubernetes.md has the rest.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from s3queue_async import S3Queue
from s3queue_async.health import serve_health
from s3queue_async.prometheus import PrometheusMetrics

URL = os.environ.get("S3QUEUE_URL", "sqlite:examples.db?name=emails")
HOST = os.environ.get("HOST", "127.0.0.1")
PORT = int(os.environ.get("PORT", "9108"))


async def main() -> None:
    queue: S3Queue[Any] = S3Queue(URL, count_backlog=True)
    registry = CollectorRegistry()
    PrometheusMetrics(queue, name=os.environ.get("QUEUE_NAME", "emails"), registry=registry)

    async def backlog(request: Request) -> JSONResponse:
        snapshot = queue.metrics()
        if snapshot.backlog is None or snapshot.held is None:
            # KEDA keeps the number of workers as it is when it gets an error; a zero would end them.
            return JSONResponse({"error": "not counted yet, or the store did not answer"}, status_code=503)
        waiting = sum(snapshot.backlog.values())
        return JSONResponse({"waiting": waiting, "held": snapshot.held, "unsettled": waiting + snapshot.held})

    routes = [Route("/backlog", backlog)]
    async with queue, serve_health(queue, host=HOST, port=PORT, registry=registry, routes=routes) as server:
        print(f"listening on port {server.port}", flush=True)
        await queue.run()


if __name__ == "__main__":
    asyncio.run(main())
