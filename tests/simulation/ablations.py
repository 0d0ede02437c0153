"""Single safeguards of the engine, each of which can be switched off: without it the simulation must find a failure.

Some are rules of the protocol, others undo the repair of a bug that the simulation found. They are patches of the
engine's functions, applied by tests alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec
import pytest

from s3queue_async.engine import (
    claimer,
    election,
    finder,
    producer,
    recovery,
    registry,
    session,
    settler,
    shared,
    tombstones,
    writing,
)
from s3queue_async.engine.dedup import Deduplicator
from s3queue_async.errors import QueueError
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.layout import Place, SegmentKey
from s3queue_async.settings import Settings
from s3queue_async.storage import probe, throttle
from s3queue_async.storage.base import Conflict, IfVersion, NotFound, Stored, Superseded
from s3queue_async.storage.swap import swap
from tests.simulation.history import Job
from tests.simulation.scenario import Scenario
from tests.simulation.store import PROFILES, Faults, Profile

FOREVER_S = 1e9
FAR = Profile("far", read_s=0.5, write_s=0.5, list_s=0.5)

Patch = pytest.MonkeyPatch


Focus = Callable[[Scenario], Scenario]


def as_drawn(scenario: Scenario) -> Scenario:
    """No more of anything than the seed says."""
    return scenario


def more(
    *,
    deeds: dict[str, int] | None = None,
    profile: str | Profile | None = None,
    jobs: Callable[[Scenario], Sequence[Job]] | None = None,
    settings: dict[str, Any] | None = None,
    fields: dict[str, Any] | None = None,
    calm: bool = False,
    **rates: Any,
) -> Focus:
    """More of what a safeguard is against, where it takes a rare coincidence to need it.

    Args:
        deeds: How often what is done to processes.
        profile: The store's.
        jobs: Other work.
        settings: Other settings of the queue.
        fields: Other fields of the scenario.
        calm: Nothing else goes wrong than what is named here.
        rates: Parts of the requests that go wrong, by fault.
    """

    def focus(scenario: Scenario) -> Scenario:
        named = profile if isinstance(profile, Profile) else None
        chosen = named or next((one for one in PROFILES if one.name == profile), scenario.profile)
        return dataclasses.replace(
            scenario,
            profile=chosen,
            faults=dataclasses.replace(Faults() if calm else scenario.faults, **rates),
            deeds={**(dict.fromkeys(scenario.deeds, 0) if calm else scenario.deeds), **(deeds or {})},
            jobs=scenario.jobs if jobs is None else tuple(jobs(scenario)),
            settings=msgspec.structs.replace(scenario.settings, **(settings or {})),
            **(fields or {}),
        )

    return focus


def failing(scenario: Scenario) -> list[Job]:
    """Nothing succeeds at once."""
    return [Job(job.number, "fails", min(job.duration_s, 0.3), 1) for job in scenario.jobs]


def work(number: int, duration_s: float, kind: str = "ok") -> Callable[[Scenario], list[Job]]:
    """So many messages that take so long each."""
    return lambda scenario: [Job(n, kind, duration_s, 1) for n in range(number)]


RACING: dict[str, Any] = {
    "coordinator": False,
    "segment_messages_max": 1,
    "segment_age": 2.0,
    "claim_linger": 4.0,
    "poll_interval": 0.2,
    "max_poll_interval": 0.5,
}
"""Workers look often, nobody tells them who takes what, and claims go as soon as they may."""

LONG_CUTS = more(
    calm=True,
    deeds={"cut": 12},
    profile="minio",
    jobs=work(3, 40.0),
    settings={
        "visibility_timeout": 6.0,
        "heartbeat_interval": 2.0,
        "poll_interval": 0.1,
        "max_poll_interval": 0.1,
    },
    fields={"workers": 4, "concurrency": 1, "deeds_within_s": 60.0},
)
"""Workers in the middle of long work do not reach the store for longer than their lease."""


@dataclass(frozen=True)
class Ablation:
    """A safeguard, how to do without it, and what there is more of then.

    Attributes:
        acted_by: The test that acts the coincidence out, where it is too rare for any seed.
    """

    name: str
    safeguard: str
    remove: Callable[[Patch], None]
    focus: Focus
    acted_by: str = ""


ABLATIONS: dict[str, Ablation] = {}


def ablation(
    safeguard: str, *, focus: Focus = as_drawn, acted_by: str = ""
) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    """Register what removes this safeguard."""

    def register(remove: Callable[[Patch], None]) -> Callable[[Patch], None]:
        name = remove.__name__.replace("_", "-")
        ABLATIONS[name] = Ablation(name, safeguard, remove, focus, acted_by)
        return remove

    return register


async def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


# -- compare-and-swap ----------------------------------------------------------------------------------------------


class _Unrecognisable:
    """A storage whose reads never show the very bytes that were written (a blank more: the same to a decoder)."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def get(self, key: str, **options: Any) -> Any:
        found = await self._inner.get(key, **options)
        return dataclasses.replace(found, body=found.body + b" ") if isinstance(found, Stored) else found


