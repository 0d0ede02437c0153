"""The coordinator among workers of one store: who leads, what its tickets do, and that nothing depends on it."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import anyio
import msgspec

from s3queue_async import Context, S3Queue, Settings
from s3queue_async.engine.registry import QUIET_FACTOR, Heartbeat
from s3queue_async.protocol import board as boards
from s3queue_async.protocol import layout
from s3queue_async.protocol.board import Board, Ticket
from s3queue_async.storage.base import Stored
from s3queue_async.testing.clock import store_now
from tests.unit.queue.bed import Bed, Seen, eventually, virtual
from tests.unit.queue.test_takeover import Killable

BOARD = f"plugin/{layout.COORDINATOR}/{layout.BOARD}"
WORKERS = f"plugin/{layout.WORKERS}/"
TTL_S = 15.0


async def board_of(bed: Bed) -> Board:
    stored = await bed.memory.get(BOARD)
    assert isinstance(stored, Stored)
    return boards.decode(BOARD, stored.body)


async def write(bed: Bed, board: Board) -> None:
    await bed.memory.put(BOARD, boards.encode(board))


class Workers:
    """Several workers, each with a queue object of its own, and what they did."""

    def __init__(self, bed: Bed, settings: Settings, number: int, *, seconds: float = 0.01) -> None:
        self.bed = bed
        self.settings = settings
        self.number = number
        self.seconds = seconds
        self.queues: list[S3Queue[Any]] = []
        self.events: list[Any] = []
        self.handled: Counter[Any] = Counter()
        self.by_worker: Counter[str] = Counter()
        self.changed = Seen()

    async def run(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        """Work until cancelled."""
        async with anyio.create_task_group() as group:
            for _ in range(self.number):
                await group.start(self._one)
            task_status.started()

    async def _one(self, *, task_status: anyio.abc.TaskStatus[None] = anyio.TASK_STATUS_IGNORED) -> None:
        async def handle(payload: Any, context: Context) -> None:
            await anyio.sleep(self.seconds)
            self.handled[payload] += 1
            self.by_worker[context.worker_id] += 1
            self.changed(payload)

        async with self.bed.queue(settings=self.settings, on_message=handle) as queue:
            for name in ("coordinator.promoted", "coordinator.demoted"):
                queue.on(name, self.events.append)
            self.queues.append(queue)
            await queue.start_processing()
            task_status.started()
            await anyio.sleep_forever()

    @property
    def leaders(self) -> list[S3Queue[Any]]:
        return [queue for queue in self.queues if queue.is_coordinator]

    async def elected(self) -> S3Queue[Any]:
        async def one() -> bool:
            return len(self.leaders) == 1

        await eventually(one)
        return self.leaders[0]


@virtual
async def test_one_of_three_leads_and_drains_over_to_the_next() -> None:
    """Exactly one is elected; when it drains, another one leads at once, under a higher term."""
    bed = Bed(latency_s=0.01)
    workers = Workers(bed, Settings(), 3)
    async with anyio.create_task_group() as group:
        await group.start(workers.run)
        leader = await workers.elected()
        await anyio.sleep(60)
        assert workers.leaders == [leader]
        assert (await board_of(bed)).leader == leader.worker_id
        assert (await board_of(bed)).term == 1
        before = anyio.current_time()
        await leader.drain()
        successor = await workers.elected()
        assert successor is not leader
        assert anyio.current_time() - before < TTL_S / 2
        assert (await board_of(bed)).term == 2
        await anyio.sleep(1)
        assert [event.name for event in workers.events] == [
            "coordinator.promoted",
            "coordinator.demoted",
            "coordinator.promoted",
        ]
        assert workers.events[1].reason == "it leaves"
        group.cancel_scope.cancel()


@virtual
async def test_nobody_leads_who_must_not() -> None:
    """coordinator=False: no board is written, and the work is done."""
    bed = Bed()
    workers = Workers(bed, Settings(coordinator=False), 2)
    async with anyio.create_task_group() as group, bed.queue() as producer:
        await group.start(workers.run)
        await producer.enqueue_many(range(20))
        await workers.changed.count(20)
        await anyio.sleep(60)
        assert BOARD not in await bed.keys()
        assert not workers.leaders
        group.cancel_scope.cancel()


@virtual
async def test_the_board_is_deleted_or_damaged() -> None:
    """Whoever deletes or damages the board costs a term, and nothing else."""
    bed = Bed()
    workers = Workers(bed, Settings(), 2)
    async with anyio.create_task_group() as group, bed.queue() as producer:
        await group.start(workers.run)
        await workers.elected()
        for number in range(2):
            term = (await board_of(bed)).term
            if number == 0:
                await bed.memory.delete(BOARD)
            else:
                await bed.memory.put(BOARD, b"{nonsense")
            await producer.enqueue(number)

            async def is_new(term: int = term) -> bool:
                terms = [queue._session.election.term for queue in workers.leaders if queue._session is not None]
                return len(terms) == 1 and terms[0] > term

            await eventually(is_new)
        await workers.changed.count(2)
        group.cancel_scope.cancel()
    assert set(workers.handled.values()) == {1}


@virtual
async def test_a_term_ends() -> None:
    """After term_duration the coordinator resigns in favour of another worker, and does not take its place again at once."""
    bed = Bed()
    workers = Workers(bed, Settings(term_duration=30), 2)
    async with anyio.create_task_group() as group:
        await group.start(workers.run)
        first = await workers.elected()
        await anyio.sleep(40)
        second = await workers.elected()
        assert second is not first
        await anyio.sleep(35)
        assert await workers.elected() is first
        assert (await board_of(bed)).term == 3
        group.cancel_scope.cancel()


@virtual
async def test_a_lone_worker_stays_coordinator_and_publishes_no_tickets() -> None:
    """One worker takes its tickets from memory, and has nobody to resign for."""
    bed = Bed()
    workers = Workers(bed, Settings(term_duration=10), 1)
    async with anyio.create_task_group() as group, bed.queue() as producer:
        await group.start(workers.run)
        await workers.elected()
        await producer.enqueue_many(range(50))
        await workers.changed.count(50)
        await anyio.sleep(30)
        board = await board_of(bed)
        assert (board.term, board.tickets) == (1, [])
        group.cancel_scope.cancel()
    assert set(workers.handled.values()) == {1}


@virtual
async def test_a_coordinator_at_rest_soon_knows_all_workers_of_a_fleet_that_starts() -> None:
    """Everybody's patience goes by how many workers it knows, also for the first message after a rest."""
    bed = Bed(latency_s=0.01)
    workers = Workers(bed, Settings(), 2)
    more = [Workers(bed, Settings(), 5) for _ in range(4)]
    async with anyio.create_task_group() as group:
        await group.start(workers.run)
        leader = await workers.elected()
        for joining in more:
            await anyio.sleep(4)
            await group.start(joining.run)
        await anyio.sleep(6)
        assert len((await board_of(bed)).workers) == 22
        assert leader.is_coordinator
        group.cancel_scope.cancel()


