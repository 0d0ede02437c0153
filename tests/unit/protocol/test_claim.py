"""Claims: who holds what, what has ended, what each message has used up, in every order of events."""

from collections.abc import Callable
from itertools import count
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from s3queue_async.errors import CorruptObject
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol.claim import Claim, Departure, Move
from s3queue_async.protocol.segment import Failure, Index, Record

KEY = "ready/255/01ARZ3NDEKTSV4RRFFQ69G5FAV-3"
NEW = "delayed/01700000000000-255-01ARZ3NDEKTSV4RRFFQ69G5FAW-1"
NOW_MS = 1_700_000_000_000
BOOM = Failure("Boom: no luck", "Traceback ...", NOW_MS)


def record(identity: str = "m", **fields: Any) -> Record:
    return Record(identity, NOW_MS, 1, **fields)


def index_of(size: int, **fields: Any) -> Index:
    return Index([record(f"m{place}", **fields) for place in range(size)], 7)


def fresh(nonce: str = "n0") -> Claim:
    return claims.fresh(KEY, owner="w1", now_ms=NOW_MS, nonce=nonce)


def lose(claim: Claim, source: int | Index, *, crashed: bool = True, nonce: str = "n9") -> Claim:
    """The owner is lost and another worker takes the claim."""
    if isinstance(source, int):
        source = index_of(source)
    return claims.take(claim, source=source, owner="w2", now_ms=NOW_MS + 1, nonce=nonce, crashed=crashed)


texts = st.text(st.characters(codec="utf-8"), max_size=10)
small = st.integers(0, 300)
moves = st.integers(0, 4).flatmap(
    lambda size: st.builds(
        Move,
        key=texts,
        indices=st.lists(small, min_size=size, max_size=size),
        attempts=st.lists(small, min_size=size, max_size=size),
        failures=st.lists(st.just(-1), min_size=size, max_size=size),
        token=small,
        applied=st.booleans(),
    )
)
any_claims = st.builds(
    Claim,
    nonce=texts,
    segment=texts,
    owner=texts,
    token=st.integers(1, 2**40),
    claimed_ms=st.integers(0, 2**48),
    state=st.sampled_from(["open", "settled"]),
    crashes=small,
    finished=st.lists(small),
    starts=st.dictionaries(small, small, max_size=4),
    suspects=st.lists(small),
    moves=st.lists(moves, max_size=3),
    failure_table=st.lists(st.builds(Failure, texts, texts, small), max_size=3),
)


class TestBytes:
    @given(any_claims)
    def test_round_trip(self, claim: Claim) -> None:
        """A claim is read back as what was written."""
        assert claims.decode("claims/x", claims.encode(claim)) == claim

    @given(any_claims, texts)
    def test_another_nonce_gives_other_bytes(self, claim: Claim, nonce: str) -> None:
        """Equal states written twice have different bytes, so a stale version never matches again."""
        other = msgspec.structs.replace(claim, nonce=nonce)
        assert (claims.encode(other) == claims.encode(claim)) == (nonce == claim.nonce)

    @given(st.binary(max_size=100))
    def test_any_bytes(self, body: bytes) -> None:
        """Bytes that are no claim raise CorruptObject with the key, and nothing else."""
        with pytest.raises(CorruptObject, match="claims/x") as caught:
            claims.decode("claims/x", body)
        assert caught.value.key == "claims/x"

    @given(any_claims, st.data())
    def test_truncated(self, claim: Claim, data: st.DataObject) -> None:
        """A claim cut short anywhere is found."""
        body = claims.encode(claim)
        with pytest.raises(CorruptObject):
            claims.decode("claims/x", body[: data.draw(st.integers(0, len(body) - 1))])

    @pytest.mark.parametrize(
        "field",
        [
            b'"state":"closed"', b'"token":"1"', b'"finished":[1.5]', b'"starts":{"a":1}', b'"moves":[{}]',
            b'"owner":null', b'"suspects":{}', b'"failure_table":[["x"],3]',
        ],
    )  # fmt: skip
    def test_wrong_fields(self, field: bytes) -> None:
        """A field of the wrong type or value raises CorruptObject."""
        body = claims.encode(fresh())
        with pytest.raises(CorruptObject):
            claims.decode("claims/x", body[:-1] + b"," + field + b"}")

    def test_a_claim_without_history_is_small(self) -> None:
        """The usual claim, written once a segment, takes less than 200 bytes."""
        body = claims.encode(claims.fresh(KEY, owner="host-0123456789ab", now_ms=NOW_MS, nonce="0123456789abcdef"))
        assert len(body) < 200