@ablation("After a 412 the object is read: its nonce shows whether the write was one's own")
def own_write_check(patch: Patch) -> None:
    async def blind(storage: Any, key: str, body: bytes, **options: Any) -> Any:
        return await swap(_Unrecognisable(storage), key, body, **options)

    patch.setattr(shared, "swap", blind)


@ablation("409 on a create is tried again, and read again before an update")
def conflict_is_no_verdict(patch: Patch) -> None:
    class Hasty(_Unrecognisable):
        async def put(self, key: str, body: bytes, **options: Any) -> Any:
            try:
                return await self._inner.put(key, body, **options)
            except Conflict as error:
                raise Superseded(key, None) from error

        async def get(self, key: str, **options: Any) -> Any:
            return await self._inner.get(key, **options)

    async def hasty(storage: Any, key: str, body: bytes, **options: Any) -> Any:
        return await swap(Hasty(storage), key, body, **options)

    patch.setattr(shared, "swap", hasty)


@ablation(
    "A claim's holder that finds its own earlier, unanswered write goes on from there",
    focus=more(
        calm=True,
        outages=16,
        partitions=("claims/",),
        jobs=work(24, 2.0, "fails"),
        settings={
            "coordinator": False,
            "visibility_timeout": 6.0,
            "heartbeat_interval": 2.0,
            "segment_messages_max": 4,
            "checkpoint_interval": 0.5,
            "split_after": None,
        },
        fields={"workers": 2},
    ),
)
def own_claim_adoption(patch: Patch) -> None:
    async def swap_once(self: Any, held: Any, change: Any) -> None:
        self._lease.check()
        claim = change(held.claim)
        held.version = await self._shared.swap(
            held.key.claim, claims.encode(claim), when=IfVersion(held.version), deadline_s=self._lease.trust_left_s
        )
        held.claim = claim

    patch.setattr(settler.Settler, "_write_claim", swap_once)


# -- claims --------------------------------------------------------------------------------------------------------


@ablation("A claim outlives its segment by `claim_linger`")
def claim_linger(patch: Patch) -> None:
    original = settler.Settler.let_linger

    def at_once(self: Any, key: Any, held: Any = None) -> None:
        original(self, key, held)
        last = self._linger.pop()
        self._linger.append(msgspec.structs.replace(last, until=0.0, until_s=0.0))

    patch.setattr(settler.Settler, "let_linger", at_once)
    patch.setattr(session, "LINGER_SWEEP_S", 0.05)


@ablation(
    "A claim whose reply came late is good only after another look at the segment",
    focus=more(
        calm=True,
        slow=0.3,
        jobs=work(40, 0.0),
        settings=RACING,
        fields={"workers": 4},
    ),
)
def second_look(patch: Patch) -> None:
    patch.setattr(Settings, "claim_trust", property(lambda self: FOREVER_S))


