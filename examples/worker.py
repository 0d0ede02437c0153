"""A worker: handles messages until SIGTERM or SIGINT, then drains. Start as many as you like, on one url.

    python -m examples.worker

With nothing to do it waits; examples/service.py enqueues what it handles. With HEALTH_PORT set, it answers probes on
that port: docs/kubernetes.md has the Deployment.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack

import msgspec

from s3queue_async import Context, S3Queue
from s3queue_async.health import serve_health

URL = os.environ.get("S3QUEUE_URL", "sqlite:examples.db?name=emails")


class Email(msgspec.Struct):
    to: str
    subject: str


async def send(email: Email, context: Context) -> str:
    print(f"attempt {context.attempt}: sending {email.subject!r} to {email.to}", flush=True)
    await asyncio.sleep(0.1)
    return "sent"


async def main() -> None:
    queue = S3Queue(URL, payload_type=Email, on_message=send, concurrency=20)
    async with queue, AsyncExitStack() as stack:
        if port := os.environ.get("HEALTH_PORT"):
            host = os.environ.get("HEALTH_HOST", "127.0.0.1")
            await stack.enter_async_context(serve_health(queue, host=host, port=int(port)))
        print("waiting for messages; Ctrl-C ends it", flush=True)
        report = await queue.run()
    print(f"drained: {report.finished} finished meanwhile, {report.handed_back} handed back", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
