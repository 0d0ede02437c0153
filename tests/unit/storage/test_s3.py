"""Both S3 clients at their border: what is sent, how often, and what becomes of each kind of failure."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from importlib import metadata
from urllib.parse import parse_qsl, quote

import anyio
import pytest

from s3queue_async.errors import StoreUnavailable, StoreUnsupported, Throttled
from s3queue_async.storage.base import Conflict, IfAbsent, IfVersion, PreconditionFailed, Stored, Unmodified
from s3queue_async.storage.s3 import S3Storage
from s3queue_async.storage.s3_obstore import ObstoreStorage
from s3queue_async.testing import servers
from s3queue_async.testing.conformance import keys_of, put_all
from tests.conftest import BUCKET, READER
from tests.unit.storage.fake_s3 import (
    CUT,
    DATE,
    DATE_S,
    EMPTY_LIST,
    Client,
    error_reply,
    listening,
    make_storage,
    serving,
)

MakeS3 = Callable[[servers.Server], S3Storage]


@pytest.fixture(params=[S3Storage, ObstoreStorage])
def client(request: pytest.FixtureRequest) -> Client:
    """Both clients, which must not differ in anything that is tested here."""
    kind: Client = request.param
    return kind


async def test_a_put_is_sent_once_on_a_dead_connection(client: Client) -> None:
    """A kept connection that the server closed: aiohttp would send the PUT again, this storage must not."""
    async with serving(client) as (fake, storage):
        fake.replies += [None, (200, {"ETag": '"1"'}, b"")]
        with pytest.raises(StoreUnavailable, match="got no reply") as caught:
            await storage.put("k", b"body", when=IfAbsent())
        assert caught.value.retriable
        assert len(fake.requests) == 1
        assert (await storage.put("k", b"body", when=IfAbsent())).version == '"1"'


@pytest.mark.parametrize("status", [500, 503, 502, 429])
async def test_an_error_is_not_tried_again(client: Client, status: int) -> None:
    """Each call is one request, whatever the store answers."""
    async with serving(client) as (fake, storage):
        fake.replies += [error_reply(status, "InternalError"), (200, {"ETag": '"1"'}, b"")]
        with pytest.raises((StoreUnavailable, Throttled)):
            await storage.put("k", b"body")
        assert len(fake.requests) == 1


async def test_a_put_goes_out_whole(client: Client) -> None:
    """A PUT carries its condition and its body without asking for leave first, and no checksum trailer."""
    large = b"large" * 500_000
    async with serving(client) as (fake, storage):
        fake.replies += [(200, {"ETag": '"1"'}, b"")] * 2 + [(204, {}, b""), (200, {"ETag": '"1"'}, b"")]
        assert (await storage.put("a b", b"body", when=IfAbsent())).date_s == DATE_S
        await storage.put("a b", b"", when=IfVersion('"1"'))
        await storage.delete("a b", when=IfVersion('"2"'))
        await storage.put("large", large)
    (line, headers, body), (_, second, _), (third_line, third, _), (_, fourth, large_body) = fake.requests
    assert large_body == large
    assert "expect" not in fourth
    assert line.removesuffix(" HTTP/1.1").partition("?")[0] == "PUT /bucket/root/a%20b"
    assert body == b"body"
    assert headers["if-none-match"] == "*"
    assert "expect" not in headers
    assert "transfer-encoding" not in headers
    assert second["if-match"] == '"1"'
    assert third_line.startswith("DELETE ")
    assert third["if-match"] == '"2"'


async def test_the_store_is_told_who_asks(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request names this library, what it stands on, and the application, if AWS's setting gives it a name."""
    for application, name in ((None, ""), ("billing", "billing"), ("bill\nits: ä", "bill-its---")):
        if application is not None:
            monkeypatch.setenv("AWS_SDK_UA_APP_ID", application)
        async with serving(client) as (fake, storage):
            fake.replies += [(200, {"ETag": '"1"'}, b""), EMPTY_LIST, (200, {}, b"<DeleteResult/>")]
            await storage.put("k", b"body")
            await storage.list("")
            await storage.delete_many(["k"])
        for _, headers, _ in fake.requests:
            agent = headers["user-agent"]
            assert agent.startswith(f"s3queue-async/{metadata.version('s3queue-async')} aiobotocore/")
            assert agent.count("botocore/") == 2
            assert agent.partition(" app/")[2] == name


