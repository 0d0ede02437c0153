"""What a test's queue was given, and assertions on it whose failures say what is different."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, TypedDict

import msgspec

SHOWN_MAX = 3
"""Messages that a failed assertion shows in full: those that are nearest to what was expected."""
LINE_MAX = 200


class Enqueued(msgspec.Struct, frozen=True, kw_only=True):
    """One message as it was given to ``enqueue`` or ``enqueue_many``.

    Attributes:
        id: What ``enqueue`` returned.
        payload: The payload itself, not a copy.
        priority: 0..255.
        delay: Seconds; None when there was none.
        deliver_at: The point in time; None when there was none.
        dedup_id: Its deduplication id; None without one.
        headers: What goes along with it.
        max_attempts: None: the queue's.
        expires_in: Seconds; None when there was none.
    """

    id: str
    payload: Any
    priority: int = 0
    delay: float | None = None
    deliver_at: datetime | None = None
    dedup_id: str | None = None
    headers: Mapping[str, str] = {}
    max_attempts: int | None = None
    expires_in: float | None = None


class Fields(TypedDict, total=False):
    """The fields by which an assertion tells messages apart."""

    payload: Any
    priority: Any
    delay: Any
    deliver_at: Any
    dedup_id: Any
    headers: Any
    max_attempts: Any
    expires_in: Any


def normal(expected: Fields) -> dict[str, Any]:
    """What is expected, durations in seconds. Raises TypeError for a field that there is not."""
    wanted: dict[str, Any] = {}
    for name, value in expected.items():
        if name not in Fields.__annotations__:
            raise TypeError(f"there is no field {name!r}; there are: {', '.join(Fields.__annotations__)}")
        wanted[name] = value.total_seconds() if isinstance(value, timedelta) else value
    return wanted


def matching(messages: Iterable[Enqueued], expected: Mapping[str, Any]) -> list[Enqueued]:
    """The messages all of whose named fields are equal to what is expected."""
    return [message for message in messages if all(getattr(message, name) == value for name, value in expected.items())]


def unwanted(messages: Sequence[Enqueued], described: Mapping[str, Any]) -> str:
    """What was enqueued although it should not be."""
    what = "".join(f"\n  {name} = {_shown(value)}" for name, value in described.items())
    lines = [f"No message should be enqueued{' with' if what else ''}{what}", f"but {len(messages):,} were:"]
    lines += [f"- {message.id}: {_shown(message.payload)}" for message in messages[:SHOWN_MAX]]
    if len(messages) > SHOWN_MAX:
        lines.append(f"- and {len(messages) - SHOWN_MAX:,} more")
    return "\n".join(lines)


def explanation(messages: Sequence[Enqueued], expected: Mapping[str, Any], headline: str) -> str:
    """Why no message, or another number of them, is as expected: the nearest ones, field by field."""
    if not expected:
        headline = headline.removesuffix(" with")
    lines = [headline, *(f"  {name} = {_shown(value)}" for name, value in expected.items())]
    if not messages:
        return "\n".join([*lines, "Nothing was enqueued at all."])
    found = [(list(_message_differences(message, expected)), message) for message in messages]
    found.sort(key=lambda pair: len(pair[0]))
    count = len(messages)
    lines.append(f"{count} {'message was' if count == 1 else 'messages were'} enqueued; the nearest:")
    for differences, message in found[:SHOWN_MAX]:
        lines.append(f"- {message.id}: " + ("as expected" if not differences else "different in"))
        lines += [f"    {line}" for line in differences]
    if count > SHOWN_MAX:
        lines.append(f"- and {count - SHOWN_MAX:,} more")
    return "\n".join(lines)


def _message_differences(message: Enqueued, expected: Mapping[str, Any]) -> Iterator[str]:
    for name, value in expected.items():
        yield from differences(value, getattr(message, name), name)


def differences(expected: Any, actual: Any, path: str) -> Iterator[str]:
    """Where two values differ, a line for each place: ``payload.to: 'b', expected 'a'``."""
    if expected == actual:
        return
    wanted, found = _fields(expected), _fields(actual)
    same_kind = type(expected) is type(actual) or (isinstance(expected, Mapping) and isinstance(actual, Mapping))
    if wanted is None or found is None or not same_kind:
        yield f"{path}: {_shown(actual)}, expected {_shown(expected)}"
        return
    before = False
    for step, value in wanted.items():
        place = path + step
        if step not in found:
            yield f"{place}: missing, expected {_shown(value)}"
            before = True
            continue
        for line in differences(value, found[step], place):
            yield line
            before = True
    for step, value in found.items():
        if step not in wanted:
            yield f"{path}{step}: {_shown(value)}, not expected"
            before = True
    if not before:
        # Equal part by part, and yet not equal: their own comparison says so.
        yield f"{path}: {_shown(actual)}, expected {_shown(expected)}"


def _fields(value: Any) -> dict[str, Any] | None:
    """The parts of a value by how one gets at each; None for what has no parts."""
    if isinstance(value, msgspec.Struct):
        return {f".{name}": getattr(value, name) for name in value.__struct_fields__}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f".{field.name}": getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {f"[{name!r}]": part for name, part in value.items()}
    if isinstance(value, list | tuple):
        return {f"[{place}]": part for place, part in enumerate(value)}
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LINE_MAX else f"{text[: LINE_MAX - 3]}..."