class TestNonce:
    @pytest.mark.parametrize(
        "transition",
        [
            lambda claim: claims.take(claim, source=index_of(3), owner="w2", now_ms=NOW_MS, nonce="n1", crashed=True),
            lambda claim: claims.take(claim, source=index_of(3), owner="w1", now_ms=NOW_MS, nonce="n1", crashed=False),
            lambda claim: claims.release(claim, nonce="n1"),
            lambda claim: claims.start(claim, 0, nonce="n1"),
            lambda claim: claims.finish(claim, [0], nonce="n1"),
            lambda claim: claims.finish(claim, [], nonce="n1"),
            lambda claim: claims.move(claim, [(NEW, [Departure(0, 1)])], settled=False, nonce="n1"),
            lambda claim: claims.move(claim, [], settled=True, nonce="n1"),
            lambda claim: claims.applied(claim, [NEW], nonce="n1"),
            lambda claim: claims.rekey(claim, NEW, KEY, nonce="n1"),
        ],
    )
    def test_every_transition_writes_it(self, transition: Callable[[Claim], Claim]) -> None:
        """The next claim has the new nonce and so other bytes, even when nothing else changed; the old one stays."""
        before = fresh()
        body = claims.encode(before)
        after = transition(before)
        assert after.nonce == "n1"
        assert claims.encode(after) != body
        assert claims.encode(before) == body


class TestTake:
    def test_lost_in_the_first_delivery(self) -> None:
        """Two of three were finished: the third is suspected, runs alone from now on, and has used up nothing yet."""
        claim = lose(claims.finish(fresh(), [0, 2], nonce="n1"), 3)
        assert (claim.owner, claim.token, claim.crashes, claim.suspects) == ("w2", 2, 1, [1])
        assert claim.isolated(index_of(3))
        assert claim.attempts(1, record()) == 0

    def test_given_up(self) -> None:
        """An owner that never ran anything is no crash: nobody is suspected and messages run side by side."""
        claim = lose(fresh(), 3, crashed=False)
        assert (claim.owner, claim.token, claim.crashes, claim.suspects) == ("w2", 2, 0, [])
        assert not claim.isolated(index_of(3))

    @pytest.mark.parametrize("crashed", [True, False])
    def test_given_back(self, crashed: bool) -> None:
        """A claim that was given back is free; taking it is no crash whatever the taker believes."""
        free = claims.release(fresh(), nonce="n1")
        assert free.free
        claim = lose(free, 3, crashed=crashed)
        assert not claim.free
        assert (claim.token, claim.crashes, claim.suspects) == (2, 0, [])

    def test_moved_messages_are_not_suspected(self) -> None:
        """What had moved before the owner was lost is charged nothing here."""
        claim = claims.move(fresh(), [(NEW, [Departure(1, 1)])], settled=False, nonce="n1")
        assert lose(claim, 3).suspects == [0, 2]

    def test_a_second_loss_adds_no_suspects(self) -> None:
        """In isolation every start is recorded, so a later loss makes nobody a suspect."""
        claim = lose(lose(claims.finish(fresh(), [0], nonce="n1"), 3), 3)
        assert (claim.crashes, claim.suspects) == (2, [1, 2])

    def test_after_corruption(self) -> None:
        """Nothing is known of an unreadable claim's past: every message runs alone, none has used up anything."""
        claim = claims.after_corruption(KEY, count=3, owner="w2", now_ms=NOW_MS, nonce="n1")
        assert claim.isolated(index_of(3))
        assert claim.suspects == [0, 1, 2]
        assert [claim.attempts(place, record()) for place in range(3)] == [0, 0, 0]


