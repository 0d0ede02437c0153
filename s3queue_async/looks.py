"""What a look at a queue from outside shows: one message, the coordinator, or everything at a glance."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

import msgspec

from s3queue_async.message import MessageStatus, QueueStats, WorkerInfo


class MessageInfo(msgspec.Struct, frozen=True, kw_only=True):
    """A message as it is stored; nobody claims anything for it.

    Attributes:
        id: The message's id.
        state: Where it is.
        payload: Decoded as msgpack says; ``bytes`` as they are. None where it is not kept (completed messages).
        priority: 0..255.
        enqueued_at: Store time.
        due_at: When it may be delivered, for delayed ones; None otherwise.
        attempts: Attempts used up.
        max_attempts: Its own limit; None for the queue's.
        expires_at: After which it is not started any more; None when it does not expire.
        dedup_id: The producer's deduplication id, or None.
        headers: What the producer sent along.
        error: Of the last attempt that failed; "" when none did.
        traceback: Of the same.
        failed_at: When that was; None when none failed.
        worker_id: Who holds it, or who completed it; None when nobody does.
        claimed_at: Since when it is held; None when nobody holds it.
        completed_at: When it was completed; None otherwise, or where the history does not say.
        duration: Seconds that the handler of a completed message ran.
        result: What the handler returned, while the history has it.
        segment: The key of the object that it is in, without the queue's prefix; "" for completed ones.
    """

    id: str
    state: MessageStatus
    payload: Any = None
    priority: int = 0
    enqueued_at: datetime
    due_at: datetime | None = None
    attempts: int = 0
    max_attempts: int | None = None
    expires_at: datetime | None = None
    dedup_id: str | None = None
    headers: Mapping[str, str] = {}
    error: str = ""
    traceback: str = ""
    failed_at: datetime | None = None
    worker_id: str | None = None
    claimed_at: datetime | None = None
    completed_at: datetime | None = None
    duration: float | None = None
    result: Any = None
    segment: str = ""


class CoordinatorInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The coordinator as its board describes it.

    Attributes:
        worker_id: Who leads, or led last.
        term: Grows with every coordinator.
        state: ``leading``; ``resigned``: the next one may take over at once; ``expired``: it has not renewed its board.
        board_age: Seconds since it last wrote the board.
        workers: Workers that it knows of.
        tickets: Tickets on the board.
    """

    worker_id: str
    term: int
    state: Literal["leading", "resigned", "expired"]
    board_age: float
    workers: int
    tickets: int


class ErrorCount(msgspec.Struct, frozen=True, kw_only=True):
    """How many dead letters died of one error.

    Attributes:
        error: What they have in common: the error's line with numbers, ids and quoted text replaced.
        count: How many.
        first: When the first of them died, store time.
        last: When the last of them died.
        example: The id of one of them.
    """

    error: str
    count: int
    first: datetime
    last: datetime
    example: str


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """A whole queue at one moment, for who watches it.

    Attributes:
        at: Store time.
        stats: The counts.
        waiting: Messages that are claimable now and held by nobody, by priority.
        workers: Every registered worker.
        coordinator: None where no board was ever written.
    """

    at: datetime
    stats: QueueStats
    waiting: dict[int, int]
    workers: list[WorkerInfo]
    coordinator: CoordinatorInfo | None
