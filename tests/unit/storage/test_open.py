"""Urls: what each means, and what a wrong one says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from s3queue_async.errors import InvalidURL
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.storage.open import storage_from_url
from s3queue_async.storage.s3 import S3Storage
from s3queue_async.storage.s3_obstore import ObstoreStorage
from s3queue_async.storage.sqlite import SqliteStorage


@pytest.mark.parametrize(
    ("url", "path", "name"),
    [
        ("sqlite:///path/queue.db", "/path/queue.db", "default"),
        ("sqlite:////path/queue.db", "/path/queue.db", "default"),
        ("sqlite://queue.db", "queue.db", "default"),
        ("sqlite://./dir/queue.db", "dir/queue.db", "default"),
        ("sqlite:queue.db", "queue.db", "default"),
        ("sqlite:./dir/queue.db", "dir/queue.db", "default"),
        ("sqlite:/path/queue.db", "/path/queue.db", "default"),
        ("SQLite:///a%20b%3F/q.db?name=emails&synchronous=full&busy_timeout=2.5", "/a b?/q.db", "emails"),
    ],
)
def test_sqlite(url: str, path: str, name: str) -> None:
    """Three slashes begin an absolute path; fewer name a file relative to the working directory."""
    storage = storage_from_url(url)
    assert isinstance(storage, SqliteStorage)
    assert (storage.path, storage.name) == (Path(path), name)


def test_sqlite_options() -> None:
    """The parameters reach the storage."""
    storage = storage_from_url("sqlite:q.db?synchronous=full&busy_timeout=2.5")
    assert isinstance(storage, SqliteStorage)
    assert (storage._synchronous, storage._busy_timeout_s) == ("FULL", 2.5)


def test_s3() -> None:
    """Bucket, prefix and parameters reach the storage."""
    storage = storage_from_url(
        "s3://my-bucket/prod/e%20mails/?endpoint_url=http://localhost:9000/&region=eu-west-1&addressing=PATH"
        "&max_connections=5&connect_timeout=1&read_timeout=2.5&verify=false&profile=p"
    )
    assert isinstance(storage, S3Storage)
    assert (storage.bucket, storage.prefix, storage.endpoint_url) == (
        "my-bucket",
        "prod/e mails",
        "http://localhost:9000/",
    )
    assert storage._client_args["region_name"] == "eu-west-1"
    assert storage._client_args["verify"] is False
    assert storage._config_args == {
        "s3": {"addressing_style": "path"},
        "max_pool_connections": 5,
        "connect_timeout": 1.0,
        "read_timeout": 2.5,
    }


@pytest.mark.parametrize("url", ["s3://bucket", "s3://bucket/"])
def test_s3_without_a_prefix(url: str) -> None:
    """A whole bucket may be a queue."""
    storage = storage_from_url(url)
    assert isinstance(storage, S3Storage)
    assert (storage.bucket, storage.prefix) == ("bucket", "")


def test_s3_by_obstore() -> None:
    """It takes the parameters of s3: urls, every one of them."""
    rest = (
        "://b/p?endpoint_url=http://h&region=r&addressing=path&max_connections=5&connect_timeout=1&read_timeout=2"
        "&verify=false&profile=p"
    )
    storage, other = storage_from_url(f"s3+obstore{rest}"), storage_from_url(f"s3{rest}")
    assert isinstance(storage, ObstoreStorage)
    assert isinstance(other, S3Storage)
    assert (storage.bucket, storage.prefix, storage.endpoint_url) == ("b", "p", "http://h")
    assert (storage._client_args, storage._config_args) == (other._client_args, other._config_args)
    assert repr(storage) == "<ObstoreStorage s3+obstore://b/p at http://h>"


def test_without_obstore(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the url says what to install; s3: works as before."""
    monkeypatch.delitem(sys.modules, "s3queue_async.storage.s3_obstore")
    monkeypatch.setitem(sys.modules, "obstore", None)
    with pytest.raises(InvalidURL, match=r"pip install 's3queue-async\[obstore\]'.*s3://"):
        storage_from_url("s3+obstore://bucket")
    assert isinstance(storage_from_url("s3://bucket"), S3Storage)


def test_memory() -> None:
    """A name is shared; none makes a storage of its own."""
    storage, other = storage_from_url("memory://name"), storage_from_url("memory://")
    assert isinstance(storage, MemoryStorage)
    assert isinstance(other, MemoryStorage)
    assert (storage.name, other.name) == ("name", None)
    MemoryStorage.forget("name")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "unknown scheme ''; it must be one of s3:, s3+obstore:, sqlite:, memory:"),
        ("bucket/prefix", "unknown scheme 'bucket/prefix'"),
        ("redis://host", "unknown scheme 'redis'"),
        ("s3:///prefix", "bucket is missing; write s3://bucket/prefix"),
        ("s3:bucket", "bucket is missing"),
        ("s3+obstore:///prefix", "bucket is missing; write s3+obstore://bucket/prefix"),
        ("s3+obstore://bucket/p?regoin=x", "unknown parameter 'regoin'; it must be one of endpoint_url, region"),
        ("s3://?region=x", "bucket is missing"),
        ("s3://bucket/p?regoin=x", "unknown parameter 'regoin'; it must be one of endpoint_url, region"),
        ("s3://bucket/p?region=", "region='' must be a text of one character or more"),
        ("s3://bucket/p?region=a&region=b", "'region' is there twice"),
        ("s3://bucket/p?endpoint_url=localhost:9000", "endpoint_url='localhost:9000' must begin with http"),
        ("s3://bucket/p?addressing=paths", "addressing='paths' must be one of auto, path, virtual"),
        ("s3://bucket/p?max_connections=0", "max_connections='0' must be a whole number from 1 to 10000"),
        ("s3://bucket/p?read_timeout=soon", "read_timeout='soon' must be a number of seconds"),
        ("s3://bucket/p?read_timeout=nan", "read_timeout='nan' must be a number of seconds"),
        ("s3://bucket/p#x", "'#' begins a fragment"),
        ("sqlite://", "file is missing"),
        ("sqlite:///dir/", "file is missing"),
        ("sqlite:q.db?names=x", "unknown parameter 'names'; it must be one of name, synchronous, busy_timeout"),
        ("sqlite:q.db?synchronous=off", "synchronous='off' must be one of normal, full"),
        ("memory://x?name=y", "unknown parameter 'name'; this scheme has none"),
    ],
)
def test_wrong_urls(url: str, message: str) -> None:
    """A wrong url says what is wrong, and what could be there."""
    with pytest.raises(InvalidURL) as caught:
        storage_from_url(url)
    assert message in str(caught.value)
    assert not caught.value.retriable


def test_secrets_are_not_shown() -> None:
    """Credentials in a url are refused, and do not reach the message."""
    with pytest.raises(InvalidURL, match="credentials do not belong") as caught:
        storage_from_url("s3://KEY:SECRET@bucket/prefix")
    assert "SECRET" not in str(caught.value)