@ablation("A segment that landed later than `segment_age` is void")
def void_rule(patch: Patch) -> None:
    patch.setattr(segments, "is_void", lambda *args: False)


@ablation(
    "The markers of a batch rest before they name another segment",
    focus=more(
        profile="r2", jobs=work(40, 0.1), settings={"segment_age": 2.0, "claim_linger": 4.0}, late=0.1, throttled=0.05
    ),
)
def markers_rest(patch: Patch) -> None:
    patch.setattr(producer.Producer, "_rest", _nothing)


@ablation(
    "A claim that its owner's younger heartbeat does not name is anybody's",
    focus=more(settings={"coordinator": False}, late=0.1),
)
def abandonment_rule(patch: Patch) -> None:
    patch.setattr(registry.Registry, "is_abandoned", lambda *args: False)


@ablation("A heartbeat names what its worker tries to claim, not only what it holds")
def names_of_claims_under_way(patch: Patch) -> None:
    original = session.Session._vitals

    def forgetful(self: Any) -> Any:
        vitals = original(self)
        return msgspec.structs.replace(vitals, held=sorted({*self.held, *self.settler.revivable()}))

    patch.setattr(session.Session, "_vitals", forgetful)


@ablation("A moved segment runs only when its parent is gone, or shows the move as applied")
def parent_check(patch: Patch) -> None:
    async def always(*args: Any) -> bool:
        return True

    patch.setattr(claimer.Claimer, "_parent_allows", always)


@ablation(
    "A claim is given back only if it is still one's own",
    focus=more(
        calm=True,
        deeds={"terminate": 12},
        repeated=0.5,
        profile=FAR,
        jobs=work(60, 3.0),
        settings={"coordinator": False, "segment_messages_max": 4, "split_after": None},
        fields={"workers": 4, "concurrency": 8, "conditional_delete": True, "deeds_within_s": 20.0},
    ),
)
def conditional_give_back(patch: Patch) -> None:
    async def delete(self: Any, held: Any) -> None:
        await self._shared.insist(
            lambda: self._shared.storage.delete(held.key.claim), while_true=lambda: self._lease.trusted
        )

    patch.setattr(settler.Settler, "_delete_own_claim", delete)


@ablation("Each owner's fencing token is higher than the last one's")
def token_growth(patch: Patch) -> None:
    original = claims.take

    def same(claim: Any, **options: Any) -> Any:
        return msgspec.structs.replace(original(claim, **options), token=claim.token)

    patch.setattr(claims, "take", same)


@ablation("Messages that were in hand when a worker was lost run alone")
def isolation(patch: Patch) -> None:
    patch.setattr(claims.Claim, "isolated", lambda self, index: False)


@ablation("In isolation each start is recorded before it happens")
def recorded_starts(patch: Patch) -> None:
    patch.setattr(settler.Settler, "record_start", _nothing)


@ablation(
    "The highest priority is claimed first",
    focus=more(calm=True, jobs=work(30, 1.0), settings={"coordinator": False}, fields={"workers": 1}),
)
def priorities(patch: Patch) -> None:
    def oldest_first(self: Any, found: list[Any], **options: Any) -> list[Any]:
        return sorted(found, key=lambda candidate: candidate.key.ulid)

    patch.setattr(finder.Finder, "_ranked", oldest_first)


@ablation("A delayed segment is claimed only when it is due by the store's clock")
def due_times(patch: Patch) -> None:
    original = layout.due_bound
    patch.setattr(layout, "due_bound", lambda time_ms: original(time_ms + 10_000))


@ablation(
    "A claim lingers by the store's time, too, not by the local clock alone",
    acted_by="test_a_local_clock_that_jumps_does_not_cut_a_linger_short",
)
def linger_by_store_time(patch: Patch) -> None:
    patch.setattr(settler.Settler, "_is_over", lambda self, item: item.until <= self._shared.clock.monotonic())


# -- leases --------------------------------------------------------------------------------------------------------


