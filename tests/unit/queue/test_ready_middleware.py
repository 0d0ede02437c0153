"""The middleware that comes with the library: rate limit, circuit breaker, idempotency, timing."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from s3queue_async import Context, DeadLetter, Keyring, Release, Retry, Settings
from s3queue_async.errors import InvalidSettings
from s3queue_async.middleware import CallNext, CircuitBreaker, Delivery, Idempotency, Timed, Timing
from s3queue_async.middleware import idempotency as idempotency_module
from s3queue_async.middleware.rate_limit import RateLimit
from tests.unit.queue.bed import QUIET, Bed, Seen, virtual

RECORDS = "plugin/completed/"

# -- rate limit ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("burst", [1, 5])
@virtual
async def test_a_rate(burst: int) -> None:
    """Of 40 messages at 4 a second no more than ``burst + rate * t`` start within any t, and all within ten seconds."""
    bed = Bed()
    starts = Seen()

    async def handler(payload: int) -> None:
        starts(anyio.current_time())

    async with bed.queue(on_message=handler, middleware=[RateLimit(4, burst=burst)], concurrency=20) as queue:
        began = anyio.current_time()
        await queue.enqueue_many(range(40))
        await starts.count(40)
        assert anyio.current_time() - began < 40 / 4 + 1
    times = starts.items
    for first in range(40):
        for last in range(first, 40):
            assert last - first + 1 <= burst + 4 * (times[last] - times[first]) + 1e-6


@virtual
async def test_two_queues_share_a_rate() -> None:
    """One object in two queues limits them together."""
    bed = Bed()
    starts = Seen()
    limit = RateLimit(60, per=60)

    async def handler(payload: int) -> None:
        starts(anyio.current_time())

    async with (
        bed.queue(on_message=handler, middleware=[limit]) as one,
        bed.queue(on_message=handler, middleware=[limit]),
    ):
        await one.enqueue_many(range(100))
        await starts.count(100)
    assert starts.items[-1] - starts.items[0] == pytest.approx(99, abs=1)


@virtual
async def test_waiting_for_a_turn_costs_no_attempt() -> None:
    """With a handler_timeout shorter than the wait, messages go back and come again; none pays an attempt for it."""
    bed = Bed()
    attempts = Seen()
    failed = Seen()

    async def handler(payload: int, context: Context) -> None:
        attempts(context.attempt)

    settings = Settings(coordinator=False, handler_timeout=2, max_attempts=1)
    limit = RateLimit(2)
    async with bed.queue(settings=settings, on_message=handler, middleware=[limit], on_error=failed) as queue:
        await queue.enqueue_many(range(20))
        await attempts.count(20)
    assert attempts.items == [1] * 20
    assert failed.items == []


@virtual
async def test_waiting_for_a_turn_is_cancelled_by_a_drain() -> None:
    """What waits for its turn goes back when the drain's time is over; the rest of the turns are not lost."""
    bed = Bed()
    started = Seen()

    async def handler(payload: int) -> None:
        started(payload)

    async with bed.queue(on_message=handler, middleware=[RateLimit(1, per=1000)]) as queue:
        await queue.enqueue_many(range(5))
        await started.count(1)
        await anyio.sleep(1)
        report = await queue.drain(timeout=2)
        assert report.clean
    assert len(started.items) == 1
    async with bed.queue() as queue:
        assert (await queue.stats(exact=True)).pending == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"rate": 0}, "rate=0"),
        ({"rate": True}, "rate=True"),
        ({"rate": 2e6}, "1,000,000"),
        ({"rate": 1, "per": 0}, "per=0"),
        ({"rate": 1, "burst": 0}, "burst=0"),
    ],
)
def test_no_rate(arguments: dict[str, Any], named: str) -> None:
    """The error names the value and the range."""
    with pytest.raises(InvalidSettings, match=named):
        RateLimit(**arguments)


# -- circuit breaker -----------------------------------------------------------------------------------------------


class Service:
    """What the handler depends on."""

    def __init__(self) -> None:
        self.works = True
        self.calls = Seen()
        self.takes_s = 0.0

    async def handler(self, payload: int, context: Context) -> None:
        self.calls((anyio.current_time(), payload, context.attempt))
        if self.takes_s:
            await anyio.sleep(self.takes_s)
        if not self.works:
            raise ConnectionError("away")

    @property
    def count(self) -> int:
        return len(self.calls.items)


