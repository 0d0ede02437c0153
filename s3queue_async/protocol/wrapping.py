"""What stands around bytes that went through compression or encryption: flags in the head, and an envelope behind it.

The head is that of a plain segment, its lengths and checksums those of the bytes as they are stored. So damage is found
without a key, and an index can still be read alone. A library that knows no flags refuses what has one.
"""

from __future__ import annotations

import struct
import zlib
from enum import Enum, IntFlag

import msgspec

from s3queue_async.errors import CorruptObject, NewerFormat
from s3queue_async.protocol.segment import FORMAT_VERSION, HEAD, MAGIC

_CRC = struct.Struct(">I")


class Kind(Enum):
    """What is wrapped; the first bytes say it."""

    SEGMENT = MAGIC
    HISTORY = b"S3QH"
    FAILURES = b"S3QF"


class Flag(IntFlag):
    """What was done to the bytes."""

    INDEX_COMPRESSED = 1
    PAYLOADS_COMPRESSED = 2
    ENCRYPTED = 4


KNOWN = int(Flag.INDEX_COMPRESSED | Flag.PAYLOADS_COMPRESSED | Flag.ENCRYPTED)


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """What a reader needs to find the key; empty where nothing is encrypted.

    Attributes:
        key_id: The id of the key.
        queue: The nonce of the queue's ``queue.json``.
        salt: From which this object's own key is derived.
        commitment: Tells whether that is the right key.
    """

    key_id: str = ""
    queue: str = ""
    salt: bytes = b""
    commitment: bytes = b""


class Wrapped(msgspec.Struct, frozen=True):
    """Wrapped bytes as they were read.

    Attributes:
        flags: What was done to them.
        envelope: Who can read them.
        index: The index as stored; empty where there is none.
        payloads: The payloads, or whatever it is, as stored; empty where only the index was read.
    """

    flags: Flag
    envelope: Envelope
    index: bytes
    payloads: bytes


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Envelope)


def wrap(kind: Kind, flags: Flag, envelope: Envelope, index: bytes, payloads: bytes) -> bytes:
    """The bytes of an object.

    Args:
        kind: What it is.
        flags: What was done to the two parts; at least one.
        envelope: Who can read them.
        index: What can be read alone.
        payloads: The rest.
    """
    inner = _encoder.encode(envelope) if flags & Flag.ENCRYPTED else b""
    head = HEAD.pack(
        kind.value,
        FORMAT_VERSION,
        flags,
        _CRC.size + len(inner),
        len(index),
        zlib.crc32(index),
        len(payloads),
        zlib.crc32(payloads),
    )
    return b"".join((head, _CRC.pack(zlib.crc32(inner, zlib.crc32(head))), inner, index, payloads))


def is_wrapped(kind: Kind, body: bytes) -> bool:
    """Whether bytes are of this kind and have flags; unknown ones, too, and the rest may be damaged."""
    return len(body) >= HEAD.size and body[:4] == kind.value and body[4] == FORMAT_VERSION and body[5] != 0


def index_end(body: bytes) -> int:
    """How many bytes from the start of a wrapped object hold all but its payloads."""
    _, _, _, envelope_length, index_length, _, _, _ = HEAD.unpack_from(body)
    end: int = HEAD.size + envelope_length + index_length
    return end


def peek(key: str, body: bytes) -> tuple[Flag, Envelope]:
    """Read the flags and the envelope from the first bytes of a wrapped object.

    Raises:
        CorruptObject: They are damaged, or not all there.
        NewerFormat: There is a flag that this version does not know.
    """
    _, version, flags, envelope_length, *_ = HEAD.unpack_from(body)
    if flags & ~KNOWN:
        raise NewerFormat(key, f"has format version {version}, flags {flags}; this library reads flags up to {KNOWN}")
    inner = body[HEAD.size + _CRC.size : HEAD.size + envelope_length]
    if len(inner) + _CRC.size != envelope_length:
        raise CorruptObject(key, "the head is damaged")
    (crc,) = _CRC.unpack_from(body, HEAD.size)
    if zlib.crc32(inner, zlib.crc32(body[: HEAD.size])) != crc:
        raise CorruptObject(key, "the head is damaged")
    if not flags & Flag.ENCRYPTED:
        return Flag(flags), Envelope()
    try:
        return Flag(flags), _decoder.decode(inner)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CorruptObject(key, f"the envelope cannot be read ({error})") from error


def unwrap(key: str, body: bytes, *, whole: bool = True) -> Wrapped:
    """Read a wrapped object.

    Args:
        key: Its key.
        body: Its bytes; without ``whole`` at least ``index_end`` of them.
        whole: Whether the payloads are wanted, too.

    Raises:
        CorruptObject: They are damaged.
        NewerFormat: There is a flag that this version does not know.
    """
    flags, envelope = peek(key, body)
    _, _, _, envelope_length, index_length, index_crc, length, crc = HEAD.unpack_from(body)
    start = HEAD.size + envelope_length
    index = body[start : start + index_length]
    if len(index) != index_length or zlib.crc32(index) != index_crc:
        raise CorruptObject(key, "the index is damaged")
    if not whole:
        return Wrapped(flags, envelope, index, b"")
    payloads = body[start + index_length :]
    if len(payloads) != length or zlib.crc32(payloads) != crc:
        raise CorruptObject(key, "the payloads are damaged")
    return Wrapped(flags, envelope, index, payloads)


def bound_to(kind: Kind, key: str, flags: Flag, envelope: Envelope) -> bytes:
    """What a ciphertext is bound to: put under another key, into another queue, or under other flags, it is refused."""
    return _encoder.encode([kind.value, FORMAT_VERSION, int(flags), envelope.queue, key, envelope.key_id])
