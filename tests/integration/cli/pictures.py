"""Pictures of ``s3queue top``: a queue that is idle, busy and throttled, minutes of virtual time each.

    python -m tests.integration.cli.pictures DIRECTORY

writes idle-80.svg and so on, and with resvg-py installed PNGs as well. docs/top.png is busy-120.png of it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from io import StringIO
from pathlib import Path
from random import Random
from typing import Any

import anyio
from rich.console import Console

from s3queue_async import S3Queue, Settings
from s3queue_async.cli.figures import Figures, Watch
from s3queue_async.cli.top import look
from s3queue_async.cli.top_view import frame
from s3queue_async.testing.clock import LoopClock, run_virtual
from tests.unit.queue.bed import Bed

SCENES = ("idle", "busy", "throttled")
WIDTHS = (80, 120, 160)
TITLE = "s3://acme-prod/queues/emails"
WORKERS = 6
LOOKS = 90
EVERY_S = 2.0


@asynccontextmanager
async def cluster(bed: Bed, scene: str) -> AsyncIterator[S3Queue[Any]]:
    """Workers and a producer as the scene wants them; gives a queue object to look with."""
    chance = Random(7)
    settings = Settings(heartbeat_interval=5, visibility_timeout=30)

    async def handle(payload: int) -> None:
        await anyio.sleep(0.05 + chance.random() * 0.3)
        if payload % 97 == 0:
            raise ConnectionError(f"mail server refused message {payload}")

    async def work() -> None:
        storage, faults = bed.lane()
        if scene == "throttled":
            for _ in range(400):
                faults.throttle("put", "list", times=1, skip=chance.randrange(20, 1200))
        queue = bed.queue(
            settings=settings, storage=storage, on_message=handle, concurrency=2 if scene == "idle" else 12
        )
        async with queue:
            await anyio.sleep_forever()

    async def produce(queue: S3Queue[Any]) -> None:
        number = 0
        while scene != "idle":
            for priority, count in ((0, 900), (3, 400), (5, 250), (9, 60)):
                count = int(count * (0.4 + chance.random()) * (1 if scene == "busy" else 0.5))
                await queue.enqueue_many(range(number, number + count), priority=priority)
                number += count
            await queue.enqueue_many(range(number, number + 40), delay=120)
            await anyio.sleep(4)

    async with bed.queue(settings=settings) as watcher, anyio.create_task_group() as group:
        if scene == "idle":
            await watcher.enqueue_many(range(12), delay=3600)
        for _ in range(2 if scene == "idle" else WORKERS):
            group.start_soon(work)
        group.start_soon(produce, watcher)
        yield watcher
        group.cancel_scope.cancel()


async def figures_of(scene: str, looks: int = LOOKS) -> Figures:
    """What is seen at the end of so many looks."""
    bed = Bed(latency_s=0.03, date_resolution_s=1.0, seed=3)
    watch = Watch()
    async with cluster(bed, scene) as queue:
        figures = await look(queue, watch)
        for _ in range(looks):
            await LoopClock().sleep(EVERY_S)
            figures = await look(queue, watch)
    return figures


def drawn(figures: Figures, width: int) -> tuple[str, str]:
    """A frame as text, and as SVG."""
    console = Console(record=True, width=width, file=StringIO(), force_terminal=True, color_system="truecolor")
    console.print(frame(figures, title=TITLE, width=width))
    text = console.export_text(clear=False)
    return text, console.export_svg(title="s3queue top")


def main() -> None:
    directory = Path(sys.argv[1])
    for scene in SCENES:
        found: list[Figures] = []

        async def run(scene: str = scene, found: list[Figures] = found) -> None:
            found.append(await figures_of(scene))

        run_virtual(run)
        for width in WIDTHS:
            svg = drawn(found[0], width)[1]
            (directory / f"{scene}-{width}.svg").write_text(svg, encoding="utf-8")
            with suppress(ImportError):
                write_png(svg, directory / f"{scene}-{width}.png")


def write_png(svg: str, path: Path) -> None:
    """Draw it with a font that has every character, at its real widths."""
    resvg: Any = importlib.import_module("resvg_py")
    path.write_bytes(bytes(resvg.svg_to_bytes(svg_string=svg.replace("Fira Code", "DejaVu Sans Mono"))))


if __name__ == "__main__":
    main()
