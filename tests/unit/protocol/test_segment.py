"""Segments: what is encoded is read back, the index alone too, and no damage passes."""

import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from s3queue_async.errors import CorruptObject, NewerFormat
from s3queue_async.protocol import segment
from s3queue_async.protocol.segment import Codec, Failure, Index, Record, Segment

KEY = "ready/255/01ARZ3NDEKTSV4RRFFQ69G5FAV-1"

# Surrogates cannot be encoded as UTF-8, so they cannot reach a segment.
texts = st.text(st.characters(codec="utf-8"), max_size=30)
millis = st.integers(0, 2**48)
failures = st.builds(Failure, texts, texts, millis)
messages = st.tuples(
    st.builds(
        Record,
        id=texts,
        enqueued_ms=millis,
        length=st.just(0),
        codec=st.sampled_from(list(Codec)).map(int),
        attempts=st.integers(0, 1000),
        deliveries=st.integers(0, 2**40),
        max_attempts=st.none() | st.integers(1, 1000),
        expires_ms=st.none() | millis,
        dedup_id=st.none() | texts,
        headers=st.none() | st.dictionaries(texts, texts, max_size=3),
        failure=st.none() | failures,
    ),
    st.binary(max_size=50),
)


@st.composite
def segments(draw: st.DrawFn, *, max_size: int = 6) -> Segment:
    """A segment whose index fits its payloads."""
    drawn = draw(st.lists(messages, max_size=max_size))
    records = [msgspec.structs.replace(record, length=len(payload)) for record, payload in drawn]
    index = Index(records, draw(st.integers(0, 255)), draw(st.none() | texts))
    return Segment(index, [payload for _, payload in drawn])


def encoded(whole: Segment) -> bytes:
    return segment.encode(whole.index, whole.payloads)


def sealed(table: bytes, payloads: bytes = b"", *, version: int = 1, flags: int = 0) -> bytes:
    """Any index bytes with a head whose checksums are right."""
    head = segment.HEAD.pack(
        segment.MAGIC, version, flags, 0, len(table), zlib.crc32(table), len(payloads), zlib.crc32(payloads)
    )
    return head + table + payloads


SMALL = encoded(Segment(Index([Record("a", 1, 3), Record("b", 2, 0)], 7, "dead/x"), [b"abc", b""]))


class TestRoundTrip:
    @given(segments())
    def test_whole(self, whole: Segment) -> None:
        """A segment is read back as what was encoded, empty payloads and empty segments, too."""
        assert segment.decode(KEY, encoded(whole)) == whole

    @given(segments())
    def test_equal_segments_have_equal_bytes(self, whole: Segment) -> None:
        """Whoever writes a move's segment writes the same bytes."""
        assert encoded(segment.decode(KEY, encoded(whole))) == encoded(whole)

    @given(segments(), st.integers(0, 200))
    def test_index_alone(self, whole: Segment, beyond: int) -> None:
        """The head tells how many bytes hold the index, and those bytes are enough to read it."""
        body = encoded(whole)
        end = segment.index_end(KEY, body[: segment.HEAD.size])
        assert segment.decode_index(KEY, body[: end + beyond]) == whole.index

    @given(segments())
    def test_payloads_lie_where_the_index_says(self, whole: Segment) -> None:
        """One payload can be read by range: lengths add up from the index's end."""
        body = encoded(whole)
        offset = segment.index_end(KEY, body)
        for record, payload in zip(whole.index.records, whole.payloads, strict=True):
            assert body[offset : offset + record.length] == payload
            offset += record.length
        assert offset == len(body)

    def test_a_few_hundred_messages_fit_the_first_read(self) -> None:
        """The first read by range holds the whole index of a default segment of 256 plain messages."""
        records = [Record(f"01ARZ3NDEKTSV4RRFFQ69G5FAV-05{place:04x}", 1_700_000_000_000, 100) for place in range(256)]
        body = segment.encode(Index(records, 5), [b"x" * 100] * 256)
        assert segment.index_end(KEY, body) <= segment.INDEX_GUESS_BYTES


