"""Runs ``s3queue`` as a process, and looks at what it printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "s3queue_async"]
SOON_S = 30.0


@dataclass(frozen=True)
class Ended:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[Any]:
        """Its JSON documents."""
        return [msgspec.json.decode(line) for line in self.out.splitlines()]

    @property
    def document(self) -> Any:
        """Its only JSON document."""
        (line,) = self.lines
        return line


@dataclass(frozen=True)
class Shell:
    """Where commands run.

    Attributes:
        url: What S3QUEUE_URL says; "" for none.
        directory: Their working directory.
        more: Further variables of the environment.
    """

    url: str
    directory: Path
    more: Mapping[str, str] = field(default_factory=dict)
    command: Sequence[str] = tuple(COMMAND)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("S3QUEUE_", "COV_", "AWS_"))}
        paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
        found = {**kept, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "200", **self.more}
        return {**found, "S3QUEUE_URL": self.url} if self.url else found

    def ends(self, *arguments: str, stdin: str | None = None, within_s: float = SOON_S) -> Ended:
        """Run a command to its end."""
        ended = subprocess.run(
            [*self.command, *arguments],
            env=self.environment,
            cwd=self.directory,
            input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def does(self, *arguments: str, stdin: str | None = None) -> Ended:
        """Run a command that must work."""
        ended = self.ends(*arguments, stdin=stdin)
        assert ended.code == 0, f"{arguments}: {ended.code}\n{ended.out}\n{ended.err}"
        assert "Traceback" not in ended.err, ended.err
        return ended

    @contextmanager
    def running(self, *arguments: str) -> Iterator[Running]:
        """Run a command beside the block; it is gone afterwards."""
        out, err = self.directory / f"{time.monotonic_ns()}.out", self.directory / f"{time.monotonic_ns()}.err"
        with out.open("wb") as output, err.open("wb") as errors:
            process = subprocess.Popen(
                [*self.command, *arguments],
                env=self.environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
            )
        with process:
            try:
                yield Running(process, out, err)
            finally:
                if process.poll() is None:
                    process.terminate()
                    try:
                        process.wait(SOON_S)
                    finally:
                        process.kill()


@dataclass(frozen=True)
class Running:
    """A command that runs."""

    process: subprocess.Popen[bytes]
    out_path: Path
    err_path: Path

    @property
    def out(self) -> str:
        return self.out_path.read_text(encoding="utf-8", errors="replace")

    @property
    def err(self) -> str:
        return self.err_path.read_text(encoding="utf-8", errors="replace")

    def until(self, what: str, condition: Callable[[], Any], *, within_s: float = SOON_S) -> None:
        """Return once the condition holds; fail when it does not in time."""
        deadline = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}\n{self.out}\n{self.err}"
            time.sleep(0.02)

    def says(self, text: str, times: int = 1) -> None:
        """Return once it has written this to stderr so many times."""
        self.until(f"says {text!r} {times} times", lambda: self.err.count(text) >= times)

    def ends(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and return the exit code."""
        self.process.send_signal(number)
        return self.process.wait(SOON_S)
