"""What taskiq's labels mean to the queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from s3queue_async.errors import InvalidPriority, InvalidSettings
from s3queue_async.settings import seconds, whole_number

REPEATED_BY = ("_retries", "X-Taskiq-requeue")
"""Labels that count how often taskiq sent a task again: by its retry middlewares, and by ``Context.requeue``."""


def enqueue_options(labels: Mapping[str, Any]) -> dict[str, Any]:
    """How a message with these labels is to be enqueued.

    The labels are ``delay`` and ``priority``, as taskiq's conventions for brokers have them, and ``max_attempts``,
    ``expires_in`` and ``dedup_id``, as in ``S3Queue.enqueue``.

    Args:
        labels: As taskiq hands them to a broker; numbers may have become text by then.

    Raises:
        InvalidSettings, InvalidPriority: A label is no such value.
    """
    options: dict[str, Any] = {}
    for name in ("delay", "expires_in"):
        if (value := labels.get(name)) is not None:
            options[name] = seconds(name, _number(name, value))
    if (value := labels.get("priority")) is not None:
        try:
            options["priority"] = _whole(value)
        except ValueError:
            raise InvalidPriority(f"The label priority={value!r} is no whole number.") from None
    if (value := labels.get("max_attempts")) is not None:
        try:
            options["max_attempts"] = whole_number("max_attempts", _whole(value), 1, 10_000)
        except ValueError:
            raise InvalidSettings(f"The label max_attempts={value!r} must be a whole number, 1 to 10000.") from None
    if (value := labels.get("dedup_id")) is not None:
        # A task that taskiq sends again is not the one that was enqueued already.
        again = [f"{name}={labels[name]}" for name in REPEATED_BY if labels.get(name) is not None]
        options["dedup_id"] = " ".join([str(value), *again])
    return options


def _number(name: str, value: Any) -> float:
    try:
        return value if isinstance(value, int | float) and not isinstance(value, bool) else float(str(value))
    except ValueError:
        raise InvalidSettings(f"The label {name}={value!r} must be a number of seconds.") from None


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else int(str(value))
