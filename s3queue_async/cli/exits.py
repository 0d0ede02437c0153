"""How the commands end: exit codes, and errors as people or programs read them."""

from __future__ import annotations

from enum import IntEnum

from s3queue_async.errors import (
    InvalidPayload,
    InvalidPriority,
    InvalidSettings,
    InvalidURL,
    MessageNotFound,
    MessageTooLarge,
    QueueError,
    QueueFull,
    UnknownSetting,
)


class Exit(IntEnum):
    """Exit codes; docs/cli.md says the same."""

    DONE = 0
    FAULT = 1
    USAGE = 2
    NOT_FOUND = 3
    STORE = 4
    PARTLY = 5
    FULL = 6
    DECLINED = 7
    INTERRUPTED = 130


class Unread(Exception):
    """Whoever read the output has seen enough; click would make an exit code of its own of a BrokenPipeError."""


_USAGE = (InvalidPayload, InvalidPriority, InvalidSettings, InvalidURL, MessageTooLarge, UnknownSetting)


class Failed(Exception):
    """A command ends with this code.

    Args:
        code: The exit code.
        message: What happened, one sentence.
        suggestion: What to do about it.
    """

    def __init__(self, code: Exit, message: str, suggestion: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.suggestion = suggestion


def code_of(error: QueueError) -> Exit:
    """The exit code for an error of the library."""
    if isinstance(error, _USAGE):
        return Exit.USAGE
    if isinstance(error, MessageNotFound):
        return Exit.NOT_FOUND
    if isinstance(error, QueueFull):
        return Exit.FULL
    return Exit.STORE
