"""The policies of docs/security.md, as identities of a real server: each role can do its work, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from s3queue_async import Context, DeadLetter, S3Queue, Settings, StoreUnavailable
from s3queue_async.storage.open import storage_from_url
from s3queue_async.testing import servers
from s3queue_async.testing.servers import Server

pytestmark = pytest.mark.integration

BUCKET, ROOT = "roles", "prod/emails"
RIGHTS = {
    "worker": [f"Read:{BUCKET}/{ROOT}/*", f"Write:{BUCKET}/{ROOT}/*", f"List:{BUCKET}/{ROOT}*"],
    "producer": [
        f"Read:{BUCKET}/{ROOT}/*",
        f"List:{BUCKET}/{ROOT}*",
        f"Write:{BUCKET}/{ROOT}/ready/*",
        f"Write:{BUCKET}/{ROOT}/delayed/*",
        f"Write:{BUCKET}/{ROOT}/plugin/dedup/*",
    ],
    "observer": [f"Read:{BUCKET}/{ROOT}/*", f"List:{BUCKET}/{ROOT}*"],
}
"""SeaweedFS has one right for PUT and DELETE."""
SETTINGS = Settings(backoff_base=0.1, backoff_max=0.2, max_attempts=2, retain_completed=3600)


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    identities = [
        {"name": role, "credentials": [{"accessKey": role, "secretKey": servers.SECRET_KEY}], "actions": actions}
        for role, actions in RIGHTS.items()
    ]
    with servers.seaweedfs([BUCKET], identities=identities) as server:
        yield server


def role(monkeypatch: pytest.MonkeyPatch, server: Server, name: str, **options: Any) -> S3Queue[str]:
    for variable, value in server.environment().items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", name)
    return S3Queue(server.queue_url(BUCKET, ROOT), settings=SETTINGS, **options)


async def test_each_role_can_do_its_work(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker makes the queue; a producer fills it; the worker handles, retries, buries and redrives; an observer looks."""
    handled: set[str] = set()
    done = anyio.Event()

    async def handle(payload: str, context: Context) -> str:
        if payload == "dead" and context.token < 2:
            raise DeadLetter("as asked")
        if payload == "flaky" and context.attempt == 1:
            raise OSError
        handled.add(payload)
        if len(handled) == 4:
            done.set()
        return payload

    async with role(monkeypatch, server, "worker", on_message=handle) as worker:
        async with role(monkeypatch, server, "producer") as producer:
            await producer.enqueue("plain")
            await producer.enqueue("flaky", priority=9)
            once = await producer.enqueue("later", delay=0.2, dedup_id="later")
            assert await producer.enqueue("later", delay=0.2, dedup_id="later") == once
            dead = await producer.enqueue("dead")
        async with role(monkeypatch, server, "observer") as observer:
            letters = await observer.dead_letters.list()
            for _ in range(600):
                if letters:
                    break
                await anyio.sleep(0.05)
                letters = await observer.dead_letters.list()
            assert [letter.id for letter in letters] == [dead]
            assert await worker.dead_letters.redrive() == 1
            with anyio.fail_after(30):
                await done.wait()
            await worker.drain()
            assert (await observer.stats(exact=True)).completed >= 4
            assert await observer.results(once) == "later"


async def test_no_role_can_do_more(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """An observer cannot enqueue, and is told which permission that takes; a producer cannot touch a claim."""
    async with role(monkeypatch, server, "observer") as observer:
        with pytest.raises(StoreUnavailable) as refused:
            await observer.enqueue("x")
    assert not refused.value.retriable
    assert "s3:PutObject" in refused.value.suggestion
    async with role(monkeypatch, server, "producer"):
        storage = storage_from_url(server.queue_url(BUCKET, ROOT))
        await storage.open()
        try:
            with pytest.raises(StoreUnavailable):
                await storage.put("claims/x", b"{}")
            with pytest.raises(StoreUnavailable):
                await storage.put("plugin/coordinator/board", b"{}")
        finally:
            await storage.close()
    async with role(monkeypatch, server, "worker"):
        storage = storage_from_url(server.queue_url(BUCKET, "prod/others"))
        with pytest.raises(StoreUnavailable):
            await storage.open()
        await storage.close()
