"""What stands around compressed and encrypted bytes: it is read back, damage is found without a key, old readers refuse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3queue_async.errors import CorruptObject, NewerFormat
from s3queue_async.protocol import segment, wrapping
from s3queue_async.protocol.wrapping import Envelope, Flag, Kind, Wrapped

KEY = "ready/255/01ARZ3NDEKTSV4RRFFQ69G5FAV-1"

flags = st.integers(1, wrapping.KNOWN).map(Flag)
envelopes = st.builds(
    Envelope,
    key_id=st.text(st.characters(codec="utf-8"), min_size=1, max_size=64),
    queue=st.text("0123456789abcdef", max_size=16),
    salt=st.binary(max_size=32),
    commitment=st.binary(max_size=32),
)


@given(st.sampled_from(Kind), flags, envelopes, st.binary(max_size=50), st.binary(max_size=50))
def test_round_trip(kind: Kind, flag: Flag, envelope: Envelope, index: bytes, payloads: bytes) -> None:
    """What is wrapped is read back; an envelope is only there where something is encrypted."""
    body = wrapping.wrap(kind, flag, envelope, index, payloads)
    expected = envelope if flag & Flag.ENCRYPTED else Envelope()
    assert wrapping.is_wrapped(kind, body)
    assert wrapping.unwrap(KEY, body) == Wrapped(flag, expected, index, payloads)
    assert wrapping.peek(KEY, body) == (flag, expected)


@given(flags, envelopes, st.binary(max_size=50), st.binary(max_size=50), st.integers(0, 60))
def test_index_alone(flag: Flag, envelope: Envelope, index: bytes, payloads: bytes, beyond: int) -> None:
    """The head tells how many bytes hold the index, and those bytes are enough to read it."""
    body = wrapping.wrap(Kind.SEGMENT, flag, envelope, index, payloads)
    end = wrapping.index_end(body[: segment.HEAD.size])
    assert end == len(body) - len(payloads)
    assert wrapping.unwrap(KEY, body[: end + beyond], whole=False).index == index


@given(flags, envelopes, st.binary(max_size=20), st.binary(max_size=20))
def test_old_readers_refuse(flag: Flag, envelope: Envelope, index: bytes, payloads: bytes) -> None:
    """The reader of plain segments, which is all that a library from before has, calls it a newer format."""
    body = wrapping.wrap(Kind.SEGMENT, flag, envelope, index, payloads)
    for read in (segment.decode, segment.decode_index, segment.index_end):
        with pytest.raises(NewerFormat, match=f"flags {int(flag)}"):
            read(KEY, body)


@given(envelopes, st.binary(max_size=20), st.integers(8, 255))
def test_unknown_flags(envelope: Envelope, payloads: bytes, flag: int) -> None:
    """A flag of a later version is a newer format, whatever else is there."""
    body = bytearray(wrapping.wrap(Kind.SEGMENT, Flag.ENCRYPTED, envelope, b"", payloads))
    body[5] = flag
    assert wrapping.is_wrapped(Kind.SEGMENT, bytes(body))
    with pytest.raises(NewerFormat):
        wrapping.unwrap(KEY, bytes(body))


@pytest.mark.parametrize("kind", Kind)
def test_any_byte_damaged(kind: Kind) -> None:
    """Each byte replaced by each other value, without a key: it is no longer wrapped, or the damage is found."""
    body = wrapping.wrap(kind, Flag.ENCRYPTED, Envelope("k", "q", b"salt", b"commitment"), b"index", b"payloads")
    unnoticed = []
    for place in range(len(body)):
        for value in range(256):
            damaged = body[:place] + bytes([value]) + body[place + 1 :]
            if damaged == body or not wrapping.is_wrapped(kind, damaged):
                continue
            try:
                wrapping.unwrap(KEY, damaged)
            except CorruptObject:
                continue
            unnoticed.append((place, value))
    assert unnoticed == []


@given(st.data())
def test_truncated_or_longer(data: st.DataObject) -> None:
    """Cut off anywhere behind the head, or with something behind the end: found."""
    body = wrapping.wrap(Kind.SEGMENT, Flag.ENCRYPTED, Envelope("k", "q", b"s", b"c"), b"index", b"payloads")
    cut = body[: data.draw(st.integers(segment.HEAD.size, len(body) - 1))]
    for damaged in (cut, body + data.draw(st.binary(min_size=1, max_size=9))):
        with pytest.raises(CorruptObject):
            wrapping.unwrap(KEY, damaged)


@given(st.binary(max_size=60))
def test_any_bytes(rest: bytes) -> None:
    """Whatever follows a head with a flag: CorruptObject and nothing else."""
    body = b"S3QS\x01\x04" + rest
    if wrapping.is_wrapped(Kind.SEGMENT, body):
        with pytest.raises(CorruptObject):
            wrapping.unwrap(KEY, body)


def test_bound_to_differs() -> None:
    """Another kind, key, queue, key id or flag is another binding."""
    base = (Kind.SEGMENT, KEY, Flag.ENCRYPTED, Envelope("k", "q"))
    others = [
        (Kind.HISTORY, *base[1:]),
        (base[0], KEY + "0", *base[2:]),
        (*base[:2], Flag.ENCRYPTED | Flag.PAYLOADS_COMPRESSED, base[3]),
        (*base[:3], Envelope("k2", "q")),
        (*base[:3], Envelope("k", "q2")),
    ]
    bindings = {wrapping.bound_to(*arguments) for arguments in (base, *others)}
    assert len(bindings) == 6
