"""S3Storage at its border: what is sent, how often, and what becomes of each kind of failure."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
import pytest

from s3queue_async.errors import StoreUnavailable, StoreUnsupported, Throttled
from s3queue_async.storage.base import Conflict, IfAbsent, IfVersion, PreconditionFailed, Stored, Unmodified
from s3queue_async.storage.s3 import S3Storage
from s3queue_async.testing import servers
from s3queue_async.testing.conformance import keys_of, put_all
from tests.conftest import BUCKET, READER

MakeS3 = Callable[[servers.Server], S3Storage]

_DATE = "Wed, 01 Jan 2025 00:00:07 GMT"
_DATE_S = 1735689607.0
_CUT = "X-Closes-Afterwards"
_Reply = tuple[int, dict[str, str], bytes]
_EMPTY_LIST: _Reply = (200, {}, b"<ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>")


def _error(status: int, code: str, **headers: str) -> _Reply:
    return status, headers, f"<Error><Code>{code}</Code><Message>it says</Message></Error>".encode()


class _FakeServer:
    """An HTTP server that answers from a list; None closes the connection instead of answering."""

    def __init__(self) -> None:
        self.replies: list[_Reply | None] = []
        self.requests: list[tuple[str, dict[str, str], bytes]] = []
        self.received = asyncio.Event()
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append((head[0], headers, body))
        self.received.set()
        reply = self.replies.pop(0)
        if reply is None:
            return False
        status, extra, content = reply
        lines = {"Date": _DATE, "Content-Length": str(len(content)), **extra}
        writer.write(f"HTTP/1.1 {status} X\r\n".encode())
        writer.write("".join(f"{name}: {value}\r\n" for name, value in lines.items()).encode() + b"\r\n" + content)
        await writer.drain()
        return _CUT not in extra


@asynccontextmanager
async def _serving() -> AsyncIterator[tuple[_FakeServer, S3Storage]]:
    fake = _FakeServer()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    storage = _storage(fake.url)
    fake.replies.append(_EMPTY_LIST)
    await storage.open()
    fake.requests.clear()
    try:
        yield fake, storage
    finally:
        await storage.close()
        server.close()
        await server.wait_closed()


def _storage(url: str, **options: float) -> S3Storage:
    return S3Storage(
        "bucket",
        "root",
        endpoint_url=url,
        region="us-east-1",
        addressing="path",
        access_key_id="key",
        secret_access_key="secret",
        **options,  # type: ignore[arg-type]
    )


async def test_a_put_is_sent_once_on_a_dead_connection() -> None:
    """A kept connection that the server closed: aiohttp would send the PUT again, this storage must not."""
    async with _serving() as (fake, storage):
        fake.replies += [None, (200, {"ETag": '"1"'}, b"")]
        with pytest.raises(StoreUnavailable, match="got no reply") as caught:
            await storage.put("k", b"body", when=IfAbsent())
        assert caught.value.retriable
        assert len(fake.requests) == 1
        assert (await storage.put("k", b"body", when=IfAbsent())).version == '"1"'


@pytest.mark.parametrize("status", [500, 503, 502, 429])
async def test_an_error_is_not_tried_again(status: int) -> None:
    """Each call is one request, whatever the store answers."""
    async with _serving() as (fake, storage):
        fake.replies += [_error(status, "InternalError"), (200, {"ETag": '"1"'}, b"")]
        with pytest.raises((StoreUnavailable, Throttled)):
            await storage.put("k", b"body")
        assert len(fake.requests) == 1


async def test_a_put_goes_out_whole() -> None:
    """A PUT carries its condition and its body without asking for leave first, and no checksum trailer."""
    large = b"large" * 500_000
    async with _serving() as (fake, storage):
        fake.replies += [(200, {"ETag": '"1"'}, b"")] * 2 + [(204, {}, b""), (200, {"ETag": '"1"'}, b"")]
        assert (await storage.put("a b", b"body", when=IfAbsent())).date_s == _DATE_S
        await storage.put("a b", b"", when=IfVersion('"1"'))
        await storage.delete("a b", when=IfVersion('"2"'))
        await storage.put("large", large)
    (line, headers, body), (_, second, _), (third_line, third, _), (_, fourth, large_body) = fake.requests
    assert large_body == large
    assert "expect" not in fourth
    assert line == "PUT /bucket/root/a%20b HTTP/1.1"
    assert body == b"body"
    assert headers["if-none-match"] == "*"
    assert "expect" not in headers
    assert "transfer-encoding" not in headers
    assert second["if-match"] == '"1"'
    assert third_line.startswith("DELETE ")
    assert third["if-match"] == '"2"'


async def test_errors_carry_the_date() -> None:
    """Refusals carry the store's time; 409 and an error under status 200 are told by their codes."""
    async with _serving() as (fake, storage):
        fake.replies += [
            _error(412, "PreconditionFailed"),
            _error(409, "ConditionalRequestConflict"),
            _error(404, "NoSuchKey"),
            _error(200, "PreconditionFailed"),
            (304, {"ETag": '"1"'}, b""),
        ]
        with pytest.raises(PreconditionFailed) as refused:
            await storage.put("k", b"", when=IfAbsent())
        assert refused.value.date_s == _DATE_S
        with pytest.raises(Conflict) as conflict:
            await storage.put("k", b"", when=IfAbsent())
        assert conflict.value.date_s == _DATE_S
        with pytest.raises(PreconditionFailed):
            await storage.put("k", b"", when=IfVersion('"1"'))
        with pytest.raises(PreconditionFailed):
            await storage.put("k", b"", when=IfAbsent())
        assert await storage.get("k", unless='"1"') == Unmodified(_DATE_S)


