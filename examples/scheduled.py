"""Messages that come by themselves: at certain times, or every so often. Start it as often as you like, on one url.

    python -m examples.scheduled

Each tick is enqueued once, whichever of the processes are there. It ends after three of them.
"""

from __future__ import annotations

import asyncio
import os

from s3queue_async import Context, S3Queue

URL = os.environ.get("S3QUEUE_URL", "memory://")
TICKS = 3
done = asyncio.Event()
seen: list[str] = []


async def work(payload: str, context: Context) -> None:
    tick = context.headers["s3queue-tick"]
    print(f"{payload}, due at {tick}", flush=True)
    seen.append(tick)
    if len(seen) >= TICKS:
        done.set()


async def main() -> None:
    async with S3Queue(URL, payload_type=str, on_message=work) as queue:
        # At every start: what is there already stays as it is.
        await queue.schedule("30 2 * * *", "backup", name="backup", timezone="Europe/Berlin")
        await queue.schedule(payload="look for new mail", every=1, name="mail")
        for schedule in await queue.schedules():
            print(f"{schedule.name}: next at {schedule.next_tick}", flush=True)
        await done.wait()
        await queue.unschedule("mail")


if __name__ == "__main__":
    asyncio.run(main())
