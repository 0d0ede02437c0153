"""Tests of handlers, in virtual time.

    pytest examples/test_signup.py

The fixtures come with the library; docs/testing_your_handlers.md explains them. The first half is the code under test,
which would be in modules of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import msgspec
import pytest

from s3queue_async import Context, DeadLetter, QueueFull, S3Queue, Settings
from s3queue_async.testing import FaultyMemory, MemoryQueue, VirtualTime

# --- the code under test ------------------------------------------------------------------------------------------


class Email(msgspec.Struct):
    to: str
    subject: str


class MailServer:
    """Sends emails, if it feels like it."""

    def __init__(self) -> None:
        self.sent: list[Email] = []
        self.failures = 0

    async def send(self, email: Email) -> None:
        await asyncio.sleep(2)
        if self.failures > 0:
            self.failures -= 1
            raise ConnectionError("mail server is down")
        self.sent.append(email)


class SignUp:
    """Takes names, and sees to it that they are welcomed now and reminded in a week."""

    def __init__(self, queue: S3Queue[Email], mail: MailServer) -> None:
        self._queue = queue
        self._mail = mail
        queue.handler(self.handle)

    async def sign_up(self, address: str) -> None:
        await self._queue.enqueue(Email(address, "Welcome"), priority=5, dedup_id=f"welcome-{address}")
        await self._queue.enqueue(Email(address, "How is it going?"), delay=timedelta(days=7))

    async def handle(self, email: Email, context: Context) -> None:
        if "@" not in email.to:
            raise DeadLetter(f"{email.to!r} is no address")
        await self._mail.send(email)


# --- the tests ----------------------------------------------------------------------------------------------------


@pytest.fixture
def mail() -> MailServer:
    return MailServer()


@pytest.fixture
def service(s3queue_factory: Callable[..., MemoryQueue[Email]], mail: MailServer) -> SignUp:
    queue = s3queue_factory(payload_type=Email, settings=Settings(max_attempts=4, max_pending=10))
    return SignUp(queue, mail)


@pytest.fixture
def queue(service: SignUp) -> MemoryQueue[Email]:
    assert isinstance(service._queue, MemoryQueue)
    return service._queue


async def test_what_is_enqueued(service: SignUp, queue: MemoryQueue[Email]) -> None:
    await service.sign_up("a@example.com")
    queue.assert_enqueued(payload=Email("a@example.com", "Welcome"), priority=5)
    queue.assert_enqueued(delay=timedelta(days=7), times=1)
    assert [message.payload.subject for message in queue.enqueued] == ["Welcome", "How is it going?"]


async def test_a_week_takes_no_time(
    service: SignUp, queue: MemoryQueue[Email], mail: MailServer, s3queue_time: VirtualTime
) -> None:
    await service.sign_up("a@example.com")
    await s3queue_time.advance(timedelta(days=1))
    assert not mail.sent, "nothing is handled before the test says so"
    report = await queue.run_until_idle()
    assert [email.subject for email in mail.sent] == ["Welcome", "How is it going?"]
    assert report.completed == 2
    assert s3queue_time.elapsed > 7 * 86400


async def test_retries(service: SignUp, queue: MemoryQueue[Email], mail: MailServer) -> None:
    mail.failures = 3
    await service.sign_up("a@example.com")
    report = await queue.run_until_idle()
    assert (report.completed, report.retried, report.dead) == (2, 3, 0)


async def test_dead_letters(service: SignUp, queue: MemoryQueue[Email], mail: MailServer) -> None:
    await service.sign_up("nobody")
    await queue.run_until_idle()
    assert {letter.error for letter in await queue.dead_letters.list()} == {"'nobody' is no address"}
    assert not mail.sent


async def test_store_is_down(service: SignUp, queue: MemoryQueue[Email], s3queue_store: FaultyMemory) -> None:
    s3queue_store.unavailable("put", times=3)
    await service.sign_up("a@example.com")
    assert len(queue.enqueued) == 2, "the queue tried again by itself"


async def test_backlog_is_full(service: SignUp, queue: MemoryQueue[Email]) -> None:
    for number in range(5):
        await service.sign_up(f"{number}@example.com")
    with pytest.raises(QueueFull):
        await service.sign_up("late@example.com")


@pytest.mark.parametrize("address", ["a@example.com", "b@example.com"])
async def test_twice_is_once(service: SignUp, queue: MemoryQueue[Any], address: str) -> None:
    await service.sign_up(address)
    await service.sign_up(address)
    queue.assert_enqueued(payload=Email(address, "Welcome"), times=1)
