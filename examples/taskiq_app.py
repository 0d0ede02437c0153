"""A taskiq application on a bucket, or on a file, with its worker in another terminal.

    taskiq worker examples.taskiq_app:broker
    python -m examples.taskiq_app

docs/taskiq.md says what its labels, acknowledgements and retries mean here.
"""

from __future__ import annotations

import asyncio
import os

from taskiq import Context, TaskiqDepends

from s3queue_async.taskiq import S3QueueBroker, S3QueueRetryMiddleware

URL = os.environ.get("S3QUEUE_URL", "sqlite:examples.db?name=taskiq")

broker = S3QueueBroker(URL).with_middlewares(S3QueueRetryMiddleware())


# With names of their own, because this module is the client's __main__, too.
@broker.task("greet")
async def greet(name: str, context: Context = TaskiqDepends()) -> str:  # noqa: B008 - so taskiq has it
    print(f"greeting {name}, task {context.message.task_id}", flush=True)
    return f"Hello, {name}"


@broker.task("divide", max_attempts=2)
async def divide(left: float, right: float) -> float | None:
    return left / right


async def main() -> None:
    await broker.startup()
    late = await greet.kicker().with_labels(delay=2).kiq("you there, two seconds later")
    first = await greet.kicker().with_labels(priority=10).kiq("world")
    wrong = await divide.kiq(1, 0)
    for task in (first, late):
        print((await task.wait_result(timeout=60)).return_value)
    print("failed:", repr((await wrong.wait_result(timeout=60)).error))
    for letter in await broker.queue.dead_letters.list():
        print(f"dead letter: {letter.headers['taskiq_task_name']}, {letter.error}, {letter.attempts} attempts")
    await broker.queue.dead_letters.purge()
    await broker.shutdown()


if __name__ == "__main__":
    asyncio.run(main())
