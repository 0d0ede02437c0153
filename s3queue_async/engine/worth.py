"""Whether compression pays: tried on samples, remembered from segment to segment."""

from __future__ import annotations

from collections.abc import Sequence

COMPRESS_FROM_BYTES = 256
PAYS_BELOW = 0.9
"""Compression pays when it takes a tenth away."""
SAMPLE_BYTES = 64 * 1024
SAMPLE_EVERY = 16
NEWS_PART = 0.2
"""How much of what is expected of the next segment the last one says."""


class Worth:
    """Whether compressing payloads pays, as far as the last segments tell."""

    def __init__(self) -> None:
        self.expected: float | None = None
        self._passed_over = 0

    def decide(self, payloads: Sequence[bytes], size: int) -> bool:
        """Whether to compress these. Where the last ones did not pay, only every 16th segment's sample is tried."""
        if size < COMPRESS_FROM_BYTES:
            return False
        if self.expected is None or (self.expected > PAYS_BELOW and self._passed_over >= SAMPLE_EVERY):
            sample = _sample(payloads)
            self.learn(len(compressed(sample)) / len(sample))
            self._passed_over = 0
        if self.expected is not None and self.expected <= PAYS_BELOW:
            return True
        self._passed_over += 1
        return False

    def learn(self, ratio: float) -> None:
        """The size after compression over the one before."""
        self.expected = ratio if self.expected is None else self.expected + NEWS_PART * (ratio - self.expected)


def _sample(payloads: Sequence[bytes]) -> bytes:
    first = next(payload for payload in payloads if payload)
    if len(first) >= SAMPLE_BYTES:
        # The beginning of a file often is unlike the rest.
        start = (len(first) - SAMPLE_BYTES) // 2
        return first[start : start + SAMPLE_BYTES]
    taken: list[bytes] = []
    size = 0
    for payload in payloads:
        taken.append(payload)
        size += len(payload)
        if size >= SAMPLE_BYTES:
            break
    return b"".join(taken)


def compressed(data: bytes) -> bytes:
    """The bytes compressed. Raises ImportError when the extra ``zstd`` is missing."""
    # Imported where it is used: it is optional, and costs time that a queue without compression need not spend.
    from s3queue_async.compression import compress

    return compress(data)


def smaller(data: bytes) -> bytes | None:
    """The bytes compressed; None when that does not pay."""
    if len(data) < COMPRESS_FROM_BYTES:
        return None
    less = compressed(data)
    return less if len(less) <= PAYS_BELOW * len(data) else None