class TestPoison:
    @given(st.integers(1, 6), st.integers(1, 8), st.data())
    def test_a_message_that_kills_its_worker(self, max_attempts: int, size: int, data: st.DataObject) -> None:
        """It runs max_attempts times (twice when that is 1: nobody knew who did it); its neighbours pay nothing."""
        poison = data.draw(st.integers(0, size - 1))
        index = index_of(size)
        claim = lose(fresh(), size)  # all ran side by side, and the worker died
        runs = 1
        for _ in range(max_attempts + 2):
            for place in range(size):
                if place in claim.ended():
                    continue
                used = claim.attempts(place, index.records[place])
                if used >= max_attempts:
                    assert place == poison
                    claim = claims.move(claim, [("dead/x", [Departure(place, used)])], settled=False, nonce="n")
                    continue
                claim = claims.start(claim, place, nonce="n")
                if place == poison:
                    runs += 1
                    claim = lose(claim, size)
                    break
                assert used == 0
                claim = claims.finish(claim, [place], nonce="n")
        assert runs == max(2, max_attempts)
        assert claim.ended() == set(range(size))
        assert claim.finished == [place for place in range(size) if place != poison]
        assert [(move.indices, move.attempts) for move in claim.moves] == [([poison], [max(2, max_attempts)])]

    def test_a_suspect_in_a_new_segment_runs_alone(self) -> None:
        """A suspect that is handed back before it ran stays one in its new segment, and its run is charged for both."""
        claim = lose(fresh(), 2)
        claim = claims.move(claim, [(NEW, [Departure(1, 0)])], settled=False, nonce="n")
        index = claims.moved_index(claim, claim.moves[0], index_of(2))
        assert index.records[0].suspect
        new = claims.fresh(NEW, owner="w3", now_ms=NOW_MS, nonce="n")
        assert new.isolated(index)
        assert new.attempts(0, index.records[0]) == 0
        assert claims.start(new, 0, nonce="n").attempts(0, index.records[0]) == 2

    def test_a_suspect_that_survived_is_cleared(self) -> None:
        """A suspect that ran alone, and failed like any other message, is no suspect in its new segment."""
        claim = claims.start(lose(fresh(), 2), 1, nonce="n")
        claim = claims.move(claim, [(NEW, [Departure(1, 1, BOOM)])], settled=False, nonce="n")
        index = claims.moved_index(claim, claim.moves[0], index_of(2))
        assert not index.records[0].suspect
        assert index.records[0].attempts == 1

    def test_recorded_starts_are_charged_once(self) -> None:
        """Beside a suspect even the first owner records each start: a loss is charged to the started message, once."""
        index = Index([record("suspect", suspect=True), record("other"), record("idle")], 7)
        claim = lose(claims.start(fresh(), 1, nonce="n"), index)
        assert [claim.attempts(place, index.records[place]) for place in range(3)] == [0, 1, 0]
        again = lose(claims.start(claim, 2, nonce="n"), index)
        assert again.attempts(2, index.records[2]) == 1


