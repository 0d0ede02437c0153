"""What a newcomer copies from the README works as it is printed; ``make newcomer`` begins with a clone and the demo."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.integration
def test_the_readme_works_as_printed() -> None:
    """The first program, a handler of one's own, its dead letter found and redriven by the command line."""
    ended = subprocess.run(
        [sys.executable, "-m", "tests.newcomer", "--only", "readme"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
