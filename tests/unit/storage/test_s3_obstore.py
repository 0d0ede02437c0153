"""What is ObstoreStorage's own: signatures in urls, and whose they are."""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from s3queue_async.errors import StoreUnavailable
from s3queue_async.storage.base import IfAbsent
from s3queue_async.storage.s3_obstore import ObstoreStorage
from tests.unit.storage.fake_s3 import CUT, FakeServer, Reply, error_reply, serving

_WRITTEN: Reply = (200, {"ETag": '"1"'}, b"")


def _queries(fake: FakeServer) -> list[dict[str, str]]:
    return [dict(parse_qsl(line.removesuffix(" HTTP/1.1").partition("?")[2])) for line, _, _ in fake.requests]


async def test_signed_in_the_url() -> None:
    """A request carries its signature in the url, for 15 minutes, and the token of temporary credentials."""
    async with serving(ObstoreStorage, session_token="to/ken+") as (fake, storage):
        fake.replies.append(_WRITTEN)
        await storage.put("k", b"body", when=IfAbsent())
    (query,) = _queries(fake)
    (_, headers, _) = fake.requests[0]
    assert query["X-Amz-Expires"] == "900"
    assert query["X-Amz-Security-Token"] == "to/ken+"
    assert query["X-Amz-Credential"].startswith("key/")
    assert query["X-Amz-Credential"].endswith("/us-east-1/s3/aws4_request")
    assert "authorization" not in headers


async def test_the_environment_does_not_leak_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What obstore would take from the environment by itself does not change what was given."""
    hostile = {
        "AWS_ACCESS_KEY_ID": "other",
        "AWS_SECRET_ACCESS_KEY": "other",
        "AWS_SESSION_TOKEN": "other",
        "AWS_REGION": "xx-other-1",
        "AWS_DEFAULT_REGION": "xx-other-1",
        "AWS_BUCKET": "other",
        "AWS_ENDPOINT": "http://other.test",
        "AWS_ENDPOINT_URL": "http://other.test",
        "AWS_ENDPOINT_URL_S3": "http://other.test",
        "AWS_REQUEST_PAYER": "true",
        "AWS_S3_EXPRESS": "true",
        "AWS_SKIP_SIGNATURE": "true",
        "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "false",
    }
    for name, value in hostile.items():
        monkeypatch.setenv(name, value)
    async with serving(ObstoreStorage) as (fake, storage):
        fake.replies.append(_WRITTEN)
        await storage.put("k", b"body")
    (query,) = _queries(fake)
    assert set(query) == {
        f"X-Amz-{name}" for name in ("Algorithm", "Credential", "Date", "Expires", "SignedHeaders", "Signature")
    }
    assert query["X-Amz-Credential"].split("/")[0::2] == ["key", "us-east-1", "aws4_request"]
    assert fake.requests[0][0].startswith("PUT /bucket/root/k?")


async def test_an_environment_that_obstore_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that obstore cannot read is named when the storage is opened, not with the first message."""
    monkeypatch.setenv("AWS_CHECKSUM_ALGORITHM", "md4")
    with pytest.raises(StoreUnavailable, match=r"obstore cannot sign.*md4.*use the same url with s3://") as caught:
        async with serving(ObstoreStorage):
            pass
    assert not caught.value.retriable
    assert "\n" not in str(caught.value)


async def test_renewed_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials of a profile that are about to expire are fetched anew, and sign what follows."""
    program = tmp_path / "program.py"
    program.write_text(
        "import json, pathlib\n"
        f"count = pathlib.Path({str(tmp_path / 'count')!r})\n"
        "number = int(count.read_text()) + 1 if count.exists() else 1\n"
        "count.write_text(str(number))\n"
        # Past the time when botocore insists on newer ones, so each request asks for them.
        "from datetime import UTC, datetime, timedelta\n"
        "until = (datetime.now(UTC) + timedelta(minutes=5)).isoformat()\n"
        "print(json.dumps({'Version': 1, 'AccessKeyId': f'key{number}', 'SecretAccessKey': 's',"
        " 'SessionToken': f'token{number}', 'Expiration': until}))\n"
    )
    config = tmp_path / "config"
    config.write_text(f"[profile renewing]\ncredential_process = {json.dumps(sys.executable)} {program}\n")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    options = {"profile": "renewing", "access_key_id": None, "secret_access_key": None}
    async with serving(ObstoreStorage, **options) as (fake, storage):
        fake.replies += [_WRITTEN, _WRITTEN]
        await storage.put("k", b"1")
        await storage.put("k", b"2")
    keys = [query["X-Amz-Credential"].split("/")[0] for query in _queries(fake)]
    tokens = [query["X-Amz-Security-Token"] for query in _queries(fake)]
    assert len(set(keys)) == 2
    assert [key.removeprefix("key") for key in keys] == [token.removeprefix("token") for token in tokens]


@pytest.mark.parametrize("message", ["Request has expired", "Request is not valid yet."])
async def test_a_clock_that_is_wrong(message: str) -> None:
    """A signature that the store finds too old or too new: this machine's clock is to be set, no permission given."""
    async with serving(ObstoreStorage) as (fake, storage):
        body = f"<Error><Code>AccessDenied</Code><Message>{message}</Message></Error>".encode()
        fake.replies.append((403, {}, body))
        with pytest.raises(StoreUnavailable, match="clock right") as caught:
            await storage.put("k", b"")
        assert not caught.value.retriable


@pytest.mark.parametrize(
    "reply",
    [
        None,
        b"no HTTP at all\r\n\r\n",
        (302, {"Location": "/bucket/root/k?again"}, b""),
        (200, {"Content-Length": "9", CUT: ""}, b"half"),
        error_reply(403, "AccessDenied"),
    ],
)
async def test_signatures_stay_secret(reply: Reply | bytes | None) -> None:
    """Whatever fails, neither the error nor its traceback shows a signature."""
    async with serving(ObstoreStorage) as (fake, storage):
        # Redirects are followed, up to a limit.
        fake.replies += [reply] * 12
        for call in (storage.get("k"), storage.list("")):
            with pytest.raises(StoreUnavailable) as caught:
                await call
            text = "".join(traceback.format_exception(caught.value))
            assert "bucket" in text
            assert "X-Amz-" not in text
