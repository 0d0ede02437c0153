"""What issue-sized promises the figures are held to: asked, seen, met or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Parts = dict[str, Any]
"""What the parts of a run found, by the part's name."""


@dataclass(frozen=True)
class Verdict:
    """One line of the list; ``met`` is None when the run has no figure for it."""

    asked: str
    seen: str
    met: bool | None

    @property
    def word(self) -> str:
        return {True: "met", False: "NOT met", None: "not measured"}[self.met]


def verdicts(parts: Parts) -> list[Verdict]:
    """Every promise, with what this run has to say."""
    return [judged(asked, judge, parts) for asked, judge in PROMISES]


def judged(asked: str, judge: Callable[[Parts], tuple[str, bool]], parts: Parts) -> Verdict:
    """One promise; a part that was left out is no failure."""
    try:
        seen, met = judge(parts)
    except NotMeasured as missing:
        return Verdict(asked, str(missing), None)
    return Verdict(asked, seen, met)


class NotMeasured(Exception):
    """Raised when a run has nothing to judge a promise by; says what is missing."""


def _part(parts: Parts, name: str) -> Any:
    if name not in parts:
        raise NotMeasured(f"part {name!r} was not run")
    return parts[name]


def _row(rows: list[Any], **wanted: Any) -> Any:
    for row in rows:
        if all(row[name] == value for name, value in wanted.items()):
            return row
    raise NotMeasured(f"no row for {wanted}")


# -- beside others -----------------------------------------------------------------------------------------------------


def _bare(parts: Parts, per_segment: int, side: str, *wanted: float) -> tuple[str, bool]:
    rows = _part(parts, "bare")["rows"]
    found = [_row(rows, scheme="s3", per_segment=per_segment, phase=phase, side=side)["ratio"] for phase in PHASES]
    return (
        f"enqueue {found[0]:.2f}, process {found[1]:.2f}",
        all(ratio >= least for ratio, least in zip(found, wanted, strict=True)),
    )


def _against(parts: Parts, store: str) -> tuple[Any, list[Any]]:
    rows = _part(parts, "peers")["rows"]
    theirs = [row for row in rows if row["store"] == store and not row["ours"]]
    if not theirs:
        raise NotMeasured(f"no peer on {store} could run")
    return next(row for row in rows if row["ours"]), theirs


def _s3_enqueue(parts: Parts) -> tuple[str, bool]:
    return _times(parts, "enqueue_rate", 3)


def _s3_process(parts: Parts) -> tuple[str, bool]:
    return _times(parts, "process_rate", 50)


def _times(parts: Parts, rate: str, wanted: float) -> tuple[str, bool]:
    ours, theirs = _against(parts, "S3")
    best = max(theirs, key=lambda row: row[rate])
    times = ours[rate] / best[rate]
    return f"{times:.1f} times ({ours[rate]:,.0f} to {best[rate]:,.0f} of {best['name']})", times >= wanted


def _exact(parts: Parts) -> tuple[str, bool]:
    ours = [row for row in _part(parts, "peers")["rows"] if row["ours"]]
    lost, twice = sum(row["lost"] for row in ours), sum(row["duplicated"] for row in ours)
    return f"{lost} lost, {twice} duplicated", not lost and not twice


def _redis(parts: Parts) -> tuple[str, bool]:
    ours, theirs = _against(parts, "Redis")
    shown = ", ".join(f"{row['name']} {row['process_rate']:,.0f}" for row in theirs)
    return f"{ours['process_rate']:,.0f} to {shown}", all(ours["process_rate"] > row["process_rate"] for row in theirs)


# -- requests and money ------------------------------------------------------------------------------------------------


def _requests_full(parts: Parts) -> tuple[str, bool]:
    found = _row(_part(parts, "cost")["rows"], per_segment=256)["per_message"]
    return f"{found:.4f}", found <= 0.02


def _requests_single(parts: Parts) -> tuple[str, bool]:
    row = _row(_part(parts, "cost")["rows"], per_segment=1)
    own, whole = row["own_paid_per_message"], row["paid_per_message"]
    return f"{own:.2f} for the message; {whole:.2f} with listings, heartbeats, probe and the worker's start", own <= 3


def _dollars(parts: Parts) -> tuple[str, bool]:
    part = _part(parts, "cost")
    found, batched = _row(part["rows"], per_segment=100)["dollars"], part["sqs"]["batched"]
    return f"${found:.3f} to ${batched:.2f}", found < batched


# -- latency -----------------------------------------------------------------------------------------------------------


def _latency_here(parts: Parts) -> tuple[str, bool]:
    row = _row(_part(parts, "latency")["rows"], where="same process", delay_ms=50)
    return f"{row['p50_trips']:.2f} round trips ({row['p50_ms']:.0f} ms)", row["p50_trips"] <= 1.5