class TestDamage:
    @pytest.mark.parametrize("place", range(len(SMALL)))
    def test_any_byte(self, place: int) -> None:
        """Each byte of a segment replaced by each other value: every damage is found, none reaches a handler."""
        unnoticed = []
        for value in range(256):
            if value == SMALL[place]:
                continue
            damaged = SMALL[:place] + bytes([value]) + SMALL[place + 1 :]
            try:
                segment.decode(KEY, damaged)
            except CorruptObject:
                continue
            unnoticed.append(value)
        assert unnoticed == []

    @given(segments(), st.data())
    def test_several_bytes(self, whole: Segment, data: st.DataObject) -> None:
        """A run of bytes overwritten is found."""
        body = encoded(whole)
        start = data.draw(st.integers(0, len(body) - 1))
        junk = data.draw(st.binary(min_size=1, max_size=len(body) - start))
        damaged = body[:start] + junk + body[start + len(junk) :]
        assume(damaged != body)
        with pytest.raises(CorruptObject):
            segment.decode(KEY, damaged)

    @pytest.mark.parametrize("length", range(len(SMALL)))
    def test_truncated(self, length: int) -> None:
        """A segment cut short anywhere is found, and so is an index cut short."""
        with pytest.raises(CorruptObject):
            segment.decode(KEY, SMALL[:length])
        if length < segment.index_end(KEY, SMALL):
            with pytest.raises(CorruptObject):
                segment.decode_index(KEY, SMALL[:length])

    @given(segments(), st.binary(min_size=1, max_size=20))
    def test_bytes_behind_the_end(self, whole: Segment, tail: bytes) -> None:
        """Anything appended is found."""
        with pytest.raises(CorruptObject):
            segment.decode(KEY, encoded(whole) + tail)

    @given(segments(), st.data())
    def test_payloads_damaged_index_readable(self, whole: Segment, data: st.DataObject) -> None:
        """Damage of a payload does not take the index with it: the messages can still be named."""
        body = encoded(whole)
        end = segment.index_end(KEY, body)
        assume(len(body) > end)
        place = data.draw(st.integers(end, len(body) - 1))
        damaged = body[:place] + bytes([body[place] ^ data.draw(st.integers(1, 255))]) + body[place + 1 :]
        assert segment.decode_index(KEY, damaged) == whole.index
        with pytest.raises(CorruptObject, match="payloads are damaged"):
            segment.decode(KEY, damaged)

    @given(st.binary(max_size=200))
    def test_any_bytes(self, body: bytes) -> None:
        """Bytes that are no segment raise CorruptObject and nothing else."""
        with pytest.raises(CorruptObject):
            segment.decode(KEY, body)

    @given(st.binary(max_size=200), st.binary(max_size=20))
    @example(b"\xc1", b"")
    @example(b"\x93" * 5000, b"")
    @example(msgspec.msgpack.encode({"records": [["\ud7ff".encode()]], "priority": 1}), b"")
    @example(b"\x82\xa7records\x90\xa8priority\xa1\xff", b"")
    def test_any_index_with_right_checksums(self, table: bytes, payloads: bytes) -> None:
        """An index that another program wrote, checksums and all, raises CorruptObject or is a whole index."""
        try:
            whole = segment.decode(KEY, sealed(table, payloads))
        except CorruptObject:
            return
        assert sum(map(len, whole.payloads)) == len(payloads)

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | texts | st.binary(max_size=9),
            lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3),
            max_leaves=12,
        ),
        st.none() | st.integers(-5, 300),
    )
    def test_any_value_as_records(self, records: Any, priority: int | None) -> None:
        """An index of the wrong shape raises CorruptObject, not an error of the decoder."""
        table = msgspec.msgpack.encode({"records": records, "priority": priority})
        try:
            whole = segment.decode(KEY, sealed(table))
        except CorruptObject:
            return
        assert whole.payloads == [b""] * len(whole.index.records)

    def test_lengths_that_cancel_out(self) -> None:
        """A negative length is refused even when the sum is right."""
        table = msgspec.msgpack.encode(Index([Record("a", 1, 5), Record("b", 1, -2)], 0))
        with pytest.raises(CorruptObject, match="does not fit"):
            segment.decode(KEY, sealed(table, b"abc"))

    def test_the_error_names_the_key(self) -> None:
        """Whoever reads the error knows which object to look at."""
        with pytest.raises(CorruptObject, match=KEY) as caught:
            segment.decode(KEY, b"")
        assert caught.value.key == KEY