@ablation(
    "Whoever takes over fences the owner first, by compare-and-swap on its heartbeat", focus=more(deeds={"suspend": 8})
)
def fencing(patch: Patch) -> None:
    async def over(self: Any, peer: Any) -> bool:
        # So that nothing is left behind: a heartbeat that has been over for very long is deleted.
        if self.lease_left_s(peer) < -3 * peer.heartbeat.ttl_s:
            await self._bury(peer)
        return True

    patch.setattr(registry.Registry, "_fence", over)


@ablation(
    "A worker at rest trusts its long lease no longer once it claims something",
    acted_by="test_a_worker_that_was_at_rest_trusts_no_long_lease_once_it_claims",
)
def short_trust_of_a_claim(patch: Patch) -> None:
    original = registry.Lease.needed

    def trusting(self: Any) -> None:
        until = self._trusted_until
        original(self)
        self._trusted_until = until

    patch.setattr(registry.Lease, "needed", trusting)


@ablation("A worker stops by its own clock when its lease was not renewed", focus=LONG_CUTS)
def trust_window(patch: Patch) -> None:
    original = registry.Lease._beat

    async def trusting(self: Any, when: Any) -> None:
        try:
            await original(self, when)
        finally:
            self._trusted_until = float("inf")

    patch.setattr(registry.Lease, "_beat", trusting)


@ablation(
    "A margin lies between the end of a worker's trust and the moment from which others take over", focus=LONG_CUTS
)
def lease_margin(patch: Patch) -> None:
    patch.setattr(Settings, "lease_margin", property(lambda self: 0.0))


@ablation(
    "Heartbeats are written by compare-and-swap",
    focus=more(
        deeds={"suspend": 8},
        jobs=work(12, 40.0),
        settings={"visibility_timeout": 6.0, "heartbeat_interval": 2.0},
        calm=True,
    ),
)
def heartbeat_condition(patch: Patch) -> None:
    original = shared.Shared.swap

    async def careless(self: Any, key: str, body: bytes, **options: Any) -> str:
        if b'"state":"alive"' in body:
            written = await self.workers.put(key, body)
            return str(written.version)
        return await original(self, key, body, **options)

    patch.setattr(shared.Shared, "swap", careless)


@ablation("A worker recognises an earlier heartbeat of its own that landed unanswered", focus=more(late=0.4))
def own_heartbeat_adoption(patch: Patch) -> None:
    original = registry.Lease._beat

    async def forgetful(self: Any, when: Any) -> None:
        self._unanswered.clear()
        await original(self, when)

    patch.setattr(registry.Lease, "_beat", forgetful)


@ablation(
    "A heartbeat is dated by what the store's replies said, not by the local clock",
    focus=more(
        calm=True,
        deeds={"jump": 60},
        jobs=work(12, 4.0),
        settings={
            "visibility_timeout": 6.0,
            "heartbeat_interval": 2.0,
            "segment_messages_max": 1,
            "poll_interval": 1.0,
        },
        fields={"workers": 4, "concurrency": 1, "deeds_within_s": 80.0},
    ),
)
def heartbeat_dates(patch: Patch) -> None:
    patch.setattr(shared.StoreTime, "seen", shared.StoreTime.earliest)


@ablation(
    "A lease is over by the dates of the store's replies, not by the local clock alone",
    focus=more(
        deeds={"jump": 40},
        jobs=work(20, 20.0),
        settings={"visibility_timeout": 6.0, "heartbeat_interval": 2.0},
        profile=FAR,
        fields={"workers": 4},
        calm=True,
    ),
)
def certain_time(patch: Patch) -> None:
    patch.setattr(shared.StoreTime, "certain", shared.StoreTime.earliest)


@ablation("A worker that leaves deletes its heartbeat")
def farewell(patch: Patch) -> None:
    patch.setattr(session.Session, "_farewell", _nothing)


@ablation("The heartbeat of a fenced worker is deleted")
def burial(patch: Patch) -> None:
    patch.setattr(registry.Registry, "_bury", _nothing)