@virtual
async def test_it_opens_tries_one_and_closes() -> None:
    """Three failures open it; for 30 s nothing is called, then one message; it works: the rest follows at once.

    What was held meanwhile pays no attempt.
    """
    bed = Bed()
    service, completed, dead = Service(), Seen(), Seen()
    breaker = CircuitBreaker(failures=3, recovery=30)
    service.works = False
    settings = Settings(coordinator=False, max_attempts=2, backoff_base=100, backoff_jitter=0)
    async with bed.queue(
        settings=settings, on_message=service.handler, middleware=[breaker], on_complete=completed, concurrency=1
    ) as queue:
        queue.on("message.dead", dead)
        began = anyio.current_time()
        await queue.enqueue_many(range(20))
        await anyio.sleep(29)
        assert (service.count, breaker.state) == (3, "open")
        await anyio.sleep(2)
        assert (service.count, breaker.state) == (4, "open"), "tried, and failed again"
        assert service.calls.items[3][0] - began == pytest.approx(30, abs=0.5)
        service.works = True
        await anyio.sleep(28.5)
        assert service.count == 4
        await completed.count(16)
        assert breaker.state == "closed"
        assert anyio.current_time() - began == pytest.approx(60, abs=1)
        await completed.count(20)
    assert dead.items == []
    assert sorted(attempt for _, _, attempt in service.calls.items) == [1] * 20 + [2] * 4


@pytest.mark.parametrize("concurrency", [1, 10])
@virtual
async def test_while_open_nothing_is_claimed(concurrency: int) -> None:
    """Of a backlog of 500 segments the worker holds a few while the circuit is open; requests stay few, too."""
    bed = Bed()
    service = Service()
    service.works = False
    async with bed.queue() as producer:
        for number in range(500):
            await producer.enqueue(number)
    breaker = CircuitBreaker(failures=1, recovery=60)
    settings = Settings(coordinator=False, backoff_base=3600, backoff_max=3600)
    async with bed.queue(settings=settings, on_message=service.handler, middleware=[breaker], concurrency=concurrency):
        await anyio.sleep(30)
        bed.store.calls.clear()
        await anyio.sleep(600)
        writes = [call for call in bed.store.calls if call.operation == "put" and "plugin/" not in call.keys[0]]
        assert len(await bed.keys("claims/")) <= 40
    assert service.count <= 10 + concurrency
    assert len(writes) <= 10 * 4 * concurrency, "each held message goes back once in 60 s"


@virtual
async def test_one_try_at_a_time() -> None:
    """Half-open, ten slots and slow calls: one call is under way; the others wait for what it comes to."""
    bed = Bed()
    service = Service()
    service.works = False
    breaker = CircuitBreaker(failures=1, recovery=10)
    async with bed.queue(settings=QUIET, on_message=service.handler, middleware=[breaker], concurrency=10) as queue:
        await queue.enqueue(-1)
        await service.calls.count(1)
        service.takes_s = 5
        await queue.enqueue_many(range(10))
        await anyio.sleep(12)
        assert (service.count, breaker.state) == (2, "half-open")
        service.works = True
        await anyio.sleep(2)
        assert service.count == 2
        await anyio.sleep(1.5)
        assert breaker.state == "closed"
        assert service.count >= 11


@virtual
async def test_a_late_success_does_not_close_it() -> None:
    """A call that began before the circuit opened succeeds after that: it stays open."""
    bed = Bed()
    calls = Seen()

    async def handler(payload: str) -> None:
        calls(payload)
        if payload == "slow":
            await anyio.sleep(10)
            return
        raise ConnectionError

    breaker = CircuitBreaker(failures=2, recovery=60)
    settings = Settings(coordinator=False, backoff_base=3600, backoff_max=3600)
    async with bed.queue(settings=settings, on_message=handler, middleware=[breaker]) as queue:
        await queue.enqueue("slow")
        await calls.count(1)
        await queue.enqueue_many(["bad", "bad"])
        await calls.count(3)
        await anyio.sleep(20)
        assert breaker.state == "open"


