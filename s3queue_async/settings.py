"""Every setting of a queue: one frozen struct, validated once."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, Self

import msgspec

from s3queue_async.errors import InvalidSettings, UnknownSetting

KIB = 1024
MIB = 1024 * KIB
ENVIRONMENT_PREFIX = "S3QUEUE_"
SEGMENT_MESSAGES_LIMIT = 4096
LEASE_MARGIN_MAX_S = 2.0
"""How far the clocks of two observers may be apart: what the simulation holds for, and four times what NTP keeps."""
LEASE_MARGIN_PART = 0.1

_NOT_SETTINGS = frozenset({"S3QUEUE_URL", "S3QUEUE_ENCRYPTION_KEYS"})
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_NONE = frozenset({"", "none", "null"})


def seconds(name: str, value: float | timedelta) -> float:
    """Turn a duration into seconds. Raises InvalidSettings when it is none."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidSettings(
            f"{name} must be seconds (a number) or a timedelta, not {value!r} ({type(value).__name__})."
        )
    if not math.isfinite(value):
        raise InvalidSettings(f"{name} must be a finite number of seconds, not {value!r}.")
    return float(value)


def whole_number(name: str, value: Any, low: int, high: int) -> int:
    """A checked argument. Raises InvalidSettings when it is no whole number in the range."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidSettings(f"{name}={value!r} must be a whole number, {low} to {high}.")
    return value


class _Range(msgspec.Struct, frozen=True):
    low: float
    high: float
    optional: bool = False
    whole: bool = False
    unit: str = "seconds"

    def check(self, name: str, value: Any) -> float | int | None:
        if value is None and self.optional:
            return None
        allowed = f"{self.low:g} to {self.high:g} {self.unit}" + (", or None" if self.optional else "")
        if self.whole:
            if isinstance(value, bool) or not isinstance(value, int):
                raise InvalidSettings(f"{name}={value!r} must be a whole number, {allowed}.")
            number: float | int = value
        else:
            number = seconds(name, value)
        if not self.low <= number <= self.high:
            raise InvalidSettings(f"{name}={value!r} is out of range: {allowed}.")
        return number


_HOUR = 3600.0
_DAY = 24 * _HOUR
_YEAR = 365 * _DAY

RANGES: Mapping[str, _Range] = {
    "visibility_timeout": _Range(0.3, 12 * _HOUR),
    "heartbeat_interval": _Range(0.05, 6 * _HOUR),
    "poll_interval": _Range(0.005, _HOUR),
    "max_poll_interval": _Range(0.005, _HOUR),
    "max_attempts": _Range(1, 10_000, whole=True, unit="attempts"),
    "backoff_base": _Range(0, _DAY),
    "backoff_max": _Range(0, 365 * _DAY),
    "backoff_jitter": _Range(0, 1, unit="(a part of the delay)"),
    "handler_timeout": _Range(0.001, 30 * _DAY, optional=True),
    "segment_messages_max": _Range(1, SEGMENT_MESSAGES_LIMIT, whole=True, unit="messages"),
    "segment_bytes_max": _Range(KIB, 1024 * MIB, whole=True, unit="bytes"),
    "message_bytes_max": _Range(1, 1024 * MIB, whole=True, unit="bytes"),
    "max_pending": _Range(1, 1e15, optional=True, whole=True, unit="messages"),
    "split_after": _Range(0.05, 12 * _HOUR, optional=True),
    "retain_completed": _Range(1, 10 * _YEAR, optional=True),
    "dedup_window": _Range(1, _YEAR),
    "segment_age": _Range(1, 60),
    "claim_linger": _Range(3, 600),
    "checkpoint_interval": _Range(0.05, _HOUR),
    "election_interval": _Range(0.1, _HOUR),
    "term_duration": _Range(1, 30 * _DAY),
    "dispatch_interval": _Range(0.01, 60),
    "ticket_batch": _Range(1, 100_000, whole=True, unit="tickets"),
    "ticket_ttl": _Range(1, _DAY),
    "drain_timeout": _Range(0, _DAY),
    "metrics_interval": _Range(0.1, _DAY),
}
"""The allowed range of each setting that is a number."""

CHOICES: Mapping[str, tuple[str | None, ...]] = {"compression": (None, "zstd")}
"""The allowed values of each setting that is a name."""


class _NamesFirst(msgspec.StructMeta):
    """Answers an unknown name with the nearest one instead of a bare TypeError."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        for name in values:
            _require_name(name)
        return super().__call__(*args, **values)


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=_NamesFirst):
    """How a queue behaves; durations are seconds or ``timedelta``, sizes are bytes.

    Raises:
        InvalidSettings: A value is out of its range, or two do not go together; the text names both.
        UnknownSetting: There is no setting of that name; the text names the nearest.

    See docs/configuration.md for what each one means and when to change it.
    """

    visibility_timeout: float = 30
    heartbeat_interval: float = 10
    poll_interval: float = 0.1
    max_poll_interval: float = 5
    max_attempts: int = 3
    backoff_base: float = 1
    backoff_max: float = 300
    backoff_jitter: float = 0.1
    handler_timeout: float | None = None
    segment_messages_max: int = 256
    segment_bytes_max: int = 4 * MIB
    message_bytes_max: int = 64 * MIB
    max_pending: int | None = None
    split_after: float | None = 2
    retain_completed: float | None = None
    dedup_window: float = 300
    segment_age: float = 5
    claim_linger: float = 10
    checkpoint_interval: float = 5
    coordinator: bool = True
    election_interval: float = 5
    term_duration: float = 300
    dispatch_interval: float = 0.1
    ticket_batch: int = 1000
    ticket_ttl: float = 30
    drain_timeout: float = 30
    metrics_interval: float = 10
    compression: str | None = None

    def __post_init__(self) -> None:
        for name, allowed in RANGES.items():
            checked = allowed.check(name, getattr(self, name))
            msgspec.structs.force_setattr(self, name, checked)
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InvalidSettings(f"{name}={getattr(self, name)!r} must be one of: {_listed(choices)}.")
        if not isinstance(self.coordinator, bool):
            raise InvalidSettings(f"coordinator={self.coordinator!r} must be True or False.")
        if self.heartbeat_interval > self.visibility_timeout / 2:
            raise InvalidSettings(
                f"heartbeat_interval={self.heartbeat_interval:g} is not well below "
                f"visibility_timeout={self.visibility_timeout:g}: it may be at most half of it "
                f"({self.visibility_timeout / 2:g} seconds).",
                suggestion="Use a third of the visibility timeout, so that one lost heartbeat costs nothing.",
            )
        if self.poll_interval > self.max_poll_interval:
            raise InvalidSettings(
                f"poll_interval={self.poll_interval:g} is above max_poll_interval={self.max_poll_interval:g}.",
                suggestion="Lower poll_interval or raise max_poll_interval.",
            )
        if self.claim_linger < self.segment_age + 2:
            raise InvalidSettings(
                f"claim_linger={self.claim_linger:g} is not well above segment_age={self.segment_age:g}: "
                "it must be at least 2 seconds longer.",
                suggestion="Otherwise nobody could tell a segment that was never written from one that was handled.",
            )
        if self.backoff_base > self.backoff_max:
            raise InvalidSettings(
                f"backoff_base={self.backoff_base:g} is above backoff_max={self.backoff_max:g}.",
                suggestion="Lower backoff_base or raise backoff_max.",
            )

    @property
    def lease_margin(self) -> float:
        """Seconds by which a holder stops earlier, and a taker waits longer, than the lease says."""
        return min(LEASE_MARGIN_MAX_S, LEASE_MARGIN_PART * self.visibility_timeout)

    @property
    def claim_trust(self) -> float:
        """Seconds after the request that showed a segment in which a fresh claim needs no second look."""
        return self.claim_linger - min(LEASE_MARGIN_MAX_S, 0.2 * self.claim_linger)

    def with_environment(self, environment: Mapping[str, str] | None = None) -> Self:
        """These settings, with every ``S3QUEUE_<NAME>`` of the environment put over those left at their default.

        Raises:
            UnknownSetting: A variable names no setting.
            InvalidSettings: A variable's text is no value of its setting.
        """
        found: dict[str, Any] = {}
        defaults = _DEFAULTS
        for variable, text in (os.environ if environment is None else environment).items():
            if not variable.startswith(ENVIRONMENT_PREFIX) or variable in _NOT_SETTINGS:
                continue
            name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
            _require_name(name, shown=variable)
            if getattr(self, name) == defaults[name]:
                found[name] = _from_text(name, variable, text)
        return msgspec.structs.replace(self, **found) if found else self


