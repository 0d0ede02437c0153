"""Packing: whatever is written is read back, nothing tampered with passes, and what a process lacks has its own error."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from s3queue_async.compression import compress
from s3queue_async.engine import packing, worth
from s3queue_async.engine.packing import Packer
from s3queue_async.engine.worth import Worth
from s3queue_async.errors import (
    CorruptObject,
    DecryptionFailed,
    ExtraMissing,
    KeyUnavailable,
    NewerFormat,
    PlaintextRefused,
    QueueError,
    Unreadable,
)
from s3queue_async.keyring import Keyring
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol import wrapping
from s3queue_async.protocol.claim import Claim
from s3queue_async.protocol.segment import Failure, Index, Record, Segment
from s3queue_async.protocol.wrapping import Envelope, Flag, Kind
from tests.unit.test_keyring import without

KEY = "ready/255/01ARZ3NDEKTSV4RRFFQ69G5FAV-1"
CLAIM = "claims/01ARZ3NDEKTSV4RRFFQ69G5FAV-1"
KEYS = {"old": bytes(range(32)), "new": bytes(32)}

texts = st.text(st.characters(codec="utf-8"), max_size=20)
payloads = st.binary(max_size=60) | st.builds(lambda part, times: part * times, st.binary(max_size=9), st.just(200))
packers: st.SearchStrategy[Callable[[], Packer]] = st.builds(
    lambda compression, current: lambda: packer(compression, current),
    st.sampled_from((None, "zstd")),
    st.sampled_from((None, "old", "new")),
)


def packer(compression: str | None = None, current: str | None = None, *, queue: str = "q", **options: Any) -> Packer:
    """A packer of the queue; ``current`` None: without keys."""
    plain = options.pop("accept_plaintext", True)
    keyring = None if current is None else Keyring(KEYS, current=current, accept_plaintext=plain)
    made = Packer(compression=compression, keyring=keyring, **options)
    made.queue = queue
    return made


def segment_of(*bodies: bytes, headers: dict[str, str] | None = None, parent: str | None = None) -> Segment:
    records = [Record(f"id-{place}", 5, len(body), headers=headers) for place, body in enumerate(bodies)]
    return Segment(Index(records, 7, parent), list(bodies))


def packed(made: Packer, segment: Segment, key: str = KEY) -> bytes:
    return asyncio.run(made.pack(key, segment))


def unpacked(made: Packer, body: bytes, key: str = KEY) -> Segment:
    return asyncio.run(made.unpack(key, body))


class TestRoundTrip:
    @given(packers, st.lists(payloads, max_size=6), st.none() | st.dictionaries(texts, texts, max_size=2))
    def test_whole_and_index(
        self, make: Callable[[], Packer], bodies: list[bytes], headers: dict[str, str] | None
    ) -> None:
        """A segment is read back by whoever has the keys, and so is its index alone, from the bytes that hold it."""
        segment = segment_of(*bodies, headers=headers)
        body = packed(make(), segment)
        reader = packer("zstd", "new")
        assert unpacked(reader, body) == segment
        end = reader.index_end(KEY, body[: segments.HEAD.size])
        assert reader.unpack_index(KEY, body[:end]) == segment.index
        reader.require_readable(KEY, body[:1024])

    @given(st.lists(payloads, max_size=6))
    def test_with_neither_the_bytes_are_as_ever(self, bodies: list[bytes]) -> None:
        """Without compression and keys, what is written is what it always was."""
        segment = segment_of(*bodies)
        assert packed(packer(), segment) == segments.encode(segment.index, segment.payloads)

    @given(packers, packers, st.lists(payloads, min_size=1, max_size=4))
    def test_the_same_segment_in_other_bytes(
        self, one: Callable[[], Packer], other: Callable[[], Packer], bodies: list[bytes]
    ) -> None:
        """Two writers of one move know each other's segment for the same, and a different one for different."""
        segment = segment_of(*bodies)
        reader = other() if other()._keyring is not None else packer("zstd", "new")
        assert asyncio.run(reader.is_same(KEY, packed(one(), segment), segment))
        assert not asyncio.run(reader.is_same(KEY, packed(one(), segment_of(*bodies, b"one more")), segment))
        assert not asyncio.run(reader.is_same(KEY, b"", segment))

    @given(st.binary(max_size=3000), st.sampled_from((None, "zstd")), st.sampled_from((None, "old")))
    def test_histories(self, records: bytes, compression: str | None, current: str | None) -> None:
        """A history is read back; with neither it is the bytes that it always was."""
        key, history = "history/1-w-n", msgspec.msgpack.encode([records])
        body = packer(compression, current).pack_history(key, history)
        assert packer("zstd", "new").unpack_history(key, body) == history
        if compression is None and current is None:
            assert body == history

    def test_failures_of_claims(self) -> None:
        """A stored claim shows who holds what, and not why messages failed; who takes it over knows that, too."""
        claim = Claim("n", KEY, "w", 1, 5, moves=[claims.Move("dead/x", [0], [1], [0], 1)],
                      failure_table=[Failure("secret", "trace of secret", 3)])  # fmt: skip
        stored = claims.encode(packer(None, "old").seal(CLAIM, claim))
        assert b"secret" not in stored
        read = claims.decode(CLAIM, stored)
        assert (read.owner, read.moves, read.failure_table) == ("w", claim.moves, [])
        assert packer(None, "new").unseal(CLAIM, read) == claim
        assert packer().seal(CLAIM, claim) is claim
        assert packer(None, "old").seal(CLAIM, msgspec.structs.replace(claim, failure_table=[])).sealed_failures == b""

    def test_two_writings_never_have_the_same_bytes(self) -> None:
        """The same segment, encrypted twice, has nothing in common: neither salt nor ciphertext."""
        made = packer(None, "old")
        first, second = packed(made, segment_of(b"x" * 64)), packed(made, segment_of(b"x" * 64))
        salts = {wrapping.peek(KEY, body)[1].salt for body in (first, second)}
        assert len(salts) == 2
        assert first[-64:] != second[-64:]

    @pytest.mark.parametrize("compression", [None, "zstd"])
    def test_nothing_of_a_message_is_in_the_bytes(self, compression: str | None) -> None:
        """Payload, headers, deduplication id, failure and ids of messages are all encrypted."""
        record = Record("secret-id", 1, 14, dedup_id="secret-dedup", headers={"secret-name": "secret-value"},
                        failure=Failure("secret-reason", "secret-trace"))  # fmt: skip
        segment = Segment(Index([record] * 40, 1, "ready/secret-parent"), [b"secret-payload"] * 40)
        assert b"secret" not in packed(packer(compression, "old"), segment)


