from __future__ import annotations

import pytest

from s3queue_async import S3Queue
from tests.integration.processes.harness import Place, fleet, looking

pytestmark = [pytest.mark.integration, pytest.mark.alone]

BLOCKED_S = 15.0
BLOCKER = 3


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
async def test_a_handler_that_blocks_the_event_loop_for_15_s_loses_nothing(place: Place) -> None:
    """A handler blocks the loop for 15 s just before a heartbeat is due; default settings, an idle worker beside it.

    The lease holds, nothing is handled twice, and the log names the handler.
    """
    with fleet(place) as programs:
        async with S3Queue[int](place.url, payload_type=int) as queue, looking(place) as look:
            blocked = programs.start("blocked", "block", poison=BLOCKER, seconds=BLOCKED_S, concurrency=4)
            await blocked.ready()
            ids = await queue.enqueue_many(range(8))
            idle = programs.start("idle")
            await idle.ready()
            await programs.handles(ids)
            await look.gone()
            await programs.stop()

    assert programs.times_handled() == dict.fromkeys(ids, 1)
    assert len(blocked.worker_ids) == 1
    assert not blocked.told("lease.lost")
    assert "blocked the event loop" in blocked.log.read_text(encoding="utf-8")
    [line] = [line for line in blocked.handled if line.payload == BLOCKER]
    print(f"{place.kind}: the blocking handler took {line.end - line.start:.1f} s, handled once, no lease lost")