@virtual
async def test_followers_claim_by_tickets() -> None:
    """Single messages go to all workers by tickets; hardly a claim is tried in vain, and nobody lists but the leader."""
    bed = Bed(latency_s=0.02)
    workers = Workers(bed, Settings(segment_messages_max=1), 4, seconds=1.0)
    async with anyio.create_task_group() as group, bed.queue() as producer:
        await group.start(workers.run)
        await workers.elected()
        await anyio.sleep(30)
        for number in range(200):
            await producer.enqueue(number)
        await workers.changed.count(200)
        sums: Counter[str] = Counter()
        for queue in workers.queues:
            assert queue._session is not None
            known = queue._session.coordination
            sums.update(ticket=known.tickets_claimed, direct=known.claims_direct, wasted=known.claims_wasted)
            assert known.board_live
            assert known.active_workers == 4
        group.cancel_scope.cancel()
    assert set(workers.handled.values()) == {1}
    assert sums["ticket"] > 20 * sums["direct"]
    assert sums["wasted"] <= 10
    assert len(workers.by_worker) == 4
    assert min(workers.by_worker.values()) > 20


async def _enqueue(bed: Bed, settings: Settings, count: int) -> None:
    async with bed.queue(settings=settings) as producer:
        await producer.enqueue_many(range(count))


@virtual
async def test_workers_on_one_backlog_keep_out_of_each_others_way() -> None:
    """Without a coordinator each takes what ranking gives to it, and looks again, before it tries what is the others'."""
    bed = Bed(latency_s=0.02)
    settings = Settings(coordinator=False, segment_messages_max=1)
    await _enqueue(bed, settings, 1500)
    workers = Workers(bed, settings, 4, seconds=0.2)
    async with anyio.create_task_group() as group:
        await group.start(workers.run)
        await workers.changed.count(1500)
        wasted = sum(queue._session.coordination.claims_wasted for queue in workers.queues if queue._session)
        group.cancel_scope.cancel()
    assert set(workers.handled.values()) == {1}
    assert wasted < 500
    assert min(workers.by_worker.values()) > 300


