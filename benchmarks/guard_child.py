"""The process in which the regression guard counts: ``benchmarks.guard`` starts it, with an environment of its own.

python -m benchmarks.guard_child counts NAME...         requests, bytes, keys and calls of workloads, as JSON
python -m benchmarks.guard_child marked NAME...         each workload three times, marked for callgrind
python -m benchmarks.guard_child once NAME MESSAGES     one workload; with --before, only what comes before it
python -m benchmarks.guard_child profile NAME           its functions by the number of their calls
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import socket
import sys
from collections import Counter
from dataclasses import replace

from benchmarks.guard_workloads import STORE_COUNTS, WORKLOADS, Bench, nothing_before, run

MARK = "getsid"
"""The C library's function that callgrind waits for: nothing else here calls it."""
WARM_UP_MIN, WARM_UP_PART = 8, 8
"""So many messages before those that count, or an eighth of them: what Python does at first calls is done by then."""
PROFILE_LINES = 60


def same_everywhere() -> None:
    """Worker ids carry the host's name and the process's number, and are written to the store: make them equal."""
    socket.gethostname = lambda: "guard"
    os.getpid = lambda: 12345


def counted(name: str) -> dict[str, float]:
    """What a workload asks of the store and how many functions it calls, for each message."""
    messages = WORKLOADS[name].messages
    profile, store = profiled(name)
    calls = sum(entry.callcount for entry in profile.getstats())
    return {count: store[count] / messages for count in STORE_COUNTS} | {"calls": calls / messages}


def profiled(name: str) -> tuple[cProfile.Profile, Counter[str]]:
    """Run a workload at native speed; its calls, and what it asked of the store."""
    workload = WORKLOADS[name]
    profile = cProfile.Profile()
    store: Counter[str] = Counter()

    def begin(bench: Bench) -> None:
        bench.store.counts.clear()
        profile.enable()

    def end(bench: Bench) -> None:
        profile.disable()
        store.update(bench.store.counts)

    run(workload, workload.messages, begin, end)
    return profile, store


def marked(name: str) -> None:
    """A workload three times: to warm up, with its number of messages, with twice as many.

    What the third costs beyond the second is what the messages cost, without opening and closing the queues.
    """
    workload = WORKLOADS[name]
    if workload.messages_slow is None:
        raise ValueError(f"{name!r} takes too long to be followed instruction by instruction")

    def mark(bench: Bench) -> None:
        os.getsid(0)

    # Among so few messages one collection more or less, of whatever happens to be there, would count for six percent.
    gc.disable()
    warm_up = max(WARM_UP_MIN, workload.messages_slow // WARM_UP_PART)
    for messages in (warm_up, workload.messages_slow, 2 * workload.messages_slow):
        run(workload, messages, mark, mark)


def once(name: str, messages: int, *, before: bool) -> None:
    """A workload, or what comes before it, with nothing around it but the start of Python."""
    workload = WORKLOADS[name]
    gc.disable()
    run(
        replace(workload, work=nothing_before) if before else workload, messages, lambda bench: None, lambda bench: None
    )


def main() -> None:
    if os.environ.get("PYTHONHASHSEED") != "0":
        sys.exit("Counts differ from run to run unless PYTHONHASHSEED=0 is set. Set it, or run benchmarks.guard.")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("counts").add_argument("names", nargs="+", choices=WORKLOADS)
    commands.add_parser("marked").add_argument("names", nargs="+", choices=WORKLOADS)
    single = commands.add_parser("once")
    single.add_argument("name", choices=WORKLOADS)
    single.add_argument("messages", type=int)
    single.add_argument("--before", action="store_true")
    commands.add_parser("profile").add_argument("name", choices=WORKLOADS)
    chosen = parser.parse_args()
    same_everywhere()
    match chosen.command:
        case "counts":
            json.dump({name: counted(name) for name in chosen.names}, sys.stdout)
        case "marked":
            for name in chosen.names:
                marked(name)
        case "profile":
            pstats.Stats(profiled(chosen.name)[0]).sort_stats("ncalls").print_stats(PROFILE_LINES)
        case _:
            once(chosen.name, chosen.messages, before=chosen.before)


if __name__ == "__main__":
    main()
