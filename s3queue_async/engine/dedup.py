"""Deduplication markers: the one place that says which copy of a message with a ``dedup_id`` counts.

A marker is created before the message is written and names the segment that it is written to (``intent``). Whoever
moves such a message sets ``written`` first, whoever finishes it sets ``finished`` before the segment goes. So an
``intent`` whose segment and claim are gone was never written, whoever looks.
"""

from __future__ import annotations

import hashlib
from typing import Literal

import msgspec

from s3queue_async.engine.shared import Shared
from s3queue_async.errors import StoreUnavailable
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.storage.base import IfAbsent, IfVersion, NotFound, Stored, Superseded

RESERVE_TRIES_MAX = 64
LOOK_AGAIN_S = 0.2
DECIDE_WITHIN_S = 30.0


class Marker(msgspec.Struct, frozen=True):
    """What is known of the message with one deduplication id.

    Attributes:
        nonce: Fresh in every written body.
        state: ``intent``: about to be written to ``segment``; ``written``: certainly written, and moved since;
            ``finished``: done.
        message_id: The message's id.
        segment: The key of the segment that it was first written to.
        created_ms: Store time of the enqueue; the window counts from here.
    """

    nonce: str
    state: Literal["intent", "written", "finished"]
    message_id: str
    segment: str
    created_ms: int


class Reservation(msgspec.Struct, frozen=True):
    """A marker as it is stored."""

    name: str
    marker: Marker
    version: str


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Marker)


def marker_name(dedup_id: str) -> str:
    """The marker's key inside the dedup namespace."""
    return hashlib.sha256(dedup_id.encode()).hexdigest()


