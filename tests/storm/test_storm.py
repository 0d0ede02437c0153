"""A short storm; ``make storm`` runs one of five minutes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.integration
@pytest.mark.alone
def test_short_storm() -> None:
    """Killed, stopped, cut off and drained, three real workers lose nothing and repeat nothing without a cause."""
    ended = subprocess.run(
        [
            sys.executable, "-m", "tests.storm", "--seconds", "16", "--workers", "3", "--messages", "1500",
            "--visibility-timeout", "3",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )  # fmt: skip
    print(ended.stdout)
    assert ended.returncode == 0, ended.stdout[-8000:] + ended.stderr[-2000:]
