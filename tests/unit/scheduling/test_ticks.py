"""When schedules are due: by arithmetic, and by cron in time zones whose clocks are put forward and back."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3queue_async.errors import InvalidSettings
from s3queue_async.scheduling.ticks import Cron, Every, Ticks, latest

BERLIN, NEW_YORK, LORD_HOWE = "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"


def ms(text: str, zone: str = "UTC") -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp() * 1000)


def utc(ticks: Ticks, start: str, end: str, zone: str) -> list[str]:
    """The ticks between two local times, as hours and minutes in UTC."""
    until = ms(end, zone)
    found = takewhile(lambda tick: tick <= until, ticks.after(ms(start, zone)))
    return [datetime.fromtimestamp(tick / 1000, UTC).strftime("%d %H:%M") for tick in found]


@pytest.mark.parametrize(
    ("expression", "zone", "start", "end", "expected"),
    [
        # Berlin, spring: 02:00 to 03:00 of 2026-03-29 is left out. What was due then is due at 03:00.
        ("30 2 * * *", BERLIN, "2026-03-28 00:00", "2026-03-30 23:00", ["28 01:30", "29 01:00", "30 00:30"]),
        ("0 3 * * *", BERLIN, "2026-03-28 00:00", "2026-03-30 23:00", ["28 02:00", "29 01:00", "30 01:00"]),
        ("0 * * * *", BERLIN, "2026-03-29 00:30", "2026-03-29 04:30", ["29 00:00", "29 01:00", "29 02:00"]),
        # Berlin, autumn: 02:00 to 03:00 of 2026-10-25 comes twice. What is due then is due the first time.
        ("30 2 * * *", BERLIN, "2026-10-24 00:00", "2026-10-26 23:00", ["24 00:30", "25 00:30", "26 01:30"]),
        ("0 3 * * *", BERLIN, "2026-10-24 00:00", "2026-10-26 23:00", ["24 01:00", "25 02:00", "26 02:00"]),
        ("0 * * * *", BERLIN, "2026-10-25 00:30", "2026-10-25 04:00",
         ["24 23:00", "25 00:00", "25 01:00", "25 02:00", "25 03:00"]),
        # New York: 2026-03-08 and 2026-11-01.
        ("15 2 * * *", NEW_YORK, "2026-03-07 00:00", "2026-03-09 23:00", ["07 07:15", "08 07:00", "09 06:15"]),
        ("15 1 * * *", NEW_YORK, "2026-10-31 00:00", "2026-11-02 23:00", ["31 05:15", "01 05:15", "02 06:15"]),
        ("*/30 1 * * *", NEW_YORK, "2026-11-01 00:00", "2026-11-01 23:00",
         ["01 05:00", "01 05:30", "01 06:00", "01 06:30"]),
        # Half an hour, on Lord Howe: 2026-10-04 and 2026-04-05.
        ("15 2 * * *", LORD_HOWE, "2026-10-03 00:00", "2026-10-05 23:00", ["02 15:45", "03 15:30", "04 15:15"]),
        ("45 1 * * *", LORD_HOWE, "2026-04-04 00:00", "2026-04-06 23:00", ["03 14:45", "04 14:45", "05 15:15"]),
        ("0 0 L * *", "UTC", "2026-01-01 00:00", "2026-03-01 00:00", ["31 00:00", "28 00:00"]),
    ],
)  # fmt: skip
def test_cron_over_clock_changes(expression: str, zone: str, start: str, end: str, expected: list[str]) -> None:
    """Each is due as with Debian's cron: left out hours are made up for, doubled ones count once, intervals go on."""
    assert utc(Cron(expression, zone), start, end, zone) == expected


def test_made_in_the_hour_that_comes_twice() -> None:
    """Scheduled at 02:10 of the second time round, 02:30 was due an hour ago: it is due the next day."""
    made = ms("2026-10-25 01:10")
    first = next(Cron("30 2 * * *", BERLIN).after(made))
    assert first == ms("2026-10-26 01:30")


def test_seconds_and_milliseconds() -> None:
    """Six fields begin with seconds; a tick is after a moment when it is by a millisecond."""
    ticks = Cron("*/20 * * * * *", "UTC")
    noon = ms("2026-01-01 12:00")
    assert list(islice(ticks.after(noon), 2)) == [noon + 20_000, noon + 40_000]
    assert next(ticks.after(noon - 1)) == noon
    assert next(ticks.after(noon + 1)) == noon + 20_000


