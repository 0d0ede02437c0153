"""The coordinator's board: its term and its tickets, one object; who gets which ticket is a pure function.

Tickets are hints. Whoever follows one still has to claim the segment by compare-and-swap, so a wrong, old or lost
ticket costs time and nothing else.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec

from s3queue_async.errors import CorruptObject
from s3queue_async.protocol.layout import SegmentKey


class Ticket(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A segment that a worker should claim.

    Attributes:
        key: The segment's key.
        worker: Whose it is.
        issued_ms: Store time at which it was given to this worker.
        orphan: Whether there is a claim in the way that nobody holds any more.
        stalled: Whether it was another worker's before, which did not use it in time: now it is for whoever has room.
    """

    key: str
    worker: str
    issued_ms: int
    orphan: bool = False
    stalled: bool = False


class Board(msgspec.Struct, frozen=True):
    """What the coordinator publishes; written by compare-and-swap alone, so only one publishes at a time.

    Attributes:
        nonce: Fresh in every written body.
        term: Grows with every coordinator.
        leader: The worker that leads, or led last.
        state: ``resigned``: anybody may take over at once.
        ttl_s: How long the leader leads from the object's LastModified.
        poll_s: Seconds that a worker should leave between two looks at the board, so that many do not cost too much.
        busy: Whether segments of several messages are held, which their holders may share out.
        tickets: Most urgent first.
        workers: Registered workers, and how many messages each handles at a time.
    """

    nonce: str
    term: int
    leader: str
    state: Literal["leading", "resigned"]
    ttl_s: float
    poll_s: float = 0.0
    busy: bool = False
    tickets: list[Ticket] = []
    workers: dict[str, int] = {}


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Board)


def encode(board: Board) -> bytes:
    """The board's bytes."""
    return _encoder.encode(board)


def decode(key: str, body: bytes) -> Board:
    """The board in these bytes. Raises CorruptObject when there is none."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CorruptObject(key, str(error)) from error


class Assignment(msgspec.Struct, frozen=True):
    """Who should claim what; ``stalled``: names of segments whose last ticket nobody used in time."""

    tickets: list[Ticket]
    stalled: list[str]


def assign(
    segments: Sequence[SegmentKey],
    rooms: Mapping[str, int],
    previous: Mapping[str, Ticket],
    *,
    orphans: frozenset[str] = frozenset(),
    now_ms: int,
    ttl_ms: int,
    limit: int,
    ahead: Mapping[str, int] | None = None,
) -> Assignment:
    """Give each claimable segment to one worker with room for it.

    A ticket stays with its worker while that has room, until it stalls; the rest goes to whoever can start most at once,
    and when nobody can start any more, to whoever has least to wait for. When nobody has room, a more urgent segment takes
    the place of the least urgent ticket.

    Args:
        segments: What nobody holds, most urgent first.
        rooms: How many messages each worker should have tickets for. One with any room left may get a segment of any
            size.
        previous: The last tickets, by segment name.
        orphans: Names of segments with a claim that nobody holds any more.
        now_ms: Store time.
        ttl_ms: How long a worker may leave a ticket unused.
        limit: Tickets at most.
        ahead: How much of its room a worker cannot start at once.
    """
    left = dict(rooms)
    given: dict[str, Ticket] = {}
    kept: list[SegmentKey] = []
    fresh: list[SegmentKey] = []
    stalled: dict[str, str] = {}
    for key in segments:
        ticket = previous.get(key.name)
        if ticket is not None and now_ms - ticket.issued_ms >= ttl_ms:
            stalled[key.name] = ticket.worker
            ticket = None
        if ticket is not None and left.get(ticket.worker, 0) > 0 and len(kept) < limit:
            left[ticket.worker] -= key.count
            given[key.name] = msgspec.structs.replace(ticket, key=key.text, orphan=key.name in orphans)
            kept.append(key)
        else:
            fresh.append(key)
    rooms_left = _Rooms(left, ahead or {})
    waiting = [(-key.priority, key.ulid, key) for key in fresh]
    heapq.heapify(waiting)
    while waiting:
        key = heapq.heappop(waiting)[2]
        avoid = stalled.get(key.name)
        worker = rooms_left.take(key.count, avoid) if len(given) < limit else None
        if worker is None:
            for gone in _give_way(key, kept, given, rooms_left):
                heapq.heappush(waiting, (-gone.priority, gone.ulid, gone))
            worker = rooms_left.take(key.count, avoid) if len(given) < limit else None
        if worker is None:
            # What follows is no more urgent.
            break
        before = previous.get(key.name)
        again = key.name in stalled or (before is not None and before.stalled)
        given[key.name] = Ticket(key.text, worker, now_ms, key.name in orphans, again)
    return Assignment([given[key.name] for key in segments if key.name in given], list(stalled))


def _give_way(
    key: SegmentKey, kept: list[SegmentKey], given: dict[str, Ticket], rooms_left: _Rooms
) -> list[SegmentKey]:
    """Take back the least urgent tickets that were kept until there is room, if they are less urgent than this segment."""
    gone = []
    while kept and kept[-1].priority < key.priority:
        gone.append(kept.pop())
        if rooms_left.give_back(given.pop(gone[-1].name).worker, gone[-1].count):
            break
    return gone


class _Rooms:
    """How much room each worker has left; finds who would start one more the soonest."""

    def __init__(self, left: dict[str, int], ahead: Mapping[str, int]) -> None:
        self._left = left
        self._ahead = ahead
        # Entries of workers whose room has changed since are passed over.
        self._heap = [self._entry(worker) for worker, room in left.items() if room > 0]
        heapq.heapify(self._heap)

    def _entry(self, worker: str) -> tuple[int, int, int, str]:
        left = self._left[worker]
        # The checksum spreads workers with equal room differently than their names do.
        return self._ahead.get(worker, 0) - left, -left, zlib.crc32(worker.encode()), worker

    def take(self, count: int, avoid: str | None) -> str | None:
        """Take room for so many messages at the best worker that has any, at another than ``avoid`` if there is one."""
        entry = self._pop()
        if entry is not None and entry[-1] == avoid:
            other = self._pop()
            if other is not None:
                heapq.heappush(self._heap, entry)
                entry = other
        if entry is None:
            return None
        self._change(entry[-1], -count)
        return entry[-1]

    def give_back(self, worker: str, count: int) -> bool:
        """Give room back; whether the worker has any now."""
        self._change(worker, count)
        return self._left[worker] > 0

    def _pop(self) -> tuple[int, int, int, str] | None:
        while self._heap:
            entry = heapq.heappop(self._heap)
            if -entry[1] == self._left[entry[-1]]:
                return entry
        return None

    def _change(self, worker: str, by: int) -> None:
        self._left[worker] += by
        if self._left[worker] > 0:
            heapq.heappush(self._heap, self._entry(worker))
