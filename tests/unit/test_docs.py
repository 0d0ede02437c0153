"""The documents say what the code does: their programs run, and no setting, field or key is missing or different."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from s3queue_async import MetricsSnapshot, Settings
from s3queue_async.engine.config import QueueConfig
from s3queue_async.engine.dedup import Marker
from s3queue_async.engine.registry import Heartbeat, Sums
from s3queue_async.engine.settler import HistoryRecord
from s3queue_async.engine.tombstones import Tombstone
from s3queue_async.figures import FIGURES, LATENCIES
from s3queue_async.metrics import DOLLARS_PER_MILLION
from s3queue_async.middleware.idempotency import Completed
from s3queue_async.protocol import segment
from s3queue_async.protocol.board import Board
from s3queue_async.protocol.claim import Claim, Move
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.protocol.wrapping import Envelope
from s3queue_async.scheduling.timetable import Definition, Timetable
from s3queue_async.settings import CHOICES, RANGES, SEGMENT_MESSAGES_LIMIT
from s3queue_async.storage.open import _S3_OPTIONS, _SQLITE_OPTIONS
from s3queue_async.storage.s3 import S3Storage
from s3queue_async.storage.sqlite import SqliteStorage

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
UNITS = {
    "s": 1, "min": 60, "h": 3600, "d": 86400, "y": 365 * 86400, "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)


def programs() -> list[Any]:
    return [
        pytest.param(block, id=f"{name}-{number}")
        for name in PAGES
        for number, block in enumerate(blocks(name, "python"))
    ]


@pytest.mark.integration
@pytest.mark.parametrize("program", programs())
def test_programs_run(program: str, tmp_path: Path) -> None:
    """Each block of Python in the documents runs as it is, without a warning."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("S3QUEUE_")}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr


def test_readme_begins_with_a_program() -> None:
    """The first program comes within the first screen."""
    assert page("README.md").splitlines().index("```python") < 12


@pytest.mark.integration
def test_first_program_of_the_readme(tmp_path: Path) -> None:
    """It handles its four messages."""
    program = blocks("README.md", "python")[0]
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert sorted(ended.stdout.split()) == ["Hello", "from", "queue", "the"]


def setting_rows() -> dict[str, tuple[str, str]]:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", page("docs/configuration.md"), re.MULTILINE)
    return {name: (default, allowed) for name, default, allowed in rows}


def number(text: str) -> float:
    digits, _, unit = text.replace(",", "").partition(" ")
    return float(digits) * UNITS.get(unit, 1)


def test_every_setting_is_documented() -> None:
    """docs/configuration.md has every setting, and no other."""
    assert setting_rows().keys() == set(Settings.__struct_fields__)


@pytest.mark.parametrize("name", Settings.__struct_fields__)
def test_documented_default_and_range(name: str) -> None:
    """The default and the range of each setting are those that the code has."""
    default, allowed = setting_rows()[name]
    real = getattr(Settings(), name)
    if isinstance(real, bool) or real is None:
        assert default == str(real)
    else:
        assert number(default) == real
    if name in CHOICES:
        assert allowed == ", or ".join(
            "None" if choice is None else f"`{choice}`" for choice in reversed(CHOICES[name])
        )
        return
    if isinstance(real, bool):
        assert allowed == "True or False"
        return
    limits = RANGES[name]
    low, _, high = allowed.removesuffix(", or None").partition(" to ")
    assert (number(low), number(high)) == (limits.low, limits.high)
    assert allowed.endswith(", or None") == limits.optional


def test_every_setting_is_used() -> None:
    """There is no setting that nothing reads."""
    sources = [path for path in (ROOT / "s3queue_async").rglob("*.py") if path.name != "settings.py"]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    assert {name for name in Settings.__struct_fields__ if not re.search(rf"settings\.{name}\b", code)} == set()


def test_every_figure_is_documented() -> None:
    """docs/metrics.md has each field of a snapshot, with the name that Prometheus knows it by."""
    tables = page("docs/metrics.md").split("## Prometheus")
    rows = [dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)) for table in tables]
    assert rows[0].keys() == set(MetricsSnapshot.__struct_fields__)
    names = {figure.field: figure.name + ("_total" if figure.kind == "counter" else "") for figure in FIGURES}
    names |= {field: name for field, (name, _) in LATENCIES.items()}
    assert {field: re.findall(r"s3queue_(\w+)", row)[0] for field, row in rows[1].items()} == names
    alerts = tables[1].partition("## What to alert on")[2]
    used = {re.sub("_(count|sum)$", "", name) for name in re.findall(r"s3queue_(\w+)", alerts)}
    assert used <= set(names.values())


def test_the_price_of_counting() -> None:
    """What docs/metrics.md says that counting the backlog costs is what three listings an interval cost."""
    intervals = 30 * 24 * 3600 / Settings().metrics_interval
    text = page("docs/metrics.md")
    assert f"{3 * intervals:,.0f} LIST in 30 days, or ${3 * intervals * DOLLARS_PER_MILLION['list'] / 1e6:.2f}" in text
    at_30_s = 3 * (30 * 24 * 3600 / 30) * DOLLARS_PER_MILLION["list"] / 1e6
    assert f"At 30 s that is ${at_30_s:.2f} in 30 days" in page("docs/kubernetes.md")


