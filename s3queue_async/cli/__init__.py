"""The command line ``s3queue``; needs the extra ``cli``."""

from __future__ import annotations

import sys
from typing import NoReturn

USAGE = 2


def main() -> NoReturn:
    """Run the command that the process was started with, and exit with its code (docs/cli.md lists them)."""
    try:
        import click  # noqa: F401 - whether it is there
        import rich  # noqa: F401
    except ImportError as error:
        sys.stderr.write(
            f"The command line needs what is not installed ({error}).\nRun: pip install 's3queue-async[cli]'\n"
        )
        sys.exit(USAGE)
    from s3queue_async.cli.app import run

    sys.exit(run(sys.argv[1:]))
