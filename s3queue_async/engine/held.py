"""A segment that this worker holds: what of it waits, runs, is finished, or is about to leave."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable

import anyio
import msgspec

from s3queue_async.engine.dedup import Reservation
from s3queue_async.protocol.claim import Claim
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.protocol.segment import Failure, Index, Record


class Departing(msgspec.Struct, frozen=True):
    """A message that is about to move into another segment.

    Attributes:
        index: Its place in this segment.
        attempts: Attempts used up, the last one included if it counts.
        failure: Why the last attempt failed; None to keep what is known.
        place: Ready, delayed or dead.
        due_ms: When it is to be delivered, store time; 0 unless delayed.
        group: Messages with equal groups may share the new segment; others must not.
    """

    index: int
    attempts: int
    failure: Failure | None
    place: Place
    due_ms: int = 0
    group: Hashable = None


class Done(msgspec.Struct, frozen=True):
    """A finished message of which somebody wants to hear."""

    index: int
    attempt: int
    duration_s: float
    result: object


class Held:
    """A claimed segment in memory. Only the settler writes its claim; only the worker starts its messages."""

    __slots__ = (
        "again",
        "busy",
        "cancel",
        "claim",
        "claimed_at",
        "departing",
        "done",
        "ended",
        "finished",
        "flushed_at",
        "giving_back",
        "index",
        "isolated",
        "kept",
        "key",
        "lock",
        "lost",
        "markers",
        "payloads",
        "queued",
        "recorded",
        "running",
        "size",
        "version",
        "waiters",
        "waiting",
        "_lost_event",
    )

    def __init__(
        self, key: SegmentKey, claim: Claim, version: str, index: Index, payloads: list[bytes], *, claimed_at: float
    ) -> None:
        self.key = key
        self.claim = claim
        self.version = version
        self.index = index
        self.payloads = payloads
        self.size = sum(record.length for record in index.records)
        self.claimed_at = claimed_at
        self.flushed_at = claimed_at
        self.isolated = claim.isolated(index)
        ended = claim.ended()
        self.waiting: deque[int] = deque(i for i in range(len(index.records)) if i not in ended)
        self.running = 0
        self.finished: list[int] = []
        self.recorded = 0
        self.departing: list[Departing] = []
        self.done: list[Done] = []
        self.markers: dict[int, Reservation] = {}
        self.lost: str | None = None
        self.queued = False
        self.busy = False
        self.again = False
        self.cancel: dict[int, Callable[[], None]] = {}
        self.lock = anyio.Lock()
        self.kept = 0
        self.ended = False
        self.giving_back = False
        self.waiters: list[anyio.Event] = []
        self._lost_event: anyio.Event | None = None

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def complete(self) -> bool:
        """Whether no message waits or runs any more."""
        return not self.waiting and self.running == 0

    @property
    def untouched(self) -> bool:
        """Whether nothing happened since it was claimed, so that the claim may simply be given back."""
        return self.running == 0 and not self.finished and not self.departing and not self.claim.moves

    def attempts(self, index: int) -> int:
        """Attempts that a message has used up so far."""
        return self.claim.attempts(index, self.index.records[index])

    def token(self, record: Record) -> int:
        """The fencing token of a message under this claim."""
        return record.deliveries + self.claim.token

    def lost_event(self) -> anyio.Event:
        """Set once the lease on this segment is lost; made only for who asks."""
        if self._lost_event is None:
            self._lost_event = anyio.Event()
            if self.lost is not None:
                self._lost_event.set()
        return self._lost_event

    def lose(self, reason: str) -> None:
        """Another worker may own it: cancel what runs, settle nothing any more."""
        if self.lost is not None:
            return
        self.lost = reason
        self.waiting.clear()
        if self._lost_event is not None:
            self._lost_event.set()
        self.notify_waiters()
        for cancel in list(self.cancel.values()):
            cancel()

    def end(self) -> None:
        """It is not held any more, and nothing of it is left to be recorded."""
        self.ended = True
        # Who came while the last of it was being recorded is not among those whom the settler wakes.
        self.notify_waiters()

    def notify_waiters(self) -> None:
        """Wake those who wait for news of this segment to be recorded."""
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            waiter.set()

    def message_ids(self) -> list[str]:
        """Ids of messages that are neither finished nor moved as far as the store knows."""
        ended = self.claim.ended()
        return [record.id for i, record in enumerate(self.index.records) if i not in ended]
