"""enqueue, export and import as processes: every form of input, and what goes on after a failure."""

from __future__ import annotations

import json
import sqlite3

import pytest

from tests.integration.cli.harness import Shell

pytestmark = pytest.mark.integration


def payloads(shell: Shell, limit: int = 100) -> list[object]:
    return [line["payload"] for line in shell.does("peek", "--json", "--limit", str(limit)).lines]


def test_arguments(local: Shell) -> None:
    """JSON where it is JSON, text otherwise, text throughout when asked for; an id for each."""
    ids = local.does("enqueue", '{"a": [1, null]}', "plain", "7").out.split()
    assert len(ids) == len(set(ids)) == 3
    local.does("enqueue", "7", "--format", "text")
    assert payloads(local) == [{"a": [1, None]}, "plain", 7, "7"]
    once = local.does("enqueue", "x", "--dedup-id", "d").out
    assert local.does("enqueue", "x", "--dedup-id", "d").out == once
    later = local.does("enqueue", "x", "--deliver-at", "2h", "--max-attempts", "9", "--expires-in", "1d").out.strip()
    shown = local.does("show", later, "--json").document
    assert (shown["state"], shown["max_attempts"]) == ("delayed", 9)
    assert shown["expires_at"] > shown["due_at"]


def test_files(shell: Shell) -> None:
    """JSON lines from stdin, text, and CSV with quoted line breaks; a long one in pieces, counted."""
    done = shell.does("enqueue", "-f", "-", "--json", stdin='{"n": 1}\n\n{"n": 2}')
    assert done.document == {"enqueued": 2, "skipped": 0}
    (shell.directory / "rows.csv").write_text('to,text\na@x,"two\nlines, ""quoted"""\nb@x,one\n', encoding="utf-8")
    shell.does("enqueue", "-f", "rows.csv", "--priority", "1")
    (shell.directory / "lines.txt").write_text("one\ntwo\n", encoding="utf-8")
    assert len(shell.does("enqueue", "-f", "lines.txt", "--ids", "--priority", "2").out.split()) == 2
    found = payloads(shell)
    assert found[:4] == ["one", "two", {"to": "a@x", "text": 'two\nlines, "quoted"'}, {"to": "b@x", "text": "one"}]
    # Two pieces, whose order depends on how well the store's time is known.
    assert sorted(found[4:], key=str) == [{"n": 1}, {"n": 2}]
    long = "".join(f'{{"number": {number}}}\n' for number in range(20_000))
    assert shell.does("enqueue", "-f", "-", "--json", stdin=long).document == {"enqueued": 20_000, "skipped": 0}
    assert shell.does("stats", "--json").document["pending"] == 20_006


def test_resume(local: Shell) -> None:
    """An input that breaks off half-way is enqueued to that point; mended, the same command adds the rest, once."""
    path = local.directory / "in.jsonl"
    good = [f'{{"number": {number}, "text": "{"x" * 200}"}}' for number in range(3000)]
    path.write_text("\n".join([*good[:2400], "broken", *good[2400:]]), encoding="utf-8")
    broken = local.ends("enqueue", "-f", "in.jsonl", "--resume", "batch-1")
    assert broken.code == 2
    assert "in.jsonl, line 2,401, is no JSON" in broken.err
    enqueued = local.does("stats", "--json").document["pending"]
    assert enqueued > 1000
    assert f"{enqueued:,} messages are enqueued" in broken.err
    path.write_text("\n".join(good), encoding="utf-8")
    done = local.does("enqueue", "-f", "in.jsonl", "--resume", "batch-1", "--json").document
    assert done == {"enqueued": 3000 - enqueued, "skipped": enqueued}
    assert local.does("stats", "--json").document["pending"] == 3000
    again = local.does("enqueue", "-f", "in.jsonl", "--resume", "batch-1", "--json").document
    assert again == {"enqueued": 0, "skipped": 3000}
    # A chunk that was written although the queue was not told so: what the deduplication ids are for.
    with sqlite3.connect(local.directory / "queue.db") as file:
        file.execute("DELETE FROM objects WHERE key LIKE 'plugin/imports/%'")
    again = local.does("enqueue", "-f", "in.jsonl", "--resume", "batch-1", "--json").document
    assert again == {"enqueued": 3000, "skipped": 0}
    assert local.does("stats", "--json").document["pending"] == 3000


