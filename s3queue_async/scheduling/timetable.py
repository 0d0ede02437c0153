"""What is scheduled, as users say it and as it is stored: one object for all schedules of a queue."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, TypedDict

import msgspec

from s3queue_async.errors import CorruptObject, InvalidSettings, NewerFormat
from s3queue_async.intake import Intake
from s3queue_async.message import moment
from s3queue_async.scheduling import ticks
from s3queue_async.settings import seconds
from s3queue_async.worker import Decoder

NAMESPACE = "schedules"
KEY = "all"
FORMAT_VERSION = 1
NAME_MAX = 200
SCHEDULES_MAX = 1000
BYTES_MAX = 1024 * 1024
EVERY_MIN_S, EVERY_MAX_S = 1.0, 366 * 24 * 3600.0
GRACE_S = 3600.0
GRACE_MIN_S, GRACE_MAX_S = 1.0, 30 * 24 * 3600.0


class ScheduleOptions(TypedDict, total=False):
    """The keyword arguments of ``S3Queue.schedule``, which says what they mean."""

    every: float | timedelta | None
    name: str | None
    timezone: str
    priority: int
    headers: Mapping[str, str] | None
    max_attempts: int | None
    expires_in: float | timedelta | None
    grace: float | timedelta
    catch_up: bool


class Definition(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A schedule as it is stored.

    Attributes:
        payload, codec: The message's payload, encoded.
        cron, timezone: The expression and its time zone; or
        every_ms: the interval, counted from ``created_ms``.
        priority, headers, max_attempts, expires_ms: The message's; ``expires_ms`` counts from the enqueue.
        grace_ms: How late a tick may be enqueued.
        catch_up: Whether each missed tick is enqueued, not just the last one.
        created_ms: Store time of the definition; no earlier tick counts.
        last_ms: The last tick that was enqueued; 0 before the first.
    """

    payload: bytes
    codec: int
    created_ms: int
    cron: str | None = None
    timezone: str = "UTC"
    every_ms: int | None = None
    priority: int = 0
    headers: dict[str, str] | None = None
    max_attempts: int | None = None
    expires_ms: int | None = None
    grace_ms: int = 0
    catch_up: bool = False
    last_ms: int = 0

    @property
    def done_ms(self) -> int:
        """No tick up to here is to be enqueued any more."""
        return max(self.created_ms, self.last_ms)

    def same_times(self, other: Definition) -> bool:
        """Whether both are due at the same times, whenever they were made."""
        return (self.cron, self.timezone, self.every_ms) == (other.cron, other.timezone, other.every_ms)

    def since(self, old: Definition) -> Definition:
        """This one as what ``old`` becomes: as far as that one is."""
        return msgspec.structs.replace(self, created_ms=old.created_ms, last_ms=old.last_ms)

    def ticks(self) -> ticks.Ticks:
        if self.every_ms is not None:
            return ticks.Every(self.every_ms, self.created_ms)
        assert self.cron is not None
        return ticks.Cron(self.cron, self.timezone)


class Timetable(msgspec.Struct, frozen=True, kw_only=True):
    """The object that holds every schedule of a queue, by name."""

    nonce: str
    format: int
    schedules: dict[str, Definition]


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    """A schedule of the queue.

    Attributes:
        name: What ``unschedule`` takes.
        cron: The cron expression, or None.
        every: The interval in seconds, or None.
        timezone: Of the cron expression.
        payload: Decoded.
        priority: 0..255.
        grace: Seconds after which a missed tick is dropped.
        catch_up: Whether every missed tick is made up for, or the last one only.
        created_at: Store time of the definition.
        last_tick: The last tick that was enqueued; None before the first.
        next_tick: The next tick after that, or after now; None where the library for cron is missing.
    """

    name: str
    cron: str | None
    every: float | None
    timezone: str
    payload: Any
    priority: int
    grace: float
    catch_up: bool
    created_at: datetime
    last_tick: datetime | None
    next_tick: datetime | None


_encoder = msgspec.json.Encoder(order="sorted")
_decoder = msgspec.json.Decoder(Timetable)


