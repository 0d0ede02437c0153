"""All benchmarks in one run, on one SeaweedFS and one Redis of its own: ``make bench``.

    python -m benchmarks.bench                       everything, in 9 minutes on two fast cores
    python -m benchmarks.bench --only cost,latency   some parts
    python -m benchmarks.bench --scale 0.02 --rounds 1   a trial of all parts, in small
    python -m benchmarks.bench --docs                write docs/performance.json, its plots and the tables of performance.md

Without --docs, figures and plots go to benchmarks/results/. Contenders take turns (A B A B ...); what cannot run here is
skipped and named. ``make bench-peers`` installs the others.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.console import Console

from benchmarks.plots import draw
from benchmarks.redis_server import redis
from benchmarks.report import markdown, show
from benchmarks.throughput import BUCKET
from benchmarks.workloads import backlog, beside, latency, load
from benchmarks.workloads.common import Bench, Results
from s3queue_async.errors import InvalidURL, QueueError
from s3queue_async.storage.open import storage_from_url
from s3queue_async.testing.servers import seaweedfs

PARTS: dict[str, Callable[[Bench], Awaitable[Results]]] = {
    "bare": beside.bare,
    "peers": beside.peers,
    "cost": beside.cost,
    "latency": latency.latency,
    "concurrency": load.concurrency,
    "slow": load.slow,
    "sizes": load.sizes,
    "steady": load.steady,
    "mixed": load.mixed,
    "processes": load.processes,
    "backlog": backlog.backlog,
}
OPTIONAL = {"s3+obstore": "s3queue_async, obstore"}
ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"
DOCUMENT = "performance.md"
FIGURES = "performance.json"
BEGIN, END = "<!-- begin: make bench -->\n", "<!-- end: make bench -->\n"
WIDTH = 200


async def usable(bench: Bench) -> None:
    """Find out which of our S3 clients can be used; the others are skipped and named."""
    for scheme, name in OPTIONAL.items():
        try:
            storage = storage_from_url(bench.url(bench.place("usable"), scheme))
            await storage.open()
        except InvalidURL:
            bench.skipped[name] = f"this version knows no {scheme}:"
        except (ImportError, QueueError) as error:
            bench.skipped[name] = f"{type(error).__name__}: {error}"
        else:
            await storage.close()
            bench.schemes.append(scheme)


async def run(bench: Bench, only: list[str]) -> Results:
    """Run the parts in order, and return everything that is known about the run."""
    began = time.monotonic()
    await usable(bench)
    parts = {}
    for name in only:
        part_began = time.monotonic()
        bench.say(f"{name} ...")
        parts[name] = await PARTS[name](bench)
        bench.say(f"{name}: {time.monotonic() - part_began:.0f} s")
    return {
        "machine": {"python": platform.python_version(), "cores": os.cpu_count(), "processor": _processor()},
        "rounds": bench.rounds,
        "scale": bench.scale,
        "seconds": round(time.monotonic() - began, 1),
        "skipped": bench.skipped,
        "parts": parts,
    }


def _processor() -> str:
    described = Path("/proc/cpuinfo")
    lines = described.read_text(encoding="utf-8").splitlines() if described.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write(results: Results, directory: Path) -> list[Path]:
    """Write the figures and draw the plots; returns the files."""
    directory.mkdir(exist_ok=True)
    figures = directory / FIGURES
    figures.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return [figures, *draw(results["parts"], directory)]


def document(results: Results, text: str) -> str:
    """The document with the tables of this run; everything else in it stays."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n{markdown(results)}\n{END}{tail}"


def _measure(chosen: argparse.Namespace, only: list[str], console: Console) -> Results:
    with seaweedfs([BUCKET]) as server, redis() as redis_url:
        os.environ.update(server.environment())
        bench = Bench(server, redis_url, console, chosen.scale, chosen.rounds)
        return asyncio.run(run(bench, only))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"parts, with commas: {','.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="of every number of messages")
    parser.add_argument("--docs", action="store_true", help=f"write into docs/ and into {DOCUMENT}")
    parser.add_argument("--into", type=Path, default=RESULTS, help="where figures and plots go otherwise")
    parser.add_argument("--show", type=Path, metavar="JSON", help="measure nothing, show an earlier run")
    chosen = parser.parse_args()
    only = chosen.only.split(",") if chosen.only else list(PARTS)
    if unknown := [name for name in only if name not in PARTS]:
        parser.error(f"--only: there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if chosen.rounds < 1 or not 0 < chosen.scale <= 10:
        parser.error("--rounds must be 1 or more, --scale above 0, up to 10")
    if chosen.docs and not chosen.show and (chosen.only or chosen.scale != 1):
        parser.error("--docs writes what was measured of all parts at full size: leave out --only and --scale")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    shown = chosen.show
    results: Results = json.loads(shown.read_text(encoding="utf-8")) if shown else _measure(chosen, only, console)
    show(results, console)
    written = write(results, DOCS if chosen.docs else chosen.into)
    if chosen.docs:
        page = DOCS / DOCUMENT
        page.write_text(document(results, page.read_text(encoding="utf-8")), encoding="utf-8")
        written.append(page)
    console.print("written: " + ", ".join(os.path.relpath(path) for path in written))


if __name__ == "__main__":
    main()
