"""Keys: what is printed is read back, LIST order is the order of work, and nothing else passes for a key."""

from datetime import UTC, datetime

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from s3queue_async.protocol import layout
from s3queue_async.protocol.layout import Place, SegmentKey

TIME_MS_MAX = 2**48 - 1
DUE_MS_MAX = 10**14 - 1
ULID = "01ARZ3NDEKTSV4RRFFQ69G5FAV"

times_ms = st.integers(0, TIME_MS_MAX)
randomness = st.integers(0, 2**80 - 1)
ulids = st.builds(layout.ulid, times_ms, randomness)
counts = st.integers(1, 10**6)
priorities = st.integers(0, 255)
dues_ms = st.integers(0, DUE_MS_MAX)

ready_keys = st.builds(SegmentKey, st.just(Place.READY), ulids, counts, priorities)
delayed_keys = st.builds(SegmentKey, st.just(Place.DELAYED), ulids, counts, priorities, dues_ms)
dead_keys = st.builds(SegmentKey, st.just(Place.DEAD), ulids, counts)
segment_keys = ready_keys | delayed_keys | dead_keys


def list_order(keys: list[SegmentKey]) -> list[SegmentKey]:
    """The keys as a store lists them: by their UTF-8 bytes."""
    return sorted(keys, key=lambda key: key.text.encode())


class TestUlid:
    @given(times_ms, randomness)
    def test_time_is_read_back(self, time_ms: int, chance: int) -> None:
        """A ULID's time is the one that it was made with."""
        assert layout.ulid_time_ms(layout.ulid(time_ms, chance)) == time_ms

    @given(st.tuples(times_ms, randomness), st.tuples(times_ms, randomness))
    def test_sorts_by_time_then_chance(self, one: tuple[int, int], other: tuple[int, int]) -> None:
        """ULIDs as text sort like (time, randomness), and different ones have different texts."""
        assert (layout.ulid(*one) < layout.ulid(*other)) == (one < other)
        assert (layout.ulid(*one) == layout.ulid(*other)) == (one == other)

    @given(times_ms, randomness, st.integers(1, 2**40))
    def test_more_than_80_random_bits_leave_the_time_alone(self, time_ms: int, chance: int, excess: int) -> None:
        """Randomness beyond 80 bits is cut off; it never leaks into the time."""
        assert layout.ulid(time_ms, chance + (excess << 80)) == layout.ulid(time_ms, chance)

    def test_known_value(self) -> None:
        """The ULID specification's example has the time that the specification gives."""
        assert layout.ulid_time_ms("01ARZ3NDEKTSV4RRFFQ69G5FAV") == 1469922850259

    @pytest.mark.parametrize(
        "text",
        ["", ULID[:-1], ULID + "0", ULID.lower(), "8" + ULID[1:], "-" + ULID[1:], ULID[:-1] + "U", "O" + ULID[1:]],
    )
    def test_anything_else_is_refused(self, text: str) -> None:
        """A text of another length or with letters outside of Crockford's alphabet is no ULID."""
        with pytest.raises(ValueError, match="not a ULID"):
            layout.ulid_time_ms(text)

    @given(ulids, st.integers(0, 25), st.characters())
    def test_a_damaged_letter_is_refused_or_canonical(self, text: str, place: int, letter: str) -> None:
        """Whatever is accepted is spelled in the one canonical way: from its own time upwards, upper case only."""
        damaged = text[:place] + letter + text[place + 1 :]
        try:
            time_ms = layout.ulid_time_ms(damaged)
        except ValueError:
            return
        assert damaged[:10] == layout.ulid(time_ms, 0)[:10]


