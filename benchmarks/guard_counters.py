"""Starts the processes in which the regression guard counts, and reads what callgrind and perf say of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.guard_child import MARK
from benchmarks.guard_workloads import WORKLOADS

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 900.0
ALLOCATORS = frozenset({"malloc", "calloc", "realloc"})
PARTS_EACH = 6
"""Parts that callgrind writes of a workload: before each of three runs, and the runs."""

Counts = dict[str, dict[str, float]]
"""By workload and count, for each message."""


class GuardError(RuntimeError):
    """Counting failed; the text says what to do."""


def environment(**more: str) -> dict[str, str]:
    """The same environment wherever it runs: the queue looks through all variables for settings."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    return kept | {"PYTHONHASHSEED": "0", "PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"} | more


def child(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.guard_child", *arguments]


def execute(command: Sequence[str], **variables: str) -> str:
    """Run it, and return what it printed.

    Raises:
        GuardError: It failed or took too long; the text has the end of what it wrote.
    """
    try:
        ended = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise GuardError(f"It took longer than {TIMEOUT_S:g} s: {' '.join(command)}") from error
    if ended.returncode:
        tail = (ended.stdout + ended.stderr)[-3000:]
        raise GuardError(f"It ended with {ended.returncode}: {' '.join(command)}\n{tail}")
    return ended.stdout


def count(names: Sequence[str] = tuple(WORKLOADS), *, valgrind: bool = True) -> tuple[Counts, list[str]]:
    """Count everything that can be counted here.

    Args:
        names: The workloads.
        valgrind: Use it where it is installed.

    Returns:
        The counts, and what was skipped, each with the reason.

    Raises:
        GuardError: A process failed.
    """
    jobs: list[Callable[[Sequence[str]], Counts]] = [plain]
    skipped: list[str] = []
    if valgrind and shutil.which("valgrind"):
        jobs += [instructions, allocations]
        skipped.append("instructions by perf stat: callgrind counts them already")
    else:
        reason = "valgrind is not installed" if valgrind else "--no-valgrind was given"
        skipped += [f"{what} by callgrind: {reason}" for what in ("instructions", "allocations")]
        lacking = perf_lacks()
        if lacking is None:
            jobs.append(instructions_by_perf)
        else:
            skipped.append(f"instructions by perf stat: {lacking}")
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda job: job(names), jobs))
    return merged(found), skipped


def merged(found: Iterable[Counts]) -> Counts:
    """All counts of each workload."""
    result: Counts = {}
    for counts in found:
        for workload, values in counts.items():
            result.setdefault(workload, {}).update(values)
    return result


def followed(names: Sequence[str]) -> dict[str, int]:
    """Those of the workloads whose instructions are counted, with the number of their messages under callgrind."""
    return {name: slow for name in names if (slow := WORKLOADS[name].messages_slow) is not None}


def plain(names: Sequence[str]) -> Counts:
    """Requests, bytes, keys and calls."""
    counts: Counts = json.loads(execute(child("counts", *names)))
    return counts


# -- callgrind -------------------------------------------------------------------------------------------------------


def instructions(names: Sequence[str]) -> Counts:
    """Instructions, with Python's own allocator."""
    return callgrind(names, "instructions", totals, "pymalloc")


def allocations(names: Sequence[str]) -> Counts:
    """Blocks of memory, with an allocator that asks the C library for each: Python's own hides most."""
    return callgrind(names, "allocations", allocated, "malloc")


def callgrind(names: Sequence[str], count: str, read: Callable[[str], int], allocator: str) -> Counts:
    """What a message costs by callgrind: the difference of a run with n messages and one with 2 n, by n."""
    sizes = followed(names)
    if not sizes:
        return {}
    with tempfile.TemporaryDirectory(prefix="s3queue-guard-") as directory:
        out = Path(directory) / "out"
        options = ["-q", "--tool=callgrind", "--compress-strings=no", f"--dump-before={MARK}"]
        command = ["valgrind", *options, f"--callgrind-out-file={out}", *child("marked", *sizes)]
        try:
            execute(command, PYTHONMALLOC=allocator)
        except GuardError as error:
            hint = "If valgrind cannot run this Python: python -m benchmarks.guard --no-valgrind"
            raise GuardError(f"{error}\n{hint}") from error
        parts = len(list(out.parent.glob("out.*")))
        if parts != PARTS_EACH * len(sizes):
            raise GuardError(
                f"callgrind wrote {parts} parts for {len(sizes)} workloads instead of {PARTS_EACH} for each: "
                f"it does not see the calls of {MARK}. Count without it: python -m benchmarks.guard --no-valgrind"
            )

        def part(number: int) -> int:
            return read(out.with_suffix(f".{number}").read_text(encoding="utf-8", errors="replace"))

        return {
            workload: {count: (part(PARTS_EACH * place + 6) - part(PARTS_EACH * place + 4)) / messages}
            for place, (workload, messages) in enumerate(sizes.items())
        }


def totals(part: str) -> int:
    """All instructions of a part of callgrind's output."""
    for line in part.splitlines():
        if line.startswith("totals:"):
            return int(line.split()[1])
    raise GuardError("callgrind wrote no totals")


def allocated(part: str) -> int:
    """Calls of the C library's allocator in a part of callgrind's output."""
    called, blocks = "", 0
    for line in part.splitlines():
        if line.startswith("cfn="):
            called = line.removeprefix("cfn=")
        elif line.startswith("calls=") and called in ALLOCATORS:
            blocks += int(line.removeprefix("calls=").split()[0])
    return blocks


# -- perf ------------------------------------------------------------------------------------------------------------


def perf_lacks(event: str = "instructions:u") -> str | None:
    """Why perf cannot count here; None when it can."""
    if not shutil.which("perf"):
        return "perf is not installed"
    try:
        perf([sys.executable, "-c", ""], event)
    except GuardError as error:
        return str(error).splitlines()[0]
    return None


def perf(command: Sequence[str], event: str = "instructions:u") -> int:
    """How often an event came while the command ran.

    Raises:
        GuardError: The command failed, or perf cannot count the event here.
    """
    with tempfile.TemporaryDirectory(prefix="s3queue-guard-") as directory:
        out = Path(directory) / "out"
        execute(["perf", "stat", "-x", ",", "-e", event, "-o", str(out), "--", *command])
        for line in out.read_text(encoding="utf-8").splitlines():
            fields = line.split(",")
            if fields[0].isdecimal():
                return int(fields[0])
            if fields[0].startswith("<"):
                raise GuardError(f"perf says of {event}: {fields[0].strip('<>')}")
    raise GuardError(f"perf wrote no count of {event}")


def instructions_by_perf(names: Sequence[str], event: str = "instructions:u") -> Counts:
    """What a message costs by perf: as by callgrind, less what comes before the workload."""
    found: Counts = {}
    for name in followed(names):
        messages = WORKLOADS[name].messages
        costs = [
            perf(child("once", name, str(many)), event) - perf(child("once", name, str(many), "--before"), event)
            for many in (messages, 2 * messages)
        ]
        found[name] = {"instructions (perf)": (costs[1] - costs[0]) / messages}
    return found