_DEFAULTS: Mapping[str, Any] = {field.name: field.default for field in msgspec.structs.fields(Settings)}


def _require_name(name: str, *, shown: str | None = None) -> None:
    if name in _DEFAULTS:
        return
    near = difflib.get_close_matches(name, _DEFAULTS, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(sorted(_DEFAULTS))}."
    raise UnknownSetting(f"There is no setting {shown or name!r}.", suggestion=hint)


def _listed(choices: tuple[str | None, ...]) -> str:
    return ", ".join(repr(choice) for choice in choices)


def _from_text(name: str, variable: str, text: str) -> Any:
    folded = text.strip().lower()
    if name in CHOICES:
        choice = None if folded in _NONE else folded
        if choice not in CHOICES[name]:
            raise InvalidSettings(f"{variable}={text!r} must be one of: {_listed(CHOICES[name])}.")
        return choice
    if name == "coordinator":
        if folded in _TRUE or folded in _FALSE:
            return folded in _TRUE
        raise InvalidSettings(f"{variable}={text!r} must be true or false.")
    allowed = RANGES[name]
    if folded in _NONE and allowed.optional:
        return None
    convert: Callable[[str], float] = int if allowed.whole else float
    try:
        return convert(folded)
    except ValueError:
        kind = "a whole number" if allowed.whole else "a number of seconds"
        raise InvalidSettings(
            f"{variable}={text!r} must be {kind}, {allowed.low:g} to {allowed.high:g} {allowed.unit}."
        ) from None
