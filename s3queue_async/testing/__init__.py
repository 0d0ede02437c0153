"""For tests: a queue in memory and on virtual time, a store that fails on demand; see docs/testing_your_handlers.md."""

from s3queue_async.testing.clock import LoopClock, Stuck, VirtualLoop, run_virtual
from s3queue_async.testing.enqueued import Enqueued
from s3queue_async.testing.faults import FaultyStorage, Gate
from s3queue_async.testing.queues import FaultyMemory, IdleReport, MemoryQueue, NotIdle, VirtualTime

__all__ = [
    "Enqueued",
    "FaultyMemory",
    "FaultyStorage",
    "Gate",
    "IdleReport",
    "LoopClock",
    "MemoryQueue",
    "NotIdle",
    "Stuck",
    "VirtualLoop",
    "VirtualTime",
    "run_virtual",
]
