"""Some hundred simulated clusters, and every safeguard's absence; ``make sim SEEDS=20000`` runs more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.integration


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A process of its own: the order in which a seed's sets are walked depends on the hash seed it starts with.
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.parametrize("first", [0, 100])
def test_simulated_clusters(first: int) -> None:
    """Faults of the store and of processes, drawn from each seed: nothing is lost, nothing runs twice without cause."""
    ended = run("--first", str(first), "--seeds", "100", "--jobs", "1")
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]


def test_a_seed_replays() -> None:
    """The same seed gives byte for byte the same trace."""
    first, second = run("--seed", "14"), run("--seed", "14")
    assert first.stdout.count("\n") > 100
    assert first.stdout == second.stdout


def test_every_safeguard_is_needed() -> None:
    """Without any one of them, the seed that the table in docs/testing.md names fails."""
    ended = run("--confirm", "--jobs", "1")
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
