"""The regression guard: fails when a message costs more than the committed baseline says, by what no machine changes.

It counts requests, bytes, listed keys and function calls, and under valgrind CPU instructions and allocations, of the
workloads in ``benchmarks/guard_workloads.py``. A count that is more than 5 % above ``benchmarks/baseline.json`` fails
the guard; whoever means it writes the baseline anew, in the same commit, where a reviewer sees it.

    python -m benchmarks.guard                   compare
    python -m benchmarks.guard --update          compare, and write the baseline anew
    python -m benchmarks.guard --no-valgrind     leave out what needs valgrind: 7 instead of 35 seconds of CPU
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

import msgspec
from msgspec import structs
from rich.console import Console
from rich.table import Table

from benchmarks.guard_counters import ROOT, Counts, GuardError, count
from benchmarks.guard_workloads import STORE_COUNTS, WORKLOADS

BASELINE = ROOT / "benchmarks" / "baseline.json"
GROWTH_MAX = 0.05
SPARE_REQUESTS = 2
"""So many requests more in a whole run are no growth: where there are few, one look at another moment is 5 %."""
CARRIED_BY = {
    **{name: name for name in ("PUT", "GET", "LIST", "DELETE")},
    "bytes written": "PUT",
    "bytes read": "GET",
    "keys listed": "LIST",
}
"""The request that a count of the store belongs to."""
OF_THE_BUILD = frozenset({"instructions", "instructions (perf)", "allocations"})
"""Counts that differ between two builds of one version of Python."""
LIBRARIES = ("anyio", "msgspec")
"""Whose functions and instructions are among those counted."""
DIGITS = 6
PYTHON = ".venv/bin/python"
UPDATE = f"{PYTHON} -m benchmarks.guard --update"


class Interpreter(msgspec.Struct, forbid_unknown_fields=True):
    """What was counted with one version of Python on one architecture."""

    build: str
    libraries: dict[str, str]
    counts: Counts


class Baseline(msgspec.Struct, forbid_unknown_fields=True):
    """The committed counts; those of the store are the same with every Python."""

    store: Counts = {}
    interpreters: dict[str, Interpreter] = {}


class Verdict(Enum):
    SAME = ""
    GREW = "grew"
    SHRANK = "shrank"
    UNKNOWN = "no baseline"
    UNCOUNTED = "not counted"


@dataclass(frozen=True)
class Row:
    """One count of one workload, for each message (or minute)."""

    workload: str
    count: str
    before: float | None
    now: float | None
    verdict: Verdict

    @property
    def change(self) -> float | None:
        """The growth as a part of what it was; None when there is nothing to compare, or it was nothing."""
        if self.before is None or self.now is None or not self.before:
            return None
        return self.now / self.before - 1


@dataclass
class Comparison:
    """The counts beside the baseline, and what is to be said about it."""

    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[Row]:
        """What grew; and what the baseline should have, or should not, whichever Python it is."""
        return [
            row
            for row in self.rows
            if row.verdict is Verdict.GREW
            or (row.count in CARRIED_BY and row.verdict in (Verdict.UNKNOWN, Verdict.UNCOUNTED))
        ]


def interpreter_name() -> str:
    """The architecture, and the version of Python as far as counts depend on it."""
    version = ".".join(platform.python_version_tuple()[:2])
    return f"{platform.machine()} {platform.python_implementation()} {version}"


def here(counts: Counts) -> Interpreter:
    """This interpreter, with its part of the counts."""
    return Interpreter(
        build=" ".join(sys.version.split()),
        libraries={name: importlib.metadata.version(name) for name in LIBRARIES},
        counts=parted(counts, store=False),
    )


def parted(counts: Counts, *, store: bool) -> Counts:
    """Either what the store was asked, or what this Python did for it."""
    return {
        workload: {name: value for name, value in values.items() if (name in STORE_COUNTS) == store}
        for workload, values in counts.items()
    }


def limit(name: str, before: Counts, workload: str) -> float:
    """The most that a count may be without having grown."""
    values = before[workload]
    spare = 0.0
    if name in CARRIED_BY:
        messages = WORKLOADS[workload].messages if workload in WORKLOADS else 1
        requests = values.get(CARRIED_BY[name], 0.0) * messages
        if not requests:
            return SPARE_REQUESTS / messages if CARRIED_BY[name] == name else math.inf
        spare = SPARE_REQUESTS / requests
    return values[name] * (1 + max(GROWTH_MAX, spare))


def judged(name: str, workload: str, before: Counts, now: Counts) -> Row:
    was = before.get(workload, {}).get(name)
    value = now.get(workload, {}).get(name)
    if was is None:
        verdict = Verdict.UNKNOWN
    elif value is None:
        verdict = Verdict.UNCOUNTED
    elif rounded(value) > rounded(limit(name, before, workload)):
        verdict = Verdict.GREW
    elif value < was * (1 - GROWTH_MAX):
        verdict = Verdict.SHRANK
    else:
        verdict = Verdict.SAME
    return Row(workload, name, was, value, verdict)


def rounded(value: float) -> float:
    """As it is written down."""
    return float(f"{value:.{DIGITS}g}")


def compare(baseline: Baseline, counts: Counts, name: str, interpreter: Interpreter) -> Comparison:
    """Put the counts beside the baseline.

    Args:
        baseline: What is committed.
        counts: What was counted now.
        name: This interpreter's name in the baseline.
        interpreter: Its build and libraries.
    """
    result = Comparison()
    known = baseline.interpreters.get(name)
    before_here: Counts = {}
    if known is None:
        result.notes.append(
            f"There is no baseline for {name}: calls, instructions and allocations are not compared. "
            f"To have one, run there  {UPDATE}"
        )
    else:
        before_here = known.counts
        if known.build != interpreter.build:
            before_here = {
                workload: {key: value for key, value in values.items() if key not in OF_THE_BUILD}
                for workload, values in before_here.items()
            }
            result.notes.append(
                f"Instructions and allocations are not compared: the baseline's Python is {known.build}; "
                f"this one is {interpreter.build}"
            )
        for library, version in interpreter.libraries.items():
            if known.libraries.get(library) != version:
                result.notes.append(
                    f"{library} was {known.libraries.get(library)} in the baseline and is {version} here: "
                    "its calls and instructions are among those counted."
                )
    before = {workload: dict(values) for workload, values in baseline.store.items()}
    for workload, values in before_here.items():
        before.setdefault(workload, {}).update(values)
    for workload in dict.fromkeys((*counts, *before)):
        for key in dict.fromkeys((*counts.get(workload, ()), *before.get(workload, ()))):
            result.rows.append(judged(key, workload, before, counts))
    return result


def updated(baseline: Baseline, counts: Counts, name: str, interpreter: Interpreter) -> Baseline:
    """The baseline with what was counted now; what could not be counted here stays, if it is of the same build."""
    store = {
        w: {key: rounded(value) for key, value in values.items()} for w, values in parted(counts, store=True).items()
    }
    known = baseline.interpreters.get(name)
    kept = known.counts if known is not None and known.build == interpreter.build else {}
    own = {
        workload: {
            **{key: value for key, value in kept.get(workload, {}).items() if key in OF_THE_BUILD},
            **{key: rounded(value) for key, value in values.items()},
        }
        for workload, values in parted(counts, store=False).items()
    }
    mine = Interpreter(interpreter.build, interpreter.libraries, own)
    return Baseline(store, dict(sorted((baseline.interpreters | {name: mine}).items())))


def only(baseline: Baseline, names: Sequence[str]) -> Baseline:
    """The part of the baseline that is about some workloads."""

    def part(counts: Counts) -> Counts:
        return {name: values for name, values in counts.items() if name in names}

    return Baseline(
        part(baseline.store),
        {name: structs.replace(one, counts=part(one.counts)) for name, one in baseline.interpreters.items()},
    )


def load(path: Path) -> Baseline:
    """Read the baseline; an empty one when there is none.

    Raises:
        GuardError: It is none.
    """
    if not path.exists():
        return Baseline()
    try:
        return msgspec.json.decode(path.read_bytes(), type=Baseline)
    except msgspec.DecodeError as error:
        raise GuardError(
            f"{path} cannot be read ({error}). Take it from git again, or delete it and use --update."
        ) from error


def save(path: Path, baseline: Baseline) -> None:
    path.write_text(json.dumps(msgspec.to_builtins(baseline), indent=1) + "\n", encoding="utf-8")


# -- what is printed -------------------------------------------------------------------------------------------------


def table(rows: Sequence[Row]) -> Table:
    shown = Table(title="What one message (or minute) costs", title_justify="left")
    for column in ("workload", "count", "baseline", "now", "change", ""):
        shown.add_column(column, justify="left" if column in ("workload", "count", "") else "right", no_wrap=True)
    last = ""
    for row in rows:
        if not row.before and not row.now:
            continue
        if last and row.workload != last:
            shown.add_section()
        style = {Verdict.GREW: "red", Verdict.SHRANK: "green"}.get(row.verdict, "")
        shown.add_row(
            row.workload if row.workload != last else "",
            row.count,
            _number(row.before),
            _number(row.now),
            "" if row.change is None else f"{100 * row.change:+.2f} %",
            row.verdict.value,
            style=style,
        )
        last = row.workload
    return shown


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:,.4g}"


def advice(comparison: Comparison) -> list[str]:
    """What to do about it, in words."""
    failures = comparison.failures
    if failures:
        return [
            f"The guard fails: this is not as benchmarks/{BASELINE.name} says, give or take {GROWTH_MAX:.0%}.",
            *(f"  {row.workload}: {row.count} {_said(row)}" for row in failures),
            "What to do: find what costs more, and take it out. The functions of a workload, by their calls:",
            f"  PYTHONHASHSEED=0 {PYTHON} -m benchmarks.guard_child profile '{failures[0].workload}'",
            "If it is worth its price, write the baseline anew, and commit it together with the change and the reason:",
            f"  {UPDATE}",
        ]
    if any(row.verdict is Verdict.SHRANK for row in comparison.rows):
        return [
            f"Some counts shrank by more than {GROWTH_MAX:.0%}. To keep it so, write the baseline anew, and commit it "
            f"together with the change:  {UPDATE}"
        ]
    return []


def _said(row: Row) -> str:
    if row.verdict is Verdict.UNKNOWN:
        return "is not in the baseline"
    if row.verdict is Verdict.UNCOUNTED:
        return "is in the baseline, but is not counted any more"
    change = "" if row.change is None else f" ({100 * row.change:+.1f} %)"
    return f"grew from {_number(row.before)} to {_number(row.now)} for each {WORKLOADS[row.workload].unit}{change}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", action="store_true", help="write the baseline anew")
    parser.add_argument("--no-valgrind", action="store_true", help="do not use valgrind, even where it is installed")
    parser.add_argument("--only", nargs="+", choices=WORKLOADS, metavar="WORKLOAD", help="compare these only")
    parser.add_argument("--baseline", type=Path, default=BASELINE, help="another file than benchmarks/baseline.json")
    chosen = parser.parse_args(arguments)
    if chosen.only and chosen.update:
        parser.error("--update writes the whole baseline: leave --only out")
    console = Console(width=110, highlight=False)
    try:
        baseline = load(chosen.baseline)
        counts, skipped = count(chosen.only or tuple(WORKLOADS), valgrind=not chosen.no_valgrind)
    except GuardError as error:
        console.print(str(error), style="red", markup=False)
        return 2
    name, interpreter = interpreter_name(), here(counts)
    comparison = compare(only(baseline, chosen.only) if chosen.only else baseline, counts, name, interpreter)
    console.print(table(comparison.rows))
    for note in (*(f"Skipped: {reason}." for reason in skipped), *comparison.notes):
        console.print(note, markup=False, soft_wrap=True)
    if chosen.update:
        save(chosen.baseline, updated(baseline, counts, name, interpreter))
        console.print(f"Written: {chosen.baseline}. Commit it together with what changed the counts, and say why.")
        others = ", ".join(other for other in baseline.interpreters if other != name)
        if others:
            console.print(f"Calls, instructions and allocations stay as they were for {others}: run it there, too.")
        return 0
    for line in advice(comparison):
        console.print(line, markup=False, soft_wrap=True, style="red" if comparison.failures else "green")
    return 1 if comparison.failures else 0


if __name__ == "__main__":
    sys.exit(main())
