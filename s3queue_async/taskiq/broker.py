"""A taskiq broker on a queue."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncGenerator
from datetime import timedelta
from typing import Any

import anyio
from taskiq import AckableMessage, AsyncBroker, BrokerMessage
from taskiq.result_backends.dummy import DummyResultBackend

from s3queue_async.clock import Clock
from s3queue_async.errors import LeaseLost, QueueClosed
from s3queue_async.log import log
from s3queue_async.message import Message, Outcome, Tracing
from s3queue_async.queue import S3Queue
from s3queue_async.receiver import ACK_WITHIN_MAX_S
from s3queue_async.settings import Settings
from s3queue_async.storage.base import Storage
from s3queue_async.taskiq.delivery import TASK_ID, TASK_NAME, Delivery, Fetched, GivenUp, Offer, about
from s3queue_async.taskiq.labels import enqueue_options
from s3queue_async.taskiq.results import RESULT_TTL_S, S3QueueResultBackend
from s3queue_async.wakeup import Wakeup

RECEIVE_WAIT_S = 60.0
BREAK_OFF_S = 2.0


class S3QueueBroker(AsyncBroker):
    """Runs a taskiq application on a bucket, an SQLite file, or memory.

    Labels: ``delay`` (seconds), ``priority`` (0 to 255), ``max_attempts``, ``expires_in`` (seconds), ``dedup_id``. A task
    is delivered again when its worker is lost, up to ``max_attempts`` times, and then becomes a dead letter. Results are
    kept in the same store, unless another result backend is set.

    Args:
        url: As for S3Queue; None: what S3QUEUE_URL says.
        settings: See Settings.
        storage: An object that satisfies the Storage protocol, instead of a url.
        result_ttl: Seconds (or timedelta) for which results are kept; None: no results.
        ack_within: Seconds (or timedelta) after which a task that is not acknowledged is delivered again, although its
            worker is well; up to 30 days, which is the default. No task may take longer.
        tracing: Follows tasks from where they are sent to the worker, such as OpenTelemetryTracing.
        clock: As for S3Queue; for tests.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        settings: Settings | None = None,
        storage: Storage | None = None,
        result_ttl: float | timedelta | None = RESULT_TTL_S,
        ack_within: float | timedelta = ACK_WITHIN_MAX_S,
        tracing: Tracing | None = None,
        clock: Clock | None = None,
    ) -> None:
        super().__init__()
        self.result_backend = (
            DummyResultBackend() if result_ttl is None else S3QueueResultBackend(ttl=result_ttl, clock=clock)
        )
        self._url = url
        self._options: dict[str, Any] = {
            "settings": settings,
            "storage": storage,
            "tracing": tracing,
            "clock": clock,
        }
        self._ack_within = ack_within
        self._queue: S3Queue[bytes] | None = None
        self._holder: asyncio.Task[None] | None = None
        self._stop = anyio.Event()
        self._given_up: deque[GivenUp] = deque()
        self._more_given_up = Wakeup()
        self._deliveries: weakref.WeakValueDictionary[str, Delivery] = weakref.WeakValueDictionary()

    @property
    def queue(self) -> S3Queue[bytes]:
        """The queue, for ``stats()``, ``dead_letters`` and so on; there from startup to shutdown.

        Raises:
            QueueClosed: The broker was not started, or is shut down.
        """
        if self._queue is None:
            raise QueueClosed("The broker is not started.", suggestion="Call `await broker.startup()` first.")
        return self._queue

    def delivery(self, task_id: str) -> Delivery | None:
        """The delivery of a task that runs in this process; None when it is not from here, or is over."""
        return self._deliveries.get(task_id)

    # -- life ----------------------------------------------------------------------------------------------------

    async def startup(self) -> None:
        """Open the queue, and do what taskiq does at a startup. Starting twice is fine."""
        if self._holder is None:
            await self._open()
        try:
            await super().startup()
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._close()
            raise

    async def shutdown(self) -> None:
        """Do what taskiq does at a shutdown, hand back what is not acknowledged, and close the queue."""
        try:
            await super().shutdown()
        finally:
            await self._close()

    async def _open(self) -> None:
        opened: asyncio.Future[S3Queue[bytes]] = asyncio.get_running_loop().create_future()
        self._stop = anyio.Event()
        # taskiq starts and shuts down brokers in different tasks; a queue is closed by the task that opened it. So one
        # task holds the queue open in between; shutdown() waits for its end, and gets what it raised.
        self._holder = asyncio.create_task(self._hold(opened), name="s3queue broker")
        try:
            self._queue = await opened
        except BaseException:
            holder, self._holder = self._holder, None
            holder.cancel()
            with anyio.CancelScope(shield=True):
                await asyncio.wait({holder})
            raise
        if isinstance(self.result_backend, S3QueueResultBackend):
            self.result_backend.attach(self._queue)

    async def _hold(self, opened: asyncio.Future[S3Queue[bytes]]) -> None:
        try:
            async with S3Queue[bytes](self._url, auto_start=False, **self._options) as queue:
                if opened.done():
                    return
                opened.set_result(queue)
                async with anyio.create_task_group() as group:
                    group.start_soon(self._settle_given_up)
                    await self._stop.wait()
                    group.cancel_scope.cancel()
                # taskiq has waited for its tasks: what is not acknowledged now never will be.
                await queue.drain(timeout=0)
        except Exception as error:
            if opened.done():
                raise
            opened.set_exception(error)

    async def _close(self) -> None:
        holder, self._holder = self._holder, None
        if holder is None:
            return
        self._stop.set()
        try:
            await asyncio.shield(holder)
        except asyncio.CancelledError:
            # taskiq's --shutdown-timeout. What is not handed back by now goes to others when the lease runs out.
            if not holder.done():
                log.warning("the shutdown was broken off; messages may wait until the lease has run out")
                holder.cancel()
                with anyio.CancelScope(shield=True):
                    await asyncio.wait({holder}, timeout=BREAK_OFF_S)
            raise
        finally:
            self._queue = None
            self._given_up.clear()

    # -- sending -------------------------------------------------------------------------------------------------

    async def kick(self, message: BrokerMessage) -> None:
        """Send a task; returns once it is durable."""
        await self.queue.enqueue(
            message.message,
            headers={TASK_ID: message.task_id, TASK_NAME: message.task_name},
            **enqueue_options(message.labels),
        )

    # -- receiving -----------------------------------------------------------------------------------------------

    async def listen(self) -> AsyncGenerator[AckableMessage, None]:
        """Every task as it comes, one at a time: a worker holds no more of them than taskiq has room for."""
        queue = self.queue
        while not self._stop.is_set():
            try:
                messages = await queue.receive(1, wait=RECEIVE_WAIT_S, ack_within=self._ack_within)
            except QueueClosed:
                if self._stop.is_set():
                    return
                raise
            for message in messages:
                yield self._fetched(message)

    def _fetched(self, message: Message[bytes]) -> AckableMessage:
        return Fetched(data=message.payload, ack=Offer(message, self._give_up, self._started))

    def _started(self, delivery: Delivery) -> None:
        task_id = delivery.message.context.headers.get(TASK_ID)
        if task_id is not None:
            self._deliveries[task_id] = delivery

    def _give_up(self, given_up: GivenUp) -> None:
        self._given_up.append(given_up)
        self._more_given_up.set()

    async def _settle_given_up(self) -> None:
        """Count what taskiq gave up as failed, so that it is tried again, or becomes a dead letter."""
        while True:
            while self._given_up:
                given_up = self._given_up.popleft()
                error = given_up.outcome
                trace = None if isinstance(error, Outcome) else error
                log.warning("taskiq gave a task up", **about(given_up.message), error=str(error), exc_info=trace)
                try:
                    await given_up.message.fail(error)
                except LeaseLost as lost:
                    log.warning("given up too late, the task is run again", **about(given_up.message), error=str(lost))
            await self._more_given_up.wait()