async def test_errors_carry_the_date(client: Client) -> None:
    """Refusals carry the store's time; 409 and an error under status 200 are told by their codes."""
    async with serving(client) as (fake, storage):
        fake.replies += [
            error_reply(412, "PreconditionFailed"),
            error_reply(409, "ConditionalRequestConflict"),
            error_reply(404, "NoSuchKey"),
            error_reply(200, "PreconditionFailed"),
            (304, {"ETag": '"1"'}, b""),
        ]
        with pytest.raises(PreconditionFailed) as refused:
            await storage.put("k", b"", when=IfAbsent())
        assert refused.value.date_s == DATE_S
        with pytest.raises(Conflict) as conflict:
            await storage.put("k", b"", when=IfAbsent())
        assert conflict.value.date_s == DATE_S
        with pytest.raises(PreconditionFailed):
            await storage.put("k", b"", when=IfVersion('"1"'))
        with pytest.raises(PreconditionFailed):
            await storage.put("k", b"", when=IfAbsent())
        assert await storage.get("k", unless='"1"') == Unmodified(DATE_S)


async def test_retry_after(client: Client) -> None:
    """What the store asks for is handed on; a date is not, as there is no wall clock."""
    async with serving(client) as (fake, storage):
        fake.replies += [
            error_reply(503, "SlowDown", **{"Retry-After": "3"}),
            error_reply(503, "SlowDown", **{"Retry-After": DATE}),
        ]
        for expected in (3.0, None):
            with pytest.raises(Throttled) as caught:
                await storage.get("k")
            assert caught.value.retry_after_s == expected


async def test_a_body_that_is_cut_off(client: Client) -> None:
    """A reply whose body breaks off is no reply, and the next request works."""
    async with serving(client) as (fake, storage):
        extra = {"ETag": '"1"', "Last-Modified": DATE}
        fake.replies += [(200, {**extra, "Content-Length": "100", CUT: ""}, b"half"), (200, extra, b"whole")]
        with pytest.raises(StoreUnavailable, match="got no reply"):
            await storage.get("k")
        found = await storage.get("k")
        assert isinstance(found, Stored)
        assert (found.body, found.modified_s) == (b"whole", DATE_S)


async def test_delete_many_falls_back(client: Client) -> None:
    """A store without DeleteObjects gets single deletes, also the next time; the first error is raised."""
    async with serving(client) as (fake, storage):
        fake.replies += [error_reply(501, "NotImplemented"), (204, {}, b""), (204, {}, b"")]
        assert (await storage.delete_many(["a", "b"])).date_s == DATE_S
        fake.replies += [(204, {}, b""), error_reply(403, "AccessDenied")]
        with pytest.raises(StoreUnavailable, match="Access denied to DeleteObject "):
            await storage.delete_many(["a", "b"])
    methods = [line.split()[0] for line, _, _ in fake.requests]
    assert methods == ["POST", "DELETE", "DELETE", "DELETE", "DELETE"]


async def test_delete_many_with_errors_inside(client: Client) -> None:
    """An error for one key inside a successful reply is raised; a missing key is none."""
    async with serving(client) as (fake, storage):
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


async def test_a_store_without_versions(client: Client) -> None:
    """A PUT that is answered without an ETag, or a condition that is not implemented: unsupported."""
    async with serving(client) as (fake, storage):
        fake.replies += [(200, {}, b""), error_reply(501, "NotImplemented")]
        with pytest.raises(StoreUnsupported, match="without an ETag"):
            await storage.put("k", b"")
        with pytest.raises(StoreUnsupported, match="does not implement conditional"):
            await storage.put("k", b"", when=IfAbsent())


async def test_nonsense_replies(client: Client) -> None:
    """Replies that are no S3 at all are failures of the store, not crashes."""
    async with serving(client) as (fake, storage):
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


async def test_cancelled_before_the_reply(client: Client) -> None:
    """A call that is cancelled while it waits for the reply leaves no connection behind, and the client usable."""
    async with serving(client) as (fake, storage):
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