@virtual
async def test_nothing_is_left_to_a_worker_that_stands_still_while_there_is_more() -> None:
    """Without a coordinator, in a backlog that does not end: others do what falls to a worker whose handlers hang."""
    bed = Bed(latency_s=0.02)
    settings = Settings(coordinator=False, segment_messages_max=1)
    await _enqueue(bed, settings, 600)
    workers = Workers(bed, settings, 3, seconds=0.2)

    async def hang(payload: int) -> None:
        await anyio.sleep_forever()

    async with (
        anyio.create_task_group() as group,
        bed.queue(settings=settings, on_message=hang, concurrency=2) as standing,
        bed.queue(settings=settings) as producer,
    ):
        await standing.start_processing()
        await group.start(workers.run)
        for more in range(600, 3000, 300):
            await producer.enqueue_many(range(more, more + 300))
            await workers.changed.count(more - 300)
        assert len(workers.handled) < 2900
        # All but what it holds.
        assert sum(number in workers.handled for number in range(600)) > 575
        group.cancel_scope.cancel()


@virtual
async def test_workers_that_began_before_the_election_are_soon_at_full_speed_by_tickets() -> None:
    """Whoever knows of others looks for their board, and the first tickets are for as much as all took until then."""
    bed = Bed(latency_s=0.02)
    settings = Settings(segment_messages_max=16)
    await _enqueue(bed, settings, 40_000)
    workers = Workers(bed, settings, 4, seconds=0.001)
    async with anyio.create_task_group() as group:
        await group.start(workers.run)
        await workers.elected()
        elected_at = anyio.current_time()

        async def all_see_it() -> bool:
            known = [queue._session.coordination for queue in workers.queues if queue._session]
            return all(one.board_live for one in known)

        await eventually(all_see_it)
        assert anyio.current_time() - elected_at < 1.5
        await workers.changed.count(40_000)
        # Four workers with ten handlers of a millisecond each can do it in one second.
        assert anyio.current_time() - elected_at < 2.25
        group.cancel_scope.cancel()
    assert set(workers.handled.values()) == {1}
    assert min(workers.by_worker.values()) > 4000


@virtual
async def test_a_live_board_without_a_coordinator_behind_it() -> None:
    """A board that looks live for hours and hands out nothing: idle workers list for themselves within seconds."""
    bed = Bed()
    settings = Settings(coordinator=False)
    workers = Workers(bed, settings, 3)
    async with bed.queue() as producer, anyio.create_task_group() as group:
        await write(bed, Board("n", 9, "somebody", "leading", 3 * 3600.0, workers={"somebody": 10}))
        await group.start(workers.run)
        await anyio.sleep(2)
        began = anyio.current_time()
        for number in range(30):
            await producer.enqueue(number)
            await anyio.sleep(0.2)
        await workers.changed.count(30)
        assert anyio.current_time() - began < 12
        group.cancel_scope.cancel()
    assert set(workers.handled.values()) == {1}


@virtual
async def test_an_urgent_ticket_that_its_worker_leaves_unused_comes_before_ones_own() -> None:
    """A worker with tickets of its own does not let a more urgent message wait for a worker that is busy."""
    bed = Bed()
    seen = Seen()

    async def handle(payload: object) -> None:
        seen(payload)

    live = Board("n", 9, "somebody", "leading", 3600.0, workers={"somebody": 10})
    async with bed.queue() as producer:
        await write(bed, live)
        async with bed.queue(settings=Settings(coordinator=False)) as queue:
            await queue.start_processing(handle, concurrency=1)
            await producer.enqueue("own")
            (own,) = await bed.keys(layout.READY)
            await producer.enqueue("urgent", priority=9)
            (urgent,) = {*await bed.keys(layout.READY)} - {own}
            now_ms = int(1000 * store_now())
            tickets = [Ticket(own, queue.worker_id or "", now_ms), Ticket(urgent, "somebody", now_ms, stalled=True)]
            await write(bed, msgspec.structs.replace(live, nonce="m", tickets=tickets))
            await seen.count(2)
    assert seen.items == ["urgent", "own"]


@virtual
async def test_a_single_look_is_a_listing() -> None:
    """process_next and receive(wait=0) find what is there at this moment, whatever the board shows."""
    bed = Bed()
    seen = Seen()

    async def handle(payload: object) -> None:
        seen(payload)

    settings = Settings(coordinator=False)
    async with bed.queue() as producer:
        await write(bed, Board("n", 9, "somebody", "leading", 3600.0, workers={"somebody": 10}))
        async with bed.queue(settings=settings, on_message=handle, auto_start=False) as queue:
            for number in range(3):
                await producer.enqueue(number)
                assert await queue.process_next()
            assert not await queue.process_next()
            await producer.enqueue(3)
            (message,) = await queue.receive(1, wait=0)
            await message.ack()
    assert seen.items == [0, 1, 2]


