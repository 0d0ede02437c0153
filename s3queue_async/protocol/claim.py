"""The state machine of a claim: claim, take, start, progress, move, settle.

A claim is the only mutable state of a segment. Every transition is a pure function from one claim to the next; the
engine writes the result by compare-and-swap, which alone makes it true. Each written body carries a fresh nonce, so
that equal states never have equal bytes (ABA) and a writer recognises its own write.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from s3queue_async.errors import CorruptObject
from s3queue_async.protocol.segment import Failure, Index, Record


class Move(msgspec.Struct, frozen=True):
    """Messages that leave a segment for a new one; enough to write the new one again after a crash.

    Attributes:
        key: The new segment's whole key.
        indices: Which messages, in the new segment's order.
        attempts: Of each message, used up so far.
        failures: Of each message, its place in the claim's table of failures, or -1 to keep the one it has.
        token: The claim's token as the move was decided: what the messages' fencing tokens go on from.
        applied: Whether the new segment is known to be written; such a move is never written again.
    """

    key: str
    indices: list[int]
    attempts: list[int]
    failures: list[int]
    token: int
    applied: bool = False


class Claim(msgspec.Struct, frozen=True, omit_defaults=True):
    """Who holds a segment and what became of its messages.

    Attributes:
        nonce: Fresh in every written body.
        segment: The segment's whole key.
        owner: The worker's id; "" when free.
        token: Grows with every owner: the fencing token.
        claimed_ms: Store time at which the owner claimed it.
        state: ``open`` while messages may run; ``settled`` once every message is finished or moved: the commit point.
        crashes: How many owners lost it without settling; from the first on, messages run alone.
        finished: Indices of finished messages.
        starts: In isolation: recorded starts by index.
        suspects: Indices that were unfinished when the first owner was lost; any of them may have been running.
        moves: Messages that left for another segment.
        failure_table: Failures that the moves refer to.
        early: Whether the segment's writer made it beside the segment, before that was known to be there: such a claim
            proves nothing of the segment, until another owner takes it.
        beat: Nonce of the owner's last heartbeat, when that promised a long lease, which this claim cuts short.
        sealed_failures: The same, encrypted, as it is stored by a queue with a keyring; ``failure_table`` is empty then.
    """

    nonce: str
    segment: str
    owner: str
    token: int
    claimed_ms: int
    state: Literal["open", "settled"] = "open"
    crashes: int = 0
    finished: list[int] = []
    starts: dict[int, int] = {}
    suspects: list[int] = []
    moves: list[Move] = []
    failure_table: list[Failure] = []
    early: bool = False
    beat: str = ""
    sealed_failures: bytes = b""

    def isolated(self, index: Index) -> bool:
        """Whether messages must run alone, each start recorded before it happens."""
        return self.crashes > 0 or any(record.suspect for record in index.records)

    @property
    def free(self) -> bool:
        """Whether anybody may take it at once."""
        return self.owner == ""

    def ended(self) -> set[int]:
        """Indices that nobody may run under this claim any more: finished or moved."""
        return {*self.finished, *(index for move in self.moves for index in move.indices)}

    def pending_moves(self) -> list[Move]:
        """Moves whose new segment is not known to be written."""
        return [move for move in self.moves if not move.applied]

    def attempts(self, index: int, record: Record) -> int:
        """Attempts that the message has used up.

        In isolation a start counts once it is recorded. The first owner ran messages side by side without
        recording, so its loss is charged to nobody at first; a message whose recorded start was not survived either
        is charged for both, so that a message that kills its worker runs ``max_attempts`` times and no more (twice
        when that is 1: the first time, nothing told it from its neighbours).
        """
        started = self.starts.get(index, 0)
        return record.attempts + started + (1 if started and self.is_suspect(index, record) else 0)

    def is_suspect(self, index: int, record: Record) -> bool:
        """Whether the message may have been running, unrecorded, when a worker was lost."""
        return record.suspect or index in self.suspects


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Claim)
_replace = msgspec.structs.replace


def encode(claim: Claim) -> bytes:
    """The body of a claim's object."""
    return _encoder.encode(claim)


def decode(key: str, body: bytes) -> Claim:
    """Read a claim. Raises CorruptObject when the bytes are none."""
    try:
        return _decoder.decode(body)
    except (msgspec.DecodeError, msgspec.ValidationError) as error:
        raise CorruptObject(key, f"the claim cannot be read ({error})") from error


def fresh(segment: str, *, owner: str, now_ms: int, nonce: str, early: bool = False, beat: str = "") -> Claim:
    """The first claim on a segment."""
    return Claim(nonce=nonce, segment=segment, owner=owner, token=1, claimed_ms=now_ms, early=early, beat=beat)