class TestMove:
    def test_what_the_new_segment_says(self) -> None:
        """Attempts and failure come from the move; id, age and the rest from the source; the parent is named."""
        source = Index(
            [record("a"), record("b", max_attempts=9, headers={"h": "1"}, dedup_id="d", deliveries=4, failure=BOOM)], 42
        )
        claim = claims.move(fresh(), [(NEW, [Departure(1, 3)])], settled=True, finished=[0], nonce="n")
        assert claim.state == "settled"
        index = claims.moved_index(claim, claim.moves[0], source)
        assert (index.priority, index.parent) == (42, KEY)
        assert index.records == [msgspec.structs.replace(source.records[1], attempts=3, deliveries=5)]

    def test_failures_are_stored_once(self) -> None:
        """A hundred messages that fail alike in several moves share one entry in the table."""
        groups = [(f"dead/{part}", [Departure(part * 25 + place, 1, BOOM) for place in range(25)]) for part in range(4)]
        claim = claims.move(fresh(), groups[:2], settled=False, nonce="n1")
        claim = claims.move(claim, groups[2:], settled=True, nonce="n2")
        assert claim.failure_table == [BOOM]
        for move in claim.moves:
            index = claims.moved_index(claim, move, index_of(100))
            assert {one.failure for one in index.records} == {BOOM}

    @given(st.lists(st.none() | st.builds(Failure, texts, texts), min_size=1, max_size=6), st.booleans())
    def test_each_message_gets_its_own_failure(self, given_failures: list[Failure | None], had: bool) -> None:
        """Whatever is shared in the table, each message's failure is its own, or the one that it had."""
        source = index_of(len(given_failures), failure=BOOM if had else None)
        group = [Departure(place, 1, failure) for place, failure in enumerate(given_failures)]
        claim = claims.move(fresh(), [(NEW, group)], settled=True, nonce="n")
        index = claims.moved_index(claim, claim.moves[0], source)
        old = BOOM if had else None
        assert [one.failure for one in index.records] == [old if new is None else new for new in given_failures]

    def test_applied_and_new_keys(self) -> None:
        """Only moves that were not written yet are pending, and only those can get a new key."""
        claim = claims.move(
            fresh(), [("dead/a", [Departure(0, 1)]), ("dead/b", [Departure(1, 1)])], settled=True, nonce="n"
        )
        claim = claims.applied(claim, ["dead/a"], nonce="n")
        assert [move.key for move in claim.pending_moves()] == ["dead/b"]
        claim = claims.rekey(claims.rekey(claim, "dead/a", "dead/x", nonce="n"), "dead/b", "dead/y", nonce="n")
        assert [move.key for move in claim.moves] == ["dead/a", "dead/y"]
        claim = claims.applied(claim, ["dead/y", "dead/unknown"], nonce="n")
        assert claim.pending_moves() == []

    def test_tokens_grow_through_moves(self) -> None:
        """A message's fencing token grows with each delivery, in its segment and in every later one."""
        index, claim, tokens = index_of(1), fresh(), []
        for generation in range(4):
            for _ in range(generation):
                tokens.append(index.records[0].deliveries + claim.token)
                claim = lose(claim, 1)
            tokens.append(index.records[0].deliveries + claim.token)
            claim = claims.move(claim, [(NEW, [Departure(0, 0)])], settled=True, nonce="n")
            late = lose(claim, 1)  # whoever finishes the settlement must not change what the new segment says
            index = claims.moved_index(late, late.moves[0], index)
            claim = claims.fresh(NEW, owner="w", now_ms=NOW_MS, nonce="n")
        assert tokens == sorted(set(tokens))