@virtual
async def test_tickets_of_all_kinds_of_nonsense() -> None:
    """Tickets for segments that are gone, not due, held, dead, or no segments at all: nothing runs early or twice."""
    bed = Bed()
    workers = Workers(bed, Settings(coordinator=False), 2)
    async with bed.queue() as producer, anyio.create_task_group() as group:
        await group.start(workers.run)
        await producer.enqueue("now")
        await workers.changed.count(1)
        await producer.enqueue("later", delay=60)
        (later,) = await bed.keys(layout.DELAYED)
        gone = "ready/255/01HF7Z9A353FWGDZ1ACFM6HF9J-1"
        keys = [later, gone, "dead/01HF7Z9A353FWGDZ1ACFM6HF9J-1", "ready/x", ""]
        ids = [queue.worker_id or "" for queue in workers.queues]
        tickets = [Ticket(key, worker, 0, orphan) for key in keys for worker in ids for orphan in (False, True)]
        live = Board("n", 1, "nobody", "leading", 3600.0, tickets=tickets, workers=dict.fromkeys(ids, 10))
        await write(bed, live)
        await anyio.sleep(50)
        assert dict(workers.handled) == {"now": 1}
        claims_of_nothing = bed.store.count(under="claims/")
        assert sum(claims_of_nothing.values()) < 200
        await anyio.sleep(20)
        await workers.changed.count(2)
        group.cancel_scope.cancel()
    assert dict(workers.handled) == {"now": 1, "later": 1}


@virtual
async def test_a_coordinator_whose_term_is_over_works_on() -> None:
    """After it handed over, its own worker looks at the board like the others: two messages run at two workers."""
    bed = Bed(latency_s=0.01)
    started = Seen()

    async def handle(payload: int, context: Context) -> None:
        started((context.worker_id, anyio.current_time()))
        await anyio.sleep(20)

    settings = Settings(term_duration=12, election_interval=1, segment_messages_max=1)
    demoted = Seen()
    async with bed.queue() as producer, contextlib.AsyncExitStack() as stack:
        for _ in range(2):
            queue = await stack.enter_async_context(bed.queue(settings=settings))
            queue.on("coordinator.demoted", demoted)
            await queue.start_processing(handle, concurrency=1)
        await demoted.count(1)
        await anyio.sleep(3)
        enqueued_at = anyio.current_time()
        await producer.enqueue(0)
        await producer.enqueue(1)
        await started.count(2)
        assert len({worker for worker, _ in started.items}) == 2
        # On a queue at rest the coordinator looks that rarely, and so does the other worker.
        assert max(at for _, at in started.items) - enqueued_at < 2 * settings.max_poll_interval + 1


@virtual
async def test_who_is_left_alone_works_on() -> None:
    """The other worker leaves; the coordinator's own one looks for itself then, without waiting for tickets."""
    bed = Bed(latency_s=0.01)
    workers = Workers(bed, Settings(), 1)
    async with bed.queue() as producer, anyio.create_task_group() as group:
        await group.start(workers.run)
        await workers.elected()
        async with bed.queue(settings=Settings(coordinator=False), on_message=print):
            await anyio.sleep(60)
        left_at = anyio.current_time()
        await producer.enqueue("one")
        await workers.changed.count(1)
        # One look at the heartbeats later at most.
        assert anyio.current_time() - left_at < 15 + 5
        await anyio.sleep(60)
        enqueued_at = anyio.current_time()
        await producer.enqueue("two")
        await workers.changed.count(2)
        assert anyio.current_time() - enqueued_at < 5.5
        group.cancel_scope.cancel()


@virtual
async def test_what_a_killed_worker_held_gets_tickets() -> None:
    """The coordinator fences a dead worker and gives on what it held, by tickets that say that a claim is in the way."""
    bed = Bed()
    started = Seen()

    async def hang(payload: int) -> None:
        started(payload)
        await anyio.sleep_forever()

    settings = Settings(segment_messages_max=1)
    workers = Workers(bed, settings, 2)
    victim = Killable(bed, hang, settings=msgspec.structs.replace(settings, coordinator=False), concurrency=3)
    async with bed.queue() as producer, anyio.create_task_group() as group:
        group.start_soon(victim.run)
        await victim.ready.wait()
        for number in range(3):
            await producer.enqueue(number)
        await started.count(3)
        await group.start(workers.run)
        await workers.elected()
        await anyio.sleep(30)
        victim.kill()
        killed_at = anyio.current_time()
        await workers.changed.count(3)
        # One look at the heartbeats later than its lease, and one cycle.
        assert anyio.current_time() - killed_at < 30 + 2 + 15 + 3
        group.cancel_scope.cancel()
    assert dict(workers.handled) == {0: 1, 1: 1, 2: 1}


