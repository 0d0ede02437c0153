"""Servers for the tests: each is started once, when the first test asks for it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from s3queue_async.storage.s3 import S3Storage
from s3queue_async.storage.s3_obstore import ObstoreStorage
from s3queue_async.testing import servers

BUCKET = "s3queue-tests"
READER = "reader-key"
"""An access key of the SeaweedFS server that may read and write, but not list."""


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell that starts the tests in the background has them ignore SIGINT, and so would the programs that they start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def seaweedfs() -> Iterator[servers.Server]:
    no_list = {
        "name": "no-list",
        "credentials": [{"accessKey": READER, "secretKey": servers.SECRET_KEY}],
        "actions": [f"Read:{BUCKET}", f"Write:{BUCKET}"],
    }
    with servers.seaweedfs([BUCKET], identities=[no_list]) as server:
        yield server


@pytest.fixture(scope="session")
def moto_server() -> Iterator[servers.Server]:
    with servers.moto([BUCKET]) as server:
        yield server


@pytest.fixture(scope="session")
def rclone_server() -> Iterator[servers.Server]:
    with servers.rclone([BUCKET]) as server:
        yield server


_prefixes = count()


def _make(kind: type[S3Storage], server: servers.Server) -> S3Storage:
    return kind(
        BUCKET,
        f"test-{next(_prefixes)}/a b",
        endpoint_url=server.endpoint_url,
        region=server.region,
        addressing="path",
        access_key_id=server.access_key_id,
        secret_access_key=server.secret_access_key,
    )


@pytest.fixture
def s3_storage() -> Callable[[servers.Server], S3Storage]:
    """Makes a storage on a server, under a prefix that no other test uses."""
    return lambda server: _make(S3Storage, server)


@pytest.fixture
def obstore_storage() -> Callable[[servers.Server], S3Storage]:
    """As ``s3_storage``, by obstore."""
    return lambda server: _make(ObstoreStorage, server)
