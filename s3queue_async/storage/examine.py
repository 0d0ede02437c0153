"""What a store can tell about how it is set up; for diagnosis only, a queue asks for none of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class LifecycleRule:
    """A rule of a bucket that touches objects of the queue.

    Attributes:
        name: Its id.
        prefix: Of the keys that it is about; "" for all.
        expires_days: Days after which objects are deleted; None when it deletes none.
        moves_to: Storage classes that objects are moved to.
        ends_old_versions_days: Days after which old versions are deleted; None when it leaves them.
    """

    name: str
    prefix: str
    expires_days: float | None = None
    moves_to: tuple[str, ...] = ()
    ends_old_versions_days: int | None = None


@dataclass(frozen=True, slots=True)
class BucketReport:
    """How a bucket is set up, as far as the credentials may know.

    Attributes:
        versioning: ``Enabled``, ``Suspended``, or "" when it never was; None when that is not known.
        rules: The lifecycle rules that touch the queue; None when they are not known.
        uploads: Multipart uploads under the prefix that were never ended; a queue makes none. None: not known.
        unknown: Why something is not known, by the S3 operation.
    """

    versioning: str | None
    rules: tuple[LifecycleRule, ...] | None
    uploads: int | None
    unknown: dict[str, str]


@runtime_checkable
class Examinable(Protocol):
    """A storage that can be connected to although it may not be usable, and that knows how it is set up.

    Attributes:
        bucket: Its name.
        prefix: What all keys start with, without the slash that follows it; "" for the whole bucket.
    """

    bucket: str
    prefix: str

    async def connect(self) -> None:
        """Get ready for requests, without asking the store anything."""

    async def examine(self) -> BucketReport:
        """Look at what the store is set up for; what it does not tell is None."""
