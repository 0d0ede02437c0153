"""Commands that look, each as a process: stats, peek, tail, show, workers, top, config, coordinator."""

from __future__ import annotations

import signal

import pytest

from tests.integration.cli.harness import Shell

pytestmark = pytest.mark.integration


def test_life_of_a_message(shell: Shell) -> None:
    """Enqueued, peeked at, shown, and handled by a worker: stats, workers and top tell the same at each step."""
    sent = shell.does("enqueue", '{"to": "a"}', "--priority", "7", "--header", "k=v", "--json").document
    message_id = sent["id"]
    later = shell.does("enqueue", "later", "--delay", "1h").out.strip()
    stats = shell.does("stats", "--exact", "--json").document
    assert (stats["pending"], stats["delayed"], stats["workers"]) == (1, 1, 0)
    first, second = shell.does("peek", "--json").lines
    assert (first["id"], first["payload"], first["priority"], first["state"]) == (message_id, {"to": "a"}, 7, "pending")
    assert (second["id"], second["state"]) == (later, "delayed")
    assert second["due_at"] > first["enqueued_at"]
    shown = shell.does("show", message_id).out
    for part in (message_id, "pending", "header k", '"to": "a"', "enqueued"):
        assert part in shown
    assert "nobody works" in shell.does("top").out
    with shell.running("work", "tasks:send") as worker:
        worker.says("sending")
        worker.says("promoted to coordinator")
        (seen,) = shell.does("workers", "--json").lines
        assert (seen["coordinator"], seen["capacity"], seen["alive"]) == (True, 10, True)
        board = shell.does("coordinator", "show", "--json").document
        assert (board["worker_id"], board["term"], board["state"]) == (seen["id"], 1, "leading")
        looks = shell.does("top", "--json", "-n", "2", "--interval", "400ms").lines
        assert len(looks) == 2
        assert looks[1]["stats"]["completed"] == 1
        assert looks[1]["workers"][0]["requests"]["put"] > 0
        assert looks[1]["own_cost_per_hour"] > 0
        assert worker.ends() == 0
    # Nothing is kept of completed messages, unless retain_completed says so.
    assert shell.ends("show", message_id).code == 3


def test_tables(local: Shell) -> None:
    """What is meant for people names the same: stats, workers, coordinator, top."""
    local.does("enqueue", "x", "--delay", "1h")
    assert local.does("workers").out == "No workers.\n"
    assert local.does("coordinator", "show").out == "There was no coordinator yet.\n"
    with local.running("work", "tasks:send") as worker:
        worker.says("promoted to coordinator")
        worker_id = local.does("workers", "--json").document["id"]
        for command in (["workers"], ["coordinator", "show"], ["top"]):
            assert worker_id in local.does(*command).out
        assert "delayed" in local.does("stats").out
        assert worker.ends() == 0


def test_retained_history(local: Shell) -> None:
    """With retain_completed, show says who completed a message, when, and what it returned."""
    shell = Shell(local.url, local.directory, {**local.more, "S3QUEUE_RETAIN_COMPLETED": "3600"})
    message_id = shell.does("enqueue", "x").out.strip()
    with shell.running("work", "tasks:send") as worker:
        worker.says("sending")
        assert worker.ends() == 0
    shown = shell.does("show", message_id, "--json").document
    assert (shown["state"], shown["result"], shown["attempts"]) == ("completed", "sent", 1)
    assert [event["what"].split()[0] for event in shown["history"]] == ["enqueued", "completed"]
    assert "Result: sent" in shell.does("show", message_id).out


def test_tail(shell: Shell) -> None:
    """tail shows what is enqueued by another process while it runs, however late, and ends after --limit."""
    shell.does("enqueue", "before")
    with shell.running("tail", "--json", "--interval", "100ms", "--limit", "3") as tail:
        # Whatever comes before its first look is not its business; so it is given something until it has seen enough.
        for number in range(50):
            shell.does("enqueue", f"message {number}", "--priority", str(number % 3))
            if tail.process.poll() is not None:
                break
        assert tail.process.wait(10) == 0
        assert "before" not in tail.out
        assert tail.out.count('"payload":"message') == 3


