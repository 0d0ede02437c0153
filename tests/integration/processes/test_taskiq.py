"""Applications of taskiq on a bucket, with taskiq's own worker processes: they run, end cleanly, and lose nothing."""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from s3queue_async import QueueStats, S3Queue
from tests.integration.processes.harness import Place, until

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
JOBS = 120


class TaskiqWorker:
    """`taskiq worker app:broker`, with its processes."""

    def __init__(self, place: Place, name: str, *arguments: str) -> None:
        self.log = place.directory / f"{name}.log"
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "taskiq", "worker", "app:broker", *arguments],
                cwd=place.directory,
                env=environment(place),
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def printed(self) -> str:
        return self.log.read_text(encoding="utf-8")

    async def up(self, processes: int) -> None:
        await until(f"{processes} processes listen", lambda: self.printed().count("worker started") >= processes)

    def kill(self) -> None:
        """SIGKILL to the manager, then to its workers."""
        if self.process.poll() is None:
            parent = psutil.Process(self.process.pid)
            family = [parent, *parent.children(recursive=True)]
            for process in family:
                process.kill()
            self.process.wait()
            psutil.wait_procs(family, timeout=10)

    async def stop(self) -> None:
        """SIGTERM, as an orchestrator sends it."""
        self.process.send_signal(signal.SIGTERM)
        await until("the worker ends", lambda: self.process.poll() is not None)
        assert "Traceback" not in self.printed(), self.printed()


@contextmanager
def worker(place: Place, name: str, *arguments: str) -> Iterator[TaskiqWorker]:
    running = TaskiqWorker(place, name, *arguments)
    try:
        yield running
    except BaseException:
        print(running.printed())
        raise
    finally:
        running.kill()