class TestSegmentKey:
    @given(segment_keys)
    def test_round_trip(self, key: SegmentKey) -> None:
        """A printed key is read back as what it was printed from."""
        assert SegmentKey.parse(key.text) == key

    @given(times_ms, randomness, counts)
    def test_name_tells_age_and_count(self, time_ms: int, chance: int, count: int) -> None:
        """A backlog's size and age are counted from names alone."""
        key = SegmentKey(Place.READY, layout.ulid(time_ms, chance), count)
        assert layout.parse_name(key.name) == (key.ulid, count)
        assert key.created_ms == time_ms

    @given(segment_keys)
    def test_the_claim_has_the_same_key_wherever_the_segment_lives(self, key: SegmentKey) -> None:
        """A segment's claim is named by the segment's name alone."""
        assert layout.claim_name(key.claim) == key.name
        assert key.claim.startswith(layout.CLAIMS)
        assert SegmentKey(Place.DEAD, key.ulid, key.count).claim == key.claim

    @given(st.lists(ready_keys, max_size=8))
    def test_ready_segments_list_by_priority_then_age(self, keys: list[SegmentKey]) -> None:
        """LIST gives the highest priority first, and within it the oldest first."""
        listed = [(-key.priority, key.created_ms) for key in list_order(keys)]
        assert listed == sorted(listed)

    @given(st.lists(delayed_keys, max_size=8))
    def test_delayed_segments_list_by_due_time_then_priority_then_age(self, keys: list[SegmentKey]) -> None:
        """LIST gives what is due first; of the same due time, the highest priority and then the oldest."""
        listed = [(key.due_ms, -key.priority, key.created_ms) for key in list_order(keys)]
        assert listed == sorted(listed)

    @given(delayed_keys, st.integers(0, DUE_MS_MAX - 1), st.integers(-2, 2))
    def test_due_bound_separates_due_from_not_due(self, key: SegmentKey, time_ms: int, near: int) -> None:
        """A delayed segment sorts before the bound exactly when it is due."""
        for now_ms in (time_ms, min(max(key.due_ms + near, 0), DUE_MS_MAX - 1)):
            assert (key.text < layout.due_bound(now_ms)) == (key.due_ms <= now_ms)

    @given(ready_keys, priorities)
    def test_ready_prefix_selects_one_priority(self, key: SegmentKey, priority: int) -> None:
        """A ready segment starts with a priority's prefix exactly when it has that priority."""
        assert key.text.startswith(layout.ready_prefix(priority)) == (key.priority == priority)

    @given(segment_keys)
    def test_prefixes_do_not_overlap(self, key: SegmentKey) -> None:
        """A key is found under its own place's prefix and under no other."""
        prefixes = [layout.READY, layout.DELAYED, layout.DEAD, layout.CLAIMS, layout.HISTORY, layout.QUARANTINE]
        assert [prefix for prefix in prefixes if key.text.startswith(prefix)] == [f"{key.place}/"]

    @given(segment_keys)
    def test_a_key_in_quarantine_is_no_segment(self, key: SegmentKey) -> None:
        """The copy of a corrupt segment is never taken for a segment."""
        with pytest.raises(ValueError, match="names no segment"):
            SegmentKey.parse(layout.quarantine_key(key.text))

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "queue.json",
            "ready",
            "ready/",
            f"ready/{ULID}-1",
            f"ready/00/{ULID}-1",
            f"ready/256/{ULID}-1",
            f"ready/-01/{ULID}-1",
            f"ready/+01/{ULID}-1",
            f"ready/000/{ULID}",
            f"ready/000/{ULID}-",
            f"ready/000/{ULID}-0",
            f"ready/000/{ULID}-01",
            f"ready/000/{ULID}--1",
            f"ready/000/{ULID}-1x",
            f"ready/000/{ULID}-1/",
            f"ready/000/x/{ULID}-1",
            f"ready/000/{ULID[:-1]}-1",
            f"Ready/000/{ULID}-1",
            f"delayed/000/{ULID}-1",
            f"delayed/1700000000000-000-{ULID}-1",
            f"delayed/01700000000000-000/{ULID}-1",
            f"delayed/0170000000000x-000-{ULID}-1",
            f"delayed/01700000000000-{ULID}-1",
            f"dead/000/{ULID}-1",
            f"claims/{ULID}-1",
            f"quarantine/ready/000/{ULID}-1",
        ],
    )
    def test_bad_keys_are_refused(self, key: str) -> None:
        """What was not printed by this module is no segment, however near it comes."""
        with pytest.raises(ValueError, match=r"names no segment|not a ULID"):
            SegmentKey.parse(key)

    @given(st.text(max_size=60) | st.from_regex(r"(ready/\d{3}/|delayed/\d{14}-\d{3}-|dead/)[0-9A-Z]{26}-\d+"))
    @example(f"ready/\u0660\u0660\u0660/{ULID}-1")
    @example(f"delayed/0170000000000\u0660-000-{ULID}-1")
    def test_what_is_accepted_is_canonical(self, text: str) -> None:
        """A key that is accepted prints back to itself: one segment never has two keys."""
        try:
            key = SegmentKey.parse(text)
        except ValueError:
            return
        assert key.text == text

    @given(segment_keys, st.data())
    def test_a_damaged_key_is_refused_or_another_key(self, key: SegmentKey, data: st.DataObject) -> None:
        """A key with one character replaced is refused or names another segment, never the same one."""
        text = key.text
        place = data.draw(st.integers(0, len(text) - 1))
        letter = data.draw(st.characters())
        assume(letter != text[place])
        try:
            other = SegmentKey.parse(text[:place] + letter + text[place + 1 :])
        except ValueError:
            return
        assert other != key

    @pytest.mark.parametrize("due_ms", [DUE_MS_MAX, int(datetime(9999, 12, 31, tzinfo=UTC).timestamp() * 1000)])
    def test_a_far_due_time_is_refused_or_spelled_right(self, due_ms: int) -> None:
        """A due time as far as `datetime` reaches is read back or refused; it never makes a key that nobody reads."""
        try:
            text = SegmentKey(Place.DELAYED, ULID, 1, 0, due_ms).text
        except ValueError:
            return
        assert SegmentKey.parse(text).due_ms == due_ms


