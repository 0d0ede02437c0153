"""Help, version, exit codes, and errors as people and as programs get them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
import pytest

from s3queue_async.cli.app import commands
from tests.integration.cli.harness import Shell

pytestmark = pytest.mark.integration

NAMES = sorted(commands())


def test_every_command_has_help(local: Shell) -> None:
    """The root lists every command; --version says which it is; an unknown one is named."""
    told = local.does("--help").out
    for name in NAMES:
        assert name.split()[0] in told
    assert "Exit codes: 0 done" in told
    assert local.does("--version").out.startswith("s3queue, version ")
    assert "No such command 'nope'" in local.ends("nope").err


@pytest.mark.parametrize("name", NAMES)
def test_help(local: Shell, name: str) -> None:
    """Each command says what it does, and that it takes --url and --json."""
    told = local.does(*name.split(), "--help").out
    assert told.startswith(f"Usage: s3queue {name}")
    if not isinstance(commands()[name], click.Group):
        for option in ("--url", "--json", "S3QUEUE_URL"):
            assert option in told


@pytest.mark.parametrize(
    ("url", "code", "said"),
    [
        ("", 2, "No queue was named: neither --url nor S3QUEUE_URL is set."),
        ("memory://x", 2, "a queue in memory ends with its process"),
        ("ftp://x", 2, "unknown scheme"),
        ("sqlite:///nowhere/at/all.db", 3, "There is no queue at sqlite:///nowhere/at/all.db."),
        ("s3://b/q?endpoint_url=http://127.0.0.1:9&addressing=path&region=x", 4, "got no reply"),
    ],
)
def test_errors(tmp_path: Path, url: str, code: int, said: str) -> None:
    """What is wrong, and what to do: as text, and as JSON on stderr with the exit code."""
    keys = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}
    ended = Shell(url, tmp_path, keys).ends("stats", "--json")
    assert ended.code == code
    assert ended.out == ""
    error = json.loads(ended.err)
    assert said in error["message"]
    assert error["exit_code"] == code
    assert list(tmp_path.iterdir()) == []


def test_wrong_setting(local: Shell) -> None:
    """A variable of the environment that is no setting is wrong usage."""
    shell = Shell(local.url, local.directory, {"S3QUEUE_POLL_INTERVALL": "1"})
    ended = shell.ends("config")
    assert ended.code == 2
    assert "Did you mean 'poll_interval'?" in ended.err


def test_closed_pipe(local: Shell) -> None:
    """A reader that has seen enough is no error."""
    local.does("enqueue", "-f", "-", "--format", "text", stdin="a line that is long enough to fill a pipe\n" * 5000)
    for name in ("export", "peek -n 5000"):
        command = f"{sys.executable} -m s3queue_async {name} | head -n 1; exit ${{PIPESTATUS[0]}}"
        ended = Shell(local.url, local.directory, local.more, ("bash", "-c")).ends(command)
        assert ended.code == 0
        assert "a line" in ended.out
        assert ended.err == ""


def test_bench(local: Shell) -> None:
    """It measures on a queue of its own, and leaves nothing."""
    local.does("enqueue", "x")
    found = local.does("bench", "--messages", "300", "--singles", "3", "--json").document
    assert found["messages"] == 300
    assert found["handled_per_second"] > 0
    assert found["requests"]["put"] > 0
    assert found["cost_per_million"] > 0
    stats = local.does("stats", "--json").document
    assert (stats["pending"], stats["completed"]) == (1, 0)
    assert "a million such messages" in local.does("bench", "--messages", "10", "--singles", "2").out
    report = local.does("doctor", "--json").document
    assert next(check for check in report["checks"] if check["name"] == "leftovers")["state"] == "ok"