def _latency_elsewhere(parts: Parts) -> tuple[str, bool]:
    row = _row(_part(parts, "latency")["rows"], where="another process", workers=1, delay_ms=50)
    trips = row["p50_trips_beyond_poll"]
    return f"one poll + {trips:.2f} round trips ({row['p50_ms']:.0f} ms)", trips <= 4


# -- load --------------------------------------------------------------------------------------------------------------


def _million_rates(parts: Parts) -> tuple[str, bool]:
    ratios = _part(parts, "backlog")["ratios"]
    shown = ", ".join(f"{phase} {ratio - 1:+.0%}" for phase, ratio in ratios.items())
    return shown, min(ratios.values()) >= 0.9


def _million_memory(parts: Parts) -> tuple[str, bool]:
    empty, million = _part(parts, "backlog")["rows"]
    change = million["rss_max_mib"] / empty["rss_max_mib"] - 1
    return f"{empty['rss_max_mib']:.0f} to {million['rss_max_mib']:.0f} MiB at most ({change:+.0%})", change <= 0.1


def _requests_backlog(parts: Parts) -> tuple[str, bool]:
    part = _part(parts, "backlog")
    own = [row["own_per_message"] for row in part["requests"]]
    # With results kept, each message costs its share of a history object: compared with an empty history.
    kept = [row["own_per_message"] for row in part["history"]]
    # What starting a worker costs is no matter of the backlog, so listings are compared in the middle of a run.
    whole = [row["all_per_message"] for row in part["rows"]]
    paid = [row["paid_per_message"] for row in part["requests"]]
    shown = (
        f"{_shown(paid)}, with DELETEs, which are free and of which more go together in a long backlog, {_shown(own)}; "
        f"with results kept {_shown(kept)}; "
        f"with listings and heartbeats, little waiting and a million: {_shown(whole)}"
    )
    same = all(max(found) <= 1.1 * min(found) for found in (paid, kept, whole))
    return shown, same and own[-1] <= 1.1 * own[0]


def _shown(figures: list[float]) -> str:
    return ", ".join(f"{figure:.4f}" for figure in figures)


def _concurrency(parts: Parts) -> tuple[str, bool]:
    rows = _part(parts, "concurrency")["rows"]
    ratios = [row["ratio"] for row in rows[1:]]
    shown = ", ".join(f"{row['concurrency']}: {row['process_rate']:,.0f}" for row in rows)
    return f"{shown}; ratios of neighbours {' and '.join(f'{ratio:.2f}' for ratio in ratios)}", min(ratios) >= 0.95


def _processes(parts: Parts) -> tuple[str, bool]:
    part = _part(parts, "processes")
    one, four = _row(part["rows"], processes=1)["rate"], _row(part["rows"], processes=4)["rate"]
    return f"{four:,.0f} with four, {one:,.0f} with one: {part['ratio']:.2f}", part["ratio"] >= 1


PHASES = ("enqueue", "process")
PROMISES: list[tuple[str, Callable[[Parts], tuple[str, bool]]]] = [
    (
        "256 messages a segment, beside the bare loop on aiobotocore: enqueue 0.8, process 0.7",
        lambda parts: _bare(parts, 256, "bare", 0.8, 0.7),
    ),
    (
        "256 messages a segment, beside the bare loop on this library's adapter: enqueue 0.8, process 0.7",
        lambda parts: _bare(parts, 256, "adapter", 0.8, 0.7),
    ),
    (
        "1 message a segment, beside the bare loop on aiobotocore: 0.9",
        lambda parts: _bare(parts, 1, "bare", 0.9, 0.9),
    ),
    (
        "1 message a segment, beside the bare loop on this library's adapter: 0.9",
        lambda parts: _bare(parts, 1, "adapter", 0.9, 0.9),
    ),
    ("3 times the best peer on S3 in enqueueing", _s3_enqueue),
    ("50 times the best peer on S3 in processing", _s3_process),
    ("nothing lost, nothing duplicated, with default settings", _exact),
    ("ahead of SAQ and taskiq in processing batches", _redis),
    ("at most 0.02 requests a message at 256 a segment", _requests_full),
    ("at most 3 paid requests for a message alone", _requests_single),
    ("100 messages a segment are cheaper than SQS in batches of 10", _dollars),
    ("50 ms away, same process: p50 at most 1.5 round trips to the handler", _latency_here),
    ("50 ms away, a warm worker elsewhere: p50 at most 4 round trips + one poll", _latency_elsewhere),
    ("no rate falls by more than 10 % beside a backlog of a million", _million_rates),
    ("a backlog of a million takes no more memory in the worker that coordinates (10 %)", _million_memory),
    (
        "paid requests a message the same within 10 % at backlogs of 50, 5,000, a million, and with a history",
        _requests_backlog,
    ),
    ("the rate does not fall from concurrency 3 to 10 to 50 (5 % is noise)", _concurrency),
    ("four processes are not slower than one", _processes),
]
"""What is asked, and what judges it."""
