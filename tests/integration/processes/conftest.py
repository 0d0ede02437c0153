"""A queue's place on each store that several processes can share."""

from __future__ import annotations

from itertools import count
from pathlib import Path

import pytest

from tests.conftest import BUCKET
from tests.integration.processes.harness import Place

_prefixes = count()


@pytest.fixture(params=["sqlite", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """An empty queue in a SQLite file, and one on SeaweedFS; this process has the credentials, too."""
    if request.param == "sqlite":
        return Place("sqlite", f"sqlite://{tmp_path / 'queue.db'}", tmp_path)
    server = request.getfixturevalue("seaweedfs")
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    return Place("s3", server.queue_url(BUCKET, f"processes-{next(_prefixes)}"), tmp_path, server)