class Deduplicator:
    """Creates, reads and advances deduplication markers."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._plugin = shared.dedup

    async def reserve(self, dedup_id: str, message_id: str, segment: SegmentKey) -> Reservation | str:
        """Claim a deduplication id for a message about to be written.

        Returns:
            The reservation, or the id of the message that holds it already and is certainly in the queue or done.

        Raises:
            StoreUnavailable: It stayed undecided because the store could not be asked.
        """
        marker = Marker(self._shared.nonce(), "intent", message_id, segment.text, segment.created_ms)
        return await self._reserve(marker_name(dedup_id), marker)

    async def _reserve(self, name: str, marker: Marker) -> Reservation | str:
        shared = self._shared
        stored: Stored | None = None
        for _ in range(RESERVE_TRIES_MAX):
            found = None if stored is None else self._decode(stored.body)
            if found is not None and not self._is_expired(found):
                written = found.state != "intent" or await self._was_written(found)
                if written:
                    return found.message_id
                if written is None:
                    await shared.clock.sleep(LOOK_AGAIN_S * (0.5 + shared.random.random()))
                    stored = await self._read(name)
                    continue
            try:
                version = await self._write(name, marker, IfAbsent() if stored is None else IfVersion(stored.version))
            except Superseded as lost:
                stored = lost.stored
            else:
                return Reservation(name, marker, version)
        raise StoreUnavailable(
            f"The deduplication id of message {marker.message_id} stayed contended.", suggestion="Enqueue it again."
        )

    async def rename(self, reservation: Reservation, segment: SegmentKey) -> Reservation | str:
        """Name another segment, because the first was certainly not written; as ``reserve`` otherwise."""
        marker = msgspec.structs.replace(reservation.marker, nonce=self._shared.nonce(), segment=segment.text)
        try:
            version = await self._write(reservation.name, marker, IfVersion(reservation.version))
        except Superseded:
            # Another producer took it over, which may still fail to write its message.
            return await self._reserve(reservation.name, marker)
        return Reservation(reservation.name, marker, version)

    async def look(self, dedup_id: str) -> Reservation | None:
        """The marker of a claimed message; None when its window is over."""
        name = marker_name(dedup_id)
        stored = await self._read(name)
        marker = None if stored is None else self._decode(stored.body)
        if stored is None or marker is None:
            return None
        return Reservation(name, marker, stored.version)

    async def was_enqueued(self, dedup_id: str) -> bool:
        """Whether a message with this id was enqueued, by its marker as long as there is one, however old it is.

        Raises:
            StoreUnavailable: It stayed undecided, because whoever made the marker may still be writing.
        """
        for _ in range(RESERVE_TRIES_MAX):
            reservation = await self.look(dedup_id)
            if reservation is None:
                return False
            written = reservation.marker.state != "intent" or await self._was_written(reservation.marker)
            if written is not None:
                return written
            await self._shared.clock.sleep(LOOK_AGAIN_S * (0.5 + self._shared.random.random()))
        raise StoreUnavailable(f"Whether {dedup_id!r} was enqueued stayed undecided.", suggestion="Ask again.")

    @staticmethod
    def is_duplicate(reservation: Reservation | None, *, message_id: str, key: str, moved: bool) -> bool:
        """Whether a claimed message is a copy that must not run.

        It is when the message is finished already, or when the marker says that the copy which counts was first
        written to another segment than the one this copy was first written to.
        """
        if reservation is None or reservation.marker.message_id != message_id:
            return False
        marker = reservation.marker
        return marker.state == "finished" or (not moved and marker.segment != key)

    async def advance(
        self, reservation: Reservation, message_id: str, state: Literal["written", "finished"]
    ) -> Reservation | None:
        """Set a later state; a marker that is another message's by now is left alone."""
        if reservation.marker.message_id != message_id or reservation.marker.state in (state, "finished"):
            return reservation
        for _ in range(RESERVE_TRIES_MAX):
            marker = msgspec.structs.replace(reservation.marker, nonce=self._shared.nonce(), state=state)
            try:
                version = await self._write(reservation.name, marker, IfVersion(reservation.version))
            except Superseded as lost:
                found = None if lost.stored is None else self._decode(lost.stored.body)
                if lost.stored is None or found is None or found.message_id != message_id or found.state == "finished":
                    return None
                reservation = Reservation(reservation.name, found, lost.stored.version)
            else:
                return Reservation(reservation.name, marker, version)
        raise StoreUnavailable("A deduplication marker stayed contended.")

    async def _was_written(self, marker: Marker) -> bool | None:
        """True: certainly; False: certainly not; None: its producer may still be writing."""
        shared = self._shared
        key = SegmentKey.parse(marker.segment)
        settled_after_s = key.created_ms / 1000 + shared.settings.segment_age + shared.settings.lease_margin
        late_enough = shared.time.seen() > settled_after_s
        try:
            stored = await shared.storage.get(key.text, span=(0, 1))
        except NotFound:
            pass
        else:
            assert isinstance(stored, Stored)
            # An empty object is what some stores keep of a write that was cut off.
            if stored.body and not segments.is_void(key.created_ms, stored.modified_s, shared.settings.segment_age):
                return True
        try:
            await shared.storage.get(key.claim, span=(0, 1))
        except NotFound:
            return False if late_enough else None
        return True

    async def _write(self, name: str, marker: Marker, when: IfAbsent | IfVersion) -> str:
        return await self._shared.swap(
            name, _encoder.encode(marker), when=when, deadline_s=DECIDE_WITHIN_S, storage=self._plugin
        )

    async def _read(self, name: str) -> Stored | None:
        try:
            stored = await self._plugin.get(name)
        except NotFound:
            return None
        assert isinstance(stored, Stored)
        return stored

    def _is_expired(self, marker: Marker) -> bool:
        return marker.created_ms / 1000 + self._shared.settings.dedup_window < self._shared.time.earliest()

    @staticmethod
    def _decode(body: bytes) -> Marker | None:
        # A damaged marker protects nothing any more; the compare-and-swap replaces it.
        try:
            return _decoder.decode(body)
        except (msgspec.DecodeError, msgspec.ValidationError):
            return None
