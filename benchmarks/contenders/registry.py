"""Every contender, with the settings that suit it best, and how its process is started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.contenders.base import Place, Task
from benchmarks.redis_server import MISSING as NO_REDIS

ROOT = Path(__file__).parents[2]
PEERS = Path(os.environ.get("BENCH_PEERS", ROOT / ".venv-peers"))
PEERS_PYTHON = PEERS / "bin" / "python"
S3DB = PEERS / "s3db"
TIMEOUT_S = 150.0
HOW_TO_INSTALL = "not installed: run make bench-peers"


class Failed(Exception):
    """Raised when a contender ended without an answer; says what it wrote last."""


@dataclass(frozen=True)
class Entry:
    """One row of the comparison.

    Attributes:
        name: As shown.
        contender: The module under benchmarks/contenders.
        store: Where its messages are: "S3" or "Redis".
        ours: Whether it is this library.
        messages: How many suit it: some seconds of work.
        trips: Messages sent one at a time.
        settings: What suits it best, for people.
        why_not: Why it cannot run here; "" when it can.
    """

    name: str
    contender: str
    store: str
    messages: int
    trips: int
    settings: str
    ours: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    why_not: Callable[[], str] = field(default=lambda: "", repr=False)

    def run(self, work: str, messages: int, place: Place) -> dict[str, Any]:
        """Have a process of its own do the work, and return its answer. Raises Failed."""
        task = json.dumps(asdict(Task(self.contender, work, messages, place, options=self.options)))
        return _answer(self._command(task))

    def _command(self, task: str) -> list[str]:
        if self.contender == "s3db":
            # Node looks for packages where the program is.
            program = shutil.copy(Path(__file__).parent / "s3db" / "contender.mjs", S3DB)
            return [str(_node()), str(program), task]
        python = sys.executable if self.ours else str(PEERS_PYTHON)
        return [python, "-m", "benchmarks.contenders", task]


def _answer(command: list[str]) -> dict[str, Any]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("S3QUEUE_")}
    environment["AWS_EC2_METADATA_DISABLED"] = "true"
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=TIMEOUT_S,
            text=True,
        )
    except subprocess.TimeoutExpired as error:
        raise Failed(f"no answer within {TIMEOUT_S:g} s") from error
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
        raise Failed(f"ended with {done.returncode}; its last words: {said[-1][:300]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _node() -> Path:
    return PEERS / "bin" / "node"


def _lacks(module: str) -> str:
    """Why the peers' Python cannot import it; "" when it can."""
    if not PEERS_PYTHON.exists():
        return HOW_TO_INSTALL
    tried = subprocess.run([str(PEERS_PYTHON), "-c", f"import {module}"], check=False, capture_output=True, text=True)
    return f"{HOW_TO_INSTALL} ({tried.stderr.strip().splitlines()[-1]})" if tried.returncode else ""


def _lacks_s3db() -> str:
    if not (S3DB / "node_modules" / "s3db.js").exists() or not _node().exists():
        return f"{HOW_TO_INSTALL} (Node and the npm packages of benchmarks/contenders/s3db)"
    return ""


def _lacks_redis(module: str) -> str:
    return NO_REDIS if shutil.which("redis-server") is None else _lacks(module)


def entries(schemes: list[str]) -> list[Entry]:
    """All contenders, this library first, in the order in which they take turns.

    Args:
        schemes: Which of our S3 clients can be used.
    """
    clients = {"s3": "aiobotocore", "s3+obstore": "obstore"}
    ours = [
        Entry(
            f"s3queue_async, {clients[scheme]}", "ours", "S3", 51_200, 50, "defaults, 32 handlers at a time", ours=True,
            options={"scheme": scheme},
        )
        for scheme in schemes
    ]  # fmt: skip
    return [
        *ours,
        Entry(
            "jqueue", "jqueue", "S3", 1000, 20, "one broker, all enqueues in one commit, 250 a dequeue",
            why_not=lambda: _lacks("jqueue"),
        ),
        Entry(
            "pawn-queue", "pawn", "S3", 300, 30, "32 in flight, 100 a poll, no pause between polls",
            why_not=lambda: _lacks("pawn_queue"),
        ),
        Entry(
            "s3db.js S3QueuePlugin", "s3db", "S3", 100, 15, "no coordinator, concurrency 3, polls every 100 ms",
            why_not=_lacks_s3db,
        ),
        Entry(
            "SAQ", "saq", "Redis", 10_000, 50, "64 enqueues in flight, 32 handlers at a time",
            why_not=lambda: _lacks_redis("saq"),
        ),
        Entry(
            "taskiq, stream", "taskiq", "Redis", 10_000, 50, "64 enqueues in flight, 100 handlers at a time",
            options={"broker": "stream"}, why_not=lambda: _lacks_redis("taskiq_redis"),
        ),
        Entry(
            "taskiq, list", "taskiq", "Redis", 10_000, 50, "as above; what a worker dies with is lost",
            options={"broker": "list"}, why_not=lambda: _lacks_redis("taskiq_redis"),
        ),
    ]  # fmt: skip
