"""What producers pass in, checked before anything is written: payloads, priorities, times, headers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec

from s3queue_async.engine.producer import Entry, Options
from s3queue_async.engine.shared import StoreTime
from s3queue_async.errors import InvalidPayload, InvalidPriority, InvalidSettings, MessageTooLarge
from s3queue_async.protocol import layout
from s3queue_async.protocol.segment import Codec, encode_payload
from s3queue_async.settings import SEGMENT_MESSAGES_LIMIT, seconds, whole_number
from s3queue_async.worker import Decoder

DELAY_MAX_S = 10 * 365 * 24 * 3600.0
DUE_GRAIN_MS = 100
"""Delays are rounded up to this, so that messages enqueued together with one delay share a segment."""
DEDUP_ID_BYTES_MAX = 1024
HEADERS_BYTES_MAX = 16 * 1024


class Intake:
    """Turns what producers pass in into entries of a batch.

    Args:
        payload_type: What payloads must be.
        decode: Decodes to that type, which checks what ``isinstance`` does not see.
        time: The store's time.
        message_bytes_max: The largest encoded payload.
    """

    def __init__(self, payload_type: Any, decode: Decoder, time: StoreTime, message_bytes_max: int) -> None:
        self._payload_type = payload_type
        self._decode = decode
        self._time = time
        self._message_bytes_max = message_bytes_max
        self._encoder = msgspec.msgpack.Encoder()
        # A mapping decodes to a Struct just as well; passing one is a mistake all the same. Built-in types are left
        # to the decoder, which knows that an int is a fine float.
        is_class = isinstance(payload_type, type) and payload_type is not Any
        self._instances_only = is_class and payload_type.__module__ != "builtins"

    def options(
        self,
        priority: int,
        headers: Mapping[str, str] | None,
        max_attempts: int | None,
        expires_in: float | timedelta | None,
    ) -> Options:
        """What is the same for all messages of one call, checked."""
        _check_priority(priority)
        if max_attempts is not None:
            whole_number("max_attempts", max_attempts, 1, 10_000)
        expires_ms = None
        if expires_in is not None:
            expires_s = seconds("expires_in", expires_in)
            if not 0 < expires_s <= DELAY_MAX_S:
                raise InvalidSettings(f"expires_in={expires_in!r} is out of range: above 0, up to ten years.")
            expires_ms = self._time.now_ms() + int(expires_s * 1000)
        return Options(max_attempts, expires_ms, _checked_headers(headers))

    def entry(self, payload: Any, options: Options, dedup_id: str | None = None) -> Entry:
        """A message ready to be written, its payload checked and encoded."""
        kind = self._payload_type
        if self._instances_only and not isinstance(payload, kind):
            raise InvalidPayload(
                f"The payload is a {type(payload).__name__}, not a {kind.__name__}: {_shown(payload)}."
            )
        try:
            body, codec = encode_payload(payload, self._encoder)
            if kind is not Any:
                if codec == Codec.RAW:
                    msgspec.convert(body, kind)
                else:
                    self._decode(body, codec)
        except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError) as error:
            raise InvalidPayload(
                f"The payload cannot be enqueued: {error} ({_shown(payload)}).",
                suggestion="Pass what msgspec encodes (numbers, text, bytes, lists, dicts, dataclasses, Structs), "
                "of the queue's payload_type.",
            ) from error
        if len(body) > self._message_bytes_max:
            raise MessageTooLarge(
                f"The payload has {len(body):,} bytes; message_bytes_max allows {self._message_bytes_max:,}."
            )
        return Entry(body, codec, options, None if dedup_id is None else checked_dedup_id(dedup_id))

    def due_ms(self, delay: float | timedelta | None, deliver_at: datetime | None) -> int:
        if delay is not None and deliver_at is not None:
            raise InvalidSettings("delay and deliver_at exclude each other.", suggestion="Pass one of them.")
        now_ms = self._time.now_ms()
        if deliver_at is not None:
            if not isinstance(deliver_at, datetime):
                raise InvalidSettings(f"deliver_at={deliver_at!r} must be an aware datetime.")
            if deliver_at.tzinfo is None or deliver_at.utcoffset() is None:
                raise InvalidSettings(
                    f"deliver_at={deliver_at!r} is naive: it does not say in which time zone.",
                    suggestion="Use an aware datetime, e.g. datetime.now(UTC) + timedelta(minutes=5).",
                )
            due_ms = int(deliver_at.astimezone(UTC).timestamp() * 1000)
        elif delay is not None:
            delay_s = seconds("delay", delay)
            if not 0 <= delay_s <= DELAY_MAX_S:
                raise InvalidSettings(f"delay={delay!r} is out of range: 0 to {DELAY_MAX_S:,.0f} seconds (ten years).")
            # One more, for what was cut off from the time: never before its delay is over.
            due_ms = now_ms + int(delay_s * 1000) + 1 if delay_s > 0 else now_ms
        else:
            return 0
        if due_ms > now_ms + DELAY_MAX_S * 1000:
            raise InvalidSettings(f"deliver_at={deliver_at!r} is out of range: it may be up to ten years ahead.")
        return -(-due_ms // DUE_GRAIN_MS) * DUE_GRAIN_MS if due_ms > now_ms else 0


def _check_priority(priority: Any) -> None:
    if isinstance(priority, bool) or not isinstance(priority, int) or not 0 <= priority <= layout.PRIORITY_MAX:
        raise InvalidPriority(f"priority={priority!r} is out of range.")


def checked_dedup_id(dedup_id: Any) -> str:
    """The id, if it is one. Raises InvalidSettings otherwise."""
    if not isinstance(dedup_id, str) or not dedup_id or len(dedup_id.encode()) > DEDUP_ID_BYTES_MAX:
        raise InvalidSettings(f"dedup_id={dedup_id!r} must be text of 1 to {DEDUP_ID_BYTES_MAX} bytes.")
    return dedup_id


def _checked_headers(headers: Mapping[Any, Any] | None) -> dict[str, str] | None:
    if not headers:
        return None
    size = 0
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str):
            raise InvalidSettings(f"headers must map text to text, not {name!r} to {value!r}.")
        size += len(name.encode()) + len(value.encode())
    if size > HEADERS_BYTES_MAX:
        raise InvalidSettings(f"headers have {size:,} bytes; at most {HEADERS_BYTES_MAX:,} are allowed.")
    return dict(headers)


def _shown(payload: Any) -> str:
    text = repr(payload)
    return text if len(text) <= 80 else text[:77] + "..."


assert SEGMENT_MESSAGES_LIMIT <= 0xFFFF, "a message id has four hexadecimal digits for the index"
