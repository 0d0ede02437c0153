"""Who gets which ticket."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from s3queue_async.errors import CorruptObject
from s3queue_async.protocol import board as boards
from s3queue_async.protocol.board import Assignment, Board, Ticket, assign
from s3queue_async.protocol.layout import Place, SegmentKey, ulid

TTL_MS = 30_000
NOW_MS = 1_700_000_000_000

workers_st = st.dictionaries(st.sampled_from([f"w{n}" for n in range(12)]), st.integers(-5, 40), max_size=12)
segments_st = st.lists(
    st.tuples(st.integers(0, 255), st.integers(0, 10_000), st.integers(1, 30)), max_size=60, unique_by=lambda s: s[1]
)


def keys(drawn: list[tuple[int, int, int]]) -> list[SegmentKey]:
    made = [SegmentKey(Place.READY, ulid(NOW_MS + age, age), count, priority) for priority, age, count in drawn]
    return sorted(made, key=lambda key: (-key.priority, key.ulid))


def run(
    segments: list[SegmentKey],
    rooms: dict[str, int],
    previous: dict[str, Ticket] | None = None,
    *,
    now_ms: int = NOW_MS,
    limit: int = 1000,
) -> Assignment:
    return assign(segments, rooms, previous or {}, now_ms=now_ms, ttl_ms=TTL_MS, limit=limit)


def by_name(assignment: Assignment) -> dict[str, Ticket]:
    return {SegmentKey.parse(ticket.key).name: ticket for ticket in assignment.tickets}


@given(segments_st, workers_st, st.integers(0, 40))
def test_each_segment_at_most_once_and_room_is_kept(
    drawn: list[tuple[int, int, int]], rooms: dict[str, int], limit: int
) -> None:
    """No segment has two tickets; a worker gets a segment only while it has room; no more than the limit."""
    segments = keys(drawn)
    got = run(segments, rooms, limit=limit).tickets
    names = [ticket.key for ticket in got]
    assert len(names) == len(set(names)) <= limit
    assert set(names) <= {key.text for key in segments}
    for worker, room in rooms.items():
        counts = [SegmentKey.parse(ticket.key).count for ticket in got if ticket.worker == worker]
        # The last segment alone may be larger than what room is left.
        assert sum(counts) - max(counts, default=0) < max(room, 1)
        if room <= 0:
            assert not counts


@given(segments_st, workers_st, st.integers(1, 40), st.data())
def test_the_most_urgent_first(
    drawn: list[tuple[int, int, int]], rooms: dict[str, int], limit: int, data: st.DataObject
) -> None:
    """What got a ticket is at least as urgent as what did not, whatever had one before; and no room stays unused."""
    segments = keys(drawn)
    holders = st.sampled_from([*rooms, "gone"])
    previous = {key.name: Ticket(key.text, data.draw(holders), NOW_MS) for key in segments if data.draw(st.booleans())}
    got = run(segments, rooms, previous, limit=limit)
    ticketed = [key for key in segments if key.name in by_name(got)]
    without = [key for key in segments if key.name not in by_name(got)]
    if ticketed and without:
        assert min(key.priority for key in ticketed) >= max(key.priority for key in without)
    if without and len(ticketed) < limit:
        left = dict(rooms)
        for ticket in got.tickets:
            left[ticket.worker] -= SegmentKey.parse(ticket.key).count
        assert all(room <= 0 for room in left.values())
    assert [ticket.key for ticket in got.tickets] == [key.text for key in ticketed]


@given(segments_st, workers_st, st.sampled_from([f"w{n}" for n in range(12)]), st.booleans())
def test_stable_under_joins_and_leaves(
    drawn: list[tuple[int, int, int]], rooms: dict[str, int], other: str, joins: bool
) -> None:
    """A worker that joins or leaves takes no ticket from another one."""
    segments = keys(drawn)
    before = by_name(run(segments, rooms))
    changed = {**rooms, other: 20} if joins else {worker: room for worker, room in rooms.items() if worker != other}
    after = by_name(run(segments, changed, before))
    for name, ticket in before.items():
        if ticket.worker not in changed or ticket.worker == other:
            continue
        if name in after:
            assert after[name].worker == ticket.worker
        else:
            # A more urgent one that the other worker had before took its place.
            priority = SegmentKey.parse(ticket.key).priority
            assert any(SegmentKey.parse(kept.key).priority > priority for kept in after.values())


@settings(max_examples=20)
@given(segments_st, workers_st)
def test_the_same_listings_give_the_same_tickets(drawn: list[tuple[int, int, int]], rooms: dict[str, int]) -> None:
    """The assignment is a pure function, and its own result is its fixed point."""
    segments = keys(drawn)
    first = run(segments, rooms)
    assert run(segments, dict(reversed(rooms.items()))) == first
    assert run(segments, rooms, by_name(first)) == first


def test_a_stalled_ticket_goes_to_another_worker() -> None:
    """A ticket that its worker left unused for its whole time is given to somebody else, and counted."""
    (key,) = keys([(0, 0, 1)])
    previous = {key.name: Ticket(key.text, "slow", NOW_MS)}
    rooms = {"slow": 50, "other": 1}
    assert run([key], rooms, previous, now_ms=NOW_MS + TTL_MS - 1).tickets[0].worker == "slow"
    later = run([key], rooms, previous, now_ms=NOW_MS + TTL_MS)
    assert later.stalled == [key.name]
    assert later.tickets == [Ticket(key.text, "other", NOW_MS + TTL_MS, stalled=True)]
    assert run([key], {"slow": 1}, previous, now_ms=NOW_MS + TTL_MS).tickets[0].worker == "slow"


def test_an_urgent_segment_takes_the_place_of_the_least_urgent_ticket() -> None:
    """Nobody has room: the ticket of the lowest priority gives way, the others stay where they are."""
    low, middle = keys([(1, 1, 5), (0, 2, 5)])
    previous = by_name(run([low, middle], {"a": 10}))
    (urgent,) = keys([(9, 3, 5)])
    got = run([urgent, low, middle], {"a": 10}, previous)
    assert [ticket.key for ticket in got.tickets] == [urgent.text, low.text]


def test_what_nobody_can_start_at_once_is_shared_evenly() -> None:
    """First to whoever can start it; of what is given ahead a fast worker with much room gets no more than others."""
    segments = keys([(0, n, 1) for n in range(40)])
    rooms = {"fast": 1000, "slow": 30, "idle": 10}
    tickets = assign(
        segments, rooms, {}, now_ms=NOW_MS, ttl_ms=TTL_MS, limit=1000, ahead={"fast": 1000, "slow": 30}
    ).tickets
    workers = [ticket.worker for ticket in tickets]
    assert workers[:10] == ["idle"] * 10
    assert (workers.count("fast"), workers.count("slow"), workers.count("idle")) == (15, 15, 10)


def test_load_is_spread_by_room() -> None:
    """Who has most room gets most tickets."""
    segments = keys([(0, n, 1) for n in range(30)])
    got = run(segments, {"large": 20, "small": 10}).tickets
    workers = [ticket.worker for ticket in got]
    assert (workers.count("large"), workers.count("small")) == (20, 10)


def test_orphans_are_marked() -> None:
    """The ticket of a segment whose claim nobody holds says so, also when it was given before."""
    (key,) = keys([(0, 0, 1)])
    first = run([key], {"a": 1})
    got = assign(
        [key], {"a": 1}, by_name(first), orphans=frozenset([key.name]), now_ms=NOW_MS + 5, ttl_ms=TTL_MS, limit=10
    )
    assert got.tickets == [Ticket(key.text, "a", NOW_MS, orphan=True)]


def test_board_survives_its_bytes() -> None:
    """A board is read as it was written; anything else is a damaged object that names its key."""
    board = Board("n", 3, "me", "leading", 15.0, 0.1, True, [Ticket("ready/255/x-1", "w", 7, True)], {"w": 3})
    assert boards.decode("k", boards.encode(board)) == board
    with pytest.raises(CorruptObject, match="k"):
        boards.decode("k", b"{}")
