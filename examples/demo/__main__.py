"""Index Python's standard library with two worker processes; one is killed half-way."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from examples.demo.files import SourceFile, broken_file, source_files
from examples.demo.proof import Indexed, prove
from examples.demo.screen import Figures, Screen, print_end
from examples.demo.worker import SETTINGS, ReportReader, request_counts, work
from s3queue_async import S3Queue

WORKERS = (1, 2)
KILLED = 2
GIVE_UP_S = 180.0
LOOK_EVERY_S = 0.1
STATS_EVERY_S = 0.5


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--s3", action="store_true", help="on a SeaweedFS server started for this, not on SQLite")
    parser.add_argument("--data", type=Path, default=Path("demo-data"), help="where the demo writes")
    parser.add_argument("--limit", type=int, help="index only the first so many files")
    parser.add_argument("--worker", type=Path, metavar="REPORT", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        asyncio.run(work(arguments.url, arguments.worker))
        return 0
    directory: Path = arguments.data.resolve() / "run"
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    try:
        with store(directory, s3=arguments.s3) as (url, name):
            return asyncio.run(Demo(url, name, directory, arguments.limit).run())
    except KeyboardInterrupt:
        return 130


@contextlib.contextmanager
def store(directory: Path, *, s3: bool) -> Iterator[tuple[str, str]]:
    """The url of a fresh queue, and what to call its store."""
    if not s3:
        yield f"sqlite://{directory}/queue.db", "one SQLite file"
        return
    from s3queue_async.testing import servers

    print("Starting SeaweedFS, an S3 server, on this machine (a few seconds)")
    with servers.seaweedfs(["demo"]) as server:
        # The workers find the credentials as every AWS program does.
        os.environ.update(server.environment())
        yield server.queue_url("demo", "library"), "SeaweedFS"


class Demo:
    """One run."""

    def __init__(self, url: str, store_name: str, directory: Path, limit: int | None) -> None:
        self._url = url
        self._store_name = store_name
        self._directory = directory
        self._limit = limit
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._readers = {number: ReportReader(self._report(number)) for number in WORKERS}
        self._requests: dict[int, dict[str, int]] = {}
        self._retries = 0
        self._indexed = Indexed()
        self._killed_after = 0

    def _report(self, worker: int) -> Path:
        return self._directory / f"worker-{worker}.jsonl"

    async def run(self) -> int:
        broken = broken_file(self._directory)
        files = [*source_files(self._limit), broken]
        with Screen(len(files)) as screen, contextlib.ExitStack() as stack:
            screen.say(f"{len(files):,} files to index; the queue is on {self._store_name}")
            for number in WORKERS:
                stack.enter_context(self._worker(number))
            enqueue_s, enqueue_requests, began = await self._enqueue(files, screen)
            async with S3Queue(self._url, payload_type=SourceFile, settings=SETTINGS) as queue:
                await self._watch(queue, screen, len(files))
                handle_s = time.monotonic() - began
                codes = await self._stop_workers()
                self._read_reports()
                stats = await queue.stats(exact=True)
                dead = await queue.dead_letters.list(limit=1000)
        proof = prove(self._indexed, dead, stats, killed=KILLED, extra=Path(broken.path), limit=self._limit)
        if codes != {1: 0, KILLED: -signal.SIGKILL}:
            proof.problems.append(f"the workers ended with {codes}")
        worker_requests: Counter[str] = Counter()
        for counts in self._requests.values():
            worker_requests.update(counts)
        figures = Figures(
            self._store_name, len(files), KILLED, self._killed_after, enqueue_s, handle_s, enqueue_requests,
            worker_requests, self._retries, {number: self._indexed.by(number) for number in WORKERS},
        )  # fmt: skip
        print_end(screen, figures, self._indexed, dead, proof)
        return 0 if proof.holds else 1

    @contextlib.contextmanager
    def _worker(self, number: int) -> Iterator[None]:
        command = [sys.executable, "-m", "examples.demo", "--worker", str(self._report(number)), "--url", self._url]
        with subprocess.Popen(command) as process:
            self._processes[number] = process
            try:
                yield
            finally:
                process.kill()

    async def _enqueue(self, files: list[SourceFile], screen: Screen) -> tuple[float, Counter[str], float]:
        async with S3Queue(self._url, payload_type=SourceFile, settings=SETTINGS) as queue:
            while len(await queue.workers()) < len(WORKERS):  # noqa: ASYNC110 - the workers are other processes
                await asyncio.sleep(LOOK_EVERY_S)
            before = Counter(request_counts(queue.requests()))
            began = time.monotonic()
            await queue.enqueue_many(files)
            enqueue_s = time.monotonic() - began
            requests = Counter(request_counts(queue.requests())) - before
        screen.say(f"{len(files):,} messages enqueued in {enqueue_s:.2f} s")
        return enqueue_s, requests, began

    async def _watch(self, queue: S3Queue[SourceFile], screen: Screen, total: int) -> None:
        """Show the progress until every file is accounted for; kill one worker half-way."""
        gives_up = time.monotonic() + GIVE_UP_S
        look_at = 0.0
        dead = 0
        while time.monotonic() < gives_up:
            self._read_reports()
            done = len(self._indexed.digests)
            victim = self._processes[KILLED]
            if not self._killed_after and done >= total / 2:
                # SIGKILL cannot be caught: what this worker holds stays claimed until its lease is over.
                victim.kill()
                victim.wait()
                self._killed_after = done
                screen.say(f"worker {KILLED} killed (SIGKILL) when {done:,} files were indexed")
            if time.monotonic() >= look_at:
                stats = await queue.stats()
                dead = stats.dead
                look_at = time.monotonic() + STATS_EVERY_S
                if done + dead >= total:
                    screen.show(done, "done")
                    return
                doing = f"{stats.pending:,} waiting, {stats.processing:,} claimed, {stats.delayed:,} to be retried"
                screen.show(done, f"{doing}, {dead:,} dead")
            if all(process.poll() is not None for process in self._processes.values()):
                screen.say("All workers have ended.")
                return
            await asyncio.sleep(LOOK_EVERY_S)
        screen.say(f"Giving up after {GIVE_UP_S:g} s.")

    async def _stop_workers(self) -> dict[int, int]:
        """End the surviving worker as a deployment would: it drains. Returns the exit codes."""
        codes: dict[int, int] = {}
        for number, process in self._processes.items():
            process.terminate()
            codes[number] = await asyncio.to_thread(process.wait, SETTINGS.drain_timeout)
        return codes

    def _read_reports(self) -> None:
        for number, reader in self._readers.items():
            for line in reader.lines():
                if "indexed" in line:
                    self._indexed.add(number, line["indexed"], line["sha256"], line["functions"], line["classes"])
                elif "retried" in line:
                    self._retries += 1
                else:
                    self._requests[number] = line["requests"]


if __name__ == "__main__":
    sys.exit(main())
