"""What the benchmarks conclude, and that the document shows what was measured."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.bench import BEGIN, DOCS, DOCUMENT, END, FIGURES, PARTS, document
from benchmarks.contenders.base import Tally, drain, payloads, quantile
from benchmarks.criteria import verdicts
from benchmarks.report import markdown
from benchmarks.throughput import on_core
from tests.unit.benchmark_contenders import Careless

FIGURES_FILE = DOCS / FIGURES


def figures() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FIGURES_FILE.read_text(encoding="utf-8"))
    return found


async def test_losses_are_seen() -> None:
    """A contender that loses two messages and delivers one twice is charged with just that."""
    drained = await drain(Careless(lose=2, repeat=1), 20, patience_s=0.05)
    assert (drained.lost, drained.duplicated) == (2, 1)
    assert drained.enqueue.messages == drained.process.messages == 20


async def test_duplicates_do_not_stand_in_for_what_is_missing() -> None:
    """As many messages as were sent are not enough: the tally is full when every one came."""
    tally = Tally(3)
    first, second, third = payloads(3)
    for payload in (first, first, second, second):
        tally(payload)
    assert not tally.full.is_set()
    tally(third)
    assert tally.full.is_set()
    assert (tally.lost, tally.duplicated) == (0, 2)


def test_payloads_differ_and_have_the_size() -> None:
    """Payloads are what the workloads say: so many, so large, all different."""
    made = payloads(1000, 100, first=7)
    assert len(set(made)) == 1000
    assert {len(payload) for payload in made} == {100}
    assert made[0].startswith(b"00000007x")


@pytest.mark.skipif(sys.platform != "linux", reason="threads can be kept to a core on Linux alone")
def test_cores_take_turns() -> None:
    """What is compared stays on one core; as many turns as there are cores use each, and then all are free again."""
    allowed = os.sched_getaffinity(0)
    used: set[int] = set()
    for number in range(len(allowed)):
        with on_core(number):
            (core,) = os.sched_getaffinity(0)
        used.add(core)
        assert os.sched_getaffinity(0) == allowed
    assert used == allowed


def test_quantiles() -> None:
    """The median is the middle, and the 99th percentile is near the largest."""
    values = [float(number) for number in range(1, 102)]
    assert quantile(values, 0.5) == 51
    assert quantile(values, 0.99) == 100
    assert quantile([3.0], 0.99) == 3.0


def test_nothing_measured_is_neither_met_nor_missed() -> None:
    """Without figures no promise counts as kept or broken, and each says what is missing."""
    found = verdicts({})
    assert found
    assert {verdict.met for verdict in found} == {None}
    assert all("was not run" in verdict.seen for verdict in found)


@pytest.mark.parametrize(("ratio", "met"), [(0.8, True), (0.79, False)])
def test_a_promise_is_judged_by_the_figure(ratio: float, met: bool) -> None:
    """Beside each bare loop, 0.8 keeps the promise and 0.79 does not, and the line shows the figure."""
    sides = ("bare", "adapter")
    for judged in sides:
        rows = [
            {"scheme": "s3", "per_segment": 256, "phase": phase, "side": side, "ratio": ratio if side == judged else 2}
            for phase in ("enqueue", "process")
            for side in sides
        ]
        found = dict(zip(sides, verdicts({"bare": {"rows": rows}}), strict=False))
        assert {side: verdict.met for side, verdict in found.items()} == {**dict.fromkeys(sides, True), judged: met}
        assert f"enqueue {ratio:.2f}" in found[judged].seen


@pytest.mark.parametrize(("ratio", "met"), [(0.95, True), (0.94, False)])
def test_more_handlers_are_judged_by_neighbouring_runs(ratio: float, met: bool) -> None:
    """Runs that followed each other decide, not the medians, which a machine that slows down pulls apart."""
    rows = [
        {"concurrency": most, "process_rate": rate, "ratio": beside}
        for most, rate, beside in ((3, 100.0, None), (10, 80.0, 1.0), (50, 120.0, ratio))
    ]
    (verdict,) = (one for one in verdicts({"concurrency": {"rows": rows}}) if one.met is not None)
    assert (verdict.met, verdict.seen) == (met, f"3: 100, 10: 80, 50: 120; ratios of neighbours 1.00 and {ratio:.2f}")


def test_the_document_has_every_part() -> None:
    """The committed figures are those of a whole run at full size."""
    committed = figures()
    assert committed["parts"].keys() == PARTS.keys()
    assert committed["scale"] == 1


def test_the_document_shows_the_figures() -> None:
    """The tables of docs/performance.md are made of docs/performance.json, and nobody changed either by hand."""
    page = (DOCS / DOCUMENT).read_text(encoding="utf-8")
    assert page.count(BEGIN) == page.count(END) == 1
    assert document(figures(), page) == page


def test_every_promise_is_in_the_document() -> None:
    """Each thing asked stands in the document with what was seen, kept or not."""
    shown = markdown(figures())
    for verdict in verdicts(figures()["parts"]):
        assert f"| {verdict.asked} | {verdict.seen} | {verdict.word} |" in shown


def test_pictures_are_there() -> None:
    """Each picture that the tables show was written by the same run."""
    pictures = [name for name in markdown(figures()).split("(") if name.startswith("performance-")]
    assert pictures
    for name in pictures:
        assert Path(DOCS / name.partition(")")[0]).stat().st_size > 0
