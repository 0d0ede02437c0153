"""Messages to bytes and back: a segment is a fixed head, an index of its messages, then the payloads.

The head tells how long the index is, so that the index alone can be read by range; both parts carry a checksum,
so that damage is found before a handler sees it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import msgspec

from s3queue_async.errors import CorruptObject, NewerFormat

MAGIC = b"S3QS"
FORMAT_VERSION = 1
HEAD = struct.Struct(">4sBBHIIII")
"""Magic, version, flags, envelope length, index length, index CRC-32, payload length, payload CRC-32.

Flags and an envelope are what ``wrapping`` has: here both are 0.
"""

INDEX_GUESS_BYTES = 64 * 1024
"""How much a first read by range asks for: the head and the index of a few hundred messages."""


class Codec(IntEnum):
    """How one payload became bytes."""

    MSGPACK = 0
    RAW = 1


class Failure(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Why a message's last attempt did not succeed.

    Attributes:
        reason: One line for people: the exception's class and text, or the reason given.
        traceback: The end of the traceback; "" when there was no exception.
        at_ms: When, store time.
    """

    reason: str
    traceback: str = ""
    at_ms: int = 0


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One message in a segment's index.

    Attributes:
        id: The message's id, the same in every segment that it moves through.
        enqueued_ms: Store time of the enqueue.
        length: Bytes of the encoded payload.
        codec: How the payload was encoded.
        attempts: Attempts used up before this segment.
        deliveries: Claims granted before this segment; what the fencing token grows from.
        max_attempts: The message's own limit, or None for the queue's.
        expires_ms: Store time after which it is not started any more, or None.
        dedup_id: The producer's deduplication id, or None.
        headers: The producer's headers.
        failure: Of the last attempt, if one failed.
        suspect: Whether it may have been running when a worker was lost; such a message runs alone.
    """

    id: str
    enqueued_ms: int
    length: int
    codec: int = Codec.MSGPACK
    attempts: int = 0
    deliveries: int = 0
    max_attempts: int | None = None
    expires_ms: int | None = None
    dedup_id: str | None = None
    headers: dict[str, str] | None = None
    failure: Failure | None = None
    suspect: bool = False


class Index(msgspec.Struct, frozen=True):
    """What a segment says about its messages.

    Attributes:
        records: One for each message, in payload order.
        priority: Of all its messages.
        parent: The key of the segment that these messages were moved out of, if any; their claim there names the move.
    """

    records: list[Record]
    priority: int
    parent: str | None = None


class Segment(msgspec.Struct, frozen=True):
    """A segment as it was read."""

    index: Index
    payloads: list[bytes]


_index_encoder = msgspec.msgpack.Encoder()
_index_decoder = msgspec.msgpack.Decoder(Index)


def encode(index: Index, payloads: Sequence[bytes]) -> bytes:
    """The bytes of a segment that is neither compressed nor encrypted."""
    return assemble(encode_index(index), b"".join(payloads))


def assemble(table: bytes, body: bytes) -> bytes:
    """The same from the bytes of the index and of all payloads together."""
    head = HEAD.pack(MAGIC, FORMAT_VERSION, 0, 0, len(table), zlib.crc32(table), len(body), zlib.crc32(body))
    return b"".join((head, table, body))


def encode_index(index: Index) -> bytes:
    """The bytes of an index."""
    return _index_encoder.encode(index)


def _head(key: str, body: bytes) -> tuple[int, int, int, int]:
    if len(body) < HEAD.size:
        raise CorruptObject(key, f"{len(body)} bytes are too few for a segment")
    magic, version, flags, reserved, index_length, index_crc, length, crc = HEAD.unpack_from(body)
    if magic != MAGIC:
        raise CorruptObject(key, "does not start like a segment")
    if version > FORMAT_VERSION or flags:
        raise NewerFormat(
            key, f"has format version {version}, flags {flags}; this library reads version {FORMAT_VERSION}"
        )
    if version < 1 or reserved:
        raise CorruptObject(key, "the head is damaged")
    return index_length, index_crc, length, crc


def index_end(key: str, head: bytes) -> int:
    """How many bytes from the start of the object hold its head and index."""
    return HEAD.size + _head(key, head)[0]


def decode_index(key: str, body: bytes) -> Index:
    """Read the index from the first bytes of a segment (at least ``index_end`` of them).

    Raises:
        CorruptObject: The bytes are not a segment or are damaged.
        NewerFormat: A newer version of this library wrote it.
    """
    index_length, index_crc, length, _ = _head(key, body)
    table = body[HEAD.size : HEAD.size + index_length]
    if len(table) < index_length or zlib.crc32(table) != index_crc:
        raise CorruptObject(key, "the index is damaged")
    return read_index(key, table, length)


def read_index(key: str, table: bytes, length: int | None = None) -> Index:
    """Read the bytes of an index.

    Args:
        key: The segment's.
        table: The bytes.
        length: Of all payloads together; None when it is not known yet.

    Raises:
        CorruptObject: They are none, or do not fit the payloads.
    """
    try:
        index: Index = _index_decoder.decode(table)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CorruptObject(key, f"the index cannot be read ({error})") from error
    lengths = [record.length for record in index.records]
    if (length is not None and sum(lengths) != length) or any(each < 0 for each in lengths):
        raise CorruptObject(key, "the index does not fit the payloads")
    return index


def decode(key: str, body: bytes) -> Segment:
    """Read a whole segment; the errors are those of ``decode_index``."""
    index = decode_index(key, body)
    start, _, length, crc = _head(key, body)
    offset = HEAD.size + start
    part = memoryview(body)[offset:]
    if len(part) != length or zlib.crc32(part) != crc:
        raise CorruptObject(key, "the payloads are damaged")
    return split(index, body, offset)


def split(index: Index, body: bytes, offset: int = 0) -> Segment:
    """A segment from its index and the payloads, which begin at ``offset``."""
    payloads = []
    for record in index.records:
        payloads.append(body[offset : offset + record.length])
        offset += record.length
    return Segment(index, payloads)


def is_void(created_ms: int, modified_s: float, segment_age_s: float) -> bool:
    """Whether a segment landed too late to count.

    Listings and reads give LastModified with different resolutions, so whole seconds decide: every observer
    must come to the same answer for ever.
    """
    return int(modified_s) - created_ms / 1000 > segment_age_s


def encode_payload(payload: Any, encoder: msgspec.msgpack.Encoder) -> tuple[bytes, Codec]:
    """A payload's bytes: ``bytes`` as they are, everything else as msgpack."""
    if isinstance(payload, bytes):
        return payload, Codec.RAW
    if isinstance(payload, bytearray | memoryview):
        return bytes(payload), Codec.RAW
    return encoder.encode(payload), Codec.MSGPACK
