"""Each example is run as a user would run it: as a process, from the command line."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from examples.demo.files import broken_file, source_files
from examples.demo.proof import Indexed, prove
from s3queue_async import QueueStats, S3Queue, WorkerInfo
from s3queue_async.testing.servers import free_ports

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
WAIT_S = 60.0


def _command(module: str, arguments: Sequence[str]) -> list[str]:
    return [sys.executable, "-W", "error", "-m", module, *arguments]


def _environment(directory: Path, more: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("S3QUEUE_")}
    return {**kept, "PYTHONPATH": str(ROOT), "COLUMNS": "120", **more}


def run(module: str, *arguments: str, cwd: Path, **environment: str) -> str:
    """Run an example to its end and return what it printed."""
    ended = subprocess.run(
        _command(module, arguments),
        cwd=cwd,
        env=_environment(cwd, environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=100,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@contextmanager
def started(module: str, *, cwd: Path, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """An example that serves until it is told to stop."""
    with subprocess.Popen(
        _command(module, ()),
        cwd=cwd,
        env=_environment(cwd, environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """What the process prints, up to a line with this text."""
    assert process.stdout is not None
    read = ""
    for line in process.stdout:
        read += line
        if text in line:
            return read
    raise AssertionError(f"{text!r} did not come: {read}")


def stop(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Tell it to stop, and return its exit code and what it printed since."""
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=WAIT_S)
    return process.returncode, printed


def check_demo(printed: str, files: int | None) -> None:
    assert "Every file was indexed." in printed
    assert "otherwise: 0." in printed
    assert "killed (SIGKILL)" in printed
    assert re.search(r"broken_on_purpose\.py +│ +3 +│ SyntaxError", printed)
    on_disk, indexed = re.findall(r"([0-9a-f]{64})", printed)
    assert on_disk == indexed
    walked = re.search(r"walked once more: ([\d,]+) files", printed)
    assert walked is not None
    assert files is None or int(walked[1].replace(",", "")) == files


def test_demo_on_sqlite(tmp_path: Path) -> None:
    """The whole standard library, one of two workers killed: every file indexed, the broken one a dead letter."""
    check_demo(run("examples.demo", "--data", str(tmp_path), cwd=tmp_path), None)


def test_demo_on_s3(tmp_path: Path) -> None:
    """The same on SeaweedFS, with fewer files."""
    check_demo(run("examples.demo", "--s3", "--limit", "300", "--data", str(tmp_path), cwd=tmp_path), 301)


def _prove(tmp_path: Path, indexed: Indexed, *, pending: int = 0) -> list[str]:
    extra = Path(broken_file(tmp_path).path)
    return prove(indexed, [], QueueStats(pending=pending), killed=2, extra=extra, limit=3).problems


def test_proof_finds_what_is_wrong(tmp_path: Path) -> None:
    """A missing file, a wrong hash, a needless second time and a message left over: each is named."""
    indexed = Indexed()
    for source in source_files(3):
        indexed.add(1, source.name, hashlib.sha256(Path(source.path).read_bytes()).hexdigest(), 0, 0)
    assert _prove(tmp_path, indexed) == [
        "neither indexed nor a dead letter: broken_on_purpose.py",
        "the combined hashes differ",
    ]
    indexed.add(2, "broken_on_purpose.py", hashlib.sha256(b"def this is no Python:\n").hexdigest(), 0, 0)
    assert _prove(tmp_path, indexed) == []
    assert _prove(tmp_path, indexed, pending=1) == ["1 messages are left in the queue"]
    first = source_files(1)[0].name
    indexed.add(2, first, indexed.digests[first], 0, 0)
    assert _prove(tmp_path, indexed) == [], "the killed worker's copy and the survivor's"
    indexed.add(1, first, "0", 0, 0)
    assert _prove(tmp_path, indexed) == [
        f"indexed twice with different hashes: {first}",
        f"handled twice, and not because of the kill: {first}",
    ]


