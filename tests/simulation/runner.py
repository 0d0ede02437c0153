"""Run simulated clusters, one for each seed, and check their histories.

python -m tests.simulation --seeds 300 --jobs 2     many seeds, with a summary
python -m tests.simulation --seed 41                replay one, with its trace
python -m tests.simulation --ablations              remove each safeguard in turn, and find the seed that shows it
python -m tests.simulation --confirm                run those seeds again
python -m tests.simulation --seeds 300 --encrypted  every process encrypts, with one of two keys, and some compress
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import pytest
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from tests.simulation import caught
from tests.simulation.ablations import ABLATIONS
from tests.simulation.checker import check
from tests.simulation.cluster import Outcome, simulate
from tests.simulation.refusal import check_refusals
from tests.simulation.scenario import BOARD_FAULTS, PROCESS_FAULTS, Scenario, draw
from tests.simulation.store import REQUEST_FAULTS
from tests.unit.queue import test_coincidences as coincidences

SHOWN_LINES = 40
EVERY_FAULT_AFTER = 1000
"""From this many seeds on, each kind of fault must have happened."""
REGRESSIONS = (61, 138, 163, 263, 1074, 2914, 3422, 3583, 10694)
"""Seeds that failed once: a ticket made a delayed message due (61); a coordinator's resignation lost against its own last
publication (138, 263), or waited for a reply until no time was left to delete the heartbeat (1074); a coordinator was
deposed in the middle of a cycle (163); a copy that landed too late hid one that had been run (2914); a local clock that had
just jumped made one due (3422); a stale ticket was followed again and again (3583); a DELETE that waited for its turn made
an enqueue ambiguous (10694). A change in how often chance is asked gives them another meaning; the safeguards are
ablations, too, whose seeds ``make ablations`` finds anew."""


@dataclass
class Result:
    """What one seed came to."""

    seed: int
    problems: list[str]
    simulated_s: float = 0.0
    messages: int = 0
    runs: int = 0
    takeovers: int = 0
    requests: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    causes: Counter[str] = field(default_factory=Counter)
    story: list[str] = field(default_factory=list)


def hush() -> None:
    """Say nothing when the tasks of crashed processes are thrown away in the middle of what they did."""
    sys.unraisablehook = lambda unraisable: None


def prepared(
    seed: int, ablation: str | None, patch: pytest.MonkeyPatch, *, remove: bool = True, encrypted: bool = False
) -> Scenario:
    """The scenario of a seed; with an ablation's focus, if one is named, and without its safeguard."""
    scenario = replace(draw(seed), encrypted=encrypted)
    if ablation is None:
        return scenario
    if remove:
        ABLATIONS[ablation].remove(patch)
    return ABLATIONS[ablation].focus(scenario)


def run_seed(seed: int, ablation: str | None = None, *, remove: bool = True, encrypted: bool = False) -> Result:
    """Simulate and check one seed; a failure of the simulation itself is a problem, too."""
    hush()
    with pytest.MonkeyPatch.context() as patch:
        try:
            outcome = simulate(prepared(seed, ablation, patch, remove=remove, encrypted=encrypted))
        except Exception:  # noqa: BLE001 - reported with the seed that replays it
            return Result(seed, [traceback.format_exc()[-1500:]])
    history = outcome.history
    problems, causes = check(history)
    if ablation is None:
        problems += check_refusals(seed)
    return Result(
        seed,
        problems,
        outcome.simulated_s,
        len(history.sent),
        len(history.runs),
        outcome.takeovers,
        outcome.requests,
        outcome.scenario.faults.counts,
        causes,
        shortened(outcome, problems),
    )


def shortened(outcome: Outcome, problems: list[str]) -> list[str]:
    """The lines of the trace that are about the message or the segment of the first problem."""
    if not problems:
        return []
    words = [word.strip("',[]()") for word in problems[0].split()]
    ids = {part[:26] for word in words for part in word.replace("/", " ").split() if len(part) > 26}
    always: tuple[str, ...] = (" crashes", " is resumed", "the faults are over", " lost worker", " lost producer")
    always += tuple(f": {deed} for " for deed in PROCESS_FAULTS)
    lines = [line for line in outcome.trace if any(i in line for i in ids) or any(word in line for word in always)]
    return lines[-SHOWN_LINES:]


def replay(seed: int, ablation: str | None, console: Console, *, encrypted: bool) -> int:
    hush()
    with pytest.MonkeyPatch.context() as patch:
        outcome = simulate(prepared(seed, ablation, patch, encrypted=encrypted))
    for line in outcome.trace:
        console.print(line, markup=False, highlight=False)
    problems, causes = check(outcome.history)
    console.print(f"seed {seed}: {outcome.scenario}", markup=False, highlight=False)
    console.print(f"repeated runs by cause: {dict(causes)}", markup=False)
    for problem in problems:
        console.print(f"PROBLEM {problem}", markup=False, style="red")
    return 1 if problems else 0


