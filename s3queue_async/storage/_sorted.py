"""A sorted set of strings that stays fast with a million of them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator

# Chunks of this size keep both the shifting inside one chunk and the list of chunks short at 1,000,000 keys.
_CHUNK_MAX = 2000


class SortedStrings:
    """Strings in code point order, which is UTF-8 byte order; adding and removing cost about the square root."""

    def __init__(self, *, chunk_max: int = _CHUNK_MAX) -> None:
        self._chunk_max = chunk_max
        self._chunks: list[list[str]] = []
        self._lasts: list[str] = []

    def __len__(self) -> int:
        return sum(map(len, self._chunks))

    def add(self, value: str) -> None:
        """Add a string that is not in the set yet."""
        if not self._chunks:
            self._chunks.append([value])
            self._lasts.append(value)
            return
        at = min(bisect_left(self._lasts, value), len(self._chunks) - 1)
        chunk = self._chunks[at]
        insort(chunk, value)
        if len(chunk) > self._chunk_max:
            half = len(chunk) // 2
            # Keys mostly grow (they begin with a time): a split near the end leaves full chunks behind.
            cut = len(chunk) - 1 if chunk[-1] == value and at == len(self._chunks) - 1 else half
            self._chunks.insert(at + 1, chunk[cut:])
            self._lasts.insert(at + 1, chunk[-1])
            del chunk[cut:]
        self._lasts[at] = chunk[-1]

    def remove(self, value: str) -> None:
        """Remove a string that is in the set."""
        at = bisect_left(self._lasts, value)
        chunk = self._chunks[at]
        del chunk[bisect_left(chunk, value)]
        if chunk:
            self._lasts[at] = chunk[-1]
        else:
            del self._chunks[at], self._lasts[at]

    def after(self, bound: str, *, inclusive: bool) -> Iterator[str]:
        """Iterate over the strings greater than ``bound``, or from it on when inclusive."""
        find = bisect_left if inclusive else bisect_right
        at = find(self._lasts, bound)
        if at == len(self._chunks):
            return
        start = find(self._chunks[at], bound)
        yield from self._chunks[at][start:]
        for chunk in self._chunks[at + 1 :]:
            yield from chunk