EXPRESSIONS = ["30 2 * * *", "0,30 2 * * *", "*/7 * * * *", "0 3 * * 1-5", "17 1,2,3 * * *", "*/20 * * * * *"]


@given(
    expression=st.sampled_from(EXPRESSIONS),
    zone=st.sampled_from([BERLIN, NEW_YORK, LORD_HOWE]),
    day=st.sampled_from(["2026-03-08", "2026-03-29", "2026-04-05", "2026-10-04", "2026-10-25", "2026-11-01"]),
    begin_s=st.integers(-86_400, 0),
    cut_s=st.integers(0, 86_400),
)
def test_where_the_search_begins_does_not_matter(
    expression: str, zone: str, day: str, begin_s: int, cut_s: int
) -> None:
    """The ticks after a later moment are those after an earlier one, less those in between: none twice, none lost."""
    ticks = Cron(expression, zone)
    begin = ms(day) + begin_s * 1000
    cut = begin + cut_s * 1000
    end = cut + 2 * 3600_000
    whole = list(takewhile(lambda tick: tick <= end, ticks.after(begin)))
    rest = list(takewhile(lambda tick: tick <= end, ticks.after(cut)))
    assert rest == [tick for tick in whole if tick > cut]
    assert whole == sorted(set(whole))


@given(
    every_ms=st.integers(1000, 10_000_000),
    anchor=st.integers(0, 10**12),
    after=st.integers(-(10**9), 10**9),
)
def test_every(every_ms: int, anchor: int, after: int) -> None:
    """The first tick is one interval after the anchor, each later one an interval after the one before."""
    first, second = islice(Every(every_ms, anchor).after(anchor + after), 2)
    assert first > anchor + after
    assert first >= anchor + every_ms
    assert (first - anchor) % every_ms == 0
    assert first - every_ms <= max(anchor + after, anchor)
    assert second == first + every_ms


@given(
    expression=st.sampled_from([*EXPRESSIONS, "0 0 1 * *"]),
    after_s=st.integers(0, 5 * 86_400),
    length_s=st.integers(0, 3 * 86_400),
)
def test_latest(expression: str, after_s: int, length_s: int) -> None:
    """The last tick of a span is found from its end."""
    ticks = Cron(expression, BERLIN)
    after = ms("2026-03-27") + after_s * 1000
    until = after + length_s * 1000
    span = list(takewhile(lambda tick: tick <= until, islice(ticks.after(after), 20_000)))
    assert latest(ticks, after_ms=after, until_ms=until) == (span[-1] if span else None)


def test_latest_of_a_month_of_seconds() -> None:
    """It does not count through all of a month's seconds: a fraction of a second, not minutes."""
    ticks = Cron("* * * * * *", "UTC")
    until = ms("2026-06-01") + 500
    month = int(timedelta(days=30).total_seconds() * 1000)
    assert latest(_Counted(ticks), after_ms=until - month, until_ms=until) == until - 500
    assert _Counted.count < 100


class _Counted:
    count = 0

    def __init__(self, ticks: Ticks) -> None:
        self.ticks = ticks

    def after(self, moment_ms: int) -> Iterator[int]:
        for tick in self.ticks.after(moment_ms):
            _Counted.count += 1
            yield tick


@pytest.mark.parametrize(
    ("expression", "zone", "named"),
    [
        ("0 3 * *", "UTC", "Wrong number of fields"),
        ("61 * * * *", "UTC", "Bad minute"),
        ("", "UTC", "Wrong number of fields"),
        ("0 3 * * *", "Europe/Bonn", "Europe/Bonn"),
        ("0 3 * * *", "../etc/passwd", "timezone"),
        ("0 3 * * *", "", "timezone"),
        ("0 3 30 2 *", "UTC", "Bad day-of-month"),
    ],
)
def test_what_cannot_be_understood(expression: str, zone: str, named: str) -> None:
    """The error names what is wrong and says what to write instead."""
    with pytest.raises(InvalidSettings, match=named) as caught:
        Cron(expression, zone)
    assert caught.value.suggestion


def test_what_never_comes() -> None:
    """An expression that matches no day has no tick at all."""
    assert list(Cron("* * */20 * 1L", "UTC").after(ms("2020-01-01"))) == []
