"""Remembers what was completed, so that a message that comes again is not handled again."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import anyio
import msgspec

from s3queue_async.engine.shared import Shared
from s3queue_async.errors import CorruptObject, InvalidSettings, StoreUnavailable, Throttled, Unreadable
from s3queue_async.log import log
from s3queue_async.message import Release
from s3queue_async.middleware.chain import CallNext, Delivery
from s3queue_async.settings import seconds
from s3queue_async.storage.base import Conflict, NotFound, Stored
from s3queue_async.storage.plugin import PluginStorage, plugin_prefix

NAMESPACE = "completed"
TTL_MIN_S = 60.0
TTL_MAX_S = 365 * 24 * 3600.0
DECIDE_WITHIN_S = 10.0
LOOK_AGAIN_S = 5.0
RESULT_BYTES_MAX = 16 * 1024
SWEEP_EVERY = 500
"""Records written between two looks at the next page of 1,000, of which the expired ones are deleted: so there are
hardly more expired ones than good ones, at one LIST for 500 messages."""


class Completed(msgspec.Struct, frozen=True):
    """What is kept of a completed message.

    Attributes:
        message_id: The message that was completed.
        completed_ms: When, store time.
        result: What the handler returned, as msgpack; nil when it was larger than 16 KiB.
    """

    message_id: str
    completed_ms: int
    result: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_result_encoder = msgspec.msgpack.Encoder(enc_hook=repr)
_decoder = msgspec.msgpack.Decoder(Completed)
_NIL = msgspec.msgpack.encode(None)


class Idempotency:
    """Middleware that skips a message whose key was completed already; what was returned then is returned again.

    The record is written after the handler returned and before the message is settled. So a handler that returned
    is not called again for its key within ``ttl``, unless its process died or was cut off before the record was
    written. Two messages with one key that run at the same moment both run: ``dedup_id`` keeps those apart.

    Args:
        key: Gives a message's key; None for a message that is not to be looked at. By default the message's id, which
            covers a message that is delivered again.
        ttl: Seconds (or timedelta) for which keys are remembered, 60 to one year.

    Raises:
        InvalidSettings: ``ttl`` is out of its range.
    """

    def __init__(
        self, key: Callable[[Delivery[Any]], str | None] | None = None, *, ttl: float | timedelta = 24 * 3600.0
    ) -> None:
        self._key = _own_id if key is None else key
        self._ttl_s = seconds("ttl", ttl)
        if not TTL_MIN_S <= self._ttl_s <= TTL_MAX_S:
            raise InvalidSettings(f"ttl={ttl!r} is out of range: {TTL_MIN_S:g} to {TTL_MAX_S:,.0f} seconds (a year).")
        self._written = 0
        self._swept_to: str | None = None

    async def __call__(self, message: Delivery[Any], call_next: CallNext) -> Any:
        key = self._key(message)
        if key is None:
            return await call_next(message)
        if not isinstance(key, str):
            raise InvalidSettings(f"key gave {key!r} for message {message.id}: it must give text, or None.")
        name = hashlib.sha256(key.encode()).hexdigest()
        records = PluginStorage(message.shared.storage, NAMESPACE, ttl_s=self._ttl_s)
        known = await self._look(message.shared, records, name)
        if known is not None:
            log.info("completed already, skipped", message=message.id, key=key, completed_as=known.message_id)
            return msgspec.msgpack.decode(known.result)
        result = await call_next(message)
        encoded = _result_encoder.encode(result)
        record = Completed(
            message.id,
            message.shared.time.now_ms(),
            msgspec.Raw(encoded if len(encoded) <= RESULT_BYTES_MAX else _NIL),
        )
        body = message.shared.packer.pack_history(_whole_key(name), _encoder.encode(record))
        # The handler is done: a cancellation that comes now waits until that is recorded.
        async with anyio.create_task_group() as group:
            group.start_soon(self._keep, message.shared, records, name, body)
        return result

    async def _look(self, shared: Shared, records: PluginStorage, name: str) -> Completed | None:
        """What is known under a key. Raises Release when the store does not tell."""
        give_up_at = shared.clock.monotonic() + DECIDE_WITHIN_S
        try:
            stored = await shared.insist(
                lambda: records.get(name), while_true=lambda: shared.clock.monotonic() < give_up_at
            )
        except NotFound:
            return None
        except (StoreUnavailable, Throttled) as error:
            log.warning("whether a message was completed is not known, given back", error=str(error))
            raise Release(delay=LOOK_AGAIN_S) from error
        assert isinstance(stored, Stored)
        if records.expired(stored.modified_s, shared.time.earliest()):
            return None
        try:
            return _decoder.decode(shared.packer.unpack_history(_whole_key(name), stored.body))
        except Unreadable as error:
            log.warning("whether a message was completed cannot be read here, given back", error=str(error))
            raise Release(delay=LOOK_AGAIN_S) from error
        except (CorruptObject, msgspec.DecodeError) as error:
            # The handler runs once more and replaces it: that is safer than to skip what may not be done.
            log.warning("a record of a completed message cannot be read", key=name, error=str(error))
            return None

    async def _keep(self, shared: Shared, records: PluginStorage, name: str, body: bytes) -> None:
        with anyio.CancelScope(shield=True):
            give_up_at = shared.clock.monotonic() + DECIDE_WITHIN_S
            try:
                await shared.insist(
                    lambda: records.put(name, body), while_true=lambda: shared.clock.monotonic() < give_up_at
                )
                self._written += 1
                if self._written % SWEEP_EVERY == 0:
                    await self._sweep(shared, records)
            except (StoreUnavailable, Throttled, Conflict) as error:
                # The message is done all the same; only a second delivery would not be noticed.
                log.warning("a completed message could not be recorded", key=name, error=str(error))

    async def _sweep(self, shared: Shared, records: PluginStorage) -> None:
        if self._swept_to is None:
            # Processes that are started often begin elsewhere each time.
            self._swept_to = f"{shared.random.getrandbits(32):08x}"
        page = await records.list("", after=self._swept_to)
        self._swept_to = page.entries[-1].key if page.more else ""
        now_s = shared.time.earliest()
        expired = [entry.key for entry in page.entries if records.expired(entry.modified_s, now_s)]
        if expired:
            await records.delete_many(expired)


def _whole_key(name: str) -> str:
    return plugin_prefix(NAMESPACE) + name


def _own_id(message: Delivery[Any]) -> str:
    return message.id