@virtual
async def test_a_store_that_takes_one_write_a_second_of_a_key() -> None:
    """Refused publications make the board be written more rarely; the work goes on."""
    bed = Bed()
    workers = Workers(bed, Settings(segment_messages_max=1), 3)
    async with bed.queue() as producer, anyio.create_task_group() as group:
        await group.start(workers.run)
        await workers.elected()
        fault = bed.faults.throttle("put", key=BOARD, times=6)
        for number in range(100):
            await producer.enqueue(number)
            await anyio.sleep(0.05)
        await workers.changed.count(100)
        bed.faults.remove(fault)
        board = await board_of(bed)
        leader = await workers.elected()
        assert leader._session is not None
        assert leader._session.coordinator._publish_every_s > 0.2
        await anyio.sleep(60)
        assert (await board_of(bed)).nonce != board.nonce
        assert leader.is_coordinator
        group.cancel_scope.cancel()
    assert set(workers.handled.values()) == {1}


@virtual
async def test_a_coordinator_whose_publications_fail_leads_no_more() -> None:
    """The board cannot be written for longer than it counts: its coordinator gives up, and is back later."""
    bed = Bed()
    workers = Workers(bed, Settings(), 1)
    async with anyio.create_task_group() as group:
        await group.start(workers.run)
        leader = await workers.elected()
        fault = bed.faults.unavailable(key=BOARD)
        await anyio.sleep(60)
        assert not leader.is_coordinator
        bed.faults.remove(fault)
        await workers.elected()
        group.cancel_scope.cancel()


@virtual
async def test_a_worker_at_rest_beats_rarely_and_often_again_with_work() -> None:
    """Nothing held for two heartbeats: six times as rare, under a lease that lasts as much longer; work ends that."""
    bed = Bed(latency_s=0.01)
    settings = Settings(coordinator=False)
    workers = Workers(bed, settings, 1, seconds=50.0)

    async def heartbeat() -> Heartbeat:
        (key,) = await bed.keys(WORKERS)
        stored = await bed.memory.get(key)
        assert isinstance(stored, Stored)
        return msgspec.json.decode(stored.body, type=Heartbeat)

    async with bed.queue() as producer, anyio.create_task_group() as group:
        await group.start(workers.run)
        await anyio.sleep(25)
        assert (await heartbeat()).ttl_s == QUIET_FACTOR * settings.visibility_timeout
        before = bed.store.count(under=WORKERS, beside=())["put"]
        await anyio.sleep(600)
        assert bed.store.count(under=WORKERS, beside=())["put"] - before == 10
        (queue,) = workers.queues
        assert queue._session is not None
        lease = queue._session.lease
        assert lease.trust_left_s > settings.visibility_timeout
        await producer.enqueue(1)

        async def beats_as_a_holder() -> bool:
            return (await heartbeat()).ttl_s == settings.visibility_timeout

        await eventually(beats_as_a_holder)
        assert lease.trust_left_s <= settings.visibility_timeout - settings.lease_margin
        before = bed.store.count(under=WORKERS, beside=())["put"]
        await anyio.sleep(40)
        assert bed.store.count(under=WORKERS, beside=())["put"] - before == 4
        group.cancel_scope.cancel()


@virtual
async def test_a_shorter_lease_is_trusted_no_longer_although_its_reply_was_lost() -> None:
    """The heartbeat that asks for a shorter lease lands unanswered: others go by it, so its worker does, too."""
    bed = Bed()
    settings = Settings(coordinator=False)
    workers = Workers(bed, settings, 1, seconds=200.0)
    async with bed.queue() as producer, anyio.create_task_group() as group:
        await group.start(workers.run)
        await anyio.sleep(25)
        (queue,) = workers.queues
        assert queue._session is not None
        lease = queue._session.lease
        bed.faults.lose_reply("put", "get", key=WORKERS + "*", times=None)
        await producer.enqueue(1)
        await anyio.sleep(6)
        assert lease.trust_left_s <= settings.visibility_timeout
        group.cancel_scope.cancel()
