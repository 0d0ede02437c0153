"""s3queue work: processes, signals, reload, logs; each as a real process."""

from __future__ import annotations

import os
import signal
from typing import Any

import msgspec
import psutil
import pytest

from tests.integration.cli.harness import Running, Shell

pytestmark = pytest.mark.integration


def logged(worker: Running) -> list[dict[str, Any]]:
    return [msgspec.json.decode(line) for line in worker.err.splitlines()]


def test_logs_as_json(shell: Shell) -> None:
    """One line each for start, promotion, dead letter and stop, with queue and worker; a handler's own lines say which
    message and attempt they are about.
    """
    good = shell.does("enqueue", "x").out.strip()
    bad = shell.does("enqueue", '{"fail": "1"}', "--max-attempts", "2").out.strip()
    with shell.running("work", "tasks:send", "--log-format", "json") as worker:
        worker.says("dead letter")
        worker.says("promoted to coordinator")
        assert worker.ends() == 0
        lines = logged(worker)
    events = [line["event"] for line in lines]
    for event in ("worker started", "promoted to coordinator", "dead letter", "coordinator no more", "worker stopped"):
        assert events.count(event) == 1
        (line,) = [line for line in lines if line["event"] == event]
        assert line["level"] == "info"
        assert line["queue"] == shell.url.partition("?")[0]
        assert line["worker"]
    sent = [(line["message"], line["attempt"]) for line in lines if line["event"] == "sending"]
    assert sorted(sent) == sorted([(good, 1), (bad, 1), (bad, 2)])
    assert [(line["message"], line["attempt"]) for line in lines if line["event"] == "dead letter"] == [(bad, 2)]
    assert len({line["worker"] for line in lines if "worker" in line}) == 1


def test_quiet(local: Shell) -> None:
    """--log-level warning: nothing is said where all goes well; --json prints the report of the drain."""
    local.does("enqueue", '{"to": "a@x"}')
    with local.running("work", "tasks:typed", "--log-level", "warning", "--json") as worker:
        worker.until("handled", lambda: "to a@x" in worker.out)
        assert worker.ends(signal.SIGINT) == 0
        assert worker.err == ""
        assert msgspec.json.decode(worker.out.splitlines()[-1])["clean"] is True


def test_second_signal_cancels(local: Shell) -> None:
    """The first signal waits for a handler that runs, the second one cancels it and hands its message back."""
    local.does("enqueue", "x")
    with local.running("work", "tasks:slow") as worker:
        worker.until("begun", lambda: "begun" in worker.out)
        worker.process.send_signal(signal.SIGTERM)
        worker.says("draining")
        assert worker.process.poll() is None
        assert worker.ends() == 0
    assert local.does("stats", "--json").document["pending"] == 1


def test_processes(local: Shell) -> None:
    """Three processes work; one that is killed is started again; SIGTERM ends all of them well."""
    local.does("enqueue", "x")
    with local.running("work", "tasks:send", "--processes", "3") as parent:
        parent.says("worker started", 3)
        children = psutil.Process(parent.process.pid).children()
        assert len(children) == 3
        os.kill(children[0].pid, signal.SIGKILL)
        parent.says("starting it again")
        parent.says("worker started", 4)
        assert parent.ends() == 0
        assert parent.err.count("worker stopped") == 3
    assert [child for child in children if child.is_running()] == []


def test_no_process_outlives_the_parent(local: Shell) -> None:
    """A supervisor that is killed takes its processes with it: they drain."""
    local.does("enqueue", "x")
    with local.running("work", "tasks:send", "--processes", "2") as parent:
        parent.says("worker started", 2)
        children = psutil.Process(parent.process.pid).children()
        parent.process.kill()
        gone, alive = psutil.wait_procs(children, timeout=20)
        assert (len(gone), alive) == (2, [])
        assert parent.err.count("worker stopped") == 2


def test_reload(local: Shell) -> None:
    """A change of a Python file starts the worker anew, with the new code; a broken file waits for the next change."""
    local.does("enqueue", "x")
    tasks = local.directory / "tasks.py"
    before = tasks.read_text(encoding="utf-8")
    with local.running("work", "tasks:send", "--reload") as parent:
        parent.says("sending")
        tasks.write_text("broken(", encoding="utf-8")
        parent.says("SyntaxError")
        tasks.write_text(before.replace('info("sending"', 'info("sending anew"'), encoding="utf-8")
        parent.says("worker started", 2)
        local.does("enqueue", "y")
        parent.says("sending anew")
        assert parent.ends() == 0


@pytest.mark.parametrize(
    ("handler", "said"),
    [
        ("tasks", "Write module:handler"),
        ("tasks:missing", "'tasks' has no 'missing'. It has: Email"),
        ("nowhere:send", "There is no module 'nowhere'"),
        ("tasks:constant", "is a int, and no handler"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--processes", "2"]])
def test_no_such_handler(local: Shell, handler: str, said: str, more: list[str]) -> None:
    """What is wrong with the name is said, with what there is; exit code 2."""
    ended = local.ends("work", handler, *more)
    assert ended.code == 2
    assert said in " ".join(ended.err.split())