async def test_retry_after() -> None:
    """What the store asks for is handed on; a date is not, as there is no wall clock."""
    async with _serving() as (fake, storage):
        fake.replies += [
            _error(503, "SlowDown", **{"Retry-After": "3"}),
            _error(503, "SlowDown", **{"Retry-After": _DATE}),
        ]
        for expected in (3.0, None):
            with pytest.raises(Throttled) as caught:
                await storage.get("k")
            assert caught.value.retry_after_s == expected


async def test_a_body_that_is_cut_off() -> None:
    """A reply whose body breaks off is no reply, and the next request works."""
    async with _serving() as (fake, storage):
        extra = {"ETag": '"1"', "Last-Modified": _DATE}
        fake.replies += [(200, {**extra, "Content-Length": "100", _CUT: ""}, b"half"), (200, extra, b"whole")]
        with pytest.raises(StoreUnavailable, match="got no reply"):
            await storage.get("k")
        found = await storage.get("k")
        assert isinstance(found, Stored)
        assert (found.body, found.modified_s) == (b"whole", _DATE_S)


async def test_delete_many_falls_back() -> None:
    """A store without DeleteObjects gets single deletes, also the next time; the first error is raised."""
    async with _serving() as (fake, storage):
        fake.replies += [_error(501, "NotImplemented"), (204, {}, b""), (204, {}, b"")]
        assert (await storage.delete_many(["a", "b"])).date_s == _DATE_S
        fake.replies += [(204, {}, b""), _error(403, "AccessDenied")]
        with pytest.raises(StoreUnavailable, match="Access denied to DeleteObject "):
            await storage.delete_many(["a", "b"])
    methods = [line.split()[0] for line, _, _ in fake.requests]
    assert methods == ["POST", "DELETE", "DELETE", "DELETE", "DELETE"]