async def test_unreachable(client: Client) -> None:
    """Nobody listens: retriable, and the endpoint is named."""
    (port,) = servers.free_ports(1)
    with pytest.raises(StoreUnavailable, match=f"got no reply.*127.0.0.1:{port}") as caught:
        await make_storage(client, f"http://127.0.0.1:{port}").open()
    assert caught.value.retriable


async def test_a_store_that_does_not_answer(client: Client) -> None:
    """A store that accepts connections and says nothing: retriable, after the read timeout."""
    with anyio.fail_after(20):
        async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener:
            port = listener.extra(anyio.abc.SocketAttribute.local_port)
            with pytest.raises(StoreUnavailable, match="imeout") as caught:
                await make_storage(client, f"http://127.0.0.1:{port}", read_timeout_s=0.2).open()
            assert caught.value.retriable


async def test_no_credentials(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """No credentials anywhere: not retriable, and it says where they would come from."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nowhere/config")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere/credentials")
    storage = client("bucket", endpoint_url="http://127.0.0.1:9", region="us-east-1")
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
async def test_what_cannot_work(client: Client, options: dict[str, str], message: str) -> None:
    """A bucket's name, a profile or an endpoint that cannot be: not retriable, and named."""
    storage = client(**{"region": "us-east-1", "access_key_id": "a", "secret_access_key": "b", **options})  # type: ignore[arg-type]
    with pytest.raises(StoreUnavailable, match=message) as caught:
        await storage.open()
    assert not caught.value.retriable


@pytest.mark.parametrize(
    ("options", "address"),
    [
        ({"endpoint_url": "http://store.test", "addressing": "virtual"}, "http://bucket.store.test/"),
        ({"endpoint_url": "http://store.test:81/api", "addressing": "path"}, "http://store.test:81/api/bucket"),
        ({"endpoint_url": "http://10.0.0.1", "addressing": "auto"}, "http://10.0.0.1/bucket"),
        ({"endpoint_url": None, "addressing": "auto", "region": "eu-west-1"}, "bucket.s3.eu-west-1.amazonaws.com:443"),
        ({"endpoint_url": None, "addressing": "path", "region": "eu-west-1"}, "s3.eu-west-1.amazonaws.com:443"),
    ],
)
async def test_addresses_and_proxies(
    client: Client, options: dict[str, str], address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request goes to the bucket's address, through the proxy that the environment names."""
    async with listening() as proxy:
        for name in ("HTTP_PROXY", "HTTPS_PROXY"):
            monkeypatch.delenv(name, raising=False)
            monkeypatch.setenv(name.lower(), proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        storage = make_storage(client, "", **options)
        refused = (407, {CUT: ""}, b"")
        if address.startswith("http:"):
            proxy.replies += [EMPTY_LIST, (200, {"ETag": '"1"'}, b""), refused]
            await storage.open()
            await storage.put("k", b"")
            with pytest.raises(StoreUnavailable):
                await storage.get("k")
            await storage.close()
            expected = [f"GET {address}?", f"PUT {address.rstrip('/')}/root/k", f"GET {address.rstrip('/')}/root/k"]
        else:
            proxy.replies += [refused]
            with pytest.raises(StoreUnavailable):
                await storage.open()
            expected = [f"CONNECT {address}"]
    lines = [line for line, _, _ in proxy.requests]
    assert len(lines) == len(expected)
    for line, beginning in zip(lines, expected, strict=True):
        assert line.startswith(beginning)


async def test_odd_keys_are_sent_as_they_are(client: Client) -> None:
    """Neither a slash nor a dot of a key is taken for a step in a path."""
    keys = ["a//b", "a/./b", "a/../b", "/a", "a/", "..", "tab\t", "a b+c%d", "é"]
    async with serving(client) as (fake, storage):
        fake.replies += [(204, {}, b"")] * len(keys)
        for key in keys:
            await storage.delete(key)
    lines = [line.removesuffix(" HTTP/1.1").partition("?")[0] for line, _, _ in fake.requests]
    assert lines == [f"DELETE /bucket/root/{quote(key)}" for key in keys]


@pytest.mark.parametrize("pretty", [False, True])
async def test_listings(client: Client, pretty: bool) -> None:
    """A listing is read with whatever else stores put into it: encoded keys, owners, white space."""
    entries = "".join(
        f"<Contents><Key>root%2Fa+%2B%C3%A9%26{n}</Key><LastModified>2025-01-01T00:00:07{zone}</LastModified>"
        f"<ETag>&quot;{n}&quot;</ETag><Size>{n}</Size><Owner><ID>someone</ID><DisplayName/></Owner></Contents>"
        for n, zone in enumerate(["Z", ".250Z", "+00:00"])
    )
    text = (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>bucket</Name><Prefix>root%2Fa</Prefix><KeyCount>3</KeyCount><EncodingType>url</EncodingType>{entries}"
        "<IsTruncated>true</IsTruncated><CommonPrefixes><Prefix>p</Prefix></CommonPrefixes></ListBucketResult>"
    )
    async with serving(client) as (fake, storage):
        fake.replies.append((200, {}, (text.replace("><", ">\n  <") if pretty else text).encode()))
        page = await storage.list("a", after="a", limit=3)
    (line, _, _) = fake.requests[0]
    assert page.more
    assert page.date_s == DATE_S
    assert [(entry.key, entry.version, entry.size) for entry in page.entries] == [
        (f"a +é&{n}", f'"{n}"', n) for n in range(3)
    ]
    assert [entry.modified_s for entry in page.entries] == [DATE_S, DATE_S + 0.25, DATE_S]
    query = dict(parse_qsl(line.removesuffix(" HTTP/1.1").partition("?")[2]))
    assert {name: query[name] for name in ("list-type", "prefix", "start-after", "max-keys")} == {
        "list-type": "2",
        "prefix": "root/a",
        "start-after": "root/a",
        "max-keys": "3",
    }


async def test_a_listing_with_a_prefix_for_its_namespace(client: Client) -> None:
    """Names of elements count without it."""
    text = (
        '<s3:ListBucketResult xmlns:s3="http://s3.amazonaws.com/doc/2006-03-01/"><s3:Contents><s3:Key>root/a</s3:Key>'
        "<s3:LastModified>2025-01-01T00:00:07Z</s3:LastModified><s3:ETag>&quot;1&quot;</s3:ETag><s3:Size>3</s3:Size>"
        "</s3:Contents></s3:ListBucketResult>"
    )
    async with serving(client) as (fake, storage):
        fake.replies.append((200, {}, text.encode()))
        page = await storage.list("")
    assert [(entry.key, entry.version, entry.size) for entry in page.entries] == [("a", '"1"', 3)]


async def test_a_listing_that_is_none(client: Client) -> None:
    """An error under status 200 is that error; whatever else is no listing is not taken for an empty one."""
    async with serving(client) as (fake, storage):
        fake.replies.append(error_reply(200, "SlowDown"))
        with pytest.raises(Throttled):
            await storage.list("a")
        for status, body in ((200, b"<html/>"), (200, b""), (206, b"<html/>")):
            fake.replies.append((status, {}, body))
            with pytest.raises(StoreUnavailable, match="no listing"):
                await storage.list("a")


async def test_must_be_open(client: Client) -> None:
    """Before open and after close every call says so; opening twice is fine."""
    async with serving(client) as (fake, storage):
        await storage.open()
        assert fake.requests == []
        await storage.close()
        with pytest.raises(StoreUnavailable, match="is not open"):
            await storage.get("k")


@pytest.mark.integration
async def test_missing_bucket(client: Client, seaweedfs: servers.Server, moto_server: servers.Server) -> None:
    """A bucket that does not exist is named when the storage is opened."""
    for server in (seaweedfs, moto_server):
        storage = client(
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
async def test_refused(
    client: Client, seaweedfs: servers.Server, access_key_id: str, secret_access_key: str, message: str
) -> None:
    """Unknown key, wrong secret, no right to list: each is told apart when the storage is opened."""
    storage = client(
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
    client: Client, seaweedfs: servers.Server, s3_storage: MakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without explicit credentials the AWS chain supplies them."""
    for name, value in seaweedfs.environment().items():
        monkeypatch.setenv(name, value)
    named = s3_storage(seaweedfs)
    storage = client(BUCKET, named.prefix, endpoint_url=seaweedfs.endpoint_url)
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
