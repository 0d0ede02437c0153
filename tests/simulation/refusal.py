"""Stores that do not keep their word: whatever else goes wrong, no queue may be opened on one."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from dataclasses import replace
from random import Random

import anyio

from s3queue_async import QueueError, S3Queue
from s3queue_async.errors import StoreUnsupported
from tests.simulation.scenario import Scenario, draw
from tests.simulation.store import Client, Store, Wrong
from tests.simulation.world import Process, ProcessClock, World, deterministic_scopes

TRIES_MAX = 60


def check_refusals(seed: int) -> list[str]:
    """Open a queue on each kind of wrong store; returns which of them was accepted."""
    logging.disable(logging.CRITICAL)
    scenario = draw(seed)
    problems = []
    for wrong in Wrong:
        deterministic_scopes()
        world = World(seed)
        try:
            asyncio.set_event_loop(world)
            verdict = world.run_until_complete(_open(world, scenario, wrong))
        finally:
            world.close()
            asyncio.set_event_loop(None)
        if verdict != "refused":
            problems.append(f"a store that {wrong.value} was {verdict}")
    return problems


async def _open(world: World, scenario: Scenario, wrong: Wrong) -> str:
    # Where the second of two writes of one key is refused for being too soon, no race shows whether creating is atomic.
    profile = replace(scenario.profile, key_writes_per_s=float("inf"))
    faults = replace(scenario.faults, counts=Counter())
    store = Store(world, profile, faults, rng=Random(f"wrong store {scenario.seed}"), wrong=wrong)
    process = Process(world, "opener")
    random = Random(f"opener {scenario.seed}")
    for _ in range(TRIES_MAX):
        queue: S3Queue[object] = S3Queue(
            storage=Client(store, process), settings=scenario.settings, clock=ProcessClock(process), rng=random
        )
        try:
            async with queue:
                return "accepted"
        except StoreUnsupported:
            return "refused"
        except QueueError:
            await anyio.sleep(1.0)
    return "neither refused nor accepted"
