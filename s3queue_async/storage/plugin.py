"""A namespaced view of a storage, with a time to live and a compare-and-swap loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from s3queue_async.errors import StoreUnavailable
from s3queue_async.storage.base import (
    LIST_LIMIT_MAX,
    Condition,
    Conflict,
    Deleted,
    Entry,
    IfAbsent,
    IfVersion,
    NotFound,
    Page,
    PreconditionFailed,
    Storage,
    StorageAnswer,
    Stored,
    Unmodified,
    Written,
)

_UPDATE_ATTEMPTS_MAX = 16


def plugin_prefix(namespace: str) -> str:
    """What the keys of a namespace start with; the only place that spells it."""
    return f"plugin/{namespace}/"


class PluginStorage:
    """A storage of its own inside another one: keys are relative to ``plugin/<namespace>/``.

    The storage below is opened and closed by whoever made it; ``open`` and ``close`` here do nothing.

    Args:
        storage: The storage below.
        namespace: One part of a key; namespaces do not see each other.
        ttl_s: How long objects are good for after their last write, in seconds; None means for ever.
    """

    def __init__(self, storage: Storage, namespace: str, *, ttl_s: float | None = None) -> None:
        if not namespace or "/" in namespace:
            raise ValueError(f"a namespace is one part of a key, not {namespace!r}")
        self.namespace = namespace
        self.ttl_s = ttl_s
        self._storage = storage
        self._root = plugin_prefix(namespace)

    def __repr__(self) -> str:
        return f"PluginStorage({self._storage!r}, {self.namespace!r})"

    @property
    def date_resolution_s(self) -> float:
        """As of the storage below."""
        return self._storage.date_resolution_s

    async def open(self) -> None:
        """Do nothing: the owner of the storage below opens it."""

    async def close(self) -> None:
        """Do nothing: the owner of the storage below closes it."""

    def expired(self, modified_s: float, now_s: float) -> bool:
        """Whether an object has certainly outlived its time, however coarse the store's dates are.

        Args:
            modified_s: When it was last written, by the store's clock.
            now_s: The store's time now.
        """
        return self.ttl_s is not None and now_s >= modified_s + self.date_resolution_s + self.ttl_s

    async def get(
        self, key: str, *, span: tuple[int, int] | None = None, unless: str | None = None
    ) -> Stored | Unmodified:
        """Read an object; see Storage.get."""
        with _relative(key):
            found = await self._storage.get(self._root + key, span=span, unless=unless)
        if isinstance(found, Unmodified):
            return found
        return Stored(key, found.body, found.version, found.modified_s, found.date_s)

    async def put(self, key: str, body: bytes, *, when: Condition | None = None) -> Written:
        """Write an object whole; see Storage.put."""
        with _relative(key):
            return await self._storage.put(self._root + key, body, when=when)

    async def delete(self, key: str, *, when: IfVersion | None = None) -> Deleted:
        """Delete an object; see Storage.delete."""
        with _relative(key):
            return await self._storage.delete(self._root + key, when=when)

    async def delete_many(self, keys: Sequence[str]) -> Deleted:
        """Delete up to 1,000 objects; see Storage.delete_many."""
        return await self._storage.delete_many([self._root + key for key in keys])

    async def list(self, prefix: str, *, after: str = "", limit: int = LIST_LIMIT_MAX) -> Page:
        """List keys in order; see Storage.list."""
        page = await self._storage.list(self._root + prefix, after=self._root + after if after else "", limit=limit)
        skip = len(self._root)
        entries = [Entry(found.key[skip:], found.version, found.size, found.modified_s) for found in page.entries]
        return Page(entries, page.more, page.date_s)

    async def update(
        self, key: str, change: Callable[[bytes | None], bytes], *, attempts_max: int = _UPDATE_ATTEMPTS_MAX
    ) -> Written:
        """Read an object, change it, and write it unless somebody else did so meanwhile; then do it again.

        Args:
            key: The object's key.
            change: Makes the new body of the old one (None: there is none). It may be called several times, and
                each body must carry a fresh nonce: an equal body in the store is taken for this very write.
            attempts_max: How often to try.

        Raises:
            StoreUnavailable: Others were faster every time; or what the store raised, and then the change may
                have been applied.
        """
        body: bytes | None = None
        for _ in range(attempts_max):
            when: Condition
            try:
                found = await self.get(key)
            except NotFound:
                old, when = None, IfAbsent()
            else:
                assert isinstance(found, Stored)  # only a read that names a version is answered otherwise
                if found.body == body:
                    return Written(found.version, found.date_s)
                old, when = found.body, IfVersion(found.version)
            body = change(old)
            try:
                return await self.put(key, body, when=when)
            except (PreconditionFailed, Conflict):
                continue
        raise StoreUnavailable(
            f"{self._root}{key} was changed by others during each of {attempts_max} tries to change it.",
            suggestion="Try again; fewer writers of one key help.",
        )


@contextmanager
def _relative(key: str) -> Iterator[None]:
    try:
        yield
    except StorageAnswer as answer:
        answer.key = key
        raise
