"""The regression guard: what fails it, what is only said, and that its counts are the same each time."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from msgspec import structs

from benchmarks import guard, guard_counters
from benchmarks.guard import Baseline, Comparison, Interpreter, Verdict
from benchmarks.guard_counters import Counts, GuardError
from benchmarks.guard_workloads import STORE_COUNTS, WORKLOADS

BURST = "process, 256 a segment"
SINGLES = "enqueue, one by one"
NAME = "riscv64 CPython 3.11"
MESSAGES = WORKLOADS[BURST].messages
STORE = dict(zip(STORE_COUNTS, (0.01, 0.0, 10 / MESSAGES, 0.01, 300.0, 0.0, 0.05), strict=True))
OWN = {"calls": 40.0, "instructions": 50_000.0, "allocations": 30.0}
HERE = Interpreter(build="3.11.7 [GCC]", libraries={"anyio": "4.16.0", "msgspec": "0.22.0"}, counts={BURST: dict(OWN)})
BASELINE = Baseline({BURST: dict(STORE)}, {NAME: HERE})


def compared(
    changed: Mapping[str, float | None] | None = None, *, baseline: Baseline = BASELINE, interpreter: Interpreter = HERE
) -> Comparison:
    """The baseline's own counts, with some changed or (None) not counted."""
    values: dict[str, float | None] = {**STORE, **OWN, **(changed or {})}
    counts: Counts = {BURST: {name: value for name, value in values.items() if value is not None}}
    return guard.compare(baseline, counts, NAME, interpreter)


def failing(comparison: Comparison) -> list[str]:
    return [row.count for row in comparison.failures]


def test_the_same_counts_pass() -> None:
    """Nothing fails, and nothing is said."""
    comparison = compared()
    assert {row.verdict for row in comparison.rows} == {Verdict.SAME}
    assert len(comparison.rows) == len(STORE) + len(OWN)
    assert comparison.notes == guard.advice(comparison) == []


@pytest.mark.parametrize("name", ["PUT", "bytes written", "calls", "instructions", "allocations"])
def test_five_per_cent(name: str) -> None:
    """Growth of 5 % passes, and a little more fails, whatever is counted."""
    value = {**STORE, **OWN}[name]
    assert failing(compared({name: value * 1.05})) == []
    assert failing(compared({name: value * 1.051})) == [name]


def test_a_failure_says_what_to_do() -> None:
    """It names the workload, the count, both values, the growth, and both ways out."""
    text = "\n".join(guard.advice(compared({"calls": 44.0})))
    assert f"{BURST}: calls grew from 40 to 44 for each message (+10.0 %)" in text
    assert f"profile '{BURST}'" in text
    assert "benchmarks.guard --update" in text


def test_two_requests_more_in_a_run_are_no_growth() -> None:
    """Ten listings may become twelve, although that is 20 %; with thirteen it fails."""
    assert failing(compared({"LIST": 12 / MESSAGES})) == []
    assert failing(compared({"LIST": 13 / MESSAGES})) == ["LIST"]


def test_what_two_requests_more_carry_is_no_growth() -> None:
    """Twelve listings may show a fifth more keys than ten; a third more fails."""
    assert failing(compared({"keys listed": STORE["keys listed"] * 1.2})) == []
    assert failing(compared({"keys listed": STORE["keys listed"] * 1.34})) == ["keys listed"]


def test_requests_where_there_were_none() -> None:
    """Two new requests in a run pass with what they read; the third fails, and has no growth to show."""
    assert failing(compared({"GET": 2 / MESSAGES, "bytes read": 1.0})) == []
    comparison = compared({"GET": 3 / MESSAGES})
    assert failing(comparison) == ["GET"]
    assert comparison.failures[0].change is None
    assert "GET grew from 0 to" in guard.advice(comparison)[1]


def test_shrinking_is_said() -> None:
    """What shrank by more than 5 % does not fail, and the baseline should follow."""
    comparison = compared({"calls": 37.0})
    assert failing(comparison) == []
    assert "--update" in guard.advice(comparison)[0]
    assert guard.advice(compared({"calls": 39.0})) == []


def test_an_interpreter_without_a_baseline() -> None:
    """It is said, and its own counts do not fail; those of the store are compared all the same."""
    baseline = Baseline({BURST: dict(STORE)}, {})
    comparison = compared({"calls": 1000.0}, baseline=baseline)
    assert failing(comparison) == []
    assert NAME in comparison.notes[0]
    assert failing(compared({"PUT": 1.0}, baseline=baseline)) == ["PUT"]


def test_another_build_of_the_same_python() -> None:
    """Instructions and allocations are not compared, and that is said; calls are."""
    other = structs.replace(HERE, build="3.11.2 [Clang]")
    comparison = compared({"instructions": 1e9, "allocations": 1e9}, interpreter=other)
    assert failing(comparison) == []
    assert "3.11.2 [Clang]" in comparison.notes[0]
    assert failing(compared({"calls": 43.0}, interpreter=other)) == ["calls"]