SMALL = segment_of(b"abc", b"")
FORGED = (KeyUnavailable, DecryptionFailed, CorruptObject)


class TestTampering:
    def test_any_byte(self) -> None:
        """Each byte replaced by each other value: each is refused, by the whole segment and, before it, by the index."""
        made = packer(None, "old")
        body = packed(made, SMALL)
        end = made.index_end(KEY, body)
        unnoticed: list[tuple[str, int, int]] = []

        async def check() -> None:
            for place in range(len(body)):
                for value in range(0, 256, 5):
                    damaged = body[:place] + bytes([(body[place] + 1 + value) % 256]) + body[place + 1 :]
                    if damaged == body:
                        continue
                    try:
                        await made.unpack(KEY, damaged)
                    except FORGED:
                        pass
                    else:
                        unnoticed.append(("whole", place, value))
                    if place < end and not _refuses_index(made, damaged):
                        unnoticed.append(("index", place, value))

        asyncio.run(check())
        # The index alone is read without the payloads, so their checksum and length in the head tell it nothing.
        assert [found for found in unnoticed if found[0] == "whole" or not 16 <= found[1] < 24] == []

    @given(st.data())
    def test_with_the_checksums_made_right(self, data: st.DataObject) -> None:
        """Somebody who changes ciphertext, salt or commitment and all checksums with it is refused as well."""
        made = packer("zstd", "old")
        body = packed(made, segment_of(b"abc" * 200, b"x"))
        wrapped = wrapping.unwrap(KEY, body)
        parts = {"index": wrapped.index, "payloads": wrapped.payloads,
                 "salt": wrapped.envelope.salt, "commitment": wrapped.envelope.commitment}  # fmt: skip
        name = data.draw(st.sampled_from(sorted(parts)))
        place = data.draw(st.integers(0, len(parts[name]) - 1))
        changed = bytearray(parts[name])
        changed[place] ^= data.draw(st.integers(1, 255))
        parts[name] = bytes(changed)
        envelope = msgspec.structs.replace(wrapped.envelope, salt=parts["salt"], commitment=parts["commitment"])
        forged = wrapping.wrap(Kind.SEGMENT, wrapped.flags, envelope, parts["index"], parts["payloads"])
        with pytest.raises(FORGED) as caught:
            unpacked(made, forged)
        assert isinstance(caught.value, DecryptionFailed) == (name in ("salt", "commitment"))

    @given(flags=st.integers(0, 7))
    def test_other_flags(self, flags: int) -> None:
        """A ciphertext under other flags, checksums right, is refused."""
        made = packer("zstd", "old")
        wrapped = wrapping.unwrap(KEY, packed(made, segment_of(b"abc" * 200)))
        if flags == wrapped.flags:
            return
        forged = wrapping.wrap(Kind.SEGMENT, Flag(flags), wrapped.envelope, wrapped.index, wrapped.payloads)
        with pytest.raises(QueueError):
            unpacked(made, forged)

    def test_parts_of_two_segments(self) -> None:
        """The index of one and the payloads of another, both from the same key: refused."""
        made = packer(None, "old")
        one, other = (wrapping.unwrap(KEY, packed(made, segment_of(text))) for text in (b"pay 1", b"pay 9"))
        mixed = wrapping.wrap(Kind.SEGMENT, one.flags, one.envelope, one.index, other.payloads)
        with pytest.raises(CorruptObject, match="was changed, or copied from another key"):
            unpacked(made, mixed)
        assert made.unpack_index(KEY, mixed) == segment_of(b"pay 1").index

    def test_copied_to_another_key(self) -> None:
        """A segment put under another key of the queue is refused; so a dead letter does not come back to life."""
        made = packer(None, "old")
        body = packed(made, SMALL, "dead/x-1")
        with pytest.raises(CorruptObject, match="copied from another key"):
            unpacked(made, body)
        assert unpacked(made, body, "dead/x-1") == SMALL

    def test_copied_to_another_queue(self) -> None:
        """A segment of another queue with the same keys is refused, with what to do if queue.json was lost."""
        body = packed(packer(None, "old", queue="theirs"), SMALL)
        with pytest.raises(DecryptionFailed, match=r"nonce 'theirs'; here it is 'q'.*write that nonce back"):
            unpacked(packer(None, "old"), body)

    def test_histories_and_failures_are_bound_to_their_keys(self) -> None:
        """So are a history and a claim's failures; damaged ones are refused."""
        made = packer(None, "old")
        history = made.pack_history("history/1-w-n", b"\x90")
        with pytest.raises(CorruptObject):
            made.unpack_history("history/2-w-n", history)
        with pytest.raises(CorruptObject):
            made.unpack_history("history/1-w-n", history[:-1])
        sealed = made.seal(CLAIM, Claim("n", KEY, "w", 1, 5, failure_table=[Failure("x")]))
        with pytest.raises(CorruptObject):
            made.unseal("claims/other-1", sealed)
        with pytest.raises(CorruptObject, match="failures cannot be read"):
            made.unseal(CLAIM, msgspec.structs.replace(sealed, sealed_failures=b"rubbish"))