def define(
    intake: Intake,
    now_ms: int,
    cron: str | None,
    payload: Any,
    *,
    every: float | timedelta | None = None,
    name: str | None = None,
    timezone: str = "UTC",
    priority: int = 0,
    headers: Mapping[str, str] | None = None,
    max_attempts: int | None = None,
    expires_in: float | timedelta | None = None,
    grace: float | timedelta = GRACE_S,
    catch_up: bool = False,
) -> tuple[str, Definition]:
    """A schedule's name and definition, checked. Raises what ``S3Queue.schedule`` does."""
    every_ms = _checked_every(cron, every)
    grace_s = seconds("grace", grace)
    if not GRACE_MIN_S <= grace_s <= GRACE_MAX_S:
        raise InvalidSettings(
            f"grace={grace!r} is out of range: {GRACE_MIN_S:g} to {GRACE_MAX_S:,.0f} seconds (30 days)."
        )
    if not isinstance(catch_up, bool):
        raise InvalidSettings(f"catch_up={catch_up!r} must be True or False.")
    options = intake.options(priority, headers, max_attempts, expires_in)
    entry = intake.entry(payload, options)
    definition = Definition(
        payload=entry.payload,
        codec=entry.codec,
        cron=cron,
        timezone=timezone,
        every_ms=every_ms,
        priority=priority,
        headers=options.headers,
        max_attempts=max_attempts,
        expires_ms=None if expires_in is None else int(seconds("expires_in", expires_in) * 1000),
        grace_ms=int(grace_s * 1000),
        catch_up=catch_up,
        created_ms=now_ms,
    )
    if next(definition.ticks().after(now_ms), None) is None:
        raise InvalidSettings(f"cron={cron!r} matches no day in the next 50 years.")
    return _default_name(definition) if name is None else checked_name(name), definition


def shown(name: str, definition: Definition, next_ms: int | None, decode: Decoder) -> Schedule:
    """A schedule as users see it."""
    try:
        payload = decode(definition.payload, definition.codec)
    except msgspec.DecodeError:
        payload = definition.payload
    return Schedule(
        name=name,
        cron=definition.cron,
        every=None if definition.every_ms is None else definition.every_ms / 1000,
        timezone=definition.timezone,
        payload=payload,
        priority=definition.priority,
        grace=definition.grace_ms / 1000,
        catch_up=definition.catch_up,
        created_at=moment(definition.created_ms),
        last_tick=None if not definition.last_ms else moment(definition.last_ms),
        next_tick=None if next_ms is None else moment(next_ms),
    )


def encode(timetable: Timetable) -> bytes:
    """The object's body. Raises InvalidSettings when it is too large."""
    body = _encoder.encode(timetable)
    if len(timetable.schedules) > SCHEDULES_MAX:
        raise InvalidSettings(
            f"There are {SCHEDULES_MAX:,} schedules already.", suggestion="Remove some with unschedule()."
        )
    if len(body) > BYTES_MAX:
        raise InvalidSettings(
            f"The schedules would have {len(body):,} bytes in all; at most {BYTES_MAX:,} are allowed.",
            suggestion="Put large payloads somewhere else, and schedule their key.",
        )
    return body


def decode(key: str, body: bytes) -> Timetable:
    """Read the object. Raises CorruptObject, NewerFormat."""
    try:
        timetable = _decoder.decode(body)
    except msgspec.DecodeError as error:
        raise CorruptObject(
            key,
            f"cannot be read ({error})",
            suggestion="Delete the object, and schedule everything anew; what ran last is forgotten then.",
        ) from error
    if timetable.format > FORMAT_VERSION:
        raise NewerFormat(key, f"has format {timetable.format}; this library knows {FORMAT_VERSION}")
    return timetable


def _checked_every(cron: Any, every: float | timedelta | None) -> int | None:
    if (cron is None) == (every is None):
        raise InvalidSettings(
            "A schedule has either a cron expression or every=.",
            suggestion='E.g. schedule("0 3 * * *", payload) or schedule(payload=payload, every=60).',
        )
    if every is None:
        if not isinstance(cron, str):
            raise InvalidSettings(f"cron={cron!r} must be text.")
        return None
    every_s = seconds("every", every)
    if not EVERY_MIN_S <= every_s <= EVERY_MAX_S:
        raise InvalidSettings(
            f"every={every!r} is out of range: {EVERY_MIN_S:g} to {EVERY_MAX_S:,.0f} seconds (366 days)."
        )
    return round(every_s * 1000)


def checked_name(name: Any) -> str:
    """The name, if it can be one. Raises InvalidSettings."""
    if not isinstance(name, str) or not name or len(name) > NAME_MAX:
        raise InvalidSettings(f"name={name!r} must be text of 1 to {NAME_MAX} characters.")
    return name


def _default_name(definition: Definition) -> str:
    said = msgspec.structs.replace(definition, created_ms=0)
    return hashlib.sha256(_encoder.encode(said)).hexdigest()[:16]
