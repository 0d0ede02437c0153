"""A worker: handles messages until SIGTERM or SIGINT, then drains. Start as many as you like, on one url.

    python -m examples.worker

With nothing to do it waits; examples/service.py enqueues what it handles.
"""

from __future__ import annotations

import asyncio
import os

import msgspec

from s3queue_async import Context, S3Queue

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
    async with queue:
        print("waiting for messages; Ctrl-C ends it", flush=True)
        report = await queue.run()
    print(f"drained: {report.finished} finished meanwhile, {report.handed_back} handed back", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