def test_another_version_of_a_library() -> None:
    """It is named, since it may be why a count grew."""
    other = structs.replace(HERE, libraries={"anyio": "5.0", "msgspec": "0.22.0"})
    comparison = compared({"calls": 44.0}, interpreter=other)
    assert comparison.notes[0].startswith("anyio was 4.16.0 in the baseline and is 5.0 here")
    assert failing(comparison) == ["calls"]


def test_what_cannot_be_counted_here() -> None:
    """Without valgrind its counts are shown as not counted, and do not fail."""
    comparison = compared({"instructions": None, "allocations": None})
    assert failing(comparison) == []
    assert [row.count for row in comparison.rows if row.verdict is Verdict.UNCOUNTED] == ["instructions", "allocations"]


def test_a_workload_that_went_or_came() -> None:
    """The baseline has to change with the workloads: one that is not counted any more fails, and so does a new one."""
    gone = guard.compare(BASELINE, {}, NAME, HERE)
    assert failing(gone) == list(STORE_COUNTS)
    assert "is not counted any more" in guard.advice(gone)[1]
    new = guard.compare(BASELINE, {BURST: {**STORE, **OWN}, SINGLES: {**STORE, **OWN}}, NAME, HERE)
    assert [(row.workload, row.count) for row in new.failures] == [(SINGLES, name) for name in STORE_COUNTS]
    assert "is not in the baseline" in guard.advice(new)[1]


def test_update_and_read_again(tmp_path: Path) -> None:
    """What was counted is the baseline afterwards, to six digits; other interpreters' counts stay."""
    other = structs.replace(HERE, build="3.13")
    counts = {BURST: {**STORE, **OWN, "PUT": 1 / 3, "calls": 100 / 3}}
    path = tmp_path / "baseline.json"
    guard.save(path, guard.updated(structs.replace(BASELINE, interpreters={"other": other}), counts, NAME, HERE))
    read = guard.load(path)
    assert read.store[BURST]["PUT"] == 0.333333
    assert read.interpreters[NAME].counts[BURST]["calls"] == 33.3333
    assert read.interpreters["other"] == other
    assert failing(guard.compare(read, counts, NAME, HERE)) == []


def test_update_without_valgrind() -> None:
    """What could not be counted stays as it was, unless it is of another build of Python, or its workload went."""
    counts: Counts = {BURST: {**STORE, "calls": 41.0}}
    kept = guard.updated(BASELINE, counts, NAME, HERE).interpreters[NAME].counts
    assert kept == {BURST: {**OWN, "calls": 41.0}}
    rebuilt = guard.updated(BASELINE, counts, NAME, structs.replace(HERE, build="another")).interpreters[NAME]
    assert (rebuilt.build, rebuilt.counts) == ("another", {BURST: {"calls": 41.0}})
    assert guard.updated(BASELINE, {SINGLES: {**STORE, "calls": 1.0}}, NAME, HERE).store.keys() == {SINGLES}


def test_some_workloads_only() -> None:
    """The rest of the baseline is not missed."""
    both = guard.updated(BASELINE, {BURST: {**STORE, **OWN}, SINGLES: {**STORE, **OWN}}, NAME, HERE)
    part = guard.only(both, [SINGLES])
    assert part.store.keys() == part.interpreters[NAME].counts.keys() == {SINGLES}
    assert part.interpreters[NAME].build == HERE.build


@pytest.mark.parametrize("text", ["{", '{"stores": {}}', '{"store": {"x": {"PUT": "1"}}}'])
def test_a_baseline_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    """The error names the file, and what to do."""
    path = tmp_path / "baseline.json"
    path.write_text(text)
    with pytest.raises(GuardError, match=r"baseline\.json cannot be read .* --update"):
        guard.load(path)


def test_no_baseline_at_all(tmp_path: Path) -> None:
    """It is as an empty one."""
    assert guard.load(tmp_path / "none.json") == Baseline()


def test_the_committed_baseline_has_every_workload() -> None:
    """It has each count of the store for each workload, calls for each, and no other workload."""
    committed = guard.load(guard.BASELINE)
    assert committed.store.keys() == WORKLOADS.keys()
    assert all(values.keys() == set(STORE_COUNTS) for values in committed.store.values())
    assert committed.interpreters
    for interpreter in committed.interpreters.values():
        assert interpreter.counts.keys() == WORKLOADS.keys()
        assert all("calls" in values for values in interpreter.counts.values())
        assert interpreter.libraries.keys() == set(guard.LIBRARIES)