# -- coordinator ---------------------------------------------------------------------------------------------------


@ablation("The board is published by compare-and-swap", focus=more(deeds={"pause": 8}, fields={"workers": 4}))
def board_condition(patch: Patch) -> None:
    original = shared.Shared.swap

    async def careless(self: Any, key: str, body: bytes, **options: Any) -> str:
        if key == layout.BOARD:
            written = await options["storage"].put(key, body)
            return str(written.version)
        return await original(self, key, body, **options)

    patch.setattr(shared.Shared, "swap", careless)


@ablation(
    "A resignation that loses against a late write of the same coordinator is made again",
    focus=more(calm=True, deeds={"terminate": 12}, settings={"coordinator": True}, fields={"workers": 4}),
)
def resigned_over_own(patch: Patch) -> None:
    original = election.Election._swap

    async def once(self: Any, board: Any) -> bool:
        written = await original(self, board)
        if board.state == "resigned":
            self._unresigned = None
        return written

    patch.setattr(election.Election, "_swap", once)


@ablation("A ticket makes nothing due", focus=more(fields={"hints": {"tickets mixed up": 8}}))
def due_before_ticket(patch: Patch) -> None:
    patch.setattr(finder.Finder, "_is_claimable", lambda self, key: key.place is not Place.DEAD)


@ablation(
    "A more urgent ticket that its worker leaves unused comes before one's own",
    focus=more(
        calm=True,
        jobs=work(40, 4.0),
        settings={"coordinator": True, "ticket_ttl": 3.0, "segment_messages_max": 1, "max_poll_interval": 2.0},
        fields={"workers": 2, "concurrency": 1, "hints": {"tickets mixed up": 4}},
    ),
)
def urgent_before_own(patch: Patch) -> None:
    original = finder.Finder._by_tickets

    def own_first(self: Any) -> Any:
        tickets = self._tickets if self._election.leading else self._election.board.tickets
        own = (ticket for ticket in tickets if ticket.worker == self._lease.worker_id)
        return self._candidates(own, self._shared.clock.monotonic()) or original(self)

    patch.setattr(finder.Finder, "_by_tickets", own_first)


# -- settlements ---------------------------------------------------------------------------------------------------


@ablation("A move is recorded in the claim before the new segment is written")
def intent_before_move(patch: Patch) -> None:
    original = settler.Settler._write_claim

    async def late(self: Any, held: Any, change: Any) -> None:
        before, claim = held.claim, change(held.claim)
        if len(claim.pending_moves()) > len(before.pending_moves()):
            held.claim = claim
            try:
                await self._apply_all(held)
            finally:
                held.claim = before
        await original(self, held, lambda _: claim)

    patch.setattr(settler.Settler, "_write_claim", late)


@ablation("A move that is known to be written is never written again")
def applied_moves(patch: Patch) -> None:
    patch.setattr(claims.Claim, "pending_moves", lambda self: list(self.moves))


@ablation(
    "What is still to be written is read off the claim after a rename whose reply was lost",
    acted_by="test_a_rename_whose_reply_was_lost",
)
def moves_read_off_the_claim(patch: Patch) -> None:
    async def apply_all(self: Any, held: Any) -> set[str]:
        written: set[str] = set()
        pending = held.claim.pending_moves()
        while pending:
            late = []
            for move in pending:
                if await self._apply(held, move):
                    written.add(move.key)
                else:
                    late.append(move)
            renamed = {move.key: self._renamed(move) for move in late}
            if renamed:
                await self._write_claim(held, partial(settler._rekeyed, renamed=renamed, nonce=self._shared.nonce))
            pending = [msgspec.structs.replace(move, key=renamed[move.key]) for move in late]
        return written

    patch.setattr(settler.Settler, "_apply_all", apply_all)


