"""One queue through both S3 clients at once."""

from __future__ import annotations

import anyio
import pytest

from s3queue_async import S3Queue
from s3queue_async.testing.servers import Server
from tests.conftest import BUCKET


@pytest.mark.integration
async def test_one_queue_through_both_clients(seaweedfs: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers with either client share one queue and its messages: each message is handled once."""
    for name, value in seaweedfs.environment().items():
        monkeypatch.setenv(name, value)
    url = seaweedfs.queue_url(BUCKET, "both-clients")
    handled: list[int] = []
    done = anyio.Event()

    async def handle(number: int) -> None:
        handled.append(number)
        if len(handled) == 60:
            done.set()

    async with (
        S3Queue(url, payload_type=int) as one,
        S3Queue(url.replace("s3://", "s3+obstore://", 1), payload_type=int) as other,
    ):
        for queue, numbers in ((one, range(30)), (other, range(30, 60))):
            await queue.start_processing(handle)
            for number in numbers:
                await queue.enqueue(number)
        with anyio.fail_after(60):
            await done.wait()
        for queue in (one, other):
            await queue.drain()
        stats = await other.stats(exact=True)
        assert (stats.pending, stats.processing, stats.completed) == (0, 0, 60)
    assert sorted(handled) == list(range(60))
