from __future__ import annotations

import pytest

from s3queue_async import S3Queue
from tests.integration.processes.harness import Place, fleet, looking

pytestmark = [pytest.mark.integration, pytest.mark.alone]

JOBS = 64
WITHIN_S = 7.0


async def test_slow_jobs_of_one_call_spread_over_idle_workers(place: Place) -> None:
    """64 jobs of 1 s from one call, four idle workers with four slots each, default settings.

    They are done within 7 s of the first claim (4 s would be perfect), each once. What a worker shared out long
    before its drain is no news of that drain.
    """
    with fleet(place) as programs:
        workers = await programs.start_workers(4, "sleep", seconds=1.0, concurrency=4, events=["message.claimed"])
        async with S3Queue[int](place.url, payload_type=int) as queue, looking(place) as look:
            ids = await queue.enqueue_many(range(JOBS))
            await programs.handles(ids)
            await look.gone()
        claimed_at = min(event.at for worker in workers for event in worker.told("message.claimed"))
        await programs.stop()

    assert programs.times_handled() == dict.fromkeys(ids, 1)
    reports = [worker.told("report")[-1].about for worker in workers]
    assert [(report["finished"], report["handed_back"], report["clean"]) for report in reports] == [(0, 0, True)] * 4
    took_s = max(line.end for line in programs.handled) - min(claimed_at, *(line.start for line in programs.handled))
    shares = [len(worker.handled) for worker in workers]
    print(
        f"{place.kind}: {JOBS} jobs of 1 s done {took_s:.2f} s after the first claim (bound {WITHIN_S:g} s): {shares}"
    )
    assert took_s < WITHIN_S
