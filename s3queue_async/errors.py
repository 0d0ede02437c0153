"""Every error that the library raises; each says whether to try again and what to do."""

from __future__ import annotations

from typing import ClassVar


class QueueError(Exception):
    """Base of all errors of this library.

    Attributes:
        retriable: True when the same call may succeed later without any change.
        suggestion: What the caller can do about it.
    """

    default_retriable: ClassVar[bool] = False
    default_suggestion: ClassVar[str] = "Read the message; the call cannot succeed as it is."

    def __init__(self, message: str, *, suggestion: str | None = None, retriable: bool | None = None) -> None:
        super().__init__(message)
        self.suggestion = self.default_suggestion if suggestion is None else suggestion
        self.retriable = self.default_retriable if retriable is None else retriable

    def __str__(self) -> str:
        return f"{self.args[0]} {self.suggestion}".strip()


class InvalidPayload(QueueError):
    """Raised before anything is written when a payload is not of the queue's type or cannot be encoded."""

    default_suggestion = "Pass a payload of the queue's payload_type."


class InvalidPriority(QueueError):
    """Raised when a priority is not an integer from 0 to 255."""

    default_suggestion = "Use an integer from 0 (last) to 255 (first)."


class InvalidSettings(QueueError):
    """Raised when a setting or an argument is out of its range; names the field and the range."""

    default_suggestion = "Correct the named field."


class UnknownSetting(QueueError):
    """Raised when a setting's name does not exist; names the nearest one."""

    default_suggestion = "See docs/configuration.md for the names."


class InvalidURL(QueueError):
    """Raised when the url of a queue cannot be understood."""

    default_suggestion = (
        "Use s3://bucket/prefix, sqlite:///path/queue.db or memory://name, as the argument or in S3QUEUE_URL."
    )


class MessageTooLarge(QueueError):
    """Raised before anything is written when an encoded message is larger than message_bytes_max."""

    default_suggestion = "Put the data into the bucket yourself and enqueue its key."


class MessageNotFound(QueueError):
    """Raised when no message or result with this id is in the queue."""

    default_suggestion = "Check the id; completed messages are kept only while retain_completed says so."


class QueueFull(QueueError):
    """Raised by enqueue when the backlog has reached max_pending; nothing was written."""

    default_retriable = True
    default_suggestion = "Wait for the workers, add workers, or raise max_pending."


class QueueClosed(QueueError):
    """Raised when a queue is used before it was opened, while it drains, or after it was closed."""

    default_suggestion = "Use the queue inside 'async with S3Queue(...)'."


class BlocksEventLoop(QueueError):
    """Raised when the blocking facade is called where an event loop runs, which would stand still meanwhile."""

    default_suggestion = (
        "Use S3Queue there and await its methods, or call this one in a thread: "
        "await asyncio.to_thread(queue.enqueue, payload)."
    )


class LeaseLost(QueueError):
    """Raised when another worker may own the message. Stop; do not acknowledge."""

    default_suggestion = "Stop working on the message; it is delivered again."


class StoreUnsupported(QueueError):
    """Raised when the store does not keep conditional writes; a queue on it would lose and repeat messages."""

    default_suggestion = (
        "Use a store with conditional writes (AWS S3, R2, MinIO, SeaweedFS 4.48+, Ceph), or upgrade this one."
    )


class StoreUnavailable(QueueError):
    """Raised when the store cannot be reached or refuses; a write may or may not have been applied.

    Attributes:
        code: The store's own code for a refusal, such as ``AccessDenied``; "" when there was no reply.
        date_s: The store's clock as it refused, seconds since the epoch; None when that is not known.
    """

    default_retriable = True
    default_suggestion = "Check the endpoint and the network, then try again."

    def __init__(
        self,
        message: str,
        *,
        suggestion: str | None = None,
        retriable: bool | None = None,
        code: str = "",
        date_s: float | None = None,
    ) -> None:
        super().__init__(message, suggestion=suggestion, retriable=retriable)
        self.code = code
        self.date_s = date_s


class Throttled(QueueError):
    """Raised when the store asks for fewer requests (503 SlowDown, 429 and their like)."""

    default_retriable = True
    default_suggestion = "Wait; the queue slows down by itself."

    def __init__(
        self,
        message: str,
        *,
        suggestion: str | None = None,
        retriable: bool | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, suggestion=suggestion, retriable=retriable)
        self.retry_after_s = retry_after_s


class CorruptObject(QueueError):
    """Raised or emitted when an object of the queue cannot be read; names its key.

    The queue goes on with the others and sets the object aside under ``quarantine/``.
    """

    default_suggestion = "Look at the copy under quarantine/; something else wrote or damaged the object."

    def __init__(self, key: str, reason: str, *, suggestion: str | None = None) -> None:
        super().__init__(f"{key}: {reason}.", suggestion=suggestion)
        self.key = key
        self.reason = reason


class NewerFormat(CorruptObject):
    """Raised when an object was written by a newer version of this library; it is left alone."""

    default_suggestion = "Upgrade s3queue_async here; the object is left as it is."


class Unreadable(QueueError):
    """Raised or emitted when this process cannot read an object that others may be able to read; names its key.

    The object is left as it is, for processes that have what this one lacks; the queue goes on with the others.

    Attributes:
        key: The object's key.
        reason: What is lacking.
    """

    default_suggestion = "Give this process what the others have; the object is left as it is."

    def __init__(self, key: str, reason: str, *, suggestion: str | None = None) -> None:
        super().__init__(f"{key}: {reason}.", suggestion=suggestion)
        self.key = key
        self.reason = reason


class ExtraMissing(Unreadable):
    """Raised when an object cannot be read without a package that is not installed here; it is left alone."""

    default_suggestion = "Install the extra that the message names; the object is left as it is."


class KeyUnavailable(Unreadable):
    """Raised when an object is encrypted and this process does not have its key; it is left alone."""

    default_suggestion = "Add the key to the Keyring of this process; the object is left as it is."


class DecryptionFailed(Unreadable):
    """Raised when an object was encrypted with another key of that id, or for another queue; it is left alone."""

    default_suggestion = "Compare the keys of all processes of the queue; the object is left as it is."


class PlaintextRefused(Unreadable):
    """Raised when an object is not encrypted and the Keyring says that it must be; it is left alone."""

    default_suggestion = (
        "Give every producer and worker the Keyring. To read what was written before, use accept_plaintext=True."
    )
