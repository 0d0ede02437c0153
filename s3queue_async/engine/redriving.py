"""Takes dead letters back, or drops them, one segment at a time."""

from __future__ import annotations

from s3queue_async.engine.held import Departing, Held
from s3queue_async.engine.session import Session
from s3queue_async.protocol.layout import Place, SegmentKey


async def move_dead(session: Session, key: SegmentKey, wanted: frozenset[str] | None, *, redrive: bool) -> int:
    """Redrive or drop dead letters of one segment; the others of it move into a segment of their own.

    Args:
        session: Under whose lease it happens.
        key: The segment.
        wanted: Ids, or None for all.
        redrive: Make them ready again; otherwise they are dropped.

    Returns:
        How many messages that were; 0 when somebody else is at it.
    """
    held = await session.claim_one(key)
    if held is None:
        return 0
    chosen = [i for i in held.waiting if wanted is None or held.index.records[i].id in wanted]
    if not chosen:
        session.settler.submit_give_back(held)
        return 0
    _decide(held, set(chosen), redrive=redrive)
    await session.settler.flush(held)
    return len(chosen)


def _decide(held: Held, chosen: set[int], *, redrive: bool) -> None:
    while held.waiting:
        index = held.waiting.popleft()
        if index not in chosen:
            held.departing.append(Departing(index, held.attempts(index), None, Place.DEAD))
        elif redrive:
            held.departing.append(Departing(index, 0, None, Place.READY))
        else:
            held.finished.append(index)