class TestNewerVersion:
    @given(segments(), st.integers(segment.FORMAT_VERSION + 1, 255))
    def test_version(self, whole: Segment, version: int) -> None:
        """A newer version is told apart from damage, whatever follows its head, so that it can be left alone."""
        body = bytearray(encoded(whole))
        body[4] = version
        for read in (segment.decode, segment.decode_index, segment.index_end):
            with pytest.raises(NewerFormat) as caught:
                read(KEY, bytes(body))
            assert str(version) in str(caught.value)

    @given(segments(), st.integers(1, 255))
    def test_flags(self, whole: Segment, flags: int) -> None:
        """A flag that this version does not know (a cipher, say) is a newer format, too."""
        body = bytearray(encoded(whole))
        body[5] = flags
        with pytest.raises(NewerFormat):
            segment.decode(KEY, bytes(body))

    @given(st.lists(st.integers(0, 9), max_size=3), texts)
    def test_unknown_fields_of_the_same_version_are_skipped(self, extra: list[int], name: str) -> None:
        """A field that a later minor version adds at the end does not hurt this one."""
        assume(name not in ("records", "priority", "parent"))
        record = [*msgspec.to_builtins(Record("a", 1, 2)), *extra]
        table = msgspec.msgpack.encode({"records": [record], "priority": 3, name: extra})
        assert segment.decode(KEY, sealed(table, b"ab")).index == Index([Record("a", 1, 2)], 3)


class TestVoid:
    @given(st.integers(0, 2**42), st.floats(0, 60), st.floats(0.5, 60))
    def test_late_is_void_and_in_time_is_not(self, created_ms: int, delay_s: float, age_s: float) -> None:
        """Landed within the age: never void. A second or more beyond it: always void, however coarse the time."""
        modified_s = created_ms / 1000 + delay_s
        void = segment.is_void(created_ms, modified_s, age_s)
        if delay_s <= age_s:
            assert not void
        if delay_s >= age_s + 1.001:
            assert void

    @given(st.integers(0, 2**42), st.integers(0, 2**32), st.floats(0, 0.999), st.floats(0.5, 60))
    def test_every_resolution_gives_one_answer(
        self, created_ms: int, modified_s: int, fraction: float, age_s: float
    ) -> None:
        """A listing with milliseconds and a header with seconds come to the same verdict."""
        exact = segment.is_void(created_ms, modified_s + fraction, age_s)
        assert exact == segment.is_void(created_ms, float(modified_s), age_s)


class TestPayload:
    @given(st.binary(max_size=50))
    def test_bytes_stay_as_they_are(self, payload: bytes) -> None:
        """Bytes of each kind are stored raw."""
        for value in (payload, bytearray(payload), memoryview(payload)):
            assert segment.encode_payload(value, msgspec.msgpack.Encoder()) == (payload, Codec.RAW)

    @given(st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | texts | st.lists(texts, max_size=3))
    def test_everything_else_is_msgpack(self, payload: Any) -> None:
        """Other values are read back from msgpack as they were."""
        body, codec = segment.encode_payload(payload, msgspec.msgpack.Encoder())
        assert codec is Codec.MSGPACK
        assert msgspec.msgpack.decode(body) == payload
