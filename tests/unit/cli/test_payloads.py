"""Payloads as JSON, without loss; durations and moments as people write and read them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import click
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3queue_async.cli.common import Moment, Seconds
from s3queue_async.cli.screen import number, payload_fields, payload_of, preview, span

NOW = 1_800_000_000.0

anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), parts, max_size=4),
    max_leaves=12,
)


@given(anything)
def test_nothing_is_lost(payload: Any) -> None:
    """Any payload that a queue can hold comes back the same through a line of JSON."""
    stored = payload if isinstance(payload, bytes) else msgspec.msgpack.decode(msgspec.msgpack.encode(payload))
    line = msgspec.json.encode(payload_fields(stored))
    again = payload_of(msgspec.json.decode(line))
    # As bytes, because a NaN is not equal to itself.
    assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(stored)


def test_readable_where_it_can_be() -> None:
    """What JSON has is there as itself."""
    assert payload_fields({"a": [1, None, "x"]}) == {"payload": {"a": [1, None, "x"]}}
    assert payload_fields(b"\x00") == {"payload_base64": "AA=="}
    assert list(payload_fields({"a": b"x"})) == ["payload_msgpack"]
    assert list(payload_fields({1: "x"})) == ["payload_msgpack"]


@pytest.mark.parametrize("fields", [{}, {"payload_base64": "%"}, {"payload_msgpack": "/w"}, {"id": "x"}])
def test_no_payload(fields: dict[str, Any]) -> None:
    """Fields that name no payload, or damage one, are refused."""
    with pytest.raises((ValueError, msgspec.DecodeError)):
        payload_of(fields)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2", 2), ("1.5", 1.5), ("250ms", 0.25), ("3 min", 180), ("2m", 120), ("1h", 3600), ("2d", 172800), ("1w", 604800)],
)  # fmt: skip
def test_durations(text: str, seconds: float) -> None:
    """Seconds, or a number with a unit."""
    assert Seconds().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "-1", "1y", "soon", "1h30", "nan"])
def test_no_durations(text: str) -> None:
    """Anything else is refused by name."""
    with pytest.raises(click.BadParameter, match="is no duration"):
        Seconds().convert(text, None, None)


def test_moments() -> None:
    """ISO 8601 with or without a zone (UTC then), or a duration from now, back or ahead."""
    now = datetime.fromtimestamp(NOW, UTC)
    back, ahead = Moment(lambda: NOW, ago=True), Moment(lambda: NOW, ago=False)
    assert back.convert("2h", None, None) == now - timedelta(hours=2)
    assert ahead.convert("90", None, None) == now + timedelta(seconds=90)
    assert back.convert("2026-01-31T12:00:00", None, None) == datetime(2026, 1, 31, 12, tzinfo=UTC)
    assert back.convert("2026-01-31T12:00:00+02:00", None, None) == datetime(2026, 1, 31, 10, tzinfo=UTC)
    with pytest.raises(click.BadParameter, match="is no time"):
        back.convert("yesterday", None, None)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.0123, "12.3 ms"), (5, "5 s"), (119, "119 s"), (3600, "60 min"), (86400, "24 h"), (864000, "10.0 d")],
)  # fmt: skip
def test_spans(seconds: float | None, text: str) -> None:
    """Durations for people."""
    assert span(seconds) == text


def test_numbers_and_previews() -> None:
    """Counts with separators, rates with three digits; a payload in one line of bounded length."""
    assert [number(value) for value in (0, 7, 1234567, 0.123456, 12.345, 123.4)] == [
        "0", "7", "1,234,567", "0.123", "12.3", "123",
    ]  # fmt: skip
    assert preview({"a": "x" * 500}).endswith("…")
    assert len(preview({"a": "x" * 500})) == 100
    assert preview("two\nlines") == "two lines"
    assert preview(b"abc") == "3 bytes: b'abc'"
