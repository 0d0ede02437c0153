"""zstd, for segments; needs the extra ``zstd``, and is imported only where a segment is compressed."""

from __future__ import annotations

import threading

import zstandard

LEVEL = 3
"""zstd's own default: about 1 GB/s on JSON (``python -m benchmarks.packing``)."""

# A compressor must not be used by two threads at a time, and making one takes longer than a small segment does.
_per_thread = threading.local()


class CannotDecompress(ValueError):
    """The bytes are no frame of zstd, or not one of the size that was announced."""


def compress(data: bytes) -> bytes:
    """One zstd frame that tells the size of its content."""
    compressor: zstandard.ZstdCompressor | None = getattr(_per_thread, "compressor", None)
    if compressor is None:
        compressor = _per_thread.compressor = zstandard.ZstdCompressor(level=LEVEL)
    return compressor.compress(data)


def content_size(data: bytes) -> int:
    """Bytes of a frame's content, as the frame says. Raises CannotDecompress when it does not say."""
    try:
        size = zstandard.frame_content_size(data)
    except zstandard.ZstdError as error:
        raise CannotDecompress(str(error)) from error
    if size < 0:
        raise CannotDecompress("the frame does not say how large its content is")
    return size


def decompress(data: bytes, size: int) -> bytes:
    """The content of one whole frame.

    Args:
        data: The frame, and nothing behind it.
        size: Bytes of the content; no more memory than this is taken.

    Raises:
        CannotDecompress: It is no frame, or its content has another size.
    """
    # zstandard allocates what the frame says, whatever ``max_output_size`` is: look first.
    announced = content_size(data)
    if announced != size:
        raise CannotDecompress(f"a frame of {announced} bytes where {size} were expected")
    try:
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CannotDecompress(str(error)) from error
