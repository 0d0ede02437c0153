"""The same on a file, in real time: two queue objects share it, and what one leaves the other finds."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import anyio

from s3queue_async import Context, S3Queue, Settings
from s3queue_async.message import MessageStatus
from tests.unit.queue.bed import Seen

SETTINGS = Settings(coordinator=False, poll_interval=0.02, max_poll_interval=0.1, backoff_base=0.05)


async def test_two_workers_on_one_file(tmp_path: Path) -> None:
    """500 messages, a tenth of which fail once: each is handled once in the end, between two workers and a producer."""
    url = f"sqlite:///{tmp_path}/queue.db"
    ended: Counter[int] = Counter()
    done = Seen()

    async def handler(payload: int, context: Context) -> None:
        if payload % 10 == 0 and context.attempt == 1:
            raise OSError("once")
        ended[payload] += 1
        done(payload)

    async with (
        S3Queue(url, settings=SETTINGS) as producer,
        S3Queue(url, settings=SETTINGS, on_message=handler),
        S3Queue(url, settings=SETTINGS, on_message=handler),
    ):
        await producer.enqueue_many(range(500))
        await done.count(500)
    assert ended == dict.fromkeys(range(500), 1)


async def test_a_file_outlives_its_queue(tmp_path: Path) -> None:
    """What one queue object enqueued, another one that opens the file later handles, by name of the queue."""
    done = Seen()

    async def handler(payload: str) -> None:
        done(payload)

    url = f"sqlite:///{tmp_path}/queue.db?name="
    async with S3Queue(url + "a", settings=SETTINGS) as a, S3Queue(url + "b", settings=SETTINGS) as b:
        message_id = await a.enqueue("of a")
        await b.enqueue("of b")
    async with S3Queue(url + "a", settings=SETTINGS, on_message=handler) as queue:
        await done.count(1)
        with anyio.fail_after(10):
            while await queue.status(message_id) is not MessageStatus.COMPLETED:  # noqa: ASYNC110 - no event says so
                await anyio.sleep(0.01)
    assert done.items == ["of a"]
