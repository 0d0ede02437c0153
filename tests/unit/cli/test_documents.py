"""docs/cli.md has every command, option of note, and exit code; and the README's commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import click

from s3queue_async.cli.app import commands
from s3queue_async.cli.exits import Exit

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs/cli.md").read_text(encoding="utf-8")


def test_every_command() -> None:
    """The table of commands has each of them, and no other."""
    table = PAGE.partition("| command | |")[2].partition("\n\n")[0]
    cells = [cell for row in table.splitlines() for cell in row.split("|")[1:2]]
    named = {
        name.removesuffix(" ID").strip()
        for cell in cells
        for name in re.findall(r"[`,] ?([a-z][a-z -]*(?: ID)?)(?=[`,])", cell)
    }
    assert named == {name for name, command in commands().items() if not isinstance(command, click.Group)}


def test_every_exit_code() -> None:
    """The table of exit codes is that of the code."""
    table = PAGE.partition("| exit code | |")[2].partition("\n\n")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == {int(code) for code in Exit}


def test_options_exist() -> None:
    """Each option that the page names is one of a command."""
    known = {option for command in commands().values() for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"(?<=[ `(])--[a-z-]+", PAGE)) <= known | {"--help"}


def test_commands_as_printed() -> None:
    """Each line of s3queue in the documents parses: the command and its options are there."""
    for name in ("README.md", "docs/cli.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        lines = re.findall(
            r"^(?:.*\| )?s3queue (.+?)(?:  +#.*)?$", "\n".join(re.findall(r"^```\n(.*?)^```$", text, re.M | re.S)), re.M
        )
        assert lines
        for line in lines:
            words: list[str] = re.findall(r"'[^']*'|\S+", line)
            command = commands().get(" ".join(words[:2])) or commands()[words[0]]
            options = {option for parameter in command.params for option in parameter.opts}
            assert {word for word in words if word.startswith("--")} <= options, line
