"""Dead letters and purge by the command line, each as a process."""

from __future__ import annotations

import pytest

from tests.integration.cli.harness import Shell

pytestmark = pytest.mark.integration


def make_dead(shell: Shell, count: int = 5) -> list[str]:
    """So many dead letters, of priorities 0 and 1 by turns; gives their ids."""
    lines = "".join(
        f'{{"payload": {{"fail": "{number}"}}, "priority": {number % 2}, "max_attempts": 1,'
        f' "headers": {{"number": "{number}"}}}}\n'
        for number in range(count)
    )
    shell.does("import", "-", stdin=lines)
    with shell.running("work", "tasks:send") as worker:
        worker.says("dead letter", count)
        assert worker.ends() == 0
    letters = shell.does("dead", "list", "--json").lines
    assert all(letter["error"].startswith("ValueError: mail server refused") for letter in letters)
    ids = {letter["payload"]["fail"]: letter["id"] for letter in letters}
    assert len(ids) == len(letters) == count
    return [ids[str(number)] for number in range(count)]


def test_there_and_back(shell: Shell) -> None:
    """Counted by error, redriven by filter and by id, purged; it asks before what is final."""
    ids = make_dead(shell)
    (kind,) = shell.does("dead", "list", "--summary", "--json").lines
    assert (kind["error"], kind["count"]) == ("ValueError: mail server refused '…' at port N", 5)
    assert kind["example"] in ids
    assert shell.does("dead", "redrive", "--header", "number=2", "--yes", "--json").document == {"redriven": 1}
    assert shell.does("dead", "redrive", ids[4]).out == "1 redriven.\n"
    again = shell.ends("dead", "redrive", ids[4])
    assert (again.code, again.out) == (3, "0 redriven.\n")
    assert shell.ends("dead", "purge", ids[0]).code == 7
    assert shell.does("dead", "purge", ids[0], "--yes", "--json").document == {"purged": 1}
    assert shell.does("dead", "purge", "--all", "--yes", "--json").document == {"purged": 2}
    assert shell.does("dead", "list").out == "No dead letters.\n"
    assert shell.does("purge", "--yes", "--json").document == {"purged": 2}
    assert shell.does("peek").out == "No messages.\n"


def test_looking(local: Shell) -> None:
    """Listed and filtered; one shown with its traceback; what could mean all or nothing is refused or asked about."""
    ids = make_dead(local)
    assert "mail server refused" in local.does("dead", "list").out
    assert [letter["payload"] for letter in local.does("dead", "list", "--error", "refused '3'", "--json").lines] == [
        {"fail": "3"}
    ]
    assert len(local.does("dead", "list", "--priority", "1", "--since", "1h", "--json").lines) == 2
    assert local.does("dead", "list", "--until", "1h", "--json").lines == []
    first = local.does("dead", "list", "--limit", "2")
    assert "These are the first 2" in first.err
    assert "at port N" in local.does("dead", "list", "--summary").out
    shown = local.does("dead", "show", ids[0]).out
    assert "it is a dead letter" in shown
    assert "Traceback (most recent call last)" in shown
    assert local.ends("dead", "redrive").code == 2
    assert local.ends("dead", "redrive", "--all", ids[0]).code == 2
    assert local.ends("dead", "redrive", "--all").code == 7
    assert local.ends("purge").code == 7
    assert local.does("stats", "--json").document["dead"] == 5


@pytest.mark.parametrize(
    "wrong", [["--error", "("], ["--header", "x"], ["--priority", "256"], ["--since", "yesterday"]]
)
def test_wrong_filters(local: Shell, wrong: list[str]) -> None:
    """A filter that means nothing is named, and nothing is done."""
    local.does("enqueue", "x")
    ended = local.ends("dead", "redrive", "--yes", *wrong)
    assert ended.code == 2
    assert wrong[0] in ended.err