async def test_delete_many_with_errors_inside() -> None:
    """An error for one key inside a successful reply is raised; a missing key is none."""
    async with _serving() as (fake, storage):
        missing = "<Error><Key>root/a</Key><Code>NoSuchKey</Code><Message/></Error>"
        denied = "<Error><Key>root/b</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
        slow = "<Error><Key>root/b</Key><Code>SlowDown</Code><Message>no</Message></Error>"
        for errors in (missing, missing + denied, slow):
            fake.replies.append((200, {}, f"<DeleteResult>{errors}</DeleteResult>".encode()))
        await storage.delete_many(["a", "b"])
        with pytest.raises(StoreUnavailable, match="root/b"):
            await storage.delete_many(["a", "b"])
        with pytest.raises(Throttled):
            await storage.delete_many(["a", "b"])
    assert any(name.startswith("x-amz-checksum") or name == "content-md5" for name in fake.requests[0][1])


async def test_a_store_without_versions() -> None:
    """A PUT that is answered without an ETag, or a condition that is not implemented: unsupported."""
    async with _serving() as (fake, storage):
        fake.replies += [(200, {}, b""), _error(501, "NotImplemented")]
        with pytest.raises(StoreUnsupported, match="without an ETag"):
            await storage.put("k", b"")
        with pytest.raises(StoreUnsupported, match="does not implement conditional"):
            await storage.put("k", b"", when=IfAbsent())


async def test_nonsense_replies() -> None:
    """Replies that are no S3 at all are failures of the store, not crashes."""
    async with _serving() as (fake, storage):
        fake.replies += [
            (200, {}, b"<html>not xml"),
            (200, {}, b"<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"),
            (502, {}, b"Bad Gateway"),
        ]
        with pytest.raises(StoreUnavailable) as caught:
            await storage.list("")
        assert caught.value.retriable
        with pytest.raises(StoreUnavailable, match="empty page"):
            await storage.list("")
        with pytest.raises(StoreUnavailable) as caught:
            await storage.get("k")
        assert caught.value.retriable


async def test_cancelled_before_the_reply() -> None:
    """A call that is cancelled while it waits for the reply leaves no connection behind, and the client usable."""
    async with _serving() as (fake, storage):
        hang = asyncio.Event()
        original = fake._serve_one

        async def hanging(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
            head = await reader.readuntil(b"\r\n\r\n")
            assert head
            fake.received.set()
            await hang.wait()
            return False

        fake._serve_one = hanging  # type: ignore[method-assign]
        fake.received.clear()
        # The fake still reads on the connection of open() with the original method, so make it close that one.
        fake.replies.append(None)
        with pytest.raises(StoreUnavailable):
            await storage.get("k")
        fake.received.clear()
        task = asyncio.ensure_future(storage.put("k", b"body"))
        await fake.received.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        hang.set()
        fake._serve_one = original  # type: ignore[method-assign]
        fake.replies.append((200, {"ETag": '"1"'}, b""))
        assert (await storage.put("k", b"body")).version == '"1"'
    del task
    gc.collect()


async def test_unreachable() -> None:
    """Nobody listens: retriable, and the endpoint is named."""
    (port,) = servers.free_ports(1)
    with pytest.raises(StoreUnavailable, match=f"got no reply.*127.0.0.1:{port}") as caught:
        await _storage(f"http://127.0.0.1:{port}").open()
    assert caught.value.retriable


async def test_a_store_that_does_not_answer() -> None:
    """A store that accepts connections and says nothing: retriable, after the read timeout."""
    with anyio.fail_after(20):
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            with pytest.raises(StoreUnavailable, match="imeout") as caught:
                await _storage(f"http://127.0.0.1:{port}", read_timeout_s=0.2).open()
            assert caught.value.retriable


async def test_no_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials anywhere: not retriable, and it says where they would come from."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere/config")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere/credentials")
    storage = S3Storage("bucket", endpoint_url="http://127.0.0.1:9", region="us-east-1")
    with pytest.raises(StoreUnavailable, match=r"no usable AWS credentials.*AWS_ACCESS_KEY_ID") as caught:
        await storage.open()
    assert not caught.value.retriable
    await storage.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket": "Not A Bucket"}, "Invalid bucket name"),
        ({"bucket": "bucket", "profile": "no-such-profile"}, "no-such-profile"),
        ({"bucket": "bucket", "endpoint_url": "127.0.0.1:9"}, "Invalid endpoint"),
    ],
)
async def test_what_cannot_work(options: dict[str, str], message: str) -> None:
    """A bucket's name, a profile or an endpoint that cannot be: not retriable, and named."""
    storage = S3Storage(**{"region": "us-east-1", "access_key_id": "a", "secret_access_key": "b", **options})  # type: ignore[arg-type]
    with pytest.raises(StoreUnavailable, match=message) as caught:
        await storage.open()
    assert not caught.value.retriable


