"""A handler behind middleware: a rate limit, a circuit breaker, and no order is paid for twice.

    python -m examples.protected

The payment service of this example is away at first. The circuit opens, nothing is called for a while, then one message
is tried; no message loses an attempt over that.
"""

from __future__ import annotations

import asyncio
import os
import time

from s3queue_async import Context, S3Queue, Settings
from s3queue_async.events import MessageCompleted
from s3queue_async.middleware import CallNext, CircuitBreaker, Delivery, Idempotency, Middleware
from s3queue_async.middleware.rate_limit import RateLimit

URL = os.environ.get("S3QUEUE_URL", "memory://")
AWAY_S = 1.5
ORDERS = [f"order-{number}" for number in range(10)]
began = time.monotonic()
paid: list[str] = []
completed: list[str] = []
done = asyncio.Event()


async def log_failures(message: Delivery[str], call_next: CallNext) -> object:
    try:
        return await call_next(message)
    except ConnectionError as error:
        print(f"{message.payload}: {error} (attempt {message.context.attempt})", flush=True)
        raise


async def pay(order: str, context: Context) -> None:
    if time.monotonic() - began < AWAY_S:
        raise ConnectionError("the payment service is away")
    print(f"{order}: paid in attempt {context.attempt}", flush=True)
    paid.append(order)


def count(event: MessageCompleted) -> None:
    completed.append(event.message_id)
    if len(completed) >= len(ORDERS):
        done.set()


async def main() -> None:
    middleware: list[Middleware] = [
        Idempotency(lambda message: message.payload),
        CircuitBreaker(failures=2, recovery=1, counts=ConnectionError),
        RateLimit(50, burst=5),
        log_failures,
    ]
    settings = Settings(backoff_base=0.5)
    async with S3Queue(
        URL, payload_type=str, settings=settings, middleware=middleware, on_message=pay, on_complete=count
    ) as queue:
        await queue.enqueue_many(ORDERS)
        await done.wait()
        done.clear()
        await queue.enqueue(ORDERS[0])  # by mistake: it was paid already
        await done.wait()
    print(f"{len(completed)} messages, paid {len(paid)} times for {len(set(paid))} orders", flush=True)


if __name__ == "__main__":
    asyncio.run(main())