@virtual
async def test_what_counts() -> None:
    """Retry, DeadLetter and Release count neither way; a success begins anew; handler_timeout is a failure."""
    bed = Bed()
    calls = Seen()
    breaker = CircuitBreaker(failures=2, recovery=1000)

    async def handler(payload: str) -> None:
        calls((payload, breaker.state))
        match payload:
            case "retry":
                raise Retry(delay=3600)
            case "dead":
                raise DeadLetter
            case "release":
                raise Release(delay=3600)
            case "bad":
                raise ConnectionError
            case "hang":
                await anyio.sleep_forever()

    settings = Settings(coordinator=False, backoff_base=3600, backoff_max=3600, handler_timeout=5)
    async with bed.queue(settings=settings, on_message=handler, middleware=[breaker], concurrency=1) as queue:
        for payload in ["bad", "retry", "dead", "release", "good", "bad", "dead", "hang"]:
            await queue.enqueue(payload)
            await anyio.sleep(6)
        assert [state for _, state in calls.items] == ["closed"] * 8
        assert breaker.state == "open"


@pytest.mark.parametrize(
    ("counts", "opens"),
    [
        (ConnectionError, True),
        (OSError, True),
        (ValueError, False),
        ((ValueError, ConnectionError), True),
        (lambda error: "away" in str(error), True),
        (lambda error: "here" in str(error), False),
    ],
)
@virtual
async def test_counts(counts: Any, opens: bool) -> None:
    """Only the exceptions named count: by class, by several, by a function."""
    bed = Bed()
    service = Service()
    service.works = False
    breaker = CircuitBreaker(failures=1, counts=counts)
    settings = Settings(coordinator=False, backoff_base=3600, backoff_max=3600)
    async with bed.queue(settings=settings, on_message=service.handler, middleware=[breaker]) as queue:
        await queue.enqueue(1)
        await service.calls.count(1)
        await anyio.sleep(1)
        assert breaker.state == ("open" if opens else "closed")


@virtual
async def test_a_try_that_says_nothing() -> None:
    """The message that is tried becomes a dead letter, or is cancelled: another one is tried, nobody waits for ever."""
    bed = Bed()
    breaker = CircuitBreaker(failures=1, recovery=5)
    done, calls = Seen(), Seen()

    async def handler(payload: str) -> None:
        calls(payload)
        if payload == "bad":
            raise ConnectionError
        if payload == "dead":
            raise DeadLetter

    settings = Settings(coordinator=False, backoff_base=3600, backoff_max=3600)
    async with bed.queue(
        settings=settings, on_message=handler, middleware=[breaker], on_complete=done, concurrency=1
    ) as queue:
        await queue.enqueue("bad")
        await calls.count(1)
        await queue.enqueue("dead")
        await queue.enqueue("good")
        await done.count(1)
        assert breaker.state == "closed"
    assert calls.items == ["bad", "dead", "good"]


@virtual
async def test_a_try_is_cancelled() -> None:
    """The process that tries is drained: its breaker is free again, for the next queue that shares it."""
    bed = Bed()
    breaker = CircuitBreaker(failures=1, recovery=5)

    def state() -> str:
        return breaker.state

    service = Service()
    service.works = False
    settings = Settings(coordinator=False, backoff_base=3600, backoff_max=3600)
    async with bed.queue(settings=settings, on_message=service.handler, middleware=[breaker]) as queue:
        await queue.enqueue(1)
        await service.calls.count(1)
        service.takes_s = 1000
        await queue.enqueue(2)
        await service.calls.count(2)
        assert state() == "half-open"
        await queue.drain(timeout=1)
    assert state() == "open"
    service.works, service.takes_s = True, 0
    async with bed.queue(settings=settings, on_message=service.handler, middleware=[breaker]):
        await service.calls.count(3)
        assert service.calls.items[2][1:] == (2, 1)
        await anyio.sleep(1)
        assert state() == "closed"


@virtual
async def test_held_no_longer_than_the_handler_timeout_allows() -> None:
    """With handler_timeout=4 a message is held for 2 s and given back until the circuit is tried: no attempt is lost."""
    bed = Bed()
    service, failed, completed = Service(), Seen(), Seen()
    service.works = False
    breaker = CircuitBreaker(failures=1, recovery=20)
    settings = Settings(coordinator=False, backoff_base=60, handler_timeout=4, max_attempts=2)
    async with bed.queue(
        settings=settings,
        on_message=service.handler,
        middleware=[breaker],
        on_error=failed,
        on_complete=completed,
        concurrency=2,
    ) as queue:
        await queue.enqueue_many(range(4))
        await anyio.sleep(10)
        service.works = True
        await completed.count(4)
    assert all("TimeoutError" not in event.error for event in failed.items)
    assert service.count == 4 + len(failed.items)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"failures": 0}, "failures=0"),
        ({"recovery": 0}, "recovery=0"),
        ({"counts": "ValueError"}, "counts='ValueError'"),
        ({"counts": int}, "counts="),
        ({"counts": ()}, "counts="),
    ],
)
def test_no_breaker(arguments: dict[str, Any], named: str) -> None:
    """The error names the value."""
    with pytest.raises(InvalidSettings, match=named):
        CircuitBreaker(**arguments)


