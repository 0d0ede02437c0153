"""What fails for good becomes a dead letter; once the cause is repaired, redrive it.

python -m examples.dead_letter_redrive
"""

from __future__ import annotations

import asyncio
import os

from s3queue_async import DeadLetter, MessageStatus, S3Queue, Settings

URL = os.environ.get("S3QUEUE_URL", "memory://")
# Results are kept for an hour, which is also how long status() knows that a message is completed.
SETTINGS = Settings(max_attempts=3, backoff_base=0.1, retain_completed=3600)
rates: dict[str, float] = {"EUR": 1.0}


async def convert(currency: str) -> float:
    if len(currency) != 3:
        # No attempt will ever succeed, so the message need not be tried again.
        raise DeadLetter(f"{currency!r} is no currency")
    # A missing rate raises KeyError: tried again with backoff, three attempts in all.
    return rates[currency]


async def until(queue: S3Queue[str], status: MessageStatus, *ids: str) -> None:
    for message_id in ids:
        while await queue.status(message_id) != status:  # noqa: ASYNC110 - any process may handle it
            await asyncio.sleep(0.05)


async def main() -> None:
    async with S3Queue(URL, payload_type=str, settings=SETTINGS) as queue:
        queue.on("message.completed", lambda event: print(f"done in attempt {event.attempt}: {event.result}"))
        queue.on("message.retry", lambda event: print(f"attempt {event.attempt} failed: {event.error}"))
        queue.on("message.dead", lambda event: print(f"dead letter: {event.error}"))
        queue.handler(convert)

        _, kroner, euros = await queue.enqueue_many(["EUR", "DKK", "euros"])
        await until(queue, MessageStatus.DEAD, kroner, euros)
        for letter in await queue.dead_letters.list():
            print(f"  {letter.payload}: {letter.error}, after {letter.attempts} attempts")

        rates["DKK"] = 7.46
        print(f"redriven: {await queue.dead_letters.redrive([kroner])}")
        await until(queue, MessageStatus.COMPLETED, kroner)
        print(f"purged: {await queue.dead_letters.purge()}")


if __name__ == "__main__":
    asyncio.run(main())
