"""The figures of a run as tables, for the terminal and for docs/performance.md."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.criteria import Verdict, verdicts
from benchmarks.throughput import SIDES

CLIENTS = {"s3": "aiobotocore", "s3+obstore": "obstore"}


@dataclass
class Sheet:
    """One table, as text; columns whose name begins with "<" are texts, the others are figures.

    Attributes:
        note: What a reader has to know to read it right; "" for nothing.
        plot: The name of the picture that goes with it; "" for none.
    """

    title: str
    columns: Sequence[str]
    rows: list[list[str]] = field(default_factory=list)
    note: str = ""
    plot: str = ""

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in self.columns:
            table.add_column(column.lstrip("<"), justify="left" if column.startswith("<") else "right")
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """For the document."""
        lines = [
            f"### {self.title}\n",
            "| " + " | ".join(column.lstrip("<") for column in self.columns) + " |",
            "|" + "|".join("---" if column.startswith("<") else "--:" for column in self.columns) + "|",
            *("| " + " | ".join(row) + " |" for row in self.rows),
        ]
        if self.note:
            lines += ["", self.note]
        if self.plot:
            lines += ["", f"![{self.title}]({self.plot})"]
        return "\n".join(lines) + "\n"


def sheets(results: dict[str, Any]) -> Iterator[Sheet]:
    """Every table that this run has figures for."""
    parts = results["parts"]
    yield _verdicts(verdicts(parts))
    for name, make in SHEETS:
        if name in parts:
            yield from make(parts[name])
    if results["skipped"]:
        yield Sheet("What could not run", ("<contender", "<why"), [list(pair) for pair in results["skipped"].items()])


def show(results: dict[str, Any], console: Console) -> None:
    """Print every table."""
    for sheet in sheets(results):
        console.print(sheet.rich())
        if sheet.note:
            console.print(sheet.note, highlight=False)
        console.print()


def markdown(results: dict[str, Any]) -> str:
    """Every table, as it is in the document."""
    machine = results["machine"]
    head = (
        f"Measured with Python {machine['python']} on {machine['cores']} cores ({machine['processor']}), "
        f"SeaweedFS on loopback, in {results['seconds'] / 60:.0f} minutes; medians of {results['rounds']} rounds in "
        f"turn where nothing else is said.\n"
    )
    return "\n".join([head, *(sheet.markdown() for sheet in sheets(results))])


def _verdicts(found: Iterable[Verdict]) -> Sheet:
    rows = [[verdict.asked, verdict.seen, verdict.word] for verdict in found]
    return Sheet("What was asked, what was seen", ("<asked", "<seen", "<met or not"), rows)


def _n(value: float, digits: int = 0) -> str:
    return f"{value:,.{digits}f}"


def _bare(part: Any) -> Iterator[Sheet]:
    rounds_of = {row["scheme"]: row["rounds"] for row in part["rows"]}
    sheet = Sheet(
        "Beside the bare loop",
        (
            "<client",
            "messages a segment",
            "<phase",
            "<side",
            "messages/s",
            "queue / it",
            "requests/message",
            "CPU us/message",
        ),
        note="A bare loop issues the same S3 requests with no queue around them: on aiobotocore's own calls, as a "
        "program without this library would, with a round trip more for each PUT (Expect: 100-continue); and on this "
        "library's storage adapter, without that, and with less of the client's CPU a request. The queue's part of its "
        "rate is the median of the ratios of neighbouring runs, so it is not the quotient of the two medians "
        f"({', '.join(f'{CLIENTS[scheme]}: {rounds} rounds' for scheme, rounds in rounds_of.items())}). CPU is the "
        "client's.",
    )
    for row in part["rows"]:
        ratio = "" if row["ratio"] is None else _n(row["ratio"], 2)
        sheet.rows.append(
            [
                CLIENTS[row["scheme"]], str(row["per_segment"]), row["phase"], SIDES[row["side"]], _n(row["rate"]), ratio,
                _n(row["requests"], 3), _n(row["cpu_us"], 1),
            ]
        )  # fmt: skip
    yield sheet


def _peers(part: Any) -> Iterator[Sheet]:
    sheet = Sheet(
        "Beside other queues",
        (
            "<queue", "<keeps messages in", "messages", "enqueue/s", "process/s", "lost", "duplicated",
            "one at a time p50 ms", "p99 ms", "<settings",
        ),
        note=f"Each in a process of its own, in turn, {part['rounds']} rounds; 100-byte payloads; the handler only "
        "remembers what it got. One at a time: "
        "from the start of an enqueue to the start of its handler, in one process. Redis keeps everything in "
        "memory and writes nothing to disk here, and answers in 0.1 ms where an S3 server takes some: that is "
        "why single messages are faster there. Batches are slower there because each message is a job of its own, with "
        "several commands to Redis; here hundreds share two PUT and a GET.",
        plot="performance-peers.png",
    )  # fmt: skip
    for row in part["rows"]:
        trip = row["round_trip"]
        sheet.rows.append(
            [
                row["name"], row["store"], _n(row["messages"]), _n(row["enqueue_rate"]), _n(row["process_rate"]),
                str(row["lost"]), str(row["duplicated"]), _n(trip["p50_ms"], 1), _n(trip["p99_ms"], 1), row["settings"],
            ]
        )  # fmt: skip
    yield sheet


def _cost(part: Any) -> Iterator[Sheet]:
    sqs = part["sqs"]
    sheet = Sheet(
        "Requests and money",
        (
            "messages a segment",
            "requests/message",
            "paid ones",
            "paid ones for messages",
            "dollars a million",
            "<beside SQS",
        ),
        note="Enqueue and process, everything counted: listings, heartbeats, the probe of a new queue, and the worker's "
        f"start and end; so are the dollars. SQS at list price: ${sqs['single']:.2f} a million messages one by one, "
        f"${sqs['batched']:.2f} in batches of 10.",
        plot="performance-cost.png",
    )
    for row in part["rows"]:
        beside = sqs["single"] if row["per_segment"] == 1 else sqs["batched"]
        times = row["dollars"] / beside
        sheet.rows.append(
            [
                str(row["per_segment"]), _n(row["per_message"], 4), _n(row["paid_per_message"], 4),
                _n(row["own_paid_per_message"], 4),
                f"${row['dollars']:.3f}", f"{times:.2f} times ${beside:.2f}",
            ]
        )  # fmt: skip
    yield sheet


def _latency(part: Any) -> Iterator[Sheet]:
    sheet = Sheet(
        "Latency by the store's distance",
        ("<handler in", "workers", "delay ms", "p50 ms", "p99 ms", "p50 round trips", "p99 round trips"),
        note=f"Every request is made to take longer by the delay. From the start of an enqueue to the start of its "
        f"handler, one message at a time. Round trips are multiples of the delay; what SeaweedFS takes itself counts, "
        f"too. A worker in another process has its poll of {part['poll_s'] * 1e3:.0f} ms in them.",
        plot="performance-latency.png",
    )
    for row in part["rows"]:
        trips = [_n(row[name], 1) if row[name] is not None else "" for name in ("p50_trips", "p99_trips")]
        sheet.rows.append(
            [
                row["where"], str(row["workers"] or ""), str(row["delay_ms"]), _n(row["p50_ms"], 1),
                _n(row["p99_ms"], 1), *trips,
            ]
        )  # fmt: skip
    yield sheet


def _steady(part: Any) -> Iterator[Sheet]:
    sheet = Sheet(
        "Steady load",
        (
            "messages/s", "enqueue p50 ms", "p99 ms", "to the handler p50 ms", "p99 ms", "requests/message",
            "dollars a million",
        ),
        note="Messages enqueued one by one by one process, handled by another. All requests of both are counted, for "
        "some seconds only, so what starting takes weighs on the low rates.",
    )  # fmt: skip
    for row in part["rows"]:
        enqueue, handler = row["enqueue"], row["to_handler"]
        sheet.rows.append(
            [
                _n(row["rate"]), _n(enqueue["p50_ms"], 1), _n(enqueue["p99_ms"], 1), _n(handler["p50_ms"], 1),
                _n(handler["p99_ms"], 1), _n(row["requests_per_message"], 3), f"${row['dollars']:.2f}",
            ]
        )  # fmt: skip
    yield sheet


def _concurrency(part: Any) -> Iterator[Sheet]:
    yield Sheet(
        "Handlers at a time",
        ("concurrency", "process/s", "beside the row above"),
        [
            [str(row["concurrency"]), _n(row["process_rate"]), "" if row["ratio"] is None else _n(row["ratio"], 2)]
            for row in part["rows"]
        ],
        note=f"A backlog of {part['messages']:,} messages and one worker, from its start until all is settled and it is "
        f"gone; {part['rounds']} rounds. The last column is the median of the ratios of neighbouring runs.",
        plot="performance-load.png",
    )


def _slow(part: Any) -> Iterator[Sheet]:
    sheet = Sheet(
        "Slow handlers",
        ("a handler takes", "at a time", "messages/s", "without any queue", "part"),
        note="For about two seconds, from the worker's start until all is settled: starting and stopping are in it.",
    )
    for row in part["rows"]:
        sheet.rows.append(
            [
                f"{row['handler_s'] * 1e3:,.0f} ms", str(row["concurrency"]), _n(row["process_rate"]), _n(row["ideal"]),
                f"{row['process_rate'] / row['ideal']:.0%}",
            ]
        )  # fmt: skip
    yield sheet


def _sizes(part: Any) -> Iterator[Sheet]:
    sheet = Sheet("Payloads", ("bytes", "enqueue/s", "process/s", "enqueue MB/s", "process MB/s"))
    for row in part["rows"]:
        mb = row["payload_bytes"] / 1e6
        sheet.rows.append(
            [
                _n(row["payload_bytes"]), _n(row["enqueue_rate"]), _n(row["process_rate"]),
                _n(row["enqueue_rate"] * mb, 1), _n(row["process_rate"] * mb, 1),
            ]
        )  # fmt: skip
    yield sheet


def _mixed(part: Any) -> Iterator[Sheet]:
    rows = [[row["where"], _n(row["messages"]), _n(row["rate"])] for row in part["rows"]]
    yield Sheet(
        "Enqueueing and handling at once", ("<producer and worker in", "messages", "messages/s"), rows,
        note="Chunks of 500 and urgent single messages, until the last one is handled.",
    )  # fmt: skip


def _processes(part: Any) -> Iterator[Sheet]:
    rows = [
        [str(row["processes"]), _n(row["rate"]), ", ".join(_n(count) for count in row["handled_by_each"])]
        for row in part["rows"]
    ]
    yield Sheet(
        "Worker processes", ("processes", "messages/s, all together", "<handled by each"), rows,
        note=f"A backlog of {part['messages']:,} messages, from the word to begin to the last handler, all "
        f"included; {part['rounds']} rounds.",
    )  # fmt: skip


def _backlog(part: Any) -> Iterator[Sheet]:
    sheet = Sheet(
        "A backlog of a million",
        (
            "messages that wait", "enqueue/s", "process/s", "requests/message", "with listings", "listings and heartbeats/s",
            "worker MiB", "at most",
        ),
        note=f"{part['sample']:,} messages are enqueued, then as many processed by a new process, beside so many others, "
        f"at 50 messages a segment; {part['rounds']} rounds. The million were enqueued at {part['fill_rate']:,.0f} a "
        "second.",
    )  # fmt: skip
    for row in part["rows"]:
        sheet.rows.append(
            [
                _n(row["messages"]), _n(row["enqueue_rate"]), _n(row["process_rate"]), _n(row["own_per_message"], 4),
                _n(row["all_per_message"], 4), _n(row["upkeep_per_s"], 1), _n(row["rss_mib"]), _n(row["rss_max_mib"]),
            ]
        )  # fmt: skip
    yield sheet
    names = ("own_per_message", "paid_per_message")
    rows = [[_n(row["backlog"]), "no", *(_n(row[name], 4) for name in names)] for row in part["requests"]]
    rows += [
        ["5,000", f"yes, {row['finished']:,} in the history", *(_n(row[name], 4) for name in names)]
        for row in part["history"]
    ]
    yield Sheet(
        "Requests by backlog and history", ("backlog", "<results kept", "requests/message", "without DELETEs"), rows,
        note="Claims, segments, and history objects; listings and heartbeats come with time: the table above has them.",
    )  # fmt: skip


SHEETS: list[tuple[str, Callable[[Any], Iterator[Sheet]]]] = [
    ("bare", _bare),
    ("peers", _peers),
    ("cost", _cost),
    ("latency", _latency),
    ("concurrency", _concurrency),
    ("slow", _slow),
    ("sizes", _sizes),
    ("steady", _steady),
    ("mixed", _mixed),
    ("processes", _processes),
    ("backlog", _backlog),
]
"""The tables of each part, in the document's order."""