# -- idempotency ---------------------------------------------------------------------------------------------------


@virtual
async def test_a_message_that_comes_again_is_skipped() -> None:
    """A worker is cut off after its handler returned: the next one skips the message, with the result of the first."""
    bed = Bed()
    runs, completed = Seen(), Seen()
    lane, faults = bed.lane()

    async def handler(payload: str, context: Context) -> dict[str, int]:
        runs(context.token)
        return {"token": context.token}

    async def cut(message: Delivery[str], call_next: CallNext) -> Any:
        result = await call_next(message)
        faults.unavailable()
        return result

    settings = Settings(coordinator=False, retain_completed=3600)
    async with bed.queue(settings=settings, storage=lane, on_message=handler, middleware=[cut, Idempotency()]) as first:
        message_id = await first.enqueue("x")
        await runs.count(1)
        async with bed.queue(
            settings=settings, on_message=handler, middleware=[Idempotency()], on_complete=completed
        ) as second:
            await completed.count(1)
            await anyio.sleep(1)
            assert await second.results(message_id) == {"token": 1}
    assert runs.items == [1]
    assert completed.items[0].result == {"token": 1}


@virtual
async def test_failures_are_no_completions() -> None:
    """A failed attempt, a retry and a release leave no record: the handler is called again."""
    bed = Bed()
    runs, completed = Seen(), Seen()

    async def handler(payload: str, context: Context) -> None:
        runs(context.attempt)
        match len(runs.items):
            case 1:
                raise ValueError
            case 2:
                raise Retry(delay=0)
            case 3:
                raise Release

    settings = Settings(coordinator=False, max_attempts=5, backoff_base=0)
    async with bed.queue(
        settings=settings, on_message=handler, middleware=[Idempotency()], on_complete=completed
    ) as queue:
        await queue.enqueue("x")
        await completed.count(1)
        assert len(await bed.keys(RECORDS)) == 1
    assert len(runs.items) == 4


@virtual
async def test_a_key_of_ones_own() -> None:
    """Two messages with one key are handled once, until ``ttl`` is over; None is not looked at."""
    bed = Bed()
    runs, completed = Seen(), Seen()

    async def handler(payload: str) -> str:
        runs(payload)
        return payload.upper()

    remember = Idempotency(lambda message: message.context.headers.get("key"), ttl=600)
    async with bed.queue(on_message=handler, middleware=[remember], on_complete=completed) as queue:

        async def send(payload: str, key: str | None) -> Any:
            count = len(completed.items)
            await queue.enqueue(payload, headers={"key": key} if key else None)
            await completed.count(count + 1)
            return completed.items[-1].result

        assert await send("first", "a") == "FIRST"
        assert await send("second", "a") == "FIRST"
        assert await send("other", "b") == "OTHER"
        assert await send("none", None) == "NONE"
        assert await send("none", None) == "NONE"
        await anyio.sleep(601)
        assert await send("third", "a") == "THIRD"
    assert runs.items == ["first", "other", "none", "none", "third"]


@pytest.mark.parametrize("away_s", [5, 30])
@virtual
async def test_the_store_does_not_answer(away_s: float) -> None:
    """Whether it was completed cannot be known: the handler is not called, and no attempt is lost."""
    bed = Bed()
    runs, failed = Seen(), Seen()

    async def handler(payload: str, context: Context) -> None:
        runs((anyio.current_time(), context.attempt))

    settings = Settings(coordinator=False, max_attempts=1)
    async with bed.queue(settings=settings, on_message=handler, middleware=[Idempotency()], on_error=failed) as queue:
        fault = bed.faults.unavailable("get", key=f"{RECORDS}*")
        began = anyio.current_time()
        await queue.enqueue("x")
        await anyio.sleep(away_s)
        bed.faults.remove(fault)
        await runs.count(1)
    assert runs.items[0][0] - began >= away_s
    assert (runs.items[0][1], failed.items) == (1, [])


