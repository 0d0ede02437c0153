"""What one process knows of the coordination of its queue, for people and metrics."""

from __future__ import annotations

import msgspec


class Coordination(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot; what only the coordinator counts is zero elsewhere.

    Attributes:
        is_coordinator: Whether this process leads.
        term: The latest term that was seen on the board; 0 while none was.
        board_live: Whether a coordinator's board was seen whose lease is not over.
        active_workers: Registered workers, as last seen on the board or listed.
        tickets_available: Tickets on the board that nobody has claimed yet, as last seen.
        tickets_claimed: Segments that this process claimed by a ticket.
        tickets_stalled: Tickets that nobody claimed within ``ticket_ttl``, so that they were given to others.
        claims_direct: Segments that this process claimed without a ticket.
        claims_wasted: Claims that this process tried and somebody else had made.
        poll_interval_s: Seconds between two looks for work, now.
    """

    is_coordinator: bool = False
    term: int = 0
    board_live: bool = False
    active_workers: int = 0
    tickets_available: int = 0
    tickets_claimed: int = 0
    tickets_stalled: int = 0
    claims_direct: int = 0
    claims_wasted: int = 0
    poll_interval_s: float = 0.0
