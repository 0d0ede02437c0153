"""A conditional write whose outcome is decided: it happened, or it did not, whatever became of the replies."""

from __future__ import annotations

from random import Random  # noqa: TID251 - only the type: the instance is passed in

from s3queue_async.clock import Clock
from s3queue_async.errors import StoreUnavailable, Throttled
from s3queue_async.storage.base import (
    Condition,
    Conflict,
    IfAbsent,
    NotFound,
    PreconditionFailed,
    Storage,
    Stored,
    Superseded,
    Written,
)

_PAUSE_FIRST_S = 0.05
_PAUSE_MAX_S = 2.0


async def swap(
    storage: Storage,
    key: str,
    body: bytes,
    *,
    when: Condition,
    clock: Clock,
    random: Random,
    deadline_s: float = 20.0,
) -> Written:
    """Write under a condition, and find out by reading whenever a reply does not say what happened.

    The body must carry a fresh nonce: a stored body equal to it is then this very write, whose reply was lost.

    Args:
        storage: Where to write.
        key: The object's key.
        body: The new body.
        when: What must hold.
        clock: Local time.
        random: Where the jitter of the pauses comes from.
        deadline_s: How long to go on trying, in seconds; looked at between requests.

    Returns:
        The version that was written, also when only a later look showed it.

    Raises:
        Superseded: Something else is under the key (or nothing is any more); the write is not there.
        StoreUnavailable: The deadline passed, and the outcome is unknown; or, not retriable, the store refuses.
    """
    attempts = _Attempts(clock, random, deadline_s)
    while True:
        try:
            return await storage.put(key, body, when=when)
        except PreconditionFailed as error:
            found = await _read(storage, key, attempts, error)
            if found is not None and found.body == body:
                return Written(found.version, found.date_s)
            raise Superseded(key, found, date_s=error.date_s if found is None else found.date_s) from error
        except Conflict as error:
            await attempts.pause(key, error)
            if isinstance(when, IfAbsent):
                continue
            cause: Conflict | Throttled | StoreUnavailable = error
        except (Throttled, StoreUnavailable) as error:
            if not error.retriable:
                raise
            # The write may have been applied, or may still be: from here on only a read can tell.
            attempts.ambiguous = True
            await attempts.pause(key, error)
            cause = error
        found = await _read(storage, key, attempts, cause)
        if found is not None and found.body == body:
            return Written(found.version, found.date_s)
        if not _holds(when, found):
            raise Superseded(key, found, date_s=None if found is None else found.date_s) from cause


async def _read(storage: Storage, key: str, attempts: _Attempts, cause: Exception) -> Stored | None:
    while True:
        try:
            found = await storage.get(key)
        except NotFound:
            return None
        except (Throttled, StoreUnavailable) as error:
            if not error.retriable:
                raise
            error.__cause__ = cause
            await attempts.pause(key, error)
        else:
            assert isinstance(found, Stored)  # only a read that names a version is answered otherwise
            return found


def _holds(when: Condition, found: Stored | None) -> bool:
    if isinstance(when, IfAbsent):
        return found is None
    return found is not None and found.version == when.version


class _Attempts:
    """The pauses between the requests of one swap, and their end."""

    def __init__(self, clock: Clock, random: Random, deadline_s: float) -> None:
        self.ambiguous = False
        self._clock = clock
        self._random = random
        self._ends_s = clock.monotonic() + deadline_s
        self._pause_s = _PAUSE_FIRST_S

    async def pause(self, key: str, error: Conflict | Throttled | StoreUnavailable) -> None:
        """Wait before the next request. Raises StoreUnavailable when the deadline comes before that."""
        pause_s = self._pause_s * self._random.uniform(0.5, 1.0)
        self._pause_s = min(self._pause_s * 2, _PAUSE_MAX_S)
        if isinstance(error, Throttled) and error.retry_after_s is not None:
            pause_s = max(pause_s, error.retry_after_s)
        if self._clock.monotonic() + pause_s >= self._ends_s:
            outcome = "whether it was written is unknown" if self.ambiguous else "it was not written"
            raise StoreUnavailable(f"{key}: no answer before the deadline; {outcome}. Last: {error}") from error
        await self._clock.sleep(pause_s)