@virtual
async def test_a_record_that_cannot_be_written() -> None:
    """The message is done all the same, once."""
    bed = Bed()
    runs, completed = Seen(), Seen()

    async def handler(payload: str) -> None:
        runs(payload)

    async with bed.queue(on_message=handler, middleware=[Idempotency()], on_complete=completed) as queue:
        bed.faults.unavailable("put", key=f"{RECORDS}*")
        await queue.enqueue("x")
        await completed.count(1)
        await anyio.sleep(60)
    assert runs.items == ["x"]


@pytest.mark.parametrize("how", ["drain", "timeout"])
@virtual
async def test_cancelled_while_it_is_recorded(how: str) -> None:
    """The handler is done and its record is on its way when it is cancelled: the record lands, it is not run again."""
    bed = Bed()
    runs, completed = Seen(), Seen()
    lane, faults = bed.lane()

    async def handler(payload: str) -> str:
        runs(payload)
        await anyio.sleep(1)
        return "done"

    settings = Settings(coordinator=False, handler_timeout=3 if how == "timeout" else None, backoff_base=0)
    async with bed.queue(settings=settings, storage=lane, on_message=handler, middleware=[Idempotency()]) as queue:
        faults.delay(5, "put", key=f"{RECORDS}*")
        await queue.enqueue("x")
        await runs.count(1)
        await anyio.sleep(1.5)
        if how == "drain":
            await queue.drain(timeout=0.5)
        else:
            await anyio.sleep(3)
    async with bed.queue(settings=QUIET, on_message=handler, middleware=[Idempotency()], on_complete=completed):
        if how == "drain":
            await completed.count(1)
            assert completed.items[0].result == "done"
        await anyio.sleep(20)
    assert runs.items == ["x"]
    assert await bed.live() == {}


@virtual
async def test_a_damaged_record_and_a_large_result() -> None:
    """A record that cannot be read is no record. Of a result above 16 KiB only that it was completed is kept."""
    bed = Bed()
    runs, completed = Seen(), Seen()

    async def handler(payload: str) -> bytes:
        runs(payload)
        return bytes(20_000)

    remember = Idempotency(lambda message: "key")
    async with bed.queue(on_message=handler, middleware=[remember], on_complete=completed) as queue:
        await queue.enqueue("a")
        await completed.count(1)
        await queue.enqueue("b")
        await completed.count(2)
        (record,) = await bed.keys(RECORDS)
        await bed.memory.put(record, b"damaged")
        await queue.enqueue("c")
        await completed.count(3)
    assert runs.items == ["a", "c"]
    assert [len(event.result or b"") for event in completed.items] == [20_000, 0, 20_000]


@virtual
async def test_encrypted_records() -> None:
    """With a keyring nothing of a result can be read in the store; who lacks the key gives the message back."""
    bed = Bed()
    runs, completed = Seen(), Seen()
    keyring = Keyring({"k": Keyring.new_key()})

    async def handler(payload: str) -> str:
        runs(payload)
        return "secret"

    remember = Idempotency(lambda message: "key")
    async with bed.queue(keyring=keyring, on_message=handler, middleware=[remember], on_complete=completed) as queue:
        await queue.enqueue("a")
        await completed.count(1)
        assert len(await bed.keys(RECORDS)) == 1
        assert all(b"secret" not in body for body in bed.bodies().values())
        await queue.enqueue("b")
        await completed.count(2)
        assert completed.items[1].result == "secret"
    async with bed.queue(settings=Settings(coordinator=False, max_attempts=1)) as other:
        await other.enqueue("c")
        await other.start_processing(handler)
        await completed.count(2)
        await other.stop_processing()
        other.middleware(remember)
        message_id = await other.enqueue("d")
        await other.start_processing()
        await anyio.sleep(30)
        assert await other.status(message_id) in ("pending", "delayed", "processing")
        assert await other.dead_letters.list() == []
    assert runs.items == ["a", "c"]


@virtual
async def test_expired_records_go() -> None:
    """With time, the records that are left are about those within ``ttl``, however many messages there were."""
    bed = Bed()
    completed = Seen()

    async def handler(payload: int) -> None: ...

    async with bed.queue(on_message=handler, middleware=[Idempotency(ttl=60)], on_complete=completed) as queue:
        for round_number in range(20):
            await queue.enqueue_many(range(idempotency_module.SWEEP_EVERY))
            await completed.count((round_number + 1) * idempotency_module.SWEEP_EVERY)
            await anyio.sleep(61)
        left = 0
        after = ""
        while True:
            page = await bed.memory.list(RECORDS, after=after)
            left += len(page.entries)
            if not page.more:
                break
            after = page.entries[-1].key
    assert left < 3 * idempotency_module.SWEEP_EVERY


