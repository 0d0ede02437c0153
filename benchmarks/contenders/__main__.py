"""Run one contender's task in this process: ``python -m benchmarks.contenders TASK``, both sides JSON.

The peers' Python runs it, too, so it imports nothing but the standard library and the contender.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
from dataclasses import asdict
from typing import Any

from benchmarks.contenders.base import Contender, Place, Task, drain, round_trips

GRACE_S = 1.0


async def run(task: Task) -> dict[str, Any]:
    """Do what the task says; returns what can be written as JSON."""
    module = importlib.import_module(f"benchmarks.contenders.{task.contender}")
    contender: Contender = module.make(task.place, **task.options)
    if task.work == "drain":
        return asdict(await drain(contender, task.messages, payload_bytes=task.payload_bytes, grace_s=GRACE_S))
    if task.work == "round trips":
        return {"seconds": await round_trips(contender, task.messages)}
    raise ValueError(f"work={task.work!r} must be 'drain' or 'round trips'")


def main() -> None:
    described = json.loads(sys.argv[1])
    described["place"] = Place(**described["place"])
    print(json.dumps(asyncio.run(run(Task(**described)))))


if __name__ == "__main__":
    main()
