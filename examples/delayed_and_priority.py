"""Delays and priorities: what is handled when, and in which order.

python -m examples.delayed_and_priority
"""

from __future__ import annotations

import asyncio
import os
from datetime import UTC, datetime, timedelta

from s3queue_async import Context, S3Queue

URL = os.environ.get("S3QUEUE_URL", "memory://")
done = asyncio.Event()


async def show(text: str, context: Context) -> None:
    waited = (context.claimed_at - context.enqueued_at).total_seconds()
    print(f"{text}  (priority {context.priority}, claimed after {waited:.1f} s)", flush=True)
    if text.startswith("last"):
        done.set()


async def main() -> None:
    async with S3Queue(URL, payload_type=str, auto_start=False) as queue:
        await queue.enqueue("a report that can wait")
        await queue.enqueue("a password reset", priority=200)
        await queue.enqueue_many(["newsletter 1", "newsletter 2"], priority=50)
        await queue.enqueue("a reminder, one second later", delay=1)
        moment = datetime.now(UTC) + timedelta(seconds=2)
        await queue.enqueue("last: at a certain moment", deliver_at=moment)

        await queue.start_processing(show, concurrency=1)
        await done.wait()


if __name__ == "__main__":
    asyncio.run(main())
