"""Rendezvous hashing: who should take what, without anybody asking anybody."""

from __future__ import annotations

import zlib
from collections.abc import Iterable


def weight(worker_id: str, name: str) -> int:
    """How much a thing falls to a worker; the worker with the highest weight is its own."""
    return zlib.crc32(f"{worker_id}/{name}".encode())


def falls_to(worker_id: str, name: str, others: Iterable[str]) -> bool:
    """Whether a thing falls to this worker among these others.

    A worker that joins or leaves changes only what falls to itself.
    """
    own = weight(worker_id, name), worker_id
    return all((weight(other, name), other) <= own for other in others)
