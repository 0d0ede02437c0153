"""One delivery of a task to taskiq: who acknowledges it, and how it is noticed that nobody will.

taskiq does not tell a broker when it gives a message up: because a middleware failed, because its own shutdown dropped what
it had fetched, or because a task that was to acknowledge by itself did not. The acknowledgement is just never called. So
the task that handles the message is watched; and where it ends without an error, whether anybody still has the
acknowledgement.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from taskiq import AckableMessage

from s3queue_async.errors import LeaseLost
from s3queue_async.log import log
from s3queue_async.message import Message, Release, Retry

TASK_ID = "taskiq_task_id"
TASK_NAME = "taskiq_task_name"
"""Headers of the queue's messages."""


@dataclass(frozen=True, slots=True)
class GivenUp:
    """A message that taskiq will not acknowledge, and what that counts as."""

    message: Message[bytes]
    outcome: BaseException


GiveUp = Callable[[GivenUp], None]


class Delivery:
    """A task that is being handled: what taskiq calls to acknowledge it.

    Attributes:
        message: As it was received.
        outcome: What the acknowledgement means: None that the message is done, otherwise that it failed so.
        is_acked: Whether it was acknowledged.
    """

    def __init__(self, message: Message[bytes], give_up: GiveUp) -> None:
        self.message = message
        self.outcome: BaseException | None = None
        self.is_acked = False
        self._give_up = give_up
        unacknowledged = GivenUp(message, Retry(reason="taskiq gave it up without acknowledging it"))
        self._unheld = _when_unheld(self, give_up, unacknowledged)

    async def __call__(self) -> None:
        """Return once the outcome is recorded with the store."""
        self._unheld.detach()
        self.is_acked = True
        try:
            if self.outcome is None:
                await self.message.ack()
            else:
                await self.message.fail(self.outcome)
        except LeaseLost as error:
            # taskiq could do nothing about it: somebody else has the message.
            log.warning("acknowledged too late, the task is run again", **about(self.message), error=str(error))

    def ended(self, error: BaseException) -> None:
        """Whoever handled it failed outside of the task's function."""
        if self._unheld.detach() is not None:
            self._give_up(GivenUp(self.message, error))


class Offer:
    """A task that taskiq has fetched and nobody handles yet."""

    def __init__(self, message: Message[bytes], give_up: GiveUp, started: Callable[[Delivery], None]) -> None:
        self._message = message
        self._give_up = give_up
        self._started = started
        self._delivery: weakref.ref[Delivery] | None = None
        self._unheld = _when_unheld(self, give_up, GivenUp(message, Release()))

    def take(self) -> Delivery:
        """Called by the task that handles it, first of all."""
        delivery = None if self._delivery is None else self._delivery()
        if delivery is not None:
            return delivery
        self._unheld.detach()
        delivery = Delivery(self._message, self._give_up)
        self._delivery = weakref.ref(delivery)
        self._started(delivery)
        handling = asyncio.current_task()
        if handling is not None:
            handling.add_done_callback(partial(_handled, self._delivery))
        return delivery

    async def __call__(self) -> None:
        """Acknowledge."""
        await self.take()()


class Fetched(AckableMessage):
    """What the broker hands to taskiq; whoever reads ``ack`` begins to handle it."""

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return found.take() if name == "ack" else found


def about(message: Message[Any]) -> dict[str, Any]:
    """What a line of the log says about a message."""
    return {"message": message.id, "task": message.context.headers.get(TASK_NAME)}


def _handled(handled: weakref.ref[Delivery], handling: asyncio.Task[Any]) -> None:
    delivery = handled()
    if delivery is None or delivery.is_acked:
        return
    error = asyncio.CancelledError("cancelled by taskiq") if handling.cancelled() else handling.exception()
    if error is not None:
        delivery.ended(error)


def _when_unheld(held: Any, give_up: GiveUp, what: GivenUp) -> weakref.finalize[..., Any]:
    finalizer = weakref.finalize(held, _tell, asyncio.get_running_loop(), give_up, what)
    finalizer.atexit = False
    return finalizer


def _tell(loop: asyncio.AbstractEventLoop, give_up: GiveUp, what: GivenUp) -> None:
    # The garbage collector calls this, from any thread. Where the loop is closed, the queue has handed everything back.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(give_up, what)