@ablation("All moves are written before the segment is deleted")
def moves_before_delete(patch: Patch) -> None:
    original = settler.Settler._apply_all

    async def after(self: Any, held: Any) -> set[str]:
        if held.complete:
            await self._delete([held.key.text])
        return await original(self, held)

    patch.setattr(settler.Settler, "_apply_all", after)


@ablation(
    "When a settled segment is gone, all that moved out of it was written",
    acted_by="test_a_late_delete_while_a_settlement_is_finished_by_another",
)
def gone_means_moved(patch: Patch) -> None:
    async def never(*args: Any) -> bool:
        return False

    patch.setattr(settler.Settler, "_is_gone", never)


@ablation(
    "A worker that stood still while a start was recorded does not begin it after its lease",
    focus=more(
        calm=True,
        deeds={"pause": 16, "crash": 6},
        profile=Profile("slow writes", read_s=0.1, write_s=0.4, list_s=0.1),
        jobs=work(30, 0.2),
        settings={
            "visibility_timeout": 6.0,
            "heartbeat_interval": 2.0,
            "segment_messages_max": 16,
            "split_after": None,
        },
        fields={"workers": 3, "concurrency": 8, "deeds_within_s": 60.0, "producers_work": False},
    ),
)
def second_look_at_the_lease(patch: Patch) -> None:
    async def started(self: Any, held: Any, index: int) -> bool:
        try:
            await self.settler.record_start(held, index)
        except QueueError as error:
            self.feed.done(held)
            self.settler.lose(held, str(error))
            self.slot_free()
            return False
        return True

    patch.setattr(session.Session, "started_alone", started)


@ablation("The segment is deleted before its claim")
def delete_order(patch: Patch) -> None:
    original = settler.Settler._delete

    async def claims_first(self: Any, keys: list[str]) -> None:
        ended = [SegmentKey.parse(key).claim for key in keys if not key.startswith(layout.CLAIMS)]
        if ended:
            await self._shared.storage.delete_many(ended)
        await original(self, keys)

    patch.setattr(settler.Settler, "_delete", claims_first)


@ablation("Only one lane at a time settles a segment")
def one_settlement_at_a_time(patch: Patch) -> None:
    class Open:
        async def __aenter__(self) -> None:
            return None

        async def __aexit__(self, *error: object) -> None:
            return None

    def submit(self: Any, held: Any) -> None:
        if not held.queued and not held.ended and held.lost is None:
            held.queued = True
            self._queue.append(held)
            self._arrived.set()

    patch.setattr(settler.Settler, "submit", submit)
    patch.setattr("s3queue_async.engine.held.anyio.Lock", Open)


# -- late copies ---------------------------------------------------------------------------------------------------


REVIVED: dict[str, Any] = {**RACING, "segment_age": 5.0, "claim_linger": 7.0}
"""As ``RACING``, with segments that may come back for long, and their claims gone soon after that."""


@ablation(
    "A heartbeat names ended segments that a late write may bring back",
    focus=more(
        calm=True,
        repeated=0.5,
        jobs=work(40, 0.0),
        settings={**REVIVED, "claim_linger": 10.0, "visibility_timeout": 6.0, "heartbeat_interval": 1.0},
        fields={"workers": 4},
    ),
)
def names_of_ended_segments(patch: Patch) -> None:
    patch.setattr(settler.Settler, "revivable", lambda self: [])


@ablation("A young segment is deleted once more before its claim goes", focus=more(repeated=0.4))
def second_delete(patch: Patch) -> None:
    original = settler.Settler.let_linger

    def once(self: Any, key: Any, held: Any = None) -> None:
        original(self, key, held)
        last = self._linger.pop()
        self._linger.append(msgspec.structs.replace(last, revivable=""))

    patch.setattr(settler.Settler, "let_linger", once)