def _refuses_index(made: Packer, damaged: bytes) -> bool:
    try:
        made.unpack_index(KEY, damaged)
    except FORGED:
        return True
    return False


class TestWhatIsLacking:
    @pytest.mark.parametrize("reader", ["whole", "index", "peek"])
    def test_errors(self, reader: str) -> None:
        """No keyring, no such key, another key of that name: each has its error, none is for good, all say what to do."""
        body = packed(packer(None, "old"), SMALL)
        other = Packer(keyring=Keyring({"new": KEYS["new"]}))
        wrong = Packer(keyring=Keyring({"old": os.urandom(32)}))
        other.queue = wrong.queue = "q"
        cases: list[tuple[Packer, type[Unreadable], str]] = [
            (packer(), KeyUnavailable, "is encrypted with the key 'old', and this process has no keyring"),
            (other, KeyUnavailable, "is encrypted with the key 'old'; the keyring has 'new'"),
            (wrong, DecryptionFailed, "was not encrypted with the key that this process has as 'old'"),
        ]
        for made, kind, text in cases:
            with pytest.raises(kind) as caught:
                read(made, body, reader)
            assert (caught.value.key, caught.value.reason) == (KEY, text)
            assert not isinstance(caught.value, CorruptObject)
            assert not caught.value.retriable
            assert "left as it is" in caught.value.suggestion

    @pytest.mark.parametrize("reader", ["whole", "index", "peek"])
    @pytest.mark.parametrize("compression", [None, "zstd"])
    def test_plaintext_refused(self, reader: str, compression: str | None) -> None:
        """A keyring that accepts no plaintext refuses every unencrypted segment; without the option it is read."""
        body = packed(packer(compression), segment_of(b"abc" * 400))
        read(packer(None, "old"), body, reader)
        with pytest.raises(PlaintextRefused, match="is not encrypted"):
            read(packer(None, "old", accept_plaintext=False), body, reader)

    def test_plaintext_histories_and_failures(self) -> None:
        """The same for a history and for failures in a claim; a claim without failures is nobody's secret."""
        strict = packer(None, "old", accept_plaintext=False)
        with pytest.raises(PlaintextRefused):
            strict.unpack_history("history/1", b"\x90")
        claim = Claim("n", KEY, "w", 1, 5)
        assert strict.unseal(CLAIM, claim) is claim
        with pytest.raises(PlaintextRefused):
            strict.unseal(CLAIM, msgspec.structs.replace(claim, failure_table=[Failure("x")]))

    @pytest.mark.parametrize("reader", ["whole", "index", "peek"])
    def test_without_zstandard(self, monkeypatch: pytest.MonkeyPatch, reader: str) -> None:
        """A compressed segment names the extra to install; a plain one of the same queue is read."""
        segment = segment_of(*[b"abc" * 400] * 20)
        body = packed(packer("zstd"), segment)
        plain = packed(packer(), segment)
        without(monkeypatch, "zstandard", "compression")
        made = packer()
        with pytest.raises(ExtraMissing, match=r"s3queue-async\[zstd\].*left as it is"):
            read(made, body, reader)
        read(made, plain, reader)

    def test_what_cannot_be_read_counts_as_written(self) -> None:
        """A whole segment without its key counts as the move's own, so that nobody deletes it; a torn one does not."""
        body = packed(packer(None, "old"), SMALL)
        assert asyncio.run(packer().is_same(KEY, body, SMALL))
        assert not asyncio.run(packer().is_same(KEY, body[:-1], SMALL))

    def test_a_newer_flag(self) -> None:
        """A flag of a later version is NewerFormat for every reader."""
        body = bytearray(packed(packer(None, "old"), SMALL))
        body[5] |= 8
        for reader in ("whole", "index", "peek"):
            with pytest.raises(NewerFormat):
                read(packer(None, "old"), bytes(body), reader)


