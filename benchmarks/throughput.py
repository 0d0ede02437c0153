"""Messages a second beside a bare loop that issues the same S3 requests with no queue around them.

Both run in turn (A B A B ...) in this process against one SeaweedFS server, on payloads of 100 bytes and a handler
that only remembers what it got. What the bare loop does: benchmarks/contenders/bare.py.

    python -m benchmarks.throughput [--rounds 5] [--messages 20000] [--singles 600] [--profile enqueue|process]
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import os
import pstats
import statistics
import sys
from collections import defaultdict
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders.bare import loops
from benchmarks.contenders.base import Drained, Place, Sample, drain
from benchmarks.contenders.ours import Ours
from s3queue_async.testing.servers import Server, seaweedfs

BUCKET = "bench"
MESSAGES = 20_480
SINGLES = 600
PHASES = ("enqueue", "process")
SIDES = {"bare": "bare loop", "adapter": "bare loop on the adapter", "queue": "queue"}

Samples = dict[tuple[str, str], list[Sample]]


def place(server: Server, prefix: str, *, bucket: str = BUCKET, redis_url: str = "") -> Place:
    """Where one run's messages go."""
    return Place(
        server.endpoint_url, server.region, server.access_key_id, server.secret_access_key, bucket, prefix, redis_url
    )


def exact(drained: Drained) -> Drained:
    """The same. Raises RuntimeError when a message was lost or came twice."""
    if drained.lost or drained.duplicated:
        raise RuntimeError(
            f"of {drained.process.messages} messages, {drained.lost} were lost, {drained.duplicated} came twice"
        )
    return drained


@contextmanager
def on_core(number: int) -> Iterator[None]:
    """Keep this thread, and what it starts, to one core; ``number`` counts through them.

    Virtual cores differ: one took 1.5 times as long for the same loop as the other, for seconds, on the machine of
    docs/performance.md. What is compared has to run on the same one.
    """
    if sys.platform != "linux":
        yield
        return
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {sorted(allowed)[number % len(allowed)]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


async def compare(
    server: Server,
    *,
    rounds: int,
    messages: int,
    per_segment: int,
    profile: str | None = None,
    scheme: str = "s3",
) -> Samples:
    """Run the bare loops and the queue in turn; ``messages`` must be a multiple of ``per_segment``."""

    async def profiled(name: str, work: Coroutine[Any, Any, None]) -> None:
        if profile != name:
            await work
            return
        profiler = cProfile.Profile()
        profiler.enable()
        await work
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)

    samples: Samples = defaultdict(list)
    for number in range(rounds):
        prefix = f"{scheme.removeprefix('s3+')}-{per_segment}-{number}-{os.getpid()}"
        places = {side: place(server, f"{side}-{prefix}") for side in SIDES}
        # Not obstore, which works in threads of its own.
        with on_core(number) if scheme == "s3" else nullcontext():
            for side, bare in loops(places, scheme=scheme, per_segment=per_segment).items():
                drained = await drain(bare, messages)
                samples["enqueue", side].append(drained.enqueue)
                samples["process", side].append(drained.process)
            queue = Ours(places["queue"], scheme=scheme, settings={"segment_messages_max": per_segment})
            drained = exact(await drain(queue, messages, around=profiled))
        samples["enqueue", "queue"].append(drained.enqueue)
        samples["process", "queue"].append(drained.process)
    return samples


def ratios(samples: Samples) -> dict[tuple[str, str], float]:
    """The queue's rate as a part of each bare loop's, of each phase.

    Each round's sides ran one after the other: the ratio of neighbours is the least disturbed.
    """
    return {
        (phase, side): statistics.median(
            queue.rate / bare.rate for queue, bare in zip(samples[phase, "queue"], runs, strict=True)
        )
        for (phase, side), runs in samples.items()
        if side != "queue"
    }


def report(console: Console, per_segment: int, samples: Samples) -> None:
    """Print the medians, and the queue's part of each loop's rate."""
    table = Table(title=f"{per_segment} message{'s' if per_segment > 1 else ''} a segment (medians)")
    for column in ("phase", "side", "messages/s", "queue / it", "requests/message", "client CPU us/message"):
        table.add_column(column, justify="left" if column in ("phase", "side") else "right")
    found = ratios(samples)
    for phase in PHASES:
        for side in SIDES:
            runs = samples.get((phase, side))
            if runs:
                table.add_row(
                    phase,
                    SIDES[side],
                    f"{statistics.median(run.rate for run in runs):,.0f}",
                    f"{found[phase, side]:.2f}" if side != "queue" else "",
                    f"{statistics.median(run.requests_per_message for run in runs):.3f}",
                    f"{statistics.median(run.cpu_s / run.messages for run in runs) * 1e6:,.1f}",
                )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--messages", type=int, default=MESSAGES, help="at 256 a segment")
    parser.add_argument("--singles", type=int, default=SINGLES, help="at 1 a segment")
    parser.add_argument("--profile", choices=PHASES, help="print a profile of that phase")
    parser.add_argument("--scheme", choices=("s3", "s3+obstore"), default="s3", help="which of the S3 clients")
    arguments = parser.parse_args()
    console = Console()
    with seaweedfs([BUCKET]) as server:
        os.environ.update(server.environment())
        for per_segment, messages in ((256, arguments.messages // 256 * 256), (1, arguments.singles)):
            if messages:
                samples = asyncio.run(
                    compare(
                        server,
                        rounds=arguments.rounds,
                        messages=messages,
                        per_segment=per_segment,
                        profile=arguments.profile,
                        scheme=arguments.scheme,
                    )
                )
                report(console, per_segment, samples)


if __name__ == "__main__":
    main()
