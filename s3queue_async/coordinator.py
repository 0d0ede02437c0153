"""The queue's coordinator from outside: who it is, and how to have another one."""

from __future__ import annotations

import msgspec

from s3queue_async.engine.shared import Shared
from s3queue_async.errors import CorruptObject, StoreUnavailable
from s3queue_async.looks import CoordinatorInfo
from s3queue_async.protocol import board as boards
from s3queue_async.protocol import layout
from s3queue_async.protocol.board import Board
from s3queue_async.storage.base import IfVersion, NotFound, Stored, Superseded
from s3queue_async.storage.plugin import PluginStorage

SWAP_TRIES_MAX = 30
SWAP_WITHIN_S = 10.0


class Coordinator:
    """Looks at the coordinator's board, whoever leads."""

    def __init__(self, shared: Shared) -> None:
        self._shared = shared
        self._store = PluginStorage(shared.storage, layout.COORDINATOR)

    async def show(self) -> CoordinatorInfo | None:
        """Who leads, by the board; None where no board was ever written, or nobody can read it."""
        stored = await self._read()
        board = _decoded(stored)
        return None if stored is None or board is None else self._info(stored, board)

    async def step_down(self) -> CoordinatorInfo | None:
        """Resign in the coordinator's place, so that another worker takes over.

        The board is written once more by compare-and-swap, as the coordinator's own but resigned, tickets and all:
        another worker takes over at its next look, within ``election_interval``. The old coordinator finds out at its
        next publication at the latest, leads no more, and leaves the election to others for four election intervals.
        Messages are not touched; until somebody leads, workers list for themselves.

        Returns:
            Who was asked to step down; None when nobody leads.

        Raises:
            StoreUnavailable: The store did not answer, or the board was written by the coordinator during every try.
        """
        stored = await self._read()
        board = _decoded(stored)
        if stored is None or board is None:
            return None
        asked = self._info(stored, board)
        if asked.state != "leading":
            return None
        for tries in range(SWAP_TRIES_MAX):
            resigned = msgspec.structs.replace(board, nonce=self._shared.nonce(), state="resigned")
            try:
                await self._shared.swap(
                    layout.BOARD,
                    boards.encode(resigned),
                    when=IfVersion(stored.version),
                    deadline_s=SWAP_WITHIN_S,
                    storage=self._store,
                )
            except Superseded as lost:
                stored, board = lost.stored, _decoded(lost.stored)
                if stored is None or board is None or board.state == "resigned" or board.term != asked.term:
                    # It leads no more already.
                    return asked
                await self._shared.pause(min(tries, 3))
            else:
                return asked
        raise StoreUnavailable(
            f"The coordinator's board was written by {asked.worker_id} during each of {SWAP_TRIES_MAX} tries.",
            suggestion="Try again.",
        )

    async def _read(self) -> Stored | None:
        try:
            stored = await self._store.get(layout.BOARD)
        except NotFound:
            return None
        assert isinstance(stored, Stored)
        return stored

    def _info(self, stored: Stored, board: Board) -> CoordinatorInfo:
        return described(self._shared, stored, board)


def described(shared: Shared, stored: Stored, board: Board) -> CoordinatorInfo:
    """A board in words; it counts as expired once anybody may take over."""
    age_s = max(0.0, shared.time.now_ms() / 1000 - stored.modified_s)
    state = board.state
    over_s = board.ttl_s + shared.time.resolution_s + shared.settings.lease_margin
    return CoordinatorInfo(
        worker_id=board.leader,
        term=board.term,
        state="expired" if state == "leading" and age_s > over_s else state,
        board_age=age_s,
        workers=len(board.workers),
        tickets=len(board.tickets),
    )


def _decoded(stored: Stored | None) -> Board | None:
    try:
        return None if stored is None else boards.decode(stored.key, stored.body)
    except CorruptObject:
        # As good as resigned: whoever stands for election replaces it.
        return None