def read(made: Packer, body: bytes, how: str) -> None:
    if how == "whole":
        unpacked(made, body)
    elif how == "index":
        made.unpack_index(KEY, body)
    else:
        made.require_readable(KEY, body[:1024])


class TestBombs:
    def test_payloads(self) -> None:
        """A frame that would give more than the index says is refused before any memory is taken for it."""
        index = segments.encode_index(segment_of(b"abc").index)
        bomb = compress(bytes(200 * 1024 * 1024))
        body = wrapping.wrap(Kind.SEGMENT, Flag.PAYLOADS_COMPRESSED, Envelope(), index, bomb)
        with pytest.raises(CorruptObject, match="a frame of 209715200 bytes where 3 were expected"):
            unpacked(packer(), body)

    def test_beyond_the_limits(self) -> None:
        """More payload bytes than this process takes: left alone, with the settings to raise; others may take them."""
        body = packed(packer("zstd"), segment_of(b"x" * 5000))
        with pytest.raises(Unreadable, match=r"5,000 bytes.*takes 4,000\. Raise segment_bytes_max") as caught:
            unpacked(packer(payload_bytes_max=4000), body)
        assert not isinstance(caught.value, CorruptObject)
        assert unpacked(packer(payload_bytes_max=5000), body) == segment_of(b"x" * 5000)

    def test_an_index(self) -> None:
        """An index that would be larger than any can be is refused."""
        bomb = compress(bytes(packing.INDEX_BYTES_MAX + 1))
        body = wrapping.wrap(Kind.SEGMENT, Flag.INDEX_COMPRESSED, Envelope(), bomb, b"")
        with pytest.raises(Unreadable, match="once it is decompressed"):
            packer().unpack_index(KEY, body)

    @pytest.mark.parametrize("frame", [b"", b"rubbish", compress(b"abcd"), compress(b"abc")[:-1], compress(b"abc") * 2])
    def test_frames_that_are_none(self, frame: bytes) -> None:
        """No frame, a cut one, one of another size, and two in a row are damage."""
        index = segments.encode_index(segment_of(b"abc").index)
        body = wrapping.wrap(Kind.SEGMENT, Flag.PAYLOADS_COMPRESSED, Envelope(), index, frame)
        with pytest.raises(CorruptObject, match="cannot be decompressed"):
            unpacked(packer(), body)


