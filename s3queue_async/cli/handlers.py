"""From ``module:handler`` to what runs: imports it, and finds out what its payloads are."""

from __future__ import annotations

import importlib
import inspect
import sys
import typing
from pathlib import Path
from typing import Any

from s3queue_async.cli.exits import Exit, Failed
from s3queue_async.queue import S3Queue


def imported(name: str) -> Any:
    """What ``module:attribute`` names; the current directory is where modules come from first.

    Raises:
        Failed: There is no such module or attribute. An error inside of the module goes on as it is.
    """
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        raise Failed(Exit.USAGE, f"{name!r} is no handler.", "Write module:handler, such as myapp.tasks:send.")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            # The module is there, and what it imports is not.
            raise
        raise Failed(
            Exit.USAGE, f"There is no module {module_name!r} here or on the path.", f"This is {here}."
        ) from error
    for part in attribute.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            public = (
                sorted(name for name in vars(found) if not name.startswith("_")) if hasattr(found, "__dict__") else []
            )
            raise Failed(
                Exit.USAGE, f"{module_name!r} has no {attribute!r}.", f"It has: {', '.join(public) or 'nothing'}."
            ) from error
    if not callable(found) and not isinstance(found, S3Queue):
        raise Failed(
            Exit.USAGE, f"{name} is a {type(found).__name__}, and no handler.", "Name a function or an S3Queue."
        )
    return found


def payload_type(handler: Any) -> Any:
    """The annotation of the handler's first parameter; Any without one."""
    function = handler if inspect.isroutine(handler) else getattr(handler, "__call__", handler)  # noqa: B004
    parameters = list(inspect.signature(handler).parameters)
    if not parameters:
        return Any
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise Failed(
            Exit.USAGE,
            f"The annotations of {getattr(handler, '__qualname__', handler)!r} cannot be read: {error}.",
            "Import what they name at runtime, not under TYPE_CHECKING only, or pass --untyped.",
        ) from error
    hint = hints.get(parameters[0], Any)
    return Any if hint is object else hint
