"""Looks at the store after every write, and knows what no process may see: the whole state at one instant."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from s3queue_async import Keyring
from s3queue_async.engine.config import QueueConfig
from s3queue_async.engine.dedup import Marker
from s3queue_async.engine.packing import Packer
from s3queue_async.engine.registry import Heartbeat
from s3queue_async.protocol import board as boards
from s3queue_async.protocol import claim as claims
from s3queue_async.protocol import layout
from s3queue_async.protocol import segment as segments
from s3queue_async.protocol.board import Ticket
from s3queue_async.protocol.claim import Claim
from s3queue_async.protocol.layout import SegmentKey
from s3queue_async.protocol.segment import is_void
from tests.simulation.history import History
from tests.simulation.store import Store

LIVE = (layout.READY, layout.DELAYED, layout.DEAD)
HEARTBEATS = f"plugin/{layout.WORKERS}/"
BOARD = f"plugin/{layout.COORDINATOR}/{layout.BOARD}"
MARKERS = f"plugin/{layout.DEDUP}/"
KEYS = {"old": bytes(32), "new": bytes(range(32))}
"""Of the clusters that encrypt."""
OVERTAKING_S = 4.0
"""How much later than a poll a worker may still claim by what it saw: the age of its listing, the time that it leaves
to others, and the requests."""


class Watch:
    """Checks, at each change of the store, what must be true at every instant."""

    def __init__(self, store: Store, history: History) -> None:
        self._store = store
        self._history = history
        self._packer = Packer(keyring=Keyring(KEYS, current="old"))
        self._indices: dict[bytes, segments.Index] = {}
        self._claims: dict[bytes, Claim] = {}
        self._keys: dict[str, SegmentKey] = {}
        self._reported: set[str] = set()
        self._owners: dict[str, tuple[str, int]] = {}
        self._unclaimed_since: dict[str, float] = {}
        self._reserved_until: dict[str, float] = {}
        self._spoiled: set[Ticket] = set()
        self._hidden_until: dict[str, float] = {}
        self._term = (0, "")
        self._leased_until: dict[str, float] = {}
        self._fenced = history.fenced = {}
        store.on_change.append(self._changed)

    def records(self, place: str) -> Iterator[segments.Record]:
        """The messages of all segments in one place."""
        for key, found in self._store.objects.items():
            if key.startswith(place):
                yield from self._index(key, found.body).records

    def _changed(self, key: str) -> None:
        if key.startswith(HEARTBEATS):
            self._heartbeat(key)
        if key == BOARD:
            self._board()
        if key.startswith(MARKERS) and key in self._store.objects:
            marker = msgspec.json.decode(self._store.objects[key].body, type=Marker)
            if marker.state == "finished":
                self._history.done_at.setdefault(marker.message_id, self._store.world.time())
        if not key.startswith((*LIVE, layout.CLAIMS)):
            return
        if key.startswith(layout.CLAIMS) and key in self._store.objects:
            self._cut_short(key)
            self._claimed(key)
        self._one_live_copy()
        if self._history.faultless:
            self._priorities(key)

    def _heartbeat(self, key: str) -> None:
        worker_id = key.removeprefix(HEARTBEATS)
        if worker_id in self._fenced:
            # Final: what lands later is a repeated request, and nobody's lease.
            return
        now = self._store.world.time()
        found = self._store.objects.get(key)
        leased_until = self._leased_until.pop(key, None)
        if found is not None and b'"state":"fenced"' not in found.body:
            self._leased_until[key] = now + float(msgspec.json.decode(found.body)["ttl_s"])
            return
        self._fenced[worker_id] = now
        if found is not None and leased_until is not None and now < leased_until:
            self._history.problems.append(f"fenced {leased_until - now:.2f} s before its lease was over: {worker_id}")

    def _cut_short(self, key: str) -> None:
        """A claim may name the heartbeat whose long lease it ends."""
        claim = self._decoded(key, self._store.objects[key].body)
        heartbeat = HEARTBEATS + claim.owner
        found = self._store.objects.get(heartbeat)
        if claim.beat and found is not None and heartbeat in self._leased_until:
            beat = msgspec.json.decode(found.body, type=Heartbeat)
            if beat.nonce == claim.beat:
                ends = self._store.world.time() + beat.claims_ttl_s
                self._leased_until[heartbeat] = min(self._leased_until[heartbeat], ends)

    def spoil(self, tickets: Iterable[Ticket]) -> None:
        """Somebody puts tickets on the board: workers follow it until another one is published."""
        self._hide()
        self._spoiled = set(tickets)

    def _hide(self) -> None:
        """Whoever follows a spoiled board sees only what that names."""
        if self._spoiled:
            now, named = self._store.world.time(), {ticket.key for ticket in self._spoiled}
            self._hidden_until.update((key, now) for key in self._unclaimed_since if key not in named)

    def _board(self) -> None:
        """Only one publishes: terms grow, and a term has one leader; whoever deletes the board begins anew."""
        found = self._store.objects.get(BOARD)
        board = None if found is None else boards.decode(BOARD, found.body)
        if board is None or self._spoiled.isdisjoint(board.tickets):
            self._hide()
            self._spoiled.clear()
        if board is None:
            self._term = (0, "")
            return
        term, leader = self._term
        if board.term < term or (board.term == term and board.leader != leader):
            at_s = self._store.world.time() - 1000
            self._history.problems.append(
                f"term {board.term} of {board.leader} was published after term {term} of {leader} at {at_s:.2f}"
            )
        self._term = board.term, board.leader
        for ticket in board.tickets:
            if not ticket.stalled:
                self._reserved_until[ticket.key] = ticket.issued_ms / 1000 + self._history.settings.ticket_ttl

    def _claimed(self, key: str) -> None:
        claim = self._decoded(key, self._store.objects[key].body)
        segment = self._store.objects.get(claim.segment)
        if segment is None or self._owners.get(key) == (claim.owner, claim.token):
            return
        self._owners[key] = (claim.owner, claim.token)
        now = self._store.world.time()
        for record in self._index(claim.segment, segment.body).records:
            if record.dedup_id is not None:
                self._history.claimed_at[record.id, claim.owner] = now

    def _one_live_copy(self) -> None:
        """Invariant 3."""
        live: dict[str, str] = {}
        for key, found in self._store.objects.items():
            if not key.startswith(LIVE):
                continue
            for message_id in self._live_in(key, found.body, found.modified_s):
                other = live.setdefault(message_id, key)
                if other != key and message_id not in self._history.ambiguous and message_id not in self._reported:
                    self._reported.add(message_id)
                    at_s = self._store.world.time() - 1000
                    self._history.problems.append(f"{message_id} is live in {other} and {key} at {at_s:.2f}")

    def is_void(self, key: str) -> bool:
        """Whether a segment that is there landed too late."""
        found = self._store.objects[key]
        return is_void(self._key(key).created_ms, found.modified_s, self._history.settings.segment_age)

    def _live_in(self, key: str, body: bytes, modified_s: float) -> list[str]:
        parsed = self._key(key)
        if is_void(parsed.created_ms, modified_s, self._history.settings.segment_age):
            return []
        index = self._index(key, body)
        own = self._claim(parsed)
        ended = set() if own is None else own.ended()
        if index.parent is not None and index.parent in self._store.objects:
            parent = self._claim(self._key(index.parent))
            # While its parent is there, a moved copy lives from the moment at which the parent's claim gave its
            # messages away; a key that the claim does not name any more never will.
            if parent is None or not any(move.key == key for move in parent.moves):
                return []
        return [
            record.id for number, record in enumerate(index.records) if number not in ended and record.dedup_id is None
        ]

    def _priorities(self, changed: str) -> None:
        """Whoever claims takes the most urgent of what it can have seen."""
        objects, now = self._store.objects, self._store.world.time()
        unclaimed = [key for key in objects if key.startswith(layout.READY) and self._key(key).claim not in objects]
        since = {key: self._unclaimed_since.get(key, now) for key in unclaimed}
        if changed.startswith(layout.CLAIMS) and changed in objects:
            claimed = next((k for k in self._unclaimed_since if self._key(k).claim == changed), None)
            seen_after_s = now - self._history.settings.max_poll_interval - OVERTAKING_S
            if claimed is not None:
                self._hide()
                for key, since_s in since.items():
                    # Others leave a first ticket to the worker whose it is, busy as that may be.
                    free_s = max(since_s, self._reserved_until.get(key, since_s), self._hidden_until.get(key, since_s))
                    if self._key(key).priority > self._key(claimed).priority and free_s < seen_after_s:
                        self._history.problems.append(f"{claimed} was claimed before {key}, which waits longer")
        self._unclaimed_since = since

    def _key(self, key: str) -> SegmentKey:
        parsed = self._keys.get(key)
        if parsed is None:
            parsed = self._keys[key] = SegmentKey.parse(key)
        return parsed

    def _index(self, key: str, body: bytes) -> segments.Index:
        index = self._indices.get(body)
        if index is None:
            config = self._store.objects[layout.CONFIG].body
            self._packer.queue = msgspec.json.decode(config, type=QueueConfig).nonce
            index = self._indices[body] = self._packer.unpack_index(key, body)
        return index

    def _claim(self, key: SegmentKey) -> Claim | None:
        found = self._store.objects.get(key.claim)
        return None if found is None else self._decoded(key.claim, found.body)

    def _decoded(self, key: str, body: bytes) -> Claim:
        claim = self._claims.get(body)
        if claim is None:
            claim = self._claims[body] = claims.decode(key, body)
        return claim