class TestWorth:
    def test_text_is_compressed_and_noise_is_not(self) -> None:
        """JSON gets smaller; random bytes are stored as they are, and so is what is too small to matter."""
        made = packer("zstd")
        text = segment_of(*[b'{"name": "a", "amount": 5}' * 20] * 20)
        assert len(packed(made, text)) < 1000
        noise = segment_of(*[Random(place).randbytes(5000) for place in range(20)])
        body = packed(packer("zstd"), noise)
        assert body[-100_000:] == b"".join(noise.payloads)
        small = segment_of(b"abc")
        assert packed(packer("zstd"), small) == segments.encode(small.index, small.payloads)

    def test_noise_is_only_sampled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where compression does not pay, one sample in 16 segments is all it costs; then text is noticed again."""
        sizes: list[int] = []

        def counted(data: bytes) -> bytes:
            sizes.append(len(data))
            return compress(data)

        monkeypatch.setattr(worth, "compressed", counted)
        known = Worth()
        noise = [Random(1).randbytes(200_000)]
        decisions = [known.decide(noise, 200_000) for _ in range(160)]
        assert not any(decisions)
        assert sizes == [worth.SAMPLE_BYTES] * 10
        text = [b"abc" * 100_000]
        decisions = [known.decide(text, 300_000) for _ in range(17)]
        assert True in decisions

    def test_a_mixed_queue(self) -> None:
        """Text and noise by turns: the text is compressed, and each noise stays as it is."""
        made = packer("zstd")
        for number in range(40):
            noise = segment_of(Random(number).randbytes(2000))
            text = segment_of(b"abc" * 2000)
            assert len(packed(made, text)) < 300
            assert len(packed(made, noise)) >= 2000

    def test_figures(self) -> None:
        """Bytes before and after are counted of what was packed; nothing is counted with neither."""
        plain = packer()
        segment = segment_of(b"abc" * 2000)
        whole = packed(plain, segment)
        assert (plain.bytes_before, plain.bytes_stored, plain.seconds) == (0, 0, 0.0)
        made = packer("zstd", "old")
        body = packed(made, segment)
        assert (made.bytes_before, made.bytes_stored) == (len(whole), len(body))


class TestThreads:
    def test_large_segments_leave_the_loop_alone(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """From 512 KiB on a thread does it, below the loop's own; what is read is the same."""
        used: list[int] = []
        original = compress

        def noted(data: bytes) -> bytes:
            used.append(threading.get_ident())
            return original(data)

        monkeypatch.setattr(packing, "smaller", lambda data: None)
        made = packer("zstd", "old")
        made._worth.learn(0.1)
        monkeypatch.setattr(packing, "compressed", noted)
        small, large = segment_of(b"x" * 1000), segment_of(b"x" * packing.THREAD_FROM_BYTES)
        for segment in (small, large):
            assert unpacked(made, packed(made, segment)) == segment
        assert (used[0] == threading.get_ident(), used[1] == threading.get_ident()) == (True, False)

    async def test_many_at_a_time(self) -> None:
        """Segments that are packed in several threads at a time come out whole."""
        made = packer("zstd", "old")
        wanted = [segment_of(bytes([number]) * 600_000, Random(number).randbytes(600_000)) for number in range(6)]
        bodies = await asyncio.gather(*(made.pack(KEY, segment) for segment in wanted))
        assert await asyncio.gather(*(made.unpack(KEY, body) for body in bodies)) == wanted
