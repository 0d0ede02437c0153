"""The table of docs/testing.md: which seed shows that a safeguard is missing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.simulation.ablations import ABLATIONS, as_drawn

DOCUMENT = Path(__file__).parents[2] / "docs" / "testing.md"
BEGIN, END = "<!-- begin: make ablations -->\n", "<!-- end: make ablations -->\n"
_ROW = re.compile(r"^\| `(?P<name>[a-z0-9-]+)` \|.*\| (?P<seeds>[\d,]+)(?: \*)? \|", re.MULTILINE)
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
        return _IDENTITY.sub("…", self.problem.splitlines()[-1]).split(":")[0][:60].strip(" '[")


def write(found: Iterable[Caught]) -> None:
    """Put the table into the document."""
    rows = {one.ablation: one for one in found}
    lines = ["| safeguard | what it says | seeds needed | what is found without it |", "|---|---|---|---|"]
    for name, ablation in ABLATIONS.items():
        one = rows[name]
        needed = "not caught" if one.seed is None else f"{one.seed + 1:,}"
        if ablation.focus is not as_drawn:
            needed += " *"
        lines.append(f"| `{name}` | {ablation.safeguard} | {needed} | {one.kind if one.problem else ''} |")
    text = DOCUMENT.read_text()
    head, rest = text.split(BEGIN)
    _, tail = rest.split(END)
    DOCUMENT.write_text(head + BEGIN + "\n".join(lines) + "\n" + END + tail)


def seeds() -> dict[str, int]:
    """The first failing seed of each ablation, as the document has it."""
    table = DOCUMENT.read_text().split(BEGIN)[1].split(END)[0]
    return {row["name"]: int(row["seeds"].replace(",", "")) - 1 for row in _ROW.finditer(table)}
