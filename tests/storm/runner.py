"""Real processes on a real store, in a storm of faults; the simulation's checker reads what they wrote down.

python -m tests.storm                                    8 workers, 5 minutes, 60,000 messages
python -m tests.storm --seconds 20 --workers 3 --messages 1500 --visibility-timeout 3
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import anyio
from rich.console import Console

from s3queue_async.testing.servers import seaweedfs
from tests.simulation.checker import check
from tests.storm import report
from tests.storm.history import assemble
from tests.storm.storm import BUCKET, Plan, Storm, save


def run(plan: Plan, console: Console, *, keep: bool = False) -> int:
    """Run a storm and check what became of it; returns the exit code."""
    directory = Path(tempfile.mkdtemp(prefix="s3queue-storm-"))
    console.print(f"journals and logs: {directory}", markup=False, highlight=False)
    with seaweedfs([BUCKET]) as server:
        record = anyio.run(Storm(plan, server, directory, console).run)
    save(plan, record, directory / "controller.json")
    history = assemble(plan, record)
    problems, causes = check(history)
    console.print(report.table(plan, record, history, causes, problems))
    if problems:
        report.stories(console, record, history, problems)
    if problems or keep:
        console.print(f"\nThe journals and logs are in {directory}", markup=False)
    else:
        shutil.rmtree(directory)
    return 1 if problems else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Plan()
    parser.add_argument("--seconds", type=float, default=default.seconds, help="how long faults go on")
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--workers", type=int, default=default.workers)
    parser.add_argument("--producers", type=int, default=default.producers)
    parser.add_argument("--messages", type=int, default=default.messages, help="acknowledged at least")
    parser.add_argument("--visibility-timeout", type=float, default=default.visibility_s)
    parser.add_argument(
        "--deed-every", type=float, default=default.deed_every_s, help="seconds between signals and cuts"
    )
    parser.add_argument("--keep", action="store_true", help="keep the journals and logs in any case")
    arguments = parser.parse_args()
    plan = Plan(
        seed=arguments.seed,
        seconds=arguments.seconds,
        workers=arguments.workers,
        producers=arguments.producers,
        messages=arguments.messages,
        visibility_s=arguments.visibility_timeout,
        deed_every_s=arguments.deed_every,
    )
    return run(plan, Console(soft_wrap=True), keep=arguments.keep)
