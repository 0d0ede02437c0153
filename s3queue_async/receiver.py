"""Messages taken one by one and acknowledged explicitly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import anyio
import msgspec

from s3queue_async.engine.held import Held
from s3queue_async.engine.session import Session
from s3queue_async.errors import InvalidSettings, LeaseLost
from s3queue_async.message import DeadLetter, Message, Retry
from s3queue_async.settings import seconds, whole_number
from s3queue_async.worker import Decoder, announce_completed, make_context, refused, settle_error

RECEIVE_MAX = 1000
WAIT_MAX_S = 3600.0
WAIT_AT_ONCE_S = 1.0
ACK_WITHIN_MAX_S = 30 * 24 * 3600.0


@dataclass(slots=True)
class _Outstanding:
    held: Held
    index: int
    attempt: int
    began: float
    ends_at: float
    limit: str
    over: bool = False


class Receiver:
    """Takes messages of a session and sees to it that each is acknowledged in time, or delivered again."""

    def __init__(self, session: Session, decode: Decoder) -> None:
        self._session = session
        self._decode = decode
        self._outstanding: list[_Outstanding] = []
        session.on_tick.append(self._expire)

    async def receive(self, max_messages: int, wait_s: float, ack_within_s: float) -> list[Message[Any]]:
        """Up to ``max_messages`` messages; an empty list when none came within ``wait_s``."""
        session = self._session
        clock = session.shared.clock
        messages: list[Message[Any]] = []
        begun: list[_Outstanding] = []
        wanted = max_messages
        session.wanted_by_receivers += wanted
        session.claimer.notice()
        ends_at = clock.monotonic() + wait_s
        looked = False
        try:
            while wanted > 0 and not session.is_over:
                taken = session.take()
                if taken is not None:
                    got = await self._message(*taken, ack_within_s)
                    if got is not None:
                        item, message = got
                        begun.append(item)
                        messages.append(message)
                        session.wanted_by_receivers -= 1
                        wanted -= 1
                    continue
                if messages:
                    break
                left_s = ends_at - clock.monotonic()
                if left_s <= 0:
                    if looked:
                        break
                    # Even without waiting, one look at the store belongs to it.
                    await session.claimer.poll_once()
                    looked = True
                    continue
                # A session that ends meanwhile wakes nobody.
                with anyio.move_on_after(min(left_s, WAIT_AT_ONCE_S)):
                    await session.feed.wait()
                looked = True
        except BaseException:
            # Nobody gets these now.
            self._hand_back(begun)
            raise
        finally:
            session.feed.wake_next()
            session.wanted_by_receivers -= wanted
        return messages

    def stop(self) -> int:
        """Hand back what is not acknowledged; a later acknowledgement raises LeaseLost."""
        return self._hand_back(list(self._outstanding))

    def _hand_back(self, items: Iterable[_Outstanding]) -> int:
        count = 0
        for item in items:
            if not item.over:
                count += 1
                self._end(item)
                self._session.released(item.held, item.index, attempts=item.attempt - 1)
                self._session.slot_free()
        return count

    async def _message(self, held: Held, index: int, ack_within_s: float) -> tuple[_Outstanding, Message[Any]] | None:
        session = self._session
        record = held.index.records[index]
        attempts = held.attempts(index)
        failure = refused(session, held, index, attempts)
        if failure is not None:
            session.feed.done(held)
            session.dead(held, index, attempts=attempts, failure=failure)
            return None
        if held.isolated and not await session.started_alone(held, index):
            return None
        began = session.shared.clock.monotonic()
        usual = ack_within_s == session.shared.settings.visibility_timeout
        limit = "visibility_timeout" if usual else f"ack_within={ack_within_s:g} s"
        item = _Outstanding(held, index, attempts + 1, began, began + ack_within_s, limit)
        self._outstanding.append(item)
        try:
            payload = self._decode(held.payloads[index], record.codec)
        except (msgspec.DecodeError, msgspec.ValidationError) as error:
            self._end(item)
            settle_error(session, held, index, item.attempt, DeadLetter(f"InvalidPayload: {error}"))
            return None

        async def settle(outcome: BaseException | None) -> None:
            await self._settle(item, outcome)

        return item, Message(payload, make_context(session, held, index, item.attempt), settle)

    async def _settle(self, item: _Outstanding, outcome: BaseException | None) -> None:
        session = self._session
        if item.over or item.held.lost is not None or session.is_over:
            raise LeaseLost(f"Message {item.held.index.records[item.index].id} is not this receiver's any more.")
        took_s = session.shared.clock.monotonic() - item.began
        self._end(item)
        if outcome is None:
            session.finished(item.held, item.index, attempt=item.attempt, duration_s=took_s, result=None)
        else:
            settle_error(session, item.held, item.index, item.attempt, outcome)
        session.slot_free()
        await session.settler.flush(item.held)
        if outcome is None:
            announce_completed(session, item.held.index.records[item.index], item.attempt, took_s, None)

    def _end(self, item: _Outstanding) -> None:
        item.over = True
        self._outstanding.remove(item)
        self._session.feed.done(item.held)

    def _expire(self, now: float) -> None:
        for item in list(self._outstanding):
            if item.held.lost is not None:
                self._end(item)
            elif now >= item.ends_at:
                self._end(item)
                reason = f"not acknowledged within {item.limit}"
                settle_error(self._session, item.held, item.index, item.attempt, Retry(delay=0, reason=reason))


def checked_receive(max_messages: int, wait: Any) -> float:
    """The wait in seconds. Raises InvalidSettings for arguments out of range."""
    whole_number("max_messages", max_messages, 1, RECEIVE_MAX)
    wait_s = seconds("wait", wait)
    if not 0 <= wait_s <= WAIT_MAX_S:
        raise InvalidSettings(f"wait={wait!r} is out of range: 0 to {WAIT_MAX_S:g} seconds.")
    return wait_s


def checked_ack_within(ack_within: Any) -> float:
    """The time in seconds. Raises InvalidSettings when it is out of range."""
    ack_within_s = seconds("ack_within", ack_within)
    if not 0 < ack_within_s <= ACK_WITHIN_MAX_S:
        raise InvalidSettings(f"ack_within={ack_within!r} is out of range: above 0, up to 30 days.")
    return ack_within_s
