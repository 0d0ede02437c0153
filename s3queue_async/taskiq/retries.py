"""Retries of taskiq's tasks by the queue, with its backoff and its dead letters."""

from __future__ import annotations

from typing import Any

from taskiq import TaskiqMessage, TaskiqMiddleware, TaskiqResult
from taskiq.exceptions import NoResultError, TaskRejectedError

from s3queue_async.log import log
from s3queue_async.message import DeadLetter, Outcome, Release
from s3queue_async.taskiq.broker import S3QueueBroker
from s3queue_async.taskiq.delivery import about


class S3QueueRetryMiddleware(TaskiqMiddleware):
    """Has the queue retry tasks that fail: with exponential backoff up to ``max_attempts``; then they are dead letters.

    Instead of taskiq's retry middlewares, which send a new message for each retry and leave nothing behind after the last.
    A task may raise ``Retry``, ``DeadLetter`` and ``Release`` of ``s3queue_async``, too, and ``Context.reject()`` makes it a
    dead letter. Of an attempt that another one follows no result is stored.

    Args:
        default_retry_label: Whether tasks without a label ``retry_on_error`` are retried.
    """

    def __init__(self, *, default_retry_label: bool = True) -> None:
        super().__init__()
        self._default = default_retry_label

    async def on_error(self, message: TaskiqMessage, result: TaskiqResult[Any], exception: BaseException) -> None:
        """Decide what the acknowledgement of a failed task is to mean."""
        if isinstance(exception, NoResultError) or not isinstance(self.broker, S3QueueBroker):
            return
        delivery = self.broker.delivery(message.task_id)
        if delivery is None:
            return
        if not isinstance(exception, Outcome) and not self._wants_retry(message):
            return
        if delivery.is_acked:
            log.warning("a task failed after its acknowledgement, so it cannot be retried", **about(delivery.message))
            return
        if isinstance(exception, TaskRejectedError):
            exception = DeadLetter("rejected by the task")
        delivery.outcome = exception
        context = delivery.message.context
        final = isinstance(exception, DeadLetter) or context.attempt >= context.max_attempts
        if isinstance(exception, Release) or not final:
            result.error = NoResultError()

    def _wants_retry(self, message: TaskiqMessage) -> bool:
        label = message.labels.get("retry_on_error")
        if label is None:
            return self._default
        return label.lower() == "true" if isinstance(label, str) else bool(label)