def take(claim: Claim, *, source: Index, owner: str, now_ms: int, nonce: str, crashed: bool, beat: str = "") -> Claim:
    """Take a claim from nobody or from an owner that is lost; the caller made sure of that.

    Args:
        claim: As it is stored.
        source: The segment's index.
        owner: The new owner's worker id.
        now_ms: Store time.
        nonce: Fresh.
        crashed: Whether the owner may have been running messages: False when it had given the claim up or back.
        beat: Nonce of the new owner's last heartbeat, when this claim cuts its lease short.
    """
    taken = _replace(claim, nonce=nonce, owner=owner, token=claim.token + 1, claimed_ms=now_ms, early=False, beat=beat)
    if not crashed or claim.free:
        return taken
    suspects = claim.suspects
    if not claim.isolated(source):
        ended = claim.ended()
        suspects = [index for index in range(len(source.records)) if index not in ended]
    return _replace(taken, crashes=claim.crashes + 1, suspects=suspects)


def after_corruption(segment: str, *, count: int, owner: str, now_ms: int, nonce: str, beat: str = "") -> Claim:
    """The claim that replaces an unreadable one: nothing is known of its history, so the messages run alone.

    Its fencing token goes on from the store's time, which no count of deliveries reaches.
    """
    return Claim(
        nonce=nonce,
        segment=segment,
        owner=owner,
        token=now_ms,
        claimed_ms=now_ms,
        crashes=1,
        suspects=list(range(count)),
        beat=beat,
    )


def release(claim: Claim, *, nonce: str) -> Claim:
    """Give a claim back untouched, on stores that cannot delete it conditionally."""
    return _replace(claim, nonce=nonce, owner="")


def start(claim: Claim, index: int, *, times: int | None = None, finished: Iterable[int] = (), nonce: str) -> Claim:
    """Record that a message is about to run alone, and what was finished since the last write.

    ``times`` is how often it will have been started then: given, a repeated write counts once.
    """
    starts = {**claim.starts, index: claim.starts.get(index, 0) + 1 if times is None else times}
    return _replace(claim, nonce=nonce, starts=starts, finished=_merged(claim, finished))


def finish(claim: Claim, indices: Iterable[int], *, nonce: str) -> Claim:
    """Record finished messages."""
    return _replace(claim, nonce=nonce, finished=_merged(claim, indices))


def _merged(claim: Claim, finished: Iterable[int]) -> list[int]:
    return sorted({*claim.finished, *finished})


class Departure(msgspec.Struct, frozen=True):
    """A message about to move: what the new segment says of it."""

    index: int
    attempts: int
    failure: Failure | None = None


def move(
    claim: Claim,
    departures: Iterable[tuple[str, Sequence[Departure]]],
    *,
    settled: bool,
    finished: Iterable[int] = (),
    nonce: str,
) -> Claim:
    """Record the intent to move messages, by new segment key; ``settled`` when nothing stays behind."""
    table = list(claim.failure_table)
    places = {failure: place for place, failure in enumerate(table)}
    moves = list(claim.moves)
    for key, group in departures:
        failures = []
        for departure in group:
            if departure.failure is None:
                failures.append(-1)
                continue
            place = places.get(departure.failure)
            if place is None:
                place = places[departure.failure] = len(table)
                table.append(departure.failure)
            failures.append(place)
        moves.append(Move(key, [d.index for d in group], [d.attempts for d in group], failures, claim.token))
    return _replace(
        claim,
        nonce=nonce,
        state="settled" if settled else "open",
        finished=_merged(claim, finished),
        moves=moves,
        failure_table=table,
    )


def applied(claim: Claim, keys: Iterable[str], *, nonce: str) -> Claim:
    """Record that the new segments of these moves are written."""
    done = set(keys)
    moves = [_replace(m, applied=True) if m.key in done else m for m in claim.moves]
    return _replace(claim, nonce=nonce, moves=moves)


def rekey(claim: Claim, old: str, new: str, *, nonce: str) -> Claim:
    """Give a move that was not written in time a new key, before it is written."""
    moves = [_replace(m, key=new) if m.key == old and not m.applied else m for m in claim.moves]
    return _replace(claim, nonce=nonce, moves=moves)


def moved_index(claim: Claim, wanted: Move, source: Index) -> Index:
    """The index of a move's new segment: the same bytes whoever writes it."""
    records = []
    for index, attempts, failure in zip(wanted.indices, wanted.attempts, wanted.failures, strict=True):
        record = source.records[index]
        records.append(
            _replace(
                record,
                attempts=attempts,
                deliveries=record.deliveries + wanted.token,
                failure=record.failure if failure < 0 else claim.failure_table[failure],
                suspect=claim.is_suspect(index, record) and not claim.starts.get(index, 0),
            )
        )
    return Index(records, source.priority, parent=claim.segment)
