"""The benchmarks run, in small: each part that takes seconds gives figures, tables and plots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contenders.base import Place
from benchmarks.contenders.registry import Failed, entries
from benchmarks.throughput import place
from s3queue_async.testing.servers import Server
from tests.conftest import BUCKET

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.integration


def test_a_small_run(tmp_path: Path) -> None:
    """A run of some parts prints their tables and each promise, writes figures and plots, and names what it left out."""
    command = [
        sys.executable, "-m", "benchmarks.bench", "--scale", "0.01", "--rounds", "1", "--into", str(tmp_path / "out"),
        "--only", "bare,peers,cost,concurrency",
    ]  # fmt: skip
    environment = {**os.environ, "BENCH_PEERS": str(tmp_path / "nothing is installed here")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    for expected in ("Beside the bare loop", "Requests and money", "was not run", "pawn-queue", "not installed"):
        assert expected in done.stdout
    figures = json.loads((tmp_path / "out" / "performance.json").read_text(encoding="utf-8"))
    assert list(figures["parts"]) == ["bare", "peers", "cost", "concurrency"]
    ours = [row for row in figures["parts"]["peers"]["rows"] if row["ours"]]
    assert ours
    assert all((row["lost"], row["duplicated"]) == (0, 0) and row["process_rate"] > 0 for row in ours)
    assert {"pawn-queue", "s3db.js S3QueuePlugin", "jqueue", "SAQ", "taskiq, stream"} <= figures["skipped"].keys()
    assert (tmp_path / "out" / "performance-cost.png").read_bytes().startswith(b"\x89PNG")


def test_an_unknown_part_is_refused() -> None:
    """A part that does not exist is named, together with those that do."""
    command = [sys.executable, "-m", "benchmarks.bench", "--only", "speed"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "no part speed" in done.stderr
    assert "latency" in done.stderr


def test_a_contender_that_fails_says_why(seaweedfs: Server) -> None:
    """A contender whose store does not have the bucket ends as a failure with its last words, not as a figure."""
    ours = entries(["s3"])[0]
    where: Place = place(seaweedfs, "nowhere", bucket=f"{BUCKET}-that-is-not-there")
    with pytest.raises(Failed, match=r"ended with 1; its last words: .*NoSuchBucket|that-is-not-there"):
        ours.run("drain", 10, where)
