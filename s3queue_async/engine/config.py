"""``queue.json``: made once, by whoever opens a queue first, after the store has proved that it keeps conditions."""

from __future__ import annotations

import msgspec

from s3queue_async.engine.shared import Shared
from s3queue_async.errors import CorruptObject, NewerFormat
from s3queue_async.log import log
from s3queue_async.protocol import layout
from s3queue_async.storage.base import IfAbsent, NotFound, Stored, Superseded
from s3queue_async.storage.probe import probe

FORMAT_VERSION = 1
OPEN_WITHIN_S = 30.0
CREATE_WITHIN_S = 20.0


class QueueConfig(msgspec.Struct, frozen=True):
    """What is fixed for a queue.

    Attributes:
        nonce: Of the write that created it; what is encrypted is bound to it.
        format: Version of everything that the queue's objects look like.
        conditional_delete: Whether the store was found to keep If-Match on DELETE.
        segment_age_s: How late a segment may land; all processes must agree on it.
        claim_linger_s: How long a claim outlives its segment; all processes must agree on it.
    """

    nonce: str
    format: int
    conditional_delete: bool
    segment_age_s: float
    claim_linger_s: float


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(QueueConfig)


async def open_queue(shared: Shared) -> None:
    """Read the queue's configuration, or probe the store and create it; what it fixes goes into ``shared``.

    Raises:
        StoreUnsupported: The store ignores conditions; nothing is left behind.
        NewerFormat: A newer version of this library made the queue; nothing is touched.
        CorruptObject: queue.json is not readable.
        StoreUnavailable, Throttled: The store did not answer for half a minute.
    """
    give_up_at = shared.clock.monotonic() + OPEN_WITHIN_S
    config = await shared.insist(lambda: _open(shared), while_true=lambda: shared.clock.monotonic() < give_up_at)
    shared.conditional_delete = config.conditional_delete
    shared.packer.queue = config.nonce
    settings = shared.settings
    if (settings.segment_age, settings.claim_linger) != (config.segment_age_s, config.claim_linger_s):
        log.warning(
            "segment_age and claim_linger are those that the queue was made with",
            segment_age=config.segment_age_s,
            claim_linger=config.claim_linger_s,
        )
        shared.settings = msgspec.structs.replace(
            settings, segment_age=config.segment_age_s, claim_linger=config.claim_linger_s
        )


async def _open(shared: Shared) -> QueueConfig:
    body = await _read(shared)
    if body is None:
        capabilities = await probe(shared.storage, random=shared.random, clock=shared.clock)
        config = QueueConfig(
            shared.nonce(),
            FORMAT_VERSION,
            capabilities.conditional_delete,
            shared.settings.segment_age,
            shared.settings.claim_linger,
        )
        try:
            await shared.swap(layout.CONFIG, _encoder.encode(config), when=IfAbsent(), deadline_s=CREATE_WITHIN_S)
        except Superseded:
            # Another process opened the queue for the first time at the same moment.
            body = await _read(shared)
        else:
            return config
    if body is None:
        raise CorruptObject(layout.CONFIG, "vanished while the queue was opened")
    return _decoded(body)


async def _read(shared: Shared) -> bytes | None:
    try:
        stored = await shared.storage.get(layout.CONFIG)
    except NotFound:
        return None
    assert isinstance(stored, Stored)
    return stored.body


def _decoded(body: bytes) -> QueueConfig:
    try:
        config = _decoder.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CorruptObject(
            layout.CONFIG,
            f"cannot be read ({error})",
            suggestion="Look at the object: another program may own this prefix. Use another prefix for the queue.",
        ) from error
    if config.format > FORMAT_VERSION:
        raise NewerFormat(layout.CONFIG, f"has format {config.format}; this library knows {FORMAT_VERSION}")
    return config