def test_tail_counts_what_it_does_not_show(local: Shell) -> None:
    """Of a burst, so many are shown and the others counted."""
    local.does("enqueue", "x")
    with local.running("tail", "--interval", "300ms", "--burst", "10") as tail:

        def burst_is_seen() -> bool:
            local.does("enqueue", "-f", "-", "--format", "text", stdin="line\n" * 500)
            return "more" in tail.out

        tail.until("a burst was seen", burst_is_seen)
        assert tail.ends(signal.SIGINT) == 130


def test_config(shell: Shell) -> None:
    """Every setting with where it comes from; it makes no queue."""
    found = shell.does("config", "--json").document
    assert not found["exists"]
    assert found["settings"]["heartbeat_interval"] == {"value": 0.3, "from": "S3QUEUE_HEARTBEAT_INTERVAL"}
    assert found["settings"]["max_attempts"] == {"value": 3, "from": "default"}
    shell.does("enqueue", "x")
    changed = Shell(
        shell.url, shell.directory, {**shell.more, "S3QUEUE_SEGMENT_AGE": "7", "S3QUEUE_CLAIM_LINGER": "20"}
    )
    found = changed.does("config", "--json").document
    assert found["exists"]
    # Both are fixed by the queue.
    assert found["settings"]["segment_age"] == {"value": 5.0, "from": "queue.json"}
    assert "visibility_timeout" in changed.does("config").out


def test_schedules(local: Shell) -> None:
    """Added, listed and removed by the command line; a worker enqueues the ticks."""
    assert local.ends("schedule", "add", "x").code == 2
    assert "is" in local.ends("schedule", "add", "x", "--cron", "61 * * * *").err
    added = local.does("schedule", "add", '{"fail": "tick"}', "--every", "1s", "--name", "quick", "--json").document
    assert (added["name"], added["every"], added["payload"]) == ("quick", 1.0, {"fail": "tick"})
    local.does("schedule", "add", "x", "--cron", "0 3 * * *", "--timezone", "Europe/Berlin", "--name", "daily")
    daily, quick = local.does("schedule", "list", "--json").lines
    assert (daily["name"], daily["cron"], daily["timezone"]) == ("daily", "0 3 * * *", "Europe/Berlin")
    assert "0 3 * * * (Europe/Berlin)" in local.does("schedule", "list").out
    assert quick["last_tick"] is None
    with local.running("work", "tasks:send") as worker:
        worker.says("sending")
        assert worker.ends() == 0
    assert local.ends("schedule", "remove", "quick").code == 7
    assert local.does("schedule", "remove", "quick", "--yes", "--json").document == {"removed": "quick"}
    assert local.ends("schedule", "remove", "quick", "--yes").code == 3


def test_step_down(shell: Shell) -> None:
    """Of two workers the other one leads afterwards; without a coordinator there is nothing to do."""
    shell.does("enqueue", "x")
    assert shell.ends("coordinator", "step-down", "--yes").code == 3
    quick = Shell(shell.url, shell.directory, {**shell.more, "S3QUEUE_ELECTION_INTERVAL": "2"})
    with quick.running("work", "tasks:send", "--log-format", "json") as one:
        one.says("promoted")
        with quick.running("work", "tasks:send") as two:
            two.says("worker started")
            before = quick.does("coordinator", "show", "--json").document
            assert quick.ends("coordinator", "step-down", "--json").code == 7
            after = quick.does("coordinator", "step-down", "--yes", "--json").document
            assert after["term"] == before["term"] + 1
            assert after["worker_id"] != before["worker_id"]
            two.says("promoted")
            one.says("coordinator no more")
            assert two.ends() == 0
        assert one.ends() == 0