def environment(place: Place) -> dict[str, str]:
    """Workers look often, and losses are noticed soon; the application's own directory comes first."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("S3QUEUE_")}
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(place.directory), str(ROOT)]),
        "S3QUEUE_URL": place.url,
        "S3QUEUE_MAX_POLL_INTERVAL": "0.5",
        "S3QUEUE_VISIBILITY_TIMEOUT": "3",
        "S3QUEUE_HEARTBEAT_INTERVAL": "1",
        "JOURNAL": str(place.directory / "journal"),
    }


def write_application(place: Place, text: str) -> None:
    (place.directory / "app.py").write_text(textwrap.dedent(text), encoding="utf-8")


def run_client(place: Place, *arguments: str) -> str:
    ended = subprocess.run(
        [sys.executable, "app.py", *arguments],
        cwd=place.directory,
        env=environment(place),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


async def look(place: Place) -> QueueStats:
    async with S3Queue(place.url) as queue:
        return await queue.stats(exact=True)


async def test_application_of_taskiqs_documentation(place: Place) -> None:
    """The application in taskiq's README runs, unchanged but for the broker: its import and the line that makes it."""
    readme = importlib.metadata.metadata("taskiq").json["description"]
    assert isinstance(readme, str)
    blocks = re.findall(r"^```python\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    (application,) = [block for block in blocks if "async def main" in block]
    changed, imports = re.subn(
        r"^from \w+ import \w+Broker$",
        "from s3queue_async.taskiq import S3QueueBroker",
        application,
        flags=re.MULTILINE,
    )
    changed, brokers = re.subn(r"^broker = .*$", f"broker = S3QueueBroker({place.url!r})", changed, flags=re.MULTILINE)
    assert (imports, brokers) == (1, 1)
    write_application(place, changed)
    with worker(place, "worker", "--workers", "2") as running:
        await running.up(2)
        run_client(place)
        await until("the task is run", lambda: "AB 3" in running.printed())
        await running.stop()
    stats = await look(place)
    assert (stats.pending, stats.processing, stats.dead, stats.workers) == (0, 0, 0, 0)


APPLICATION = """
    import asyncio
    import os
    import sys
    import time

    from taskiq import TaskiqEvents

    from s3queue_async.taskiq import S3QueueBroker

    broker = S3QueueBroker(os.environ["S3QUEUE_URL"])


    def note(text: str) -> None:
        file = os.open(os.environ["JOURNAL"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(file, f"{text}\\n".encode())
        os.close(file)


    @broker.on_event(TaskiqEvents.WORKER_SHUTDOWN)
    async def shutdown(state):
        note("shutdown")


    @broker.task
    async def work(number: int) -> int:
        note(f"began {number}")
        await asyncio.sleep(0.05)
        note(f"ended {number}")
        return number + 1


    @broker.task
    def in_thread(number: int) -> int:
        time.sleep(0.05)
        return number * 2


    @broker.task
    async def fail() -> None:
        raise ValueError("no luck")


    async def results() -> None:
        print("Returned:", (await (await work.kiq(1)).wait_result(timeout=30)).return_value)
        print("Returned:", (await (await in_thread.kiq(4)).wait_result(timeout=30)).return_value)
        error = (await (await fail.kiq()).wait_result(timeout=30)).error
        print("Error:", repr(error))


    async def main() -> None:
        await broker.startup()
        if sys.argv[1] == "results":
            await results()
        else:
            await asyncio.gather(*(work.kiq(number) for number in range(int(sys.argv[1]))))
        await broker.shutdown()


    if __name__ == "__main__":
        asyncio.run(main())
"""


def journal(place: Place) -> Counter[str]:
    file = place.directory / "journal"
    return Counter(file.read_text(encoding="utf-8").splitlines()) if file.exists() else Counter()


def count(place: Place, what: str) -> int:
    return sum(times for line, times in journal(place).items() if line.startswith(what))


async def test_results(place: Place) -> None:
    """Values of async and of sync tasks, and errors, come back to the process that sent the tasks."""
    write_application(place, APPLICATION)
    with worker(place, "worker", "--workers", "1") as running:
        await running.up(1)
        printed = run_client(place, "results")
        running.process.send_signal(signal.SIGTERM)
        await until("the worker ends", lambda: running.process.poll() is not None)
    assert printed.splitlines() == ["Returned: 2", "Returned: 8", "Error: ValueError('no luck')"]


async def test_sigterm_strands_nothing(place: Place) -> None:
    """Told to end under load, workers end what they began, and leave everything else to be taken at once, once each."""
    write_application(place, APPLICATION)
    run_client(place, str(JOBS))
    arguments = ("--workers", "2", "--max-async-tasks", "3", "--max-prefetch", "2")
    with worker(place, "first", *arguments) as first:
        await until("a part is done", lambda: count(place, "ended") >= JOBS // 8)
        await first.stop()
        assert count(place, "shutdown") == 2, "taskiq's own events are called"
    done = count(place, "ended")
    assert count(place, "began") == done
    assert done < JOBS
    stats = await look(place)
    assert (stats.pending, stats.processing, stats.workers) == (JOBS - done, 0, 0)
    with worker(place, "second", *arguments) as second:
        await until("all is done", lambda: count(place, "ended") >= JOBS)
        await second.stop()
    assert {line: times for line, times in journal(place).items() if times > 1 and line != "shutdown"} == {}
    assert {f"ended {number}" for number in range(JOBS)} <= journal(place).keys()
    stats = await look(place)
    assert (stats.pending, stats.processing, stats.delayed, stats.dead) == (0, 0, 0, 0)


async def test_killed_workers(place: Place) -> None:
    """Killed in the middle, all of them: what they had is run again by the next, and nothing is lost."""
    write_application(place, APPLICATION)
    run_client(place, str(JOBS))
    with worker(place, "first", "--workers", "2", "--max-async-tasks", "3") as first:
        await until("a part is begun", lambda: count(place, "began") >= JOBS // 8)
        first.kill()
    with worker(place, "second", "--workers", "2") as second:
        await until("all is done", lambda: len([line for line in journal(place) if line.startswith("ended")]) >= JOBS)
        await second.stop()
    again = sum(times - 1 for line, times in journal(place).items() if line.startswith("ended"))
    assert again <= 2 * 3, "twice is what ran or was to be acknowledged as they were killed"
    stats = await look(place)
    assert (stats.pending, stats.processing, stats.delayed, stats.dead) == (0, 0, 0, 0)
