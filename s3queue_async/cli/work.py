"""``s3queue work``: run a handler in one process or several, until a signal."""

from __future__ import annotations

import os
import signal
from typing import Any

import anyio
import click

from s3queue_async.cli.common import Target, command
from s3queue_async.cli.exits import Exit
from s3queue_async.cli.handlers import imported, payload_type
from s3queue_async.cli.logs import FORMATS, LEVELS, set_up
from s3queue_async.cli.screen import Screen
from s3queue_async.cli.supervisor import Supervisor, parent_gone
from s3queue_async.message import DrainReport
from s3queue_async.queue import S3Queue
from s3queue_async.settings import Settings
from s3queue_async.worker import CONCURRENCY_MAX


@command("work", short_help="Run a handler: module:handler.")
@click.argument("handler", metavar="MODULE:HANDLER")
@click.option(
    "--concurrency", "-c", type=click.IntRange(1, CONCURRENCY_MAX), default=10, show_default=True,
    help="Messages at a time, in each process.",
)  # fmt: skip
@click.option("--processes", "-p", type=click.IntRange(1, 256), default=1, show_default=True)
@click.option("--reload", is_flag=True, help="Start anew whenever a Python file below here changes; for development.")
@click.option("--untyped", is_flag=True, help="Pass payloads as they are decoded, whatever the handler's annotation.")
@click.option("--log-format", type=click.Choice(FORMATS), default="console", show_default=True)
@click.option("--log-level", type=click.Choice(LEVELS), default="info", show_default=True)
@click.option("--supervised", is_flag=True, hidden=True, help="End when stdin does.")
async def work(
    screen: Screen,
    target: Target,
    *,
    handler: str,
    concurrency: int,
    processes: int,
    reload: bool,
    untyped: bool,
    log_format: str,
    log_level: str,
    supervised: bool,
) -> Exit:
    """Handle messages until SIGTERM or Ctrl-C; then let running handlers end, and hand back the rest.

    A second signal cancels running handlers.

    HANDLER is a function: async or sync, of (payload) or (payload, context). Payloads are decoded to the type of its
    first parameter. It may also be an S3Queue with a handler of its own, whose url counts then.

    Settings come from the environment (S3QUEUE_MAX_ATTEMPTS and so on; s3queue config shows them).
    """
    set_up(level=log_level, form="json" if screen.json else log_format)
    if supervised or (processes == 1 and not reload):
        report = await _work(target, handler, concurrency, typed=not untyped, supervised=supervised)
        if screen.json and not supervised:
            screen.emit(report)
        return Exit.DONE
    # A url or a handler that cannot be used is told once, not by each process.
    if not reload:
        found = imported(handler)
        if not isinstance(found, S3Queue):
            target.storage()
    arguments = ["work", handler, "--supervised", f"--concurrency={concurrency}", f"--log-level={log_level}"]
    arguments += [f"--log-format={'json' if screen.json else log_format}"] + ["--untyped"] * untyped
    environment = dict(os.environ)
    if target.given is not None:
        environment["S3QUEUE_URL"] = target.given
    supervisor = Supervisor(arguments, environment, processes)
    return Exit(await (supervisor.run_reloading() if reload else supervisor.run()))


async def _work(target: Target, name: str, concurrency: int, *, typed: bool, supervised: bool) -> DrainReport:
    found = imported(name)
    if isinstance(found, S3Queue):
        queue: S3Queue[Any] = found
    else:
        queue = S3Queue(
            target.url,
            storage=target.storage(),
            payload_type=payload_type(found) if typed else Any,
            settings=Settings(),
            on_message=found,
            concurrency=concurrency,
        )
    async with queue, anyio.create_task_group() as group:
        if supervised:

            async def end_with_parent() -> None:
                await parent_gone()
                # As if it had been told to: run() drains.
                os.kill(os.getpid(), signal.SIGTERM)

            group.start_soon(end_with_parent)
        report = await queue.run()
        group.cancel_scope.cancel()
    return report


COMMANDS = (work,)