async def test_must_be_open() -> None:
    """Before open and after close every call says so; opening twice is fine."""
    async with _serving() as (fake, storage):
        await storage.open()
        assert fake.requests == []
        await storage.close()
        with pytest.raises(StoreUnavailable, match="is not open"):
            await storage.get("k")


@pytest.mark.integration
async def test_missing_bucket(seaweedfs: servers.Server, moto_server: servers.Server) -> None:
    """A bucket that does not exist is named when the storage is opened."""
    for server in (seaweedfs, moto_server):
        storage = S3Storage(
            "no-such-bucket",
            endpoint_url=server.endpoint_url,
            region=server.region,
            access_key_id=server.access_key_id,
            secret_access_key=server.secret_access_key,
        )
        with pytest.raises(StoreUnavailable, match="bucket 'no-such-bucket' does not exist") as caught:
            await storage.open()
        assert not caught.value.retriable


@pytest.mark.integration
@pytest.mark.parametrize(
    ("access_key_id", "secret_access_key", "message"),
    [
        ("nobody", "secret", "refused the credentials.*InvalidAccessKeyId"),
        (servers.ACCESS_KEY, "wrong", "refused the credentials.*SignatureDoesNotMatch"),
        (READER, servers.SECRET_KEY, r"Access denied to ListObjectsV2 on bucket .*s3:ListBucket"),
    ],
)
async def test_refused(seaweedfs: servers.Server, access_key_id: str, secret_access_key: str, message: str) -> None:
    """Unknown key, wrong secret, no right to list: each is told apart when the storage is opened."""
    storage = S3Storage(
        BUCKET,
        endpoint_url=seaweedfs.endpoint_url,
        region=seaweedfs.region,
        access_key_id=access_key_id,
        secret_access_key=secret_access_key,
    )
    with pytest.raises(StoreUnavailable, match=message) as caught:
        await storage.open()
    assert not caught.value.retriable


@pytest.mark.integration
async def test_credentials_from_the_environment(
    seaweedfs: servers.Server, s3_storage: MakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without explicit credentials the AWS chain supplies them."""
    for name, value in seaweedfs.environment().items():
        monkeypatch.setenv(name, value)
    named = s3_storage(seaweedfs)
    storage = S3Storage(BUCKET, named.prefix, endpoint_url=seaweedfs.endpoint_url)
    await storage.open()
    await put_all(storage, ["a", "b"])
    assert await keys_of(storage) == ["a", "b"]
    await storage.close()


@pytest.mark.integration
async def test_two_prefixes(seaweedfs: servers.Server, s3_storage: MakeS3) -> None:
    """Two prefixes in one bucket do not see each other, also when one begins like the other."""
    one = s3_storage(seaweedfs)
    two = _storage_like(one, seaweedfs, one.prefix + "2")
    await one.open()
    await two.open()
    await one.put("k", b"1")
    await two.put("k2", b"2")
    assert await keys_of(one) == ["k"]
    assert await keys_of(two) == ["k2"]
    await one.close()
    await two.close()


def _storage_like(storage: S3Storage, server: servers.Server, prefix: str) -> S3Storage:
    return S3Storage(
        storage.bucket,
        prefix,
        endpoint_url=server.endpoint_url,
        region=server.region,
        access_key_id=server.access_key_id,
        secret_access_key=server.secret_access_key,
    )
