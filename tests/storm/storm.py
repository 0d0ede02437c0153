"""The storm: real processes on a real store, everything that is done to them, and what must be true afterwards."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

import anyio
import msgspec
from rich.console import Console

from s3queue_async import Settings
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.storage.base import Storage, Stored
from s3queue_async.storage.s3 import S3Storage
from s3queue_async.testing.servers import Server
from tests.simulation.history import Disturbance
from tests.storm.processes import Program
from tests.storm.programs import POISON_EVERY, Task
from tests.storm.proxy import Cut, Proxy, Toxic, Toxics

BUCKET = "s3queue-storm"
PREFIX = "storm"
CLIENT_TIMEOUTS = "&read_timeout=3&connect_timeout=2"
JOBS_PER_PRODUCER = 1_000_000
SETTLES_WITHIN_S = 240.0
ENDS_WITHIN_S = 90.0
LOOK_EVERY_S = 1.0
TELL_EVERY_S = 15.0
DEEDS = {
    "kill": 30,
    "pause": 40,
    "terminate": 12,
    "cut": 12,
    "kill producer": 3,
    "pause producer": 3,
    "cut producer": 2,
}
TOXICS = Toxics(
    {
        Toxic.SLOW_REQUEST: 0.03,
        Toxic.LATE_REQUEST: 0.004,
        Toxic.CUT_REQUEST: 0.005,
        Toxic.SLOW_REPLY: 0.03,
        Toxic.CUT_REPLY: 0.005,
        Toxic.LOST_REPLY: 0.008,
        Toxic.HUNG_REPLY: 0.002,
        Toxic.REFUSED: 0.02,
    }
)


@dataclass(frozen=True)
class Plan:
    """How much of everything; ``deed_every_s`` is the mean time between two things done to processes."""

    seed: int = 1
    seconds: float = 300.0
    workers: int = 8
    producers: int = 2
    messages: int = 60_000
    visibility_s: float = 8.0
    deed_every_s: float = 1.5

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "visibility_timeout": self.visibility_s,
            "heartbeat_interval": self.visibility_s / 3,
            "max_poll_interval": 1.0,
            "segment_messages_max": 32,
            "segment_age": 3.0,
            "claim_linger": 6.0,
            "split_after": 4.0,
            "checkpoint_interval": 1.0,
            "backoff_base": 0.2,
            "backoff_max": 5.0,
            "max_attempts": 3,
            "drain_timeout": 5.0,
        }


@dataclass
class Record:
    """What the controller saw and did."""

    programs: list[Program] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    toxics: Counter[Toxic] = field(default_factory=Counter)
    crashed_at: dict[str, float] = field(default_factory=dict)
    disturbed: list[Disturbance] = field(default_factory=list)
    dead: dict[str, tuple[str, int]] = field(default_factory=dict)
    leftovers: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    storm_s: float = 0.0
    drained_s: float = 0.0


class Storm:
    """Runs one storm."""

    def __init__(self, plan: Plan, server: Server, directory: Path, console: Console) -> None:
        self.plan = plan
        self.settings = Settings(**plan.settings)
        self.server = server
        self.directory = directory
        self.console = console
        self.rng = Random(f"storm {plan.seed}")
        self.record = Record()
        self.acknowledged = 0
        self._began_s = time.monotonic()
        self._kept = {"worker": True, "producer": True}
        # Not through the proxy: what the store holds is looked at as it is.
        self.storage: Storage = S3Storage(
            BUCKET,
            PREFIX,
            endpoint_url=server.endpoint_url,
            region=server.region,
            addressing="path",
            access_key_id=server.access_key_id,
            secret_access_key=server.secret_access_key,
        )

    async def run(self) -> Record:
        await self.storage.open()
        try:
            async with anyio.create_task_group() as group:
                port = int(self.server.endpoint_url.rpartition(":")[2])
                self.proxy = Proxy(port, TOXICS, rng=Random(f"proxy {self.plan.seed}"), group=group)
                async with anyio.create_task_group() as keepers:
                    for role, number in (("worker", self.plan.workers), ("producer", self.plan.producers)):
                        for _ in range(number):
                            keepers.start_soon(self._keep, role)
                    await self._phases()
                group.cancel_scope.cancel()
            self.record.toxics = self.proxy.counts
            return self.record
        finally:
            for program in self.record.programs:
                program.close()
            with anyio.CancelScope(shield=True):
                await self.storage.close()

    async def _phases(self) -> None:
        await self._blow()
        self.record.storm_s = time.monotonic() - self._began_s
        self.proxy.calm()
        await self._end("producer")
        self._count()
        self._tell("the faults are over")
        await self._until_empty()
        self._tell("empty")
        await self._until_clean()
        await self._collect_dead()
        self._tell("clean")
        await self._end("worker")
        self.record.leftovers = await self._leftovers()

    # -- processes -----------------------------------------------------------------------------------------------

    async def _keep(self, role: str) -> None:
        """Have one process of a role, and another one when it ended."""
        while self._kept[role]:
            async with self.proxy.link() as link:
                program = Program(self._task(role, link.port), link)
                self.record.programs.append(program)
                await program.ended()
            self._account(program)
            if self._kept[role]:
                await anyio.sleep(self.rng.uniform(0.05, 1.5))

    def _task(self, role: str, port: int) -> Task:
        plan = self.plan
        number = len(self.record.programs)
        through_proxy = replace(self.server, endpoint_url=f"http://127.0.0.1:{port}")
        return Task(
            name=f"{role}-{number}",
            role=role,
            directory=str(self.directory),
            url=through_proxy.queue_url(BUCKET, PREFIX) + CLIENT_TIMEOUTS,
            environment=self.server.environment(),
            settings=plan.settings,
            seed=plan.seed,
            # Some of the time a producer is dead, cut off or just starting.
            rate=1.2 * plan.messages / plan.seconds / plan.producers,
            first=number * JOBS_PER_PRODUCER,
            # It costs a lease for each of its attempts, so there is not one for each time that a producer starts anew.
            poison_at=100 if number < plan.workers + plan.producers else POISON_EVERY // 2,
        )

    def _account(self, program: Program) -> None:
        code = program.exit_code
        if code == -9 and (program.killed or program.died_of_poison):
            assert program.ended_s is not None
            self.record.crashed_at[program.name] = program.ended_s
            self.record.counts["poisoned"] += not program.killed
        elif code != 0 or not program.told_to_end:
            self.record.problems.append(f"{program} ended with exit code {code}:\n{program.log_tail()}")

    async def _end(self, role: str) -> None:
        """SIGTERM every process of a role: each must end with exit code 0 (see ``_account``), and soon."""
        self._kept[role] = False
        ending = [program for program in self.record.programs if program.role == role and program.alive]
        async with anyio.create_task_group() as group:
            for program in ending:
                group.start_soon(self._terminate, program)

    async def _terminate(self, program: Program) -> None:
        while not program.registered and program.alive:  # noqa: ASYNC110 - its journal is a file
            await anyio.sleep(0.05)
        program.tell_to_end()
        with anyio.move_on_after(ENDS_WITHIN_S):
            await program.gone.wait()
        if program.alive:
            self.record.problems.append(f"{program} did not end {ENDS_WITHIN_S:g} s after SIGTERM")
            program.kill()
            await program.gone.wait()

    # -- what goes wrong -----------------------------------------------------------------------------------------

    async def _blow(self) -> None:
        plan = self.plan
        self._began_s = told_s = time.monotonic()
        async with anyio.create_task_group() as deeds:
            while (passed_s := time.monotonic() - self._began_s) < plan.seconds or self.acknowledged < plan.messages:
                if passed_s > 2 * plan.seconds:
                    self.record.problems.append(f"only {self.acknowledged:,} messages acknowledged")
                    break
                await anyio.sleep(self.rng.expovariate(1 / plan.deed_every_s))
                self._count()
                [deed] = self.rng.choices(list(DEEDS), list(DEEDS.values()))
                program = self._victim(deed)
                if program is not None:
                    deeds.start_soon(self._do, deed, program)
                if time.monotonic() - told_s > TELL_EVERY_S:
                    told_s = time.monotonic()
                    self._tell("storm")
            # What still stands still or is cut off goes on at once.
            for program in self.record.programs:
                program.release()

    def _victim(self, deed: str) -> Program | None:
        role = "producer" if deed.endswith("producer") else "worker"
        alive = [program for program in self.record.programs if program.alive and program.role == role]
        if deed.startswith("kill"):
            # At any moment of its life: starting, paused, draining.
            return self.rng.choice(alive) if alive else None
        able = [program for program in alive if program.registered and not (program.disturbed or program.told_to_end)]
        if role == "worker" and len(able) < 2:
            return None
        return self.rng.choice(able) if able else None

    async def _do(self, deed: str, program: Program) -> None:
        self.record.counts[deed] += 1
        rng, lease_s = self.rng, self.settings.visibility_timeout
        match deed.split()[0]:
            case "kill":
                program.kill()
            case "terminate":
                await self._terminate(program)
            case "pause":
                for_s = rng.choice((rng.uniform(0.1, 0.6 * lease_s), rng.uniform(1.2 * lease_s, 2 * lease_s)))
                since_s, until_s = await program.pause(for_s)
                self.record.disturbed.append(Disturbance(since_s, until_s, program.name, "pause"))
            case "cut":
                how = rng.choice(list(Cut))
                since_s, until_s = await program.cut(how, rng.uniform(1.3 * lease_s, 2 * lease_s))
                self.record.disturbed.append(Disturbance(since_s, until_s, program.name, "cut"))

    def _count(self) -> None:
        producers = [program for program in self.record.programs if program.role == "producer"]
        for program in producers:
            program.read()
        self.acknowledged = sum(program.acknowledged for program in producers)

    def _tell(self, phase: str) -> None:
        passed_s = time.monotonic() - self._began_s
        done = ", ".join(f"{count} {name}" for name, count in sorted(self.record.counts.items()))
        alive = sum(program.alive for program in self.record.programs)
        self.console.print(
            f"{passed_s:4.0f} s {phase}: {self.acknowledged:,} messages acknowledged, {alive} processes; {done}",
            highlight=False,
        )

    # -- afterwards ----------------------------------------------------------------------------------------------

    async def _until_empty(self) -> None:
        """The faults are over: no message may be left after a while."""
        settings = self.settings
        began_s = time.monotonic()
        bound_s = 8 * settings.visibility_timeout + settings.max_attempts * 20.0 + SETTLES_WITHIN_S
        while left := [*await self._keys(layout.READY), *await self._keys(layout.DELAYED)]:
            if time.monotonic() - began_s > bound_s:
                self.record.problems.append(f"not empty {bound_s:.0f} s after the faults ended: {left[:5]}")
                break
            await anyio.sleep(LOOK_EVERY_S)
        self.record.drained_s = time.monotonic() - began_s

    async def _until_clean(self) -> None:
        """Give the sweeps as long as the simulation gives them; what is left then is left behind."""
        settings = self.settings
        bound_s = TOXICS.late_s[1] + 4 * settings.visibility_timeout + 2 * settings.claim_linger
        heartbeats = f"plugin/{layout.WORKERS}/"
        with anyio.move_on_after(bound_s):
            while any(not key.startswith(heartbeats) for key in await self._leftovers()):  # noqa: ASYNC110 - a store
                await anyio.sleep(LOOK_EVERY_S)

    async def _leftovers(self) -> list[str]:
        """What ``cluster.Cluster`` calls left over, by the same rule."""
        allowed: tuple[str, ...] = (
            layout.CONFIG,
            "plugin/totals/",
            f"plugin/{layout.COORDINATOR}/",
            "plugin/dedup/",
            layout.DEAD,
            layout.HISTORY,
        )
        if self.proxy.counts[Toxic.LATE_REQUEST]:
            # A write of the probe that lands after the probe cleaned up.
            allowed = (*allowed, "plugin/probe/")
        return [key for key in await self._keys("") if not key.startswith(allowed)]

    async def _collect_dead(self) -> None:
        for key in await self._keys(layout.DEAD):
            found = await self.storage.get(key)
            assert isinstance(found, Stored)
            if segments.is_void(SegmentKey.parse(key).created_ms, found.modified_s, self.settings.segment_age):
                continue
            for record in segments.decode(key, found.body).index.records:
                reason = record.failure.reason if record.failure else ""
                self.record.dead[record.id] = (reason, record.attempts)

    async def _keys(self, prefix: str) -> list[str]:
        found: list[str] = []
        while True:
            page = await self.storage.list(prefix, after=found[-1] if found else "")
            found += [entry.key for entry in page.entries]
            if not page.more:
                return found


def save(plan: Plan, record: Record, path: Path) -> None:
    """Write down what the controller knows, beside the journals."""
    known = {
        "plan": plan,
        "crashed_at": record.crashed_at,
        "disturbed": record.disturbed,
        "dead": record.dead,
        "leftovers": record.leftovers,
        "problems": record.problems,
        "processes": {
            program.name: {"ended_s": program.ended_s, "exit_code": program.exit_code} for program in record.programs
        },
    }
    path.write_bytes(msgspec.json.format(msgspec.json.encode(known)))