def test_worker_and_service(tmp_path: Path) -> None:
    """What the service takes is handled, its status known; both drain on SIGTERM and exit with 0 (or the signal)."""
    port, health_port = free_ports(2)
    base = f"http://127.0.0.1:{port}"
    with (
        started("examples.worker", cwd=tmp_path, HEALTH_PORT=str(health_port)) as worker,
        started("examples.service", cwd=tmp_path, PORT=str(port)) as service,
    ):
        read_until(worker, "waiting for messages")
        read_until(service, "Uvicorn running")
        email = json.dumps({"to": "a@example.com", "subject": "Hello"}).encode()
        sent = [_request(f"{base}/emails", email, {"idempotency-key": "one"})["message_id"] for _ in range(2)]
        assert sent[0] == sent[1], "the second is a repetition of the first"
        ends_at = time.monotonic() + WAIT_S
        while (status := _request(f"{base}/emails/{sent[0]}")["status"]) != "completed":
            assert time.monotonic() < ends_at, status
        assert _request(f"{base}/health")["ready"] is True
        assert _request(f"http://127.0.0.1:{health_port}/readyz") == {"status": "ready"}
        code, printed = stop(service)
        assert code in (0, -signal.SIGTERM), printed
        assert "clean: True" in printed
        code, by_worker = stop(worker)
        assert code == 0, by_worker
        assert "drained" in by_worker
        assert (printed + by_worker).count("sending 'Hello'") == 1


