"""Handle what is there, then end: for cron jobs, scripts, and AWS Lambda.

    python -m examples.lambda_style

A Lambda function that a schedule starts every minute is the same loop, ended a while before its time is over.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

from s3queue_async import S3Queue

URL = os.environ.get("S3QUEUE_URL", "sqlite:examples.db?name=thumbnails")


async def make_thumbnail(name: str) -> None:
    print(f"thumbnail of {name}", flush=True)


async def handle_for(budget_s: float) -> int:
    ends_at = time.monotonic() + budget_s
    count = 0
    # auto_start=False: nothing is claimed but what process_next handles.
    async with S3Queue(URL, payload_type=str, on_message=make_thumbnail, auto_start=False) as queue:
        while time.monotonic() < ends_at and await queue.process_next():
            count += 1
    return count


def lambda_handler(event: dict[str, Any], context: Any) -> dict[str, int]:
    """What AWS Lambda calls."""
    budget_s = context.get_remaining_time_in_millis() / 1000 - 5
    return {"handled": asyncio.run(handle_for(budget_s))}


async def main() -> None:
    async with S3Queue(URL, payload_type=str) as queue:
        await queue.enqueue_many([f"photo-{number}.jpg" for number in range(5)])
    print(f"handled: {await handle_for(10.0)}")


if __name__ == "__main__":
    asyncio.run(main())
