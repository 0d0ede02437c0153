"""A web service (Starlette) that answers at once and leaves the work to a queue.

    python -m examples.service
    curl -X POST localhost:8000/emails -d '{"to": "a@example.com", "subject": "Hello"}'
    curl localhost:8000/health

The service handles a few messages itself; run examples/worker.py beside it for more. On SIGTERM the server stops
taking requests, then the lifespan ends: running handlers finish, and what was not started goes to other workers.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from examples.worker import URL, Email, send
from s3queue_async import QueueFull, S3Queue, Settings

queue = S3Queue(URL, payload_type=Email, settings=Settings(max_pending=100_000), on_message=send, concurrency=5)


@contextlib.asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    async with queue:
        yield
        report = await queue.drain()
        print(f"drained in {report.elapsed:.2f} s, clean: {report.clean}", flush=True)


async def enqueue(request: Request) -> JSONResponse:
    try:
        email = msgspec.json.decode(await request.body(), type=Email)
    except msgspec.MsgspecError as error:
        return JSONResponse({"error": str(error)}, status_code=422)
    try:
        # Once this returns, the message is durable. Requests that come together share one write.
        message_id = await queue.enqueue(email, dedup_id=request.headers.get("idempotency-key"))
    except QueueFull as error:
        return JSONResponse({"error": str(error)}, status_code=503)
    return JSONResponse({"message_id": message_id}, status_code=202)


async def status(request: Request) -> JSONResponse:
    return JSONResponse({"status": await queue.status(request.path_params["message_id"])})


async def health(request: Request) -> JSONResponse:
    state = queue.health()
    return JSONResponse(msgspec.to_builtins(state), status_code=200 if state.live and state.ready else 503)


app = Starlette(
    lifespan=lifespan,
    routes=[
        Route("/emails", enqueue, methods=["POST"]),
        Route("/emails/{message_id}", status),
        Route("/health", health),
    ],
)

if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))
