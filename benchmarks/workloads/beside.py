"""Beside others: the bare loop, peers, and SQS's price."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from benchmarks.contenders.base import Drained, Sample, drain
from benchmarks.contenders.ours import Counted, Ours
from benchmarks.contenders.registry import Entry, Failed, entries
from benchmarks.throughput import MESSAGES, PHASES, SIDES, SINGLES, compare, exact, ratios
from benchmarks.workloads.common import Bench, Results, added, median, per_million, rates, spread

PER_SEGMENT = (256, 1)
SEGMENT_SIZES = (1, 10, 100, 256)
BARE_MESSAGES = {256: 2 * MESSAGES, 1: 400}
BARE_ROUNDS = 3
PAID = ("put", "list", "get")
SQS_SINGLE, SQS_BATCHED = 1.20, 0.12
"""Dollars a million messages: three calls each at $0.40 a million; ten messages a call."""


async def bare(bench: Bench) -> Results:
    """Messages a second beside the bare loops, with full segments and with single messages."""
    rows = []
    for scheme in bench.schemes:
        for per_segment in PER_SEGMENT:
            messages = bench.count(BARE_MESSAGES[per_segment], multiple=per_segment)
            rounds = bench.many(BARE_ROUNDS) if scheme == "s3" else bench.rounds
            samples = await compare(
                bench.server, rounds=rounds, messages=messages, per_segment=per_segment, scheme=scheme
            )
            found = ratios(samples)
            for phase in PHASES:
                for side in SIDES:
                    if (phase, side) not in samples:
                        continue
                    runs = samples[phase, side]
                    rows.append(
                        {
                            "scheme": scheme,
                            "per_segment": per_segment,
                            "rounds": rounds,
                            "phase": phase,
                            "side": side,
                            "rate": round(median(run.rate for run in runs), 1),
                            "ratio": None if side == "queue" else round(found[phase, side], 3),
                            "requests": round(median(run.requests_per_message for run in runs), 4),
                            "cpu_us": round(median(run.cpu_s / run.messages for run in runs) * 1e6, 1),
                        }
                    )
    return {"rows": rows}


async def peers(bench: Bench) -> Results:
    """Every contender in turn: a backlog enqueued and processed, and messages one at a time."""
    drained: dict[str, list[Drained]] = defaultdict(list)
    trips: dict[str, list[float]] = defaultdict(list)
    able: list[Entry] = []
    for entry in entries(bench.schemes):
        why_not = entry.why_not()
        if why_not:
            bench.skipped[entry.name] = why_not
        else:
            able.append(entry)
    # What they differ by is so much that a round less shows it.
    rounds = max(1, bench.rounds - 1)
    for _ in range(rounds):
        for entry in able:
            if entry.name in bench.skipped:
                continue
            try:
                where = bench.place(entry.contender, alone=entry.contender == "pawn")
                drained[entry.name].append(_drained(entry.run("drain", bench.count(entry.messages, least=2), where)))
                if not trips[entry.name]:
                    where = bench.place(entry.contender, alone=entry.contender == "pawn")
                    answer = entry.run("round trips", bench.count(entry.trips, least=2), where)
                    trips[entry.name] = answer["seconds"]
            except Failed as error:
                # A peer that fails is no reason to have no figures of the others; the table names it.
                bench.skipped[entry.name] = str(error)
    return {
        "rounds": rounds,
        "rows": [
            {
                "name": entry.name,
                "store": entry.store,
                "ours": entry.ours,
                "settings": entry.settings,
                **rates(drained[entry.name]),
                "round_trip": spread(trips[entry.name]),
            }
            for entry in able
            if drained[entry.name] and trips[entry.name]
        ],
    }


def _drained(answer: dict[str, Any]) -> Drained:
    return Drained(Sample(**answer["enqueue"]), Sample(**answer["process"]), answer["lost"], answer["duplicated"])


async def cost(bench: Bench) -> Results:
    """Every request of enqueueing and processing, and what it costs, by the number of messages in a segment."""
    rows = []
    for per_segment in SEGMENT_SIZES:
        messages = bench.count(min(200 * per_segment, MESSAGES) if per_segment > 1 else SINGLES, multiple=per_segment)
        where = bench.place(f"cost-{per_segment}")
        counted = Counted()
        contender = Ours(where, settings={"segment_messages_max": per_segment}, counted=counted)
        exact(await drain(contender, messages))
        requests = added(counted.own, counted.upkeep)
        rows.append(
            {
                "per_segment": per_segment,
                "messages": messages,
                "requests": requests,
                "per_message": round(sum(requests.values()) / messages, 4),
                "paid_per_message": round(sum(requests.get(name, 0) for name in PAID) / messages, 4),
                "own_paid_per_message": round(sum(counted.own[name] for name in PAID) / messages, 4),
                "dollars": round(per_million(requests, messages), 4),
            }
        )
    return {"rows": rows, "sqs": {"single": SQS_SINGLE, "batched": SQS_BATCHED}}
