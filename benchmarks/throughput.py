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
from collections import defaultdict
from collections.abc import Coroutine
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.contenders.bare import Bare
from benchmarks.contenders.base import Drained, Place, Sample, drain
from benchmarks.contenders.ours import Ours
from s3queue_async.testing.servers import Server, seaweedfs

BUCKET = "bench"
MESSAGES = 20_480
SINGLES = 600
PHASES = ("enqueue", "process")

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


async def compare(
    server: Server,
    *,
    rounds: int,
    messages: int,
    per_segment: int,
    profile: str | None = None,
    scheme: str = "s3",
) -> Samples:
    """Run the queue and the bare loop in turn; ``messages`` must be a multiple of ``per_segment``."""

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
        bare = Bare(place(server, f"bare-{prefix}"), scheme=scheme, per_segment=per_segment)
        queue = Ours(place(server, f"queue-{prefix}"), scheme=scheme, settings={"segment_messages_max": per_segment})
        for side, drained in (
            ("bare", await drain(bare, messages)),
            ("queue", exact(await drain(queue, messages, around=profiled))),
        ):
            samples["enqueue", side].append(drained.enqueue)
            samples["process", side].append(drained.process)
    return samples


def ratios(samples: Samples) -> dict[str, float]:
    """The queue's rate as a part of the bare loop's, of each phase.

    Each round's two sides ran one after the other: the ratio of neighbours is the least disturbed.
    """
    return {
        phase: statistics.median(
            queue.rate / bare.rate for queue, bare in zip(samples[phase, "queue"], samples[phase, "bare"], strict=True)
        )
        for phase in PHASES
    }


def report(console: Console, per_segment: int, samples: Samples) -> dict[str, float]:
    """Print the medians; return the ratio of each phase."""
    table = Table(title=f"{per_segment} message{'s' if per_segment > 1 else ''} a segment (medians)")
    for column in ("phase", "side", "messages/s", "ratio", "requests/message", "client CPU us/message"):
        table.add_column(column, justify="left" if column in ("phase", "side") else "right")
    found = ratios(samples)
    for phase in PHASES:
        for side in ("bare", "queue"):
            runs = samples[phase, side]
            table.add_row(
                phase,
                side,
                f"{statistics.median(run.rate for run in runs):,.0f}",
                f"{found[phase]:.2f}" if side == "queue" else "",
                f"{statistics.median(run.requests_per_message for run in runs):.3f}",
                f"{statistics.median(run.cpu_s / run.messages for run in runs) * 1e6:,.1f}",
            )
    console.print(table)
    return found


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
