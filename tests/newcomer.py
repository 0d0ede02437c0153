"""A newcomer's path, timed: clone, ``make demo``, the README's first program, a handler of one's own, and the command line.

    python -m tests.newcomer [--only readme]

Everything is copied from the README as it is printed; what fails there fails here.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Failed(RuntimeError):
    """Raised when a step does not do what the README says."""


def readme(directory: Path) -> str:
    return (directory / "README.md").read_text(encoding="utf-8")


def block(text: str, language: str, *, after: str = "") -> str:
    """The first block of a language behind a heading or a text."""
    start = text.find(after)
    match = re.search(rf"^```{language}\n(.*?)^```$", text[start:], re.MULTILINE | re.DOTALL)
    if start < 0 or match is None:
        raise Failed(f"The README has no block of {language} after {after!r}.")
    return match[1]


def run(command: list[str], directory: Path, environment: dict[str, str], *, within_s: float = 600.0) -> str:
    ended = subprocess.run(
        command,
        cwd=directory,
        env=environment,
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )
    if ended.returncode != 0:
        raise Failed(f"{command} ended with {ended.returncode}:\n{ended.stdout[-3000:]}{ended.stderr[-3000:]}")
    return ended.stdout


def expect(output: str, *texts: str) -> None:
    for text in texts:
        if text not in output:
            raise Failed(f"{text!r} is not in the output:\n{output[-3000:]}")


def first_program(repository: Path, directory: Path, environment: dict[str, str]) -> None:
    """The README's first program says what it should."""
    (directory / "hello.py").write_text(block(readme(repository), "python"), encoding="utf-8")
    expect(run(["python", "hello.py"], directory, environment), "Hello", "from", "the", "queue")


def own_handler(repository: Path, directory: Path, environment: dict[str, str]) -> None:
    """A handler of one's own, its first dead letter found, and redriven."""
    text = readme(repository)
    (directory / "tasks.py").write_text(block(text, "python", after="## Operating it"), encoding="utf-8")
    commands = block(text, "sh", after="## Operating it")
    # The worker ends by its own drain after SIGINT, which `timeout` reports as 124.
    script = commands.replace("timeout -s INT", "timeout --preserve-status -s INT")
    output = run(["bash", "-euo", "pipefail", "-c", script], directory, environment)
    expect(output, "Hello -> a@example.com", "is no address", "1 redriven.", "permissions")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("readme",), help="leave out the clone and make demo")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="newcomer-") as name:
        directory = Path(name)
        repository = ROOT if chosen.only else directory / "s3queue_async"
        binaries = Path(sys.executable).parent if chosen.only else repository / ".venv" / "bin"
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("S3QUEUE_", "PYTHON"))}
        inside = {**plain, "COLUMNS": "160", "PATH": f"{binaries}{os.pathsep}{plain['PATH']}"}
        steps: list[tuple[str, Callable[[], object]]] = []
        if not chosen.only:
            steps += [
                ("clone", lambda: run(["git", "clone", "-q", str(ROOT), str(repository)], directory, plain)),
                ("make demo", lambda: expect(run(["make", "demo"], repository, plain), "Every file was indexed.")),
            ]
        steps += [
            ("first program of the README", lambda: first_program(repository, directory, inside)),
            ("own handler, dead letter found and redriven", lambda: own_handler(repository, directory, inside)),
        ]
        began = time.monotonic()
        for what, step in steps:
            since = time.monotonic()
            step()
            print(f"{time.monotonic() - since:6.1f} s  {what}")
        print(f"{time.monotonic() - began:6.1f} s  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
