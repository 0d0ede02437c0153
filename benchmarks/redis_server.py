"""A Redis of its own on loopback, for the peers that live there."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator

from s3queue_async.testing.servers import free_ports

PROGRAM = "redis-server"
READY_WITHIN_S = 10.0
MISSING = f"{PROGRAM} is not installed; on Debian: apt-get install redis-server"


@contextlib.contextmanager
def redis() -> Iterator[str]:
    """Run it, in memory only, which is what it is fastest with; yields its url, or "" when it is not installed."""
    if shutil.which(PROGRAM) is None:
        yield ""
        return
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory(prefix="s3queue-redis-") as directory:
        command = [
            PROGRAM, "--port", str(port), "--bind", "127.0.0.1", "--dir", directory, "--save", "", "--appendonly", "no",
        ]  # fmt: skip
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
            try:
                _wait_until_ready(port, process)
                yield f"redis://127.0.0.1:{port}/0"
            finally:
                process.terminate()


def _wait_until_ready(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), 1):
                return
        except OSError:
            time.sleep(0.05)
    raise RuntimeError(f"{PROGRAM} did not listen on port {port} within {READY_WITHIN_S:g} s.")