@ablation(
    "The claim of a young segment says that its moves are written before the segment goes",
    focus=more(
        deeds={"crash": 8},
        repeated=0.5,
        jobs=failing,
        settings={**REVIVED, "visibility_timeout": 10.0, "heartbeat_interval": 3.0, "backoff_base": 0.2},
        fields={"workers": 3, "deeds_within_s": 20.0},
    ),
)
def applied_before_delete(patch: Patch) -> None:
    original = settler.Settler._record_applied

    async def unless_complete(self: Any, held: Any, keys: Any) -> None:
        if not held.complete:
            await original(self, held, keys)

    patch.setattr(settler.Settler, "_record_applied", unless_complete)


@ablation("A worker does not take again what it has just ended", focus=more(repeated=0.4))
def memory_of_the_ended(patch: Patch) -> None:
    patch.setattr(session.Session, "_known", lambda self, name: name in self.held)


@ablation(
    "The last worker to leave names the young segments that it ended for whoever comes next",
    acted_by="test_a_late_copy_lands_while_the_next_one_works",
)
def tombstones_of_the_last(patch: Patch) -> None:
    patch.setattr(tombstones.Tombstones, "names", lambda self, name: False)


@ablation(
    "A worker looks whether it is still alone once its tombstone is written",
    acted_by="test_somebody_registers_while_the_tombstone_is_written",
)
def last_look_around(patch: Patch) -> None:
    original = tombstones.Tombstones._alone

    async def once(self: Any) -> bool:
        self.looked = getattr(self, "looked", False) or await original(self)
        return bool(self.looked)

    patch.setattr(tombstones.Tombstones, "_alone", once)


@ablation(
    "A worker that leaves says of the young segments that it ended that they are finished",
    focus=more(
        calm=True,
        deeds={"terminate": 12},
        repeated=0.5,
        jobs=work(40, 0.0),
        settings=REVIVED,
        fields={"workers": 4, "deeds_within_s": 20.0},
    ),
)
def disowned_segments(patch: Patch) -> None:
    patch.setattr(settler.Settler, "disown_ended", _nothing)


@ablation(
    "Who writes a move that another worker wrote before knows it by its messages: encrypted, its bytes are others",
    focus=more(deeds={"crash": 6}, jobs=failing, fields={"encrypted": True}, lost_reply=0.1),
)
def same_messages_other_bytes(patch: Patch) -> None:
    async def by_bytes(*args: Any) -> bool:
        return False

    patch.setattr(writing, "_is_the_same", by_bytes)


# -- enqueue and deduplication -------------------------------------------------------------------------------------


@ablation("An enqueue returns only when its segment is durable")
def durable_before_acknowledged(patch: Patch) -> None:
    original = writing.put_segment

    async def hopeful(shared_: Any, key: Any, segment: Any, **options: Any) -> writing.Fate:
        def give_up(error: BaseException) -> None:
            raise error

        try:
            return await original(shared_, key, segment, **{**options, "give_up": give_up})
        except Exception:  # noqa: BLE001 - to take any failure for a success is the point here
            return writing.Fate.WRITTEN

    patch.setattr(producer, "put_segment", hopeful)


@ablation(
    "A missing segment whose claim is there was written, and run",
    focus=more(
        jobs=work(12, 0.0),
        settings={"segment_age": 15.0, "claim_linger": 40.0, "segment_messages_max": 1},
        lost_reply=0.3,
        lost_request=0.3,
    ),
)
def claim_shows_the_write(patch: Patch) -> None:
    original = writing.look

    class Unclaimed(_Unrecognisable):
        async def get(self, key: str, **options: Any) -> Any:
            if key.startswith(layout.CLAIMS):
                raise NotFound(key)
            return await self._inner.get(key, **options)

    class View:
        def __init__(self, inner: Any) -> None:
            self._inner = inner
            self.storage = Unclaimed(inner.storage)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._inner, name)

    async def blind(shared_: Any, key: Any, body: bytes, **options: Any) -> Any:
        view: Any = View(shared_)
        return await original(view, key, body, **options)

    patch.setattr(writing, "look", blind)


