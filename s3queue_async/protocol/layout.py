"""Spells and reads every key of a queue; no other module knows how a key looks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Self

CONFIG = "queue.json"
READY = "ready/"
DELAYED = "delayed/"
DEAD = "dead/"
CLAIMS = "claims/"
HISTORY = "history/"
QUARANTINE = "quarantine/"
WORKERS = "workers"
DEDUP = "dedup"
TOTALS = "totals"
TOMBSTONES = "tombstones"
COORDINATOR = "coordinator"
BOARD = "board"

PRIORITY_MAX = 255

_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PYTHON_BASE_32 = "0123456789abcdefghijklmnopqrstuv"
_AS_BASE_32 = dict.fromkeys(range(128), "!") | str.maketrans(_CROCKFORD, _PYTHON_BASE_32)
_CROCKFORD_PAIRS = [first + second for first in _CROCKFORD for second in _CROCKFORD]
_PAIR_SHIFTS = range(120, -1, -10)
_ULID_LENGTH = 26
_RANDOM_BITS = 80
_DUE_DIGITS = 15


class Place(StrEnum):
    """Where a segment lives: its top-level prefix."""

    READY = "ready"
    DELAYED = "delayed"
    DEAD = "dead"


def ulid(time_ms: int, randomness: int) -> str:
    """A ULID: 48 bits of milliseconds since the epoch, then 80 random bits, sortable as text."""
    value = (time_ms << _RANDOM_BITS) | (randomness & ((1 << _RANDOM_BITS) - 1))
    return "".join([_CROCKFORD_PAIRS[(value >> shift) & 1023] for shift in _PAIR_SHIFTS])


@lru_cache(maxsize=1024)
def ulid_time_ms(text: str) -> int:
    """The milliseconds since the epoch in a ULID. Raises ValueError when it is none."""
    if len(text) != _ULID_LENGTH or text[0] > "7" or not text.isascii():
        raise ValueError(f"{text!r} is not a ULID")
    try:
        int(text.translate(_AS_BASE_32), 32)
        return int(text[:10].translate(_AS_BASE_32), 32)
    except ValueError:
        raise ValueError(f"{text!r} is not a ULID") from None


@dataclass(frozen=True, slots=True)
class SegmentKey:
    """A segment's whole key, taken apart.

    Attributes:
        place: Ready, delayed or dead.
        ulid: Its time is the store time of the segment's creation.
        count: Messages in the segment, so that a backlog is counted from keys alone.
        priority: 0..255, higher first; not spelled in the key of a dead segment.
        due_ms: When a delayed segment becomes claimable, store time; 0 elsewhere.
    """

    place: Place
    ulid: str
    count: int
    priority: int = 0
    due_ms: int = 0

    @property
    def name(self) -> str:
        """What names the segment wherever it is: ``<ulid>-<count>``."""
        return f"{self.ulid}-{self.count}"

    @property
    def created_ms(self) -> int:
        return ulid_time_ms(self.ulid)

    @property
    def text(self) -> str:
        match self.place:
            case Place.READY:
                return f"{READY}{PRIORITY_MAX - self.priority:03d}/{self.name}"
            case Place.DELAYED:
                return f"{DELAYED}{self.due_ms:0{_DUE_DIGITS}d}-{PRIORITY_MAX - self.priority:03d}-{self.name}"
            case Place.DEAD:
                return f"{DEAD}{self.name}"

    @property
    def claim(self) -> str:
        """The key of this segment's claim; the same wherever the segment lives."""
        return CLAIMS + self.name

    @classmethod
    def parse(cls, key: str) -> Self:
        """Take a key apart. Raises ValueError when no segment is named like this."""
        place, _, rest = key.partition("/")
        priority = due_ms = 0
        if place == Place.READY:
            inverse, _, rest = rest.partition("/")
            priority = _inverse_priority(inverse, key)
        elif place == Place.DELAYED:
            due, _, rest = rest.partition("-")
            inverse, _, rest = rest.partition("-")
            if len(due) != _DUE_DIGITS or not due.isdecimal():
                raise ValueError(f"{key!r} names no segment")
            due_ms = int(due)
            priority = _inverse_priority(inverse, key)
        elif place != Place.DEAD:
            raise ValueError(f"{key!r} names no segment")
        identity, count = parse_name(rest)
        parsed = cls(Place(place), identity, count, priority, due_ms)
        if parsed.text != key:
            raise ValueError(f"{key!r} names no segment")
        return parsed


def _inverse_priority(text: str, key: str) -> int:
    if len(text) != 3 or not text.isdecimal() or int(text) > PRIORITY_MAX:
        raise ValueError(f"{key!r} names no segment")
    return PRIORITY_MAX - int(text)


def parse_name(name: str) -> tuple[str, int]:
    """The ULID and the message count in a segment's name. Raises ValueError when it is none."""
    identity, dash, count = name.partition("-")
    if not dash or not count.isdecimal() or count != str(int(count)) or int(count) < 1:
        raise ValueError(f"{name!r} names no segment")
    ulid_time_ms(identity)
    return identity, int(count)


def ready_prefix(priority: int) -> str:
    """What the keys of all ready segments of one priority start with."""
    return f"{READY}{PRIORITY_MAX - priority:03d}/"


def due_bound(due_ms: int) -> str:
    """A key behind every delayed segment that is due at this time or earlier."""
    return f"{DELAYED}{due_ms + 1:0{_DUE_DIGITS}d}"


def claim_name(claim_key: str) -> str:
    """The name of the segment that a claim's key is about."""
    return claim_key.removeprefix(CLAIMS)


def history_key(time_ms: int, worker_id: str) -> str:
    """A history object's key; keys sort by time."""
    return f"{HISTORY}{time_ms:0{_DUE_DIGITS}d}-{worker_id}"


def history_time_ms(key: str) -> int:
    """When a history object was composed. Raises ValueError when the key is no history key."""
    due, dash, _ = key.removeprefix(HISTORY).partition("-")
    if not key.startswith(HISTORY) or not dash or len(due) != _DUE_DIGITS or not (due.isascii() and due.isdecimal()):
        raise ValueError(f"{key!r} is no history key")
    return int(due)


def quarantine_key(key: str) -> str:
    """Where the copy of a corrupt object is set aside."""
    return QUARANTINE + key


def message_id(segment_ulid: str, priority: int, index: int) -> str:
    """A message's id: it names the first segment that the message was written for, which makes finding it cheap."""
    return f"{segment_ulid}-{priority:02x}{index:04x}"


def parse_message_id(identity: str) -> tuple[str, int, int]:
    """The first segment's ULID, the priority and the index in a message id. Raises ValueError when it is none."""
    first, dash, rest = identity.partition("-")
    if not dash or len(rest) < 6:
        raise ValueError(f"{identity!r} is not a message id")
    ulid_time_ms(first)
    parts = first, int(rest[:2], 16), int(rest[2:], 16)
    if message_id(*parts) != identity:
        raise ValueError(f"{identity!r} is not a message id")
    return parts
