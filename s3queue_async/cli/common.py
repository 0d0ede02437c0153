"""What all commands share: --url and --json, opening a queue that must be there, and running the coroutine."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import anyio
import click
import msgspec

from s3queue_async.cli.exits import Exit, Failed, Unread
from s3queue_async.cli.screen import Screen
from s3queue_async.errors import InvalidURL
from s3queue_async.protocol import layout
from s3queue_async.queue import URL_VARIABLE, S3Queue
from s3queue_async.settings import Settings
from s3queue_async.storage.base import NotFound, Storage
from s3queue_async.storage.memory import MemoryStorage
from s3queue_async.storage.open import storage_from_url
from s3queue_async.storage.sqlite import SqliteStorage

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|min|m|h|d|w)?")


if TYPE_CHECKING:
    SecondsType = click.ParamType[float]
    MomentType = click.ParamType[datetime]
else:
    # Generic in the newest click only.
    SecondsType = MomentType = click.ParamType


class Seconds(SecondsType):
    """A duration: seconds, or a number with a unit."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        found = _SPAN.fullmatch(value.strip())
        if found is None:
            self.fail(f"{value!r} is no duration: write seconds, or a number with ms, s, min, h, d or w.", param, ctx)
        return float(found[1]) * _UNITS[found[2] or "s"]


class Moment(MomentType):
    """A point in time: ISO 8601, or a duration that counts from now."""

    name = "time"

    def __init__(self, now: Callable[[], float], *, ago: bool) -> None:
        self._now = now
        self._sign = -1 if ago else 1

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> datetime:
        if isinstance(value, datetime):
            return value
        found = _SPAN.fullmatch(value.strip())
        if found is not None:
            seconds = float(found[1]) * _UNITS[found[2] or "s"]
            return datetime.fromtimestamp(self._now(), UTC) + self._sign * timedelta(seconds=seconds)
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            self.fail(f"{value!r} is no time: write 2026-01-31T12:00:00Z, or a duration such as 2h.", param, ctx)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


class Target:
    """Which queue a command is about.

    Args:
        url: What --url or S3QUEUE_URL says.
    """

    def __init__(self, url: str | None) -> None:
        self.given = url

    @property
    def url(self) -> str:
        """The url. Raises InvalidURL where none was given."""
        if not self.given:
            raise InvalidURL(f"No queue was named: neither --url nor {URL_VARIABLE} is set.")
        return self.given

    def storage(self) -> Storage:
        """The queue's storage, not open yet. Raises InvalidURL, for memory:// too: nobody else would see it."""
        storage = storage_from_url(self.url)
        if isinstance(storage, MemoryStorage):
            raise InvalidURL(
                f"{self.url}: a queue in memory ends with its process, and this command is one.",
                suggestion="Use an s3:// or sqlite: url.",
            )
        return storage

    @asynccontextmanager
    async def opened(
        self, *, create: bool = False, settings: Settings | None = None, **options: Any
    ) -> AsyncIterator[S3Queue[Any]]:
        """The queue, open; unless ``create``, one that is there already: a mistyped url makes no queue.

        Args:
            create: Make it when it is not there.
            settings: Instead of the defaults; the environment still counts.
            options: Further ones of S3Queue.
        """
        storage = self.storage()
        if not create:
            await require_queue(storage, self.url)
        settings = Settings(coordinator=False) if settings is None else settings
        async with S3Queue(self.url, storage=storage, settings=settings, **options) as queue:
            yield queue


async def require_queue(storage: Storage, url: str) -> None:
    """Open the storage, and see that it has a queue. Raises Failed when it has none."""
    missing = Failed(
        Exit.NOT_FOUND, f"There is no queue at {url}.", "Check the url; the first enqueue or worker makes the queue."
    )
    if isinstance(storage, SqliteStorage) and not storage.path.exists():
        # Opening it would make the file.
        raise missing
    await storage.open()
    try:
        await storage.get(layout.CONFIG)
    except NotFound:
        await storage.close()
        raise missing from None
    except BaseException:
        await storage.close()
        raise


Body = Callable[..., Coroutine[Any, Any, Exit | None]]


def command(name: str, **attributes: Any) -> Callable[[Body], click.Command]:
    """Make a command with --url and --json of a coroutine ``(screen, target, **options)``; it may return a code."""

    def make(body: Body) -> click.Command:
        @functools.wraps(body)
        def run(*, url: str | None, json: bool, **options: Any) -> int:
            screen = Screen(json=json)
            target = Target(url or os.environ.get(URL_VARIABLE))
            try:
                return int(anyio.run(functools.partial(body, screen, target, **options)) or Exit.DONE)
            except BrokenPipeError as error:
                raise Unread from error

        decorated: Callable[..., int] = click.option("--json", is_flag=True, help="Print JSON, one document a line.")(
            run
        )
        decorated = click.option(
            "--url", metavar="URL", help=f"The queue: s3://bucket/prefix or sqlite:///file.db.  [env: {URL_VARIABLE}]"
        )(decorated)
        made: click.Command = click.command(name, **attributes)(decorated)
        return made

    return make


yes_option = click.option("--yes", "-y", is_flag=True, help="Do not ask.")


def limit_option(default: int) -> Callable[[Any], Any]:
    """How many to show at most."""
    return click.option(
        "--limit", "-n", type=click.IntRange(1, 1_000_000_000), default=default, show_default=True,
        help="At most so many.",
    )  # fmt: skip


def settings_with(**changes: Any) -> Settings:
    """Settings of a command that only looks, with changes."""
    return msgspec.structs.replace(Settings(coordinator=False), **changes)