def run_many(seeds: Sequence[int], jobs: int, console: Console, *, encrypted: bool) -> int:
    began = time.monotonic()
    total = Result(-1, [])
    failed: list[Result] = []
    columns = (TextColumn("seeds"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Spawned, so that every worker begins with the fixed hash seed and nothing else; renewed, to keep memory flat.
    context = multiprocessing.get_context("spawn")
    with Progress(*columns, console=console) as progress, context.Pool(jobs, maxtasksperchild=200) as pool:
        task = progress.add_task("seeds", total=len(seeds))
        for result in pool.imap_unordered(partial(run_seed, encrypted=encrypted), seeds, chunksize=4):
            progress.advance(task)
            total.simulated_s += result.simulated_s
            total.messages += result.messages
            total.runs += result.runs
            total.takeovers += result.takeovers
            total.requests += result.requests
            total.faults += result.faults
            total.causes += result.causes
            if result.problems:
                failed.append(result)
                progress.console.print(f"seed {result.seed}: {result.problems[0]}", markup=False, style="red")
    summary(console, total, len(seeds), len(failed), time.monotonic() - began)
    for result in sorted(failed, key=lambda result: result.seed)[:5]:
        console.print(f"\nseed {result.seed}: replay with  make sim SEED={result.seed}", markup=False)
        for line in (*result.problems[:5], *result.story):
            console.print(f"  {line}", markup=False, highlight=False)
    never = [name for name in (*PROCESS_FAULTS, *BOARD_FAULTS, *REQUEST_FAULTS) if not total.faults[name]]
    if len(seeds) < EVERY_FAULT_AFTER:
        never = []
    if never:
        console.print(f"never happened: {', '.join(never)}", style="red")
    return 1 if failed or never else 0


def summary(console: Console, total: Result, seeds: int, failed: int, took_s: float) -> None:
    table = Table(title=f"{seeds:,} seeds, {failed} failed, in {took_s:,.0f} s", show_header=False)
    rows: list[tuple[str, object]] = [
        ("simulated hours", f"{total.simulated_s / 3600:,.1f}"),
        ("messages acknowledged", f"{total.messages:,}"),
        ("handler runs", f"{total.runs:,}"),
        ("requests", f"{sum(total.requests.values()):,}"),
        ("take-overs", f"{total.takeovers:,}"),
    ]
    rows += [(f"fault: {name}", f"{count:,}") for name, count in sorted(total.faults.items())]
    rows += [(f"run twice after: {name}", f"{count:,}") for name, count in sorted(total.causes.items())]
    for name, value in rows:
        table.add_row(name, str(value))
    console.print(table)


def acted(ablation: str, *, remove: bool = True) -> str:
    """How the test that acts out the coincidence fails without this safeguard; "" when it passes."""
    test = getattr(coincidences, ABLATIONS[ablation].acted_by)
    with pytest.MonkeyPatch.context() as patch:
        hush()
        if remove:
            ABLATIONS[ablation].remove(patch)
        try:
            test()
        except AssertionError as error:
            return f"{type(error).__name__}: {error}"
    return ""


def first_failure(ablation: str, seeds: int) -> caught.Caught:
    """Go through the seeds until one fails without this safeguard, and passes with it."""
    if ABLATIONS[ablation].acted_by:
        problem = "" if acted(ablation, remove=False) else acted(ablation)
        return caught.Caught(ablation, 0 if problem else None, problem)
    for seed in range(seeds):
        result = run_seed(seed, ablation)
        if result.problems and not run_seed(seed, ablation, remove=False).problems:
            return caught.Caught(ablation, seed, result.problems[0])
    return caught.Caught(ablation, None, "")


def find_failures(names: Sequence[str], seeds: int, jobs: int, console: Console) -> int:
    """Remove these safeguards in turn; their rows in the table of docs/testing.md are written anew."""
    found: list[caught.Caught] = []
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs, maxtasksperchild=1) as pool:
        for one in pool.imap_unordered(partial(first_failure, seeds=seeds), names):
            found.append(one)
            console.print(f"{one.ablation}: {one.shown()}", markup=False, highlight=False)
    caught.write(found, seeds)
    missed = [one.ablation for one in found if one.seed is None]
    if missed:
        console.print(f"not caught within {seeds:,} seeds: {', '.join(missed)}", style="red")
    return 1 if missed else 0


def confirm_failures(jobs: int, console: Console) -> int:
    """Run the seeds of the table again: each must still fail without its safeguard."""
    table = caught.seeds()
    missing = [name for name in ABLATIONS if name not in table]
    context = multiprocessing.get_context("spawn")
    with context.Pool(jobs) as pool:
        known = {name: seed for name, seed in table.items() if seed is not None and not ABLATIONS[name].acted_by}
        results = pool.starmap(run_seed, [(seed, name) for name, seed in known.items()])
    passed = [name for name, result in zip(known, results, strict=True) if not result.problems]
    passed += [name for name in table if ABLATIONS[name].acted_by and not acted(name)]
    for text, names in (("not in the table", missing), ("passes without its safeguard", passed)):
        for name in names:
            console.print(f"{name}: {text}; run  make ablations", style="red")
    return 1 if missing or passed else 0


def main() -> int:
    if os.environ.get("PYTHONHASHSEED") != "0":
        # Sets of text are walked in the order of their hashes.
        os.execve(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]],
                  {**os.environ, "PYTHONHASHSEED": "0"})  # fmt: skip
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, help="replay this one and print its trace")
    parser.add_argument("--without", choices=ABLATIONS, help="with --seed: remove this safeguard")
    parser.add_argument("--ablations", nargs="*", choices=ABLATIONS, help="remove these safeguards in turn (all)")
    parser.add_argument("--confirm", action="store_true", help="run the seeds of the ablations' table again")
    parser.add_argument("--encrypted", action="store_true", help="with --seed and --seeds: every process encrypts")
    arguments = parser.parse_args()
    console = Console(soft_wrap=True)
    if arguments.ablations is not None:
        return find_failures(arguments.ablations or list(ABLATIONS), arguments.seeds, arguments.jobs, console)
    if arguments.confirm:
        return confirm_failures(arguments.jobs, console)
    if arguments.seed is not None:
        return replay(arguments.seed, arguments.without, console, encrypted=arguments.encrypted)
    seeds = [*REGRESSIONS, *range(arguments.first, arguments.first + arguments.seeds)]
    return run_many(list(dict.fromkeys(seeds)), arguments.jobs, console, encrypted=arguments.encrypted)
