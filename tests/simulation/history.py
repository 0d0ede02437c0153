"""What a run of a cluster leaves behind for the checker; a simulated cluster and a real one fill in the same."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from s3queue_async import Settings
from s3queue_async.engine.registry import FENCED, NOT_RENEWED


class Job(msgspec.Struct, frozen=True):
    """A message's payload: what its handler is to do, drawn before."""

    number: int
    kind: str
    duration_s: float
    failures: int = 0


@dataclass
class Run:
    """One time that a handler ran on a message."""

    message_id: str
    number: int
    process: str
    worker_id: str
    attempt: int
    token: int
    started_s: float
    ended_s: float | None = None
    outcome: str = ""


@dataclass
class Sent:
    """One enqueue that was acknowledged."""

    message_id: str
    job: Job
    acknowledged_s: float
    due_s: float
    dedup_id: str | None


@dataclass(frozen=True)
class Loss:
    """One ``lease.lost`` event.

    Attributes:
        heartbeats_failed: Whether the store had failed one of the worker's heartbeats before; None when nobody watched.
        message_ids: What it was about, where somebody watched.
    """

    at_s: float
    process: str
    worker_id: str
    reason: str
    heartbeats_failed: bool | None = None
    message_ids: tuple[str, ...] = ()

    @property
    def of_the_worker(self) -> bool:
        """Whether the worker's whole lease was over, not only its claim on one segment taken."""
        return self.reason in (NOT_RENEWED, FENCED) or self.reason.startswith("The lease of worker")


@dataclass(frozen=True)
class Disturbance:
    """Something that was done to a process, other than ending it.

    ``kind`` is ``pause`` (nothing of it runs), ``suspend`` (nor does its clock), ``cut`` (from the store), ``jump``
    (of its clock), or ``stutter`` (it stands still for moments again and again).
    """

    since_s: float
    until_s: float
    process: str
    kind: str


@dataclass
class History:
    """What happened.

    Attributes:
        settings: Of every queue object.
        faultless: Nothing went wrong, neither with the store nor with a process.
        ambiguous: Ids of messages that an ``enqueue.ambiguous`` event named.
        dead: The dead letters at the end, with their reasons and attempts.
        fenced: When which worker was fenced, or its heartbeat deleted; None when nobody watched.
        done_at: When a deduplication marker said first that its message is finished.
        claimed_at: When which worker claimed a message of a segment, or took it over, for the last time.
        doubted: Keys of claims about which a request failed: its sender may have left without knowing that it landed.
        problems: What was found wrong while it ran.
    """

    settings: Settings
    faultless: bool = False
    sent: list[Sent] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    crashed_at: dict[str, float] = field(default_factory=dict)
    disturbed: list[Disturbance] = field(default_factory=list)
    lost: list[Loss] = field(default_factory=list)
    ambiguous: set[str] = field(default_factory=set)
    dead: dict[str, tuple[str, int]] = field(default_factory=dict)
    fenced: dict[str, float] | None = None
    done_at: dict[str, float] = field(default_factory=dict)
    claimed_at: dict[tuple[str, str], float] = field(default_factory=dict)
    doubted: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