CALLGRIND = """\
desc: Trigger: --dump-before=getsid
events: Ir
summary: 1234
fn=PyObject_Str
cfn=malloc
calls=100 456
0 63018
cfn=free
calls=7 1
0 70
cfn=malloc'2
calls=9 1
fn=list_resize
cfn=realloc
calls=3 20
0 90
cfn=calloc
calls=1 20
totals: 1234
"""


def test_what_callgrind_writes_is_read() -> None:
    """Instructions are its totals; allocations are the calls of malloc, calloc and realloc, wherever they come from."""
    assert guard_counters.totals(CALLGRIND) == 1234
    assert guard_counters.allocated(CALLGRIND) == 104
    with pytest.raises(GuardError, match="no totals"):
        guard_counters.totals("events: Ir\n")


# -- real processes ----------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_counts_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes count the same requests and bytes, and calls that differ by less than 0.5 %.

    Settings in the caller's environment do not reach them.
    """
    first = guard_counters.plain([SINGLES])[SINGLES]
    monkeypatch.setenv("S3QUEUE_SEGMENT_AGE", "3")
    second = guard_counters.plain([SINGLES])[SINGLES]
    assert {name: first[name] for name in STORE_COUNTS} == {name: second[name] for name in STORE_COUNTS}
    assert second["calls"] == pytest.approx(first["calls"], rel=0.005)
    # One message is one PUT; what the queue itself needs is little beside a thousand of them.
    assert 1 <= first["PUT"] < 1.1


@pytest.mark.integration
def test_the_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It passes beside a baseline of its own making, fails beside one with fewer calls, and names the count."""
    path = tmp_path / "baseline.json"
    chosen = ["--only", SINGLES, "--no-valgrind", "--baseline", str(path)]
    counts, skipped = guard_counters.count([SINGLES], valgrind=False)
    assert any(reason.startswith("allocations by callgrind: --no-valgrind") for reason in skipped)
    name, interpreter = guard.interpreter_name(), guard.here(counts)
    baseline = guard.updated(Baseline(), counts, name, interpreter)
    guard.save(path, baseline)
    assert guard.main(chosen) == 0
    baseline.interpreters[name].counts[SINGLES]["calls"] *= 0.9
    guard.save(path, baseline)
    capsys.readouterr()
    assert guard.main(chosen) == 1
    assert f"{SINGLES}: calls grew from" in capsys.readouterr().out


def test_update_is_of_everything(capsys: pytest.CaptureFixture[str]) -> None:
    """A baseline of a few workloads would miss the others."""
    with pytest.raises(SystemExit):
        guard.main(["--update", "--only", SINGLES])
    assert "--only" in capsys.readouterr().err


@pytest.mark.integration
def test_hashes_have_to_be_fixed() -> None:
    """Counting without PYTHONHASHSEED=0 is refused with the reason, since it would differ from run to run."""
    command = guard_counters.child("counts", SINGLES)
    environment = guard_counters.environment(PYTHONHASHSEED="1")
    ended = subprocess.run(
        command, cwd=guard_counters.ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 1
    assert "PYTHONHASHSEED=0" in ended.stderr


@pytest.mark.integration
def test_a_process_that_fails_is_shown() -> None:
    """The error has what it wrote."""
    with pytest.raises(GuardError, match=r"(?s)ended with 3.*the reason"):
        guard_counters.execute([sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"])


@pytest.mark.integration
@pytest.mark.skipif(not shutil.which("valgrind"), reason="valgrind is not installed")
def test_callgrind_sees_a_message() -> None:
    """Allocations of a message are of the order of its calls, without the start of Python; what takes long is left out."""
    name = "enqueue, 256 a segment"
    calls = guard_counters.plain([name])[name]["calls"]
    found = guard_counters.allocations([name, "2 idle workers"])
    assert found.keys() == {name}
    assert calls / 5 < found[name]["allocations"] < calls * 5


@pytest.mark.integration
@pytest.mark.skipif(not shutil.which("perf"), reason="perf is not installed")
def test_perf() -> None:
    """An event is counted for one command alone; one that is not there is named."""
    lacking = guard_counters.perf_lacks("page-faults")
    if lacking is not None:
        pytest.skip(lacking)
    small = guard_counters.perf([sys.executable, "-c", ""], "page-faults")
    large = guard_counters.perf([sys.executable, "-c", "b'x' * 40_960_000"], "page-faults")
    assert large > small + 1000
    assert guard_counters.perf_lacks("no-such-event") is not None
    name = "enqueue, 256 a segment"
    # The ids that are returned take room: a few dozen bytes a message, without the memory of Python's start.
    found = guard_counters.instructions_by_perf([name, "2 idle workers"], "page-faults")
    assert found.keys() == {name}
    assert 0 < found[name]["instructions (perf)"] < 1


def test_the_baseline_is_easy_to_review() -> None:
    """One count a line, as --update writes it."""
    text = guard.BASELINE.read_text(encoding="utf-8")
    assert text == json.dumps(json.loads(text), indent=1) + "\n"
