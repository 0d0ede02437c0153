from __future__ import annotations

import time

import pytest

from s3queue_async import S3Queue
from tests.integration.processes.harness import Place, fleet, looking

pytestmark = pytest.mark.integration

MESSAGES = 20_000


async def test_without_faults_every_message_is_handled_once(place: Place) -> None:
    """Four worker processes, 20,000 messages from one enqueue_many: each is handled once, and nothing stays behind."""
    with fleet(place) as programs:
        # One worker alone would need 20 seconds, so there is time for each to take part.
        workers = await programs.start_workers(4, "sleep", seconds=0.01, concurrency=10)
        began = time.monotonic()
        async with S3Queue[int](place.url, payload_type=int) as queue:
            ids = await queue.enqueue_many(range(MESSAGES))
        enqueued = time.monotonic()
        await programs.handles(ids, within_s=90)
        handled = time.monotonic()
        async with looking(place) as look:
            await look.gone()
            await programs.stop()
            assert await look.messages() == {}
            assert await look.workers() == {}

    assert len(set(ids)) == MESSAGES
    assert programs.times_handled() == dict.fromkeys(ids, 1)
    assert sorted(line.payload for line in programs.handled) == list(range(MESSAGES))
    assert {(line.attempt, line.token > 0) for line in programs.handled} == {(1, True)}
    shares = [len(worker.handled) for worker in workers]
    assert all(shares), "a worker had nothing to do"
    print(
        f"{place.kind}: {MESSAGES} enqueued in {enqueued - began:.1f} s, handled {handled - began:.1f} s after the "
        f"first enqueue began; by worker {shares}"
    )
