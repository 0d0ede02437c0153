"""The pictures of docs/performance.md, from the figures of a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

DPI = 110
OURS, THEIRS = "#1b6ca8", "#b0b7bf"


def draw(parts: dict[str, Any], directory: Path) -> list[Path]:
    """Draw what there are figures for; returns the files."""
    drawn = []
    for name, needs, make in PLOTS:
        if all(part in parts for part in needs):
            figure = make(parts)
            path = directory / name
            figure.tight_layout()
            figure.savefig(path, dpi=DPI, metadata={"Software": None})
            pyplot.close(figure)
            drawn.append(path)
    return drawn


def _peers(parts: dict[str, Any]) -> Any:
    rows = parts["peers"]["rows"][::-1]
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 0.5 * len(rows) + 1.4), sharey=True)
    for axis, rate, title in zip(axes, ("enqueue_rate", "process_rate"), ("enqueued", "processed"), strict=True):
        names = [f"{row['name']} ({row['store']})" for row in rows]
        bars = axis.barh(names, [row[rate] for row in rows], color=[OURS if row["ours"] else THEIRS for row in rows])
        axis.bar_label(bars, [f"{row[rate]:,.0f}" for row in rows], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.margins(x=0.25)
        axis.set_title(f"messages {title} a second")
    return figure


def _cost(parts: dict[str, Any]) -> Any:
    part = parts["cost"]
    figure, axis = pyplot.subplots(figsize=(7, 4))
    sizes = [row["per_segment"] for row in part["rows"]]
    axis.plot(sizes, [row["dollars"] for row in part["rows"]], "o-", color=OURS, label="s3queue_async on S3")
    for name, style in (("single", "--"), ("batched", ":")):
        axis.axhline(
            part["sqs"][name], color="#555555", linestyle=style, label=f"SQS, {name}: ${part['sqs'][name]:.2f}"
        )
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("messages a segment")
    axis.set_title("dollars a million messages, list prices")
    axis.grid(visible=True, alpha=0.3)
    axis.legend()
    return figure


def _latency(parts: dict[str, Any]) -> Any:
    figure, axis = pyplot.subplots(figsize=(7, 4))
    rows = parts["latency"]["rows"]
    for where, number, label in (
        ("same process", 0, "same process"),
        ("another process", 1, "another process"),
    ):
        chosen = [row for row in rows if row["where"] == where and row["workers"] == number]
        line = axis.plot([row["delay_ms"] for row in chosen], [row["p50_ms"] for row in chosen], "o-", label=label)
        axis.plot(
            [row["delay_ms"] for row in chosen], [row["p99_ms"] for row in chosen], ":", color=line[0].get_color()
        )
    axis.set_xlabel("delay of every request, ms")
    axis.set_title("from enqueue to handler, ms: p50, and p99 dotted")
    axis.set_ylim(bottom=0)
    axis.grid(visible=True, alpha=0.3)
    axis.legend()
    return figure


def _load(parts: dict[str, Any]) -> Any:
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.4))
    kinds = (
        ("concurrency", "handlers at a time", "concurrency", "process_rate"),
        ("processes", "worker processes", "processes", "rate"),
        ("backlog", "messages that wait", "messages", "process_rate"),
    )
    for axis, (part, title, name, rate) in zip(axes, kinds, strict=True):
        rows = parts[part]["rows"]
        bars = axis.bar([f"{row[name]:,}" for row in rows], [row[rate] for row in rows], color=OURS, width=0.6)
        axis.bar_label(bars, [f"{row[rate]:,.0f}" for row in rows], fontsize=8)
        axis.set_xlabel(title)
    axes[0].set_title("messages processed a second")
    return figure


PLOTS: list[tuple[str, tuple[str, ...], Callable[[dict[str, Any]], Any]]] = [
    ("performance-peers.png", ("peers",), _peers),
    ("performance-cost.png", ("cost",), _cost),
    ("performance-latency.png", ("latency",), _latency),
    ("performance-load.png", ("concurrency", "processes", "backlog"), _load),
]
"""File, the parts that it needs, and what draws it."""
