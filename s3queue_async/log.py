"""The library's logger: quiet until the application asks for it.

Where structlog is configured, events go there; otherwise they go to the standard library's logger
``s3queue_async``, which shows nothing before a handler is set up.

Context comes along by structlog's context variables: ``queue`` and ``worker`` in what workers say, ``message`` and
``attempt`` as well while a handler runs, also in what the handler itself logs with structlog.
"""

from __future__ import annotations

import logging
from contextvars import ContextVar
from typing import Any

import structlog
from structlog.contextvars import STRUCTLOG_KEY_PREFIX

NAME = "s3queue_async"

logging.getLogger(NAME).addHandler(logging.NullHandler())

_standard = structlog.wrap_logger(
    logging.getLogger(NAME),
    processors=[
        structlog.stdlib.filter_by_level,
        structlog.contextvars.merge_contextvars,
        structlog.processors.format_exc_info,
        structlog.processors.KeyValueRenderer(key_order=["event"], drop_missing=True),
    ],
    wrapper_class=structlog.stdlib.BoundLogger,
    cache_logger_on_first_use=True,
)
_configured = structlog.get_logger(NAME)


class Log:
    """Chooses at each call, because applications configure their logging after their imports."""

    def __getattr__(self, level: str) -> Any:
        return getattr(_configured if structlog.is_configured() else _standard, level)


log = Log()


bound = structlog.contextvars.bound_contextvars
"""The same for the tasks that are started inside of a block."""


MESSAGE: ContextVar[str] = ContextVar(f"{STRUCTLOG_KEY_PREFIX}message")
ATTEMPT: ContextVar[int] = ContextVar(f"{STRUCTLOG_KEY_PREFIX}attempt")
"""Set for each message that is handled, and found by structlog because of their names: bind() would take ten times the
calls, a quarter of what a message costs at all."""


def bind(**context: object) -> None:
    """Add to the context of everything that this task, and those that it starts from now on, will log."""
    structlog.contextvars.bind_contextvars(**context)