class ClaimMachine(RuleBasedStateMachine):
    """One segment's claim through any legal order of events, beside a plain account of what really happened."""

    def __init__(self) -> None:
        super().__init__()
        self.serial = count(1)
        self.claim = fresh()
        self.index = index_of(1)
        self.finished: set[int] = set()
        self.moved: dict[int, str] = {}
        self.recorded: dict[int, int] = {}  # starts in isolation
        self.unrecorded: set[int] = set()  # may have been running side by side when a worker was lost
        self.written: dict[str, Index] = {}  # what each move's segment says, by the key that it has now

    def nonce(self) -> str:
        return f"n{next(self.serial)}"

    def alive(self) -> list[int]:
        size = len(self.index.records)
        return [place for place in range(size) if place not in self.finished and place not in self.moved]

    def some(self, data: st.DataObject, *, least: int = 0) -> list[int]:
        return data.draw(st.lists(st.sampled_from(self.alive()), unique=True, min_size=least))

    def next(self, claim: Claim) -> None:
        assert claim.nonce != self.claim.nonce
        self.claim = claims.decode(KEY, claims.encode(claim))

    def attempts(self) -> list[int]:
        return [self.claim.attempts(place, one) for place, one in enumerate(self.index.records)]

    @initialize(records=st.lists(st.builds(record, attempts=st.integers(0, 3), suspect=st.booleans()), min_size=1))
    def begin(self, records: list[Record]) -> None:
        self.index = Index(records, 7)

    @rule(crashed=st.booleans())
    def owner_is_lost(self, crashed: bool) -> None:
        before, token = self.attempts(), self.claim.token
        isolated, free = self.claim.isolated(self.index), self.claim.free
        self.next(lose(self.claim, self.index, crashed=crashed, nonce=self.nonce()))
        if crashed and not free:
            assert self.claim.isolated(self.index)
            if not isolated:
                self.unrecorded.update(self.alive())
        assert self.claim.token == token + 1
        assert self.attempts() == before, "taking over alone uses up nobody's attempts"

    @precondition(lambda self: self.claim.state == "open" and not self.claim.free)
    @rule()
    def give_back(self) -> None:
        before = msgspec.structs.replace(self.claim, nonce="", owner="")
        self.next(claims.release(self.claim, nonce=self.nonce()))
        assert msgspec.structs.replace(self.claim, nonce="") == before

    @precondition(lambda self: self.alive() and not self.claim.free and self.claim.isolated(self.index))
    @rule(data=st.data())
    def start_alone(self, data: st.DataObject) -> None:
        place = data.draw(st.sampled_from(self.alive()))
        done = [other for other in self.some(data) if other != place]
        before = self.attempts()
        self.next(claims.start(self.claim, place, finished=done, nonce=self.nonce()))
        self.recorded[place] = self.recorded.get(place, 0) + 1
        self.finished.update(done)
        assert self.attempts()[place] > before[place]
        assert all(
            now == old for other, (now, old) in enumerate(zip(self.attempts(), before, strict=True)) if other != place
        )

    @precondition(lambda self: self.alive() and not self.claim.free)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        done = self.some(data)
        again = data.draw(st.lists(st.sampled_from(sorted(self.finished)))) if self.finished else []
        before = self.attempts()
        self.next(claims.finish(self.claim, [*done, *again], nonce=self.nonce()))
        self.finished.update(done)
        assert self.attempts() == before

    @precondition(lambda self: self.alive() and not self.claim.free)
    @rule(data=st.data(), everything=st.booleans())
    def move(self, data: st.DataObject, everything: bool) -> None:
        gone = self.alive() if everything else self.some(data, least=1)
        cut = data.draw(st.integers(0, len(gone)))
        failure = st.none() | st.builds(Failure, st.sampled_from(["a", "b"]))
        groups = []
        for part in (gone[:cut], gone[cut:]):
            if part:
                key = f"dead/{next(self.serial)}"
                groups.append(
                    (key, [Departure(place, data.draw(st.integers(0, 5)), data.draw(failure)) for place in part])
                )
                self.moved.update(dict.fromkeys(part, key))
        self.next(claims.move(self.claim, groups, settled=not self.alive(), nonce=self.nonce()))
        for move in self.claim.moves[-len(groups) :]:
            self.written[move.key] = claims.moved_index(self.claim, move, self.index)
            for _, group in [one for one in groups if one[0] == move.key]:
                said = self.written[move.key].records
                assert [one.attempts for one in said] == [departure.attempts for departure in group]
                assert [one.id for one in said] == [self.index.records[departure.index].id for departure in group]

    @precondition(lambda self: self.claim.pending_moves())
    @rule(data=st.data())
    def write_a_move(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([move.key for move in self.claim.pending_moves()]))
        pending = len(self.claim.pending_moves())
        self.next(claims.applied(self.claim, [key], nonce=self.nonce()))
        assert len(self.claim.pending_moves()) == pending - 1

    @precondition(lambda self: self.claim.pending_moves())
    @rule(data=st.data())
    def give_a_move_a_new_key(self, data: st.DataObject) -> None:
        old = data.draw(st.sampled_from([move.key for move in self.claim.pending_moves()]))
        new = f"dead/{next(self.serial)}"
        self.next(claims.rekey(self.claim, old, new, nonce=self.nonce()))
        self.written[new] = self.written.pop(old)

    @invariant()
    def ended_is_what_ended(self) -> None:
        """Exactly the finished and the moved messages have ended, each of them once."""
        assert self.claim.ended() == self.finished | set(self.moved)
        assert self.claim.finished == sorted(self.finished)
        everywhere = [*self.claim.finished, *(place for move in self.claim.moves for place in move.indices)]
        assert len(everywhere) == len(set(everywhere))

    @invariant()
    def nobody_pays_for_another(self) -> None:
        """Recorded starts are charged once; one more only for a message that may have run unrecorded, too."""
        for place, used in enumerate(self.attempts()):
            before, starts = self.index.records[place].attempts, self.recorded.get(place, 0)
            doubted = self.index.records[place].suspect or place in self.unrecorded
            assert used == before + starts + (1 if starts and doubted else 0)

    @invariant()
    def a_move_says_the_same_whoever_writes_it(self) -> None:
        """Its new segment is the same at any time after the move was recorded, whatever happened since."""
        assert {move.key for move in self.claim.moves} == set(self.written)
        for move in self.claim.moves:
            assert claims.moved_index(self.claim, move, self.index) == self.written[move.key]


TestClaimMachine = ClaimMachine.TestCase
TestClaimMachine.settings = settings(max_examples=150, stateful_step_count=30)