@ablation(
    "A claim that the writer itself made beside its segment does not prove that the segment was written",
    focus=more(
        calm=True,
        deeds={"crash": 12},
        lost_request=0.3,
        jobs=work(24, 3.0),
        settings={"segment_messages_max": 4, "coordinator": False},
        fields={"producers_work": True, "workers": 1, "deeds_within_s": 20.0},
    ),
)
def early_claims_prove_nothing(patch: Patch) -> None:
    async def any_claim(shared_: Any, key: SegmentKey) -> bool:
        try:
            await shared_.storage.get(key.claim)
        except NotFound:
            return False
        return True

    patch.setattr(writing, "_is_claimed", any_claim)


@ablation(
    "That a segment was not written is certain only once it is too old to land",
    focus=more(calm=True, late=0.3, jobs=work(24, 1.0), settings={"segment_age": 15.0, "claim_linger": 40.0}),
)
def old_enough_to_decide(patch: Patch) -> None:
    original = writing.look

    async def hasty(shared_: Any, key: Any, body: bytes, **options: Any) -> Any:
        return await original(shared_, key, body, **options) or writing.Fate.NOT_WRITTEN

    patch.setattr(writing, "look", hasty)


@ablation(
    "Deduplication: the marker says `finished` before the segment goes",
)
def finished_marker(patch: Patch) -> None:
    original = settler.Settler._mark

    async def moves_only(self: Any, held: Any, finished: Any, departing: Any) -> None:
        await original(self, held, (), departing)

    patch.setattr(settler.Settler, "_mark", moves_only)


@ablation(
    "Deduplication: the marker says `written` before the message moves",
)
def written_marker(patch: Patch) -> None:
    original = settler.Settler._mark

    async def finished_only(self: Any, held: Any, finished: Any, departing: Any) -> None:
        await original(self, held, finished, ())

    patch.setattr(settler.Settler, "_mark", finished_only)


@ablation(
    "Deduplication: a claimed message whose marker names another copy, or is finished, is dropped",
)
def dropping_of_copies(patch: Patch) -> None:
    patch.setattr(Deduplicator, "is_duplicate", staticmethod(lambda *args, **options: False))


@ablation(
    "Deduplication: a marker whose segment may still land is not taken over",
)
def patience_with_markers(patch: Patch) -> None:
    original = Deduplicator._was_written

    async def hasty(self: Any, marker: Any) -> bool:
        return bool(await original(self, marker))

    patch.setattr(Deduplicator, "_was_written", hasty)


# -- clearing up ---------------------------------------------------------------------------------------------------


@ablation("Claims without a segment are swept")
def swept_claims(patch: Patch) -> None:
    patch.setattr(recovery.Recovery, "_sweep_claims", _nothing)


@ablation("Workers whose lease is over are fenced although nobody waits for what they held")
def swept_workers(patch: Patch) -> None:
    patch.setattr(recovery.Recovery, "_sweep_workers", _nothing)


@ablation(
    "The sweep remembers a claim that it deletes only as long as the deletion takes",
    focus=more(deeds={"crash": 12}, late=0.4, settings=RACING, fields={"workers": 2}),
)
def forgetful_sweep(patch: Patch) -> None:
    original = recovery.Recovery._look_at_claim

    async def for_ever(self: Any, entry: Any) -> None:
        await original(self, entry)
        if entry.key in self._lingering:
            self._lingering[entry.key] = float("inf")

    patch.setattr(recovery.Recovery, "_look_at_claim", for_ever)


@ablation("The probe waits for a store that allows one write a second to one key", focus=more(profile="r2"))
def patient_probe(patch: Patch) -> None:
    patch.setattr(probe, "_THROTTLED_TRIES", 0)


@ablation("Heartbeats do not wait while the store throttles", focus=more(throttled=0.2))
def urgent_heartbeats(patch: Patch) -> None:
    original = throttle.ThrottledStorage.__init__

    def init(self: Any, storage: Any, **options: Any) -> None:
        original(self, storage, **{**options, "urgent": lambda key: False})

    patch.setattr(throttle.ThrottledStorage, "__init__", init)