def _request(url: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> dict[str, Any]:
    with urllib.request.urlopen(urllib.request.Request(url, body, headers or {}), timeout=WAIT_S) as reply:
        answer: dict[str, Any] = json.load(reply)
    return answer


def test_flask_service(tmp_path: Path) -> None:
    """What the service on Flask takes is in the queue, once for one key; a worker handles it."""
    (port,) = free_ports(1)
    base = f"http://127.0.0.1:{port}"
    with started("examples.flask_service", cwd=tmp_path, PORT=str(port)) as service:
        read_until(service, "Running on")
        email = json.dumps({"to": "a@example.com", "subject": "Hello"}).encode()
        sent = [_request(f"{base}/emails", email, {"idempotency-key": "one"})["message_id"] for _ in range(2)]
        assert sent[0] == sent[1], "the second is a repetition of the first"
        assert _request(f"{base}/stats")["pending"] == 1
        with started("examples.worker", cwd=tmp_path) as worker:
            assert "sending 'Hello'" in read_until(worker, "sending")
            ends_at = time.monotonic() + WAIT_S
            while (status := _request(f"{base}/emails/{sent[0]}")["status"]) != "completed":
                assert time.monotonic() < ends_at, status
            stop(worker)
        code, printed = stop(service)
        assert code in (0, -signal.SIGTERM), printed


def test_scheduled(tmp_path: Path) -> None:
    """Both schedules are listed, and three ticks come, a second apart (or more, on a machine with other work)."""
    lines = run("examples.scheduled", cwd=tmp_path).splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["backup", "mail"]
    ticks = [datetime.fromisoformat(line.rpartition(" ")[2]) for line in lines[2:]]
    assert len(ticks) == 3
    assert all((later - first).total_seconds() in range(1, 10) for first, later in itertools.pairwise(ticks))


def test_protected(tmp_path: Path) -> None:
    """The service was away at first: few calls were made then. No order is paid twice, also when it is run again."""
    for url, paid in ((f"sqlite://{tmp_path}/queue.db", 10), (f"sqlite://{tmp_path}/queue.db", 0)):
        printed = run("examples.protected", cwd=tmp_path, S3QUEUE_URL=url)
        assert f"11 messages, paid {paid} times for {paid} orders" in printed
        assert printed.count("away") <= 5


def test_backlog_exporter(tmp_path: Path) -> None:
    """With no worker there, it says how much waits, to KEDA and to Prometheus, and ends on SIGTERM."""
    (port,) = free_ports(1)
    base = f"http://127.0.0.1:{port}"
    url = f"sqlite:{tmp_path}/queue.db"
    environment = {"S3QUEUE_URL": url, "S3QUEUE_METRICS_INTERVAL": "0.2", "PORT": str(port), "QUEUE_NAME": "jobs"}
    with started("examples.backlog_exporter", cwd=tmp_path, **environment) as exporter:
        read_until(exporter, "listening")

        async def enqueue() -> list[WorkerInfo]:
            async with S3Queue(url) as queue:
                await queue.enqueue_many(range(7), priority=5)
                await queue.enqueue_many(range(2), delay=3600)
                return await queue.workers()

        assert asyncio.run(enqueue()) == []
        ends_at = time.monotonic() + WAIT_S
        while (answer := _exported(f"{base}/backlog")) != {"waiting": 7, "held": 0, "unsettled": 7}:
            assert time.monotonic() < ends_at, answer
        with urllib.request.urlopen(f"{base}/metrics", timeout=WAIT_S) as reply:
            text = reply.read().decode()
        assert 's3queue_backlog_messages{priority="5",queue="jobs"} 7.0' in text
        assert 's3queue_backlog_messages{priority="0",queue="jobs"} 0.0' in text
        assert 's3queue_delayed_messages{queue="jobs"} 2.0' in text
        assert _request(f"{base}/readyz") == {"status": "ready"}
        code, printed = stop(exporter)
        assert code == 0, printed


def _exported(url: str) -> dict[str, Any]:
    """What the exporter answers; before it has counted, that is an error."""
    try:
        return _request(url)
    except urllib.error.HTTPError as error:
        with error:
            if error.code != 503:
                raise
            return {}


def test_delayed_and_priority(tmp_path: Path) -> None:
    """Higher priorities come first, then what waits, and delayed messages when they are due."""
    lines = run("examples.delayed_and_priority", cwd=tmp_path).splitlines()
    assert [line.split("  (")[0] for line in lines] == [
        "a password reset",
        "newsletter 1",
        "newsletter 2",
        "a report that can wait",
        "a reminder, one second later",
        "last: at a certain moment",
    ]


def test_dead_letter_redrive(tmp_path: Path) -> None:
    """Both ways to become a dead letter, and the way back; on a file it works a second time."""
    for url in ("memory://", f"sqlite://{tmp_path}/queue.db", f"sqlite://{tmp_path}/queue.db"):
        printed = run("examples.dead_letter_redrive", cwd=tmp_path, S3QUEUE_URL=url)
        assert "DKK: KeyError: 'DKK', after 3 attempts" in printed
        assert "euros: 'euros' is no currency, after 1 attempts" in printed
        *_, one, other, last = printed.splitlines()
        # The message is ready before redrive() returns, so a quick worker may be done by then.
        assert {one, other} == {"redriven: 1", "done in attempt 1: 7.46"}
        assert last == "purged: 1"


def test_lambda_style(tmp_path: Path) -> None:
    """All that is there is handled, then it ends."""
    assert "handled: 5" in run("examples.lambda_style", cwd=tmp_path)


def test_taskiq_app(tmp_path: Path) -> None:
    """With a worker of taskiq's beside it, tasks are run, early and late ones, and the one that fails is a dead letter."""
    environment = _environment(tmp_path, {"S3QUEUE_MAX_POLL_INTERVAL": "0.2"})
    command = [sys.executable, "-m", "taskiq", "worker", "examples.taskiq_app:broker", "--workers", "1"]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as worker:
        try:
            lines = run("examples.taskiq_app", cwd=tmp_path, S3QUEUE_MAX_POLL_INTERVAL="0.2").splitlines()
        finally:
            worker.terminate()
            printed, _ = worker.communicate(timeout=WAIT_S)
    assert lines == [
        "Hello, world",
        "Hello, you there, two seconds later",
        "failed: ZeroDivisionError('float division by zero')",
        "dead letter: divide, ZeroDivisionError: float division by zero, 2 attempts",
    ]
    assert printed.decode().count("greeting") == 2


def test_tests_of_handlers(tmp_path: Path) -> None:
    """The example's tests pass, as a user would run them, without a plugin for async tests."""
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    plugins = ("-p", "pytest_s3queue", "-p", "no:asyncio", "-p", "no:anyio", "-p", "no:cacheprovider")
    printed = run("pytest", "-q", "-c", "pytest.ini", *plugins, str(ROOT / "examples" / "test_signup.py"), cwd=tmp_path)
    assert re.search(r"^8 passed", printed, re.MULTILINE)


def test_cost(tmp_path: Path) -> None:
    """The README's two prices come out."""
    printed = run("examples.cost", cwd=tmp_path)
    prices = [float(price) for price in re.findall(r"a million of them: \$([\d.]+)", printed)]
    assert prices == [10.4, 0.041]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "**$10.40**" in readme
    assert "**$0.041**" in readme