def test_the_manifests() -> None:
    """The manifests parse, their variables are settings or the examples' own, and there is time to drain."""
    manifests = [part for block in blocks("docs/kubernetes.md", "yaml") for part in yaml.safe_load_all(block)]
    pods = [part["spec"]["template"]["spec"] for part in manifests if part.get("kind") == "Deployment"]
    assert len(pods) == 2
    for pod in pods:
        (container,) = pod["containers"]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        program = (ROOT / f"{container['command'][2].replace('.', '/')}.py").read_text(encoding="utf-8")
        settings = Settings().with_environment(environment)
        assert settings.drain_timeout * 1.5 <= pod.get("terminationGracePeriodSeconds", settings.drain_timeout * 2)
        for name in environment.keys() - {f"S3QUEUE_{name.upper()}" for name in Settings.__struct_fields__}:
            assert f'"{name}"' in program
        (port,) = container["ports"]
        assert str(port["containerPort"]) in environment.values()
        for probe in ("livenessProbe", "readinessProbe"):
            assert container[probe]["httpGet"]["port"] == port["name"]


def test_url_parameters_are_documented() -> None:
    """Each url parameter has its row, with the default that the code has."""
    text = page("docs/configuration.md")
    schemes: list[tuple[str, Any, Any]] = [("s3", _S3_OPTIONS, S3Storage), ("sqlite", _SQLITE_OPTIONS, SqliteStorage)]
    for scheme, options, storage in schemes:
        table = text.partition(f"| parameter of `{scheme}:` |")[2].partition("\n\n")[0]
        rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
        assert rows.keys() == options.keys()
        parameters = inspect.signature(storage).parameters
        for name, (argument, _) in options.items():
            default = parameters[argument].default
            if default is not None:
                assert rows[name].strip("`") == (f"{default:g}" if isinstance(default, float) else str(default).lower())


def test_layout_names_every_field() -> None:
    """Each field of each object stands in docs/object_layout.md."""
    text = page("docs/object_layout.md")
    for kind in (QueueConfig, segment.Index, segment.Record, segment.Failure, Envelope, Claim, Move, Heartbeat, Marker,
                 Sums, Tombstone, HistoryRecord, Timetable, Definition, Completed):  # fmt: skip
        missing = [name for name in kind.__struct_fields__ if not re.search(rf'[`" \[]{name}[`",\]]', text)]
        assert not missing, kind


def test_layout_examples_are_read_by_the_code() -> None:
    """Each JSON example is an object as the code writes it."""
    kinds: list[Any] = [
        QueueConfig, segment.Index, Claim, Heartbeat, Board, Marker, Timetable, Sums, Tombstone, list[HistoryRecord],
    ]  # fmt: skip
    seen: set[Any] = set()
    for block in blocks("docs/object_layout.md", "json"):
        found = [kind for kind in kinds if _reads(block, kind)]
        assert found, block
        seen.update(str(kind) for kind in found)
    assert seen == {str(kind) for kind in kinds}


def _reads(block: str, kind: Any) -> bool:
    try:
        value = msgspec.json.decode(block, type=kind)
    except msgspec.ValidationError:
        return False
    # Every field of the example must be one that the code knows, too.
    return isinstance(value, list) or msgspec.json.decode(block).keys() <= set(type(value).__struct_fields__)


def test_layout_keys_and_head() -> None:
    """The keys parse, and the head says what the table says."""
    text = page("docs/object_layout.md")
    keys = re.findall(r"^((?:ready|delayed|dead)/\S+-\d+) ", text, re.MULTILINE)
    assert [SegmentKey.parse(key).place for key in keys] == ["ready", "delayed", "dead"]
    head = bytes.fromhex(re.findall(r"^(53 33 51 53 .*)$", text, re.MULTILINE)[0])
    magic, version, flags, reserved, index_length, _, length, _ = segment.HEAD.unpack(head)
    assert (magic, version, flags, reserved) == (segment.MAGIC, segment.FORMAT_VERSION, 0, 0)
    assert f"| 8-11 | {index_length} |" in text
    assert f"| 16-19 | {length} |" in text


def test_limits_of_the_readme() -> None:
    """Limits that the README names are those of the code."""
    assert f"{SEGMENT_MESSAGES_LIMIT:,}" in page("docs/configuration.md")
    settings = Settings()
    assert settings.visibility_timeout + settings.lease_margin + 1 == 33
    assert "noticed after 33 s" in page("README.md")


def test_guarantee_is_the_same_everywhere() -> None:
    """The README and the design promise the same, word for word."""
    promise = page("docs/design.md").partition("## The guarantee\n\n")[2].partition("\n\n## ")[0]
    assert promise
    assert promise in page("README.md")


@pytest.mark.parametrize("name", PAGES)
def test_links(name: str) -> None:
    """Each link to a file of the project leads to one, and to a heading that is there."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if heading:
            anchors = [
                re.sub(r"[^\w\- ]", "", line.lstrip("#").strip().lower()).replace(" ", "-")
                for line in file.read_text(encoding="utf-8").splitlines()
                if line.startswith("#")
            ]
            assert heading in anchors, target