class TestMessageId:
    @given(ulids, priorities, st.integers(0, 65535))
    def test_round_trip(self, ulid: str, priority: int, index: int) -> None:
        """A message id tells the first segment, the priority and the index that it was made from."""
        identity = layout.message_id(ulid, priority, index)
        assert layout.parse_message_id(identity) == (ulid, priority, index)

    @given(st.lists(st.tuples(ulids, priorities, st.integers(0, 65535)), max_size=8, unique=True))
    def test_ids_are_unique(self, parts: list[tuple[str, int, int]]) -> None:
        """Different messages have different ids."""
        assert len({layout.message_id(*part) for part in parts}) == len(parts)

    @pytest.mark.parametrize("text", ["", ULID, f"{ULID}-", f"{ULID}-00000", f"{ULID}-0g0000", f"x-{ULID}-000000"])
    def test_anything_else_is_refused(self, text: str) -> None:
        """A text that is no message id raises ValueError; it is never looked up."""
        with pytest.raises(ValueError, match=r".+"):
            layout.parse_message_id(text)

    @given(st.text(max_size=40) | st.from_regex(ULID + r"-[0-9a-fA-Fx+_ ]{6,8}", fullmatch=True))
    @example(f"{ULID}-+f0000")
    @example(f"{ULID}-FF0000")
    @example(f"{ULID}-000x0f")
    @example(f"{ULID}-00 001")
    def test_what_is_accepted_is_canonical(self, text: str) -> None:
        """A message id that is accepted prints back to itself: one message never has two ids."""
        try:
            parts = layout.parse_message_id(text)
        except ValueError:
            return
        assert layout.message_id(*parts) == text


class TestHistory:
    @given(dues_ms, st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=30))
    def test_round_trip(self, time_ms: int, worker: str) -> None:
        """A history key tells when it was composed."""
        assert layout.history_time_ms(layout.history_key(time_ms, worker)) == time_ms

    @given(st.lists(dues_ms, max_size=8))
    def test_keys_sort_by_time(self, times: list[int]) -> None:
        """LIST gives the oldest history first, whoever wrote it."""
        keys = [layout.history_key(time_ms, f"w{place}") for place, time_ms in enumerate(times)]
        assert [layout.history_time_ms(key) for key in sorted(keys)] == sorted(times)

    @pytest.mark.parametrize(
        "key",
        [
            "",
            "history/",
            "history/abc",
            f"dead/{ULID}-1",
            "history/17-w",
            "01700000000000-w",
            "history/+1700000000000-w",
        ],
    )
    def test_anything_else_is_refused(self, key: str) -> None:
        """What is no history key has no time."""
        with pytest.raises(ValueError, match=r".+"):
            layout.history_time_ms(key)
