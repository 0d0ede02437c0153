"""The way of messages into the store and back: segments, histories and failures are compressed and encrypted here.

Without a keyring and without compression, what is written is byte for byte what ``protocol.segment`` makes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import anyio.to_thread
import msgspec

from s3queue_async.engine.worth import PAYS_BELOW, Worth, compressed, smaller
from s3queue_async.errors import (
    CorruptObject,
    DecryptionFailed,
    ExtraMissing,
    InvalidSettings,
    KeyUnavailable,
    PlaintextRefused,
    Unreadable,
)
from s3queue_async.keyring import Keyring
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol import wrapping
from s3queue_async.protocol.claim import Claim
from s3queue_async.protocol.segment import Failure, Index, Segment
from s3queue_async.protocol.wrapping import Envelope, Flag, Kind, Wrapped

if TYPE_CHECKING:
    from s3queue_async import encryption

COMPRESSION_HINT = "pip install 's3queue-async[zstd]'"
THREAD_FROM_BYTES = 512 * 1024
"""From this size on a segment is packed in a thread: below, that takes less than a millisecond."""
INDEX_BYTES_MAX = 160 * 1024 * 1024
"""More than the index of 4,096 messages can have: headers, an id, a traceback and a name each."""
PAYLOAD_BYTES_MAX = 4 * 1024 * 1024 * 1024


class _Work(msgspec.Struct, frozen=True):
    body: bytes
    before: int
    ratio: float | None


class Packer:
    """Turns segments into what is stored, and back.

    Args:
        compression: "zstd", or None.
        keyring: The keys; None: nothing is encrypted.
        payload_bytes_max: The most that a segment's payloads may have once they are decompressed.
        monotonic: Local time, to measure what it takes; called in the event loop only.

    Attributes:
        queue: The nonce of ``queue.json``, to which ciphertexts are bound; set as the queue is opened.
        bytes_before: Of all segments that were packed, as they would be without compression and encryption.
        bytes_stored: Of the same segments, as they were stored.
        seconds: Spent on the compression and encryption of segments, both ways.

    Raises:
        InvalidSettings: The package for compression is not installed.
    """

    def __init__(
        self,
        *,
        compression: str | None = None,
        keyring: Keyring | None = None,
        payload_bytes_max: int = PAYLOAD_BYTES_MAX,
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        if compression is not None:
            try:
                compressed(b"")
            except ImportError as error:
                raise InvalidSettings(
                    f"compression={compression!r} needs the extra 'zstd' ({error}).",
                    suggestion=f"{COMPRESSION_HINT}, here and for every worker of the queue.",
                ) from error
        if keyring is not None and not isinstance(keyring, Keyring):
            raise InvalidSettings(
                f"keyring must be a Keyring, not a {type(keyring).__name__}.", suggestion="Pass Keyring({id: key})."
            )
        self._compresses = compression is not None
        self._keyring = keyring
        self._payload_bytes_max = payload_bytes_max
        self._monotonic = monotonic or (lambda: 0.0)
        self._worth = Worth()
        self.queue = ""
        self.bytes_before = 0
        self.bytes_stored = 0
        self.seconds = 0.0

    # -- segments ------------------------------------------------------------------------------------------------

    async def pack(self, key: str, segment: Segment) -> bytes:
        """The bytes of a segment that is to be stored under this key."""
        if self._keyring is None and not self._compresses:
            return segments.encode(segment.index, segment.payloads)
        began = self._monotonic()
        size = sum(record.length for record in segment.index.records)
        compress = self._compresses and self._worth.decide(segment.payloads, size)
        if size < THREAD_FROM_BYTES or not (compress or self._keyring):
            work = self._pack(key, segment, compress)
        else:
            work = await anyio.to_thread.run_sync(self._pack, key, segment, compress)
        if work.ratio is not None:
            self._worth.learn(work.ratio)
        self.seconds += self._monotonic() - began
        self.bytes_before += work.before
        self.bytes_stored += len(work.body)
        return work.body

    async def unpack(self, key: str, body: bytes) -> Segment:
        """Read a whole segment.

        Raises:
            CorruptObject: It is none, is damaged, or was tampered with.
            NewerFormat: A newer version of this library wrote it.
            Unreadable: This process lacks what it takes; others may have it.
        """
        if not wrapping.is_wrapped(Kind.SEGMENT, body):
            segment = segments.decode(key, body)
            self._require_encrypted(key)
            return segment
        began = self._monotonic()
        if len(body) < THREAD_FROM_BYTES:
            segment = self._unpack(key, body)
        else:
            segment = await anyio.to_thread.run_sync(self._unpack, key, body)
        self.seconds += self._monotonic() - began
        return segment

    @staticmethod
    def index_end(key: str, head: bytes) -> int:
        """How many bytes from the start of a segment hold its head and index, by its first bytes; raises as ``unpack``."""
        if not wrapping.is_wrapped(Kind.SEGMENT, head):
            return segments.index_end(key, head)
        return wrapping.index_end(head)

    def unpack_index(self, key: str, body: bytes) -> Index:
        """Read the index from the first bytes of a segment (at least ``index_end`` of them); raises as ``unpack``."""
        if not wrapping.is_wrapped(Kind.SEGMENT, body):
            index = segments.decode_index(key, body)
            self._require_encrypted(key)
            return index
        return self._index(key, wrapping.unwrap(key, body, whole=False))[0]

    def require_readable(self, key: str, head: bytes) -> None:
        """Look at the first bytes of a segment for what it takes to read it; raises as ``unpack`` if that is lacking."""
        if not wrapping.is_wrapped(Kind.SEGMENT, head):
            segments.index_end(key, head)
            self._require_encrypted(key)
            return
        flags, envelope = wrapping.peek(key, head)
        if flags & (Flag.INDEX_COMPRESSED | Flag.PAYLOADS_COMPRESSED):
            _require_decompressor(key)
        self._object_key(key, Wrapped(flags, envelope, b"", b""))

    async def is_same(self, key: str, stored: bytes, segment: Segment) -> bool:
        """Whether what is stored under a key is this segment, whoever packed it, with whatever key and compression.

        One that cannot be read here, but is whole, counts as the same: nobody writes anything else under a key that a
        move names, and to take it for a torn write would delete a message.
        """
        try:
            return await self.unpack(key, stored) == segment
        except Unreadable:
            return True
        except CorruptObject:
            return False

    def _pack(self, key: str, segment: Segment, compress: bool) -> _Work:
        index, payloads = segments.encode_index(segment.index), b"".join(segment.payloads)
        before = segments.HEAD.size + len(index) + len(payloads)
        flags = Flag(0)
        ratio = None
        if self._compresses and (less := smaller(index)) is not None:
            flags |= Flag.INDEX_COMPRESSED
            index = less
        if compress:
            less = compressed(payloads)
            ratio = len(less) / len(payloads)
            if ratio <= PAYS_BELOW:
                flags |= Flag.PAYLOADS_COMPRESSED
                payloads = less
        if self._keyring is None and not flags:
            body = segments.assemble(index, payloads)
        else:
            body = self._wrap(Kind.SEGMENT, key, flags, index, payloads)
        return _Work(body, before, ratio)

    def _unpack(self, key: str, body: bytes) -> Segment:
        wrapped = wrapping.unwrap(key, body)
        index, object_key = self._index(key, wrapped)
        payloads = self._decrypted(key, Kind.SEGMENT, wrapped, object_key, 1, wrapped.payloads)
        size = sum(record.length for record in index.records)
        if wrapped.flags & Flag.PAYLOADS_COMPRESSED:
            payloads = _decompressed(key, payloads, exactly=size, most=self._payload_bytes_max)
        if len(payloads) != size:
            raise CorruptObject(key, "the index does not fit the payloads")
        return segments.split(index, payloads)

    def _index(self, key: str, wrapped: Wrapped) -> tuple[Index, encryption.ObjectKey | None]:
        object_key = self._object_key(key, wrapped)
        table = self._decrypted(key, Kind.SEGMENT, wrapped, object_key, 0, wrapped.index)
        if wrapped.flags & Flag.INDEX_COMPRESSED:
            table = _decompressed(key, table, most=INDEX_BYTES_MAX)
        return segments.read_index(key, table), object_key

    # -- histories and failures ----------------------------------------------------------------------------------

    def pack_history(self, key: str, records: bytes) -> bytes:
        """The bytes of a history that is to be stored under this key."""
        flags = Flag(0)
        # More than that a reader might not take.
        less = smaller(records) if self._compresses and len(records) <= INDEX_BYTES_MAX else None
        if less is not None:
            flags |= Flag.PAYLOADS_COMPRESSED
            records = less
        if self._keyring is None and not flags:
            return records
        return self._wrap(Kind.HISTORY, key, flags, b"", records)

    def unpack_history(self, key: str, body: bytes) -> bytes:
        """What ``pack_history`` was given; raises as ``unpack``."""
        if not wrapping.is_wrapped(Kind.HISTORY, body):
            self._require_encrypted(key)
            return body
        return self._single(Kind.HISTORY, key, body)

    def seal(self, key: str, claim: Claim) -> Claim:
        """A claim as it is stored: failures name what messages hold, so they are encrypted; the rest is for everybody.

        Args:
            key: The claim's key.
            claim: As the engine has it.
        """
        if self._keyring is None or not claim.failure_table:
            return claim
        failures = _failures_encoder.encode(claim.failure_table)
        sealed = self._wrap(Kind.FAILURES, key, Flag(0), b"", failures)
        return msgspec.structs.replace(claim, failure_table=[], sealed_failures=sealed)

    def unseal(self, key: str, claim: Claim) -> Claim:
        """A claim as the engine has it; raises as ``unpack``. Only who takes it over needs that."""
        if not claim.sealed_failures:
            if claim.failure_table:
                self._require_encrypted(key)
            return claim
        if not wrapping.is_wrapped(Kind.FAILURES, claim.sealed_failures):
            raise CorruptObject(key, "the failures cannot be read")
        try:
            table = _failures_decoder.decode(self._single(Kind.FAILURES, key, claim.sealed_failures))
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            raise CorruptObject(key, f"the failures cannot be read ({error})") from error
        return msgspec.structs.replace(claim, failure_table=table, sealed_failures=b"")

    def _single(self, kind: Kind, key: str, body: bytes) -> bytes:
        wrapped = wrapping.unwrap(key, body)
        object_key = self._object_key(key, wrapped)
        content = self._decrypted(key, kind, wrapped, object_key, 1, wrapped.payloads)
        if not wrapped.flags & Flag.PAYLOADS_COMPRESSED:
            return content
        return _decompressed(key, content, most=max(INDEX_BYTES_MAX, self._payload_bytes_max))

    # -- keys ----------------------------------------------------------------------------------------------------

    def _wrap(self, kind: Kind, key: str, flags: Flag, index: bytes, payloads: bytes) -> bytes:
        keyring = self._keyring
        if keyring is None:
            return wrapping.wrap(kind, flags, Envelope(), index, payloads)
        master = keyring.get(keyring.current)
        assert master is not None
        from s3queue_async.encryption import ObjectKey

        object_key = ObjectKey(master)
        flags |= Flag.ENCRYPTED
        envelope = Envelope(keyring.current, self.queue, object_key.salt, object_key.commitment)
        bound_to = wrapping.bound_to(kind, key, flags, envelope)
        return wrapping.wrap(
            kind,
            flags,
            envelope,
            object_key.encrypt(0, index, bound_to) if kind is Kind.SEGMENT else b"",
            object_key.encrypt(1, payloads, bound_to),
        )

    def _object_key(self, key: str, wrapped: Wrapped) -> encryption.ObjectKey | None:
        """The key of one object, None when it needs none, or the error that says why it is not here."""
        if not wrapped.flags & Flag.ENCRYPTED:
            self._require_encrypted(key)
            return None
        envelope = wrapped.envelope
        name = envelope.key_id
        if self._keyring is None:
            raise KeyUnavailable(key, f"is encrypted with the key {name!r}, and this process has no keyring")
        if envelope.queue != self.queue:
            raise DecryptionFailed(
                key,
                f"was encrypted for the queue whose queue.json has the nonce {envelope.queue!r}; here it is {self.queue!r}",
                suggestion="If queue.json was lost, write that nonce back into it; the object is left as it is.",
            )
        master = self._keyring.get(name)
        if master is None:
            known = ", ".join(map(repr, self._keyring.ids))
            raise KeyUnavailable(key, f"is encrypted with the key {name!r}; the keyring has {known}")
        from s3queue_async.encryption import ObjectKey, WrongKey

        try:
            return ObjectKey(master, envelope.salt, envelope.commitment)
        except WrongKey as error:
            raise DecryptionFailed(key, f"was not encrypted with the key that this process has as {name!r}") from error

    @staticmethod
    def _decrypted(
        key: str, kind: Kind, wrapped: Wrapped, object_key: encryption.ObjectKey | None, part: int, data: bytes
    ) -> bytes:
        if object_key is None:
            return data
        from s3queue_async.encryption import Tampered

        try:
            return object_key.decrypt(part, data, wrapping.bound_to(kind, key, wrapped.flags, wrapped.envelope))
        except Tampered as error:
            raise CorruptObject(key, "was changed, or copied from another key, after it was encrypted") from error

    def _require_encrypted(self, key: str) -> None:
        if self._keyring is not None and not self._keyring.accept_plaintext:
            raise PlaintextRefused(key, "is not encrypted")


_failures_encoder = msgspec.msgpack.Encoder()
_failures_decoder = msgspec.msgpack.Decoder(list[Failure])


def _require_decompressor(key: str) -> None:
    try:
        import s3queue_async.compression  # noqa: F401
    except ImportError as error:
        raise ExtraMissing(
            key,
            f"is compressed with zstd, which this process does not have ({error})",
            suggestion=f"{COMPRESSION_HINT}; the object is left as it is.",
        ) from error


def _decompressed(key: str, data: bytes, *, most: int, exactly: int | None = None) -> bytes:
    """Compressed bytes as they were.

    Args:
        key: The object's key.
        data: The compressed bytes.
        most: Bytes that this process takes at most.
        exactly: How many there must be; None: as many as the frame says.
    """
    _require_decompressor(key)
    from s3queue_async.compression import CannotDecompress, content_size, decompress

    try:
        size = content_size(data) if exactly is None else exactly
        if size > most:
            raise Unreadable(
                key,
                f"has {size:,} bytes once it is decompressed; this process takes {most:,}",
                suggestion="Raise segment_bytes_max or message_bytes_max here; the object is left as it is.",
            )
        return decompress(data, size)
    except CannotDecompress as error:
        raise CorruptObject(key, f"cannot be decompressed ({error})") from error
