"""A queue on each kind of store, and a shell whose S3QUEUE_URL names it."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from tests.conftest import BUCKET
from tests.integration.cli.harness import Shell

_prefixes = count()

QUICK = {"S3QUEUE_BACKOFF_BASE": "0.01", "S3QUEUE_HEARTBEAT_INTERVAL": "0.3", "S3QUEUE_VISIBILITY_TIMEOUT": "6"}

TASKS = '''
import asyncio

import msgspec
import structlog


class Email(msgspec.Struct):
    to: str


async def send(payload, context):
    """Fails for good where it is told to."""
    structlog.get_logger().info("sending", what=payload)
    if isinstance(payload, dict) and payload.get("fail"):
        raise ValueError(f"mail server refused {payload['fail']!r} at port 25")
    return "sent"


def typed(email: Email) -> None:
    print(f"to {email.to}", flush=True)


async def slow(payload):
    print("begun", flush=True)
    await asyncio.sleep(3600)


constant = 7
'''


@pytest.fixture(params=["sqlite", "seaweedfs"])
def shell(request: pytest.FixtureRequest, tmp_path: Path) -> Shell:
    """An empty directory with handlers in it, and a queue that is not there yet."""
    (tmp_path / "tasks.py").write_text(TASKS, encoding="utf-8")
    if request.param == "sqlite":
        return Shell(f"sqlite:///{tmp_path}/queue.db", tmp_path, QUICK)
    server = request.getfixturevalue("seaweedfs")
    return Shell(server.queue_url(BUCKET, f"cli-{next(_prefixes)}"), tmp_path, {**QUICK, **server.environment()})


@pytest.fixture
def local(tmp_path: Path) -> Shell:
    """The same on SQLite only, for what does not depend on the store."""
    (tmp_path / "tasks.py").write_text(TASKS, encoding="utf-8")
    return Shell(f"sqlite:///{tmp_path}/queue.db", tmp_path, QUICK)
