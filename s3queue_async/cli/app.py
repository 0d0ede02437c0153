"""The root of the commands, and how each of them ends."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
import msgspec

import s3queue_async
from s3queue_async.cli.exits import Exit, Failed, Unread, code_of
from s3queue_async.errors import QueueError

EPILOG = """\b
Exit codes: 0 done, 1 a fault was found, 2 wrong usage, 3 no such queue or message,
4 the store refuses or cannot be reached, 5 done in part, 6 the queue is full,
7 not confirmed, 130 interrupted."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}, epilog=EPILOG)
@click.version_option(s3queue_async.__version__, prog_name="s3queue")
def root() -> None:
    """Operate a queue that lives in an S3 bucket or an SQLite file.

    Every command takes --url (or S3QUEUE_URL) and --json.
    """


def run(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit code. Never raises."""
    _register()
    # Also where the command line itself is wrong, and no command was reached.
    as_json = "--json" in arguments
    try:
        return int(root.main(args=list(arguments), prog_name="s3queue", standalone_mode=False) or 0)
    except click.exceptions.Exit as leaving:
        return leaving.exit_code
    except (click.Abort, KeyboardInterrupt):
        return _told(as_json, Exit.INTERRUPTED, "Interrupted", "Interrupted.", "")
    except click.ClickException as error:
        hint = "" if not isinstance(error, click.UsageError) or error.ctx is None else _hint(error.ctx)
        return _told(as_json, Exit.USAGE, type(error).__name__, error.format_message(), hint)
    except Exception as error:  # noqa: BLE001 - the end of a process: each error becomes a text and a code
        return _failed(as_json, error)


def _failed(as_json: bool, error: Exception) -> int:
    for known in _leaves(error):
        if isinstance(known, Failed):
            return _told(as_json, known.code, "Failed", str(known), known.suggestion)
        if isinstance(known, QueueError):
            return _told(as_json, code_of(known), type(known).__name__, str(known.args[0]), known.suggestion)
        if isinstance(known, Unread | BrokenPipeError):
            # The interpreter must not complain when it flushes what nobody reads.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return Exit.DONE
        if isinstance(known, OSError) and known.filename is not None:
            return _told(as_json, Exit.USAGE, type(known).__name__, f"{known.filename}: {known.strerror}.", "")
    sys.excepthook(type(error), error, error.__traceback__)
    return Exit.FAULT


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


def _told(as_json: bool, code: Exit, kind: str, message: str, suggestion: str) -> int:
    if as_json:
        told: dict[str, Any] = {"error": kind, "message": message, "suggestion": suggestion, "exit_code": int(code)}
        sys.stderr.write(msgspec.json.encode(told).decode() + "\n")
    else:
        sys.stderr.write(f"{message}\n" + (f"{suggestion}\n" if suggestion else ""))
    return int(code)


def _hint(context: click.Context) -> str:
    return f"Try: {context.command_path} --help"


def commands() -> dict[str, click.Command]:
    """Every command by its name, groups and what is in them."""
    _register()
    found: dict[str, click.Command] = {}
    for name, command in root.commands.items():
        found[name] = command
        if isinstance(command, click.Group):
            found |= {f"{name} {inner}": one for inner, one in command.commands.items()}
    return found


def _register() -> None:
    # Here, so that the modules of the commands may import this one's neighbours in any order.
    from s3queue_async.cli import bench, dead, doctor, enqueue, look, operate, schedule, tail, top, transfer, work

    for module in (enqueue, work, look, tail, top, dead, operate, schedule, doctor, bench, transfer):
        for command in module.COMMANDS:
            root.add_command(command)
