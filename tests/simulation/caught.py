"""The table of docs/testing.md: which seed shows that a safeguard is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.simulation.ablations import ABLATIONS, as_drawn

DOCUMENT = Path(__file__).parents[2] / "docs" / "testing.md"
BEGIN, END = "<!-- begin: make ablations -->\n", "<!-- end: make ablations -->\n"
_ROW = re.compile(r"^\| `(?P<name>[a-z0-9-]+)` \|.*\| (?P<seeds>acted|(over )?[\d,]+)(?: \*)? \|.*$", re.MULTILINE)
_IDENTITY = re.compile(r"[0-9A-Z]{26}[-0-9a-z]*|[a-z]+\.\d+(-[0-9a-f]+)?|\b\d+(\.\d+)?\b")


@dataclass(frozen=True)
class Caught:
    """The first seed that fails without a safeguard, and how; None when no seed did."""

    ablation: str
    seed: int | None
    problem: str

    def shown(self) -> str:
        """The seed and the kind of the problem, for people."""
        return "not caught" if self.seed is None else f"seed {self.seed}: {self.problem[:200]}"

    @property
    def kind(self) -> str:
        """The problem without what is particular to the seed."""
        if self.seed is None:
            return ""
        return _IDENTITY.sub("…", self.problem.splitlines()[0]).split(":")[0][:60].strip(" '[")


def write(found: Iterable[Caught], tried: int) -> None:
    """Put these rows into the document's table; the other rows stay as they are."""
    text = DOCUMENT.read_text()
    head, rest = text.split(BEGIN)
    table, tail = rest.split(END)
    rows = {row["name"]: row.group() for row in _ROW.finditer(table)}
    for one in found:
        ablation = ABLATIONS[one.ablation]
        needed = f"over {tried:,}" if one.seed is None else f"{one.seed + 1:,}"
        if ablation.acted_by and one.seed is not None:
            rows[one.ablation] = f"| `{one.ablation}` | {ablation.safeguard} | acted | `{ablation.acted_by}` fails |"
            continue
        if ablation.focus is not as_drawn:
            needed += " *"
        rows[one.ablation] = f"| `{one.ablation}` | {ablation.safeguard} | {needed} | {one.kind} |"
    lines = ["| safeguard | what it says | seeds needed | what is found without it |", "|---|---|---|---|"]
    lines += [rows[name] for name in ABLATIONS if name in rows]
    DOCUMENT.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + tail)


def seeds() -> dict[str, int | None]:
    """The first failing seed of each ablation, as the document has it; None where none was found yet."""
    table = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]
    needed = {row["name"]: row["seeds"].replace(",", "") for row in _ROW.finditer(table)}
    return {name: _seed(text) for name, text in needed.items() if name in ABLATIONS}


def _seed(text: str) -> int | None:
    return None if text.startswith("over") else 0 if text == "acted" else int(text) - 1