@pytest.mark.parametrize("ttl", [0, 59, 366 * 24 * 3600])
def test_no_ttl(ttl: float) -> None:
    """The error names the value and the range."""
    with pytest.raises(InvalidSettings, match=r"ttl=.*60 to 31,536,000"):
        Idempotency(ttl=ttl)


# -- timing --------------------------------------------------------------------------------------------------------


@virtual
async def test_timing() -> None:
    """Each run is reported with what it took, what the message had waited, and how it ended."""
    bed = Bed()
    reports = Seen()

    async def handler(payload: str) -> None:
        await anyio.sleep(2)
        if payload == "bad":
            raise ValueError

    settings = Settings(coordinator=False, max_attempts=1)
    async with bed.queue(settings=settings) as producer:
        good = await producer.enqueue("good", priority=1)
        bad = await producer.enqueue("bad")
    await anyio.sleep(10)
    async with bed.queue(settings=settings, on_message=handler, middleware=[Timing(reports)], concurrency=1):
        await reports.count(2)
    one, two = reports.items
    assert isinstance(one, Timed)
    assert (one.message_id, one.attempt, one.outcome) == (good, 1, "completed")
    assert (two.message_id, two.outcome) == (bad, "ValueError")
    assert [one.seconds, two.seconds] == pytest.approx([2, 2])
    assert one.waited == pytest.approx(10, abs=1)
    assert two.waited == pytest.approx(12, abs=1)


@virtual
async def test_slow_ones_only() -> None:
    """With ``slow`` only those that took as long are reported, cancelled ones among them."""
    bed = Bed()
    reports = Seen()

    async def handler(payload: float) -> None:
        await anyio.sleep(payload)

    settings = Settings(coordinator=False, max_attempts=1, handler_timeout=10)
    timing = Timing(reports, slow=3)
    async with bed.queue(settings=settings, on_message=handler, middleware=[timing]) as queue:
        await queue.enqueue_many([1.0, 4.0, 100.0])
        await reports.count(2)
    assert [(round(report.seconds), report.outcome) for report in reports.items] == [
        (4, "completed"),
        (10, "CancelledError"),
    ]


def test_it_logs(caplog: pytest.LogCaptureFixture) -> None:
    """Without a function to report to it logs: all at info, or slow ones as warnings."""

    @virtual
    async def handle(timing: Timing) -> None:
        bed = Bed()
        completed = Seen()

        async def handler(payload: int) -> None:
            await anyio.sleep(1)

        async with bed.queue(on_message=handler, middleware=[timing], on_complete=completed) as queue:
            await queue.enqueue(1)
            await completed.count(1)

    caplog.set_level("INFO", logger="s3queue_async")
    handle(Timing())
    assert any(record.levelname == "INFO" and "event='handled'" in record.message for record in caplog.records)
    caplog.clear()
    handle(Timing(slow=0.5))
    assert any(record.levelname == "WARNING" and "a slow handler" in record.message for record in caplog.records)
    with pytest.raises(InvalidSettings, match="slow=-1"):
        Timing(slow=-1)


# -- all of them ---------------------------------------------------------------------------------------------------


@virtual
async def test_all_of_them_together() -> None:
    """A thousand messages through all four, a tenth failing once: each is completed once, nothing is left behind."""
    bed = Bed(latency_s=0.01)
    completed, timed = Seen(), Seen()

    async def handler(payload: int, context: Context) -> int:
        await anyio.sleep(0.01)
        if payload % 10 == 0 and context.attempt == 1:
            raise ConnectionError
        return payload

    middleware = [Timing(timed), Idempotency(), RateLimit(500, burst=50), CircuitBreaker(failures=5, recovery=2)]
    settings = Settings(coordinator=False, backoff_base=0.1)
    async with bed.queue(settings=settings, on_message=handler, middleware=middleware, on_complete=completed) as queue:
        await queue.enqueue_many(range(1000))
        await completed.count(1000)
    assert sorted(event.result for event in completed.items) == list(range(1000))
    assert len({event.message_id for event in completed.items}) == 1000
    assert await bed.live() == {}