def test_full_in_the_middle(local: Shell) -> None:
    """max_pending ends it with its own code; the message says how many are enqueued, and what to do."""
    shell = Shell(local.url, local.directory, {**local.more, "S3QUEUE_MAX_PENDING": "6000"})
    ended = shell.ends("enqueue", "-f", "-", "--format", "text", stdin="x\n" * 20_000)
    assert ended.code == 6
    assert "messages are enqueued; then: The backlog has reached max_pending=6000." in ended.err
    assert "--resume" in ended.err


@pytest.mark.parametrize(
    ("arguments", "stdin", "said"),
    [
        ([], None, "Pass messages as arguments, or a file"),
        (["x", "-f", "-"], "", "Pass messages as arguments, or a file"),
        (["-f", "-"], "no json\n", "stdin, line 1, is no JSON"),
        (["-f", "-", "--format", "csv"], "a,b\n1\n", "stdin, line 2, has 1 fields, the first line 2"),
        (["-f", "-", "--format", "csv"], "a,a\n1,2\n", "names a column twice"),
        (["-f", "missing.csv"], None, "missing.csv: No such file"),
        (["-f", "-", "--dedup-field", "id"], '{"x": 1}\n', "Line 1 has no field 'id'"),
        (["x", "y", "--dedup-id", "d"], None, "--dedup-id is for one message"),
        (["-f", "-", "--resume", "a/b"], "", "--resume needs a --file"),
        (["x", "--header", "k"], None, "must be NAME=VALUE"),
        (["x", "--delay", "soon"], None, "is no duration"),
        (["x", "--priority", "300"], None, "300 is not in the range"),
        (["NaN", "--format", "json"], None, "is no JSON"),
        (["123456789012345678901234567890"], None, "cannot be enqueued"),
    ],
)  # fmt: skip
def test_wrong_input(local: Shell, arguments: list[str], stdin: str | None, said: str) -> None:
    """Each mistake is named, with the line where there is one; exit code 2."""
    ended = local.ends("enqueue", *arguments, stdin=stdin)
    assert ended.code == 2, ended.err
    assert said in ended.err
    assert "Traceback" not in ended.err


def test_export_and_import(shell: Shell) -> None:
    """What is exported comes out the same elsewhere: payloads, priorities, headers, times; a second import adds nothing."""
    shell.does("enqueue", '{"to": "ä"}', "--priority", "9", "--header", "a=b", "--max-attempts", "4")
    shell.does("enqueue", "later", "--delay", "1d")
    shell.does("enqueue", "-f", "-", "--format", "text", stdin="x\n" * 1000)
    lines = [json.loads(line) for line in shell.does("export").out.splitlines()]
    assert len(lines) == 1002
    assert lines[0] | {"id": "", "enqueued_at": ""} == {
        "id": "", "enqueued_at": "", "state": "pending", "priority": 9, "max_attempts": 4, "headers": {"a": "b"},
        "payload": {"to": "ä"},
    }  # fmt: skip
    assert shell.does("export", "-o", "all.jsonl", "--json").document == {"exported": 1002}
    assert shell.ends("export", "-o", "all.jsonl").code == 2
    other = Shell(f"sqlite:///{shell.directory}/other.db", shell.directory, shell.more)
    assert other.does("import", "all.jsonl", "--json").document == {"imported": 1002, "skipped": 0}
    other.does("import", "all.jsonl")
    stats = other.does("stats", "--json").document
    assert (stats["pending"], stats["delayed"]) == (1001, 1)
    again = [json.loads(line) for line in other.does("export").out.splitlines()]

    def bare(line: dict[str, object]) -> dict[str, object]:
        # Delays are rounded up to a tenth of a second.
        changing = ("id", "enqueued_at", "dedup_id", "deliver_at")
        return {name: value for name, value in line.items() if name not in changing}

    assert [bare(line) for line in again] == [bare(line) for line in lines]


def test_import_of_something_else(local: Shell) -> None:
    """A line that export did not write is named."""
    ended = local.ends("import", "-", stdin='{"payload": 1}\n{"priority": 3}\n')
    assert ended.code == 2
    assert "stdin, line 2, is not what export writes: there is no payload" in ended.err
